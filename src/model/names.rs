//! What each family calls its tensors, and how it packs them: the part of a file's layout that
//! `config.json` does not say.

/// The names of one family. Names within a layer come after [`layers`](Self::layers) and its number.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    /// What comes before every name but that of the output matrix; the first that a file uses.
    pub prefixes: &'static [&'static str],
    pub embeddings: &'static str,
    /// The first layer's table of a relative position bias.
    pub relative_bias: &'static str,
    /// Attention to the encoder's output.
    pub cross: Option<CrossNames>,
    /// The table of learned positions.
    pub positions: &'static str,
    pub embedding_norm: &'static str,
    pub layers: &'static str,
    pub attention_norms: NormNames,
    pub qkv: Qkv,
    /// Norms of queries and of keys.
    pub qk_norms: [&'static str; 2],
    /// The attention's output projection.
    pub output: &'static str,
    pub mlp_norms: NormNames,
    pub mlp: Mlp,
    pub down: &'static str,
    pub final_norm: &'static str,
    /// The output matrix, by the first of these names that is there.
    pub heads: &'static [&'static str],
    /// Whether linear layers within a layer are stored `[in, out]`.
    pub transposed: bool,
}

/// The norms of a branch; see [`NormPlaces`](super::config::NormPlaces).
#[derive(Debug, Clone, Copy)]
pub struct NormNames {
    pub before: &'static str,
    pub after: &'static str,
    pub sum: &'static str,
}

/// How queries, keys and values are stored.
#[derive(Debug, Clone, Copy)]
pub enum Qkv {
    Apart([&'static str; 3]),
    /// All rows of the queries, then the keys, then the values.
    Stacked(&'static str),
    /// The rows of one head's query, key and value, then the next head's.
    ByHead(&'static str),
}

/// Attention to an encoder's output.
#[derive(Debug, Clone, Copy)]
pub struct CrossNames {
    pub norms: NormNames,
    /// Queries, keys and values.
    pub qkv: [&'static str; 3],
    pub output: &'static str,
}

/// How the inner layers of an MLP are stored.
#[derive(Debug, Clone, Copy)]
pub enum Mlp {
    Gated([&'static str; 2]),
    /// All rows of the gate, then those of what it lets through.
    GatedStacked(&'static str),
    Plain(&'static str),
    /// The one or the other; see [`ModelConfig::gated_mlp`](super::config::ModelConfig::gated_mlp).
    Either {
        gated: [&'static str; 2],
        plain: &'static str,
    },
}

const LLAMA: Names = Names {
    prefixes: &["model.", ""],
    embeddings: "embed_tokens",
    relative_bias: "",
    cross: None,
    positions: "",
    embedding_norm: "",
    layers: "layers",
    attention_norms: NormNames { before: "input_layernorm", after: "", sum: "" },
    qkv: Qkv::Apart(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    qk_norms: ["self_attn.q_norm", "self_attn.k_norm"],
    output: "self_attn.o_proj",
    mlp_norms: NormNames { before: "post_attention_layernorm", after: "", sum: "" },
    mlp: Mlp::Gated(["mlp.gate_proj", "mlp.up_proj"]),
    down: "mlp.down_proj",
    final_norm: "norm",
    heads: &["lm_head"],
    transposed: false,
};

/// Gemma from the second on, and OLMo 2 as far as it has the same.
const GEMMA2: Names = Names {
    // As text models save it, and as parts of models that read images.
    prefixes: &["model.", "", "language_model.model.", "model.language_model."],
    attention_norms: NormNames { before: "input_layernorm", after: "post_attention_layernorm", sum: "" },
    mlp_norms: NormNames { before: "pre_feedforward_layernorm", after: "post_feedforward_layernorm", sum: "" },
    heads: &["lm_head", "language_model.lm_head"],
    ..LLAMA
};

const PHI3: Names =
    Names { qkv: Qkv::Stacked("self_attn.qkv_proj"), mlp: Mlp::GatedStacked("mlp.gate_up_proj"), ..LLAMA };

const GPT2: Names = Names {
    prefixes: &["transformer.", ""],
    embeddings: "wte",
    positions: "wpe",
    layers: "h",
    attention_norms: NormNames { before: "ln_1", after: "", sum: "" },
    qkv: Qkv::Stacked("attn.c_attn"),
    output: "attn.c_proj",
    mlp_norms: NormNames { before: "ln_2", after: "", sum: "" },
    mlp: Mlp::Plain("mlp.c_fc"),
    down: "mlp.c_proj",
    final_norm: "ln_f",
    transposed: true,
    ..LLAMA
};

const GPT_NEOX: Names = Names {
    prefixes: &["gpt_neox.", ""],
    embeddings: "embed_in",
    qkv: Qkv::ByHead("attention.query_key_value"),
    output: "attention.dense",
    mlp: Mlp::Plain("mlp.dense_h_to_4h"),
    down: "mlp.dense_4h_to_h",
    final_norm: "final_layer_norm",
    // Since transformers v5, and before.
    heads: &["lm_head", "embed_out"],
    ..LLAMA
};

const OPT: Names = Names {
    prefixes: &["model.decoder.", "decoder.", ""],
    positions: "embed_positions",
    attention_norms: NormNames { before: "self_attn_layer_norm", after: "", sum: "self_attn_layer_norm" },
    output: "self_attn.out_proj",
    mlp_norms: NormNames { before: "final_layer_norm", after: "", sum: "final_layer_norm" },
    mlp: Mlp::Plain("fc1"),
    down: "fc2",
    final_norm: "final_layer_norm",
    ..LLAMA
};

const BLOOM: Names = Names {
    prefixes: &["transformer.", ""],
    embeddings: "word_embeddings",
    embedding_norm: "word_embeddings_layernorm",
    layers: "h",
    qkv: Qkv::ByHead("self_attention.query_key_value"),
    output: "self_attention.dense",
    final_norm: "ln_f",
    heads: &["lm_head"],
    ..GPT_NEOX
};

/// The decoder of T5 and mT5, and the embeddings that it shares with the encoder.
const T5: Names = Names {
    prefixes: &[""],
    embeddings: "shared",
    relative_bias: "layer.0.SelfAttention.relative_attention_bias",
    cross: Some(CrossNames {
        norms: NormNames { before: "layer.1.layer_norm", after: "", sum: "" },
        qkv: ["layer.1.EncDecAttention.q", "layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"],
        output: "layer.1.EncDecAttention.o",
    }),
    layers: "decoder.block",
    attention_norms: NormNames { before: "layer.0.layer_norm", after: "", sum: "" },
    qkv: Qkv::Apart(["layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"]),
    output: "layer.0.SelfAttention.o",
    mlp_norms: NormNames { before: "layer.2.layer_norm", after: "", sum: "" },
    mlp: Mlp::Either {
        gated: ["layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1"],
        plain: "layer.2.DenseReluDense.wi",
    },
    down: "layer.2.DenseReluDense.wo",
    final_norm: "decoder.final_layer_norm",
    ..LLAMA
};

/// The encoder of T5 and mT5.
const T5_ENCODER: Names = Names {
    cross: None,
    layers: "encoder.block",
    mlp_norms: NormNames { before: "layer.1.layer_norm", after: "", sum: "" },
    mlp: Mlp::Either {
        gated: ["layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"],
        plain: "layer.1.DenseReluDense.wi",
    },
    down: "layer.1.DenseReluDense.wo",
    final_norm: "encoder.final_layer_norm",
    ..T5
};

impl Names {
    /// The names of an encoder-decoder model's encoder.
    pub fn of_encoder(family: &str) -> Self {
        match family {
            "t5" | "mt5" => T5_ENCODER,
            other => Self::of(other),
        }
    }

    /// The names of a family; most call their tensors as Llama does.
    pub fn of(family: &str) -> Self {
        match family {
            "gemma2" | "gemma3_text" | "olmo2" => GEMMA2,
            "phi3" => PHI3,
            "gpt2" => GPT2,
            "gpt_neox" => GPT_NEOX,
            "opt" => OPT,
            "bloom" => BLOOM,
            "t5" | "mt5" => T5,
            _ => LLAMA,
        }
    }
}
