//! Which learned prompts are in the cache as a whole, and which of them are pinned there.
//!
//! A prompt's blocks are pinned, so that other content goes first, while all pinned blocks are at
//! most half of the cache; beyond that the prompt that was used least recently loses its pin.

use std::collections::{BTreeMap, HashMap};

use super::{block_manager::BlockManager, request::CacheNamespace};
use crate::kernels::layout::BlockId;

/// The prompts that are in the cache.
#[derive(Debug)]
pub struct Prompts {
    records: HashMap<CacheNamespace, Record>,
    /// Pinned ones by when they were last used.
    by_use: BTreeMap<u64, CacheNamespace>,
    /// Which prompt a block belongs to.
    owners: HashMap<BlockId, CacheNamespace>,
    num_pinned: usize,
    max_pinned: usize,
    clock: u64,
    changes: Vec<(CacheNamespace, bool)>,
}

#[derive(Debug)]
struct Record {
    blocks: Vec<BlockId>,
    pinned: bool,
    used: u64,
}

impl Prompts {
    /// None is there. At most `max_pinned` blocks will be pinned.
    pub fn new(max_pinned: usize) -> Self {
        Self {
            records: HashMap::new(),
            by_use: BTreeMap::new(),
            owners: HashMap::new(),
            num_pinned: 0,
            max_pinned,
            clock: 0,
            changes: Vec::new(),
        }
    }

    /// Whether all of a prompt is in the cache.
    pub fn contains(&self, namespace: CacheNamespace) -> bool {
        self.records.contains_key(&namespace)
    }

    /// Whether a block is part of a prompt.
    pub fn owns(&self, block: BlockId) -> bool {
        self.owners.contains_key(&block)
    }

    /// How many blocks are part of a prompt.
    pub fn num_blocks(&self) -> usize {
        self.owners.len()
    }

    /// Whether a prompt of this many blocks could be pinned without another losing its pin.
    pub fn has_room(&self, blocks: usize) -> bool {
        self.num_pinned + blocks <= self.max_pinned
    }

    /// Says that a prompt is in these blocks, and pins them if they are not too many.
    pub fn add(&mut self, namespace: CacheNamespace, blocks: Vec<BlockId>, manager: &mut BlockManager) {
        if blocks.is_empty() || self.contains(namespace) {
            return;
        }
        let pinned = blocks.len() <= self.max_pinned;
        if pinned {
            while !self.has_room(blocks.len()) {
                let Some((_, &oldest)) = self.by_use.first_key_value() else { break };
                self.unpin(oldest, manager);
            }
            self.num_pinned += blocks.len();
            self.clock += 1;
            self.by_use.insert(self.clock, namespace);
        }
        for &block in &blocks {
            self.owners.insert(block, namespace);
            manager.pin(block, pinned);
        }
        self.records.insert(namespace, Record { blocks, pinned, used: self.clock });
        self.changes.push((namespace, true));
    }

    /// Says that a prompt was used now.
    pub fn touch(&mut self, namespace: CacheNamespace) {
        if let Some(record) = self.records.get_mut(&namespace).filter(|record| record.pinned) {
            self.by_use.remove(&record.used);
            self.clock += 1;
            record.used = self.clock;
            self.by_use.insert(self.clock, namespace);
        }
    }

    /// Takes the pin from the least recently used prompt that has an idle block, if there is one.
    pub fn give_up_one(&mut self, manager: &mut BlockManager) -> bool {
        let idle =
            |namespace: &CacheNamespace| self.records[namespace].blocks.iter().any(|&block| manager.is_idle(block));
        let Some(namespace) = self.by_use.values().copied().find(idle) else { return false };
        self.unpin(namespace, manager);
        true
    }

    /// Says that a block's content is gone, and with it the prompt that it was part of.
    pub fn lose(&mut self, block: BlockId) {
        let Some(namespace) = self.owners.get(&block) else { return };
        if let Some(record) = self.records.remove(namespace) {
            self.changes.push((*namespace, false));
            for block in record.blocks {
                self.owners.remove(&block);
            }
        }
    }

    /// What came and went since the last call.
    pub fn take_changes(&mut self) -> Vec<(CacheNamespace, bool)> {
        std::mem::take(&mut self.changes)
    }

    fn unpin(&mut self, namespace: CacheNamespace, manager: &mut BlockManager) {
        let Some(record) = self.records.get_mut(&namespace) else { return };
        self.by_use.remove(&record.used);
        self.num_pinned -= record.blocks.len();
        record.pinned = false;
        // The last first: a beginning is of use without its end.
        for &block in record.blocks.iter().rev() {
            manager.pin(block, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(manager: &mut BlockManager, n: usize) -> Vec<BlockId> {
        let ids: Vec<_> = (0..n).map(|_| manager.take().unwrap()).collect();
        for &id in &ids {
            manager.keep(id, true);
            manager.release(id);
        }
        ids
    }

    #[test]
    fn the_least_recently_used_prompt_loses_its_pin_when_there_are_too_many() {
        let mut manager = BlockManager::new(8);
        let mut prompts = Prompts::new(4);
        let [a, b, c] = [1, 2, 3].map(|n| CacheNamespace([n; 32]));
        let first = kept(&mut manager, 2);
        prompts.add(a, first.clone(), &mut manager);
        prompts.add(b, kept(&mut manager, 2), &mut manager);
        assert_eq!((manager.num_idle(), manager.num_kept()), (0, 4));
        prompts.touch(a);
        prompts.add(c, kept(&mut manager, 2), &mut manager);
        assert_eq!((manager.num_idle(), manager.num_kept(), prompts.num_blocks()), (2, 6, 6));
        let evicted = manager.evict().unwrap();
        prompts.lose(evicted);
        assert_eq!(prompts.num_blocks(), 4);
        assert_eq!([a, b, c].map(|namespace| prompts.contains(namespace)), [true, false, true]);
        assert_eq!(prompts.take_changes(), [(a, true), (b, true), (c, true), (b, false)]);
        assert!(prompts.give_up_one(&mut manager));
        assert_eq!(manager.num_idle(), 3);
    }

    #[test]
    fn a_prompt_longer_than_half_the_cache_is_known_but_not_pinned() {
        let mut manager = BlockManager::new(8);
        let mut prompts = Prompts::new(4);
        let namespace = CacheNamespace([1; 32]);
        prompts.add(namespace, kept(&mut manager, 5), &mut manager);
        assert!(prompts.contains(namespace));
        assert_eq!(manager.num_idle(), 5);
        assert!(!prompts.give_up_one(&mut manager));
    }
}
