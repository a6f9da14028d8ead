//! What goes wrong when a model is loaded.

use bytesize::ByteSize;

use super::gguf::GgufError;

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file is missing or unreadable.
    #[error("cannot read {file} of the model {model}: {reason}")]
    File { model: String, file: String, reason: String },
    /// `config.json` is not understood; names the key and its value.
    #[error("config.json of the model {model}: {reason}")]
    Config { model: String, reason: String },
    /// A GGUF file is damaged, or holds what is not supported.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// Tensors are missing or have other shapes than `config.json` says; lists them all.
    #[error("the weights do not fit config.json: {0}")]
    Weights(String),
    /// The device's memory is too small.
    #[error(
        "the model does not fit into the device's memory: {parameters} parameters in {dtype} are {needed}, and {free} of {total} \
         are free; use a number format of fewer bytes, a smaller model or a larger device, or end what else uses it"
    )]
    DoesNotFit { parameters: usize, dtype: &'static str, needed: ByteSize, free: ByteSize, total: ByteSize },
    #[error("cannot put the weights on the device: {0}")]
    Device(#[from] candle_core::Error),
}
