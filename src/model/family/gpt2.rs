//! GPT-2: learned positions, biases everywhere, matrices stored `[in, out]`.

use serde_json::{Value, json};

use super::{
    config_spec::{ConfigSpec, Flag, IntermediateSize, NormKind, Positions, ScoreScale},
    llama,
    row::{Family, GgufFamily},
};
use crate::model::{
    gguf::{
        config::{OwnConfig, Shape, Source},
        names::GgufNames,
    },
    names::{Mlp, Names, NormNames, Qkv},
};

pub const GPT2: Family = Family {
    title: "GPT-2",
    model_type: "gpt2",
    config: ConfigSpec {
        positions: Positions::Learned { offset: 0 },
        context_length: &["n_positions", "max_position_embeddings"],
        score_scale: ScoreScale::Keys { scaled: "scale_attn_weights", by_depth: "scale_attn_by_inverse_layer_idx" },
        intermediate_size: IntermediateSize { keys: &["n_inner"], multiple: Some(4) },
        sizes: &[("max_position_embeddings", 1024)],
        refused: &[("add_cross_attention", true)],
        ..CONFIG
    },
    names: Names {
        prefixes: &["transformer.", ""],
        embeddings: "wte",
        positions: Some("wpe"),
        layers: "h",
        attention_norms: NormNames { before: Some("ln_1"), after: None, sum: None },
        qkv: Qkv::Stacked("attn.c_attn"),
        output: "attn.c_proj",
        mlp_norms: NormNames { before: Some("ln_2"), after: None, sum: None },
        mlp: Mlp::Plain("mlp.c_fc"),
        down: "mlp.c_proj",
        final_norm: "ln_f",
        transposed: true,
        ..llama::NAMES
    },
    gguf: Some(GgufFamily {
        architecture: "gpt2",
        names: GgufNames {
            top: GGUF_TOP,
            prefix: "transformer.h.",
            layer: GGUF_LAYER,
            transposed: true,
            ..GgufNames::PLAIN
        },
        config: OwnConfig { windows: false, read: gguf_config },
    }),
    ..llama::LLAMA
};

/// What the families of its time share: layer norms and biases, an MLP without a gate, a head of keys and
/// values for each of queries.
pub const CONFIG: ConfigSpec = ConfigSpec {
    norm: NormKind::Layer,
    norm_eps_key: Some("layer_norm_epsilon"),
    norm_eps: 1e-5,
    activation_key: Some("activation_function"),
    activation: "gelu_new",
    qkv_bias: Flag::Always,
    output_bias: Flag::Always,
    mlp_bias: Flag::Always,
    grouped: false,
    tied: true,
    ..llama::CONFIG
};

const GGUF_TOP: &[(&str, &str)] = &[
    ("token_embd", "transformer.wte"),
    ("position_embd", "transformer.wpe"),
    ("output_norm", "transformer.ln_f"),
    ("output", "lm_head"),
];

const GGUF_LAYER: &[(&str, &str)] = &[
    ("attn_norm", "ln_1"),
    ("attn_qkv", "attn.c_attn"),
    ("attn_output", "attn.c_proj"),
    ("ffn_norm", "ln_2"),
    ("ffn_up", "mlp.c_fc"),
    ("ffn_down", "mlp.c_proj"),
];

fn gguf_config(source: &Source, shape: &Shape) -> Result<Value, String> {
    Ok(json!({
        "n_positions": shape.context_length,
        "n_ctx": shape.context_length,
        "n_embd": shape.hidden,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_inner": shape.intermediate,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": source.layer_norm_eps()?,
    }))
}
