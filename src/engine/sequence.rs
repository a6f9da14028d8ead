//! One request as the scheduler sees it: its tokens, and how many of them are computed.

use super::request::InputToken;
use crate::kernels::kv_cache::BlockId;

/// Names a sequence for as long as the engine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// The tokens of a request and where their keys and values are.
#[derive(Debug, Clone)]
pub struct Sequence {
    /// Input and new tokens, position by position.
    pub tokens: Vec<InputToken>,
    /// How many of them were input.
    pub num_input: usize,
    /// Positions whose keys and values are in `blocks`; it catches up with `tokens`.
    pub num_computed: usize,
    /// The block table: position p is in block p / BLOCK_SIZE.
    pub blocks: Vec<BlockId>,
}

impl Sequence {
    /// A sequence of which nothing is computed.
    pub fn new(tokens: Vec<InputToken>) -> Self {
        Self { num_input: tokens.len(), tokens, num_computed: 0, blocks: Vec::new() }
    }

    /// Positions still to compute before a token can be chosen.
    pub fn num_pending(&self) -> usize {
        self.tokens.len() - self.num_computed
    }
}
