//! What was generated, whole, in events or for a batch.

use serde::Serialize;
use utoipa::ToSchema;

use crate::{engine::request::FinishReason, http::problem::ProblemBody, prompt::TaskName};

/// An answer for each request of a batch, in their order.
#[derive(Debug, Serialize, ToSchema)]
pub struct BatchResponse {
    pub results: Vec<BatchResult<GenerateResponse>>,
}

/// The answer to one request of a batch, or to one of several inputs; or what was wrong with it.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum BatchResult<T> {
    Answer(Box<T>),
    Problem(ProblemBody),
}

/// One answer, or, where the request has `inputs`, a list of them in their order.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum OneOrSeveral<T> {
    One(Box<T>),
    Several { results: Vec<BatchResult<T>> },
}

/// What was generated.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({
    "id": "0199d4c8-7b1e-7d3a-a8f0-5b8a4c1d2e3f", "task": "sentiment", "version": "3f9a0c1b2d4e",
    "output": "negative", "finish_reason": "stop",
    "usage": {"virtual_tokens": 20, "prompt_tokens": 12, "cached_tokens": 32, "completion_tokens": 1}
}))]
pub struct GenerateResponse {
    pub id: String,
    #[schema(value_type = String)]
    pub task: TaskName,
    /// The version that answered.
    pub version: String,
    /// The text of the first choice.
    pub output: String,
    pub finish_reason: Finish,
    pub usage: Usage,
    /// The chosen tokens, where `logprobs` was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<TokenInfo>>,
    /// All answers, where `n` is more than 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub choices: Option<Vec<ChoiceInfo>>,
}

/// One of several answers.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChoiceInfo {
    pub index: usize,
    pub output: String,
    pub finish_reason: Finish,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<TokenInfo>>,
}

/// A server-sent event of a stream. The last one's data is `[DONE]`.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "for the specification")]
pub struct Events {
    /// JSON: a `StreamEvent`, or on OpenAI's routes what the whole answer is, with what is new of a choice.
    data: String,
}

/// One event of a streamed answer. The last of each choice has `finish_reason`; the last of all
/// has `usage`, and `data: [DONE]` follows it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "0199d4c8-7b1e-7d3a-a8f0-5b8a4c1d2e3f", "task": "sentiment",
    "version": "3f9a0c1b2d4e", "index": 0, "output": "neg"}))]
pub struct StreamEvent<'a> {
    pub id: &'a str,
    pub task: &'a str,
    pub version: &'a str,
    /// Which choice the text belongs to.
    pub index: usize,
    /// Text that follows the text of this choice's earlier events.
    pub output: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<TokenInfo>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<Finish>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// The model ended it, or a stop text was reached.
    Stop,
    /// `max_tokens` or the end of the context was reached.
    Length,
    /// The server is stopping.
    Cancelled,
    /// `timeout_ms` is over.
    Timeout,
}

impl From<FinishReason> for Finish {
    fn from(reason: FinishReason) -> Self {
        match reason {
            FinishReason::Stop => Self::Stop,
            FinishReason::Length => Self::Length,
            FinishReason::Cancelled => Self::Cancelled,
            FinishReason::Timeout => Self::Timeout,
        }
    }
}

/// Positions counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    /// Positions that the learned prompt takes.
    pub virtual_tokens: usize,
    /// Tokens of the text, special tokens included.
    pub prompt_tokens: usize,
    /// Positions of learned prompt and text that had been computed before.
    pub cached_tokens: usize,
    /// Tokens generated, of all choices together.
    pub completion_tokens: usize,
}

/// One generated token.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct TokenInfo {
    #[serde(flatten)]
    pub token: TokenLogprob,
    /// The likeliest tokens at this position, likeliest first.
    pub top_logprobs: Vec<TokenLogprob>,
}

/// A token and how likely it was.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct TokenLogprob {
    pub id: u32,
    pub text: String,
    /// Natural logarithm of its probability, before temperature and penalties.
    pub logprob: f32,
}
