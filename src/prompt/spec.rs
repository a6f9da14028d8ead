//! `task.json`: what a task's author says beside the tensors. Every field is optional.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The content of `task.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TaskSpec {
    /// One line for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// A minijinja template over the input's fields; `{{ input }}` where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Each label with the words that stand for it in the model's output.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, Vec<String>>,
    /// Generation parameters for requests that do not name them.
    #[serde(skip_serializing_if = "Defaults::is_empty")]
    pub defaults: Defaults,
    /// What a request may ask for.
    #[serde(skip_serializing_if = "Limits::is_empty")]
    pub limits: Limits,
    /// The row of a multitask prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task_id: Option<usize>,
    /// Whether the embeddings are multiplied by the root of the hidden size: for prompts tuned on Gemma
    /// 1 or 2 with transformers before 5.4.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub scale_by_sqrt_hidden: bool,
    /// The frozen model that the prompt was tuned on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_model: Option<BaseModel>,
    /// What the tuner measured, by metric.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
}

/// Generation parameters of a task. Named and meant as in a generate request.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Defaults {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
}

/// Limits of a task, in addition to the server's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// The longest rendered input, in tokens, special tokens included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_input_tokens: Option<usize>,
    /// The most new tokens that one request may ask for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<usize>,
}

/// Which frozen model a prompt was tuned on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BaseModel {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The model's fingerprint as `softserve` prints it; a prompt with another one is refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
}

impl Defaults {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        self == &Self::default()
    }
}

impl Limits {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        self == &Self::default()
    }
}

/// The most stop strings of a task, and the longest of them in bytes.
pub const MAX_STOPS: usize = 16;
pub const MAX_STOP_BYTES: usize = 256;

impl TaskSpec {
    /// Parses `task.json`; the reason names the field.
    pub fn from_json(bytes: &[u8]) -> Result<Self, String> {
        let mut json = serde_json::Deserializer::from_slice(bytes);
        let spec: Self =
            serde_path_to_error::deserialize(&mut json).map_err(|e| match e.path().to_string().as_str() {
                "." => e.inner().to_string(),
                path => format!("{path}: {}", e.inner()),
            })?;
        json.end().map_err(|e| e.to_string())?;
        Ok(spec)
    }

    /// What is out of range, each with its field's name.
    pub fn range_faults(&self) -> Vec<String> {
        let mut faults = self.defaults.range_faults();
        for (field, limit) in
            [("max_input_tokens", self.limits.max_input_tokens), ("max_tokens", self.limits.max_tokens)]
        {
            if limit == Some(0) {
                faults.push(format!("limits.{field} is 0, expected at least 1"));
            }
        }
        if let (Some(default), Some(limit)) = (self.defaults.max_tokens, self.limits.max_tokens)
            && default > limit
        {
            faults.push(format!("defaults.max_tokens is {default}, more than limits.max_tokens, which is {limit}"));
        }
        faults
    }
}

impl Defaults {
    fn range_faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.max_tokens == Some(0) {
            faults.push("defaults.max_tokens is 0, expected at least 1".to_owned());
        }
        let numbers = [
            ("temperature", self.temperature, 0.0..=2.0),
            ("top_p", self.top_p, f32::MIN_POSITIVE..=1.0),
            ("min_p", self.min_p, 0.0..=1.0),
            ("repetition_penalty", self.repetition_penalty, f32::MIN_POSITIVE..=10.0),
            ("frequency_penalty", self.frequency_penalty, -2.0..=2.0),
            ("presence_penalty", self.presence_penalty, -2.0..=2.0),
        ];
        for (field, value, range) in numbers {
            // `contains` is false for NaN and the infinities too.
            if let Some(value) = value.filter(|value| !range.contains(value)) {
                let (least, most) = range.into_inner();
                let least =
                    if least == f32::MIN_POSITIVE { "more than 0".to_owned() } else { format!("at least {least}") };
                faults.push(format!("defaults.{field} is {value}, expected {least} and at most {most}"));
            }
        }
        let stops = self.stop.as_deref().unwrap_or_default();
        if stops.len() > MAX_STOPS {
            faults.push(format!("defaults.stop has {} texts, the most is {MAX_STOPS}", stops.len()));
        }
        if let Some(stop) = stops.iter().find(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
            faults.push(format!("defaults.stop has a text of {} bytes, expected 1 to {MAX_STOP_BYTES}", stop.len()));
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_field_is_named() {
        for (json, named) in [
            (r#"{"templat": "x"}"#, "templat"),
            (r#"{"defaults": {"top_k": "a"}}"#, "defaults.top_k"),
            (r#"{"labels": {"a": [1]}}"#, "labels.a[0]"),
            (r#"{"limits": {"max": 1}}"#, "max"),
            ("[1]", "invalid"),
            ("{} {}", "trailing"),
        ] {
            let reason = TaskSpec::from_json(json.as_bytes()).expect_err(json);
            assert!(reason.contains(named), "{json}: {reason}");
        }
    }

    #[test]
    fn every_value_out_of_range_is_listed() {
        let json = r#"{"defaults": {"max_tokens": 9, "temperature": -1, "top_p": 0, "min_p": 2,
            "repetition_penalty": 0, "frequency_penalty": 1e30, "presence_penalty": -1e30, "stop": [""]},
            "limits": {"max_tokens": 4, "max_input_tokens": 0}}"#;
        let faults = TaskSpec::from_json(json.as_bytes()).expect("parses").range_faults();
        assert_eq!(faults.len(), 9, "{faults:#?}");
        assert!(TaskSpec::default().range_faults().is_empty());
    }

    #[test]
    fn a_spec_survives_its_own_json() {
        let json = r#"{"template":"{{ input }}\n","labels":{"a":["x"]},"defaults":{"temperature":0.5}}"#;
        let spec = TaskSpec::from_json(json.as_bytes()).expect("parses");
        assert_eq!(serde_json::to_string(&spec).expect("serialises"), json);
    }
}
