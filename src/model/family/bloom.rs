//! BLOOM: ALiBi, and a norm after the embeddings.

use serde_json::{Value, json};

use super::{
    config_spec::{ConfigSpec, IntermediateSize, Positions},
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

pub const BLOOM: Family = Family {
    title: "BLOOM",
    model_type: "bloom",
    config: ConfigSpec {
        activation_key: None,
        positions: Positions::Alibi,
        // Not `seq_length`, which is left over from training; transformers does not read it.
        context_length: &["max_position_embeddings"],
        intermediate_size: IntermediateSize { keys: &[], multiple: Some(4) },
        embedding_norm: true,
        // It has no bound; what the published ones were trained with.
        sizes: &[("max_position_embeddings", 2048)],
        refused: &[("apply_residual_connection_post_layernorm", true)],
        ..gpt2::CONFIG
    },
    names: Names {
        prefixes: &["transformer.", ""],
        embeddings: "word_embeddings",
        embedding_norm: Some("word_embeddings_layernorm"),
        layers: "h",
        qkv: Qkv::ByHead("self_attention.query_key_value"),
        output: "self_attention.dense",
        mlp: Mlp::Plain("mlp.dense_h_to_4h"),
        down: "mlp.dense_4h_to_h",
        final_norm: "ln_f",
        ..llama::NAMES
    },
    gguf: Some(GgufFamily {
        architecture: "bloom",
        names: GgufNames {
            top: GGUF_TOP,
            prefix: "transformer.h.",
            layer: GGUF_LAYER,
            fused: true,
            ..GgufNames::PLAIN
        },
        config: OwnConfig { windows: false, read: gguf_config },
    }),
    ..llama::LLAMA
};

const GGUF_TOP: &[(&str, &str)] = &[
    ("token_embd", "transformer.word_embeddings"),
    ("token_embd_norm", "transformer.word_embeddings_layernorm"),
    ("output_norm", "transformer.ln_f"),
    ("output", "lm_head"),
];

const GGUF_LAYER: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_qkv", "self_attention.query_key_value"),
    ("attn_output", "self_attention.dense"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_up", "mlp.dense_h_to_4h"),
    ("ffn_down", "mlp.dense_4h_to_h"),
];

fn gguf_config(source: &Source, shape: &Shape) -> Result<Value, String> {
    Ok(json!({
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "max_position_embeddings": shape.context_length,
        "layer_norm_epsilon": source.layer_norm_eps()?,
        "apply_residual_connection_post_layernorm": false,
    }))
}
