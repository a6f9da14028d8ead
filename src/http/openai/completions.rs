//! `POST /v1/completions`.

use std::{sync::Arc, time::Instant};

use axum::{
    extract::State,
    response::{Response, Sse, sse::KeepAlive},
};
use serde_json::{Map, Value};

use super::{
    answer::{Answer, CompletionChoice, FinishReason, Head},
    logprobs::CompletionLogprobs,
    request::{CompletionRequest, Prompt, read},
    resolve,
    run::{Call, News},
};
use crate::{
    http::{
        App, AppState,
        access::Caller,
        answered,
        extract::{Json, RequestId},
        prepare::{Settings, Tokenized, tokenize},
        problem::Problem,
        types::Events,
    },
    prompt::template::Input,
};

/// The most prompts of one call.
const MAX_PROMPTS: usize = 256;

/// Create a completion
///
/// OpenAI's completions. A text is the input of the task's template; token ids are taken as they are, after the learned prompt.
#[utoipa::path(post, path = "/v1/completions", tag = "openai",
    request_body = CompletionRequest,
    responses((status = 200, description = "The answers, whole or as events",
        content((Answer<CompletionChoice> = "application/json"), (Events = "text/event-stream")))),
    extensions(("x-problems" = json!(["invalid_request", "input_too_long", "incomplete_body", "task_not_found",
        "version_not_found", "no_active_version", "request_timeout", "body_too_large", "unsupported_media_type",
        "logits_not_finite", "no_token_allowed", "overloaded", "unavailable", "timeout"]))))]
pub async fn create(
    State(app): State<AppState>,
    RequestId(request_id): RequestId,
    caller: Caller,
    Json(body): Json<Map<String, Value>>,
) -> Result<Response, Problem> {
    let started = Instant::now();
    let request: CompletionRequest = read(body)?;
    let version = resolve(&app, &request.model)?;
    let echo = request.echo.unwrap_or(false);
    if echo && request.logprobs.is_some() {
        return Err(Problem::field(
            "echo",
            "found beside logprobs, expected one of the two: ask /v1/tasks/{task}/score for the log-probabilities of an input",
        ));
    }
    let parameters = request.parameters(&app, request.logprobs, request.max_tokens)?;
    let settings = Settings::check(&app, caller, &version, &parameters).await?;
    let mut prompts = Vec::new();
    let mut echoes = Vec::new();
    for (i, prompt) in inputs(&request.prompt)?.into_iter().enumerate() {
        let (tokenized, text) = match prompt {
            Given::Text(text) => (tokenize(&app, &version, Input::Text(text.clone())).await?, text),
            Given::Ids(ids) => {
                let text = if echo { app.tokenizer.decode(&ids)? } else { String::new() };
                (checked(&app, i, ids)?, text)
            }
        };
        prompts.push(settings.clone().prepare(&app, caller, Arc::clone(&version), tokenized, started)?);
        echoes.push(if echo { text } else { String::new() });
    }
    let choices = request.n.unwrap_or(1);
    let call = Call::start(&app, prompts)?;
    let head = Head::new("cmpl", "text_completion", &request.model, &version);
    if request.stream.unwrap_or(false) {
        let mut offsets = vec![0; echoes.len() * choices];
        let choice = move |news: News| {
            let News { index, is_first, text, tokens, finish } = news;
            let logprobs = tokens.map(|tokens| CompletionLogprobs::new(tokens, offsets[index]));
            offsets[index] += text.chars().count();
            let text = if is_first { format!("{}{text}", echoes[index / choices]) } else { text };
            CompletionChoice { index, text, logprobs, finish_reason: finish }
        };
        let events = call.events(head, request.wants_usage(), request_id, choice);
        return Ok(answered(&version, Sse::new(events).keep_alive(KeepAlive::default())));
    }
    let (finished, usage) = call.finish().await?;
    let one = |(index, choice): (usize, crate::http::running::Finished)| {
        Ok(CompletionChoice {
            index,
            logprobs: choice.tokens.as_deref().map(|tokens| CompletionLogprobs::new(tokens, 0)),
            text: format!("{}{}", echoes[index / choices], choice.output),
            finish_reason: Some(FinishReason::of(choice.finish)?),
        })
    };
    let choices = finished.into_iter().enumerate().map(one).collect::<Result<Vec<_>, Problem>>()?;
    Ok(answered(&version, axum::Json(Answer { head, choices, usage: Some(usage) })))
}

/// One prompt of a call.
enum Given {
    Text(String),
    Ids(Vec<u32>),
}

fn inputs(prompt: &Prompt) -> Result<Vec<Given>, Problem> {
    let inputs: Vec<Given> = match prompt {
        Prompt::Text(text) => vec![Given::Text(text.clone())],
        Prompt::Texts(texts) => texts.iter().cloned().map(Given::Text).collect(),
        Prompt::Ids(ids) => vec![Given::Ids(ids.clone())],
        Prompt::ListsOfIds(lists) => lists.iter().cloned().map(Given::Ids).collect(),
    };
    match inputs.len() {
        1..=MAX_PROMPTS => Ok(inputs),
        found => Err(Problem::field("prompt", format!("found {found} prompts, expected 1 to {MAX_PROMPTS}"))),
    }
}

/// Ids that the model has.
fn checked(app: &App, index: usize, ids: Vec<u32>) -> Result<Tokenized, Problem> {
    let vocab = app.model.vocab_size;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        let detail = format!("found the token id {id} in prompt {index}, expected 0 to {}", vocab - 1);
        return Err(Problem::field("prompt", detail));
    }
    Ok(Tokenized { ids, num_public: 0 })
}
