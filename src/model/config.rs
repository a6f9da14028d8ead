//! A decoder described by data: the parts of a Hugging Face `config.json` that change what is
//! computed, in the form of transformers v4 and of v5. An option that is not supported is an
//! error that names it, never an approximation.

use serde::Deserialize;

/// The shape of a decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `model_type`, such as `llama`.
    pub family: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    /// Heads of keys and values; fewer than `num_heads` is grouped-query attention.
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// The most positions of one sequence (`max_position_embeddings`).
    pub context_length: usize,
    pub rms_norm_eps: f64,
    pub rope: Rope,
    /// Biases of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub attention_output_bias: bool,
    pub mlp_bias: bool,
    /// The output matrix is the embedding table.
    pub tie_word_embeddings: bool,
    pub eos_token_ids: Vec<u32>,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// How the rotary frequencies are stretched for longer contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// All frequencies divided by the factor (position interpolation, Chen et al. 2023).
    Linear {
        factor: f64,
    },
    /// Llama 3.1's: low frequencies divided, high ones kept, a smooth step between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_context_length: f64,
    },
}

impl Rope {
    /// The rotary frequency of each pair of dimensions, `[head_dim / 2]`.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        let base = (0..head_dim / 2).map(|i| self.theta.powf(-2.0 * i as f64 / head_dim as f64));
        match self.scaling {
            RopeScaling::None => base.collect(),
            RopeScaling::Linear { factor } => base.map(|f| f / factor).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context_length } => base
                .map(|f| {
                    // transformers, modeling_rope_utils.py, _compute_llama3_parameters
                    let wavelength = 2.0 * std::f64::consts::PI / f;
                    let turns = original_context_length / wavelength;
                    let smooth = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    f * (smooth + (1.0 - smooth) / factor)
                })
                .collect(),
        }
    }
}

/// A token id, a list of them, or nothing.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    #[default]
    None,
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    /// All the ids.
    pub fn into_vec(self) -> Vec<u32> {
        match self {
            Self::None => Vec::new(),
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

/// `config.json` as written: every key that matters, none required until it is needed.
#[derive(Debug, Deserialize)]
struct RawConfig {
    model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    use_sliding_window: Option<bool>,
    eos_token_id: Option<OneOrMany>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    quantization_config: Option<serde_json::Value>,
}

/// `rope_scaling` (v4; `type` before 4.45) or `rope_parameters` (v5, with theta inside).
#[derive(Debug, Default, Deserialize)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

/// What sets one family's defaults apart from another's.
struct Family {
    name: &'static str,
    qkv_bias_default: bool,
    /// Whether `attention_bias` is a key of this family, for q, k, v and the output alike.
    reads_attention_bias: bool,
    tied_default: bool,
}

/// The families this decoder computes; their differences are data.
const FAMILIES: [Family; 2] = [
    Family { name: "llama", qkv_bias_default: false, reads_attention_bias: true, tied_default: false },
    Family { name: "qwen2", qkv_bias_default: true, reads_attention_bias: false, tied_default: false },
];

impl ModelConfig {
    /// Reads and checks `config.json`. The error says which key is wrong and what is supported.
    pub fn from_json(bytes: &[u8]) -> Result<Self, String> {
        let raw: RawConfig = serde_json::from_slice(bytes).map_err(|e| format!("it is not understood: {e}"))?;
        let model_type = required(raw.model_type, "model_type")?;
        let family = FAMILIES.iter().find(|f| f.name == model_type).ok_or_else(|| {
            let known: Vec<_> = FAMILIES.iter().map(|f| f.name).collect();
            format!("model_type {model_type:?} is not supported; supported are {}", known.join(", "))
        })?;
        if raw.quantization_config.is_some() {
            return Err(
                "quantization_config is set: quantised safetensors are not supported; use the full weights".into()
            );
        }
        match raw.hidden_act.as_deref() {
            None | Some("silu" | "swish") => {}
            Some(other) => return Err(format!("hidden_act {other:?} is not supported; supported is silu")),
        }
        if raw.use_sliding_window == Some(true) {
            return Err("use_sliding_window true is not supported".into());
        }
        let hidden_size = positive(raw.hidden_size, "hidden_size")?;
        let num_heads = positive(raw.num_attention_heads, "num_attention_heads")?;
        let num_kv_heads = raw.num_key_value_heads.unwrap_or(num_heads);
        if num_kv_heads == 0 || num_heads % num_kv_heads != 0 {
            return Err(format!(
                "num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            ));
        }
        let head_dim = match raw.head_dim {
            Some(d) => d,
            None if hidden_size % num_heads == 0 => hidden_size / num_heads,
            None => {
                return Err(format!("hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"));
            }
        };
        if head_dim == 0 || head_dim % 2 != 0 {
            return Err(format!("head_dim {head_dim} is not a positive even number, as rope needs"));
        }
        let attention_bias = family.reads_attention_bias && raw.attention_bias.unwrap_or(false);
        let rms_norm_eps = raw.rms_norm_eps.unwrap_or(1e-6);
        if !(rms_norm_eps > 0.0 && rms_norm_eps < 1.0) {
            return Err(format!("rms_norm_eps {rms_norm_eps} is not a small positive number"));
        }
        Ok(Self {
            family: model_type,
            vocab_size: positive(raw.vocab_size, "vocab_size")?,
            hidden_size,
            intermediate_size: positive(raw.intermediate_size, "intermediate_size")?,
            num_layers: positive(raw.num_hidden_layers, "num_hidden_layers")?,
            num_heads,
            num_kv_heads,
            head_dim,
            context_length: positive(raw.max_position_embeddings, "max_position_embeddings")?,
            rms_norm_eps,
            rope: rope(raw.rope_theta, raw.rope_scaling, raw.rope_parameters)?,
            qkv_bias: family.qkv_bias_default || attention_bias,
            attention_output_bias: attention_bias,
            mlp_bias: family.reads_attention_bias && raw.mlp_bias.unwrap_or(false),
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(family.tied_default),
            eos_token_ids: raw.eos_token_id.unwrap_or_default().into_vec(),
        })
    }
}

fn required<T>(value: Option<T>, key: &str) -> Result<T, String> {
    value.ok_or_else(|| format!("{key} is missing"))
}

/// Sizes past this are a damaged file, not a model.
const MAX_SIZE: usize = 1 << 24;

fn positive(value: Option<usize>, key: &str) -> Result<usize, String> {
    match required(value, key)? {
        n if (1..=MAX_SIZE).contains(&n) => Ok(n),
        n => Err(format!("{key} is {n}, expected 1 to {MAX_SIZE}")),
    }
}

fn rope(theta_v4: Option<f64>, scaling_v4: Option<RawRope>, v5: Option<RawRope>) -> Result<Rope, String> {
    let raw = v5.or(scaling_v4).unwrap_or_default();
    let theta = raw.rope_theta.or(theta_v4).unwrap_or(10_000.0);
    if !(theta.is_finite() && theta > 0.0) {
        return Err(format!("rope_theta {theta} is not a positive number"));
    }
    if raw.partial_rotary_factor.is_some_and(|f| f != 1.0) {
        return Err("partial_rotary_factor is not supported".into());
    }
    let above = |value: Option<f64>, key: &str| match required(value, &format!("rope {key}"))? {
        x if x.is_finite() && x > 0.0 => Ok(x),
        x => Err(format!("rope {key} {x} is not a positive number")),
    };
    let scaling = match raw.rope_type.as_deref() {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: above(raw.factor, "factor")? },
        Some("llama3") => {
            let low_freq_factor = above(raw.low_freq_factor, "low_freq_factor")?;
            let high_freq_factor = above(raw.high_freq_factor, "high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                return Err(format!(
                    "rope high_freq_factor {high_freq_factor} is not above low_freq_factor {low_freq_factor}"
                ));
            }
            RopeScaling::Llama3 {
                factor: above(raw.factor, "factor")?,
                low_freq_factor,
                high_freq_factor,
                original_context_length: above(
                    raw.original_max_position_embeddings,
                    "original_max_position_embeddings",
                )?,
            }
        }
        Some(other) => {
            return Err(format!("rope type {other:?} is not supported; supported are default, linear, llama3"));
        }
    };
    Ok(Rope { theta, scaling })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA_V5: &str = r#"{"model_type":"llama","vocab_size":384,"hidden_size":64,"intermediate_size":128,
        "num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":32,
        "max_position_embeddings":512,"eos_token_id":[1,7],"attention_bias":true,
        "rope_parameters":{"rope_theta":500000.0,"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,
        "high_freq_factor":4.0,"original_max_position_embeddings":8192}}"#;

    fn with(change: &str) -> Result<ModelConfig, String> {
        let mut config: serde_json::Value = serde_json::from_str(LLAMA_V5).unwrap();
        let change: serde_json::Value = serde_json::from_str(change).unwrap();
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        ModelConfig::from_json(config.to_string().as_bytes())
    }

    #[test]
    fn a_v5_config_and_its_v4_form_mean_the_same() {
        let v5 = with("{}").unwrap();
        assert_eq!(v5.head_dim, 32);
        assert_eq!(v5.eos_token_ids, [1, 7]);
        assert!(v5.qkv_bias && v5.attention_output_bias && !v5.mlp_bias);
        let v4 = with(
            r#"{"rope_parameters":null,"rope_theta":500000.0,"rope_scaling":{"rope_type":"llama3","factor":8.0,
            "low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192}}"#,
        );
        assert_eq!(v4.unwrap(), v5);
    }

    #[test]
    fn llama3_scaling_keeps_high_frequencies_and_divides_low_ones() {
        let scaled = with("{}").unwrap().rope;
        let plain = Rope { scaling: RopeScaling::None, ..scaled.clone() };
        let (scaled, plain) = (scaled.inverse_frequencies(128), plain.inverse_frequencies(128));
        assert_eq!(scaled[0], plain[0]);
        assert!((scaled[63] * 8.0 - plain[63]).abs() < 1e-12);
        assert!(scaled.iter().zip(&plain).all(|(s, p)| *s <= *p && *s >= p / 8.0));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (change, named) in [
            (r#"{"model_type":"mamba"}"#, "mamba"),
            (r#"{"hidden_act":"gelu"}"#, "gelu"),
            (r#"{"rope_parameters":{"rope_type":"yarn","factor":4.0}}"#, "yarn"),
            (r#"{"rope_parameters":{"rope_type":"llama3","factor":4.0}}"#, "low_freq_factor"),
            (r#"{"num_key_value_heads":3}"#, "num_key_value_heads 3"),
            (r#"{"vocab_size":0}"#, "vocab_size is 0"),
            (r#"{"quantization_config":{}}"#, "quantization_config"),
            (r#"{"head_dim":15}"#, "head_dim 15"),
        ] {
            let error = with(change).unwrap_err();
            assert!(error.contains(named), "{change}: {error}");
        }
        assert!(ModelConfig::from_json(b"{").unwrap_err().contains("not understood"));
    }
}
