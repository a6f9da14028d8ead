//! The key-value cache as two tensors a layer, one row a position.

use std::any::Any;

use candle_core::{Device, Result, Tensor, bail};

use crate::kernels::{
    KvCache,
    layout::{BLOCK_SIZE, BlockId, KvShape},
};

/// Keys and values of each layer, `[num_blocks * BLOCK_SIZE, num_kv_heads, head_dim]`.
#[derive(Debug)]
pub struct ReferenceKvCache {
    shape: KvShape,
    num_blocks: usize,
    layers: Vec<(Tensor, Tensor)>,
}

impl ReferenceKvCache {
    /// An empty cache of `num_blocks` blocks.
    ///
    /// # Errors
    /// There is no memory.
    pub fn new(shape: KvShape, num_blocks: usize, device: &Device) -> Result<Self> {
        let rows = (num_blocks * BLOCK_SIZE, shape.num_kv_heads, shape.head_dim);
        let zeros = || Tensor::zeros(rows, shape.dtype, device);
        let layers = (0..shape.num_layers).map(|_| Ok((zeros()?, zeros()?))).collect::<Result<_>>()?;
        Ok(Self { shape, num_blocks, layers })
    }

    /// Writes keys and values `[rows, num_kv_heads, head_dim]` to the positions from `start` of a sequence that has
    /// these blocks.
    ///
    /// # Errors
    /// A shape does not fit, or there is no such layer or block.
    pub fn write_rows(
        &mut self,
        layer: usize,
        blocks: &[BlockId],
        start: usize,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<()> {
        let KvShape { num_kv_heads, head_dim, dtype, .. } = self.shape;
        let (rows, heads, dim) = keys.dims3()?;
        let fits = (heads, dim) == (num_kv_heads, head_dim) && values.dims() == keys.dims();
        let Some((to_keys, to_values)) = self.layers.get(layer).filter(|_| fits) else {
            bail!("keys {:?} and values {:?} do not fit layer {layer} of {:?}", keys.dims(), values.dims(), self.shape)
        };
        self.check(blocks, start + rows)?;
        let (keys, values) = (keys.to_dtype(dtype)?.contiguous()?, values.to_dtype(dtype)?.contiguous()?);
        let mut done = 0;
        while done < rows {
            let (block, slot) = ((start + done) / BLOCK_SIZE, (start + done) % BLOCK_SIZE);
            let n = (BLOCK_SIZE - slot).min(rows - done);
            let at = blocks[block] as usize * BLOCK_SIZE + slot;
            to_keys.slice_set(&keys.narrow(0, done, n)?, 0, at)?;
            to_values.slice_set(&values.narrow(0, done, n)?, 0, at)?;
            done += n;
        }
        Ok(())
    }

    /// Keys and values of a layer at the first `positions` positions of a sequence that has these blocks, both
    /// `[positions, num_kv_heads, head_dim]` in the cache's type.
    ///
    /// # Errors
    /// There is no such layer or block.
    pub fn gather(&self, layer: usize, blocks: &[BlockId], positions: usize) -> Result<(Tensor, Tensor)> {
        self.check(blocks, positions)?;
        let Some((keys, values)) = self.layers.get(layer) else {
            bail!("the cache has {} layers, and layer {layer} attends", self.layers.len())
        };
        let row = |p: usize| blocks[p / BLOCK_SIZE] * BLOCK_SIZE as u32 + (p % BLOCK_SIZE) as u32;
        let rows = Tensor::new((0..positions).map(row).collect::<Vec<_>>(), keys.device())?;
        Ok((keys.index_select(&rows, 0)?, values.index_select(&rows, 0)?))
    }

    fn check(&self, blocks: &[BlockId], end: usize) -> Result<()> {
        if end > blocks.len() * BLOCK_SIZE || blocks.iter().any(|&block| block as usize >= self.num_blocks) {
            bail!("{end} positions do not lie in the blocks {blocks:?} of {}", self.num_blocks)
        }
        Ok(())
    }
}

impl KvCache for ReferenceKvCache {
    fn shape(&self) -> &KvShape {
        &self.shape
    }

    fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    fn copy(&mut self, from: BlockId, to: BlockId, slots: usize) -> Result<()> {
        if from == to || from.max(to) as usize >= self.num_blocks {
            bail!("block {from} cannot be copied to block {to} of {}", self.num_blocks);
        }
        for tensor in self.layers.iter().flat_map(|(keys, values)| [keys, values]) {
            // slice_set does not take a part of the tensor that it writes to.
            let part = tensor.narrow(0, from as usize * BLOCK_SIZE, slots.min(BLOCK_SIZE))?.copy()?;
            tensor.slice_set(&part, 0, to as usize * BLOCK_SIZE)?;
        }
        Ok(())
    }

    fn write(&mut self, layer: usize, blocks: &[BlockId], start: usize, keys: &Tensor, values: &Tensor) -> Result<()> {
        let device = self.layers.first().map_or(Device::Cpu, |(keys, _)| keys.device().clone());
        let rows_first = |x: &Tensor| x.to_device(&device)?.transpose(0, 1);
        self.write_rows(layer, blocks, start, &rows_first(keys)?, &rows_first(values)?)
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
