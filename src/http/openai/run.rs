//! Runs the prompts of one call, whole or streamed.

use std::{convert::Infallible, sync::Arc};

use axum::response::sse::Event;
use futures::{Stream, StreamExt as _, future::try_join_all, stream::select_all};
use serde::Serialize;

use super::{
    answer::{Answer, FinishReason, Head, Usage},
    error,
};
use crate::http::{
    App,
    batch::log_if_ours,
    prepare::Prepared,
    problem::Problem,
    running::{self, Finished, Piece, Running},
    types::TokenInfo,
};

/// The prompts of a call, each with its choices that the engine works on. Choice `i` of prompt `p` has the index
/// `p * choices + i`. Dropping it cancels them.
#[derive(Debug)]
pub struct Call {
    prompts: Vec<Prepared>,
    running: Vec<Running>,
}

/// What is new of a choice.
#[derive(Debug)]
pub struct News<'a> {
    pub index: usize,
    /// Whether it is the first of its choice.
    pub is_first: bool,
    pub text: String,
    pub tokens: Option<&'a [TokenInfo]>,
    pub finish: Option<FinishReason>,
}

impl Call {
    /// Hands all choices of all prompts to the engine, or none.
    ///
    /// # Errors
    /// The engine does not take one of them.
    pub fn start(app: &App, mut prompts: Vec<Prepared>) -> Result<Self, Problem> {
        let mut running = Vec::new();
        for prepared in &mut prompts {
            running.extend(running::start(app, prepared)?);
        }
        Ok(Self { prompts, running })
    }

    /// Waits for all choices, in order.
    ///
    /// # Errors
    /// One of them fails or is broken off.
    pub async fn finish(self) -> Result<(Vec<Finished>, Usage), Problem> {
        let finished = try_join_all(self.running.into_iter().map(Running::finish)).await?;
        let mut usage = Usage::default();
        let choices = finished.len() / self.prompts.len().max(1);
        for (prepared, finished) in self.prompts.iter().zip(finished.chunks(choices.max(1))) {
            let completion = finished.iter().map(|choice| choice.completion_tokens).sum();
            usage.add(prepared, finished.first().map_or(0, |choice| choice.cached_tokens), completion);
        }
        Ok((finished, usage))
    }

    /// The events of a stream, each with a choice that `choice` makes of what is new. Dropping the stream, as a client's
    /// disconnect does, cancels.
    pub fn events<T: Serialize>(
        self,
        head: Head,
        wants_usage: bool,
        request_id: Arc<str>,
        mut choice: impl FnMut(News) -> T,
    ) -> impl Stream<Item = Result<Event, Infallible>> {
        async_stream::stream! {
            let Self { prompts, running } = self;
            let choices = (running.len() / prompts.len().max(1)).max(1);
            let mut begun = vec![false; running.len()];
            let mut counts = vec![(0, 0); prompts.len()];
            let streams = running.into_iter().enumerate();
            let mut pieces = select_all(streams.map(|(i, r)| Box::pin(r.into_stream().map(move |piece| (i, piece)))));
            while let Some((index, piece)) = pieces.next().await {
                let news = match piece {
                    Ok(Piece::Delta { output, tokens }) => Ok((output, tokens, None)),
                    Ok(Piece::End { output, finish, cached_tokens, completion_tokens }) => {
                        if let Some((cached, completed)) = counts.get_mut(index / choices) {
                            *cached = cached_tokens.max(*cached);
                            *completed += completion_tokens;
                        }
                        FinishReason::of(finish).map(|finish| (output, None, Some(finish)))
                    }
                    Err(problem) => Err(problem),
                };
                match news {
                    Ok((text, tokens, finish)) => {
                        let is_first = !std::mem::replace(&mut begun[index], true);
                        let news = News { index, is_first, text, tokens: tokens.as_deref(), finish };
                        yield Ok(data(&Answer { head: head.clone(), choices: vec![choice(news)], usage: None }));
                    }
                    Err(problem) => {
                        log_if_ours(&problem, &request_id);
                        yield Ok(data(&error::body(&problem, &request_id)));
                        return;
                    }
                }
            }
            if wants_usage {
                let mut usage = Usage::default();
                for (prepared, (cached, completed)) in prompts.iter().zip(counts) {
                    usage.add(prepared, cached, completed);
                }
                yield Ok(data(&Answer::<T> { head, choices: Vec::new(), usage: Some(usage) }));
            }
            yield Ok(Event::default().data("[DONE]"));
        }
    }
}

/// JSON has no line breaks, and ours no keys but text: neither step can fail.
fn data(value: &impl Serialize) -> Event {
    Event::default().data(serde_json::to_string(value).unwrap_or_default())
}
