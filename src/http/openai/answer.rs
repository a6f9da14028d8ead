//! What a client of OpenAI's API gets: whole answers and the chunks of a stream.

use serde::Serialize;
use utoipa::ToSchema;

use super::logprobs::{ChatLogprobs, CompletionLogprobs};
use crate::{
    http::{prepare::Prepared, problem::Problem, types::Finish},
    prompt::Version,
};

/// What every answer and chunk begins with.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = OpenAiHead)]
pub struct Head {
    pub id: String,
    /// What it is: `text_completion`, `chat.completion` or `chat.completion.chunk`.
    pub object: &'static str,
    /// When the request came, in seconds since 1970.
    pub created: u64,
    /// As the request names it.
    pub model: String,
    /// The version that answered.
    pub system_fingerprint: String,
}

impl Head {
    /// Of an answer whose id begins with `prefix`.
    pub fn new(prefix: &str, object: &'static str, model: &str, version: &Version) -> Self {
        let created = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_secs());
        let id = format!("{prefix}-{}", uuid::Uuid::now_v7().simple());
        Self { id, object, created, model: model.to_owned(), system_fingerprint: version.digest.id() }
    }
}

/// An answer with choices of one kind, or a chunk of a stream of them.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = OpenAiAnswer)]
pub struct Answer<T> {
    #[serde(flatten)]
    pub head: Head,
    pub choices: Vec<T>,
    /// Not in the chunks of a stream, but for the last one where `stream_options` asks for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// One answer of a completion, or what is new of it.
#[derive(Debug, Serialize, ToSchema)]
pub struct CompletionChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    pub finish_reason: Option<FinishReason>,
}

/// One answer of a chat completion.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    pub index: usize,
    pub message: AnswerMessage,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<FinishReason>,
}

/// The assistant's message.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = OpenAiAnswerMessage)]
pub struct AnswerMessage {
    pub role: &'static str,
    pub content: String,
    /// Always null.
    pub refusal: Option<String>,
}

/// What is new of one answer of a chat completion.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChunkChoice {
    pub index: usize,
    pub delta: Delta,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<FinishReason>,
}

/// What is new of the assistant's message.
#[derive(Debug, Default, Serialize, ToSchema)]
#[schema(as = OpenAiDelta)]
pub struct Delta {
    /// In the first chunk of a choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = OpenAiFinishReason)]
pub enum FinishReason {
    /// The model ended it, or a stop text was reached.
    Stop,
    /// The most new tokens or the end of the context was reached.
    Length,
}

impl FinishReason {
    /// # Errors
    /// The answer was broken off, for which OpenAI's API has no reason.
    pub fn of(finish: Finish) -> Result<Self, Problem> {
        match finish {
            Finish::Stop => Ok(Self::Stop),
            Finish::Length => Ok(Self::Length),
            Finish::Cancelled => Err(Problem::stopping()),
            Finish::Timeout => Err(Problem::timeout()),
        }
    }
}

/// Tokens counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = OpenAiUsage)]
pub struct Usage {
    /// Tokens of the text, special tokens included; virtual tokens are not.
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptTokensDetails,
    /// Positions that the learned prompt takes. Not in OpenAI's API.
    pub virtual_tokens: usize,
}

/// What of the prompt had been computed before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    pub cached_tokens: usize,
}

impl Usage {
    /// Adds what one prompt and its answers took; `cached_positions` are those of learned prompt and text.
    pub fn add(&mut self, prepared: &Prepared, cached_positions: usize, completion_tokens: usize) {
        self.prompt_tokens += prepared.prompt_tokens;
        self.completion_tokens += completion_tokens;
        self.total_tokens += prepared.prompt_tokens + completion_tokens;
        self.prompt_tokens_details.cached_tokens += cached_positions.saturating_sub(prepared.virtual_tokens);
        self.virtual_tokens += prepared.virtual_tokens;
    }
}
