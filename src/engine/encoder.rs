//! What is particular to requests of a model with an encoder: the names of inputs that are equal, and
//! how many positions of them the batch may hold.

use super::{
    config::EngineConfig,
    error::StartError,
    prefix::ChainHash,
    request::{CacheNamespace, InputToken, SequenceId},
};
use crate::model::Model;

/// What goes into an encoder for one sequence.
#[derive(Debug, Clone)]
pub struct EncoderInput {
    pub key: InputKey,
    pub tokens: Vec<InputToken>,
}

/// Names an input: those of one key are equal, and are computed once for all sequences that run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InputKey {
    /// By its content, a learned prompt's rows included.
    Content(ChainHash),
    /// Of a sequence that shares nothing.
    Own(SequenceId),
}

impl InputKey {
    /// A namespace of the decoder's keys and values after this input, which depend on all of it.
    pub fn as_namespace(self) -> CacheNamespace {
        match self {
            Self::Content(content) => content.as_namespace(),
            Self::Own(id) => CacheNamespace::of_request(id.0),
        }
    }
}

/// The bounds of the encoder's output in the batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct EncoderLimits {
    /// Positions of all inputs of the batch together.
    pub max_positions: usize,
    /// Whether equal inputs are computed once.
    shares: bool,
}

impl EncoderLimits {
    /// Those of a model, if it has an encoder, and the bytes that are left for the decoder's own keys
    /// and values.
    ///
    /// # Errors
    /// The bytes hold no position.
    pub fn of(model: &Model, config: &EngineConfig) -> Result<(usize, Option<Self>), StartError> {
        let bytes = config.kv_cache_bytes;
        if model.info().encoder.is_none() {
            return Ok((bytes, None));
        }
        let max_positions = bytes / 2 / model.cross_bytes().max(1);
        if max_positions == 0 {
            return Err(StartError::KvCacheTooSmall {
                bytes: bytes / 2,
                holds: "one position of the encoder's output",
                needed: model.cross_bytes(),
            });
        }
        Ok((bytes / 2, Some(Self { max_positions, shares: config.prefix_sharing })))
    }

    /// The name of an input's content, if it may be shared. Of the decoder's sequence nothing is: what it
    /// computes depends on all of the encoder's input.
    pub fn content(&self, input: &[InputToken], namespace: Option<CacheNamespace>, owner: u64) -> Option<ChainHash> {
        // Nothing of it is public: each row depends on all of the input.
        let chain = ChainHash::namespace(namespace.filter(|_| self.shares)?).within(owner);
        Some(chain.next(input))
    }
}
