//! T5 (1.0 and, with a gated MLP, 1.1 and Flan-T5) and mT5: an encoder and a decoder with a relative position bias.
//! Their GGUF files are not read.

use super::{
    config_spec::{ConfigSpec, EncoderSpec, Flag, IntermediateSize, Positions, ScoreScale},
    llama,
    row::Family,
};
use crate::model::names::{CrossNames, Mlp, Names, NormNames, Qkv};

const CONTEXT_LENGTH: usize = 2048;

pub const T5: Family = Family {
    title: "T5, Flan-T5",
    model_type: "t5",
    multimodal_type: None,
    config: CONFIG,
    names: DECODER,
    encoder_names: Some(ENCODER),
    gguf: None,
};

pub const MT5: Family = Family {
    title: "mT5",
    model_type: "mt5",
    config: ConfigSpec {
        activation: "gated-gelu",
        encoder: Some(EncoderSpec { scales_output: false, context_length: CONTEXT_LENGTH }),
        ..CONFIG
    },
    ..T5
};

const CONFIG: ConfigSpec = ConfigSpec {
    norm_eps_key: Some("layer_norm_epsilon"),
    activation_key: Some("feed_forward_proj"),
    activation: "relu",
    positions: Positions::RelativeBias,
    context_length: &["n_positions"],
    score_scale: ScoreScale::One,
    qkv_bias: Flag::Never,
    output_bias: Flag::Never,
    mlp_bias: Flag::Never,
    grouped: false,
    intermediate_size: IntermediateSize { keys: &["d_ff"], multiple: None },
    tied: true,
    encoder: Some(EncoderSpec { scales_output: true, context_length: CONTEXT_LENGTH }),
    sizes: &[("n_positions", CONTEXT_LENGTH)],
    ..llama::CONFIG
};

/// The decoder, and the embeddings that it shares with the encoder.
const DECODER: Names = Names {
    prefixes: &[""],
    embeddings: "shared",
    relative_bias: Some("layer.0.SelfAttention.relative_attention_bias"),
    cross: Some(CrossNames {
        norms: NormNames { before: Some("layer.1.layer_norm"), after: None, sum: None },
        qkv: ["layer.1.EncDecAttention.q", "layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"],
        output: "layer.1.EncDecAttention.o",
    }),
    layers: "decoder.block",
    attention_norms: NormNames { before: Some("layer.0.layer_norm"), after: None, sum: None },
    qkv: Qkv::Apart(["layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"]),
    output: "layer.0.SelfAttention.o",
    mlp_norms: NormNames { before: Some("layer.2.layer_norm"), after: None, sum: None },
    mlp: Mlp::Either {
        gated: ["layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1"],
        plain: "layer.2.DenseReluDense.wi",
    },
    down: "layer.2.DenseReluDense.wo",
    final_norm: "decoder.final_layer_norm",
    ..llama::NAMES
};

const ENCODER: Names = Names {
    cross: None,
    layers: "encoder.block",
    mlp_norms: NormNames { before: Some("layer.1.layer_norm"), after: None, sum: None },
    mlp: Mlp::Either {
        gated: ["layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"],
        plain: "layer.1.DenseReluDense.wi",
    },
    down: "layer.1.DenseReluDense.wo",
    final_norm: "encoder.final_layer_norm",
    ..DECODER
};
