//! The key-value cache of all sequences in fixed-size blocks, so that sequences join and leave the
//! batch without anything being copied, and can share what they have in common.

use std::any::Any;

use candle_core::{DType, Device, Result, Tensor, bail};
use half::bf16;

use super::{Buffer, Precision};
use crate::kernels::{
    KvCache,
    host::with_values,
    layout::{BLOCK_SIZE, BlockId, KvShape},
};

/// The shape of a cache in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    pub num_layers: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub precision: Precision,
}

impl CacheShape {
    /// How a model's keys and values are kept: in bf16 or f32.
    pub fn of(shape: &KvShape) -> Self {
        let KvShape { num_layers, num_kv_heads, head_dim, dtype } = *shape;
        let precision = if dtype == DType::BF16 { Precision::Bf16 } else { Precision::F32 };
        Self { num_layers, num_kv_heads, head_dim, precision }
    }

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
pub struct CpuKvCache {
    of: KvShape,
    shape: CacheShape,
    num_blocks: usize,
    words: Buffer<u32>,
}

impl CpuKvCache {
    /// An empty cache of `num_blocks` blocks.
    ///
    /// # Errors
    /// The system does not give the address space.
    pub fn new(shape: KvShape, num_blocks: usize) -> std::io::Result<Self> {
        // At least as many words as the cache has: if they can be counted, so can every offset into it.
        let most = [num_blocks, shape.num_layers, shape.num_kv_heads, 2 * BLOCK_SIZE]
            .into_iter()
            .try_fold(shape.head_dim.checked_next_multiple_of(32).unwrap_or(usize::MAX), usize::checked_mul);
        if most.is_none() {
            return Err(std::io::Error::new(std::io::ErrorKind::OutOfMemory, "more words than can be counted"));
        }
        let (of, shape) = (shape, CacheShape::of(&shape));
        Ok(Self { of, shape, num_blocks, words: Buffer::zeroed(num_blocks * shape.block_words())? })
    }

    /// Its shape in memory.
    pub(super) fn layout(&self) -> CacheShape {
        self.shape
    }

    /// Where the keys of a head begin, in [`words`](Self::words); its values follow after
    /// [`CacheShape::plane`] words.
    pub(super) fn offset(&self, layer: usize, block: BlockId, head: usize) -> usize {
        let shape = &self.shape;
        block as usize * shape.block_words() + (layer * shape.num_kv_heads + head) * 2 * shape.plane()
    }

    /// All of its memory.
    pub(super) fn words_mut(&mut self) -> &mut [u32] {
        self.words.as_mut_slice()
    }

    /// Writes one position of one head whose keys begin at the word `at`.
    fn write_slot(&mut self, at: usize, slot: usize, key: &[f32], value: &[f32]) {
        let (precision, plane, dim) = (self.shape.precision, self.shape.plane(), self.shape.padded_dim());
        let (keys, values) = self.words.as_mut_slice()[at..at + 2 * plane].split_at_mut(plane);
        if slot == 0 {
            // As where attention writes: what is weighed with zero must be a number.
            values.fill(0);
        }
        let rounded = |x: f32| u32::from(bf16::from_f32(x).to_bits());
        let half = |word: &mut u32, second: bool, bits: u32| {
            *word = if second { *word & 0xffff | bits << 16 } else { *word & 0xffff_0000 | bits };
        };
        for (d, (k, v)) in key.iter().zip(value).enumerate() {
            match precision {
                Precision::F32 => {
                    keys[d * BLOCK_SIZE + slot] = k.to_bits();
                    values[slot * dim + d] = v.to_bits();
                }
                Precision::Bf16 => {
                    half(&mut keys[d / 2 * BLOCK_SIZE + slot], d % 2 == 1, rounded(*k));
                    half(&mut values[slot / 2 * dim + d], slot % 2 == 1, rounded(*v));
                }
            }
        }
    }
}

impl KvCache for CpuKvCache {
    fn shape(&self) -> &KvShape {
        &self.of
    }

    fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// The values of its other positions are cleared: attention weighs what it must not see with zero, which only
    /// does what it should if the values are numbers.
    fn copy(&mut self, from: BlockId, to: BlockId, slots: usize) -> Result<()> {
        let (size, plane, dim) = (self.shape.block_words(), self.shape.plane(), self.shape.padded_dim());
        let precision = self.shape.precision;
        if from == to || from.max(to) as usize >= self.num_blocks {
            bail!("block {from} cannot be copied to block {to} of {}", self.num_blocks);
        }
        let words = self.words.as_mut_slice();
        let (from, to) = (from as usize * size, to as usize * size);
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
        Ok(())
    }

    fn write(&mut self, layer: usize, blocks: &[BlockId], start: usize, keys: &Tensor, values: &Tensor) -> Result<()> {
        let CacheShape { num_layers, num_kv_heads, head_dim, .. } = self.shape;
        let (heads, rows, dim) = keys.dims3()?;
        if layer >= num_layers || (heads, dim) != (num_kv_heads, head_dim) || values.dims() != keys.dims() {
            bail!(
                "keys {:?} and values {:?} were given for layer {layer} of {:?}",
                keys.dims(),
                values.dims(),
                self.shape
            )
        }
        let has_blocks = start + rows <= blocks.len() * BLOCK_SIZE;
        if !has_blocks || blocks.iter().any(|&block| block as usize >= self.num_blocks) {
            bail!("positions {start} to {} do not lie in the blocks {blocks:?}", start + rows)
        }
        let plain = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32);
        let (keys, values) = (plain(keys)?, plain(values)?);
        with_values(&keys, |keys| {
            with_values(&values, |values| {
                for (i, (key, value)) in keys.chunks_exact(dim).zip(values.chunks_exact(dim)).enumerate() {
                    let position = start + i % rows;
                    let at = self.offset(layer, blocks[position / BLOCK_SIZE], i / rows);
                    self.write_slot(at, position % BLOCK_SIZE, key, value);
                }
                Ok(())
            })
        })
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{
        AttentionParams, Kernels as _,
        cpu::{Isa, serving::CpuServing},
        layout::Segment,
    };

    #[test]
    fn what_is_written_is_attended_to_as_what_was_computed() {
        let (heads, kv_heads, rows, positions) = (4, 2, 37, 45);
        for (dtype, dim) in [(DType::F32, 16), (DType::F32, 20), (DType::BF16, 32), (DType::BF16, 20)] {
            let shape = KvShape { num_layers: 2, num_kv_heads: kv_heads, head_dim: dim, dtype };
            let random = |heads| Tensor::randn(0f32, 1.0, (positions, heads, dim), &Device::Cpu).unwrap();
            let (q, k, v) = (random(heads), random(kv_heads), random(kv_heads));
            let blocks = [2, 0];
            let attend = |cache: &mut CpuKvCache, start: usize, rows: usize| {
                let part = |x: &Tensor| x.narrow(0, start, rows).unwrap();
                let segment = [Segment::new(rows, start, blocks.to_vec())];
                let mut kernels = CpuServing::with_isa(cache, &segment, Isa::best());
                let params = AttentionParams::scaled((dim as f32).powf(-0.5));
                let out = kernels.attention(1, &part(&q), &part(&k), &part(&v), &params).unwrap();
                out.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            let mut computed = CpuKvCache::new(shape, 3).unwrap();
            attend(&mut computed, 0, rows);
            let expected = attend(&mut computed, rows, positions - rows);
            for chunk in [1, 5, rows] {
                let mut written = CpuKvCache::new(shape, 3).unwrap();
                if dim == written.layout().padded_dim() {
                    written.words_mut().fill(f32::NAN.to_bits());
                }
                for start in (0..rows).step_by(chunk) {
                    let part =
                        |x: &Tensor| x.narrow(0, start, chunk.min(rows - start)).unwrap().transpose(0, 1).unwrap();
                    written.write(1, &blocks, start, &part(&k), &part(&v)).unwrap();
                }
                let found = attend(&mut written, rows, positions - rows);
                assert!(found == expected, "{dtype:?} {dim}, {chunk} at a time");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let shape = KvShape { num_layers: 1, num_kv_heads: 2, head_dim: 4, dtype: DType::F32 };
        let mut cache = CpuKvCache::new(shape, 2).unwrap();
        let of = |heads, rows, dim| Tensor::zeros((heads, rows, dim), DType::BF16, &Device::Cpu).unwrap();
        let good = of(2, 3, 4);
        assert!(cache.write(0, &[1], 29, &good, &good).is_ok());
        for (layer, blocks, start, keys) in
            [(1, [1], 0, good.clone()), (0, [2], 0, good.clone()), (0, [1], 30, good.clone()), (0, [1], 0, of(1, 3, 4))]
        {
            assert!(cache.write(layer, &blocks, start, &keys, &good).is_err(), "{layer} {blocks:?} {start}");
        }
        assert!(cache.write(0, &[1], 0, &good, &of(2, 2, 4)).is_err());
    }
}
