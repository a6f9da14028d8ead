//! The PEFT directory of a foreign prompt: which tensor it is, the two files, and writing them.

use std::{collections::BTreeMap, fs, io, path::Path};

use bytes::Bytes;
use candle_core::DType;
use clap::ValueEnum;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

use super::{ConvertError, Foreign, RawTensor, safetensors as raw};
use crate::prompt::{
    files::PromptFiles,
    format::{self, FaultKind, Faults, Fit},
    spec::TaskSpec,
};

/// The name of the rows in PEFT's file.
pub const TENSOR: &str = "prompt_embeddings";

/// The release of PEFT whose files these are like.
const PEFT_VERSION: &str = "0.21.2";

/// The most layers, heads and dimensions that are believed, so that products of them have a place.
const MAX_COUNT: usize = 1 << 16;

/// Names that are taken for the prompt where a file has several tensors, the likeliest first.
const LIKELY: [&str; 6] = [TENSOR, "soft_prompt", "prompt", "soft_prompt.weight", "embedding.weight", "weight"];

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
}

/// A prompt in PEFT's form.
#[derive(Debug, Clone)]
pub struct Converted {
    pub files: PromptFiles,
    /// The tensors in it.
    pub tensors: Vec<RawTensor>,
    /// What `serve` would warn of or not take.
    pub warnings: Vec<String>,
}

impl Foreign {
    /// Makes the PEFT directory's files, and reads them back as `serve` does, as far as that needs
    /// no model. Values stay in their number format.
    pub fn to_peft(&self, target: &Target) -> Result<Converted, ConvertError> {
        let (adapter_config, tensors) = match &self.adapter_config {
            Some(config) if *target == Target::default() => (config.clone(), self.tensors.clone()),
            Some(_) => return Err(ConvertError::Described),
            None => {
                let rows = self.choose(target.tensor.as_deref())?;
                (config(&rows, target).map_err(unfit)?, vec![rows])
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
        let files = PromptFiles { adapter_config: Some(adapter_config), weights: Some(weights), task };
        let warnings = check(&files)?;
        Ok(Converted { files, tensors, warnings })
    }

    /// The one tensor that is the prompt, as a matrix.
    fn choose(&self, asked: Option<&str>) -> Result<RawTensor, ConvertError> {
        let found = || {
            let shown: Vec<String> = self.tensors.iter().take(12).map(RawTensor::describe).collect();
            let more = self.tensors.len().saturating_sub(12);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            if shown.is_empty() { "no tensor".to_owned() } else { shown.join(", ") + &more }
        };
        let none = |reason: String| ConvertError::NoTensor { reason, found: found() };
        let fits = |tensor: &&RawTensor| tensor.is_float() && tensor.matrix().is_some();
        let tensor = match asked {
            Some(name) => self
                .tensors
                .iter()
                .find(|tensor| tensor.name == name)
                .ok_or_else(|| none(format!("there is no tensor {name:?}")))?,
            None => {
                if self.tensors.iter().any(|tensor| tensor.name.starts_with("prefix_task_")) {
                    let reason = "this is PEFT's multitask prompt, which needs its adapter_config.json; give the \
                                  folder that has both files";
                    return Err(ConvertError::Unfit(reason.to_owned()));
                }
                let likely = LIKELY.iter().find_map(|name| self.tensors.iter().find(|t| t.name == *name));
                let mut matrices = self.tensors.iter().filter(fits);
                match (likely.filter(fits), matrices.next(), matrices.next()) {
                    (Some(tensor), _, _) | (None, Some(tensor), None) => tensor,
                    (None, None, _) => return Err(none("the file has no matrix of floats".to_owned())),
                    (None, Some(_), Some(_)) => return Err(ConvertError::Ambiguous { found: found() }),
                }
            }
        };
        let Some((rows, columns)) = tensor.matrix().filter(|_| fits(&tensor)) else {
            return Err(ConvertError::Unfit(format!(
                "{} is not a soft prompt; expected F32, F16, BF16 or F64 with the shape [virtual tokens, hidden size]",
                tensor.describe()
            )));
        };
        Ok(RawTensor { name: TENSOR.to_owned(), shape: vec![rows, columns], ..tensor.clone() })
    }
}

fn unfit(error: impl std::fmt::Display) -> ConvertError {
    ConvertError::Unfit(format!("cannot write the prompt: {error}"))
}

fn json_bytes(value: &impl serde::Serialize) -> serde_json::Result<Bytes> {
    Ok(serde_json::to_vec_pretty(value)?.into())
}

/// `adapter_config.json` as PEFT writes it for prompt tuning; it fills in what is null when it loads
/// the prompt.
fn config(rows: &RawTensor, target: &Target) -> serde_json::Result<Bytes> {
    let task_type = target.task_type.unwrap_or_default();
    let (num_virtual_tokens, token_dim) = rows.matrix().unwrap_or_default();
    // PEFT sorts the keys.
    let config: BTreeMap<&str, Value> = [
        ("auto_mapping", Value::Null),
        ("base_model_name_or_path", json!(target.base_model)),
        ("inference_mode", json!(true)),
        ("modules_to_save", Value::Null),
        ("num_attention_heads", Value::Null),
        ("num_layers", Value::Null),
        // The rows in front of the encoder are all that an encoder-decoder ever uses.
        ("num_transformer_submodules", json!(1)),
        ("num_virtual_tokens", json!(num_virtual_tokens)),
        ("peft_type", json!("PROMPT_TUNING")),
        ("peft_version", json!(PEFT_VERSION)),
        ("prompt_tuning_init", json!("RANDOM")),
        ("prompt_tuning_init_text", Value::Null),
        ("revision", Value::Null),
        ("task_type", json!(task_type.as_str())),
        ("token_dim", json!(token_dim)),
        ("tokenizer_kwargs", Value::Null),
        ("tokenizer_name_or_path", Value::Null),
    ]
    .into();
    json_bytes(&config)
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
    let columns = rows.map_or(0, |(_, columns)| columns);
    let fingerprint = files.task.as_ref().and_then(|bytes| TaskSpec::from_json(bytes).ok());
    let fingerprint = fingerprint.and_then(|spec| spec.base_model?.fingerprint);
    let config: Value =
        files.adapter_config.as_ref().and_then(|bytes| serde_json::from_slice(bytes).ok()).unwrap_or_default();
    let count = |key: &str| config.get(key).and_then(Value::as_u64).map(|n| n as usize).filter(|n| *n > 0);
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
