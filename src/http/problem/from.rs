//! The error of each layer as a problem.

use std::io::ErrorKind;

use super::{Code, Problem, ProblemError};
use crate::{
    engine::SubmitError,
    input::InputError,
    prompt::{
        format::{FaultKind, Faults},
        task::InvalidTaskName,
        template::TemplateError,
    },
    registry::{RegistryError, package::PackageError},
    tokenizer::TokenizerError,
};

impl From<SubmitError> for Problem {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Full { limit } => Self::new(
                Code::Overloaded,
                format!(
                    "the queue is full ({limit} requests waiting); retry after the number of seconds in the Retry-After header"
                ),
            ),
            SubmitError::Closed => Self::stopping(),
            SubmitError::Empty => Self::field("input", "found no token, expected at least one"),
            SubmitError::NoText => Self::field(
                "input",
                "the input has no token, and the task's prompt consists of keys and values, which need at least one \
                 token after them: give a longer input",
            ),
            SubmitError::TooLong { found, limit } => Self::new(
                Code::InputTooLong,
                format!("the learned prompt and the input take {found} positions of {limit}: shorten the input"),
            ),
            error @ SubmitError::TooManyContinuations { .. } => {
                Self::new(Code::InvalidRequest, format!("{error}: send fewer or shorter ones"))
            }
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
                let known = match known.is_empty() {
                    true => "GET /v1/tasks lists the tasks".to_owned(),
                    false => format!("the tasks are: {}", some(&known)),
                };
                let detail = format!("there is no task {:?}; {known}", cut(&task));
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
            error @ RegistryError::VersionInUse { .. } => {
                Self::new(Code::VersionActive, format!("{error}: change that first, or delete the task"))
            }
            RegistryError::Routing { reason, .. } => Self::new(Code::InvalidRequest, reason),
            error @ RegistryError::NoPreviousVersion { .. } => {
                Self::new(Code::NoPreviousVersion, format!("{error}: activate one by its id"))
            }
            error @ RegistryError::Unreadable { .. } => Self::new(
                Code::PromptUnreadable,
                format!("{error}: restore its files, upload it again, or activate another version"),
            ),
            error @ RegistryError::Composition { .. } => Self::field("task", error.to_string()),
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
            RegistryError::Store(error) => {
                // The whole error has paths or addresses in it, which are for the log.
                let why = match error.kind() {
                    ErrorKind::Other | ErrorKind::NotFound => "it does not answer".to_owned(),
                    kind => kind.to_string(),
                };
                let detail = format!(
                    "the prompt store cannot be read or written now ({why}); the server's log has the cause. Look at the task \
                     before you repeat a change"
                );
                Self { cause: Some(error.to_string()), ..Self::new(Code::StoreUnavailable, detail) }
            }
            error @ RegistryError::Conflict => {
                Self::new(Code::StoreUnavailable, format!("{error}; nothing was changed: try again"))
            }
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

impl From<InputError> for Problem {
    fn from(error: InputError) -> Self {
        match error {
            InputError::Template(error) => error.into(),
            InputError::Tokenizer(error) => error.into(),
            InputError::Place(_) => Self::field("input", error.to_string()),
        }
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

impl From<TokenizerError> for Problem {
    fn from(error: TokenizerError) -> Self {
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
    use super::*;

    #[test]
    fn all_faults_of_an_upload_are_listed_and_the_first_gives_the_code() {
        let fault = |kind, detail: &str| crate::prompt::format::Fault { kind, detail: detail.to_owned() };
        let faults = Faults(vec![fault(FaultKind::Shape, "wide"), fault(FaultKind::Task, "typo")]);
        let problem = Problem::from(faults);
        assert_eq!((problem.code, problem.errors.len()), (Code::PromptShapeMismatch, 2));
        assert_eq!(problem.detail, "wide; typo");
    }
}
