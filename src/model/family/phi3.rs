//! Phi-3, 3.5 and 4-mini: stacked projections, part of a head rotated, longrope.

use serde_json::{Value, json};

use super::{
    config_spec::{ConfigSpec, Flag, Positions, RopeSpec, Windows},
    llama,
    row::{Family, GgufFamily},
};
use crate::model::{
    gguf::{
        config::{OwnConfig, Shape, Source},
        names::GgufNames,
    },
    names::{Mlp, Names, Qkv},
};

pub const PHI3: Family = Family {
    title: "Phi-3, 3.5, 4-mini",
    model_type: "phi3",
    config: ConfigSpec {
        norm_eps: 1e-5,
        positions: Positions::Rope(RopeSpec {
            partial: Some(1.0),
            // What the first files call it.
            longrope_types: &["su", "yarn"],
            original_context_length: Some(4096.0),
            ..RopeSpec::PLAIN
        }),
        windows: Windows::All(None),
        qkv_bias: Flag::Never,
        output_bias: Flag::Never,
        mlp_bias: Flag::Never,
        ..llama::CONFIG
    },
    names: Names {
        qkv: Qkv::Stacked("self_attn.qkv_proj"),
        mlp: Mlp::GatedStacked("mlp.gate_up_proj"),
        ..llama::NAMES
    },
    gguf: Some(GgufFamily {
        architecture: "phi3",
        names: GgufNames { layer: GGUF_LAYER, ..GgufNames::PLAIN },
        config: OwnConfig { windows: true, read: gguf_config },
    }),
    ..llama::LLAMA
};

const GGUF_LAYER: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_up", "mlp.gate_up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

fn gguf_config(source: &Source, _: &Shape) -> Result<Value, String> {
    Ok(json!({
        "rms_norm_eps": source.rms_eps()?,
        "hidden_act": "silu",
        "sliding_window": source.window()?,
        "original_max_position_embeddings": source.unsigned("rope.scaling.original_context_length")?,
        "rope_parameters": source.rope()?,
    }))
}
