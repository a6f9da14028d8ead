//! SmolLM3: Llama whose every fourth layer does not rotate.

use serde_json::{Value, json};

use super::{
    config_spec::{ConfigSpec, Positions, RopeSpec, Windows},
    llama,
    row::{Family, GgufFamily},
};
use crate::model::gguf::{
    config::{OwnConfig, Shape, Source},
    names::GgufNames,
};

pub const SMOLLM3: Family = Family {
    title: "SmolLM3",
    model_type: "smollm3",
    config: ConfigSpec {
        positions: Positions::Rope(RopeSpec { theta: ("rope_theta", 2_000_000.0), ..RopeSpec::PLAIN }),
        windows: Windows::WithoutRope,
        no_rope_layers: true,
        tied: true,
        ..llama::CONFIG
    },
    gguf: Some(GgufFamily {
        architecture: "smollm3",
        names: GgufNames { pairs: true, ..GgufNames::PLAIN },
        config: OwnConfig { windows: false, read: gguf_config },
    }),
    ..llama::LLAMA
};

fn gguf_config(source: &Source, shape: &Shape) -> Result<Value, String> {
    Ok(json!({
        "rms_norm_eps": source.rms_eps()?,
        "hidden_act": "silu",
        "attention_bias": source.has("blk.0.attn_q.bias"),
        "mlp_bias": source.has("blk.0.ffn_up.bias"),
        "no_rope_layers": (1..=shape.layers).map(|i| u64::from(i % 4 != 0)).collect::<Vec<_>>(),
        "no_rope_layer_interval": 4,
        "rope_parameters": source.rope()?,
    }))
}
