//! Classification and scores: what a client sends, and what it gets.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    answer::Usage,
    request::{InputSchema, inputs, optional_input},
};
use crate::prompt::{TaskName, template::Input};

/// A request to classify. Either `input` or `inputs` is needed, all else is optional.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"input": "The food was cold and the waiter rude."}))]
pub struct ClassifyRequest {
    /// A text for the task's one field, or an object with a text for each of its fields.
    #[serde(default, deserialize_with = "optional_input")]
    #[schema(value_type = Option<InputSchema>)]
    pub input: Option<Input>,
    /// Up to 256 inputs, computed together.
    #[serde(default, deserialize_with = "inputs")]
    #[schema(value_type = Option<Vec<InputSchema>>, min_items = 1, max_items = 256)]
    pub inputs: Option<Vec<Input>>,
    /// Some of the task's labels, among which to choose; left out: all of them.
    #[schema(min_items = 1)]
    pub labels: Option<Vec<String>>,
    /// Correct the probabilities by the `calibration` of the task's `task.json`, if it has one. Server default: true.
    pub calibrate: Option<bool>,
    /// Set `abstained` where the confidence is below this.
    #[schema(minimum = 0, maximum = 1)]
    pub abstain_below: Option<f64>,
    /// A version of the task other than the active one.
    pub version: Option<String>,
    /// Lower is sooner: requests of a lower number go before all others, whatever their task has had
    /// already. Server default: 0.
    #[schema(minimum = -1000, maximum = 1000)]
    pub priority: Option<i32>,
    /// Give up after this time, with the problem `timeout`.
    #[schema(minimum = 1)]
    pub timeout_ms: Option<u64>,
}

/// The label of one input.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({
    "id": "0199d4c8-7b1e-7d3a-a8f0-5b8a4c1d2e3f", "task": "sentiment", "version": "3f9a0c1b2d4e",
    "label": "negative", "confidence": 0.93, "abstained": false, "label_mass": 0.98,
    "probabilities": [{"label": "negative", "probability": 0.93}, {"label": "positive", "probability": 0.07}],
    "usage": {"virtual_tokens": 20, "prompt_tokens": 12, "cached_tokens": 31, "completion_tokens": 0}
}))]
pub struct ClassifyResponse {
    pub id: String,
    #[schema(value_type = String)]
    pub task: TaskName,
    /// The version that answered.
    pub version: String,
    /// The likeliest label.
    pub label: String,
    /// Its probability among the labels.
    pub confidence: f64,
    /// Whether the confidence is below `abstain_below`.
    pub abstained: bool,
    /// Each label with its probability, the likeliest first; they sum to 1.
    pub probabilities: Vec<LabelProbability>,
    /// How likely the model is to write any of the labels, before the probabilities are normalised and corrected. Far
    /// below 1 the input may be none of the task's.
    pub label_mass: f64,
    pub usage: Usage,
}

/// A label and how likely it is.
#[derive(Debug, Serialize, ToSchema)]
pub struct LabelProbability {
    pub label: String,
    pub probability: f64,
}

/// A request for log-probabilities. Either `input` or `inputs` is needed, all else is optional.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"input": "The food was cold and the waiter rude.", "continuations": ["negative", "positive"]}))]
pub struct ScoreRequest {
    /// A text for the task's one field, or an object with a text for each of its fields.
    #[serde(default, deserialize_with = "optional_input")]
    #[schema(value_type = Option<InputSchema>)]
    pub input: Option<Input>,
    /// Up to 256 inputs, computed together.
    #[serde(default, deserialize_with = "inputs")]
    #[schema(value_type = Option<Vec<InputSchema>>, min_items = 1, max_items = 256)]
    pub inputs: Option<Vec<Input>>,
    /// Texts that may follow the input, up to 4096. Left out: the input itself is scored.
    #[schema(min_items = 1, max_items = 4096)]
    pub continuations: Option<Vec<String>>,
    /// A version of the task other than the active one.
    pub version: Option<String>,
    /// Lower is sooner: requests of a lower number go before all others, whatever their task has had
    /// already. Server default: 0.
    #[schema(minimum = -1000, maximum = 1000)]
    pub priority: Option<i32>,
    /// Give up after this time, with the problem `timeout`.
    #[schema(minimum = 1)]
    pub timeout_ms: Option<u64>,
}

/// The log-probabilities of texts.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({
    "id": "0199d4c8-7b1e-7d3a-a8f0-5b8a4c1d2e3f", "task": "sentiment", "version": "3f9a0c1b2d4e",
    "scores": [{"text": "negative", "logprob": -0.07, "tokens": [{"id": 310, "text": "negative", "logprob": -0.07}]}],
    "usage": {"virtual_tokens": 20, "prompt_tokens": 12, "cached_tokens": 31, "completion_tokens": 0}
}))]
pub struct ScoreResponse {
    pub id: String,
    #[schema(value_type = String)]
    pub task: TaskName,
    /// The version that answered.
    pub version: String,
    /// Each continuation, in order; or the input itself.
    pub scores: Vec<ScoredText>,
    pub usage: Usage,
}

/// A text and how likely it is.
#[derive(Debug, Serialize, ToSchema)]
pub struct ScoredText {
    pub text: String,
    /// Natural logarithm of its probability: the sum over its tokens.
    pub logprob: f64,
    pub tokens: Vec<ScoredToken>,
}

/// A token of a scored text.
#[derive(Debug, Serialize, ToSchema)]
pub struct ScoredToken {
    pub id: u32,
    pub text: String,
    /// Natural logarithm of its probability; `null` for a first token that nothing comes before.
    pub logprob: Option<f32>,
}
