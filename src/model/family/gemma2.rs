//! Gemma 2: norms around each branch, soft caps, and a window in every second layer.

use serde_json::{Value, json};

use super::{
    config_spec::{ConfigSpec, NormPlaces, ScoreScale, Windows},
    gemma, llama,
    row::{Family, GgufFamily},
};
use crate::model::{
    gguf::{
        config::{OwnConfig, Shape, Source},
        names::GgufNames,
    },
    names::{Names, NormNames},
};

pub const GEMMA2: Family = Family {
    title: "Gemma 2",
    model_type: "gemma2",
    config: CONFIG,
    names: NAMES,
    gguf: Some(GgufFamily {
        architecture: "gemma2",
        names: GgufNames { plus_one: true, ..GgufNames::MORE_NORMS },
        config: OwnConfig { windows: true, read: gguf_config },
    }),
    ..llama::LLAMA
};

pub const CONFIG: ConfigSpec = ConfigSpec {
    activation_key: Some("hidden_activation"),
    attention_norms: NormPlaces::BEFORE_AND_AFTER,
    mlp_norms: NormPlaces::BEFORE_AND_AFTER,
    windows: Windows::Pattern(2),
    softcaps: Some([Some(50.0), Some(30.0)]),
    score_scale: ScoreScale::QueryScalar,
    ..gemma::CONFIG
};

pub const NAMES: Names = Names {
    // As text models save it, and as parts of models that read images.
    prefixes: &["model.", "", "language_model.model.", "model.language_model."],
    attention_norms: NormNames { before: Some("input_layernorm"), after: Some("post_attention_layernorm"), sum: None },
    mlp_norms: NormNames {
        before: Some("pre_feedforward_layernorm"),
        after: Some("post_feedforward_layernorm"),
        sum: None,
    },
    heads: &["lm_head", "language_model.lm_head"],
    ..llama::NAMES
};

fn gguf_config(source: &Source, shape: &Shape) -> Result<Value, String> {
    Ok(json!({
        "rms_norm_eps": source.rms_eps()?,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": score_size(shape, 46),
        "attn_logit_softcapping": source.float("attn_logit_softcapping")?,
        "final_logit_softcapping": source.float("final_logit_softcapping")?,
        "sliding_window": source.window()?.unwrap_or(4096),
        "layer_types": layer_types(shape, 2),
        "rope_parameters": source.rope()?,
    }))
}

/// The size that scales the scores: of the model with so many layers, the largest, another one than the heads'.
pub fn score_size(shape: &Shape, largest: usize) -> usize {
    if shape.layers == largest { shape.hidden / shape.heads } else { shape.head_dim }
}

/// `layer_types` where one in so many layers has no window.
pub fn layer_types(shape: &Shape, full: usize) -> Vec<&'static str> {
    let kind = |i: usize| if (i + 1).is_multiple_of(full) { "full_attention" } else { "sliding_attention" };
    (0..shape.layers).map(kind).collect()
}
