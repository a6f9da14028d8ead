//! Generating, one request or several, whole or streamed; and the list of what can be called.

use std::{convert::Infallible, sync::Arc};

use axum::{
    extract::State,
    response::{
        Response, Sse,
        sse::{Event, KeepAlive},
    },
};
use futures::{Stream, StreamExt as _, future::join_all, stream::select_all};

use super::{
    App, AppState,
    access::Caller,
    answered,
    batch::{answer_all, item, log_if_ours},
    blocking,
    extract::{Json, NameRange, Query, RequestId, ResolvedTask, TaskParam, from_value},
    prepare::{Prepared, prepare},
    problem::Problem,
    running::{self, Finished, Piece, Running},
    types::{
        BatchRequest, BatchResponse, ChoiceInfo, Events, GenerateRequest, GenerateResponse, StreamEvent, TaskInfo,
        TaskList,
    },
};
use crate::prompt::Version;

/// The most requests of one batch.
const MAX_BATCH_REQUESTS: usize = 256;

/// Generate a text
///
/// Puts the task's learned prompt in front of the input and lets the model go on. With
/// `"stream": true` the answer comes as server-sent events, each with the text that is new, then
/// `data: [DONE]`; an error after the first event comes as `event: error` with a problem.
#[utoipa::path(post, path = "/v1/tasks/{task}/generate", tag = "generate",
    params(("task" = String, Path, description = "The task's name", example = "sentiment")),
    request_body = GenerateRequest,
    responses((status = 200, description = "The answer, whole or as events",
        content((GenerateResponse = "application/json"), (Events = "text/event-stream")))),
    extensions(("x-problems" = json!(["invalid_request", "input_too_long", "incomplete_body", "task_not_found",
        "version_not_found", "no_active_version", "request_timeout", "body_too_large", "unsupported_media_type",
        "logits_not_finite", "no_token_allowed", "overloaded", "unavailable"]))))]
pub async fn generate(
    State(app): State<AppState>,
    TaskParam(task): TaskParam,
    RequestId(request_id): RequestId,
    caller: Caller,
    Json(request): Json<GenerateRequest>,
) -> Result<Response, Problem> {
    let stream = request.stream.unwrap_or(false);
    let mut prepared = prepare(&app, &caller, &task, request).await?;
    let running = running::start(&app, &mut prepared)?;
    if stream {
        let version = Arc::clone(&prepared.version);
        let events = events(prepared, running, request_id);
        return Ok(answered(&version, Sse::new(events).keep_alive(KeepAlive::default())));
    }
    let version = Arc::clone(&prepared.version);
    let answer = finish(prepared, running).await?;
    Ok(answered(&version, axum::Json(answer)))
}

/// Generate several texts
///
/// Requests of any tasks, computed together. Each is answered on its own: one that is wrong does
/// not keep the others from their answers.
#[utoipa::path(post, path = "/v1/generate", tag = "generate",
    request_body = BatchRequest,
    responses((status = 200, body = BatchResponse, description = "An answer or a problem for each request, in order",
        example = json!({"results": [
            {"id": "0199d4c8-7b1e-7d3a-a8f0-5b8a4c1d2e3f", "task": "sentiment", "version": "3f9a0c1b2d4e",
             "output": "positive", "finish_reason": "stop",
             "usage": {"virtual_tokens": 20, "prompt_tokens": 5, "cached_tokens": 0, "completion_tokens": 1}},
            {"type": "urn:softserve:problem:task_not_found", "title": "No such task", "status": 404,
             "detail": "there is no task \"topik\"; the tasks are: sentiment, topic", "code": "task_not_found",
             "request_id": "0199d4c8-7b1e-7d3a-a8f0-5b8a4c1d2e40"}]}))),
    extensions(("x-problems" = json!(["invalid_request", "incomplete_body", "request_timeout", "body_too_large",
        "unsupported_media_type", "unavailable"]))))]
pub async fn generate_batch(
    State(app): State<AppState>,
    RequestId(request_id): RequestId,
    caller: Caller,
    Json(batch): Json<BatchRequest>,
) -> Result<axum::Json<BatchResponse>, Problem> {
    let found = batch.requests.len();
    if !(1..=MAX_BATCH_REQUESTS).contains(&found) {
        return Err(Problem::field("requests", format!("found {found}, expected 1 to {MAX_BATCH_REQUESTS}")));
    }
    let start = |item| start_item(&app, &caller, item);
    let results = answer_all(batch.requests, start, |(prepared, running)| finish(prepared, running)).await;
    let results = results.into_iter().map(|result| item(result, &request_id));
    Ok(axum::Json(BatchResponse { results: results.collect() }))
}

/// List the tasks
///
/// Every task with an active version: what its input looks like and what may be asked of it.
#[utoipa::path(get, path = "/v1/tasks", tag = "tasks",
    params(NameRange),
    responses((status = 200, body = TaskList, description = "The tasks by name",
        example = json!({"tasks": [{"task": "sentiment", "version": "3f9a0c1b2d4e",
            "description": "positive or negative", "fields": ["input"], "labels": ["negative", "positive"],
            "virtual_tokens": 20, "limits": {"max_input_tokens": 491, "max_tokens": 492}}]}))),
    extensions(("x-problems" = json!(["invalid_request"]))))]
pub async fn list_tasks(
    State(app): State<AppState>,
    caller: Caller,
    Query(range): Query<NameRange>,
) -> Result<axum::Json<TaskList>, Problem> {
    let limit = range.limit()?;
    let registry = Arc::clone(&app.registry);
    let page = blocking(move || {
        Ok::<_, Problem>(registry.active_page(range.after.as_deref(), limit, |task| caller.sees(task)))
    })
    .await?;
    let info = |version: &Arc<Version>| TaskInfo::new(version, app.engine.token_budget(Some(&version.prompt)));
    Ok(axum::Json(TaskList { tasks: page.items.iter().map(info).collect(), next: page.next }))
}

/// Show a task
///
/// What its input looks like and what may be asked of it.
#[utoipa::path(get, path = "/v1/tasks/{task}", tag = "tasks",
    params(("task" = String, Path, description = "The task's name", example = "sentiment")),
    responses((status = 200, body = TaskInfo, description = "The task")),
    extensions(("x-problems" = json!(["task_not_found", "no_active_version"]))))]
pub async fn get_task(State(app): State<AppState>, ResolvedTask(version): ResolvedTask) -> axum::Json<TaskInfo> {
    axum::Json(TaskInfo::new(&version, app.engine.token_budget(Some(&version.prompt))))
}

async fn start_item(
    app: &App,
    caller: &Caller,
    mut item: serde_json::Map<String, serde_json::Value>,
) -> Result<(Prepared, Vec<Running>), Problem> {
    let Some(task) = item.remove("task") else {
        return Err(Problem::field("task", "it is missing, expected the name of a task"));
    };
    let serde_json::Value::String(task) = task else {
        return Err(Problem::field("task", format!("found {task}, expected the name of a task")));
    };
    let request: GenerateRequest = from_value(item.into())?;
    if request.stream.unwrap_or(false) {
        return Err(Problem::field("stream", "found true, expected false: a batch is answered as a whole"));
    }
    let mut prepared = prepare(app, caller, &task, request).await?;
    let running = running::start(app, &mut prepared)?;
    Ok((prepared, running))
}

/// Waits for all choices of a request.
async fn finish(prepared: Prepared, running: Vec<Running>) -> Result<GenerateResponse, Problem> {
    let choices = join_all(running.into_iter().map(Running::finish)).await;
    let choices = choices.into_iter().collect::<Result<Vec<Finished>, Problem>>()?;
    let completion_tokens = choices.iter().map(|c| c.completion_tokens).sum();
    let usage = prepared.usage(choices.first().map_or(0, |c| c.cached_tokens), completion_tokens);
    let mut choices: Vec<_> = choices
        .into_iter()
        .enumerate()
        .map(|(index, c)| ChoiceInfo { index, output: c.output, finish_reason: c.finish, tokens: c.tokens })
        .collect();
    let all = (choices.len() > 1).then(|| choices.clone());
    if choices.is_empty() {
        return Err(Problem::internal("a request without choices"));
    }
    let first = choices.swap_remove(0);
    Ok(GenerateResponse {
        id: prepared.id,
        task: prepared.version.task.clone(),
        version: prepared.version.digest.id(),
        output: first.output,
        finish_reason: first.finish_reason,
        usage,
        tokens: first.tokens,
        choices: all,
    })
}

/// The events of a streamed answer. Dropping the stream, as a client's disconnect does, cancels.
fn events(
    prepared: Prepared,
    running: Vec<Running>,
    request_id: Arc<str>,
) -> impl Stream<Item = Result<Event, Infallible>> {
    async_stream::stream! {
        let version = prepared.version.digest.id();
        let mut open = running.len();
        let (mut cached, mut completed) = (0, 0);
        let streams = running.into_iter().enumerate();
        let mut pieces = select_all(streams.map(|(i, r)| Box::pin(r.into_stream().map(move |piece| (i, piece)))));
        while let Some((index, piece)) = pieces.next().await {
            let (output, tokens, finish_reason) = match piece {
                Ok(Piece::Delta { output, tokens }) => (output, tokens, None),
                Ok(Piece::End { output, finish, cached_tokens, completion_tokens }) => {
                    open -= 1;
                    completed += completion_tokens;
                    cached = if index == 0 { cached_tokens } else { cached };
                    (output, None, Some(finish))
                }
                Err(problem) => {
                    log_if_ours(&problem, &request_id);
                    yield Ok(data(&problem.body(&request_id)).event("error"));
                    return;
                }
            };
            yield Ok(data(&StreamEvent {
                id: &prepared.id,
                task: prepared.version.task.as_str(),
                version: &version,
                index,
                output,
                tokens,
                finish_reason,
                usage: (open == 0).then(|| prepared.usage(cached, completed)),
            }));
        }
        yield Ok(Event::default().data("[DONE]"));
    }
}

/// JSON has no line breaks, and ours no keys but text: neither step can fail.
fn data(value: &impl serde::Serialize) -> Event {
    Event::default().data(serde_json::to_string(value).unwrap_or_default())
}
