//! Llama 2, 3 and later, and what calls itself so.

use serde_json::{Value, json};

use super::{
    config_spec::{
        ConfigSpec, Flag, IntermediateSize, NormKind, NormOrder, NormPlaces, Positions, RopeSpec, ScoreScale, Windows,
    },
    row::{Family, GgufFamily},
};
use crate::model::{
    gguf::{
        config::{OwnConfig, Shape, Source},
        names::GgufNames,
    },
    names::{Mlp, Names, NormNames, Qkv},
};

pub const LLAMA: Family = Family {
    title: "Llama 2, 3.x",
    model_type: "llama",
    multimodal_type: None,
    config: CONFIG,
    names: NAMES,
    encoder_names: None,
    gguf: Some(GgufFamily {
        architecture: "llama",
        names: GgufNames { pairs: true, ..GgufNames::PLAIN },
        config: OwnConfig { windows: false, read: gguf_config },
    }),
};

/// Many families have what Llama has and little else.
pub const CONFIG: ConfigSpec = ConfigSpec {
    norm: NormKind::Rms,
    norm_eps_key: Some("rms_norm_eps"),
    norm_eps: 1e-6,
    attention_norms: NormPlaces::BEFORE,
    mlp_norms: NormPlaces::BEFORE,
    norm_order: NormOrder::Fixed,
    parallel_residual: Flag::Never,
    activation_key: Some("hidden_act"),
    activation: "silu",
    gelu_is_tanh: false,
    positions: Positions::Rope(RopeSpec::PLAIN),
    context_length: &["max_position_embeddings"],
    windows: Windows::None,
    no_rope_layers: false,
    score_scale: ScoreScale::HeadDim,
    qk_norm: None,
    qkv_bias: Flag::Key("attention_bias", false),
    output_bias: Flag::Key("attention_bias", false),
    mlp_bias: Flag::Key("mlp_bias", false),
    grouped: true,
    intermediate_size: IntermediateSize { keys: &["intermediate_size"], multiple: None },
    tied: false,
    scaled_embeddings: false,
    embedding_norm: false,
    embedding_width: None,
    softcaps: None,
    encoder: None,
    sizes: &[],
    refused: &[],
};

pub const NAMES: Names = Names {
    prefixes: &["model.", ""],
    embeddings: "embed_tokens",
    relative_bias: None,
    cross: None,
    positions: None,
    embedding_norm: None,
    layers: "layers",
    attention_norms: NormNames { before: Some("input_layernorm"), after: None, sum: None },
    qkv: Qkv::Apart(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    qk_norms: None,
    output: "self_attn.o_proj",
    mlp_norms: NormNames { before: Some("post_attention_layernorm"), after: None, sum: None },
    mlp: Mlp::Gated(["mlp.gate_proj", "mlp.up_proj"]),
    down: "mlp.down_proj",
    final_norm: "norm",
    heads: &["lm_head"],
    transposed: false,
};

fn gguf_config(source: &Source, _: &Shape) -> Result<Value, String> {
    Ok(json!({
        "rms_norm_eps": source.rms_eps()?,
        "hidden_act": "silu",
        "attention_bias": source.has("blk.0.attn_q.bias"),
        "mlp_bias": source.has("blk.0.ffn_up.bias"),
        "rope_parameters": source.rope()?,
    }))
}
