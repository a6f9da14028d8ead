//! Qwen3: Qwen2 with norms of queries and keys.

use serde_json::{Value, json};

use super::{
    config_spec::{ConfigSpec, Flag, QkNorm},
    llama, qwen2,
    row::{Family, GgufFamily},
};
use crate::model::{
    gguf::{
        config::{OwnConfig, Shape, Source},
        names::GgufNames,
    },
    names::Names,
};

pub const QWEN3: Family = Family {
    title: "Qwen3",
    model_type: "qwen3",
    config: ConfigSpec {
        qk_norm: Some(QkNorm::Head),
        qkv_bias: Flag::Key("attention_bias", false),
        output_bias: Flag::Key("attention_bias", false),
        sizes: &[("head_dim", 128)],
        ..qwen2::CONFIG
    },
    names: Names { qk_norms: Some(Names::QK_NORMS), ..llama::NAMES },
    gguf: Some(GgufFamily {
        architecture: "qwen3",
        names: GgufNames::PLAIN,
        config: OwnConfig { windows: false, read: gguf_config },
    }),
    ..llama::LLAMA
};

fn gguf_config(source: &Source, _: &Shape) -> Result<Value, String> {
    Ok(json!({
        "rms_norm_eps": source.rms_eps()?,
        "hidden_act": "silu",
        "attention_bias": source.has("blk.0.attn_q.bias"),
        "rope_parameters": source.rope()?,
    }))
}
