//! What is particular to requests of a model with an encoder: which positions go into it, which the
//! decoder begins with, and how many of each there may be.

use super::{
    EngineConfig, SubmitError,
    prefix::ChainHash,
    request::{InputToken, Request},
    sequence::SequenceId,
};
use crate::{model::Model, prompt::LearnedPrompt};

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

/// The bounds of an encoder, and what the decoder begins with.
#[derive(Debug, Clone, Copy)]
pub(super) struct EncoderLimits {
    start_token: u32,
    /// The longest input.
    max_input: usize,
    /// Positions of all inputs of the batch together.
    pub max_positions: usize,
    /// Whether equal inputs are computed once.
    shares: bool,
}

/// What is left after a learned prompt, at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Tokens of a text.
    pub text: usize,
    /// New tokens; those of the text take from them if `shared`.
    pub answer: usize,
    /// Whether text and answer lie in one sequence.
    pub shared: bool,
}

impl EncoderLimits {
    /// Those of a model, if it has an encoder, and the bytes that are left for the decoder's own keys
    /// and values.
    ///
    /// # Errors
    /// The bytes hold no position.
    pub fn of(model: &Model, config: &EngineConfig) -> candle_core::Result<(usize, Option<Self>)> {
        let bytes = config.kv_cache_bytes;
        let Some(encoder) = &model.info().encoder else { return Ok((bytes, None)) };
        let max_positions = bytes / 2 / model.cross_bytes().max(1);
        if max_positions == 0 {
            candle_core::bail!(
                "half of the key-value cache, {} bytes, does not hold one position of the encoder's output of {} bytes",
                bytes / 2,
                model.cross_bytes()
            );
        }
        let max_input = model.info().context_length.min(max_positions);
        let (start_token, shares) = (encoder.start_token, config.prefix_sharing);
        Ok((bytes / 2, Some(Self { start_token, max_input, max_positions, shares })))
    }

    /// Takes the encoder's input out of a request and leaves what the decoder begins with; returns it
    /// with the name of its content, if it may be shared. Of the decoder's sequence nothing is: what it
    /// computes depends on all of the encoder's input.
    pub fn take_input(&self, request: &mut Request) -> Result<(Vec<InputToken>, Option<ChainHash>), SubmitError> {
        let of_decoder = match request.prompt.as_deref() {
            Some(LearnedPrompt::KeyValues(prompt)) => prompt.layers.first().map_or(0, |layer| layer.keys.dims()[1]),
            _ => 0,
        };
        let input = request.tokens.split_off(of_decoder.min(request.tokens.len()));
        request.tokens.push(InputToken::Vocab(self.start_token));
        // Nothing of it is public: each row depends on all of the input.
        let owner = request.cache_owner;
        let namespace = request.namespace.take().filter(|_| self.shares);
        match input.len() {
            0 => Err(SubmitError::Empty),
            found if found > self.max_input => Err(SubmitError::EncoderTooLong { found, limit: self.max_input }),
            _ => {
                let content = namespace.map(|namespace| ChainHash::namespace(namespace).within(owner).next(&input));
                Ok((input, content))
            }
        }
    }
}

impl Room {
    pub(super) fn after(prompt: &LearnedPrompt, max_sequence: usize, encoder: Option<&EncoderLimits>) -> Self {
        let n = prompt.num_virtual_tokens();
        let Some(encoder) = encoder else {
            let answer = max_sequence.saturating_sub(n);
            return Self { text: answer.saturating_sub(1), answer, shared: true };
        };
        let (in_encoder, in_decoder) = match prompt {
            LearnedPrompt::Embeddings(_) => (n, 0),
            LearnedPrompt::KeyValues(_) => (0, n),
        };
        // One position is the start token's.
        let answer = max_sequence.saturating_sub(in_decoder + 1);
        Self { text: encoder.max_input.saturating_sub(in_encoder), answer, shared: false }
    }
}
