//! `POST /v1/chat/completions`.

use std::{sync::Arc, time::Instant};

use axum::{
    extract::State,
    response::{Response, Sse, sse::KeepAlive},
};
use serde_json::{Map, Value};

use super::{
    answer::{Answer, AnswerMessage, ChatChoice, ChatChunkChoice, Delta, FinishReason, Head},
    logprobs::ChatLogprobs,
    request::{ChatMessage, ChatRequest, Content, read},
    resolve,
    run::{Call, News},
};
use crate::{
    http::{
        App, AppState,
        access::Caller,
        answered,
        extract::{Json, RequestId},
        prepare::{Settings, Tokenized, tokenize, tokenize_chat},
        problem::Problem,
        running::Finished,
        types::Events,
    },
    prompt::{Version, chat::Message, template::Input},
};

const ROLES: [&str; 4] = ["system", "developer", "user", "assistant"];
const ASSISTANT: &str = "assistant";

/// Create a chat completion
///
/// OpenAI's chat completions. The base model and a task whose `task.json` has a `chat_template` take conversations; any other
/// task takes one message of the user, which is the input of its template.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "openai",
    request_body = ChatRequest,
    responses((status = 200, description = "The answers, whole or as events",
        content((Answer<ChatChoice> = "application/json"), (Events = "text/event-stream")))),
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
    let request: ChatRequest = read(body)?;
    let version = resolve(&app, &caller, &request.model).await?;
    let logprobs = match (request.logprobs.unwrap_or(false), request.top_logprobs) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => {
            return Err(Problem::field(
                "top_logprobs",
                "found without logprobs, expected \"logprobs\": true beside it",
            ));
        }
    };
    let max_tokens = request.max_completion_tokens.or(request.max_tokens);
    let settings = Settings::check(&app, &caller, &version, &request.parameters(&app, logprobs, max_tokens)?).await?;
    let tokenized = conversation(&app, &version, &request.messages).await?;
    let prepared = settings.prepare(&app, &caller, Arc::clone(&version), tokenized, started)?;
    let call = Call::start(&app, vec![prepared])?;
    if request.stream.unwrap_or(false) {
        let head = Head::new("chatcmpl", "chat.completion.chunk", &request.model, &version);
        let events = call.events(head, request.wants_usage(), request_id, chunk);
        return Ok(answered(&version, Sse::new(events).keep_alive(KeepAlive::default())));
    }
    let (finished, usage) = call.finish().await?;
    let one = |(index, choice): (usize, Finished)| {
        Ok(ChatChoice {
            index,
            logprobs: choice.tokens.as_deref().map(ChatLogprobs::new),
            message: AnswerMessage { role: ASSISTANT, content: choice.output, refusal: None },
            finish_reason: Some(FinishReason::of(choice.finish)?),
        })
    };
    let choices = finished.into_iter().enumerate().map(one).collect::<Result<Vec<_>, Problem>>()?;
    let head = Head::new("chatcmpl", "chat.completion", &request.model, &version);
    Ok(answered(&version, axum::Json(Answer { head, choices, usage: Some(usage) })))
}

fn chunk(News { index, is_first, text, tokens, finish }: News) -> ChatChunkChoice {
    // Clients wait for a role in the first chunk; the last one may have no text.
    let delta = Delta {
        role: is_first.then_some(ASSISTANT),
        content: (is_first || finish.is_none() || !text.is_empty()).then_some(text),
    };
    ChatChunkChoice { index, delta, logprobs: tokens.map(ChatLogprobs::new), finish_reason: finish }
}

/// The token ids of a conversation.
async fn conversation(app: &App, version: &Arc<Version>, messages: &[ChatMessage]) -> Result<Tokenized, Problem> {
    if messages.is_empty() {
        return Err(Problem::field("messages", "found none, expected at least one"));
    }
    let mut plain = Vec::with_capacity(messages.len());
    for (i, message) in messages.iter().enumerate() {
        let role = plain_role(&message.role, &format!("messages[{i}]"))?;
        plain.push(Message { role: role.to_owned(), content: text(i, &message.content)?, name: message.name.clone() });
    }
    message_ids(app, version, plain, "messages").await
}

/// A role as templates know it.
///
/// # Errors
/// There is no such role.
pub fn plain_role<'a>(role: &'a str, at: &str) -> Result<&'a str, Problem> {
    match role {
        // Its newer name.
        "developer" => Ok("system"),
        role if ROLES.contains(&role) => Ok(role),
        other => {
            let other: String = other.chars().take(40).collect();
            let detail = format!("found {other:?}, expected one of {}", ROLES.join(", "));
            Err(Problem::field(&format!("{at}.role"), detail))
        }
    }
}

/// The token ids of a conversation of plain messages, which stand in a field of the request.
///
/// # Errors
/// The version does not take these messages.
pub async fn message_ids(
    app: &App,
    version: &Arc<Version>,
    mut plain: Vec<Message>,
    field: &str,
) -> Result<Tokenized, Problem> {
    if version.chat.is_some() || version.learned_prompt().is_none() {
        return tokenize_chat(app, version, plain).await;
    }
    match plain.as_mut_slice() {
        [only] if only.role == "user" => tokenize(app, version, Input::Text(std::mem::take(&mut only.content))).await,
        _ => {
            let roles: Vec<&str> = plain.iter().map(|message| message.role.as_str()).collect();
            let detail = format!(
                "found {} ({}), expected one message of the user: the task {} was tuned on single inputs. Give it a \
                 \"chat_template\" in its task.json if it was tuned on conversations",
                roles.len(),
                roles.join(", "),
                version.task
            );
            Err(Problem::field(field, detail))
        }
    }
}

/// The text of a message, whose parts are joined.
fn text(index: usize, content: &Content) -> Result<String, Problem> {
    match content {
        Content::Text(text) => Ok(text.clone()),
        Content::Parts(parts) => {
            let mut joined = String::new();
            for (i, part) in parts.iter().enumerate() {
                let field = format!("messages[{index}].content[{i}]");
                match (&*part.kind, &part.text) {
                    ("text", Some(text)) => joined += text,
                    ("text", None) => return Err(Problem::field(&field, "it has no \"text\"")),
                    (other, _) => {
                        let other: String = other.chars().take(40).collect();
                        let detail = format!(
                            "found a part of the type {other:?}, expected \"text\": the model reads nothing else"
                        );
                        return Err(Problem::field(&field, detail));
                    }
                }
            }
            Ok(joined)
        }
    }
}
