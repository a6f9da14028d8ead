//! Gemma, the first.

use serde_json::{Value, json};

use super::{
    config_spec::{ConfigSpec, Flag, NormKind},
    llama,
    row::{Family, GgufFamily},
};
use crate::model::gguf::{
    config::{OwnConfig, Shape, Source},
    names::GgufNames,
};

pub const GEMMA: Family = Family {
    title: "Gemma",
    model_type: "gemma",
    // The first files say `gelu` and mean the other one.
    config: ConfigSpec { gelu_is_tanh: true, ..CONFIG },
    gguf: Some(GgufFamily {
        architecture: "gemma",
        names: GgufNames { plus_one: true, ..GgufNames::PLAIN },
        config: OwnConfig { windows: false, read: gguf_config },
    }),
    ..llama::LLAMA
};

/// What all Gemmas have.
pub const CONFIG: ConfigSpec = ConfigSpec {
    norm: NormKind::RmsPlusOne,
    activation: "gelu_pytorch_tanh",
    mlp_bias: Flag::Never,
    tied: true,
    scaled_embeddings: true,
    sizes: &[("head_dim", 256)],
    refused: &[("use_bidirectional_attention", true)],
    ..llama::CONFIG
};

fn gguf_config(source: &Source, _: &Shape) -> Result<Value, String> {
    Ok(json!({
        "rms_norm_eps": source.rms_eps()?,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": source.rope()?,
    }))
}
