//! Mistral. Its GGUF files call themselves `llama`.

use super::{
    config_spec::{ConfigSpec, Flag, Windows},
    llama,
    row::Family,
};

pub const MISTRAL: Family = Family {
    title: "Mistral",
    model_type: "mistral",
    config: ConfigSpec {
        windows: Windows::All(Some(4096)),
        qkv_bias: Flag::Never,
        output_bias: Flag::Never,
        mlp_bias: Flag::Never,
        ..llama::CONFIG
    },
    gguf: None,
    ..llama::LLAMA
};
