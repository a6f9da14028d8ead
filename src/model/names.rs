//! What a family calls its tensors, and how it packs them: the part of a file's layout that
//! `config.json` does not say. The names themselves are in the table of families.

/// The names of one family. Names within a layer come after [`layers`](Self::layers) and its number.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    /// What comes before every name but that of the output matrix; the first that a file uses.
    pub prefixes: &'static [&'static str],
    pub embeddings: &'static str,
    /// The first layer's table of a relative position bias.
    pub relative_bias: Option<&'static str>,
    /// Attention to the encoder's output.
    pub cross: Option<CrossNames>,
    /// The table of learned positions.
    pub positions: Option<&'static str>,
    pub embedding_norm: Option<&'static str>,
    pub layers: &'static str,
    pub attention_norms: NormNames,
    pub qkv: Qkv,
    /// Norms of queries and of keys.
    pub qk_norms: Option<[&'static str; 2]>,
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
    pub before: Option<&'static str>,
    pub after: Option<&'static str>,
    pub sum: Option<&'static str>,
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

impl Names {
    /// What all families that have norms of queries and of keys call them.
    pub const QK_NORMS: [&'static str; 2] = ["self_attn.q_norm", "self_attn.k_norm"];
}
