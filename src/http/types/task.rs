//! What a task and a version are.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    packing::TokenBudget,
    prompt::{
        TaskName, Version,
        spec::{BaseModel, Limits},
    },
    sampling::SamplingOptions,
};

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
    /// The last task of this page if there are more: the next page is the one after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub next: Option<TaskName>,
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
    pub defaults: SamplingOptions,
    pub limits: Limits,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_model: Option<BaseModel>,
    pub metrics: BTreeMap<String, f64>,
    /// What was odd about its files but not wrong.
    pub warnings: Vec<String>,
}

impl TaskInfo {
    /// The active version of a task, with how many tokens its prompt leaves for inputs and answers.
    pub fn new(version: &Version, budget: TokenBudget) -> Self {
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
                max_input_tokens: limits.max_input_tokens.unwrap_or(budget.input).min(budget.input),
                max_tokens: limits.max_tokens.unwrap_or(budget.output).min(budget.output),
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
