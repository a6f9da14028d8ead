//! OPT: learned positions whose first two rows nobody uses, and norms before or after a branch. GGUF files of
//! it do not exist.

use super::{
    config_spec::{ConfigSpec, Flag, IntermediateSize, NormOrder, Positions},
    gpt2, llama,
    row::Family,
};
use crate::model::names::{Mlp, Names, NormNames};

pub const OPT: Family = Family {
    title: "OPT",
    model_type: "opt",
    config: ConfigSpec {
        // torch's own, which no key changes.
        norm_eps_key: None,
        norm_order: NormOrder::Keys { before: "do_layer_norm_before", no_final: "_remove_final_layer_norm" },
        activation: "relu",
        positions: Positions::Learned { offset: 2 },
        qkv_bias: Flag::Key("enable_bias", true),
        output_bias: Flag::Key("enable_bias", true),
        mlp_bias: Flag::Key("enable_bias", true),
        intermediate_size: IntermediateSize { keys: &["ffn_dim"], multiple: None },
        embedding_width: Some("word_embed_proj_dim"),
        refused: &[("layer_norm_elementwise_affine", false)],
        ..gpt2::CONFIG
    },
    names: Names {
        prefixes: &["model.decoder.", "decoder.", ""],
        positions: Some("embed_positions"),
        attention_norms: NormNames {
            before: Some("self_attn_layer_norm"),
            after: None,
            sum: Some("self_attn_layer_norm"),
        },
        output: "self_attn.out_proj",
        mlp_norms: NormNames { before: Some("final_layer_norm"), after: None, sum: Some("final_layer_norm") },
        mlp: Mlp::Plain("fc1"),
        down: "fc2",
        final_norm: "final_layer_norm",
        ..llama::NAMES
    },
    gguf: None,
    ..llama::LLAMA
};
