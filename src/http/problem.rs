//! Every error of the server as `application/problem+json` (RFC 9457): what a client reads, and how
//! it gets there.

mod code;
mod from;

use axum::{
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
pub use code::Code;
use serde::Serialize;
use utoipa::ToSchema;

/// One error on its way to the client. The outermost layer adds the request id and writes it.
#[derive(Debug, Clone)]
pub struct Problem {
    pub code: Code,
    /// What was found, what was expected and what to do.
    pub detail: String,
    /// Each fault, where there can be several.
    pub errors: Vec<ProblemError>,
    /// For the log only.
    pub cause: Option<String>,
    /// A seconds' wait after which trying again makes sense, where the code's own does not say it.
    pub retry_after: Option<u32>,
}

/// One of several faults.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ProblemError {
    /// The code that this fault alone would have.
    #[schema(value_type = String, example = "invalid_request")]
    #[serde(serialize_with = "code_as_str")]
    pub code: Code,
    /// The field of the request, as a path.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "temperature")]
    pub field: Option<String>,
    /// What was found and what was expected.
    #[schema(example = "found -1, expected 0 to 2")]
    pub detail: String,
}

/// The body of every error (RFC 9457, `application/problem+json`).
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = Problem)]
pub struct ProblemBody {
    /// A URN made of the code.
    #[serde(rename = "type")]
    #[schema(example = "urn:softserve:problem:task_not_found")]
    pub kind: String,
    /// The same for every problem of this code.
    #[schema(example = "No such task")]
    pub title: &'static str,
    /// The HTTP status.
    #[schema(example = 404)]
    pub status: u16,
    /// What was found, what was expected and what to do.
    #[schema(example = "there is no task \"topik\"; the tasks are: sentiment, topic")]
    pub detail: String,
    /// A stable word to tell problems apart by.
    #[schema(example = "task_not_found")]
    pub code: &'static str,
    /// The id that is also in the `x-request-id` header and the log.
    #[schema(example = "0199d4c8-7b1e-7d3a-a8f0-5b8a4c1d2e3f")]
    pub request_id: String,
    /// Every fault, where there can be several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<ProblemError>,
}

fn code_as_str<S: serde::Serializer>(code: &Code, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(code.as_str())
}

impl Problem {
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), errors: Vec::new(), cause: None, retry_after: None }
    }

    /// A field with a wrong value.
    pub fn field(field: &str, detail: impl Into<String>) -> Self {
        Self::fields(vec![ProblemError {
            code: Code::InvalidRequest,
            field: Some(field.to_owned()),
            detail: detail.into(),
        }])
    }

    /// Fields with wrong values; at least one.
    pub fn fields(errors: Vec<ProblemError>) -> Self {
        let line = |e: &ProblemError| match &e.field {
            Some(field) => format!("{field}: {}", e.detail),
            None => e.detail.clone(),
        };
        let detail = errors.iter().map(line).collect::<Vec<_>>().join("; ");
        Self { errors, ..Self::new(Code::InvalidRequest, detail) }
    }

    /// A fault of ours: the cause goes to the log, the client learns where to look.
    pub fn internal(cause: impl ToString) -> Self {
        let detail = "the server failed; its log has the cause under this request id";
        Self { cause: Some(cause.to_string()), ..Self::new(Code::Internal, detail) }
    }

    /// Values overflow in the forward pass, after this many new tokens.
    pub fn not_finite(new_tokens: usize) -> Self {
        let detail = format!(
            "after {new_tokens} new tokens the model's output is not finite: with this learned prompt values overflow in the \
             forward pass; tune the prompt again with a lower learning rate, or use another version"
        );
        Self::new(Code::LogitsNotFinite, detail)
    }

    /// What the answer must obey leaves no next token, after this many.
    pub fn no_token_allowed(new_tokens: usize, reason: &str) -> Self {
        let detail = format!(
            "after {new_tokens} new tokens the answer cannot go on: {reason}; change the grammar, or what bad_words forbids"
        );
        Self::new(Code::NoTokenAllowed, detail)
    }

    /// The engine takes nothing any more.
    pub fn stopping() -> Self {
        Self::new(Code::Unavailable, "the server is stopping: try again, or ask another replica")
    }

    /// The request's time was over before it was answered.
    pub fn timeout() -> Self {
        let detail = "the time that timeout_ms or the server gives a request was over before the answer: give it more, or try \
                      again when the server has less to do";
        Self::new(Code::Timeout, detail)
    }

    /// A seconds' wait after which trying again makes sense.
    pub fn retry_after(&self) -> Option<u32> {
        self.retry_after.or(match self.code {
            Code::Overloaded | Code::RateLimited => Some(1),
            Code::Unavailable | Code::PromptUnreadable | Code::StoreUnavailable => Some(5),
            _ => None,
        })
    }

    /// What the client reads.
    pub fn body(&self, request_id: &str) -> ProblemBody {
        ProblemBody {
            kind: format!("urn:softserve:problem:{}", self.code.as_str()),
            title: self.code.title(),
            status: self.code.status().as_u16(),
            detail: self.detail.clone(),
            code: self.code.as_str(),
            request_id: request_id.to_owned(),
            errors: self.errors.clone(),
        }
    }

    /// The finished answer.
    pub fn write(&self, request_id: &str) -> Response {
        // A ProblemBody is text and numbers: it cannot fail to be JSON.
        let body = serde_json::to_vec(&self.body(request_id)).unwrap_or_default();
        let mut response = (self.code.status(), body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = self.retry_after() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.code == Code::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// Carries the problem to the layer that knows the request id.
impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.code.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_of_a_server_fault_is_not_in_the_answer() -> serde_json::Result<()> {
        let problem = Problem::internal("disk /secret is full");
        let body = serde_json::to_string(&problem.body("id"))?;
        assert!(!body.contains("secret"), "{body}");
        assert_eq!(problem.cause.as_deref(), Some("disk /secret is full"));
        Ok(())
    }
}
