//! A model of a given shape with random weights: to measure speed where no trained model is at hand.
//!
//! The weights are normal with a standard deviation of 0.02, the norms do nothing, all in bf16, the same on
//! every machine. The tokenizer has a word for each id, `w0`, `w1` and so on, so that a text of n
//! words is n tokens.

mod draw;
mod tensors;

use std::{fs, io, path::Path};

use draw::GENERATION;
use safetensors::SafeTensorError;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tensors::{RandomTensor, tensors};

use super::{ModelConfig, ModelError};

/// Shapes that ship with the program: name and `config.json`.
const PRESETS: [(&str, &str); 2] = [
    ("smollm2-135m", include_str!("random/smollm2-135m.json")),
    ("qwen2.5-0.5b", include_str!("random/qwen2.5-0.5b.json")),
];

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const FILES: [&str; 4] = [CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS];

/// A `config.json` that asks for more is a mistake, not a benchmark.
const MAX_VALUES: usize = 1 << 35;

/// Its files, made when they are read.
#[derive(Debug)]
pub struct RandomModel {
    name: String,
    config_json: Vec<u8>,
    config: ModelConfig,
}

impl RandomModel {
    /// The shape of one of the presets' names, or of a `config.json`.
    pub fn open(shape: &str) -> Result<Self, ModelError> {
        let preset = PRESETS.iter().find(|(name, _)| *name == shape);
        let (name, config_json) = match preset {
            Some((name, json)) => ((*name).to_owned(), json.as_bytes().to_vec()),
            None => (name_of(Path::new(shape)), read_config(shape)?),
        };
        let config_error = |reason| ModelError::Config { model: shape.to_owned(), reason };
        let config = ModelConfig::from_json(&config_json).map_err(config_error)?;
        let sizes = tensors(&config).into_iter().map(|t| t.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)));
        match sizes.sum::<Option<usize>>() {
            Some(n) if n <= MAX_VALUES => Ok(Self { name: format!("random-{name}"), config_json, config }),
            _ => Err(config_error(format!("it asks for more than {MAX_VALUES} values"))),
        }
    }

    /// What the model goes by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the model has a file of that name.
    pub fn has(file: &str) -> bool {
        FILES.contains(&file)
    }

    /// The content of a file, made now; `None` if there is none of that name.
    pub fn read(&self, file: &str) -> Option<Result<Vec<u8>, SafeTensorError>> {
        match file {
            CONFIG => Some(Ok(self.config_json.clone())),
            TOKENIZER => Some(Ok(self.tokenizer().to_string().into_bytes())),
            TOKENIZER_CONFIG => Some(Ok(self.tokenizer_config().to_string().into_bytes())),
            WEIGHTS => Some(safetensors::serialize(self.views(), None)),
            _ => None,
        }
    }

    /// Writes it as a Hugging Face folder, which transformers opens as well. The folder is made; it
    /// must not hold files yet.
    pub fn save(&self, folder: &Path) -> io::Result<()> {
        fs::create_dir_all(folder)?;
        if fs::read_dir(folder)?.next().is_some() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the folder is not empty"));
        }
        fs::write(folder.join(CONFIG), &self.config_json)?;
        fs::write(folder.join(TOKENIZER), self.tokenizer().to_string())?;
        fs::write(folder.join(TOKENIZER_CONFIG), self.tokenizer_config().to_string())?;
        safetensors::serialize_to_file(self.views(), None, &folder.join(WEIGHTS)).map_err(io::Error::other)
    }

    /// 16 hex digits that are the same for the same `config.json` and the same way to draw.
    pub fn fingerprint(&self) -> String {
        hex::encode(&Sha256::new().chain_update(GENERATION).chain_update(&self.config_json).finalize()[..8])
    }

    fn views(&self) -> impl Iterator<Item = (String, RandomTensor)> {
        tensors(&self.config).into_iter().map(|tensor| (tensor.name.clone(), tensor))
    }

    fn tokenizer(&self) -> serde_json::Value {
        let vocabulary: serde_json::Map<_, _> =
            (0..self.config.vocab_size).map(|id| (format!("w{id}"), json!(id))).collect();
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
        })
    }

    fn tokenizer_config(&self) -> serde_json::Value {
        let end = self.config.eos_token_ids.first().map(|id| format!("w{id}"));
        json!({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end, "unk_token": "w0",
               "model_max_length": self.config.context_length, "clean_up_tokenization_spaces": false})
    }
}

fn read_config(path: &str) -> Result<Vec<u8>, ModelError> {
    fs::read(path).map_err(|e| {
        let names = PRESETS.map(|(name, _)| name).join(", ");
        let reason = format!("{e}; expected the path of a config.json, or one of: {names}");
        ModelError::File { model: path.to_owned(), file: CONFIG.to_owned(), reason }
    })
}

/// A `config.json` is named by its folder.
fn name_of(path: &Path) -> String {
    let named = if path.ends_with(CONFIG) { path.parent().and_then(Path::file_name) } else { path.file_stem() };
    named.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::{
        kernels,
        model::{Model, ModelFiles},
        tokenizer::Tokenizer,
    };

    /// A small shape with everything that a shape can have: biases, its own output matrix.
    fn small(dir: &Path) -> RandomModel {
        let config = json!({"model_type": "llama", "vocab_size": 500, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "max_position_embeddings": 128, "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": false,
            "eos_token_id": 3, "hidden_act": "silu"});
        let path = dir.join("config.json");
        fs::write(&path, config.to_string()).unwrap();
        RandomModel::open(path.to_str().unwrap()).unwrap()
    }

    #[test]
    fn a_random_model_loads_and_a_text_of_n_words_is_n_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let random = small(dir.path());
        assert!(random.name().starts_with("random-"), "{}", random.name());
        let files = ModelFiles::random(random);
        let model = Model::load(&files, kernels::cpu(), DType::F32).unwrap();
        assert_eq!(model.info().eos_token_ids, [3]);
        assert_eq!(model.info().fingerprint, files.fingerprint().unwrap());
        let tokenizer = Tokenizer::load(&files).unwrap();
        assert_eq!(tokenizer.tokenize("w7 w499\nw0 elsewhere").unwrap(), [7, 499, 0, 0]);
        assert_eq!(tokenizer.decode(&[7, 499]).unwrap(), "w7 w499");
    }

    #[test]
    fn a_saved_model_has_the_same_weights() {
        let dir = tempfile::tempdir().unwrap();
        let random = small(dir.path());
        let folder = dir.path().join("saved");
        random.save(&folder).unwrap();
        let digest =
            |files: ModelFiles| Model::load(&files, kernels::cpu(), DType::BF16).unwrap().weights_digest().unwrap();
        assert_eq!(digest(ModelFiles::dir(&folder).unwrap()), digest(ModelFiles::random(random)));
        let full = small(dir.path()).save(&folder).unwrap_err();
        assert!(full.to_string().contains("not empty"), "{full}");
    }

    #[test]
    fn the_presets_are_the_published_shapes() {
        let values = |name: &str| -> usize {
            let model = RandomModel::open(name).unwrap();
            model.views().map(|(_, t)| t.shape.iter().product::<usize>()).sum()
        };
        assert_eq!(values("smollm2-135m"), 134_515_008);
        assert_eq!(values("qwen2.5-0.5b"), 494_032_768);
        let error = RandomModel::open("smollm3").unwrap_err().to_string();
        assert!(error.contains("smollm3") && error.contains("qwen2.5-0.5b"), "{error}");
    }
}
