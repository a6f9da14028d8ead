//! What is on the wire, converted by hand to and from the types of the other layers.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Deserializer, Serialize, de};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, Schema},
};

use crate::{
    engine::{Room, request::FinishReason},
    prompt::{
        TaskName, Version,
        spec::{BaseModel, Limits},
        template::Input,
    },
};

/// A request to generate. Everything but `input` is optional: what is left out comes from the
/// task's defaults, then from the server's.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"input": "The food was cold and the waiter rude.", "max_tokens": 8}))]
pub struct GenerateRequest {
    /// A text for the task's one field, or an object with a text for each of its fields.
    #[serde(deserialize_with = "input")]
    #[schema(value_type = InputSchema)]
    pub input: Input,
    /// The most new tokens; cut to what the model's context leaves. Server default: 64.
    #[schema(minimum = 1, example = 8)]
    pub max_tokens: Option<usize>,
    /// 0 takes the likeliest token each time; more is more varied. Server default: 0.
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f32>,
    /// Keep the smallest set of tokens whose probability reaches this; more than 0. Server default: 1.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// Keep this many of the likeliest tokens; 0 keeps all. Server default: 0.
    pub top_k: Option<usize>,
    /// Keep tokens at least this likely relative to the likeliest; 0 keeps all. Server default: 0.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    /// The same seed and request give the same answer. Left out: a random one.
    pub seed: Option<u64>,
    /// The answer ends before the first of these texts: up to 16, of 1 to 256 bytes each.
    #[serde(default, deserialize_with = "stop")]
    #[schema(value_type = Option<Vec<String>>, max_items = 16)]
    pub stop: Option<Vec<String>>,
    /// Divides (logit > 0) or multiplies the logits of tokens in the text so far; 1 is none.
    #[schema(minimum = 0, maximum = 10)]
    pub repetition_penalty: Option<f32>,
    /// Subtracted from a token's logit for each time it was generated.
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f32>,
    /// Subtracted from a token's logit if it was generated.
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f32>,
    /// Report the log-probability of each chosen token, and of this many likeliest ones.
    #[schema(minimum = 0, maximum = 20)]
    pub logprobs: Option<usize>,
    /// How many answers; answer i is drawn with seed + i.
    #[schema(minimum = 1, maximum = 16)]
    pub n: Option<usize>,
    /// Send the answer as server-sent events while it is made.
    #[serde(default)]
    pub stream: bool,
    /// Go on after the model's end-of-text token.
    #[serde(default)]
    pub ignore_eos: bool,
    /// A version of the task other than the active one.
    pub version: Option<String>,
    /// Lower is sooner: requests of a lower number go before all others, whatever their task has had
    /// already. Server default: 0.
    #[schema(minimum = -1000, maximum = 1000)]
    pub priority: Option<i32>,
    /// Give up after this time, with what there is by then and the finish reason `timeout`.
    #[schema(minimum = 1)]
    pub timeout_ms: Option<u64>,
}

/// A text, or a text for each field of the task's template.
#[derive(Debug, ToSchema)]
#[schema(as = Input, title = "Input")]
#[serde(untagged)]
pub enum InputSchema {
    /// The text of the task's one field.
    Text(String),
    /// A text for each field.
    Fields(BTreeMap<String, String>),
}

/// One request of a batch, for the specification: a generate request with its task. It is read in
/// two steps, so that one that is wrong does not keep the others from their answers.
#[derive(Debug)]
pub struct BatchItem;

impl PartialSchema for BatchItem {
    fn schema() -> RefOr<Schema> {
        let mut schema = GenerateRequest::schema();
        // Not `allOf`: a generate request alone has no further fields.
        if let RefOr::T(Schema::Object(object)) = &mut schema {
            object.description = Some("A generate request with its task; `stream` is not possible here.".to_owned());
            object.properties.insert("task".to_owned(), String::schema());
            object.required.push("task".to_owned());
            object.example = Some(serde_json::json!({"task": "sentiment", "input": "A fine evening."}));
        }
        schema
    }
}

impl ToSchema for BatchItem {}

/// Several requests of any tasks, computed together.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"requests": [
    {"task": "sentiment", "input": "A fine evening.", "max_tokens": 4},
    {"task": "topic", "input": "The match was lost in the last minute.", "max_tokens": 4}
]}))]
pub struct BatchRequest {
    /// Up to 256.
    #[schema(value_type = Vec<BatchItem>, min_items = 1, max_items = 256)]
    pub requests: Vec<serde_json::Map<String, serde_json::Value>>,
}

/// An answer for each request of a batch, in their order.
#[derive(Debug, Serialize, ToSchema)]
pub struct BatchResponse {
    pub results: Vec<BatchResult>,
}

/// The answer to one request of a batch, or what was wrong with it.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum BatchResult {
    Answer(Box<GenerateResponse>),
    Problem(super::problem::ProblemBody),
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

/// A task that can be called.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"task": "sentiment", "version": "3f9a0c1b2d4e", "description": "positive or negative",
    "fields": ["input"], "labels": ["negative", "positive"], "kind": "embeddings", "peft_type": "PROMPT_TUNING",
    "virtual_tokens": 20, "limits": {"max_input_tokens": 512}}))]
pub struct TaskInfo {
    #[schema(value_type = String)]
    pub task: TaskName,
    /// The active version.
    pub version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The fields that `input` has; a plain text stands for the only one.
    pub fields: Vec<String>,
    /// The labels that it tells apart, if it is a classifier.
    pub labels: Vec<String>,
    /// How its learned prompt is applied: `embeddings` or `key-values`.
    #[schema(value_type = String, example = "embeddings")]
    pub kind: &'static str,
    /// PEFT's name of its type.
    #[schema(value_type = String, example = "PROMPT_TUNING")]
    pub peft_type: &'static str,
    /// Positions that its learned prompt takes.
    pub virtual_tokens: usize,
    pub limits: TaskLimits,
}

/// What a request to a task may ask for.
#[derive(Debug, Serialize, ToSchema)]
pub struct TaskLimits {
    /// The longest input, in tokens, special tokens included.
    pub max_input_tokens: usize,
    /// The most new tokens.
    pub max_tokens: usize,
}

/// The tasks that can be called.
#[derive(Debug, Serialize, ToSchema)]
pub struct TaskList {
    pub tasks: Vec<TaskInfo>,
}

/// What a version is, beside its tensors.
#[derive(Debug, Serialize, ToSchema)]
pub struct VersionMeta {
    pub version: String,
    /// How the prompt is applied: `embeddings` go where token embeddings go, `key-values` straight into
    /// the cache.
    pub kind: &'static str,
    /// PEFT's name of its type.
    #[schema(value_type = String, example = "PROMPT_TUNING")]
    pub peft_type: &'static str,
    pub virtual_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    pub template: String,
    pub labels: BTreeMap<String, Vec<String>>,
    pub defaults: crate::prompt::spec::Defaults,
    pub limits: Limits,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_model: Option<BaseModel>,
    pub metrics: BTreeMap<String, f64>,
    /// What was odd about its files but not wrong.
    pub warnings: Vec<String>,
}

impl TaskInfo {
    /// The active version of a task, with what its prompt leaves room for.
    pub fn new(version: &Version, room: Room) -> Self {
        let virtual_tokens = version.prompt.num_virtual_tokens();
        let limits = &version.spec.limits;
        Self {
            task: version.task.clone(),
            version: version.digest.id(),
            description: version.spec.description.clone(),
            fields: version.template.fields().to_vec(),
            labels: version.spec.labels.keys().cloned().collect(),
            kind: version.prompt.kind(),
            peft_type: version.peft_type.as_str(),
            virtual_tokens,
            limits: TaskLimits {
                max_input_tokens: limits.max_input_tokens.unwrap_or(room.text).min(room.text),
                max_tokens: limits.max_tokens.unwrap_or(room.answer).min(room.answer),
            },
        }
    }
}

impl From<&Version> for VersionMeta {
    fn from(version: &Version) -> Self {
        let spec = &version.spec;
        Self {
            version: version.digest.id(),
            kind: version.prompt.kind(),
            peft_type: version.peft_type.as_str(),
            virtual_tokens: version.prompt.num_virtual_tokens(),
            description: spec.description.clone(),
            template: version.template.source().to_owned(),
            labels: spec.labels.clone(),
            defaults: spec.defaults.clone(),
            limits: spec.limits.clone(),
            base_model: spec.base_model.clone(),
            metrics: spec.metrics.clone(),
            warnings: version.warnings.clone(),
        }
    }
}

fn input<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Input, D::Error> {
    struct InputVisitor;

    impl<'de> de::Visitor<'de> for InputVisitor {
        type Value = Input;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("a text, or an object with a text for each field")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Input, E> {
            Ok(Input::Text(text.to_owned()))
        }

        fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Input, A::Error> {
            let mut fields = BTreeMap::new();
            while let Some((name, text)) = map.next_entry::<String, String>()? {
                if let Some(_twice) = fields.insert(name.clone(), text) {
                    return Err(de::Error::custom(format!("the field {name:?} is there twice")));
                }
            }
            Ok(Input::Fields(fields))
        }
    }

    deserializer.deserialize_any(InputVisitor)
}

fn stop<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<String>>, D::Error> {
    struct StopVisitor;

    impl<'de> de::Visitor<'de> for StopVisitor {
        type Value = Option<Vec<String>>;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("a list of texts")
        }

        fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            Ok(Some(vec![text.to_owned()]))
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut texts = Vec::new();
            while let Some(text) = list.next_element()? {
                texts.push(text);
            }
            Ok(Some(texts))
        }
    }

    deserializer.deserialize_any(StopVisitor)
}
