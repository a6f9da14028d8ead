//! Serving kernels: candle's fused norm and rope, and attention over the blocks of a [`KvCache`].
//!
//! Every row is computed by itself, in one order, so its result does not depend on which other
//! rows are in the step.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::{
    Kernels, dot,
    kv_cache::{BLOCK_SIZE, BlockId, KvCache},
};

/// Consecutive packed rows that belong to one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// How many rows.
    pub rows: usize,
    /// The first row's position in its sequence; earlier positions are in the cache.
    pub start: usize,
    /// The sequence's blocks, position p in block p / BLOCK_SIZE.
    pub blocks: Vec<BlockId>,
}

/// The kernels of one step.
#[derive(Debug)]
pub struct PagedKernels<'a> {
    cache: &'a mut KvCache,
    segments: &'a [Segment],
    /// For each packed row: its segment, and its position.
    rows: Vec<(usize, usize)>,
}

impl<'a> PagedKernels<'a> {
    /// Kernels for packed rows that lie as `segments` says, in that order.
    pub fn new(cache: &'a mut KvCache, segments: &'a [Segment]) -> Self {
        let rows = segments.iter().enumerate().flat_map(|(i, s)| (0..s.rows).map(move |j| (i, s.start + j))).collect();
        Self { cache, segments, rows }
    }

    /// One row's attention: `q` and `out` are `[heads, head_dim]`.
    fn attend(&self, layer: usize, row: usize, q: &[f32], groups: usize, out: &mut [f32], scores: &mut Vec<f32>) {
        let (segment, position) = self.rows[row];
        let blocks = &self.segments[segment].blocks;
        let head_dim = self.cache_head_dim();
        let scale = (head_dim as f32).powf(-0.5);
        for (head, (q, out)) in q.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)).enumerate() {
            scores.clear();
            let mut max = f32::NEG_INFINITY;
            for_each_block(blocks, position, |block, used| {
                let (keys, _) = self.cache.head(layer, block, head / groups);
                for key in keys.chunks_exact(head_dim).take(used) {
                    let score = dot(q, key) * scale;
                    max = max.max(score);
                    scores.push(score);
                }
            });
            let mut sum = 0.0;
            for score in scores.iter_mut() {
                *score = (*score - max).exp();
                sum += *score;
            }
            out.fill(0.0);
            let mut weights = scores.iter();
            for_each_block(blocks, position, |block, used| {
                let (_, values) = self.cache.head(layer, block, head / groups);
                for (value, weight) in values.chunks_exact(head_dim).take(used).zip(weights.by_ref().take(used)) {
                    for (o, v) in out.iter_mut().zip(value) {
                        *o += weight * v;
                    }
                }
            });
            out.iter_mut().for_each(|o| *o /= sum);
        }
    }

    fn cache_head_dim(&self) -> usize {
        self.cache.shape().head_dim
    }
}

impl Kernels for PagedKernels<'_> {
    fn rms_norm(&mut self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        candle_nn::ops::rms_norm(&x.contiguous()?, weight, eps as f32)
    }

    fn rope(&mut self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        candle_nn::rotary_emb::rope_thd(&x.unsqueeze(0)?.contiguous()?, cos, sin)?.squeeze(0)
    }

    fn attention(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (t, heads, head_dim) = q.dims3()?;
        let kv_heads = k.dim(1)?;
        if t != self.rows.len() {
            candle_core::bail!("attention was given {t} rows for a step of {}", self.rows.len());
        }
        let (keys, values) = (host(k)?, host(v)?);
        let width = kv_heads * head_dim;
        for (row, (key, value)) in keys.chunks_exact(width).zip(values.chunks_exact(width)).enumerate() {
            let (segment, position) = self.rows[row];
            let block = self.segments[segment].blocks[position / BLOCK_SIZE];
            self.cache.write(layer, block, position % BLOCK_SIZE, key, value);
        }
        let queries = host(q)?;
        let mut out = vec![0f32; t * heads * head_dim];
        let this = &*self;
        out.par_chunks_exact_mut(heads * head_dim)
            .zip(queries.par_chunks_exact(heads * head_dim))
            .enumerate()
            .for_each_init(Vec::new, |scores, (row, (out, q))| {
                this.attend(layer, row, q, heads / kv_heads, out, scores);
            });
        Tensor::from_vec(out, (t, heads * head_dim), &Device::Cpu)?.to_device(q.device())?.to_dtype(q.dtype())
    }
}

/// Calls `f` with each block that holds positions 0…=`last`, and how many of them it holds.
fn for_each_block(blocks: &[BlockId], last: usize, mut f: impl FnMut(BlockId, usize)) {
    let mut left = last + 1;
    for &block in blocks {
        if left == 0 {
            break;
        }
        let used = left.min(BLOCK_SIZE);
        f(block, used);
        left -= used;
    }
}

fn host(x: &Tensor) -> Result<Vec<f32>> {
    x.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::D;

    use crate::kernels::{dense::DenseKernels, kv_cache::KvShape};

    fn random(shape: (usize, usize, usize)) -> Tensor {
        Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
    }

    fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(D::Minus1).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn paged_attention_equals_dense_attention_over_odd_lengths_in_any_chunks() {
        let (heads, kv_heads, dim) = (6, 2, 20);
        let shape = KvShape { num_layers: 2, num_kv_heads: kv_heads, head_dim: dim };
        let lengths = [1, 31, 32, 33, 70];
        let total: usize = lengths.iter().sum();
        let (q, k, v) = (random((total, heads, dim)), random((total, kv_heads, dim)), random((total, kv_heads, dim)));
        let expected = DenseKernels::new(&lengths, &Device::Cpu).unwrap().attention(1, &q, &k, &v).unwrap();
        for chunk in [1, 7, 32, 100] {
            let mut cache = KvCache::new(shape, 32);
            let mut tables = Vec::new();
            let mut next = 0;
            for length in lengths {
                let blocks = length.div_ceil(BLOCK_SIZE) as u32;
                // Scattered on purpose: neighbours in a sequence are not neighbours in the cache.
                tables.push((next..next + blocks).map(|b| (b * 13) % 32).collect::<Vec<_>>());
                next += blocks;
            }
            let starts: Vec<usize> = lengths.iter().scan(0, |s, l| Some(std::mem::replace(s, *s + l))).collect();
            let mut done = vec![0; lengths.len()];
            let mut outputs: Vec<Vec<Tensor>> = vec![Vec::new(); lengths.len()];
            while done != lengths {
                let mut segments = Vec::new();
                let mut index = Vec::new();
                let mut owners = Vec::new();
                for i in 0..lengths.len() {
                    let rows = chunk.min(lengths[i] - done[i]);
                    if rows > 0 {
                        segments.push(Segment { rows, start: done[i], blocks: tables[i].clone() });
                        index.extend((0..rows).map(|j| (starts[i] + done[i] + j) as u32));
                        owners.push((i, rows));
                        done[i] += rows;
                    }
                }
                let index = Tensor::new(index, &Device::Cpu).unwrap();
                let pick = |x: &Tensor| x.index_select(&index, 0).unwrap();
                let mut kernels = PagedKernels::new(&mut cache, &segments);
                let out = kernels.attention(1, &pick(&q), &pick(&k), &pick(&v)).unwrap();
                let mut at = 0;
                for (i, rows) in owners {
                    outputs[i].push(out.narrow(0, at, rows).unwrap());
                    at += rows;
                }
            }
            let got = Tensor::cat(&outputs.concat(), 0).unwrap();
            assert!(largest_difference(&got, &expected) < 1e-5, "chunks of {chunk}");
        }
    }

    #[test]
    fn fused_norm_and_rope_equal_the_plain_ones() {
        let mut cache = KvCache::new(KvShape { num_layers: 1, num_kv_heads: 1, head_dim: 8 }, 1);
        let mut fused = PagedKernels::new(&mut cache, &[]);
        let mut plain = DenseKernels::new(&[5], &Device::Cpu).unwrap();
        let x = random((5, 3, 8));
        let (cos, sin) = (random((1, 5, 4)).squeeze(0).unwrap(), random((1, 5, 4)).squeeze(0).unwrap());
        let (a, b) = (fused.rope(&x, &cos, &sin).unwrap(), plain.rope(&x, &cos, &sin).unwrap());
        assert!(largest_difference(&a, &b) < 1e-6);
        let (x, w) = (random((1, 5, 24)).squeeze(0).unwrap(), random((1, 1, 24)).flatten_all().unwrap());
        let (a, b) = (fused.rms_norm(&x, &w, 1e-5).unwrap(), plain.rms_norm(&x, &w, 1e-5).unwrap());
        assert!(largest_difference(&a, &b) < 1e-5);
    }
}
