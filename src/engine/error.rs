//! Why the engine does not start, or does not take a request.

use crate::packing::PackingError;

/// The most continuations that a request may have scored.
pub const MAX_CONTINUATIONS: usize = 4096;
/// The most tokens of a request's continuations together.
pub const MAX_CONTINUATION_TOKENS: usize = 65_536;

/// Why the engine does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The KV cache, or the half of it that an encoder's output has, does not hold the least that it must.
    #[error("the KV cache has {bytes} bytes, but {holds} takes {needed} bytes")]
    KvCacheTooSmall { bytes: usize, holds: &'static str, needed: usize },
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The queue is full, or the tenant has its part of it: try again later.
    #[error("the queue is full ({limit} requests waiting); retry later")]
    Full { limit: usize },
    /// The engine is stopping or has failed.
    #[error("the engine accepts no more requests")]
    Closed,
    /// There is nothing to continue, or not one new token was asked for.
    #[error("the request has no input, or requests no token")]
    Empty,
    /// A prompt of keys and values has nothing after it: the first new token would follow nothing.
    #[error("a prompt of keys and values needs at least one token of text after it")]
    NoText,
    /// The input leaves no position for a new token.
    #[error("the input takes {found} positions and at least one must be left of {limit}")]
    TooLong { found: usize, limit: usize },
    /// The encoder's input is longer than it may be.
    #[error("the encoder's input takes {found} positions, at most {limit} are taken")]
    EncoderTooLong { found: usize, limit: usize },
    /// There are more continuations to score than a request may have, or they have more tokens.
    #[error(
        "{continuations} continuations with {tokens} tokens were given, at most {MAX_CONTINUATIONS} with \
         {MAX_CONTINUATION_TOKENS} are scored at once"
    )]
    TooManyContinuations { continuations: usize, tokens: usize },
}

impl From<PackingError> for SubmitError {
    fn from(error: PackingError) -> Self {
        match error {
            PackingError::Empty => Self::Empty,
            PackingError::NoText => Self::NoText,
            PackingError::EncoderTooLong { found, limit } => Self::EncoderTooLong { found, limit },
            PackingError::DecoderTooLong { found, limit } => Self::TooLong { found, limit },
        }
    }
}
