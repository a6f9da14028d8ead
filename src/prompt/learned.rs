//! The learned prompt itself: what gradient descent found, ready to be put in front of a text.

use candle_core::Tensor;

/// The tensors of one version, on the serving device and in the model's dtype.
#[derive(Debug, Clone)]
pub enum LearnedPrompt {
    /// Prompt tuning, P-tuning: rows that go where token embeddings go.
    Embeddings(Embeddings),
}

/// Virtual-token embeddings `[num_virtual_tokens, hidden_size]`.
#[derive(Debug, Clone)]
pub struct Embeddings {
    /// Row i is the embedding at position i.
    pub rows: Tensor,
}

impl LearnedPrompt {
    /// How many positions the prompt takes in front of the text.
    pub fn num_virtual_tokens(&self) -> usize {
        match self {
            Self::Embeddings(e) => e.rows.dims()[0],
        }
    }

    /// Bytes of tensor data held.
    pub fn num_bytes(&self) -> usize {
        match self {
            Self::Embeddings(e) => e.rows.elem_count() * e.rows.dtype().size_in_bytes(),
        }
    }

    /// PEFT's word for how the prompt is applied, shown to users.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Embeddings(_) => "embeddings",
        }
    }
}
