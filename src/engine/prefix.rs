//! Which content is in which block: what was computed once is found again.
//!
//! The content of a block is its tokens and everything before them, named by a chain of hashes
//! that begins at a [`CacheNamespace`]. Under each such name lie the blocks that come next, sorted by
//! their tokens; so the one that has most in common with a given text is a neighbour of where that
//! text would be, and no more than two have to be looked at, however many there are.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    sync::Arc,
};

use sha2::{Digest as _, Sha256};

use super::request::{CacheNamespace, InputToken};
use crate::kernels::layout::{BLOCK_SIZE, BlockId};

/// Names the content of a chain of whole blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChainHash([u8; 32]);

impl ChainHash {
    /// The name of the empty chain.
    pub fn namespace(namespace: CacheNamespace) -> Self {
        Self(namespace.0)
    }

    /// The name of this chain for what one owner alone may find after it. Names of different owners
    /// differ, and none is that of a chain of blocks.
    pub fn within(self, owner: u64) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.0);
        // Where `next` says the kind of a token, 0 or 1.
        hash.update([2u8]);
        hash.update(owner.to_le_bytes());
        Self(hash.finalize().into())
    }

    /// A namespace of what depends on all of this chain.
    pub fn as_namespace(self) -> CacheNamespace {
        CacheNamespace(self.0)
    }

    /// The name of this chain and one more block.
    pub fn next(self, tokens: &[InputToken]) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.0);
        for token in tokens {
            // A virtual token must never look like a word of the same number.
            let (kind, number) = match token {
                InputToken::Vocab(id) => (0u8, id),
                InputToken::Virtual(row) => (1u8, row),
            };
            hash.update([kind]);
            hash.update(number.to_le_bytes());
        }
        Self(hash.finalize().into())
    }
}

/// Blocks by content.
#[derive(Debug, Default)]
pub struct PrefixIndex {
    children: HashMap<ChainHash, BTreeMap<Arc<[InputToken]>, BlockId>>,
    blocks: HashMap<BlockId, Entry>,
}

#[derive(Debug)]
struct Entry {
    parent: ChainHash,
    tokens: Arc<[InputToken]>,
    /// The name of the chain that ends with this block; meaningful if it is whole.
    chain: ChainHash,
}

/// A block that begins as a text goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    pub block: BlockId,
    /// How many leading tokens are the same; at least 1.
    pub common: usize,
}

impl PrefixIndex {
    /// Of the blocks that follow `parent`, the one with the longest beginning in common with
    /// `tokens`, of which there are at most a block's.
    pub fn find(&self, parent: ChainHash, tokens: &[InputToken]) -> Option<Found> {
        let children = self.children.get(&parent)?;
        let before = children.range::<[InputToken], _>((Bound::Unbounded, Bound::Excluded(tokens))).next_back();
        let after = children.range::<[InputToken], _>((Bound::Included(tokens), Bound::Unbounded)).next();
        let found = |(key, &block): (&Arc<[InputToken]>, &BlockId)| {
            let common = key.iter().zip(tokens).take_while(|(a, b)| a == b).count();
            Found { block, common }
        };
        let best =
            [after, before].into_iter().flatten().map(found).reduce(|a, b| if b.common > a.common { b } else { a });
        best.filter(|found| found.common > 0)
    }

    /// Says what a block holds, in place of what it was said to hold before. If another block holds
    /// the very same, nothing changes and that one is returned.
    pub fn insert(&mut self, parent: ChainHash, tokens: &[InputToken], block: BlockId) -> Result<ChainHash, BlockId> {
        if let Some(&other) = self.children.get(&parent).and_then(|c| c.get(tokens)).filter(|&&other| other != block) {
            return Err(other);
        }
        self.remove(block);
        let chain = if tokens.len() == BLOCK_SIZE { parent.next(tokens) } else { parent };
        let tokens: Arc<[InputToken]> = tokens.into();
        self.children.entry(parent).or_default().insert(tokens.clone(), block);
        self.blocks.insert(block, Entry { parent, tokens, chain });
        Ok(chain)
    }

    /// Forgets a block.
    pub fn remove(&mut self, block: BlockId) {
        let Some(Entry { parent, tokens, .. }) = self.blocks.remove(&block) else { return };
        if let Some(children) = self.children.get_mut(&parent) {
            children.remove(&tokens);
            if children.is_empty() {
                self.children.remove(&parent);
            }
        }
    }

    /// The name of the chain that ends with a whole block.
    pub fn chain(&self, block: BlockId) -> Option<ChainHash> {
        self.blocks.get(&block).filter(|entry| entry.tokens.len() == BLOCK_SIZE).map(|entry| entry.chain)
    }

    /// Whether a block's content is known here.
    pub fn contains(&self, block: BlockId) -> bool {
        self.blocks.contains_key(&block)
    }

    /// How many blocks have known content.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(ids: &[u32]) -> Vec<InputToken> {
        ids.iter().map(|&id| InputToken::Vocab(id)).collect()
    }

    #[test]
    fn a_chain_is_named_by_its_namespace_its_owner_its_order_and_the_kind_of_its_tokens() {
        let namespace = |n| ChainHash::namespace(CacheNamespace([n; 32]));
        let names = [
            namespace(1).next(&words(&[1, 2])),
            namespace(2).next(&words(&[1, 2])),
            namespace(1).next(&words(&[2, 1])),
            namespace(1).next(&[InputToken::Virtual(1), InputToken::Virtual(2)]),
            namespace(1).next(&words(&[1])).next(&words(&[2])),
            namespace(1).within(0),
            namespace(1).within(1),
            namespace(2).within(1),
            namespace(1).within(1).next(&words(&[1, 2])),
        ];
        assert_eq!(names.iter().collect::<std::collections::HashSet<_>>().len(), names.len());
        assert_eq!(names[0], namespace(1).next(&words(&[1, 2])));
    }

    #[test]
    fn a_block_that_grows_is_found_by_what_it_holds_now_and_a_second_of_the_same_is_told_the_first() {
        let namespace = ChainHash::namespace(CacheNamespace::TEXT);
        let mut index = PrefixIndex::default();
        index.insert(namespace, &words(&[1, 2]), 7).unwrap();
        index.insert(namespace, &words(&[1, 2, 3]), 7).unwrap();
        assert_eq!(index.find(namespace, &words(&[1, 2, 3, 4])), Some(Found { block: 7, common: 3 }));
        assert_eq!(index.insert(namespace, &words(&[1, 2, 3]), 8), Err(7));
        assert_eq!(index.len(), 1);
        index.remove(7);
        assert_eq!((index.find(namespace, &words(&[1])), index.is_empty()), (None, true));
    }

    proptest! {
        #[test]
        fn the_longest_common_beginning_is_found_among_any_blocks(
            blocks in prop::collection::vec(prop::collection::vec(0u32..3, 1..6), 0..30),
            text in prop::collection::vec(0u32..3, 1..6),
        ) {
            let namespace = ChainHash::namespace(CacheNamespace::TEXT);
            let mut index = PrefixIndex::default();
            for (i, block) in blocks.iter().enumerate() {
                let _ = index.insert(namespace, &words(block), i as BlockId);
            }
            let common = |block: &Vec<u32>| block.iter().zip(&text).take_while(|(a, b)| a == b).count();
            let longest = blocks.iter().map(common).max().unwrap_or(0);
            let found = index.find(namespace, &words(&text));
            prop_assert_eq!(found.map_or(0, |f| f.common), longest);
            if let Some(found) = found {
                prop_assert_eq!(common(&blocks[found.block as usize]), longest);
            }
        }
    }
}
