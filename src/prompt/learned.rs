//! The learned prompt itself: what gradient descent found, ready to be put in front of a text.

use candle_core::Tensor;

/// One position of input: a token of the vocabulary, or a virtual token of the learned prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum InputToken {
    /// A token of the model's vocabulary.
    Vocab(u32),
    /// Virtual token i of the request's learned prompt: a row of embeddings, or keys and values.
    Virtual(u32),
}

impl InputToken {
    /// The vocabulary's id, if it is a token of text.
    pub fn vocab(&self) -> Option<u32> {
        match self {
            Self::Vocab(id) => Some(*id),
            Self::Virtual(_) => None,
        }
    }
}

/// The tensors of one version, on the host and in the model's dtype: whoever runs the model puts them on its device.
#[derive(Debug, Clone)]
pub enum LearnedPrompt {
    /// Prompt tuning, P-tuning, CPT, multitask: rows that go where token embeddings go.
    Embeddings(Embeddings),
    /// Prefix tuning, cartridge: what attention finds at the prompt's positions.
    KeyValues(KeyValues),
}

/// Virtual-token embeddings `[num_virtual_tokens, hidden_size]`.
#[derive(Debug, Clone)]
pub struct Embeddings {
    /// Row i is the embedding at position i.
    pub rows: Tensor,
}

/// Keys and values of the first positions, as the cache holds them: keys are used as they are,
/// without norm or rotation. At least one layer.
#[derive(Debug, Clone)]
pub struct KeyValues {
    /// Each layer of the model, in order.
    pub layers: Vec<LayerKeyValues>,
}

/// What one layer's attention finds, both `[num_kv_heads, num_virtual_tokens, head_dim]`.
#[derive(Debug, Clone)]
pub struct LayerKeyValues {
    pub keys: Tensor,
    pub values: Tensor,
}

impl LearnedPrompt {
    /// How many positions the prompt takes in front of the text.
    pub fn num_virtual_tokens(&self) -> usize {
        match self {
            Self::Embeddings(e) => e.rows.dims()[0],
            Self::KeyValues(kv) => kv.layers.first().map_or(0, |layer| layer.keys.dims()[1]),
        }
    }

    /// Bytes of tensor data held.
    pub fn num_bytes(&self) -> usize {
        let bytes = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
        match self {
            Self::Embeddings(e) => bytes(&e.rows),
            Self::KeyValues(kv) => kv.layers.iter().map(|layer| bytes(&layer.keys) + bytes(&layer.values)).sum(),
        }
    }

    /// How the prompt is applied, in a word shown to users.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Embeddings(_) => "embeddings",
            Self::KeyValues(_) => "key-values",
        }
    }
}
