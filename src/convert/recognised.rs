//! A prompt that was recognised in a file's tensors.

use super::{ConvertError, RawTensor};
use crate::prompt::peft_type::PeftType;

/// The name of the rows in PEFT's file.
pub const TENSOR: &str = "prompt_embeddings";

/// The prompt that a file's tensors describe.
#[derive(Debug, Clone, PartialEq)]
pub struct Recognised {
    pub peft_type: PeftType,
    /// PEFT's `prompt_embeddings`: one row for each virtual token.
    pub rows: RawTensor,
    /// `num_layers`, `num_attention_heads` and `token_dim` of a prompt of keys and values, where the tensors tell.
    pub num_layers: Option<usize>,
    pub num_heads: Option<usize>,
    pub token_dim: Option<usize>,
    /// Rows at the beginning of a cartridge that were not trained.
    pub num_frozen_tokens: usize,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// The tensor under PEFT's name, as a matrix.
pub(super) fn prompt_embeddings(tensor: &RawTensor) -> Result<RawTensor, ConvertError> {
    match tensor.matrix().filter(|_| tensor.is_float()) {
        Some((rows, columns)) => {
            Ok(RawTensor { name: TENSOR.to_owned(), shape: vec![rows, columns], ..tensor.clone() })
        }
        None => Err(ConvertError::Unfit(format!(
            "{} is not a soft prompt; expected F32, F16, BF16 or F64 with the shape [virtual tokens, hidden size]",
            tensor.describe()
        ))),
    }
}

/// Whether a dotted name ends with these parts.
pub(super) fn ends_with(name: &str, parts: &str) -> bool {
    name.strip_suffix(parts).is_some_and(|front| front.is_empty() || front.ends_with('.'))
}

/// A tensor's name, for a message.
pub(super) fn shown(name: &str) -> String {
    name.chars().take(120).flat_map(char::escape_debug).collect()
}
