//! Where a model's files are: a Hugging Face directory, bytes in the binary, or made at random.

use std::{
    borrow::Cow,
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{config::ModelConfig, random::RandomModel};

/// The files of one model. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ModelFiles {
    name: String,
    source: Source,
}

#[derive(Debug, Clone)]
enum Source {
    Dir(PathBuf),
    Embedded(&'static include_dir::Dir<'static>),
    Random(Arc<RandomModel>),
}

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file is missing or unreadable.
    #[error("cannot read {file} of the model {model}: {reason}")]
    File { model: String, file: String, reason: String },
    /// `config.json` is not understood; names the key and its value.
    #[error("config.json of the model {model}: {reason}")]
    Config { model: String, reason: String },
    /// Tensors are missing or have other shapes than `config.json` says; lists them all.
    #[error("the weights do not fit config.json: {0}")]
    Weights(String),
    #[error("cannot put the weights on the device: {0}")]
    Device(#[from] candle_core::Error),
}

/// Bytes hashed from each end of each weights file's tensors.
const FINGERPRINT_WINDOW: usize = 64 * 1024;
const FINGERPRINT_WINDOWS: usize = 64;

impl ModelFiles {
    /// A Hugging Face directory: `config.json`, `tokenizer.json`, `model.safetensors` or its
    /// shards with `model.safetensors.index.json`, and `generation_config.json` if there is one.
    pub fn dir(path: &Path) -> Result<Self, ModelError> {
        let canonical = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let name =
            canonical.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
        let files = Self { name, source: Source::Dir(path.to_owned()) };
        if !path.is_dir() {
            return Err(files.file_error("the folder", format!("{} is not a folder", path.display())));
        }
        Ok(files)
    }

    /// Files that are part of the binary.
    pub fn embedded(name: &str, dir: &'static include_dir::Dir<'static>) -> Self {
        Self { name: name.to_owned(), source: Source::Embedded(dir) }
    }

    /// A model whose weights are made when they are read.
    pub fn random(model: RandomModel) -> Self {
        Self { name: model.name().to_owned(), source: Source::Random(Arc::new(model)) }
    }

    /// The same files under another name, such as the hub id they were fetched by.
    pub fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the files are, for a log.
    pub fn location(&self) -> String {
        match &self.source {
            Source::Dir(path) => path.display().to_string(),
            Source::Embedded(_) => "embedded in the binary".to_owned(),
            Source::Random(_) => "random weights".to_owned(),
        }
    }

    /// The whole content of a file.
    pub fn read(&self, file: &str) -> Result<Cow<'static, [u8]>, ModelError> {
        match &self.source {
            Source::Dir(dir) => std::fs::read(dir.join(file))
                .map(Cow::Owned)
                .map_err(|e| self.file_error(file, format!("{}: {e}", dir.join(file).display()))),
            Source::Embedded(dir) => dir
                .get_file(file)
                .map(|f| Cow::Borrowed(f.contents()))
                .ok_or_else(|| self.file_error(file, "it is not part of the binary".to_owned())),
            Source::Random(model) => match model.read(file) {
                Some(made) => made.map(Cow::Owned).map_err(|e| self.file_error(file, e.to_string())),
                None => Err(self.file_error(file, "a random model has none".to_owned())),
            },
        }
    }

    fn has(&self, file: &str) -> bool {
        match &self.source {
            Source::Dir(dir) => dir.join(file).is_file(),
            Source::Embedded(dir) => dir.get_file(file).is_some(),
            Source::Random(_) => RandomModel::has(file),
        }
    }

    /// The checked `config.json`.
    pub fn config(&self) -> Result<ModelConfig, ModelError> {
        ModelConfig::from_json(&self.read("config.json")?)
            .map_err(|reason| ModelError::Config { model: self.name.clone(), reason })
    }

    /// The names of the safetensors files.
    pub fn weight_files(&self) -> Result<Vec<String>, ModelError> {
        const INDEX: &str = "model.safetensors.index.json";
        if self.has("model.safetensors") {
            return Ok(vec!["model.safetensors".to_owned()]);
        }
        if !self.has(INDEX) {
            let reason = "found neither model.safetensors nor model.safetensors.index.json; other formats \
                          (.bin, .gguf) are not read: save the model with safetensors";
            return Err(self.file_error("weights", reason.to_owned()));
        }
        #[derive(Deserialize)]
        struct Index {
            weight_map: std::collections::BTreeMap<String, String>,
        }
        let index: Index =
            serde_json::from_slice(&self.read(INDEX)?).map_err(|e| self.file_error(INDEX, e.to_string()))?;
        let shards: BTreeSet<String> = index.weight_map.into_values().collect();
        match shards.iter().find(|s| s.is_empty() || s.contains(['/', '\\']) || s.starts_with('.')) {
            Some(unsafe_name) => {
                Err(self.file_error(INDEX, format!("it names {unsafe_name:?}, which is not a file beside it")))
            }
            None => Ok(shards.into_iter().collect()),
        }
    }

    /// EOS ids: `generation_config.json` goes before `config.json`, as in transformers.
    pub fn eos_token_ids(&self, config: &ModelConfig) -> Result<Vec<u32>, ModelError> {
        const FILE: &str = "generation_config.json";
        #[derive(Deserialize)]
        struct GenerationConfig {
            #[serde(default)]
            eos_token_id: super::config::OneOrMany,
        }
        if !self.has(FILE) {
            return Ok(config.eos_token_ids.clone());
        }
        let parsed: GenerationConfig =
            serde_json::from_slice(&self.read(FILE)?).map_err(|e| self.file_error(FILE, e.to_string()))?;
        let ids = parsed.eos_token_id.into_vec();
        Ok(if ids.is_empty() { config.eos_token_ids.clone() } else { ids })
    }

    /// The first 16 hex digits of a SHA-256 over every weights file's header (names, shapes,
    /// dtypes) and 64 windows of 64 KiB spread evenly over its data. A fine-tune changes nearly
    /// every weight, so samples tell models apart without reading all of a large one.
    ///
    /// Random weights are told apart by what they are made from.
    pub fn fingerprint(&self) -> Result<String, ModelError> {
        if let Source::Random(model) = &self.source {
            return Ok(model.fingerprint());
        }
        let mut hash = Sha256::new();
        for file in self.weight_files()? {
            let bytes = WeightBytes::open(self, &file)?;
            let len = bytes.len();
            hash.update(len.to_le_bytes());
            let header = bytes.at(0, 8).map_err(|e| self.file_error(&file, e.to_string()))?;
            let header_len = header.try_into().map_or(0, u64::from_le_bytes).min(len);
            let start = (8 + header_len).min(len);
            let stride = ((len - start) / FINGERPRINT_WINDOWS as u64).max(FINGERPRINT_WINDOW as u64);
            let windows = (0..FINGERPRINT_WINDOWS as u64).map(|i| start + i * stride).filter(|&at| at < len);
            let header_windows = (0..start).step_by(FINGERPRINT_WINDOW);
            for at in header_windows.chain(windows) {
                let n = (FINGERPRINT_WINDOW as u64).min(len - at) as usize;
                hash.update(bytes.at(at, n).map_err(|e| self.file_error(&file, e.to_string()))?);
            }
        }
        Ok(hex::encode(&hash.finalize()[..8]))
    }

    pub(super) fn file_error(&self, file: &str, reason: String) -> ModelError {
        ModelError::File { model: self.name.clone(), file: file.to_owned(), reason }
    }
}

/// Random access to one weights file.
enum WeightBytes {
    File(std::fs::File, u64),
    Memory(Cow<'static, [u8]>),
}

impl WeightBytes {
    fn open(files: &ModelFiles, file: &str) -> Result<Self, ModelError> {
        match &files.source {
            Source::Dir(dir) => std::fs::File::open(dir.join(file))
                .and_then(|f| f.metadata().map(|m| Self::File(f, m.len())))
                .map_err(|e| files.file_error(file, e.to_string())),
            Source::Embedded(_) | Source::Random(_) => files.read(file).map(Self::Memory),
        }
    }

    fn len(&self) -> u64 {
        match self {
            Self::File(_, len) => *len,
            Self::Memory(bytes) => bytes.len() as u64,
        }
    }

    fn at(&self, offset: u64, n: usize) -> std::io::Result<Vec<u8>> {
        use std::io::{Error, ErrorKind, Read, Seek, SeekFrom};
        match self {
            Self::File(file, _) => {
                let mut file = file;
                let mut out = vec![0; n];
                file.seek(SeekFrom::Start(offset))?;
                file.read_exact(&mut out)?;
                Ok(out)
            }
            Self::Memory(bytes) => bytes
                .get(offset as usize..offset as usize + n)
                .map(<[u8]>::to_vec)
                .ok_or_else(|| Error::from(ErrorKind::UnexpectedEof)),
        }
    }
}
