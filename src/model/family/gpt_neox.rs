//! GPT-NeoX and Pythia: part of a head rotated, attention and MLP side by side.

use serde_json::{Value, json};

use super::{
    config_spec::{ConfigSpec, Flag, Positions, RopeSpec},
    gpt2, llama,
    row::{Family, GgufFamily},
};
use crate::model::{
    gguf::{
        config::{OwnConfig, Shape, Source},
        names::GgufNames,
    },
    names::{Mlp, Names, Qkv},
};

pub const GPT_NEOX: Family = Family {
    title: "GPT-NeoX, Pythia",
    model_type: "gpt_neox",
    config: ConfigSpec {
        norm_eps_key: Some("layer_norm_eps"),
        parallel_residual: Flag::Key("use_parallel_residual", true),
        activation_key: Some("hidden_act"),
        activation: "gelu",
        positions: Positions::Rope(RopeSpec {
            theta: ("rotary_emb_base", 10_000.0),
            partial_key: "rotary_pct",
            partial: Some(0.25),
            ..RopeSpec::PLAIN
        }),
        qkv_bias: Flag::Key("attention_bias", true),
        output_bias: Flag::Key("attention_bias", true),
        tied: false,
        ..gpt2::CONFIG
    },
    names: Names {
        prefixes: &["gpt_neox.", ""],
        embeddings: "embed_in",
        final_norm: "final_layer_norm",
        // Since transformers v5, and before.
        heads: &["lm_head", "embed_out"],
        qkv: Qkv::ByHead("attention.query_key_value"),
        output: "attention.dense",
        mlp: Mlp::Plain("mlp.dense_h_to_4h"),
        down: "mlp.dense_4h_to_h",
        ..llama::NAMES
    },
    gguf: Some(GgufFamily {
        architecture: "gptneox",
        names: GgufNames {
            top: GGUF_TOP,
            prefix: "gpt_neox.layers.",
            layer: GGUF_LAYER,
            fused: true,
            ..GgufNames::PLAIN
        },
        config: OwnConfig { windows: false, read: gguf_config },
    }),
    ..llama::LLAMA
};

const GGUF_TOP: &[(&str, &str)] =
    &[("token_embd", "gpt_neox.embed_in"), ("output_norm", "gpt_neox.final_layer_norm"), ("output", "embed_out")];

const GGUF_LAYER: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_qkv", "attention.query_key_value"),
    ("attn_output", "attention.dense"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_up", "mlp.dense_h_to_4h"),
    ("ffn_down", "mlp.dense_4h_to_h"),
];

fn gguf_config(source: &Source, shape: &Shape) -> Result<Value, String> {
    let rotated = source.unsigned("rope.dimension_count")?.unwrap_or(shape.head_dim as u64);
    Ok(json!({
        "hidden_act": "gelu",
        "layer_norm_eps": source.layer_norm_eps()?,
        "use_parallel_residual": source.flag("use_parallel_residual")?.unwrap_or(true),
        "rotary_pct": rotated as f64 / shape.head_dim.max(1) as f64,
        "rope_parameters": source.rope()?,
    }))
}
