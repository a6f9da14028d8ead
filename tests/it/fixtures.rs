//! The tiny models, prompts and answers that the scripts in `tests/peft` made with PEFT.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device};
use serde::Deserialize;
use serde_json::json;
use softserve::{
    kernels::{self, Backend},
    model::{Model, ModelFiles},
    prompt::{
        LearnedPrompt, Version,
        format::{self, Fit, PromptFiles},
        learned::Embeddings,
    },
    tokenizer::Tokenizer,
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
    /// Of a multitask prompt.
    pub task_id: Option<usize>,
    pub text: String,
    pub input_ids: Vec<u32>,
    pub greedy_ids: Vec<u32>,
    /// The five best logits of the first new token, with their ids.
    pub top: Vec<(u32, f32)>,
}

fn or_empty<'de, D: serde::Deserializer<'de>>(value: D) -> Result<String, D::Error> {
    Ok(Option::deserialize(value)?.unwrap_or_default())
}

impl Case {
    /// Its prompt as the registry reads it from the folder of all; none for the bare model.
    pub fn version(&self, prompts: &Path, fit: &Fit) -> Option<Version> {
        if self.prompt.is_empty() {
            return None;
        }
        let mut files = PromptFiles::read_dir(&prompts.join(&self.prompt)).unwrap();
        files.task = self.task_id.map(|task_id| json!({"task_id": task_id}).to_string().into());
        Some(format::read("task".parse().unwrap(), &files, fit).unwrap())
    }

    /// Holds the logits after the input against PEFT's best.
    pub fn assert_near(&self, logits: &[f32], tolerance: f32, model: &str) {
        for (id, expected) in &self.top {
            let got = logits[*id as usize];
            assert!((got - expected).abs() < tolerance, "{model}/{}: token {id} {got} {expected}", self.prompt);
        }
    }
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
    load_on(model, dtype, backend_for(dtype))
}

/// Bytes of one block of the model's key-value cache.
pub fn block_bytes(model: &Model) -> usize {
    model.backend().block_bytes(&model.kv_shape())
}

/// The model on another backend.
pub fn load_on(model: &str, dtype: DType, backend: Arc<dyn Backend>) -> Model {
    Model::load(&files(model), backend, dtype).unwrap()
}

/// Our kernels on the first GPU, if the tests were built for GPUs and there is one. `SOFTSERVE_TEST_GPU` says that there has
/// to be.
pub fn gpu() -> Option<Arc<dyn Backend>> {
    static OPENED: std::sync::OnceLock<Option<Arc<dyn Backend>>> = std::sync::OnceLock::new();
    let open = || match kernels::gpu(0) {
        Ok(device) => {
            Some(kernels::open(kernels::BackendKind::Own, &device, kernels::QuantisedProducts::Exact).unwrap())
        }
        Err(error) if std::env::var_os("SOFTSERVE_TEST_GPU").is_some() => panic!("there is no GPU to test: {error}"),
        Err(_) => None,
    };
    OPENED.get_or_init(open).clone()
}

/// What is held to the CPU backend.
pub fn backends_beside_the_cpus() -> Vec<Arc<dyn Backend>> {
    [kernels::reference()].into_iter().chain(gpu()).collect()
}

/// The CPU backend where it computes with that type.
pub fn backend_for(dtype: DType) -> Arc<dyn Backend> {
    if dtype == DType::F64 { kernels::reference() } else { kernels::cpu() }
}

pub fn tokenizer(model: &str) -> Tokenizer {
    Tokenizer::load(&files(model)).unwrap()
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
