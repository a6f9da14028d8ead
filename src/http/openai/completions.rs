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
        prepare::{Scheduling, Settings, Tokenized, tokenize},
        problem::Problem,
        scoring::{self, Scored},
        types::Events,
    },
    packing::text_ids,
    prompt::{Version, template::Input},
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
    let version = resolve(&app, &caller, &request.model).await?;
    let echo = request.echo.unwrap_or(false);
    let scores_prompts = echo && request.logprobs.is_some();
    if scores_prompts && (request.stream.unwrap_or(false) || app.model.encoder.is_some()) {
        let detail = "found beside logprobs and a stream or a model with an encoder, expected no log-probabilities of the prompt";
        return Err(Problem::field("echo", detail));
    }
    let parameters = request.parameters(&app, request.logprobs, request.max_tokens)?;
    let settings = Settings::check(&app, &caller, &version, &parameters).await?;
    let mut prompts = Vec::new();
    let mut echoes = Vec::new();
    let mut scored = Vec::new();
    for (i, prompt) in inputs(&request.prompt)?.into_iter().enumerate() {
        let (tokenized, text) = match prompt {
            Given::Text(text) => (tokenize(&app, &version, Input::Text(text.clone())).await?, text),
            Given::Ids(ids) => {
                let text = if echo { app.tokenizer.decode(&ids)? } else { String::new() };
                (checked(&app, &version, i, &ids)?, text)
            }
        };
        if scores_prompts {
            scored.push(score(&app, &caller, &version, &request, started, &tokenized)?);
        }
        prompts.push(settings.clone().prepare(&app, &caller, Arc::clone(&version), tokenized, started)?);
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
    let mut prompt_tokens = Vec::new();
    for running in scored {
        prompt_tokens.push(of_prompt(&app, running.finish().await?));
    }
    let one = |(index, choice): (usize, crate::http::running::Finished)| {
        Ok(CompletionChoice {
            index,
            logprobs: choice.tokens.as_deref().map(|tokens| match prompt_tokens.get(index / choices) {
                Some(prompt) => CompletionLogprobs::echoed(prompt, tokens),
                None => CompletionLogprobs::new(tokens, 0),
            }),
            text: format!("{}{}", echoes[index / choices], choice.output),
            finish_reason: Some(FinishReason::of(choice.finish)?),
        })
    };
    let choices = finished.into_iter().enumerate().map(one).collect::<Result<Vec<_>, Problem>>()?;
    Ok(answered(&version, axum::Json(Answer { head, choices, usage: Some(usage) })))
}

/// Begins to score a prompt's own tokens.
fn score(
    app: &App,
    caller: &Caller,
    version: &Arc<Version>,
    request: &CompletionRequest,
    started: Instant,
    tokenized: &Tokenized,
) -> Result<scoring::Running, Problem> {
    let scheduling = Scheduling::check(app, caller, request.timeout_ms, request.priority)?;
    let call = scoring::Call { caller: caller.clone(), version: Arc::clone(version), scheduling, started };
    let given = tokenized.num_given(version);
    let own = text_ids(tokenized.tokens.get(given..).unwrap_or_default());
    if own.is_empty() {
        let detail = "found a prompt without a token that another comes before, which has no log-probability";
        return Err(Problem::field("echo", detail));
    }
    call.start(app, tokenized.clone(), given, vec![own])
}

/// Each token of a prompt that was scored, with its log-probability where something comes before it.
fn of_prompt(app: &App, scored: Scored) -> Vec<(String, Option<f32>)> {
    let log_probs = scored.log_probs.into_iter().next().unwrap_or_default();
    let unknown = scored.ids.len() - log_probs.len().min(scored.ids.len());
    let all = std::iter::repeat_n(None, unknown).chain(log_probs.into_iter().map(Some));
    scored.ids.iter().map(|&id| app.tokenizer.token_text(id)).zip(all).collect()
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
fn checked(app: &App, version: &Version, index: usize, ids: &[u32]) -> Result<Tokenized, Problem> {
    let vocab = app.model.vocab_size;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        let detail = format!("found the token id {id} in prompt {index}, expected 0 to {}", vocab - 1);
        return Err(Problem::field("prompt", detail));
    }
    Tokenized::of_ids(version, ids, "prompt")
}
