//! Errors in OpenAI's shape, for the paths whose clients read that.

use axum::{
    http::{HeaderValue, header},
    response::{IntoResponse as _, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::http::problem::{Code, Problem};

/// The paths whose errors have this shape, and all below them.
const PATHS: [&str; 6] =
    ["/v1/completions", "/v1/chat/completions", "/v1/decisions", "/v1/models", "/v1/files", "/v1/batches"];

/// Whether errors of a path have this shape.
pub fn is_of(path: &str) -> bool {
    PATHS.iter().any(|of| path.strip_prefix(of).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
}

/// The body of every error of OpenAI's routes.
#[derive(Debug, Serialize, ToSchema)]
pub struct OpenAiError {
    pub error: ErrorDetail,
}

/// What went wrong, in OpenAI's words.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = OpenAiErrorDetail)]
pub struct ErrorDetail {
    /// What was found, what was expected and what to do.
    #[schema(
        example = "model: there is no task \"topik\"; the tasks are: sentiment, topic; the base model is \"demo\""
    )]
    pub message: String,
    /// `invalid_request_error`, `rate_limit_error` or `server_error`.
    #[serde(rename = "type")]
    #[schema(example = "invalid_request_error")]
    pub kind: &'static str,
    /// The field of the request that is wrong, where it is one.
    #[schema(example = "model")]
    pub param: Option<String>,
    /// A stable word: OpenAI's where it has one, otherwise that of the problem.
    #[schema(example = "model_not_found")]
    pub code: &'static str,
    /// The id that is also in the `x-request-id` header and the log.
    #[schema(example = "0199d4c8-7b1e-7d3a-a8f0-5b8a4c1d2e3f")]
    pub request_id: String,
}

/// OpenAI's word for a problem.
fn word(code: Code) -> &'static str {
    match code {
        Code::TaskNotFound | Code::VersionNotFound => "model_not_found",
        Code::InputTooLong => "context_length_exceeded",
        Code::Unauthorized => "invalid_api_key",
        Code::Overloaded | Code::RateLimited => "rate_limit_exceeded",
        code => code.as_str(),
    }
}

/// A problem as OpenAI's clients read it.
pub fn body(problem: &Problem, request_id: &str) -> OpenAiError {
    let status = problem.code.status();
    let kind = match problem.code {
        Code::Overloaded => "rate_limit_error",
        _ if status.is_server_error() => "server_error",
        _ => "invalid_request_error",
    };
    let param = match problem.code {
        Code::TaskNotFound | Code::VersionNotFound | Code::NoActiveVersion => Some("model".to_owned()),
        _ => problem.errors.iter().find_map(|error| error.field.clone()),
    };
    let error = ErrorDetail {
        message: problem.detail.clone(),
        kind,
        param,
        code: word(problem.code),
        request_id: request_id.to_owned(),
    };
    OpenAiError { error }
}

/// The finished answer.
pub fn write(problem: &Problem, request_id: &str) -> Response {
    let mut response = (problem.code.status(), axum::Json(body(problem, request_id))).into_response();
    if let Some(seconds) = problem.retry_after() {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    if problem.code == Code::Unauthorized {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_openais_paths_have_this_shape() {
        for path in ["/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/a%2Fb"] {
            assert!(is_of(path), "{path}");
        }
        for path in ["/v1/tasks", "/v1/completionsx", "/v1/chat", "/v1/modelsx/a", "/"] {
            assert!(!is_of(path), "{path}");
        }
    }
}
