//! Several items of one call, computed together.

use futures::{StreamExt as _, stream::FuturesUnordered};

use super::{
    problem::{Code, Problem},
    types::BatchResult,
};

/// The answers to items, in order. As many as may wait are started before any is waited for, so that they share forward
/// passes; the others follow as those end, since a call must not be refused for its own sake.
pub async fn answer_all<I, S, T, Started, Ended>(
    items: Vec<I>,
    start: impl Fn(I) -> Started,
    finish: impl Fn(S) -> Ended,
) -> Vec<Result<T, Problem>>
where
    I: Clone,
    Started: Future<Output = Result<S, Problem>>,
    Ended: Future<Output = Result<T, Problem>>,
{
    let mut results = Vec::with_capacity(items.len());
    let mut open = FuturesUnordered::new();
    for (index, item) in items.into_iter().enumerate() {
        let started = loop {
            let started = start(item.clone()).await;
            if !matches!(&started, Err(problem) if problem.code == Code::Overloaded) {
                break started;
            }
            match open.next().await {
                Some(ended) => results.push(ended),
                None => break started,
            }
        };
        match started {
            Ok(started) => {
                let ended = finish(started);
                open.push(async move { (index, ended.await) });
            }
            Err(problem) => results.push((index, Err(problem))),
        }
        tokio::task::yield_now().await;
    }
    results.extend(open.collect::<Vec<_>>().await);
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

/// An item's answer or problem, as the client gets it.
pub fn item<T>(result: Result<T, Problem>, request_id: &str) -> BatchResult<T> {
    match result {
        Ok(answer) => BatchResult::Answer(Box::new(answer)),
        Err(problem) => {
            log_if_ours(&problem, request_id);
            BatchResult::Problem(problem.body(request_id))
        }
    }
}

/// Logs a problem that does not end up as the answer's status.
pub fn log_if_ours(problem: &Problem, request_id: &str) {
    if problem.code.status().is_server_error() {
        tracing::error!(request_id, code = problem.code.as_str(), cause = problem.cause, "a request failed");
    }
}
