//! From the metadata of a GGUF file to the `config.json` that the model has with Hugging Face, in
//! the form of transformers v5. What a file does not say is what llama.cpp takes for granted.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{header::TensorInfo, metadata::Metadata, rope::llama3, tokenizer::special_id};

/// Sizes past this are a damaged file, not a model.
const MAX_SIZE: usize = 1 << 24;
const MAX_LAYERS: usize = 4096;

/// Options that change what is computed and that no supported family has.
const REFUSED: [&str; 7] = [
    "expert_count",
    "attention.clamp_kqv",
    "attention.scale",
    "embedding_scale",
    "logit_scale",
    "residual_scale",
    "attention.causal",
];

/// What an architecture has in its config beside what all have.
#[derive(Debug)]
pub struct OwnConfig {
    /// Whether there may be a sliding window.
    pub windows: bool,
    /// The keys of `config.json` that it adds.
    pub read: fn(&Source, &Shape) -> Result<Value, String>,
}

/// The sizes that every architecture has.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub layers: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub context_length: usize,
}

/// What of a file goes into the config.
#[derive(Debug)]
pub struct Source<'a> {
    pub architecture: &'a str,
    pub metadata: &'a Metadata,
    pub tensors: &'a BTreeMap<String, TensorInfo>,
    /// Factors of the rotary frequencies by tensor.
    pub factors: &'a BTreeMap<&'static str, Vec<f32>>,
}

impl Source<'_> {
    /// The whole `config.json` of a family whose `model_type` this is.
    pub fn config(&self, model_type: &str, own: &OwnConfig) -> Result<Value, String> {
        if let Some(kind) = self.metadata.text("general.type")?.filter(|kind| *kind != "model") {
            return Err(format!("it holds a part of a model (general.type is {kind:?}), expected the whole model"));
        }
        for key in REFUSED {
            match self.metadata.get(&self.key(key)) {
                None => {}
                // Written, but as if it were not.
                Some(value) if value.as_float() == Some(0.0) || value.as_bool() == Some(true) => {}
                Some(_) => return Err(format!("{} is set, which is not supported", self.key(key))),
            }
        }
        let shape = self.shape()?;
        let mut config = self.common(model_type, &shape)?;
        if let Some(window) = self.window()?.filter(|_| !own.windows) {
            return Err(format!("{} is {window}, which is not supported", self.key("attention.sliding_window")));
        }
        if let (Value::Object(config), Value::Object(own)) = (&mut config, (own.read)(self, &shape)?) {
            config.extend(own);
        }
        Ok(config)
    }

    /// The number of heads of queries, and of keys and values.
    pub fn heads(&self) -> Result<(usize, usize), String> {
        let heads = self.size("attention.head_count")?;
        let key = "attention.head_count_kv";
        let kv_heads = if self.metadata.get(&self.key(key)).is_some() { self.size(key)? } else { heads };
        Ok((heads, kv_heads))
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn size(&self, key: &str) -> Result<usize, String> {
        let key = self.key(key);
        let n = self.metadata.unsigned(&key)?.ok_or_else(|| format!("{key} is missing"))?;
        let fits = usize::try_from(n).ok().filter(|n| (1..=MAX_SIZE).contains(n));
        fits.ok_or_else(|| format!("{key} is {n}, expected 1 to {MAX_SIZE}"))
    }

    /// A number of this architecture's.
    pub fn float(&self, key: &str) -> Result<Option<f64>, String> {
        self.metadata.float(&self.key(key))
    }

    /// A whole number of this architecture's.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, String> {
        self.metadata.unsigned(&self.key(key))
    }

    /// A flag of this architecture's.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        self.metadata.bool(&self.key(key))
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
    }

    /// The epsilon of norms by root mean square.
    pub fn rms_eps(&self) -> Result<Option<f64>, String> {
        self.float("attention.layer_norm_rms_epsilon")
    }

    /// The epsilon of norms by mean and variance.
    pub fn layer_norm_eps(&self) -> Result<Option<f64>, String> {
        self.float("attention.layer_norm_epsilon")
    }

    /// The sliding window, if there is one.
    pub fn window(&self) -> Result<Option<u64>, String> {
        Ok(self.unsigned("attention.sliding_window")?.filter(|n| *n > 0))
    }

    fn shape(&self) -> Result<Shape, String> {
        let hidden = self.size("embedding_length")?;
        let (heads, kv_heads) = self.heads()?;
        let head_dim = self.head_dim(hidden, heads)?;
        if let Some(n) = self.unsigned("attention.value_length")?
            && n as usize != head_dim
        {
            return Err(format!("keys have {head_dim} values a head and values {n}, which is not supported"));
        }
        let layers = self.size("block_count")?;
        if layers > MAX_LAYERS {
            return Err(format!("{} is {layers}, expected 1 to {MAX_LAYERS}", self.key("block_count")));
        }
        let (intermediate, context_length) = (self.size("feed_forward_length")?, self.size("context_length")?);
        Ok(Shape { layers, hidden, intermediate, heads, kv_heads, head_dim, context_length })
    }

    fn head_dim(&self, hidden: usize, heads: usize) -> Result<usize, String> {
        Ok(self.unsigned("attention.key_length")?.map_or(hidden / heads, |n| n as usize))
    }

    fn common(&self, model_type: &str, shape: &Shape) -> Result<Value, String> {
        let table = self.tensors.get("token_embd.weight").ok_or("the tensor token_embd.weight is missing")?;
        let vocabulary = table.shape[0];
        let tokens = self.metadata.array("tokenizer.ggml.tokens")?.map_or(0, |tokens| tokens.len());
        if tokens > vocabulary {
            return Err(format!("it has {tokens} tokens, but token_embd.weight only {vocabulary} rows"));
        }
        Ok(json!({
            "model_type": model_type,
            "vocab_size": vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "max_position_embeddings": shape.context_length,
            "tie_word_embeddings": !self.has("output.weight"),
            "bos_token_id": special_id(self.metadata, "bos")?,
            "eos_token_id": self.end_tokens()?,
        }))
    }

    fn end_tokens(&self) -> Result<Vec<usize>, String> {
        let mut found = Vec::new();
        for name in ["eos", "eot"] {
            found.extend(special_id(self.metadata, name)?.filter(|id| !found.contains(id)));
        }
        Ok(found)
    }

    /// `rope_parameters`.
    pub fn rope(&self) -> Result<Value, String> {
        let theta = self.float("rope.freq_base")?.unwrap_or(10_000.0);
        let factor = || self.float("rope.scaling.factor");
        let original = self.unsigned("rope.scaling.original_context_length")?;
        let kind = self.metadata.text(&self.key("rope.scaling.type"))?;
        let mut rope = match (kind, self.factors.get("rope_freqs.weight")) {
            (None | Some("none"), Some(factors)) => llama3(factors, theta)?,
            (Some(kind), Some(_)) => {
                return Err(format!("it has both rope.scaling.type {kind:?} and rope_freqs.weight"));
            }
            (Some("linear"), None) => json!({"rope_type": "linear", "rope_theta": theta, "factor": factor()?}),
            (Some("yarn"), None) => {
                let mut yarn = json!({"rope_type": "yarn", "rope_theta": theta, "factor": factor()?,
                                      "original_max_position_embeddings": original});
                for (key, name) in [
                    ("attn_factor", "attention_factor"),
                    ("yarn_beta_fast", "beta_fast"),
                    ("yarn_beta_slow", "beta_slow"),
                ] {
                    if let Some(value) = self.float(&format!("rope.scaling.{key}"))? {
                        yarn[name] = json!(value);
                    }
                }
                yarn
            }
            (None | Some("none" | "longrope"), None) => {
                match ["rope_factors_short.weight", "rope_factors_long.weight"].map(|name| self.factors.get(name)) {
                    [Some(short), Some(long)] => {
                        let mut rope = json!({"rope_type": "longrope", "rope_theta": theta, "short_factor": short,
                                          "long_factor": long, "original_max_position_embeddings": original});
                        if let Some(factor) = self.float("rope.scaling.attn_factor")? {
                            rope["attention_factor"] = json!(factor);
                        }
                        rope
                    }
                    _ => json!({"rope_type": "default", "rope_theta": theta}),
                }
            }
            (Some(other), None) => return Err(format!("rope.scaling.type {other:?} is not supported")),
        };
        let head_dim = self.head_dim(self.size("embedding_length")?, self.heads()?.0)? as u64;
        let rotated = self.unsigned("rope.dimension_count")?.unwrap_or(head_dim);
        rope["partial_rotary_factor"] = json!(rotated as f64 / head_dim.max(1) as f64);
        Ok(rope)
    }
}
