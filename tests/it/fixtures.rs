//! The tiny models, prompts and answers that `tests/peft/make_fixtures.py` made with PEFT.

use std::{path::PathBuf, sync::Arc};

use candle_core::{DType, Device};
use serde::Deserialize;
use softserve::{
    model::{Model, ModelFiles},
    prompt::{LearnedPrompt, learned::Embeddings},
    text::Text,
};

pub const MODELS: [&str; 3] = ["llama-scaled", "llama-tied", "qwen2"];

/// One answer of PEFT's.
#[derive(Debug, Deserialize)]
pub struct Case {
    /// The prompt's folder; empty for the bare model.
    #[serde(deserialize_with = "or_empty")]
    pub prompt: String,
    /// Missing where all prompts are embeddings.
    #[serde(default)]
    pub peft_type: Option<String>,
    pub text: String,
    pub input_ids: Vec<u32>,
    pub greedy_ids: Vec<u32>,
    /// The five best logits of the first new token, with their ids.
    pub top: Vec<(u32, f32)>,
}

fn or_empty<'de, D: serde::Deserializer<'de>>(value: D) -> Result<String, D::Error> {
    Ok(Option::deserialize(value)?.unwrap_or_default())
}

/// The models of every family, as [`dir`] takes them.
pub fn families() -> Vec<String> {
    let entries = std::fs::read_dir(dir("families")).unwrap();
    let mut names: Vec<_> =
        entries.map(|e| format!("families/{}", e.unwrap().file_name().into_string().unwrap())).collect();
    names.sort();
    assert!(names.len() > 20);
    names
}

/// Answers of the bare model and after prompts that are saved as the rows they are.
pub fn embeddings_cases(model: &str) -> Vec<Case> {
    let mut cases = cases(model);
    let kinds = [None, Some("PROMPT_TUNING"), Some("P_TUNING"), Some("CPT")];
    cases.retain(|case| kinds.contains(&case.peft_type.as_deref()));
    assert!(kinds.iter().all(|kind| cases.iter().any(|case| case.peft_type.as_deref() == *kind)), "{model}");
    cases
}

pub fn dir(model: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(model)
}

pub fn files(model: &str) -> ModelFiles {
    ModelFiles::dir(&dir(model)).unwrap()
}

pub fn load(model: &str, dtype: DType) -> Model {
    Model::load(&files(model), &Device::Cpu, dtype).unwrap()
}

pub fn text(model: &str) -> Text {
    Text::load(&files(model)).unwrap()
}

pub fn cases(model: &str) -> Vec<Case> {
    let json = std::fs::read(dir(model).join("expected.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_slice(&json).unwrap();
    assert!(!cases.is_empty());
    cases
}

/// A prompt's rows as PEFT saved them.
pub fn prompt(model: &str, name: &str) -> Arc<LearnedPrompt> {
    let path = dir(model).join("prompts").join(name).join("adapter_model.safetensors");
    let mut tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let rows = tensors.remove("prompt_embeddings").unwrap();
    Arc::new(LearnedPrompt::Embeddings(Embeddings { rows }))
}
