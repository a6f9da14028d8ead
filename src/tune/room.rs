//! How long an example may be behind a learned prompt: by the context of a decoder, or by those of an
//! encoder and its decoder.

use crate::{model::Model, prompt::LearnedPrompt};

/// The most tokens of an example.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// Of the input and the answer together.
    Shared(usize),
    /// Of each for itself.
    Apart { input: usize, answer: usize },
}

impl Room {
    /// What the model has room for behind so many virtual tokens, of keys and values or of rows.
    pub fn behind(model: &Model, virtual_tokens: usize, key_values: bool) -> Self {
        let info = model.info();
        let left = |taken: usize| info.context_length.saturating_sub(taken);
        match (&info.encoder, key_values) {
            (None, _) => Self::Shared(left(virtual_tokens)),
            // One position of the decoder's is the start token's.
            (Some(_), false) => Self::Apart { input: left(virtual_tokens), answer: left(1) },
            (Some(_), true) => Self::Apart { input: left(0), answer: left(virtual_tokens + 1) },
        }
    }

    /// What it has room for behind a prompt, or behind none.
    pub fn after(model: &Model, prompt: Option<&LearnedPrompt>) -> Self {
        let n = prompt.map_or(0, LearnedPrompt::num_virtual_tokens);
        Self::behind(model, n, matches!(prompt, Some(LearnedPrompt::KeyValues(_))))
    }

    /// Checks an input and an answer, the end of it included.
    ///
    /// # Errors
    /// What is too long, and for what.
    pub fn check(self, input: usize, answer: usize) -> Result<(), String> {
        match self {
            Self::Shared(room) if input + answer > room => Err(format!(
                "it is {} tokens long ({input} input, {answer} answer), the context has {room} behind the virtual \
                 tokens",
                input + answer
            )),
            Self::Apart { input: room, .. } if input > room => Err(format!(
                "its input is {input} tokens long, the encoder has room for {room} beside the virtual tokens"
            )),
            Self::Apart { answer: room, .. } if answer > room => Err(format!(
                "its answer is {answer} tokens long, the decoder has room for {room} beside the virtual tokens"
            )),
            _ => Ok(()),
        }
    }
}
