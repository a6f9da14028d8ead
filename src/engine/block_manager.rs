//! Which blocks of the key-value cache are free, held, or kept for who may want them again.
//!
//! A block is held as often as block tables (or a copy under way) name it. One that nobody holds is
//! free, unless its content is worth keeping: then it is *idle*, and idle blocks are given up least
//! recently used first. Pinned blocks are idle too when nobody holds them, and go last.

use std::collections::BTreeMap;

use crate::kernels::layout::BlockId;

/// Counts who holds each block. Knows nothing of what is in them.
#[derive(Debug)]
pub struct BlockManager {
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    /// Kept, held by nobody and not pinned, by when that began.
    idle: BTreeMap<u64, BlockId>,
    pinned_idle: usize,
    clock: u64,
}

#[derive(Debug, Clone, Default)]
struct Block {
    holders: u32,
    kept: bool,
    pinned: bool,
    idle_since: u64,
}

impl BlockManager {
    /// All of `total` blocks are free.
    pub fn new(total: usize) -> Self {
        // Reversed, so that low blocks are used first and memory grows only as it is needed.
        let free = (0..total as BlockId).rev().collect();
        Self { blocks: vec![Block::default(); total], free, idle: BTreeMap::new(), pinned_idle: 0, clock: 0 }
    }

    /// How many blocks there are.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// How many are held.
    pub fn num_held(&self) -> usize {
        self.total() - self.num_available()
    }

    /// How many hold nothing worth keeping.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// How many nobody holds and are kept, but not pinned.
    pub fn num_idle(&self) -> usize {
        self.idle.len()
    }

    /// How many nobody holds and are kept.
    pub fn num_kept(&self) -> usize {
        self.idle.len() + self.pinned_idle
    }

    /// How many could be handed out, kept ones included.
    pub fn num_available(&self) -> usize {
        self.free.len() + self.num_kept()
    }

    /// A free block, held once.
    pub fn take(&mut self) -> Option<BlockId> {
        let id = self.free.pop()?;
        self.blocks[id as usize].holders = 1;
        Some(id)
    }

    /// Holds a block once more.
    pub fn hold(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        if block.holders == 0 && block.pinned {
            self.pinned_idle -= 1;
        } else if block.holders == 0 {
            self.idle.remove(&block.idle_since);
        }
        block.holders += 1;
    }

    /// Holds a block once less.
    pub fn release(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        block.holders -= 1;
        if block.holders == 0 {
            self.settle(id);
        }
    }

    /// Says whether a block's content is worth keeping when nobody holds it.
    pub fn keep(&mut self, id: BlockId, kept: bool) {
        self.change(id, |block| block.kept = kept);
    }

    /// Says whether a kept block is to go last.
    pub fn pin(&mut self, id: BlockId, pinned: bool) {
        self.change(id, |block| block.pinned = pinned);
    }

    /// Frees the idle block that was used least recently. Its content is lost.
    pub fn evict(&mut self) -> Option<BlockId> {
        let (_, id) = self.idle.pop_first()?;
        self.blocks[id as usize].kept = false;
        self.free.push(id);
        Some(id)
    }

    /// Whether nobody holds a block, and it is kept.
    pub fn is_idle(&self, id: BlockId) -> bool {
        self.blocks[id as usize].holders == 0 && self.blocks[id as usize].kept
    }

    fn change(&mut self, id: BlockId, change: impl FnOnce(&mut Block)) {
        let idle = self.is_idle(id);
        if idle {
            self.hold(id);
        }
        change(&mut self.blocks[id as usize]);
        if idle {
            self.release(id);
        }
    }

    /// Puts a block that nobody holds any more where it belongs.
    fn settle(&mut self, id: BlockId) {
        self.clock += 1;
        let block = &mut self.blocks[id as usize];
        match block {
            Block { kept: false, .. } => {
                block.pinned = false;
                self.free.push(id);
            }
            Block { pinned: true, .. } => self.pinned_idle += 1,
            _ => {
                block.idle_since = self.clock;
                self.idle.insert(self.clock, id);
            }
        }
    }

    /// How often a block is held, for tests of who holds what.
    #[cfg(test)]
    pub(super) fn holders(&self, id: BlockId) -> u32 {
        self.blocks[id as usize].holders
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_free_again_when_its_last_holder_is_gone_unless_it_is_kept() {
        let mut blocks = BlockManager::new(2);
        let (a, b) = (blocks.take().unwrap(), blocks.take().unwrap());
        assert_eq!((a, b, blocks.take()), (0, 1, None));
        blocks.hold(a);
        blocks.keep(b, true);
        for id in [a, a, b] {
            blocks.release(id);
        }
        assert_eq!((blocks.num_free(), blocks.num_kept(), blocks.num_held()), (1, 1, 0));
        blocks.keep(b, false);
        assert_eq!((blocks.num_free(), blocks.num_kept()), (2, 0));
    }

    #[test]
    fn idle_blocks_go_least_recently_used_first_and_pinned_ones_not_at_all() {
        let mut blocks = BlockManager::new(4);
        let ids: Vec<_> = (0..4).map(|_| blocks.take().unwrap()).collect();
        for &id in &ids {
            blocks.keep(id, true);
            blocks.release(id);
        }
        blocks.pin(ids[0], true);
        // Used again, so now the youngest.
        blocks.hold(ids[1]);
        blocks.release(ids[1]);
        assert_eq!((blocks.num_idle(), blocks.num_kept(), blocks.num_available()), (3, 4, 4));
        assert_eq!([(); 4].map(|()| blocks.evict()), [Some(ids[2]), Some(ids[3]), Some(ids[1]), None]);
        blocks.pin(ids[0], false);
        assert_eq!((blocks.evict(), blocks.num_free()), (Some(ids[0]), 4));
    }
}
