//! How a family's `config.json` is read: the keys that it has, what they mean if they are missing, and what
//! sets its computation apart from that of other families.

/// What a norm computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square, by a weight.
    Rms,
    /// Root mean square, by one plus a weight (Gemma).
    RmsPlusOne,
    /// Mean and variance, by a weight and a bias.
    Layer,
}

/// Where the norms of a branch are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NormPlaces {
    /// On what goes into the branch.
    pub before: bool,
    /// On what comes out of it, before it is added.
    pub after: bool,
    /// On the sum.
    pub sum: bool,
}

impl NormPlaces {
    pub const BEFORE: Self = Self { before: true, after: false, sum: false };
    pub const AFTER: Self = Self { before: false, after: true, sum: false };
    pub const BEFORE_AND_AFTER: Self = Self { before: true, after: true, sum: false };
    pub const SUM: Self = Self { before: false, after: false, sum: true };
}

/// Whether a key moves the norms.
#[derive(Debug, Clone, Copy)]
pub enum NormOrder {
    Fixed,
    /// If the key `before` is false, all norms of the layers are on the sums and none follows the last layer. If
    /// the key `no_final` is true, none follows it either (OPT).
    Keys {
        before: &'static str,
        no_final: &'static str,
    },
}

/// What one norm of queries or keys spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// A head.
    Head,
    /// All heads together.
    Projection,
}

/// How the order of tokens comes in.
#[derive(Debug, Clone, Copy)]
pub enum Positions {
    Rope(RopeSpec),
    /// A table of positions, whose first rows nobody uses.
    Learned {
        offset: usize,
    },
    Alibi,
    /// A bias for the distance, by a table of each head (T5).
    RelativeBias,
}

/// What one family's rotary embeddings look like unless `config.json` says otherwise.
#[derive(Debug, Clone, Copy)]
pub struct RopeSpec {
    /// The key of theta outside `rope_parameters`, and its default.
    pub theta: (&'static str, f64),
    /// Theta of layers with a sliding window, its key and default, where they have one of their own (Gemma 3).
    pub local_theta: Option<(&'static str, f64)>,
    /// The key of the part of a head that is rotated.
    pub partial_key: &'static str,
    /// The part of a head that is rotated; none where the family has no such option.
    pub partial: Option<f64>,
    /// Other `rope_type`s that the family's files have for longrope.
    pub longrope_types: &'static [&'static str],
    /// The default of `original_max_position_embeddings`; none where it is the context length.
    pub original_context_length: Option<f64>,
}

impl RopeSpec {
    pub const PLAIN: Self = Self {
        theta: ("rope_theta", 10_000.0),
        local_theta: None,
        partial_key: "partial_rotary_factor",
        partial: None,
        longrope_types: &[],
        original_context_length: None,
    };
}

/// A property that a family may have.
#[derive(Debug, Clone, Copy)]
pub enum Flag {
    Always,
    Never,
    /// As a key says, or its default.
    Key(&'static str, bool),
}

/// Which layers have a sliding window, unless `layer_types` says it.
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

/// What the scores of attention are multiplied with.
#[derive(Debug, Clone, Copy)]
pub enum ScoreScale {
    /// One over the root of the head size.
    HeadDim,
    /// One over the root of `query_pre_attn_scalar` (Gemma 2 and 3).
    QueryScalar,
    /// One: the weights are drawn so that no scale is needed (T5).
    One,
    /// As `HeadDim` unless the key `scaled` is false; with the key `by_depth` also over the layer's number, from
    /// 1 (GPT-2).
    Keys { scaled: &'static str, by_depth: &'static str },
}

/// The width of the MLP.
#[derive(Debug, Clone, Copy)]
pub struct IntermediateSize {
    /// The keys that may say it.
    pub keys: &'static [&'static str],
    /// How often the hidden size it is if none does; none where a key is needed.
    pub multiple: Option<usize>,
}

/// What an encoder-decoder family has beside.
#[derive(Debug, Clone, Copy)]
pub struct EncoderSpec {
    /// Whether the decoder's output may be scaled, as `scale_decoder_outputs` or `tie_word_embeddings` says.
    pub scales_output: bool,
    /// The positions of an input, and of an answer, that are allowed at least: relative positions have no end, so
    /// the number in the file is what a model was trained on and only bounds the work of a request.
    pub context_length: usize,
}

/// One family's defaults, and the keys that it reads.
#[derive(Debug, Clone, Copy)]
pub struct ConfigSpec {
    pub norm: NormKind,
    /// The key of the norms' epsilon; none where no key changes it.
    pub norm_eps_key: Option<&'static str>,
    pub norm_eps: f64,
    pub attention_norms: NormPlaces,
    pub mlp_norms: NormPlaces,
    pub norm_order: NormOrder,
    /// Whether attention and MLP read the same input.
    pub parallel_residual: Flag,
    /// The key of the activation function; none where no key changes it.
    pub activation_key: Option<&'static str>,
    pub activation: &'static str,
    /// Whether the family's files say `gelu` and mean the approximation by tanh.
    pub gelu_is_tanh: bool,
    pub positions: Positions,
    /// The keys that may say the most positions of a sequence.
    pub context_length: &'static [&'static str],
    pub windows: Windows,
    /// Whether some layers do not rotate, by `no_rope_layers` or `no_rope_layer_interval`.
    pub no_rope_layers: bool,
    pub score_scale: ScoreScale,
    pub qk_norm: Option<QkNorm>,
    pub qkv_bias: Flag,
    pub output_bias: Flag,
    pub mlp_bias: Flag,
    /// Whether there may be fewer heads of keys and values.
    pub grouped: bool,
    pub intermediate_size: IntermediateSize,
    /// The default of `tie_word_embeddings`.
    pub tied: bool,
    /// Whether token embeddings are multiplied with the root of the hidden size.
    pub scaled_embeddings: bool,
    /// Whether a norm follows the embeddings.
    pub embedding_norm: bool,
    /// A key of the embeddings' width, which must be the hidden size (OPT).
    pub embedding_width: Option<&'static str>,
    /// The defaults of `attn_logit_softcapping` and `final_logit_softcapping`, for who reads them.
    pub softcaps: Option<[Option<f64>; 2]>,
    /// What an encoder before the decoder needs, if there is one.
    pub encoder: Option<EncoderSpec>,
    /// Sizes that a file may leave out.
    pub sizes: &'static [(&'static str, usize)],
    /// Options that are refused when they have this value.
    pub refused: &'static [(&'static str, bool)],
}

impl NormOrder {
    /// The places that the norms of attention and MLP can have, given where they are by default.
    #[cfg(test)]
    pub fn possible(self, attention: NormPlaces, mlp: NormPlaces) -> Vec<(NormPlaces, NormPlaces)> {
        match self {
            Self::Fixed => vec![(attention, mlp)],
            Self::Keys { .. } => vec![(attention, mlp), (NormPlaces::SUM, NormPlaces::SUM)],
        }
    }
}
