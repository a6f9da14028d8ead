//! A decoder described by data: the parts of a Hugging Face `config.json` that change what is
//! computed, in the form of transformers v4 and of v5. An option that is not supported is an
//! error that names it, never an approximation.

mod encoder_decoder;
mod families;
mod keys;
mod layers;
mod reader;
mod rope;
#[cfg(test)]
mod tests;

use serde_json::Value;

use crate::kernels::Activation;
pub use encoder_decoder::{EncoderConfig, RelativeBias};
use families::FAMILIES;
use keys::Keys;
pub use keys::OneOrMany;
use reader::Reader;
pub use rope::{Rope, RopeScaling};

/// The shape of a transformer: a decoder, and perhaps an encoder before it.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `model_type`, such as `llama`.
    pub family: String,
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

/// What one norm of queries or keys spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// A head.
    Head,
    /// All heads together.
    Projection,
}

impl ModelConfig {
    /// Reads and checks `config.json`. The error says which key is wrong and what is supported.
    pub fn from_json(bytes: &[u8]) -> Result<Self, String> {
        let root: Value = serde_json::from_slice(bytes).map_err(|e| format!("it is not understood: {e}"))?;
        let Value::Object(root) = &root else { return Err("it is not understood: it is not an object".into()) };
        let root = Keys::new(root, "");
        if root.get::<Value>("quantization_config")?.is_some() {
            return Err(
                "quantization_config is set: quantised safetensors are not supported; use the full weights".into()
            );
        }
        let mut model_type: String = root.get("model_type")?.ok_or_else(|| root.missing("model_type"))?;
        let mut keys = root;
        if model_type == "gemma3" {
            // The text part of a model that reads images too.
            keys = root.object("text_config", "text_config ")?.ok_or_else(|| root.missing("text_config"))?;
            model_type = "gemma3_text".to_owned();
        }
        let family = FAMILIES.iter().find(|f| f.name == model_type).ok_or_else(|| {
            let known: Vec<_> = FAMILIES.iter().map(|f| f.name).collect();
            format!("model_type {model_type:?} is not supported; supported are {}", known.join(", "))
        })?;
        for (key, value) in family.refused {
            if keys.get(key)? == Some(*value) {
                return Err(format!("{key} {value} is not supported"));
            }
        }
        let mut config = Reader { keys, family }.read()?;
        if config.eos_token_ids.is_empty() {
            config.eos_token_ids = root.get::<OneOrMany>("eos_token_id")?.unwrap_or_default().into_vec();
        }
        Ok(config)
    }
}
