//! Every error of the server as `application/problem+json` (RFC 9457): one table of codes and
//! statuses, and a conversion from the error of each layer.

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    engine::SubmitError,
    prompt::{
        format::{FaultKind, Faults},
        task::InvalidTaskName,
        template::TemplateError,
    },
    registry::{RegistryError, package::PackageError},
    text::TextError,
};

macro_rules! codes {
    ($($name:ident $code:literal $status:ident $title:literal $when:literal;)*) => {
        /// What went wrong, in a word that clients can rely on.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code { $(#[doc = $when] $name,)* }

        impl Code {
            /// All codes, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The word on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $code,)* }
            }

            /// The HTTP status that goes with it.
            pub fn status(self) -> StatusCode {
                match self { $(Self::$name => StatusCode::$status,)* }
            }

            /// A short text for people, the same for every problem of this code.
            pub fn title(self) -> &'static str {
                match self { $(Self::$name => $title,)* }
            }

            /// When it happens.
            pub fn when(self) -> &'static str {
                match self { $(Self::$name => $when,)* }
            }
        }
    };
}

codes! {
    InvalidRequest "invalid_request" BAD_REQUEST "The request is not valid"
        "The body is not JSON, or a field is unknown, of the wrong type or out of its range.";
    InputTooLong "input_too_long" BAD_REQUEST "The input is too long"
        "Learned prompt and input leave no position of the model's context for an answer, or the input is over the task's limit.";
    IncompleteBody "incomplete_body" BAD_REQUEST "The body ended early"
        "The connection broke before the whole body had arrived.";
    InvalidUpload "invalid_upload" BAD_REQUEST "The upload cannot be unpacked"
        "The archive is damaged, has an unsafe entry, or holds no learned prompt.";
    Unauthorized "unauthorized" UNAUTHORIZED "A key is needed"
        "The server has keys, and the request shows none or one that is not known.";
    Forbidden "forbidden" FORBIDDEN "Not allowed"
        "The key is not an admin key, or the admin routes are closed because no admin key is set.";
    NotFound "not_found" NOT_FOUND "No such path"
        "The server has no such path.";
    TaskNotFound "task_not_found" NOT_FOUND "No such task"
        "No task has this name.";
    VersionNotFound "version_not_found" NOT_FOUND "No such version"
        "The task has no version of this id.";
    MethodNotAllowed "method_not_allowed" METHOD_NOT_ALLOWED "The path has other methods"
        "The path exists, but not with this method; the Allow header lists those it has.";
    RequestTimeout "request_timeout" REQUEST_TIMEOUT "The body came too slowly"
        "No piece of the body arrived for too long.";
    NoActiveVersion "no_active_version" CONFLICT "The task has no active version"
        "The task has stored versions, but none is active and the request names none.";
    VersionActive "version_active" CONFLICT "The version is active"
        "The active version cannot be deleted while the task has others.";
    RegistryFull "registry_full" CONFLICT "No room for another"
        "The server keeps as many tasks or versions as it may.";
    PreconditionFailed "precondition_failed" PRECONDITION_FAILED "The task has changed"
        "If-Match names another state of the task than the present one.";
    BodyTooLarge "body_too_large" PAYLOAD_TOO_LARGE "The body is too large"
        "The body, or what it unpacks to, is over the server's limit.";
    UnsupportedMediaType "unsupported_media_type" UNSUPPORTED_MEDIA_TYPE "Another content type is needed"
        "The content type is missing or not one that the path takes.";
    PromptMalformed "prompt_malformed" UNPROCESSABLE_ENTITY "The learned prompt's files are damaged"
        "A file is missing, damaged or not of its format.";
    PromptShapeMismatch "prompt_shape_mismatch" UNPROCESSABLE_ENTITY "The learned prompt does not fit the model"
        "The tensor's rank, rows or columns fit neither the model nor adapter_config.json.";
    PromptNotFinite "prompt_not_finite" UNPROCESSABLE_ENTITY "The learned prompt has values that are no numbers"
        "A value is NaN or infinite in the number format that the model runs in.";
    UnsupportedPromptType "unsupported_prompt_type" UNPROCESSABLE_ENTITY "This type of prompt is not served"
        "adapter_config.json names a type of adapter that is not served.";
    BaseModelMismatch "base_model_mismatch" UNPROCESSABLE_ENTITY "The prompt was tuned on another model"
        "task.json names the fingerprint of another model than the one that runs.";
    InvalidTaskFile "invalid_task_file" UNPROCESSABLE_ENTITY "task.json is not valid"
        "task.json has an unknown field, a wrong value or a template that does not parse.";
    Overloaded "overloaded" TOO_MANY_REQUESTS "Too many requests"
        "The queue is full; try again after Retry-After seconds.";
    Internal "internal" INTERNAL_SERVER_ERROR "The server failed"
        "A fault of the server; its log has the cause under the request id.";
    Unavailable "unavailable" SERVICE_UNAVAILABLE "The server takes no requests now"
        "The server is starting or stopping; try again after Retry-After seconds.";
}

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
        Self { code, detail: detail.into(), errors: Vec::new(), cause: None }
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
        Self { code: Code::InvalidRequest, detail, errors, cause: None }
    }

    /// A fault of ours: the cause goes to the log, the client learns where to look.
    pub fn internal(cause: impl ToString) -> Self {
        let detail = "the server failed; its log has the cause under this request id";
        Self { cause: Some(cause.to_string()), ..Self::new(Code::Internal, detail) }
    }

    /// A seconds' wait after which trying again makes sense.
    pub fn retry_after(&self) -> Option<u32> {
        match self.code {
            Code::Overloaded => Some(1),
            Code::Unavailable => Some(5),
            _ => None,
        }
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

impl From<SubmitError> for Problem {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Full { limit } => Self::new(
                Code::Overloaded,
                format!(
                    "{limit} requests are waiting, which is as many as may: try again after the seconds of Retry-After, or raise --max-waiting"
                ),
            ),
            SubmitError::Closed => Self::stopping(),
            SubmitError::Empty => Self::field("input", "found no token, expected at least one"),
            SubmitError::NoText => Self::field(
                "input",
                "found no token, and the task's prompt is of keys and values, after which the model has nothing to go \
                 on from: give at least one token of text",
            ),
            SubmitError::TooLong { found, limit } => Self::new(
                Code::InputTooLong,
                format!("the learned prompt and the input take {found} positions of {limit}: shorten the input"),
            ),
            SubmitError::EncoderTooLong { found, limit } => Self::new(
                Code::InputTooLong,
                format!(
                    "the learned prompt and the input take {found} positions and the encoder takes at most {limit}: \
                     shorten the input"
                ),
            ),
        }
    }
}

impl Problem {
    /// The engine takes nothing any more.
    pub fn stopping() -> Self {
        Self::new(Code::Unavailable, "the server is stopping: try again, or ask another replica")
    }
}

impl From<Faults> for Problem {
    fn from(faults: Faults) -> Self {
        let errors: Vec<_> = faults
            .0
            .into_iter()
            .map(|fault| ProblemError { code: fault.kind.into(), field: None, detail: fault.detail })
            .collect();
        let code = errors.first().map_or(Code::PromptMalformed, |e| e.code);
        Self { code, ..Self::fields(errors) }
    }
}

impl From<FaultKind> for Code {
    fn from(kind: FaultKind) -> Self {
        match kind {
            FaultKind::Malformed => Self::PromptMalformed,
            FaultKind::Shape => Self::PromptShapeMismatch,
            FaultKind::NotFinite => Self::PromptNotFinite,
            FaultKind::UnsupportedType => Self::UnsupportedPromptType,
            FaultKind::BaseModel => Self::BaseModelMismatch,
            FaultKind::Task => Self::InvalidTaskFile,
        }
    }
}

/// Names for a message, the first twenty of them.
fn some<T: ToString>(names: &[T]) -> String {
    let shown = names.iter().take(20).map(T::to_string).collect::<Vec<_>>().join(", ");
    match names.len() {
        0 => "none".to_owned(),
        1..=20 => shown,
        n => format!("{shown} and {} more", n - 20),
    }
}

/// A client's text for a message, cut short.
fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}

impl From<RegistryError> for Problem {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::TaskNotFound { task, known } => {
                let detail = format!("there is no task {:?}; the tasks are: {}", cut(&task), some(&known));
                Self::new(Code::TaskNotFound, detail)
            }
            RegistryError::VersionNotFound { task, version, known } => {
                let version = cut(&version);
                let detail = format!("task {task} has no version {version:?}; its versions are: {}", some(&known));
                Self::new(Code::VersionNotFound, detail)
            }
            RegistryError::NoActiveVersion { task } => Self::new(
                Code::NoActiveVersion,
                format!(
                    "task {task} has no active version: name one with \"version\", or activate one with PUT /v1/admin/tasks/{task}/active"
                ),
            ),
            RegistryError::Invalid(faults) => faults.into(),
            RegistryError::PreconditionFailed { expected, found } => Self::new(
                Code::PreconditionFailed,
                format!("the task is at generation {found}, If-Match asks for {}: read its ETag again", cut(&expected)),
            ),
            RegistryError::VersionActive { task, version } => Self::new(
                Code::VersionActive,
                format!("version {version} of task {task} is active: activate another one first, or delete the task"),
            ),
            RegistryError::Full { what } => {
                Self::new(Code::RegistryFull, format!("no room: {what}, or raise the server's limit"))
            }
            RegistryError::Store(error) => Self::internal(format!("the prompt store: {error}")),
        }
    }
}

impl From<PackageError> for Problem {
    fn from(error: PackageError) -> Self {
        let code = match error {
            PackageError::TooLarge { .. } => Code::BodyTooLarge,
            PackageError::Damaged { .. }
            | PackageError::Mismatch { .. }
            | PackageError::Unsafe { .. }
            | PackageError::TooManyEntries { .. }
            | PackageError::SeveralPrompts { .. }
            | PackageError::NoPrompt { .. } => Code::InvalidUpload,
        };
        Self::new(code, error.to_string())
    }
}

impl From<TemplateError> for Problem {
    fn from(error: TemplateError) -> Self {
        match error {
            TemplateError::Input(reason) => Self::field("input", reason),
            // A stored version's template has been parsed when it was published.
            TemplateError::Syntax(_) => Self::internal(error),
        }
    }
}

impl From<TextError> for Problem {
    fn from(error: TextError) -> Self {
        Self::internal(error)
    }
}

impl From<InvalidTaskName> for Problem {
    fn from(error: InvalidTaskName) -> Self {
        Self::field("task", error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn codes_are_distinct_words_and_say_when_they_happen() {
        let words: HashSet<_> = Code::ALL.iter().map(|c| c.as_str()).collect();
        assert_eq!(words.len(), Code::ALL.len());
        for code in Code::ALL {
            assert!(code.as_str().bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{code:?}");
            assert!(code.status().is_client_error() || code.status().is_server_error(), "{code:?}");
            assert!(code.when().ends_with('.') && !code.title().ends_with('.'), "{code:?}");
        }
    }

    #[test]
    fn all_faults_of_an_upload_are_listed_and_the_first_gives_the_code() {
        let fault = |kind, detail: &str| crate::prompt::format::Fault { kind, detail: detail.to_owned() };
        let faults = Faults(vec![fault(FaultKind::Shape, "wide"), fault(FaultKind::Task, "typo")]);
        let problem = Problem::from(faults);
        assert_eq!((problem.code, problem.errors.len()), (Code::PromptShapeMismatch, 2));
        assert_eq!(problem.detail, "wide; typo");
    }

    #[test]
    fn the_cause_of_a_server_fault_is_not_in_the_answer() -> serde_json::Result<()> {
        let problem = Problem::internal("disk /secret is full");
        let body = serde_json::to_string(&problem.body("id"))?;
        assert!(!body.contains("secret"), "{body}");
        assert_eq!(problem.cause.as_deref(), Some("disk /secret is full"));
        Ok(())
    }
}
