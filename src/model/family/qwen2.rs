//! Qwen2 and Qwen2.5.

use serde_json::{Value, json};

use super::{
    config_spec::{ConfigSpec, Flag, Windows},
    llama,
    row::{Family, GgufFamily},
};
use crate::model::gguf::{
    config::{OwnConfig, Shape, Source},
    names::GgufNames,
};

pub const QWEN2: Family = Family {
    title: "Qwen2, Qwen2.5",
    model_type: "qwen2",
    config: CONFIG,
    gguf: Some(GgufFamily {
        architecture: "qwen2",
        names: GgufNames::PLAIN,
        config: OwnConfig { windows: false, read: gguf_config },
    }),
    ..llama::LLAMA
};

pub const CONFIG: ConfigSpec = ConfigSpec {
    windows: Windows::Late,
    qkv_bias: Flag::Always,
    output_bias: Flag::Never,
    mlp_bias: Flag::Never,
    ..llama::CONFIG
};

fn gguf_config(source: &Source, _: &Shape) -> Result<Value, String> {
    Ok(json!({
        "rms_norm_eps": source.rms_eps()?,
        "hidden_act": "silu",
        "rope_parameters": source.rope()?,
    }))
}
