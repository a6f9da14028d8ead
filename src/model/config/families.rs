//! The families that the decoder computes: what sets one apart from another, as data.

use super::{NormKind, NormPlaces, QkNorm, encoder_decoder::POSITIONS, rope::RopeDefaults};

/// How the order of tokens comes in.
#[derive(Debug, Clone, Copy)]
pub enum Order {
    Rope(RopeDefaults),
    /// A table of positions, whose first rows nobody uses.
    Learned {
        offset: usize,
    },
    Alibi,
    /// A bias for the distance, by a table of each head (T5).
    Relative,
}

/// Whether linear layers have biases.
#[derive(Debug, Clone, Copy)]
pub enum Bias {
    Always,
    Never,
    /// As a key says, or its default.
    Key(&'static str, bool),
}

/// Which layers see a window only, unless `layer_types` says it.
#[derive(Debug, Clone, Copy)]
pub enum Windows {
    None,
    /// All of them, if `sliding_window` is set; its default.
    All(Option<usize>),
    /// With `use_sliding_window` those from `max_window_layers` on.
    Late,
    /// With `use_sliding_window` those without rope.
    WithoutRope,
    /// All but the last of so many, by `sliding_window_pattern` or its default.
    Pattern(usize),
}

/// One family's defaults, and the keys that it reads.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// `model_type`.
    pub name: &'static str,
    pub norm: NormKind,
    /// The key of the norms' epsilon, and its default.
    pub norm_eps: (&'static str, f64),
    pub attention_norms: NormPlaces,
    pub mlp_norms: NormPlaces,
    /// The key of the activation function, and its default.
    pub activation: (&'static str, &'static str),
    pub order: Order,
    pub windows: Windows,
    pub qk_norm: Option<QkNorm>,
    pub qkv_bias: Bias,
    pub output_bias: Bias,
    pub mlp_bias: Bias,
    /// Whether there may be fewer heads of keys and values.
    pub grouped: bool,
    pub tied: bool,
    /// Whether token embeddings are multiplied with the root of the hidden size.
    pub scaled_embeddings: bool,
    /// Whether a norm follows the embeddings.
    pub embedding_norm: bool,
    /// The defaults of `attn_logit_softcapping` and `final_logit_softcapping`, for who reads them.
    pub softcaps: Option<[Option<f64>; 2]>,
    /// Whether `query_pre_attn_scalar` takes the place of the head size in the scale of scores.
    pub query_scalar: bool,
    /// Whether an encoder goes before the decoder.
    pub encoder: bool,
    /// Sizes that a file may leave out.
    pub sizes: &'static [(&'static str, usize)],
    /// Options that are refused when they have this value.
    pub refused: &'static [(&'static str, bool)],
}

const BEFORE: NormPlaces = NormPlaces { before: true, after: false, sum: false };

const LLAMA: Family = Family {
    name: "llama",
    norm: NormKind::Rms,
    norm_eps: ("rms_norm_eps", 1e-6),
    attention_norms: BEFORE,
    mlp_norms: BEFORE,
    activation: ("hidden_act", "silu"),
    order: Order::Rope(RopeDefaults { theta: 10_000.0, partial: None }),
    windows: Windows::None,
    qk_norm: None,
    qkv_bias: Bias::Key("attention_bias", false),
    output_bias: Bias::Key("attention_bias", false),
    mlp_bias: Bias::Key("mlp_bias", false),
    grouped: true,
    tied: false,
    scaled_embeddings: false,
    embedding_norm: false,
    softcaps: None,
    query_scalar: false,
    encoder: false,
    sizes: &[],
    refused: &[],
};

const QWEN2: Family = Family {
    name: "qwen2",
    windows: Windows::Late,
    qkv_bias: Bias::Always,
    output_bias: Bias::Never,
    mlp_bias: Bias::Never,
    ..LLAMA
};

const GEMMA: Family = Family {
    name: "gemma",
    norm: NormKind::RmsPlusOne,
    activation: ("hidden_act", "gelu_pytorch_tanh"),
    mlp_bias: Bias::Never,
    tied: true,
    scaled_embeddings: true,
    sizes: &[("head_dim", 256)],
    refused: &[("use_bidirectional_attention", true)],
    ..LLAMA
};

const GEMMA2: Family = Family {
    name: "gemma2",
    activation: ("hidden_activation", "gelu_pytorch_tanh"),
    attention_norms: NormPlaces { before: true, after: true, sum: false },
    mlp_norms: NormPlaces { before: true, after: true, sum: false },
    windows: Windows::Pattern(2),
    softcaps: Some([Some(50.0), Some(30.0)]),
    query_scalar: true,
    ..GEMMA
};

const GPT2: Family = Family {
    name: "gpt2",
    norm: NormKind::Layer,
    norm_eps: ("layer_norm_epsilon", 1e-5),
    activation: ("activation_function", "gelu_new"),
    order: Order::Learned { offset: 0 },
    qkv_bias: Bias::Always,
    output_bias: Bias::Always,
    mlp_bias: Bias::Always,
    grouped: false,
    tied: true,
    sizes: &[("max_position_embeddings", 1024)],
    refused: &[("add_cross_attention", true)],
    ..LLAMA
};

/// 1.0 and, with a gated MLP, 1.1 and Flan-T5.
const T5: Family = Family {
    name: "t5",
    norm_eps: ("layer_norm_epsilon", 1e-6),
    activation: ("feed_forward_proj", "relu"),
    order: Order::Relative,
    qkv_bias: Bias::Never,
    output_bias: Bias::Never,
    mlp_bias: Bias::Never,
    grouped: false,
    tied: true,
    encoder: true,
    sizes: &[("n_positions", POSITIONS)],
    ..LLAMA
};

/// All of them.
pub const FAMILIES: [Family; 16] = [
    LLAMA,
    Family {
        name: "mistral",
        windows: Windows::All(Some(4096)),
        qkv_bias: Bias::Never,
        output_bias: Bias::Never,
        mlp_bias: Bias::Never,
        ..LLAMA
    },
    QWEN2,
    Family {
        name: "qwen3",
        qk_norm: Some(QkNorm::Head),
        qkv_bias: Bias::Key("attention_bias", false),
        output_bias: Bias::Key("attention_bias", false),
        sizes: &[("head_dim", 128)],
        ..QWEN2
    },
    GEMMA,
    GEMMA2,
    Family {
        name: "gemma3_text",
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
        ..GEMMA2
    },
    Family {
        name: "phi3",
        norm_eps: ("rms_norm_eps", 1e-5),
        order: Order::Rope(RopeDefaults { theta: 10_000.0, partial: Some(1.0) }),
        windows: Windows::All(None),
        qkv_bias: Bias::Never,
        output_bias: Bias::Never,
        mlp_bias: Bias::Never,
        ..LLAMA
    },
    Family {
        name: "smollm3",
        order: Order::Rope(RopeDefaults { theta: 2_000_000.0, partial: None }),
        windows: Windows::WithoutRope,
        tied: true,
        ..LLAMA
    },
    Family {
        name: "olmo2",
        norm_eps: ("rms_norm_eps", 1e-5),
        attention_norms: NormPlaces { before: false, after: true, sum: false },
        mlp_norms: NormPlaces { before: false, after: true, sum: false },
        qk_norm: Some(QkNorm::Projection),
        mlp_bias: Bias::Never,
        ..LLAMA
    },
    GPT2,
    Family {
        name: "gpt_neox",
        norm_eps: ("layer_norm_eps", 1e-5),
        activation: ("hidden_act", "gelu"),
        order: Order::Rope(RopeDefaults { theta: 10_000.0, partial: Some(0.25) }),
        qkv_bias: Bias::Key("attention_bias", true),
        output_bias: Bias::Key("attention_bias", true),
        tied: false,
        sizes: &[],
        refused: &[],
        ..GPT2
    },
    Family {
        name: "opt",
        // torch's own, which no key changes.
        norm_eps: ("", 1e-5),
        activation: ("activation_function", "relu"),
        order: Order::Learned { offset: 2 },
        qkv_bias: Bias::Key("enable_bias", true),
        output_bias: Bias::Key("enable_bias", true),
        mlp_bias: Bias::Key("enable_bias", true),
        sizes: &[],
        refused: &[("layer_norm_elementwise_affine", false)],
        ..GPT2
    },
    Family {
        name: "bloom",
        activation: ("", "gelu_new"),
        order: Order::Alibi,
        embedding_norm: true,
        // It has no bound; what the published ones were trained with.
        sizes: &[("max_position_embeddings", 2048)],
        refused: &[("apply_residual_connection_post_layernorm", true)],
        ..GPT2
    },
    T5,
    Family { name: "mt5", activation: ("feed_forward_proj", "gated-gelu"), ..T5 },
];
