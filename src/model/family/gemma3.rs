//! Gemma 3, the text part: a second theta for layers with a window, and norms of queries and keys.

use serde_json::{Value, json};

use super::{
    config_spec::{ConfigSpec, Positions, QkNorm, RopeSpec, Windows},
    gemma2, llama,
    row::{Family, GgufFamily},
};
use crate::model::{
    gguf::{
        config::{OwnConfig, Shape, Source},
        names::GgufNames,
    },
    names::Names,
};

const LOCAL_THETA: f64 = 10_000.0;

pub const GEMMA3: Family = Family {
    title: "Gemma 3 (text)",
    model_type: "gemma3_text",
    // It reads images too.
    multimodal_type: Some("gemma3"),
    config: ConfigSpec {
        positions: Positions::Rope(RopeSpec {
            theta: ("rope_theta", 1_000_000.0),
            local_theta: Some(("rope_local_base_freq", LOCAL_THETA)),
            ..RopeSpec::PLAIN
        }),
        windows: Windows::Pattern(6),
        qk_norm: Some(QkNorm::Head),
        softcaps: Some([None, None]),
        // The larger models' files have little more than what sets them apart.
        sizes: &[
            ("head_dim", 256),
            ("vocab_size", 262_208),
            ("num_attention_heads", 8),
            ("num_key_value_heads", 4),
            ("max_position_embeddings", 131_072),
        ],
        ..gemma2::CONFIG
    },
    names: Names { qk_norms: Some(Names::QK_NORMS), ..gemma2::NAMES },
    gguf: Some(GgufFamily {
        architecture: "gemma3",
        names: GgufNames { plus_one: true, ..GgufNames::MORE_NORMS },
        config: OwnConfig { windows: true, read: gguf_config },
    }),
    ..llama::LLAMA
};

fn gguf_config(source: &Source, shape: &Shape) -> Result<Value, String> {
    let window = source.window()?;
    Ok(json!({
        "rms_norm_eps": source.rms_eps()?,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": gemma2::score_size(shape, 62),
        "attn_logit_softcapping": null,
        "final_logit_softcapping": source.float("final_logit_softcapping")?,
        "sliding_window": window.unwrap_or(shape.context_length as u64),
        "layer_types": gemma2::layer_types(shape, if window.is_some() { 6 } else { 1 }),
        "rope_parameters": {
            "full_attention": source.rope()?,
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": source.float("rope.freq_base_swa")?.unwrap_or(LOCAL_THETA),
            },
        },
    }))
}
