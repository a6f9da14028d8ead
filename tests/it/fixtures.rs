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
    pub prompt: String,
    pub text: String,
    pub input_ids: Vec<u32>,
    pub greedy_ids: Vec<u32>,
    /// The five best logits of the first new token, with their ids.
    pub top: Vec<(u32, f32)>,
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
