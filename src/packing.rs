//! Packing: what `[learned prompt][text]` means as positions. It says which of them the encoder reads
//! and which the decoder, where each row comes from, which rows' logits predict a continuation, and how
//! many tokens a learned prompt leaves for a text and an answer. Serving, tuning and evaluation all ask
//! here. Plain data; only [`embed`](mod@embed) makes tensors.

pub mod embed;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use crate::prompt::learned::InputToken;
use crate::{model::ModelInfo, prompt::LearnedPrompt};

/// A learned prompt's kind and its number of virtual tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptShape {
    /// No learned prompt: the model answers to the text alone.
    None,
    /// Rows of embeddings (prompt tuning, P-tuning). An encoder reads them if there is one.
    Embeddings(usize),
    /// Past key values of the decoder's first positions (prefix tuning).
    KeyValues(usize),
}

/// How one model reads its input: the decoder alone, or an encoder before it; and the bounds of both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// The token that a decoder begins with whose text an encoder reads; `None` without an encoder.
    start_token: Option<u32>,
    /// The most positions of an encoder's input.
    max_encoder: usize,
    /// The most positions of the decoder's sequence, its new tokens included.
    max_decoder: usize,
}

/// One input as positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedInput {
    /// What the encoder reads; `None` without an encoder, otherwise never empty.
    pub encoder: Option<Vec<InputToken>>,
    /// What the decoder reads, at positions 0 and up; never empty. The row of the last one predicts the
    /// first new token.
    pub decoder: Vec<InputToken>,
}

/// Why an input cannot be packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PackingError {
    /// There is neither a virtual token nor a token of text.
    #[error("the input has neither virtual tokens nor text")]
    Empty,
    /// Past key values have nothing after them: no row would be computed that predicts a token.
    #[error("a prompt of keys and values needs at least one token of text after it")]
    NoText,
    /// The encoder's input is too long.
    #[error("the encoder's input takes {found} positions, at most {limit} are taken")]
    EncoderTooLong { found: usize, limit: usize },
    /// The decoder's input leaves no position for a new token.
    #[error("the input takes {found} positions and at least one must be left of {limit}")]
    DecoderTooLong { found: usize, limit: usize },
}

/// How many tokens a learned prompt leaves for a text and an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenBudget {
    /// The most tokens of a text.
    pub input: usize,
    /// The most tokens of an answer, its end-of-sequence token included. If `shared`, those of the text
    /// are taken from them.
    pub output: usize,
    /// Whether text and answer lie in one sequence; `false` where an encoder reads the text.
    pub shared: bool,
}

/// Why an example does not fit; lengths in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BudgetError {
    #[error(
        "it is {} tokens long ({input} input, {output} answer), the context has room for {limit} after the virtual \
         tokens",
        input + output
    )]
    Sequence { input: usize, output: usize, limit: usize },
    #[error("its input is {found} tokens long, the encoder has room for {limit} beside the virtual tokens")]
    Input { found: usize, limit: usize },
    #[error("its answer is {found} tokens long, the decoder has room for {limit} beside the virtual tokens")]
    Output { found: usize, limit: usize },
}

impl PromptShape {
    /// The shape of a learned prompt, or of none.
    pub fn of(prompt: Option<&LearnedPrompt>) -> Self {
        match prompt {
            None => Self::None,
            Some(prompt @ LearnedPrompt::Embeddings(_)) => Self::Embeddings(prompt.num_virtual_tokens()),
            Some(prompt @ LearnedPrompt::KeyValues(_)) => Self::KeyValues(prompt.num_virtual_tokens()),
        }
    }

    /// Its number of virtual tokens.
    pub fn num_virtual_tokens(self) -> usize {
        match self {
            Self::None => 0,
            Self::Embeddings(n) | Self::KeyValues(n) => n,
        }
    }

    /// `[learned prompt][text]`: its virtual tokens, then the ids of a text, special tokens included.
    pub fn followed_by(self, ids: &[u32]) -> Vec<InputToken> {
        self.virtual_tokens().chain(ids.iter().map(|&id| InputToken::Vocab(id))).collect()
    }

    /// The positions of a text in which virtual tokens may have their places: where they have none, they come first;
    /// without a learned prompt, the text is alone.
    pub fn applied_to(self, text: &[InputToken]) -> Vec<InputToken> {
        let is_text = |token: &InputToken| token.vocab().is_some();
        match self {
            Self::None => text.iter().copied().filter(is_text).collect(),
            _ if text.iter().all(is_text) => self.virtual_tokens().chain(text.iter().copied()).collect(),
            _ => text.to_vec(),
        }
    }

    fn virtual_tokens(self) -> impl Iterator<Item = InputToken> {
        (0..self.num_virtual_tokens() as u32).map(InputToken::Virtual)
    }
}

/// How many positions are tokens of text, not virtual tokens.
pub fn text_len(tokens: &[InputToken]) -> usize {
    tokens.iter().filter(|token| token.vocab().is_some()).count()
}

/// The ids of the tokens of text.
pub fn text_ids(tokens: &[InputToken]) -> Vec<u32> {
    tokens.iter().filter_map(InputToken::vocab).collect()
}

/// How many virtual tokens stand at the beginning.
pub fn leading_virtual_tokens(tokens: &[InputToken]) -> usize {
    tokens.iter().take_while(|token| matches!(token, InputToken::Virtual(_))).count()
}

impl Packing {
    /// How a model reads its input, bounded by its context alone.
    pub fn of(model: &ModelInfo) -> Self {
        Self {
            start_token: model.encoder.as_ref().map(|encoder| encoder.start_token),
            max_encoder: model.context_length,
            max_decoder: model.context_length,
        }
    }

    /// The same with bounds that are at most these: positions of an encoder's input, and of a decoder's
    /// sequence with its new tokens.
    pub fn bounded(self, max_encoder: usize, max_decoder: usize) -> Self {
        Self { max_encoder: self.max_encoder.min(max_encoder), max_decoder: self.max_decoder.min(max_decoder), ..self }
    }

    /// The most positions of the decoder's sequence, its new tokens included.
    pub fn max_decoder(&self) -> usize {
        self.max_decoder
    }

    /// Parts `tokens`, `[learned prompt][text]`, into what the encoder reads and what the decoder reads.
    /// Without an encoder the decoder reads all of it. With one, the encoder reads it but for past key
    /// values, which are the decoder's, and the decoder's start token comes after them.
    ///
    /// # Errors
    /// There is nothing to read. Lengths are left to [`check`](Self::check).
    pub fn pack(&self, prompt: PromptShape, mut tokens: Vec<InputToken>) -> Result<PackedInput, PackingError> {
        let past = match prompt {
            PromptShape::KeyValues(n) => n.min(tokens.len()),
            PromptShape::None | PromptShape::Embeddings(_) => 0,
        };
        if past == tokens.len() {
            return Err(if past == 0 { PackingError::Empty } else { PackingError::NoText });
        }
        let Some(start_token) = self.start_token else { return Ok(PackedInput { encoder: None, decoder: tokens }) };
        let encoder = Some(tokens.split_off(past));
        tokens.push(InputToken::Vocab(start_token));
        Ok(PackedInput { encoder, decoder: tokens })
    }

    /// Checks an input's lengths against the bounds; one position must be left for a new token.
    ///
    /// # Errors
    /// The encoder's or the decoder's part is too long.
    pub fn check(&self, packed: &PackedInput) -> Result<(), PackingError> {
        let found = packed.encoder.as_ref().map_or(0, Vec::len);
        if found > self.max_encoder {
            return Err(PackingError::EncoderTooLong { found, limit: self.max_encoder });
        }
        let (found, limit) = (packed.decoder.len(), self.max_decoder);
        if found >= limit { Err(PackingError::DecoderTooLong { found, limit }) } else { Ok(()) }
    }

    /// How many tokens a learned prompt leaves for a text and an answer.
    pub fn budget(&self, prompt: PromptShape) -> TokenBudget {
        let n = prompt.num_virtual_tokens();
        if self.start_token.is_none() {
            let output = self.max_decoder.saturating_sub(n);
            return TokenBudget { input: output.saturating_sub(1), output, shared: true };
        }
        let (in_encoder, in_decoder) = match prompt {
            PromptShape::KeyValues(_) => (0, n),
            PromptShape::None | PromptShape::Embeddings(_) => (n, 0),
        };
        // One position is the start token's.
        let output = self.max_decoder.saturating_sub(in_decoder + 1);
        TokenBudget { input: self.max_encoder.saturating_sub(in_encoder), output, shared: false }
    }
}

impl PackedInput {
    /// Appends a continuation that is to be predicted token by token (teacher forcing): all of it but the
    /// last token, which nothing reads. Returns the decoder's rows whose logits predict its tokens, one
    /// for each; `continuation` is not empty.
    pub fn continued_by(&mut self, continuation: &[u32]) -> Range<usize> {
        let first = self.decoder.len().saturating_sub(1);
        let read = continuation.len().saturating_sub(1);
        self.decoder.extend(continuation[..read].iter().map(|&id| InputToken::Vocab(id)));
        first..first + continuation.len()
    }
}

impl TokenBudget {
    /// The most tokens of an answer to a text of `input` tokens; 0 if the text does not fit.
    pub fn output_after(self, input: usize) -> usize {
        match self.shared {
            true => self.output.saturating_sub(input),
            false if input > self.input => 0,
            false => self.output,
        }
    }

    /// Checks the lengths of an input and of an answer with its end-of-sequence token.
    ///
    /// # Errors
    /// Which of them is too long.
    pub fn check(self, input: usize, output: usize) -> Result<(), BudgetError> {
        match self.shared {
            true if input + output > self.output => Err(BudgetError::Sequence { input, output, limit: self.output }),
            false if input > self.input => Err(BudgetError::Input { found: input, limit: self.input }),
            false if output > self.output => Err(BudgetError::Output { found: output, limit: self.output }),
            _ => Ok(()),
        }
    }
}
