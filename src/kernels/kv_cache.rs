//! Keys and values of all sequences in fixed-size blocks, so that sequences join and leave the
//! batch without anything being copied, and can share what they have in common.

use crate::kernels::cpu::{Buffer, Precision};

/// Positions in one block.
pub const BLOCK_SIZE: usize = 32;

/// Names a block.
pub type BlockId = u32;

/// The shape of a model's keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    pub num_layers: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub precision: Precision,
}

impl KvShape {
    /// Dimensions of a head in memory: whole vectors, and for bf16 whole tiles.
    pub fn padded_dim(&self) -> usize {
        match self.precision {
            Precision::F32 => self.head_dim.next_multiple_of(16),
            Precision::Bf16 => self.head_dim.next_multiple_of(32),
        }
    }

    /// Words of four bytes in one head's keys, or its values, of one block in one layer.
    pub fn plane(&self) -> usize {
        match self.precision {
            Precision::F32 => BLOCK_SIZE * self.padded_dim(),
            Precision::Bf16 => BLOCK_SIZE * self.padded_dim() / 2,
        }
    }

    fn block_words(&self) -> usize {
        self.num_layers * self.num_kv_heads * 2 * self.plane()
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(&self) -> usize {
        self.block_words() * size_of::<u32>()
    }
}

/// Blocks of keys and values on the host. Memory is taken when a block is first used and then kept.
///
/// For each block, layer and head the keys come first, then the values, in the order in which
/// attention reads them: in f32 keys are `[dim][32 positions]` and values `[32 positions][dim]`; in
/// bf16 the two values of a pair lie side by side, keys `[dim / 2][32 positions][2]` and values
/// `[16 pairs of positions][dim][2]`.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    num_blocks: usize,
    words: Buffer<u32>,
}

impl KvCache {
    /// An empty cache of `num_blocks` blocks.
    ///
    /// # Errors
    /// The system does not give the address space.
    pub fn new(shape: KvShape, num_blocks: usize) -> std::io::Result<Self> {
        Ok(Self { shape, num_blocks, words: Buffer::zeroed(num_blocks.saturating_mul(shape.block_words()))? })
    }

    /// The shape it was made for.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// How many blocks there are.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Where the keys of a head begin, in [`words`](Self::words); its values follow after
    /// [`KvShape::plane`] words.
    pub(super) fn offset(&self, layer: usize, block: BlockId, head: usize) -> usize {
        let shape = &self.shape;
        block as usize * shape.block_words() + (layer * shape.num_kv_heads + head) * 2 * shape.plane()
    }

    pub(super) fn words_mut(&mut self) -> &mut [u32] {
        self.words.as_mut_slice()
    }

    /// Copies a block's first `slots` positions, of every layer, to another block. The values of its
    /// other positions are cleared: attention weighs what it must not see with zero, which only
    /// does what it should if the values are numbers.
    ///
    /// # Panics
    /// If there is no such block, or both are the same.
    pub fn copy(&mut self, from: BlockId, to: BlockId, slots: usize) {
        let (size, plane, dim) = (self.shape.block_words(), self.shape.plane(), self.shape.padded_dim());
        let precision = self.shape.precision;
        let words = self.words.as_mut_slice();
        let (from, to) = (from as usize * size, to as usize * size);
        assert!(from != to && from.max(to) + size <= words.len(), "blocks {from} and {to} of {} words", words.len());
        words.copy_within(from..from + size, to);
        for head in words[to..to + size].chunks_exact_mut(2 * plane) {
            let values = &mut head[plane..];
            match precision {
                Precision::F32 => values[slots.min(BLOCK_SIZE) * dim..].fill(0),
                Precision::Bf16 => {
                    let whole = slots.min(BLOCK_SIZE) / 2 * dim;
                    if slots % 2 == 1 && slots < BLOCK_SIZE {
                        // The low half is the first position of the pair.
                        values[whole..whole + dim].iter_mut().for_each(|pair| *pair &= 0xffff);
                    }
                    values[slots.div_ceil(2).min(BLOCK_SIZE / 2) * dim..].fill(0);
                }
            }
        }
    }
}
