//! A decoder described by data: the parts of a Hugging Face `config.json` that change what is
//! computed, in the form of transformers v4 and of v5. An option that is not supported is an
//! error that names it, never an approximation.

mod encoder_decoder;
mod keys;
mod layers;
mod reader;
mod rope;
#[cfg(test)]
mod tests;

use super::family::Family;
pub use super::family::config_spec::{NormKind, NormPlaces, QkNorm};
use crate::kernels::Activation;
pub use keys::OneOrMany;
pub use rope::{Rope, RopeScaling};

/// The shape of a transformer: a decoder, and perhaps an encoder before it.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Its row in the table of families.
    pub family: &'static Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    /// Heads of keys and values; fewer than `num_heads` is grouped-query attention.
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// The most positions of one sequence.
    pub context_length: usize,
    /// The most positions that there can be: a table of positions ends, or rotary embeddings change. `None` is no bound.
    pub most_positions: Option<usize>,
    pub norm: NormKind,
    pub norm_eps: f64,
    pub attention_norms: NormPlaces,
    pub mlp_norms: NormPlaces,
    /// Whether a norm follows the last layer.
    pub final_norm: bool,
    /// Norms of queries and keys before they are rotated.
    pub qk_norm: Option<QkNorm>,
    /// Attention and MLP read the same input, and both are added to it.
    pub parallel_residual: bool,
    pub activation: Activation,
    /// The rotary embeddings that layers choose from.
    pub ropes: Vec<Rope>,
    /// The first row of the table of learned positions that is used; none without such a table.
    pub learned_positions: Option<usize>,
    /// Scores fall with the distance, by the slopes of ALiBi.
    pub alibi: bool,
    /// Scores get a bias for the distance, by a table that the first layer has for all.
    pub relative_bias: Option<RelativeBias>,
    /// Whether a position sees only those before it, as in every decoder.
    pub causal: bool,
    /// The encoder whose output the decoder's layers attend to.
    pub encoder: Option<EncoderConfig>,
    /// What is particular to each layer, `[num_layers]`.
    pub layers: Vec<LayerConfig>,
    /// What caps the scores of attention.
    pub attention_softcap: Option<f64>,
    /// What caps the logits.
    pub final_softcap: Option<f64>,
    /// What token embeddings are multiplied with; rows that are given instead of tokens are not.
    pub embedding_scale: Option<f64>,
    /// What the last hidden states are multiplied with before they meet the output matrix.
    pub output_scale: Option<f64>,
    /// Whether a norm follows the embeddings.
    pub embedding_norm: bool,
    /// Whether the MLP is gated, in a family that has both kinds.
    pub gated_mlp: bool,
    /// Biases of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub attention_output_bias: bool,
    pub mlp_bias: bool,
    /// The output matrix is the embedding table; with an encoder only if the file has no other.
    pub tie_word_embeddings: bool,
    pub eos_token_ids: Vec<u32>,
}

/// An encoder. What is not said here is as in the decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderConfig {
    pub num_layers: usize,
    /// The token that the decoder starts from.
    pub start_token: u32,
}

/// A bias for the distance of a query and a key, in buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelativeBias {
    pub buckets: usize,
    /// From here on all distances are in one bucket.
    pub max_distance: usize,
}

/// One layer's attention.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerConfig {
    /// Positions that one sees, itself among them; all before it if there is none.
    pub window: Option<usize>,
    /// Which of [`ModelConfig::ropes`] it has, if any.
    pub rope: Option<usize>,
    /// What scores are multiplied with.
    pub scale: f64,
}
