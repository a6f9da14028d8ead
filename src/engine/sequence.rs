//! One request as the scheduler sees it: its tokens, and how many of them are computed.

use std::sync::Arc;

use super::{
    draft::Drafting,
    encoder::{EncoderInput, InputKey},
    prefix::ChainHash,
    request::{CacheNamespace, InputToken, Tenant},
};
use crate::{
    kernels::layout::{BlockId, TokenTree},
    packing::leading_virtual_tokens,
};

/// The tokens of a request and where their keys and values are.
#[derive(Debug, Clone)]
pub struct Sequence {
    /// Input and new tokens, position by position.
    pub tokens: Vec<InputToken>,
    /// How many of them were input.
    pub num_input: usize,
    /// How many of them, at the beginning, are rows of a learned prompt.
    pub num_virtual: usize,
    /// The public prefix: how many of them, at the beginning, any owner may find in the cache; the rows
    /// of the learned prompt and what follows them that no client sent.
    pub public_prefix: usize,
    /// An encoder's input, if the model has an encoder.
    pub encoder: Option<EncoderInput>,
    /// Whether the encoder's output for it is there.
    pub encoded: bool,
    /// The first position whose logits are wanted, of a sequence that is scored; of others it is the last.
    pub scored_from: Option<usize>,
    /// What is guessed of its next tokens, where that is wanted.
    pub drafting: Option<Drafting>,
    /// The tree of continuations that it ends with, of a sequence that is scored.
    pub tree: Option<Arc<TokenTree>>,
    /// Positions whose keys and values are in `blocks`; it catches up with `tokens`.
    pub num_computed: usize,
    /// The block table: position p is in block p / BLOCK_SIZE.
    pub blocks: Vec<BlockId>,
    /// Whose cached blocks it shares; `None` shares nothing.
    pub namespace: Option<CacheNamespace>,
    pub tenant: Tenant,
    /// Lower is sooner.
    pub priority: i32,
    /// Positions of the input that were in the cache when it first joined the batch.
    pub cached_tokens: Option<usize>,
    /// The name of each whole block that is in the index, in order.
    pub(super) chain: Vec<ChainHash>,
    /// Positions of the input that need not be charged any more: found at first, or charged.
    pub(super) charged: usize,
    /// The step in which it joined the batch.
    pub(super) joined: u64,
    /// The number of its last chunk.
    pub(super) last_turn: u64,
}

impl Sequence {
    /// A sequence of which nothing is computed, and that shares nothing.
    pub fn new(tokens: Vec<InputToken>) -> Self {
        let num_virtual = leading_virtual_tokens(&tokens);
        Self {
            num_input: tokens.len(),
            num_virtual,
            public_prefix: num_virtual,
            tokens,
            encoder: None,
            encoded: false,
            scored_from: None,
            drafting: None,
            tree: None,
            num_computed: 0,
            blocks: Vec::new(),
            namespace: None,
            tenant: Tenant::default(),
            priority: 0,
            cached_tokens: None,
            chain: Vec::new(),
            charged: 0,
            joined: 0,
            last_turn: 0,
        }
    }

    /// Computed positions that other sequences may find in the cache: those before a tree.
    pub fn num_shareable(&self) -> usize {
        self.tree.as_ref().map_or(self.num_computed, |tree| self.num_computed.min(tree.start()))
    }

    /// Positions still to compute before a token can be chosen, without those of an encoder.
    pub fn num_pending(&self) -> usize {
        self.tokens.len() - self.num_computed
    }

    /// Guesses at the end of its tokens, while a step is computed.
    pub fn num_guessed(&self) -> usize {
        self.drafting.map_or(0, |drafting| drafting.guessed)
    }

    /// The first position whose logits are wanted: it has to be computed whatever the cache holds.
    pub fn wanted_from(&self) -> usize {
        self.scored_from.unwrap_or(self.tokens.len().saturating_sub(1))
    }

    /// Whether its continuations were to be scored, and all of it is computed.
    pub fn is_scored(&self) -> bool {
        self.scored_from.is_some() && self.num_pending() == 0
    }

    /// Positions of the encoder's input.
    pub fn num_encoder(&self) -> usize {
        self.encoder.as_ref().map_or(0, |input| input.tokens.len())
    }

    /// The name of the encoder's input.
    pub fn encoder_key(&self) -> Option<InputKey> {
        self.encoder.as_ref().map(|input| input.key)
    }

    /// Positions that an encoder has still to compute, all at once.
    pub fn num_unencoded(&self) -> usize {
        if self.encoded { 0 } else { self.num_encoder() }
    }

    /// All positions still to compute before a token can be chosen.
    pub fn work(&self) -> usize {
        self.num_unencoded() + self.num_pending()
    }
}
