//! Keys and values of all sequences in fixed-size blocks, so that sequences join and leave the
//! batch without anything being copied.

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
}

impl KvShape {
    /// f32 values of one block's keys, or its values, in one layer.
    fn plane(&self) -> usize {
        self.num_kv_heads * BLOCK_SIZE * self.head_dim
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(&self) -> usize {
        self.num_layers * 2 * self.plane() * size_of::<f32>()
    }
}

/// Blocks of f32 keys and values on the host. Memory is taken when a block is first used and then
/// kept.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    /// For each block `[layers, 2, kv_heads, BLOCK_SIZE, head_dim]`; empty until first used.
    blocks: Vec<Box<[f32]>>,
}

impl KvCache {
    /// An empty cache of at most `num_blocks` blocks.
    pub fn new(shape: KvShape, num_blocks: usize) -> Self {
        Self { shape, blocks: (0..num_blocks).map(|_| Box::default()).collect() }
    }

    /// The shape it was made for.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// How many blocks there can be.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Writes one position's keys and values, each `[kv_heads, head_dim]`, into a block's slot.
    pub fn write(&mut self, layer: usize, block: BlockId, slot: usize, k: &[f32], v: &[f32]) {
        let KvShape { num_layers, num_kv_heads, head_dim } = self.shape;
        let plane = self.shape.plane();
        let data = &mut self.blocks[block as usize];
        if data.is_empty() {
            *data = vec![0.0; num_layers * 2 * plane].into_boxed_slice();
        }
        let (keys, values) = data[layer * 2 * plane..][..2 * plane].split_at_mut(plane);
        for head in 0..num_kv_heads {
            let to = (head * BLOCK_SIZE + slot) * head_dim;
            keys[to..to + head_dim].copy_from_slice(&k[head * head_dim..][..head_dim]);
            values[to..to + head_dim].copy_from_slice(&v[head * head_dim..][..head_dim]);
        }
    }

    /// Copies the first `slots` positions of a block, in every layer, into another block.
    pub fn copy(&mut self, from: BlockId, to: BlockId, slots: usize) {
        let (width, row) = (self.shape.head_dim, BLOCK_SIZE * self.shape.head_dim);
        if from == to || self.blocks[from as usize].is_empty() {
            return;
        }
        let mut target = std::mem::take(&mut self.blocks[to as usize]);
        let source = &self.blocks[from as usize];
        if target.is_empty() {
            target = vec![0.0; source.len()].into_boxed_slice();
        }
        for (target, source) in target.chunks_exact_mut(row).zip(source.chunks_exact(row)) {
            target[..slots * width].copy_from_slice(&source[..slots * width]);
        }
        self.blocks[to as usize] = target;
    }

    /// The keys and the values of one head in a block, each `[BLOCK_SIZE, head_dim]`.
    pub fn head(&self, layer: usize, block: BlockId, head: usize) -> (&[f32], &[f32]) {
        let plane = self.shape.plane();
        let size = BLOCK_SIZE * self.shape.head_dim;
        let data = &self.blocks[block as usize][layer * 2 * plane..][..2 * plane];
        (&data[head * size..][..size], &data[plane + head * size..][..size])
    }
}
