//! Where a model's files are: a Hugging Face directory, a GGUF file, bytes in the binary, or made at
//! random.

use std::{
    borrow::Cow,
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{
    config::ModelConfig,
    error::ModelError,
    gguf::{self, Gguf},
    random::RandomModel,
    tokenizer::{self, SharedTokenizer},
};
use crate::content;

/// How a conversation becomes a text, as a model's files say it.
#[derive(Debug, Clone, Default)]
pub struct ChatFiles {
    /// In Jinja.
    pub template: Option<String>,
    /// The text of the special token that begins a text, which templates write; empty where there is none.
    pub bos_token: String,
    /// The text of the one that ends it.
    pub eos_token: String,
}

/// The files of one model. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ModelFiles {
    name: String,
    source: Source,
    /// Instead of the configuration's.
    context_length: Option<usize>,
}

#[derive(Debug, Clone)]
enum Source {
    Dir(PathBuf),
    Gguf(Arc<Gguf>),
    Embedded(&'static include_dir::Dir<'static>),
    Random(Arc<RandomModel>),
}

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// Bytes hashed from each end of each weights file's tensors.
const FINGERPRINT_WINDOW: usize = 64 * 1024;
const FINGERPRINT_WINDOWS: usize = 64;

impl ModelFiles {
    /// A GGUF file, a folder with one (split or whole), or a [Hugging Face directory](Self::dir).
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        match gguf_in(path) {
            Some(Ok(file)) => Self::gguf(&file),
            Some(Err(several)) => Err(ModelError::File {
                model: path.display().to_string(),
                file: "the weights".to_owned(),
                reason: format!("the folder holds {}; give one of these files", several.join(", ")),
            }),
            None => Self::dir(path),
        }
    }

    /// A GGUF file; of a model in parts the first, with the others beside it.
    pub fn gguf(path: &Path) -> Result<Self, ModelError> {
        let gguf = Gguf::open(path)?;
        Ok(Self { name: gguf.name().to_owned(), source: Source::Gguf(Arc::new(gguf)), context_length: None })
    }

    /// A Hugging Face directory: `config.json`, `tokenizer.json`, `model.safetensors` or its
    /// shards with `model.safetensors.index.json`, and `generation_config.json` if there is one.
    pub fn dir(path: &Path) -> Result<Self, ModelError> {
        let canonical = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let name =
            canonical.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
        let files = Self { name, source: Source::Dir(path.to_owned()), context_length: None };
        if !path.is_dir() {
            return Err(files.file_error("the folder", format!("{} is not a folder", path.display())));
        }
        Ok(files)
    }

    /// Files that are part of the binary.
    pub fn embedded(name: &str, dir: &'static include_dir::Dir<'static>) -> Self {
        Self { name: name.to_owned(), source: Source::Embedded(dir), context_length: None }
    }

    /// A model whose weights are made when they are read.
    pub fn random(model: RandomModel) -> Self {
        Self { name: model.name().to_owned(), source: Source::Random(Arc::new(model)), context_length: None }
    }

    /// The same files under another name, such as the hub id they were fetched by.
    pub fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// The same files with another context length, if one is given.
    pub fn with_context_length(mut self, positions: Option<usize>) -> Self {
        self.context_length = positions.or(self.context_length);
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
            Source::Gguf(gguf) => gguf.path().display().to_string(),
            Source::Embedded(_) => "embedded in the binary".to_owned(),
            Source::Random(_) => "random weights".to_owned(),
        }
    }

    /// The whole content of a file.
    pub fn read(&self, file: &str) -> Result<Cow<'static, [u8]>, ModelError> {
        match &self.source {
            Source::Dir(dir) => {
                let bytes = std::fs::read(dir.join(file))
                    .map_err(|e| self.file_error(file, format!("{}: {e}", dir.join(file).display())))?;
                match content::stand_in(&bytes).filter(|_| !file.ends_with(".jinja")) {
                    Some(reason) => Err(self.file_error(file, reason)),
                    None => Ok(Cow::Owned(bytes)),
                }
            }
            Source::Gguf(gguf) => match file {
                CONFIG => Ok(Cow::Owned(gguf.config_json())),
                TOKENIZER_CONFIG => Ok(Cow::Owned(gguf.tokenizer_config_json())),
                _ => Err(self.file_error(file, "a GGUF file has none".to_owned())),
            },
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
            Source::Gguf(_) => [CONFIG, TOKENIZER_CONFIG].contains(&file),
            Source::Embedded(dir) => dir.get_file(file).is_some(),
            Source::Random(_) => RandomModel::has(file),
        }
    }

    /// The checked `config.json`.
    pub fn config(&self) -> Result<ModelConfig, ModelError> {
        ModelConfig::from_json(&self.read(CONFIG)?)
            .and_then(|config| match self.context_length {
                Some(positions) => config.with_context_length(positions),
                None => Ok(config),
            })
            .map_err(|reason| ModelError::Config { model: self.name.clone(), reason })
    }

    /// The tokenizer: that of `tokenizer.json`, or of the vocabulary in a GGUF file.
    pub fn tokenizer(&self) -> Result<SharedTokenizer, ModelError> {
        match &self.source {
            Source::Gguf(gguf) => Ok(gguf.tokenizer()?),
            _ => tokenizer::read(&self.read(TOKENIZER)?).map_err(|e| self.file_error(TOKENIZER, e.to_string())),
        }
    }

    /// The GGUF file, if the model is in one.
    pub(super) fn as_gguf(&self) -> Option<&Arc<Gguf>> {
        match &self.source {
            Source::Gguf(gguf) => Some(gguf),
            _ => None,
        }
    }

    /// How a conversation becomes a text: the template of `chat_template.jinja`, or what `tokenizer_config.json` says, of
    /// several the one called default; and the special tokens that templates write.
    pub fn chat(&self) -> Result<ChatFiles, ModelError> {
        const FILE: &str = "chat_template.jinja";
        let mut chat = self.chat_of_tokenizer_config()?;
        if self.has(FILE) {
            chat.template = Some(String::from_utf8_lossy(&self.read(FILE)?).into_owned());
        }
        Ok(chat)
    }

    fn chat_of_tokenizer_config(&self) -> Result<ChatFiles, ModelError> {
        #[derive(Deserialize)]
        struct Named {
            name: String,
            template: String,
        }
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Template {
            One(String),
            Several(Vec<Named>),
        }
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Token {
            Text(String),
            Added { content: String },
        }
        #[derive(Deserialize)]
        struct TokenizerConfig {
            chat_template: Option<Template>,
            bos_token: Option<Token>,
            eos_token: Option<Token>,
        }
        if !self.has(TOKENIZER_CONFIG) {
            return Ok(ChatFiles::default());
        }
        let config: TokenizerConfig = match serde_json::from_slice(&self.read(TOKENIZER_CONFIG)?) {
            Ok(config) => config,
            Err(error) => {
                tracing::warn!(model = self.name, %error, "tokenizer_config.json is not understood: no chat template");
                return Ok(ChatFiles::default());
            }
        };
        let template = match config.chat_template {
            Some(Template::One(template)) => Some(template),
            Some(Template::Several(all)) => all.into_iter().find(|t| t.name == "default").map(|t| t.template),
            None => None,
        };
        let text = |token: Option<Token>| match token {
            Some(Token::Text(text) | Token::Added { content: text }) => text,
            None => String::new(),
        };
        Ok(ChatFiles { template, bos_token: text(config.bos_token), eos_token: text(config.eos_token) })
    }

    /// The names of the safetensors files.
    pub fn weight_files(&self) -> Result<Vec<String>, ModelError> {
        const INDEX: &str = "model.safetensors.index.json";
        if self.has("model.safetensors") {
            return Ok(vec!["model.safetensors".to_owned()]);
        }
        if !self.has(INDEX) {
            let reason = "found neither model.safetensors nor model.safetensors.index.json, nor a .gguf file; other \
                          formats (.bin) are not read: save the model with safetensors";
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
    /// dtypes; of a GGUF file all its metadata) and 64 windows of 64 KiB spread evenly over its data. A fine-tune changes nearly
    /// every weight, so samples tell models apart without reading all of a large one.
    ///
    /// Random weights are told apart by what they are made from.
    pub fn fingerprint(&self) -> Result<String, ModelError> {
        if let Source::Random(model) = &self.source {
            return Ok(model.fingerprint());
        }
        let mut hash = Sha256::new();
        if let Source::Gguf(gguf) = &self.source {
            for part in gguf.parts() {
                let wrong = |e: std::io::Error| self.file_error(&part.path.display().to_string(), e.to_string());
                let file = std::fs::File::open(&part.path).map_err(wrong)?;
                sample(&mut hash, &WeightBytes::File(file, part.len), part.data_start).map_err(wrong)?;
            }
            return Ok(hex::encode(&hash.finalize()[..8]));
        }
        for file in self.weight_files()? {
            let wrong = |e: std::io::Error| self.file_error(&file, e.to_string());
            let bytes = WeightBytes::open(self, &file)?;
            let header = bytes.at(0, 8).map_err(wrong)?;
            let header_len = header.try_into().map_or(0, u64::from_le_bytes).min(bytes.len());
            sample(&mut hash, &bytes, 8 + header_len).map_err(wrong)?;
        }
        Ok(hex::encode(&hash.finalize()[..8]))
    }

    pub(super) fn file_error(&self, file: &str, reason: String) -> ModelError {
        ModelError::File { model: self.name.clone(), file: file.to_owned(), reason }
    }
}

/// The GGUF file that `path` is or that is the only model in the folder; the names of several.
fn gguf_in(path: &Path) -> Option<Result<PathBuf, Vec<String>>> {
    let is_gguf = |path: &Path| path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    if path.is_file() || is_gguf(path) && !path.is_dir() {
        return Some(Ok(path.to_owned()));
    }
    if ["model.safetensors", "model.safetensors.index.json"].iter().any(|file| path.join(file).is_file()) {
        return None;
    }
    let entries = std::fs::read_dir(path).ok()?.filter_map(|entry| entry.ok().map(|e| e.path()));
    let mut found: Vec<_> = entries.filter(|p| is_gguf(p) && !gguf::is_later_part(p)).collect();
    found.sort();
    match found.len() {
        0 => None,
        1 => found.pop().map(Ok),
        _ => Some(Err(found.iter().filter_map(|p| Some(p.file_name()?.to_string_lossy().into_owned())).collect())),
    }
}

/// Adds a file's header, which ends at `start`, and samples of what follows.
fn sample(hash: &mut Sha256, bytes: &WeightBytes, start: u64) -> std::io::Result<()> {
    let len = bytes.len();
    let start = start.min(len);
    hash.update(len.to_le_bytes());
    let stride = ((len - start) / FINGERPRINT_WINDOWS as u64).max(FINGERPRINT_WINDOW as u64);
    let windows = (0..FINGERPRINT_WINDOWS as u64).map(|i| start + i * stride).filter(|&at| at < len);
    let header_windows = (0..start).step_by(FINGERPRINT_WINDOW);
    for at in header_windows.chain(windows) {
        let n = (FINGERPRINT_WINDOW as u64).min(len - at) as usize;
        hash.update(bytes.at(at, n)?);
    }
    Ok(())
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
            Source::Embedded(_) | Source::Random(_) | Source::Gguf(_) => files.read(file).map(Self::Memory),
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
