//! The key-value cache as sequences use it: they take blocks, find what was computed before, and
//! leave what they computed to those who come after.
//!
//! A whole block of equal content is shared. Where a text leaves the known path within a block, the
//! part it has in common is copied into a block of its own, so a prompt of any length is shared in
//! full. Blocks are known only once their positions have been computed, and nobody writes into a
//! block that two sequences hold.
//!
//! Blocks of a public prefix (a learned prompt and the fixed words after it) are known to everybody.
//! Any block with a position beyond it is known to its owner only. Of the block that holds the end of
//! the prefix, the public part is known to all beside what the owner knows of it.

use super::{
    block_manager::BlockManager,
    prefix::{ChainHash, PrefixIndex},
    prompts::Prompts,
    request::CacheNamespace,
    sequence::Sequence,
};
use crate::kernels::layout::{BLOCK_SIZE, BlockId};

/// The first `slots` positions of block `from`, to be copied into block `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    pub from: BlockId,
    pub to: BlockId,
    pub slots: usize,
}

/// All blocks, and what is known of their content.
#[derive(Debug)]
pub struct Cache {
    blocks: BlockManager,
    /// `None` when nothing is shared.
    index: Option<Indexes>,
    prompts: Prompts,
    /// Sources of copies that have not been done yet; held, so that they stay as they are.
    sources: Vec<BlockId>,
    evictions: u64,
}

/// What is known of the blocks' content. One block may be known in both: its beginning is public then.
#[derive(Debug, Default)]
struct Indexes {
    public: PrefixIndex,
    private: PrefixIndex,
}

impl Indexes {
    /// The name of the chain that ends with a whole block.
    fn chain(&self, block: BlockId) -> Option<ChainHash> {
        self.private.chain(block).or_else(|| self.public.chain(block))
    }

    /// Forgets a block.
    fn remove(&mut self, block: BlockId) {
        self.public.remove(block);
        self.private.remove(block);
    }
}

/// The name of the chain that a sequence's next block follows, `before` being that of the whole blocks
/// before it, of which there are `num_blocks`: the owner's own if it is the first that is not all public.
fn parent_of_private(sequence: &Sequence, before: ChainHash, num_blocks: usize) -> ChainHash {
    if num_blocks == sequence.public_prefix / BLOCK_SIZE { before.within(sequence.tenant.owner) } else { before }
}

impl Cache {
    /// An empty cache of `num_blocks` blocks.
    pub fn new(num_blocks: usize, sharing: bool) -> Self {
        Self {
            blocks: BlockManager::new(num_blocks),
            index: sharing.then(Indexes::default),
            prompts: Prompts::new(num_blocks / 2),
            sources: Vec::new(),
            evictions: 0,
        }
    }

    /// Gives a sequence that has nothing blocks for all its tokens: shared ones for what is known,
    /// its own for the rest. At least `spare` blocks stay available. `None`, and nothing changed,
    /// if there are too few; else the copy to make before its first chunk, if any.
    pub fn join(&mut self, sequence: &mut Sequence, spare: usize) -> Option<Option<BlockCopy>> {
        let (shared, mut partial) = self.find(sequence);
        for &block in &shared {
            self.blocks.hold(block);
        }
        let wanted = sequence.tokens.len().div_ceil(BLOCK_SIZE) - shared.len();
        if let Some((from, _)) = partial {
            self.blocks.hold(from);
            if self.blocks.num_available() < wanted + spare {
                // Its source may be the one block that is missing.
                self.blocks.release(from);
                partial = None;
            }
        }
        if self.blocks.num_available() < wanted + spare {
            shared.iter().rev().for_each(|&block| self.blocks.release(block));
            return None;
        }
        sequence.num_computed = shared.len() * BLOCK_SIZE;
        sequence.chain = shared.iter().filter_map(|&block| self.index.as_ref()?.chain(block)).collect();
        sequence.blocks = shared;
        let grown = self.grow(sequence);
        debug_assert!(grown, "blocks were counted and are not there");
        if let Some(namespace) = sequence.namespace {
            self.prompts.touch(namespace);
        }
        let copy = partial.and_then(|(from, slots)| {
            self.sources.push(from);
            let to = *sequence.blocks.get(sequence.num_computed / BLOCK_SIZE)?;
            sequence.num_computed += slots;
            Some(BlockCopy { from, to, slots })
        });
        Some(copy)
    }

    /// Lengthens a sequence's table so that it holds all its tokens. False, and nothing changed, if
    /// there are too few blocks.
    pub fn grow(&mut self, sequence: &mut Sequence) -> bool {
        let wanted = Self::missing(sequence);
        if wanted > self.blocks.num_available() {
            return false;
        }
        for _ in 0..wanted {
            let Some(block) = self.take() else { return false };
            sequence.blocks.push(block);
        }
        true
    }

    /// How many blocks a sequence's tokens need beyond those in its table.
    pub fn missing(sequence: &Sequence) -> usize {
        sequence.tokens.len().div_ceil(BLOCK_SIZE).saturating_sub(sequence.blocks.len())
    }

    /// Makes what a sequence has computed known to others, after `num_computed` went up.
    pub fn commit(&mut self, sequence: &mut Sequence) {
        let Some(namespace) = self.committed_to(sequence) else { return };
        self.commit_whole_blocks(sequence, namespace);
        let prompt_done = sequence.num_virtual > 0 && sequence.num_computed >= sequence.num_virtual;
        if prompt_done && !self.prompts.contains(namespace) {
            self.commit_prompt(sequence, namespace);
        }
        if sequence.num_computed == sequence.num_input {
            self.commit_tail(sequence, namespace);
        }
    }

    /// Where what a sequence computes becomes known to others.
    fn committed_to(&self, sequence: &Sequence) -> Option<CacheNamespace> {
        sequence.namespace.filter(|_| self.index.is_some())
    }

    /// Takes a sequence's blocks back and keeps what others may want.
    pub fn release(&mut self, sequence: &mut Sequence) {
        if let Some(namespace) = self.committed_to(sequence) {
            self.commit_tail(sequence, namespace);
        }
        self.drop_table(sequence);
    }

    /// Takes a sequence's blocks back without relying on what was to be computed last.
    pub fn discard(&mut self, sequence: &mut Sequence) {
        self.drop_table(sequence);
    }

    /// Says that all copies were made, or never will be.
    pub fn end_copies(&mut self) {
        for block in std::mem::take(&mut self.sources) {
            self.blocks.release(block);
        }
    }

    /// Whether a learned prompt of this length could be computed and kept without anything of value
    /// having to go.
    pub fn has_room_for_prompt(&self, positions: usize) -> bool {
        let blocks = positions.div_ceil(BLOCK_SIZE);
        // One more for the copy of a tail.
        self.index.is_some()
            && self.prompts.has_room(blocks)
            && blocks < self.blocks.num_free() + self.blocks.num_idle()
    }

    /// Whether all of a learned prompt's positions are here.
    pub fn contains_prompt(&self, namespace: CacheNamespace) -> bool {
        self.prompts.contains(namespace)
    }

    /// Blocks of the learned prompts that are here as a whole.
    pub fn num_of_prompts(&self) -> usize {
        self.prompts.num_blocks()
    }

    /// The prompts that came (true) and went since the last call.
    pub fn take_prompt_changes(&mut self) -> Vec<(CacheNamespace, bool)> {
        self.prompts.take_changes()
    }

    /// Blocks that could be handed out now.
    pub fn num_available(&self) -> usize {
        self.blocks.num_available()
    }

    /// Blocks held by sequences.
    pub fn num_held(&self) -> usize {
        self.blocks.num_held()
    }

    /// Blocks that nobody holds and that are kept.
    pub fn num_kept(&self) -> usize {
        self.blocks.num_kept()
    }

    /// How many there are in all.
    pub fn num_blocks(&self) -> usize {
        self.blocks.total()
    }

    /// How often kept content had to go.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// The whole blocks that hold a sequence's beginning, and the block that holds some of what
    /// follows, with how much. Never among them is a position whose logits are wanted, such as the last.
    fn find(&self, sequence: &Sequence) -> (Vec<BlockId>, Option<(BlockId, usize)>) {
        let mut shared = Vec::new();
        let (Some(indexes), Some(namespace)) = (&self.index, sequence.namespace) else { return (shared, None) };
        let known = &sequence.tokens[..sequence.wanted_from()];
        let public = sequence.public_prefix.min(known.len());
        let mut parent = ChainHash::namespace(namespace);
        for (i, tokens) in known.chunks(BLOCK_SIZE).enumerate() {
            let public = public.saturating_sub(i * BLOCK_SIZE);
            let found = if public >= BLOCK_SIZE {
                indexes.public.find(parent, tokens)
            } else {
                let own = indexes.private.find(parent_of_private(sequence, parent, i), tokens);
                // A block that is public up to its end was seen above, so this is the beginning of one.
                let all = if public > 0 { indexes.public.find(parent, &tokens[..public]) } else { None };
                match (own, all) {
                    (Some(own), Some(all)) if all.common > own.common => Some(all),
                    (own, all) => own.or(all),
                }
            };
            match found {
                Some(found) if found.common == BLOCK_SIZE => {
                    let Some(chain) = indexes.chain(found.block) else { break };
                    parent = chain;
                    shared.push(found.block);
                }
                Some(found) => return (shared, Some((found.block, found.common))),
                None => break,
            }
        }
        (shared, None)
    }

    /// A block for new content, held once: a free one, else the least valuable.
    fn take(&mut self) -> Option<BlockId> {
        loop {
            if let Some(block) = self.blocks.take() {
                return Some(block);
            }
            if let Some(block) = self.blocks.evict() {
                self.evictions += 1;
                self.prompts.lose(block);
                if let Some(index) = &mut self.index {
                    index.remove(block);
                }
            } else if !self.prompts.give_up_one(&mut self.blocks) {
                return None;
            }
        }
    }

    fn commit_whole_blocks(&mut self, sequence: &mut Sequence, namespace: CacheNamespace) {
        while (sequence.chain.len() + 1) * BLOCK_SIZE <= sequence.num_shareable() {
            let i = sequence.chain.len();
            let before = sequence.chain.last().copied().unwrap_or(ChainHash::namespace(namespace));
            let is_public = (i + 1) * BLOCK_SIZE <= sequence.public_prefix;
            if !is_public && i * BLOCK_SIZE < sequence.public_prefix {
                self.commit_public_part(sequence, before);
            }
            let Some(indexes) = &mut self.index else { return };
            let parent = if is_public { before } else { parent_of_private(sequence, before, i) };
            let tokens = &sequence.tokens[i * BLOCK_SIZE..][..BLOCK_SIZE];
            let block = sequence.blocks[i];
            let index = if is_public { &mut indexes.public } else { &mut indexes.private };
            match index.insert(parent, tokens, block) {
                Ok(chain) => {
                    self.blocks.keep(block, true);
                    sequence.chain.push(chain);
                }
                Err(other) => {
                    // Somebody computed the same at the same time. One copy is enough, unless this
                    // one is known as the end of a prompt or for its public part.
                    let is_known = self.prompts.owns(block) || (!is_public && indexes.public.contains(block));
                    if !is_known {
                        indexes.remove(block);
                        self.blocks.keep(block, false);
                        self.blocks.hold(other);
                        self.blocks.release(block);
                        sequence.blocks[i] = other;
                    }
                    sequence.chain.push(parent.next(tokens));
                }
            }
        }
    }

    /// Makes the last, partly filled block known, to all or to its owner.
    fn commit_tail(&mut self, sequence: &Sequence, namespace: CacheNamespace) {
        let num_blocks = sequence.chain.len();
        let start = num_blocks * BLOCK_SIZE;
        let before = sequence.chain.last().copied().unwrap_or(ChainHash::namespace(namespace));
        if start < sequence.public_prefix {
            self.commit_public_part(sequence, before);
        }
        if sequence.num_shareable() <= sequence.public_prefix.max(start) {
            return;
        }
        let Some(indexes) = self.index.as_mut() else { return };
        let Some(&block) = sequence.blocks.get(num_blocks) else { return };
        let parent = parent_of_private(sequence, before, num_blocks);
        let tokens = &sequence.tokens[start..sequence.num_shareable()];
        let is_known = indexes.private.find(parent, tokens).is_some_and(|found| found.common == tokens.len());
        if !is_known && indexes.private.insert(parent, tokens, block).is_ok() {
            self.blocks.keep(block, true);
        }
    }

    /// Makes what is public and computed of the block after `before`, the whole blocks in the index, known
    /// to all. Returns a block that holds it, this or another.
    fn commit_public_part(&mut self, sequence: &Sequence, before: ChainHash) -> Option<BlockId> {
        let index = &mut self.index.as_mut()?.public;
        let start = sequence.chain.len() * BLOCK_SIZE;
        let end = sequence.num_shareable().min(sequence.public_prefix).min(start + BLOCK_SIZE);
        let tokens = sequence.tokens.get(start..end).filter(|tokens| !tokens.is_empty())?;
        if let Some(found) = index.find(before, tokens).filter(|found| found.common == tokens.len()) {
            return Some(found.block);
        }
        let block = *sequence.blocks.get(sequence.chain.len())?;
        index.insert(before, tokens, block).ok()?;
        self.blocks.keep(block, true);
        Some(block)
    }

    /// Says that a learned prompt is in the cache as a whole, and in which blocks.
    fn commit_prompt(&mut self, sequence: &Sequence, namespace: CacheNamespace) {
        let Some(indexes) = &self.index else { return };
        let num_whole = sequence.chain.len().min(sequence.num_virtual.div_ceil(BLOCK_SIZE));
        let mut blocks = sequence.blocks[..num_whole].to_vec();
        let full = sequence.num_virtual / BLOCK_SIZE;
        if full * BLOCK_SIZE < sequence.num_virtual {
            // The block that holds its end may be private as a whole and public in its beginning.
            let before = match full.checked_sub(1) {
                Some(last) => sequence.chain.get(last).copied(),
                None => Some(ChainHash::namespace(namespace)),
            };
            let Some(before) = before else { return };
            let tail = &sequence.tokens[full * BLOCK_SIZE..sequence.num_virtual];
            let known = indexes.public.find(before, tail).filter(|found| found.common == tail.len());
            let block = match known {
                Some(found) => Some(found.block),
                None if sequence.chain.len() == full => self.commit_public_part(sequence, before),
                None => None,
            };
            let Some(block) = block else { return };
            blocks.truncate(full);
            blocks.push(block);
        }
        self.prompts.add(namespace, blocks, &mut self.blocks);
    }

    /// The last block first: a beginning is of use without its end, so it should outlive it.
    fn drop_table(&mut self, sequence: &mut Sequence) {
        for block in sequence.blocks.drain(..).rev() {
            self.blocks.release(block);
        }
        sequence.chain.clear();
        sequence.num_computed = 0;
    }

    /// How often each block is held, for tests of who holds what.
    #[cfg(test)]
    pub(super) fn holders(&self, block: BlockId) -> u32 {
        self.blocks.holders(block)
    }
}
