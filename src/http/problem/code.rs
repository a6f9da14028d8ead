//! The one table of what can go wrong: the word on the wire, the status, and when it happens.

use axum::http::StatusCode;

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
    UnknownLabel "unknown_label" BAD_REQUEST "No such label"
        "A label of the request is not one of the task's.";
    NoLabels "no_labels" BAD_REQUEST "The task has no labels"
        "Inputs can be classified by a task that has labels in its task.json, each with a word that the tokenizer knows.";
    InputTooLong "input_too_long" BAD_REQUEST "The input is too long"
        "Learned prompt and input leave no position of the model's context for an answer, or the input is over the task's limit.";
    IncompleteBody "incomplete_body" BAD_REQUEST "The body ended early"
        "The connection broke before the whole body had arrived.";
    InvalidUpload "invalid_upload" BAD_REQUEST "The upload cannot be unpacked"
        "The archive is damaged, has an unsafe entry, or holds no learned prompt.";
    Unauthorized "unauthorized" UNAUTHORIZED "A key is needed"
        "The server requires a key, and the request has none, an unknown one, or one that has expired.";
    Forbidden "forbidden" FORBIDDEN "Not allowed"
        "The key does not have the role or the task that the request needs, or the admin routes are closed because no admin key is set.";
    NotFound "not_found" NOT_FOUND "No such path"
        "The server has no such path.";
    TaskNotFound "task_not_found" NOT_FOUND "No such task"
        "No task has this name.";
    VersionNotFound "version_not_found" NOT_FOUND "No such version"
        "The task has no version of this id.";
    FileNotFound "file_not_found" NOT_FOUND "No such file"
        "The caller has no file of this id.";
    BatchNotFound "batch_not_found" NOT_FOUND "No such batch"
        "The caller has no batch of this id.";
    BatchEnded "batch_ended" CONFLICT "The batch has ended"
        "A batch that has ended cannot be cancelled.";
    MethodNotAllowed "method_not_allowed" METHOD_NOT_ALLOWED "The path has other methods"
        "The path exists, but not with this method; the Allow header lists its methods.";
    RequestTimeout "request_timeout" REQUEST_TIMEOUT "The body arrived too slowly"
        "No data of the body arrived for too long.";
    NoActiveVersion "no_active_version" CONFLICT "The task has no active version"
        "The task has stored versions, but none is active and the request names none.";
    VersionActive "version_active" CONFLICT "The version is active"
        "The active version cannot be deleted while the task has others, nor one that gets a share of the requests or has an alias.";
    NoPreviousVersion "no_previous_version" CONFLICT "There is no version to go back to"
        "The task can only be rolled back to a version that was active before and is still stored.";
    RegistryFull "registry_full" CONFLICT "No room for another"
        "The number of tasks, versions, files or batches is at the server's limit.";
    PreconditionFailed "precondition_failed" PRECONDITION_FAILED "The task has changed"
        "If-Match names another state of the task than the present one.";
    BodyTooLarge "body_too_large" PAYLOAD_TOO_LARGE "The body is too large"
        "The body, or what it unpacks to, is over the server's limit.";
    UnsupportedMediaType "unsupported_media_type" UNSUPPORTED_MEDIA_TYPE "Another content type is needed"
        "The content type is missing, or the path does not accept it.";
    PromptMalformed "prompt_malformed" UNPROCESSABLE_ENTITY "The learned prompt's files are damaged"
        "A file is missing, damaged or not of its format.";
    PromptShapeMismatch "prompt_shape_mismatch" UNPROCESSABLE_ENTITY "The learned prompt does not fit the model"
        "The tensor's rank, rows or columns fit neither the model nor adapter_config.json.";
    PromptNotFinite "prompt_not_finite" UNPROCESSABLE_ENTITY "The learned prompt has values that are not finite"
        "A value is NaN or infinite in the number format that the model runs in.";
    LogitsNotFinite "logits_not_finite" UNPROCESSABLE_ENTITY "The model's output is not finite"
        "With this learned prompt or input values overflow in the forward pass, so that no token can be chosen.";
    NoTokenAllowed "no_token_allowed" UNPROCESSABLE_ENTITY "No token is allowed"
        "What the answer must obey, a grammar or bad_words, leaves no token that can come next, or is too complex.";
    UnsupportedPromptType "unsupported_prompt_type" UNPROCESSABLE_ENTITY "This type of prompt is not supported"
        "adapter_config.json names a type of adapter that is not supported.";
    BaseModelMismatch "base_model_mismatch" UNPROCESSABLE_ENTITY "The prompt was tuned on another model"
        "task.json names the fingerprint of another model than the one that runs.";
    InvalidTaskFile "invalid_task_file" UNPROCESSABLE_ENTITY "task.json is not valid"
        "task.json has an unknown field, a wrong value or a template that does not parse.";
    Overloaded "overloaded" TOO_MANY_REQUESTS "Too many requests"
        "The queue is full; try again after Retry-After seconds.";
    RateLimited "rate_limited" TOO_MANY_REQUESTS "The key's limit is reached"
        "The key has used its requests or tokens of the last minute, or has its maximum of requests running; try again after Retry-After seconds.";
    Internal "internal" INTERNAL_SERVER_ERROR "The server failed"
        "A fault of the server; its log has the cause under the request id.";
    Unavailable "unavailable" SERVICE_UNAVAILABLE "The server accepts no requests now"
        "The server is starting or stopping; try again after Retry-After seconds.";
    PromptUnreadable "prompt_unreadable" SERVICE_UNAVAILABLE "The learned prompt cannot be read"
        "The version is stored, but the prompt store does not give its files now, or they have been changed or removed.";
    StoreUnavailable "store_unavailable" SERVICE_UNAVAILABLE "The prompt store does not answer"
        "The folder or bucket of the learned prompts cannot be read or written now; what is in memory is served on.";
    Timeout "timeout" GATEWAY_TIMEOUT "No answer in time"
        "The time that the request or the server gives was over before there was an answer.";
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
}
