//! Which blocks of the key-value cache are free.

use crate::kernels::kv_cache::{BLOCK_SIZE, BlockId};

/// Hands out blocks and takes them back.
#[derive(Debug)]
pub struct BlockManager {
    free: Vec<BlockId>,
    total: usize,
}

impl BlockManager {
    /// All of `total` blocks are free.
    pub fn new(total: usize) -> Self {
        // Reversed, so that low blocks are used first and memory grows only as it is needed.
        Self { free: (0..total as BlockId).rev().collect(), total }
    }

    /// How many blocks there are.
    pub fn total(&self) -> usize {
        self.total
    }

    /// How many are free.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Lengthens a block table so that it holds `positions` positions. False, and nothing
    /// changed, if there are too few free blocks.
    pub fn grow(&mut self, table: &mut Vec<BlockId>, positions: usize) -> bool {
        let wanted = positions.div_ceil(BLOCK_SIZE).saturating_sub(table.len());
        if wanted > self.free.len() {
            return false;
        }
        table.extend(self.free.drain(self.free.len() - wanted..).rev());
        true
    }

    /// Takes all of a table's blocks back.
    pub fn release(&mut self, table: &mut Vec<BlockId>) {
        self.free.extend(table.drain(..).rev());
    }
}
