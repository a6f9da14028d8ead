//! What is inspected: one prompt's files, from wherever they lie.

use std::path::Path;

use anyhow::Context as _;
use bytes::Bytes;

use crate::{
    cli::{convert::explain, prompts},
    convert::{self, RawTensor, Target, peft, tensor},
    prompt::{
        TaskName,
        files::{ADAPTER_CONFIG, PICKLE, PromptFiles, WEIGHTS},
    },
    registry::package::{self, PackageError, Packing},
};

/// One prompt, as files of a PEFT directory whatever it was stored as.
#[derive(Debug)]
pub struct Subject {
    /// How it was stored.
    pub format: String,
    pub files: PromptFiles,
    /// In the file's order; empty if they cannot be read.
    pub tensors: Vec<RawTensor>,
    /// What the file says and a PEFT directory has no place for.
    pub notes: Vec<String>,
    /// Whether its configuration is one that the file does not have.
    pub is_foreign: bool,
}

/// Virtual tokens' embeddings.
#[derive(Debug)]
pub struct Rows {
    pub columns: usize,
    /// Row by row.
    pub values: Vec<f32>,
}

impl Subject {
    /// Opens a folder or a file; `tensor` is the prompt where a file of another program has several.
    pub fn open(path: &Path, tensor: Option<String>) -> anyhow::Result<Self> {
        let target = Target { tensor, ..Target::default() };
        if !path.is_dir() {
            return Self::file(path, &target);
        }
        if !path.join(WEIGHTS).exists() {
            if let Some(active) = prompts::active(path)? {
                let version = active.file_name().unwrap_or_default().to_string_lossy().into_owned();
                return Self::folder(&active, format!("task folder, active version {version}"));
            }
            if convert::PICKLES.iter().any(|name| path.join(name).exists()) {
                return Self::foreign(convert::open(path, convert::MAX_BYTES)?, &target);
            }
        }
        Self::folder(path, "PEFT directory".to_owned())
    }

    fn folder(path: &Path, format: String) -> anyhow::Result<Self> {
        let files = PromptFiles::read_users_dir(path)?;
        files.check_complete().with_context(|| format!("{} is not a PEFT directory", path.display()))?;
        Ok(Self::peft(format, files))
    }

    fn file(path: &Path, target: &Target) -> anyhow::Result<Self> {
        let name = path.file_name().unwrap_or_default();
        if name == PICKLE {
            return Self::foreign(convert::open(path, convert::MAX_BYTES).map_err(explain)?, target);
        }
        if name == WEIGHTS && path.with_file_name(ADAPTER_CONFIG).exists() {
            return Self::folder(path.parent().unwrap_or(Path::new(".")), "PEFT directory".to_owned());
        }
        let bytes = convert::read_file(path, convert::MAX_BYTES).map_err(explain)?;
        let packing = package::sniff(&bytes);
        match packing.map(|packing| unpack(packing, &bytes)) {
            Some(Ok(files)) => Ok(Self::peft(packing.map_or("file", Packing::name).to_owned(), files)),
            // It may be a format of another program in the same packing.
            None | Some(Err(PackageError::NoPrompt { .. })) => {
                Self::foreign(convert::parse(bytes, convert::MAX_BYTES).map_err(explain)?, target)
            }
            Some(Err(error)) => Err(error.into()),
        }
        .with_context(|| format!("cannot read {}", path.display()))
    }

    fn peft(format: String, files: PromptFiles) -> Self {
        let tensors = files.weights.as_ref().and_then(|bytes| convert::safetensors::read(bytes).ok());
        Self { format, files, tensors: tensors.unwrap_or_default(), notes: Vec::new(), is_foreign: false }
    }

    fn foreign(foreign: convert::Foreign, target: &Target) -> anyhow::Result<Self> {
        let converted = foreign.to_peft(target).map_err(explain)?;
        let mut notes = [foreign.notes, converted.notes].concat();
        notes.push("softserve convert can write it as a PEFT directory".to_owned());
        let format = foreign.format.name().to_owned();
        let is_foreign = foreign.adapter_config.is_none();
        Ok(Self { format, files: converted.files, tensors: converted.tensors, notes, is_foreign })
    }

    /// A name to read it under; any will do.
    pub fn task_name(&self) -> Option<TaskName> {
        "inspected".parse().ok()
    }

    /// `prompt_embeddings`.
    pub fn main_tensor(&self) -> Option<&RawTensor> {
        self.tensors.iter().find(|tensor| tensor.name == peft::TENSOR)
    }

    /// `adapter_config.json`, whatever it holds.
    pub fn config(&self) -> Option<serde_json::Map<String, serde_json::Value>> {
        serde_json::from_slice(self.files.adapter_config.as_ref()?).ok()
    }

    /// The layers of a prompt that is keys and values: 2 x layers x width columns, each layer's keys
    /// before its values.
    pub fn num_layers(&self) -> Option<usize> {
        let config = self.config()?;
        let kind = config.get("peft_type")?.as_str()?;
        let layers = config.get("num_layers")?.as_u64()? as usize;
        let (_, columns) = self.main_tensor()?.matrix()?;
        let fits = layers > 0 && columns > 0 && columns.checked_rem(layers.checked_mul(2)?) == Some(0);
        (["PREFIX_TUNING", "CARTRIDGE"].contains(&kind) && fits).then_some(layers)
    }

    /// Whether it is for a model with an encoder.
    pub fn is_for_encoder_decoder(&self) -> bool {
        self.config().is_some_and(|config| peft::is_for_encoder_decoder(&config))
    }

    /// The rows of the tensor that are virtual tokens, and how many more there are. Of a prompt for an
    /// encoder-decoder model the second half, if there is one, would be the decoder's: PEFT writes it and
    /// never reads it.
    pub fn num_virtual_tokens(&self) -> Option<(usize, usize)> {
        let (rows, _) = self.main_tensor()?.matrix()?;
        let declared = self.config().and_then(|config| config.get("num_virtual_tokens")?.as_u64());
        match declared.map(|n| n as usize) {
            Some(n) if n.checked_mul(2) == Some(rows) && self.is_for_encoder_decoder() => Some((n, rows - n)),
            _ => Some((rows, 0)),
        }
    }

    /// The virtual tokens' embeddings, if the prompt is made of such.
    pub fn rows(&self) -> Option<Rows> {
        let tensor = self.main_tensor().filter(|tensor| tensor.is_float())?;
        let (_, columns) = tensor.matrix().filter(|(rows, columns)| *rows > 0 && *columns > 0)?;
        if self.num_layers().is_some() {
            return None;
        }
        let (used, _) = self.num_virtual_tokens()?;
        let mut values = tensor.values();
        values.truncate(used * columns);
        Some(Rows { columns, values })
    }
}

impl Rows {
    /// The norm of each.
    pub fn norms(&self) -> Vec<f64> {
        self.values.chunks(self.columns).map(tensor::norm).collect()
    }
}

/// A packed PEFT directory, or a safetensors file with the rows under PEFT's name.
fn unpack(packing: Packing, bytes: &Bytes) -> Result<PromptFiles, PackageError> {
    let files = package::unpack(packing, bytes.clone(), convert::MAX_BYTES)?.files;
    let rows = |bytes| convert::safetensors::read(bytes).is_ok_and(|t| t.iter().any(|t| t.name == peft::TENSOR));
    match (packing, &files.weights) {
        (Packing::Safetensors, Some(weights)) if !rows(weights) => {
            Err(PackageError::NoPrompt { found: format!("there is no tensor {}", peft::TENSOR) })
        }
        _ => Ok(files),
    }
}
