//! Tokens of texts: what a client sends, and what it gets.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::request::{InputSchema, optional_input};
use crate::prompt::template::Input;

/// A text to tokenize.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"task": "sentiment", "input": "The soup was cold."}))]
pub struct TokenizeRequest {
    /// A text, or for a task an object with a text for each of its fields.
    #[serde(default, deserialize_with = "optional_input")]
    #[schema(value_type = InputSchema)]
    pub input: Option<Input>,
    /// The task whose template is put around the input; left out: none.
    pub task: Option<String>,
    /// A version of the task other than the active one.
    pub version: Option<String>,
    /// Without a task: whether the tokenizer's own special tokens (BOS) are added, and those in the text are special.
    /// Server default: true.
    pub special_tokens: Option<bool>,
}

/// A text's tokens.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"tokens": [526, 3713, 347, 2278, 16], "texts": ["The", " soup", " was", " cold", "."],
    "count": 5, "virtual_tokens": 20}))]
pub struct TokenizeResponse {
    /// The ids of the text, special tokens included.
    pub tokens: Vec<u32>,
    /// The text of each of them.
    pub texts: Vec<String>,
    /// How many there are.
    pub count: usize,
    /// Positions that the task's learned prompt takes before them; 0 without a task.
    pub virtual_tokens: usize,
}

/// Ids to make a text of.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"tokens": [526, 3713, 347, 2278, 16]}))]
pub struct DetokenizeRequest {
    /// Ids of the model's vocabulary.
    #[schema(max_items = 1048576)]
    pub tokens: Vec<u32>,
}

/// The text of some ids.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"text": "The soup was cold."}))]
pub struct DetokenizeResponse {
    /// The text, special tokens included.
    pub text: String,
}
