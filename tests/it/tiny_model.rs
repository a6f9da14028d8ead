//! A tiny random Llama with a byte-level tokenizer, written as a Hugging Face directory: for tests
//! that need a model but not a good one.

use std::{collections::BTreeMap, fs, path::Path};

use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::StandardNormal;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use softserve::model::ModelFiles;
use tempfile::TempDir;

/// `<s>`, put in front of every text by the tokenizer.
pub const BOS: u32 = 0;
/// `</s>`, the end of a sequence.
pub const EOS: u32 = 1;
/// Byte b is token `FIRST_BYTE + b`.
pub const FIRST_BYTE: u32 = 2;

/// What to write.
#[derive(Debug, Clone)]
pub struct TinyModel {
    pub seed: u64,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub context_length: usize,
}

impl Default for TinyModel {
    fn default() -> Self {
        Self {
            seed: 0,
            // More rows than the tokenizer has tokens, as real models have.
            vocab_size: 300,
            hidden_size: 32,
            intermediate_size: 64,
            num_layers: 2,
            num_heads: 4,
            num_kv_heads: 2,
            context_length: 256,
        }
    }
}

impl TinyModel {
    /// Writes the model into a new temporary folder, which goes when the returned guard does.
    pub fn temp(&self) -> (TempDir, ModelFiles) {
        let dir = tempfile::tempdir().unwrap();
        self.write(dir.path());
        let files = ModelFiles::dir(dir.path()).unwrap().named("tiny");
        (dir, files)
    }

    /// Writes `config.json`, `generation_config.json`, `tokenizer.json`, `tokenizer_config.json`
    /// and `model.safetensors`.
    pub fn write(&self, dir: &Path) {
        let json = |name: &str, value: Value| {
            fs::write(dir.join(name), serde_json::to_vec_pretty(&value).unwrap()).unwrap();
        };
        json("config.json", self.config());
        json("generation_config.json", json!({"bos_token_id": BOS, "eos_token_id": EOS}));
        json("tokenizer.json", tokenizer());
        json(
            "tokenizer_config.json",
            json!({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}),
        );
        self.write_weights(&dir.join("model.safetensors"));
    }

    fn config(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.hidden_size / self.num_heads,
            "max_position_embeddings": self.context_length,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "tie_word_embeddings": false,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "torch_dtype": "float32",
        })
    }

    fn write_weights(&self, path: &Path) {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let (h, inner, vocab) = (self.hidden_size, self.intermediate_size, self.vocab_size);
        let kv = h / self.num_heads * self.num_kv_heads;
        let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
        // Values about as large as a trained model's: unit-variance rows in, unit variance out.
        let mut add = |name: String, shape: &[usize], std: f32| {
            let values = (0..shape.iter().product()).map(|_| std * rng.sample::<f32, _>(StandardNormal));
            tensors.insert(name, (shape.to_vec(), values.flat_map(f32::to_le_bytes).collect()));
        };
        let fan_in = |n: usize| (n as f32).powf(-0.5);
        add("model.embed_tokens.weight".into(), &[vocab, h], 0.5);
        add("lm_head.weight".into(), &[vocab, h], 2.0 * fan_in(h));
        for i in 0..self.num_layers {
            let name = |part: &str| format!("model.layers.{i}.{part}.weight");
            add(name("self_attn.q_proj"), &[h, h], 1.5 * fan_in(h));
            add(name("self_attn.k_proj"), &[kv, h], 1.5 * fan_in(h));
            add(name("self_attn.v_proj"), &[kv, h], fan_in(h));
            add(name("self_attn.o_proj"), &[h, h], fan_in(h));
            add(name("mlp.gate_proj"), &[inner, h], fan_in(h));
            add(name("mlp.up_proj"), &[inner, h], fan_in(h));
            add(name("mlp.down_proj"), &[h, inner], fan_in(inner));
        }
        let norms = (0..self.num_layers)
            .flat_map(|i| {
                ["input_layernorm", "post_attention_layernorm"].map(|n| format!("model.layers.{i}.{n}.weight"))
            })
            .chain(["model.norm.weight".to_owned()]);
        for name in norms {
            // Not all ones, so that a norm's weight that is left out shows.
            let values = (0..h).map(|_| 1.0 + 0.1 * rng.sample::<f32, _>(StandardNormal));
            tensors.insert(name, (vec![h], values.flat_map(f32::to_le_bytes).collect()));
        }
        let views = tensors
            .iter()
            .map(|(name, (shape, data))| (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }
}

/// One token a byte, `<s>` in front.
fn tokenizer() -> Value {
    let mut vocab = serde_json::Map::from_iter([("<s>".to_owned(), json!(BOS)), ("</s>".to_owned(), json!(EOS))]);
    for byte in 0..=255u8 {
        vocab.insert(byte_char(byte).to_string(), json!(FIRST_BYTE + u32::from(byte)));
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(BOS, "<s>"), special(EOS, "</s>")],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [],
        },
    })
}

/// The printable character that GPT-2's byte-level alphabet has for a byte.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(256 + rank).unwrap()
}

#[test]
fn the_tiny_model_loads_and_its_tokenizer_gives_one_token_a_byte() {
    use candle_core::DType;
    use softserve::{kernels, model::Model};

    let (dir, files) = TinyModel::default().temp();
    let model = Model::load(&files, kernels::cpu(), DType::F32).unwrap();
    assert_eq!(model.info().eos_token_ids, [EOS]);
    let tokenizer = tokenizers::Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap();
    let text = "né\n\0";
    let ids = tokenizer.encode(text, true).unwrap();
    let expected: Vec<u32> = [BOS].into_iter().chain(text.bytes().map(|b| FIRST_BYTE + u32::from(b))).collect();
    assert_eq!(ids.get_ids(), expected);
    assert_eq!(tokenizer.decode(ids.get_ids(), true).unwrap(), text);
}
