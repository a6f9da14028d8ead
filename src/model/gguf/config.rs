//! From the metadata of a GGUF file to the `config.json` that the model has with Hugging Face, in
//! the form of transformers v5. What a file does not say is what llama.cpp takes for granted.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

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
    /// The whole `config.json`.
    pub fn config(&self) -> Result<Value, String> {
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
        let mut config = self.common()?;
        config.extend(self.own(&config)?);
        Ok(Value::Object(config))
    }

    /// The number of heads of queries, and of keys and values.
    pub fn heads(&self) -> Result<(usize, usize), String> {
        let heads = self.size("attention.head_count")?;
        let kv_heads = self.metadata.unsigned(&self.key("attention.head_count_kv"))?.map_or(heads, |n| n as usize);
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

    fn float(&self, key: &str) -> Result<Option<f64>, String> {
        self.metadata.float(&self.key(key))
    }

    fn has(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
    }

    fn common(&self) -> Result<Map<String, Value>, String> {
        let table = self.tensors.get("token_embd.weight").ok_or("the tensor token_embd.weight is missing")?;
        let hidden = self.size("embedding_length")?;
        let (heads, kv_heads) = self.heads()?;
        let head_dim = match self.metadata.unsigned(&self.key("attention.key_length"))? {
            Some(n) => n as usize,
            None => hidden / heads,
        };
        if let Some(n) = self.metadata.unsigned(&self.key("attention.value_length"))?
            && n as usize != head_dim
        {
            return Err(format!("keys have {head_dim} values a head and values {n}, which is not supported"));
        }
        let layers = self.size("block_count")?;
        if layers > MAX_LAYERS {
            return Err(format!("{} is {layers}, expected 1 to {MAX_LAYERS}", self.key("block_count")));
        }
        let vocabulary = table.shape[0];
        let tokens = self.metadata.array("tokenizer.ggml.tokens")?.map_or(0, |tokens| tokens.len());
        if tokens > vocabulary {
            return Err(format!("it has {tokens} tokens, but token_embd.weight only {vocabulary} rows"));
        }
        let config = json!({
            "model_type": self.architecture,
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": self.size("feed_forward_length")?,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": self.size("context_length")?,
            "tie_word_embeddings": !self.has("output.weight"),
            "bos_token_id": special_id(self.metadata, "bos")?,
            "eos_token_id": self.end_tokens()?,
        });
        match config {
            Value::Object(config) => Ok(config),
            _ => Err("the config is not an object".to_owned()),
        }
    }

    fn end_tokens(&self) -> Result<Vec<usize>, String> {
        let mut found = Vec::new();
        for name in ["eos", "eot"] {
            found.extend(special_id(self.metadata, name)?.filter(|id| !found.contains(id)));
        }
        Ok(found)
    }

    /// What only this architecture has.
    fn own(&self, common: &Map<String, Value>) -> Result<Map<String, Value>, String> {
        let number = |key: &str| common[key].as_u64().unwrap_or_default();
        let (layers, hidden, heads) =
            (number("num_hidden_layers"), number("hidden_size"), number("num_attention_heads"));
        let head_dim = number("head_dim");
        let rms_eps = self.float("attention.layer_norm_rms_epsilon")?;
        let eps = self.float("attention.layer_norm_epsilon")?;
        let window = self.metadata.unsigned(&self.key("attention.sliding_window"))?.filter(|n| *n > 0);
        let windows = ["gemma2", "gemma3", "phi3"];
        if let Some(window) = window.filter(|_| !windows.contains(&self.architecture)) {
            return Err(format!("{} is {window}, which is not supported", self.key("attention.sliding_window")));
        }
        // Of the largest Gemma 2 and 3 the scores are scaled by another size than the heads'.
        let score_size = |largest: u64| if layers == largest { hidden / heads.max(1) } else { head_dim };
        let layer_types = |full: u64| -> Vec<&str> {
            let kind = |i: u64| if (i + 1).is_multiple_of(full) { "full_attention" } else { "sliding_attention" };
            (0..layers).map(kind).collect()
        };
        let gelu = "gelu_pytorch_tanh";
        let own = match self.architecture {
            "llama" => json!({
                "rms_norm_eps": rms_eps,
                "hidden_act": "silu",
                "attention_bias": self.has("blk.0.attn_q.bias"),
                "mlp_bias": self.has("blk.0.ffn_up.bias"),
                "rope_parameters": self.rope()?,
            }),
            "smollm3" => json!({
                "rms_norm_eps": rms_eps,
                "hidden_act": "silu",
                "attention_bias": self.has("blk.0.attn_q.bias"),
                "mlp_bias": self.has("blk.0.ffn_up.bias"),
                "no_rope_layers": (1..=layers).map(|i| u64::from(i % 4 != 0)).collect::<Vec<_>>(),
                "no_rope_layer_interval": 4,
                "rope_parameters": self.rope()?,
            }),
            "qwen2" => json!({"rms_norm_eps": rms_eps, "hidden_act": "silu", "rope_parameters": self.rope()?}),
            "qwen3" | "olmo2" => json!({
                "rms_norm_eps": rms_eps,
                "hidden_act": "silu",
                "attention_bias": self.has("blk.0.attn_q.bias"),
                "rope_parameters": self.rope()?,
            }),
            "gemma" => json!({
                "rms_norm_eps": rms_eps,
                "hidden_act": gelu,
                "hidden_activation": gelu,
                "rope_parameters": self.rope()?,
            }),
            "gemma2" => json!({
                "rms_norm_eps": rms_eps,
                "hidden_activation": gelu,
                "query_pre_attn_scalar": score_size(46),
                "attn_logit_softcapping": self.float("attn_logit_softcapping")?,
                "final_logit_softcapping": self.float("final_logit_softcapping")?,
                "sliding_window": window.unwrap_or(4096),
                "layer_types": layer_types(2),
                "rope_parameters": self.rope()?,
            }),
            "gemma3" => {
                let local = self.float("rope.freq_base_swa")?.unwrap_or(10_000.0);
                json!({
                    "model_type": "gemma3_text",
                    "rms_norm_eps": rms_eps,
                    "hidden_activation": gelu,
                    "query_pre_attn_scalar": score_size(62),
                    "attn_logit_softcapping": null,
                    "final_logit_softcapping": self.float("final_logit_softcapping")?,
                    "sliding_window": window.unwrap_or(number("max_position_embeddings")),
                    "layer_types": layer_types(if window.is_some() { 6 } else { 1 }),
                    "rope_parameters": {
                        "full_attention": self.rope()?,
                        "sliding_attention": {"rope_type": "default", "rope_theta": local},
                    },
                })
            }
            "phi3" => json!({
                "rms_norm_eps": rms_eps,
                "hidden_act": "silu",
                "sliding_window": window,
                "original_max_position_embeddings":
                    self.metadata.unsigned(&self.key("rope.scaling.original_context_length"))?,
                "rope_parameters": self.rope()?,
            }),
            "gpt2" => json!({
                "n_positions": common["max_position_embeddings"],
                "n_ctx": common["max_position_embeddings"],
                "n_embd": hidden,
                "n_layer": layers,
                "n_head": heads,
                "n_inner": common["intermediate_size"],
                "activation_function": "gelu_new",
                "layer_norm_epsilon": eps,
            }),
            "gptneox" => {
                let rotated = self.metadata.unsigned(&self.key("rope.dimension_count"))?.unwrap_or(head_dim);
                json!({
                    "model_type": "gpt_neox",
                    "hidden_act": "gelu",
                    "layer_norm_eps": eps,
                    "use_parallel_residual": self.metadata.bool(&self.key("use_parallel_residual"))?.unwrap_or(true),
                    "rotary_pct": rotated as f64 / head_dim.max(1) as f64,
                    "rope_parameters": self.rope()?,
                })
            }
            "bloom" => json!({
                "n_layer": layers,
                "n_head": heads,
                "seq_length": common["max_position_embeddings"],
                "layer_norm_epsilon": eps,
                "apply_residual_connection_post_layernorm": false,
            }),
            other => return Err(format!("the architecture {other:?} is not supported")),
        };
        match own {
            Value::Object(own) => Ok(own),
            _ => Err("the config is not an object".to_owned()),
        }
    }

    /// `rope_parameters`.
    fn rope(&self) -> Result<Value, String> {
        let theta = self.float("rope.freq_base")?.unwrap_or(10_000.0);
        let factor = || self.float("rope.scaling.factor");
        let original = self.metadata.unsigned(&self.key("rope.scaling.original_context_length"))?;
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
        let rotated = self.metadata.unsigned(&self.key("rope.dimension_count"))?;
        let head_dim = match self.metadata.unsigned(&self.key("attention.key_length"))? {
            Some(n) => n,
            None => (self.size("embedding_length")? / self.heads()?.0) as u64,
        };
        rope["partial_rotary_factor"] = json!(rotated.unwrap_or(head_dim) as f64 / head_dim.max(1) as f64);
        Ok(rope)
    }
}
