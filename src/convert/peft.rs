//! The PEFT directory of a foreign prompt: which tensor it is, the two files, and writing them.

use std::{collections::BTreeMap, fs, io, path::Path};

use bytes::Bytes;
use candle_core::DType;
use clap::ValueEnum;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

pub use super::recognised::TENSOR;
use super::{
    ConvertError, Foreign, ModelPart, RawTensor, recognise::recognise, recognised::Recognised, safetensors as raw,
};
use crate::prompt::{
    files::PromptFiles,
    format::{self, FaultKind, Faults, Fit},
    peft_type::PeftType,
    spec::TaskSpec,
};

/// The release of PEFT whose files these are like.
const PEFT_VERSION: &str = "0.21.2";

/// The most layers, heads and dimensions that are believed, so that products of them have a place.
const MAX_COUNT: usize = 1 << 16;

/// The kind of model that a prompt is for, as PEFT spells it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TaskType {
    /// A decoder, such as Llama
    #[default]
    CausalLm,
    /// An encoder-decoder, such as T5
    #[value(name = "SEQ_2_SEQ_LM")]
    Seq2SeqLm,
}

impl TaskType {
    /// As PEFT spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CausalLm => "CAUSAL_LM",
            Self::Seq2SeqLm => "SEQ_2_SEQ_LM",
        }
    }
}

/// What the file does not say itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Target {
    /// Which tensor is the prompt.
    pub tensor: Option<String>,
    /// `base_model_name_or_path`
    pub base_model: Option<String>,
    pub task_type: Option<TaskType>,
    /// What to state where neither the user nor the file says it; `None` states nothing.
    pub default_task_type: Option<TaskType>,
}

impl Target {
    /// Whether the user said anything.
    fn is_given(&self) -> bool {
        self.tensor.is_some() || self.base_model.is_some() || self.task_type.is_some()
    }
}

/// A prompt in PEFT's form.
#[derive(Debug, Clone)]
pub struct Converted {
    pub files: PromptFiles,
    /// The tensors in it.
    pub tensors: Vec<RawTensor>,
    /// How the tensors were read.
    pub notes: Vec<String>,
    /// What `serve` would warn of or not take.
    pub warnings: Vec<String>,
}

impl Foreign {
    /// Makes the PEFT directory's files, and reads them back as `serve` does, as far as that needs
    /// no model. Values stay in their number format.
    pub fn to_peft(&self, target: &Target) -> Result<Converted, ConvertError> {
        let mut notes = Vec::new();
        let (adapter_config, tensors) = match &self.adapter_config {
            Some(config) if !target.is_given() => (config.clone(), self.tensors.clone()),
            Some(_) => return Err(ConvertError::Described),
            None => {
                let task_type = self.task_type(target)?;
                let found = recognise(&self.tensors, target.tensor.as_deref())?;
                notes.clone_from(&found.notes);
                (config(&found, task_type, target).map_err(unfit)?, vec![found.rows])
            }
        };
        let task = match (&self.task, &self.description) {
            (Some(task), _) => Some(task.clone()),
            (None, Some(description)) => {
                let description = description.split_whitespace().collect::<Vec<_>>().join(" ");
                let description = Some(description.chars().take(1000).collect());
                Some(json_bytes(&TaskSpec { description, ..TaskSpec::default() }).map_err(unfit)?)
            }
            (None, None) => None,
        };
        let weights = serialise(&tensors).map_err(unfit)?;
        let files = PromptFiles {
            adapter_config: Some(adapter_config),
            weights: Some(weights),
            task,
            ..PromptFiles::default()
        };
        let warnings = check(&files)?;
        Ok(Converted { files, tensors, notes, warnings })
    }

    /// The kind of model: what the user said, else what the file's name says.
    fn task_type(&self, target: &Target) -> Result<Option<TaskType>, ConvertError> {
        match (self.part, target.task_type) {
            (Some(ModelPart::Decoder { .. }), Some(TaskType::Seq2SeqLm))
            | (Some(ModelPart::Decoder { has_encoder: true }), None) => Err(ConvertError::DecoderOfTwo),
            (_, Some(asked)) => Ok(Some(asked)),
            (Some(ModelPart::Encoder), None) => Ok(Some(TaskType::Seq2SeqLm)),
            (_, None) => Ok(target.default_task_type),
        }
    }
}

fn unfit(error: impl std::fmt::Display) -> ConvertError {
    ConvertError::Unfit(format!("cannot write the prompt: {error}"))
}

fn json_bytes(value: &impl serde::Serialize) -> serde_json::Result<Bytes> {
    Ok(serde_json::to_vec_pretty(value)?.into())
}

/// `adapter_config.json` as PEFT writes it. PEFT fills in what is null when it loads the prompt.
fn config(prompt: &Recognised, task_type: Option<TaskType>, target: &Target) -> serde_json::Result<Bytes> {
    let mut config = Map::new();
    let mut set = |key: &str, value: Value| drop(config.insert(key.to_owned(), value));
    set("auto_mapping", Value::Null);
    set("base_model_name_or_path", json!(target.base_model));
    set("inference_mode", json!(true));
    set("modules_to_save", Value::Null);
    set("num_attention_heads", json!(prompt.num_heads));
    set("num_layers", json!(prompt.num_layers));
    // The rows in front of the encoder are all that an encoder-decoder ever uses; PEFT divides keys and values by two.
    let submodules = if prompt.peft_type.is_key_values() && task_type == Some(TaskType::Seq2SeqLm) { 2 } else { 1 };
    set("num_transformer_submodules", json!(submodules));
    set("num_virtual_tokens", json!(prompt.rows.shape.first()));
    set("peft_type", json!(prompt.peft_type.as_str()));
    set("peft_version", json!(PEFT_VERSION));
    set("revision", Value::Null);
    set("task_type", json!(task_type.map(TaskType::as_str)));
    set("token_dim", json!(prompt.token_dim));
    match prompt.peft_type {
        PeftType::PrefixTuning => {
            set("encoder_hidden_size", Value::Null);
            set("prefix_projection", json!(false));
        }
        PeftType::Cartridge => set("num_frozen_tokens", json!(prompt.num_frozen_tokens)),
        _ => {
            set("prompt_tuning_init", json!("RANDOM"));
            set("prompt_tuning_init_text", Value::Null);
            set("tokenizer_kwargs", Value::Null);
            set("tokenizer_name_or_path", Value::Null);
        }
    }
    // PEFT sorts the keys.
    let sorted: BTreeMap<String, Value> = config.into_iter().collect();
    json_bytes(&sorted)
}

fn serialise(tensors: &[RawTensor]) -> Result<Bytes, ::safetensors::SafeTensorError> {
    let views = tensors
        .iter()
        .map(|t| Ok((t.name.as_str(), TensorView::new(t.dtype, t.shape.clone(), &t.data)?)))
        .collect::<Result<BTreeMap<_, _>, ::safetensors::SafeTensorError>>()?;
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    Ok(::safetensors::serialize(views, Some(metadata))?.into())
}

/// What is odd about the files, read as for a model that they fit. A type that is not served is no
/// error here: its files are as good as PEFT's.
fn check(files: &PromptFiles) -> Result<Vec<String>, ConvertError> {
    let task = "converted".parse().map_err(unfit)?;
    match format::read(task, files, &own_fit(files)) {
        Ok(version) => Ok(version.warnings.into_iter().filter(|w| !w.contains("names the base model")).collect()),
        Err(Faults(faults)) => {
            let (types, others): (Vec<_>, Vec<_>) =
                faults.into_iter().partition(|fault| fault.kind == FaultKind::UnsupportedType);
            if others.is_empty() {
                Ok(types.into_iter().map(|fault| fault.detail).collect())
            } else {
                Err(Faults(others).into())
            }
        }
    }
}

/// A model that the prompt fits, as far as its files tell: what is still wrong then is wrong for
/// every model.
pub fn own_fit(files: &PromptFiles) -> Fit {
    let tensors = files.weights.as_ref().and_then(|bytes| raw::read(bytes).ok()).unwrap_or_default();
    let rows = tensors.iter().find(|tensor| tensor.name == TENSOR).and_then(RawTensor::matrix);
    let fingerprint = files.task.as_ref().and_then(|bytes| TaskSpec::from_json(bytes).ok());
    let fingerprint = fingerprint.and_then(|spec| spec.base_model?.fingerprint);
    let config: Value =
        files.adapter_config.as_ref().and_then(|bytes| serde_json::from_slice(bytes).ok()).unwrap_or_default();
    let count = |key: &str| config.get(key).and_then(Value::as_u64).map(|n| n as usize).filter(|n| *n > 0);
    // Where the rows cannot be read, the configuration is believed.
    let columns = rows.map(|(_, columns)| columns).or_else(|| count("token_dim")).unwrap_or(1);
    // For prompts of keys and values these are those of the cache.
    let num_layers = count("num_layers").unwrap_or(1);
    let num_kv_heads = count("num_attention_heads").unwrap_or(1);
    let kv_dim = count("token_dim").unwrap_or(columns / num_layers.saturating_mul(2));
    let encodes = config.as_object().is_some_and(is_for_encoder_decoder);
    Fit {
        model_name: "any model".to_owned(),
        fingerprint: fingerprint.unwrap_or_default(),
        hidden_size: columns,
        num_layers: num_layers.min(MAX_COUNT),
        encoder_layers: encodes.then_some(num_layers.min(MAX_COUNT)),
        num_kv_heads: num_kv_heads.min(MAX_COUNT),
        head_dim: (kv_dim / num_kv_heads).min(MAX_COUNT),
        embedding_scale: Some((columns as f64).sqrt()),
        context_length: usize::MAX,
        dtype: DType::F32,
    }
}

/// Whether a configuration is one of a prompt for a model with an encoder: by its task, or where that is
/// not said, by the number of the model's parts.
pub fn is_for_encoder_decoder(config: &Map<String, Value>) -> bool {
    match config.get("task_type").and_then(Value::as_str) {
        Some(task) => task == "SEQ_2_SEQ_LM",
        None => config.get("num_transformer_submodules").and_then(Value::as_u64) == Some(2),
    }
}

/// Writes the files into a new folder, or an empty one: all of them or nothing.
pub fn write(files: &PromptFiles, dir: &Path) -> Result<(), ConvertError> {
    let fail = |source| ConvertError::Write { path: dir.to_owned(), source };
    check_free(dir)?;
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(fail)?;
    let staging = tempfile::Builder::new().prefix(".convert-").tempdir_in(parent).map_err(fail)?;
    // In a folder of its own within: a temporary one is closed to other users.
    let whole = staging.path().join("prompt");
    files.write_dir(&whole).map_err(fail)?;
    if PromptFiles::read_dir(&whole)? != *files {
        return Err(fail(io::Error::other("what was written is not what can be read")));
    }
    match fs::rename(&whole, dir) {
        // Some systems do not rename onto an empty folder.
        Err(_) if dir.is_dir() => fs::remove_dir(dir).and_then(|()| fs::rename(&whole, dir)).map_err(fail),
        done => done.map_err(fail),
    }
}

/// Checks that a folder can be made there, before anything is read for it.
pub fn check_free(dir: &Path) -> Result<(), ConvertError> {
    let exists = || ConvertError::Exists { path: dir.to_owned() };
    match fs::read_dir(dir) {
        Ok(mut entries) => {
            if entries.next().is_none() {
                Ok(())
            } else {
                Err(exists())
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => Err(exists()),
        Err(source) => Err(ConvertError::Write { path: dir.to_owned(), source }),
    }
}
