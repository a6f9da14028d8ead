//! Texts to token ids, as a task's template or nobody gives them to the model, and back.

use axum::extract::State;

use super::{
    AppState,
    access::Caller,
    extract::Json,
    prepare,
    problem::Problem,
    types::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse},
};
use crate::prompt::template::Input;

/// The most ids of one call to detokenize.
const MAX_TOKENS: usize = 1 << 20;

/// Tokenize a text
///
/// The ids of an input as a task's template gives it to the model, or of a text by itself.
#[utoipa::path(post, path = "/tokenize", tag = "tasks", request_body = TokenizeRequest,
    responses((status = 200, body = TokenizeResponse, description = "The tokens")),
    extensions(("x-problems" = json!(["invalid_request", "incomplete_body", "task_not_found", "version_not_found",
        "no_active_version", "request_timeout", "body_too_large", "unsupported_media_type", "unavailable"]))))]
pub async fn tokenize(
    State(app): State<AppState>,
    caller: Caller,
    Json(request): Json<TokenizeRequest>,
) -> Result<axum::Json<TokenizeResponse>, Problem> {
    let Some(input) = request.input else {
        return Err(Problem::field("input", "it is missing, expected a text, or an object with a text for each field"));
    };
    let (tokens, virtual_tokens) = match (request.task, input) {
        (Some(task), input) => {
            if request.special_tokens.is_some() {
                let detail =
                    "found beside \"task\", expected it without one: a task's task.json says what special tokens are";
                return Err(Problem::field("special_tokens", detail));
            }
            let version = app.version(&caller, &task, request.version.as_deref()).await?;
            let tokenized = prepare::tokenize(&app, &version, input).await?;
            (tokenized.text_ids(), version.prompt.num_virtual_tokens())
        }
        (None, Input::Text(text)) => {
            if request.version.is_some() {
                return Err(Problem::field("version", "found without a task, expected \"task\" beside it"));
            }
            let (tokenizer, special) = (app.tokenizer.clone(), request.special_tokens.unwrap_or(true));
            let work = move || match special {
                true => tokenizer.tokenize(&text),
                false => tokenizer.tokenize_plain(&text),
            };
            (super::blocking(work).await?, 0)
        }
        (None, Input::Fields(_)) => {
            return Err(Problem::field(
                "input",
                "found an object without a task, expected a text, or \"task\" beside it",
            ));
        }
    };
    let texts = tokens.iter().map(|&id| app.tokenizer.token_text(id)).collect();
    Ok(axum::Json(TokenizeResponse { texts, count: tokens.len(), tokens, virtual_tokens }))
}

/// Make a text of tokens
///
/// The text of ids of the model's vocabulary, special tokens included.
#[utoipa::path(post, path = "/detokenize", tag = "tasks", request_body = DetokenizeRequest,
    responses((status = 200, body = DetokenizeResponse, description = "The text")),
    extensions(("x-problems" = json!(["invalid_request", "incomplete_body", "request_timeout", "body_too_large",
        "unsupported_media_type", "unavailable"]))))]
pub async fn detokenize(
    State(app): State<AppState>,
    Json(request): Json<DetokenizeRequest>,
) -> Result<axum::Json<DetokenizeResponse>, Problem> {
    let (found, vocab) = (request.tokens.len(), app.tokenizer.vocab_size());
    if found > MAX_TOKENS {
        return Err(Problem::field("tokens", format!("found {found}, expected at most {MAX_TOKENS}")));
    }
    if let Some((i, id)) = request.tokens.iter().enumerate().find(|(_, id)| **id as usize >= vocab) {
        let detail = format!("found {id}, expected an id below {vocab}, the size of the vocabulary");
        return Err(Problem::field(&format!("tokens[{i}]"), detail));
    }
    let tokenizer = app.tokenizer.clone();
    let text = super::blocking(move || tokenizer.decode_all(&request.tokens)).await?;
    Ok(axum::Json(DetokenizeResponse { text }))
}
