//! OLMo 2: norms on what comes out of a branch, and of queries and keys as a whole.

use serde_json::{Value, json};

use super::{
    config_spec::{ConfigSpec, Flag, NormPlaces, QkNorm},
    gemma2, llama,
    row::{Family, GgufFamily},
};
use crate::model::{
    gguf::{
        config::{OwnConfig, Shape, Source},
        names::GgufNames,
    },
    names::{Names, NormNames},
};

pub const OLMO2: Family = Family {
    title: "OLMo 2",
    model_type: "olmo2",
    config: ConfigSpec {
        norm_eps: 1e-5,
        attention_norms: NormPlaces::AFTER,
        mlp_norms: NormPlaces::AFTER,
        qk_norm: Some(QkNorm::Projection),
        mlp_bias: Flag::Never,
        ..llama::CONFIG
    },
    names: Names {
        attention_norms: NormNames { before: None, ..gemma2::NAMES.attention_norms },
        mlp_norms: NormNames { before: None, ..gemma2::NAMES.mlp_norms },
        qk_norms: Some(Names::QK_NORMS),
        ..llama::NAMES
    },
    gguf: Some(GgufFamily {
        architecture: "olmo2",
        names: GgufNames::MORE_NORMS,
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
