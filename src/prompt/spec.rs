//! `task.json`: what a task's author says beside the tensors. Every field is optional.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::{calibration::Calibration, grammar::Grammar};
use crate::{
    content,
    sampling::{Fault, SamplingOptions},
};

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
    /// How the messages of a conversation become the text, in Jinja, as in a model's `chat_template`; without it a
    /// conversation is one message of the user, which is the template's input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// Which field of an input is shortened where its text would be too long for the task's limit or for the model's context. Without
    /// it such an input is refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub truncate: Option<Truncation>,
    /// Each label with the words that stand for it in the model's output.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, Vec<String>>,
    /// Which of two labels means that a question of the type `predicate` is true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub true_label: Option<String>,
    /// What every answer obeys, unless a request brings its own: JSON of a schema, a regular expression, a choice, or a Lark
    /// grammar.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grammar: Option<Grammar>,
    /// Generation parameters for requests that do not name them.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "SamplingOptions::is_empty")]
    pub defaults: SamplingOptions,
    /// What a request may ask for.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "Limits::is_empty")]
    pub limits: Limits,
    /// The row of a multitask prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task_id: Option<usize>,
    /// Whether the embeddings are multiplied by the root of the hidden size: for prompts tuned on Gemma
    /// 1 or 2 with transformers before 5.4.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "std::ops::Not::not")]
    pub scale_by_sqrt_hidden: bool,
    /// What special tokens in an input's texts are, such as `<|im_end|>`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub special_tokens: Option<SpecialTokens>,
    /// The frozen model that the prompt was tuned on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_model: Option<BaseModel>,
    /// What label probabilities are corrected by, as `softserve tune` and `softserve eval --calibrate` learn it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// What the tuner measured, by metric.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
}

/// What the tokenizer's special tokens (BOS, EOS, `<|im_end|>` …) are in the texts of an input. Those of the template are
/// special either way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SpecialTokens {
    /// Special tokens, as transformers takes them.
    #[default]
    Special,
    /// Text like any other: who writes an input cannot end it, or write another role's turn.
    Text,
}

/// `null` means what a field that is left out means.
fn null_is_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// How inputs that are too long are shortened: token by token, until the text fits. Nothing but this field is cut.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Truncation {
    /// A field of the template.
    pub field: String,
    /// Where the field is cut.
    #[serde(default)]
    pub side: Side,
}

/// A side of a text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Its beginning is cut off.
    Left,
    /// Its end is cut off.
    #[default]
    Right,
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

impl Limits {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        self == &Self::default()
    }
}

impl TaskSpec {
    /// Parses `task.json`; the reason names the field.
    pub fn from_json(bytes: &[u8]) -> Result<Self, String> {
        let mut json = serde_json::Deserializer::from_slice(bytes);
        let spec: Self =
            serde_path_to_error::deserialize(&mut json).map_err(|e| match e.path().to_string().as_str() {
                "." => content::json_fault(bytes, e.inner()),
                path => format!("{path}: {}", content::json_fault(bytes, e.inner())),
            })?;
        json.end().map_err(|e| e.to_string())?;
        Ok(spec)
    }

    /// What is out of range, each with its field's name. The defaults are checked as a request's parameters are.
    pub fn range_faults(&self) -> Vec<String> {
        let of_defaults = |fault: Fault| format!("defaults.{}: {}", fault.field, fault.detail);
        let mut faults: Vec<_> = self.defaults.faults().into_iter().map(of_defaults).collect();
        for (field, limit) in
            [("max_input_tokens", self.limits.max_input_tokens), ("max_tokens", self.limits.max_tokens)]
        {
            if limit == Some(0) {
                faults.push(format!("limits.{field}: found 0, expected 1 or more"));
            }
        }
        if let Some(label) = self.true_label.as_deref() {
            let is_one_of_two = self.labels.len() == 2 && self.labels.keys().any(|known| known.trim() == label);
            if !is_one_of_two {
                faults.push(format!("true_label: found {label:?}, expected one of two labels"));
            }
        }
        if let Some(Err(error)) = self.grammar.as_ref().map(Grammar::check) {
            faults.push(format!("grammar: {error}"));
        }
        if let Some(calibration) = &self.calibration {
            let is_label = |label: &str| self.labels.keys().any(|known| known.trim() == label);
            faults.extend(calibration.faults(is_label));
        }
        if let (Some(default), Some(limit)) = (self.defaults.max_tokens, self.limits.max_tokens)
            && default > limit
        {
            faults.push(format!("defaults.max_tokens: found {default}, expected at most {limit}, the task's limit"));
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
        for detail in
            ["defaults.top_p: found 0, expected more than 0 and at most 1", "defaults.stop[0]: found a text of 0"]
        {
            assert!(faults.iter().any(|fault| fault.starts_with(detail)), "{detail}: {faults:#?}");
        }
        assert!(TaskSpec::default().range_faults().is_empty());
    }

    #[test]
    fn a_spec_survives_its_own_json() {
        let json = r#"{"template":"{{ input }}\n","labels":{"a":["x"]},"defaults":{"temperature":0.5}}"#;
        let spec = TaskSpec::from_json(json.as_bytes()).expect("parses");
        assert_eq!(serde_json::to_string(&spec).expect("serialises"), json);
    }
}
