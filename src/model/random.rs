//! A model of a given shape with random weights: to measure speed where no trained model is at hand.
//!
//! The weights are normal with a standard deviation of 0.02, the norms do nothing, all in bf16, the same on
//! every machine. The tokenizer has a word for each id, `w0`, `w1` and so on, so that a text of n
//! words is n tokens.

use std::{borrow::Cow, fs, io, path::Path, sync::OnceLock};

use half::bf16;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensorError, View};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::{
    ModelConfig, ModelError,
    config::{NormKind, QkNorm},
    names::{Mlp, Names, Qkv},
};

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

const STANDARD_DEVIATION: f64 = 0.02;
/// Changes with anything that changes the weights.
const GENERATION: &str = "softserve random weights 1";
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

/// One tensor; its values are drawn when they are asked for.
#[derive(Debug)]
struct RandomTensor {
    name: String,
    shape: Vec<usize>,
    fill: Fill,
}

#[derive(Debug, Clone, Copy)]
enum Fill {
    Normal,
    Ones,
    Zeros,
}

/// Every tensor that the decoder takes, under the names Hugging Face gives them and in the shapes of
/// their files.
fn tensors(config: &ModelConfig) -> Vec<RandomTensor> {
    let names = Names::of(&config.family);
    let prefix = names.prefixes.first().copied().unwrap_or_default();
    let mut list = List { config, names, prefix: prefix.to_owned(), tensors: Vec::new() };
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    list.table(names.embeddings, vocab);
    if let Some(offset) = config.learned_positions {
        list.table(names.positions, config.context_length + offset);
    }
    for (is, name) in [(config.embedding_norm, names.embedding_norm), (config.final_norm, names.final_norm)] {
        if is {
            list.norm(name, hidden);
        }
    }
    list.layers();
    if let Some(encoder) = config.of_encoder() {
        let names = Names::of_encoder(&config.family);
        list.norm(names.final_norm, hidden);
        let mut of_encoder = List { config: &encoder, names, prefix: list.prefix.clone(), tensors: Vec::new() };
        of_encoder.layers();
        list.tensors.append(&mut of_encoder.tensors);
    }
    if !config.tie_word_embeddings {
        list.prefix.clear();
        list.table(names.heads.first().copied().unwrap_or_default(), vocab);
    }
    list.tensors
}

/// Tensors as they are added, all under one prefix.
struct List<'a> {
    config: &'a ModelConfig,
    names: Names,
    prefix: String,
    tensors: Vec<RandomTensor>,
}

impl List<'_> {
    /// Those of all layers.
    fn layers(&mut self) {
        let (config, names, prefix) = (self.config, self.names, self.prefix.clone());
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        for layer in 0..config.num_layers {
            self.prefix = format!("{prefix}{}.{layer}.", names.layers);
            if let Some(bias) = config.relative_bias.filter(|_| layer == 0) {
                self.add(&format!("{}.weight", names.relative_bias), &[bias.buckets, config.num_heads], Fill::Normal);
            }
            match names.qkv {
                Qkv::Apart(names) => names.into_iter().zip([q, kv, kv]).for_each(|(name, outer)| {
                    self.linear(name, outer, hidden, config.qkv_bias);
                }),
                Qkv::Stacked(name) | Qkv::ByHead(name) => self.linear(name, q + 2 * kv, hidden, config.qkv_bias),
            }
            self.linear(names.output, hidden, q, config.attention_output_bias);
            match names.mlp {
                Mlp::Gated(names) | Mlp::Either { gated: names, .. } if config.gated_mlp => {
                    names.into_iter().for_each(|name| self.linear(name, inner, hidden, config.mlp_bias))
                }
                Mlp::GatedStacked(name) => self.linear(name, 2 * inner, hidden, config.mlp_bias),
                Mlp::Plain(name) | Mlp::Either { plain: name, .. } | Mlp::Gated([_, name]) => {
                    self.linear(name, inner, hidden, config.mlp_bias)
                }
            }
            self.linear(names.down, hidden, inner, config.mlp_bias);
            for (places, names) in
                [(config.attention_norms, names.attention_norms), (config.mlp_norms, names.mlp_norms)]
            {
                for (is, name) in [(places.before, names.before), (places.after, names.after), (places.sum, names.sum)]
                {
                    if is {
                        self.norm(name, hidden);
                    }
                }
            }
            let widths = match config.qk_norm {
                None => None,
                Some(QkNorm::Head) => Some([config.head_dim; 2]),
                Some(QkNorm::Projection) => Some([q, kv]),
            };
            names
                .qk_norms
                .into_iter()
                .zip(widths.into_iter().flatten())
                .for_each(|(name, width)| self.norm(name, width));
            if let Some(names) = names.cross.filter(|_| config.encoder.is_some()) {
                for (name, outer) in names.qkv.into_iter().zip([q, kv, kv]) {
                    self.linear(name, outer, hidden, config.qkv_bias);
                }
                self.linear(names.output, hidden, q, config.attention_output_bias);
                self.norm(names.norms.before, hidden);
            }
        }
        self.prefix = prefix;
    }

    fn add(&mut self, name: &str, shape: &[usize], fill: Fill) {
        let name = format!("{}{name}", self.prefix);
        self.tensors.push(RandomTensor { name, shape: shape.to_vec(), fill });
    }

    fn table(&mut self, name: &str, rows: usize) {
        self.add(&format!("{name}.weight"), &[rows, self.config.hidden_size], Fill::Normal);
    }

    fn norm(&mut self, name: &str, width: usize) {
        let one = if self.config.norm == NormKind::RmsPlusOne { Fill::Zeros } else { Fill::Ones };
        self.add(&format!("{name}.weight"), &[width], one);
        if self.config.norm == NormKind::Layer {
            self.add(&format!("{name}.bias"), &[width], Fill::Zeros);
        }
    }

    fn linear(&mut self, name: &str, outer: usize, inner: usize, bias: bool) {
        let shape = if self.names.transposed { [inner, outer] } else { [outer, inner] };
        self.add(&format!("{name}.weight"), &shape, Fill::Normal);
        if bias {
            self.add(&format!("{name}.bias"), &[outer], Fill::Normal);
        }
    }
}

impl View for RandomTensor {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        match self.fill {
            Fill::Normal => fill_normal(&mut bytes, seed(&self.name)),
            Fill::Zeros => {}
            Fill::Ones => bytes.chunks_exact_mut(2).for_each(|v| v.copy_from_slice(&bf16::ONE.to_le_bytes())),
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }
}

fn seed(name: &str) -> u64 {
    let digest = Sha256::new().chain_update(GENERATION).chain_update(name).finalize();
    digest.iter().take(8).fold(0, |seed, byte| seed << 8 | u64::from(*byte))
}

/// Bytes that one task of the thread pool fills; part of what the weights are.
const CHUNK: usize = 1 << 20;

/// Fills with bf16 values. Half a billion of them should take a second, so each is one of 65,536 that were
/// drawn beforehand, picked by 16 random bits.
fn fill_normal(bytes: &mut [u8], seed: u64) {
    let table = normal_table();
    bytes.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| {
        let mut random = SplitMix(seed.wrapping_add((i as u64).wrapping_mul(0xD134_2543_DE82_EF95)));
        for four in chunk.chunks_mut(8) {
            let mut bits = random.next();
            for value in four.chunks_exact_mut(2) {
                value.copy_from_slice(&table[(bits & 0xFFFF) as usize].to_le_bytes());
                bits >>= 16;
            }
        }
    });
}

fn normal_table() -> &'static [bf16] {
    static TABLE: OnceLock<Vec<bf16>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut random = SplitMix(0);
        // (0, 1], as the logarithm needs.
        let mut uniform = || ((random.next() >> 11) + 1) as f64 / (1u64 << 53) as f64;
        let pair = |_| {
            // Box and Muller 1958
            let (radius, angle) = ((-2.0 * uniform().ln()).sqrt(), std::f64::consts::TAU * uniform());
            [radius * angle.cos(), radius * angle.sin()]
        };
        (0..1 << 15).flat_map(pair).map(|z| bf16::from_f64(STANDARD_DEVIATION * z)).collect()
    })
}

/// SplitMix64 (Steele et al. 2014): small, quick and the same for ever, as `rand`'s generators are not.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::{
        model::{Model, ModelFiles},
        text::Text,
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
        let model = Model::load(&files, &Device::Cpu, DType::F32).unwrap();
        assert_eq!(model.info().eos_token_ids, [3]);
        assert_eq!(model.info().fingerprint, files.fingerprint().unwrap());
        let text = Text::load(&files).unwrap();
        assert_eq!(text.encode("w7 w499\nw0 elsewhere").unwrap(), [7, 499, 0, 0]);
        assert_eq!(text.decode(&[7, 499]).unwrap(), "w7 w499");
    }

    #[test]
    fn a_saved_model_has_the_same_weights() {
        let dir = tempfile::tempdir().unwrap();
        let random = small(dir.path());
        let folder = dir.path().join("saved");
        random.save(&folder).unwrap();
        let digest =
            |files: ModelFiles| Model::load(&files, &Device::Cpu, DType::BF16).unwrap().weights_digest().unwrap();
        assert_eq!(digest(ModelFiles::dir(&folder).unwrap()), digest(ModelFiles::random(random)));
        let full = small(dir.path()).save(&folder).unwrap_err();
        assert!(full.to_string().contains("not empty"), "{full}");
    }

    #[test]
    fn weights_are_normal_and_the_same_every_time() {
        let draw = |name: &str| {
            let tensor = RandomTensor { name: name.to_owned(), shape: vec![1100, 1000], fill: Fill::Normal };
            tensor.data().into_owned()
        };
        let (once, again, other) = (draw("a"), draw("a"), draw("b"));
        assert!(once == again && once != other);
        let values: Vec<f64> = once.chunks(2).map(|v| bf16::from_le_bytes([v[0], v[1]]).to_f64()).collect();
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let deviation = (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt();
        let within = values.iter().filter(|x| x.abs() < STANDARD_DEVIATION).count() as f64 / n;
        assert!(mean.abs() < 2e-4 && (deviation / STANDARD_DEVIATION - 1.0).abs() < 0.02, "{mean} {deviation}");
        assert!((within - 0.683).abs() < 0.01, "{within} lie within one standard deviation");
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
