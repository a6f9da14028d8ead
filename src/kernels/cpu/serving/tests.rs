//! The serving kernels against the reference, on odd shapes, for every instruction set.

use candle_core::{D, DType};

use super::*;
use crate::kernels::{
    KvCache as _,
    cross::EncodedBatch,
    layout::{BLOCK_SIZE, BatchLayout, BlockId, KvShape},
    reference::tuning::ReferenceTuningKernels,
    relative_position_bias::RelativePositionBias,
};

fn random(shape: (usize, usize, usize)) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(D::Minus1).unwrap().to_scalar().unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// The reference for whole sequences of these lengths.
fn plain(lengths: &[usize]) -> ReferenceTuningKernels {
    ReferenceTuningKernels::new(&BatchLayout::of_lengths(0, lengths), &Device::Cpu).unwrap()
}

/// Lengths of sequences, and what is attended of them.
struct Case {
    lengths: Vec<usize>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: AttentionParams,
}

impl Case {
    fn new(lengths: &[usize], heads: usize, kv_heads: usize, dim: usize) -> Self {
        let total = lengths.iter().sum();
        Self {
            lengths: lengths.to_vec(),
            q: random((total, heads, dim)),
            k: random((total, kv_heads, dim)),
            v: random((total, kv_heads, dim)),
            params: AttentionParams::scaled((dim as f32).powf(-0.5)),
        }
    }

    /// All of it, `chunk` rows of each sequence at a time, over blocks that lie scattered and
    /// hold what is no number (but in the padding, which nothing ever writes).
    fn in_blocks(&self, isa: Isa, dtype: DType, chunk: usize) -> Tensor {
        let (_, num_kv_heads, head_dim) = self.k.dims3().unwrap();
        let shape = KvShape { num_layers: 2, num_kv_heads, head_dim, dtype };
        let mut cache = CpuKvCache::new(shape, 32).unwrap();
        if head_dim == cache.layout().padded_dim() {
            cache.words_mut().fill(f32::NAN.to_bits());
        }
        let mut tables = Vec::new();
        let mut next = 0;
        for length in &self.lengths {
            let blocks = length.div_ceil(BLOCK_SIZE) as u32;
            // Neighbours in a sequence are not neighbours in the cache.
            tables.push((next..next + blocks).map(|b| (b * 13) % 32).collect::<Vec<_>>());
            next += blocks;
        }
        let starts: Vec<usize> = self.lengths.iter().scan(0, |s, l| Some(std::mem::replace(s, *s + l))).collect();
        let mut done = vec![0; self.lengths.len()];
        let mut outputs: Vec<Vec<Tensor>> = vec![Vec::new(); self.lengths.len()];
        while done != self.lengths {
            let (mut segments, mut index, mut owners) = (Vec::new(), Vec::new(), Vec::new());
            for i in 0..self.lengths.len() {
                let rows = chunk.min(self.lengths[i] - done[i]);
                if rows > 0 {
                    segments.push(Segment::new(rows, done[i], tables[i].clone()));
                    index.extend((0..rows).map(|j| (starts[i] + done[i] + j) as u32));
                    owners.push((i, rows));
                    done[i] += rows;
                }
            }
            let index = Tensor::new(index, &Device::Cpu).unwrap();
            let pick = |x: &Tensor| x.index_select(&index, 0).unwrap();
            let mut kernels = CpuServing::with_isa(&mut cache, &segments, isa);
            let out = kernels.attention(1, &pick(&self.q), &pick(&self.k), &pick(&self.v), &self.params).unwrap();
            let mut at = 0;
            for (i, rows) in owners {
                outputs[i].push(out.narrow(0, at, rows).unwrap());
                at += rows;
            }
        }
        Tensor::cat(&outputs.concat(), 0).unwrap()
    }
}

fn bias(heads: usize) -> std::sync::Arc<RelativePositionBias> {
    RelativePositionBias::new(heads, 20, |head, distance| (head as f32 + 0.3 * distance as f32).sin()).into()
}

#[test]
fn attention_without_a_mask_and_to_an_encoders_output_equals_the_dense_one_and_is_the_same_alone() {
    let lengths = [1, 17, 40];
    for (heads, kv_heads, dim) in [(6, 2, 20), (4, 4, 16), (3, 1, 64)] {
        let case = Case::new(&lengths, heads, kv_heads, dim);
        let params = AttentionParams { causal: false, softcap: Some(4.0), ..AttentionParams::scaled(0.4) };
        let biased = AttentionParams { relative_position_bias: Some(bias(heads)), ..params.clone() };
        let mut cache =
            CpuKvCache::new(KvShape { num_layers: 1, num_kv_heads: kv_heads, head_dim: dim, dtype: DType::F32 }, 1)
                .unwrap();
        let segment = |&rows: &usize| Segment::new(rows, 0, Vec::new());
        let segments: Vec<_> = lengths.iter().map(segment).collect();
        // The queries of one sequence against the keys of another.
        let encoded =
            EncodedBatch { layers: vec![(case.k.clone(), case.v.clone())], inputs: vec![18..58, 1..18, 0..1] };
        let of = |input: &std::ops::Range<usize>| {
            CrossKeyValues::of_rows(&encoded.layers, input.start, input.len()).unwrap()
        };
        let kept: Vec<_> = encoded.inputs.iter().map(of).collect();
        let kept: Vec<_> = kept.iter().collect();
        let mut plainly = plain(&lengths).with_encoded(encoded.clone());
        let mut served = CpuServing::new(&mut cache, &segments).with_encoded(&kept);
        let own = served.attention(0, &case.q, &case.k, &case.v, &biased).unwrap();
        let cross = served.cross_attention(0, &case.q, &params).unwrap();
        let expected = plainly.attention(0, &case.q, &case.k, &case.v, &biased).unwrap();
        assert!(largest_difference(&own, &expected) < 2e-5);
        assert!(largest_difference(&cross, &plainly.cross_attention(0, &case.q, &params).unwrap()) < 2e-5);
        assert!(served.cross_attention(1, &case.q, &params).is_err(), "there is one layer");
        let [q, k, v] = [&case.q, &case.k, &case.v].map(|x| x.narrow(0, 1, 17).unwrap());
        let mut alone = CpuServing::new(&mut cache, &segments[1..2]).with_encoded(&kept[1..2]);
        let part = |x: &Tensor| bits(&x.narrow(0, 1, 17).unwrap());
        assert!(bits(&alone.attention(0, &q, &k, &v, &biased).unwrap()) == part(&own));
        assert!(bits(&alone.cross_attention(0, &q, &params).unwrap()) == part(&cross));
        let mut none = CpuServing::new(&mut cache, &segments);
        assert!(none.cross_attention(0, &case.q, &params).is_err(), "there is no encoder's output");
    }
}

/// Every option of attention, for so many heads.
fn options(heads: usize, scale: f32) -> Vec<AttentionParams> {
    let params = AttentionParams::scaled(scale);
    let slopes: std::sync::Arc<[f32]> = (1..=heads as i32).map(|i| 0.7f32.powi(i)).collect();
    vec![
        AttentionParams { window: Some(24), ..params.clone() },
        AttentionParams { window: Some(1), ..params.clone() },
        AttentionParams { window: Some(33), softcap: Some(3.0), ..params.clone() },
        AttentionParams { softcap: Some(0.5), scale: 1.0, ..params.clone() },
        AttentionParams { alibi_slopes: Some(slopes.clone()), ..params.clone() },
        AttentionParams { alibi_slopes: Some(slopes), window: Some(32), softcap: Some(5.0), ..params.clone() },
        AttentionParams { relative_position_bias: Some(bias(heads)), scale: 0.3, ..params.clone() },
        params,
    ]
}

#[test]
fn paged_attention_equals_dense_attention_on_odd_shapes_and_any_chunks_are_equal_bit_for_bit() {
    for (heads, kv_heads, dim) in [(6, 2, 20), (9, 3, 64), (2, 2, 128), (7, 1, 96), (4, 4, 16)] {
        let mut case = Case::new(&[1, 31, 32, 33, 70], heads, kv_heads, dim);
        for params in options(heads, (dim as f32).powf(-0.5)) {
            case.params = params;
            let mut plainly = plain(&case.lengths);
            let expected = plainly.attention(1, &case.q, &case.k, &case.v, &case.params).unwrap();
            for isa in Isa::available() {
                for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::BF16, 1e-1)] {
                    let what = format!("{isa:?} {dtype:?} {dim} {:?}", case.params);
                    let whole = case.in_blocks(isa, dtype, 100);
                    let difference = largest_difference(&whole, &expected);
                    assert!(difference < tolerance, "{what}: {difference}");
                    for chunk in [1, 7, 32] {
                        let chunked = case.in_blocks(isa, dtype, chunk);
                        assert!(bits(&chunked) == bits(&whole), "{what}, chunks of {chunk}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_copied_block_continues_as_the_original_does() {
    let (heads, kv_heads, dim) = (4, 2, 32);
    let case = Case::new(&[40], heads, kv_heads, dim);
    for isa in Isa::available() {
        for dtype in [DType::F32, DType::BF16] {
            let expected = case.in_blocks(isa, dtype, 100);
            for shared in [1, 8, 13, 31] {
                let shape = KvShape { num_layers: 2, num_kv_heads: kv_heads, head_dim: dim, dtype };
                let mut cache = CpuKvCache::new(shape, 4).unwrap();
                cache.words_mut().fill(f32::NAN.to_bits());
                let attend = |cache: &mut CpuKvCache, start: usize, rows: usize, blocks: &[BlockId]| {
                    let part = |x: &Tensor| x.narrow(0, start, rows).unwrap();
                    let segment = [Segment::new(rows, start, blocks.to_vec())];
                    let mut kernels = CpuServing::with_isa(cache, &segment, isa);
                    kernels.attention(1, &part(&case.q), &part(&case.k), &part(&case.v), &case.params).unwrap()
                };
                attend(&mut cache, 0, 32, &[0]);
                cache.copy(0, 2, shared).unwrap();
                let rest = attend(&mut cache, shared, 40 - shared, &[2, 3]);
                let expected = expected.narrow(0, shared, 40 - shared).unwrap();
                assert!(bits(&rest) == bits(&expected), "{isa:?} {dtype:?}, {shared} shared");
            }
        }
    }
}

#[test]
fn norms_rope_and_activations_equal_the_plain_ones() {
    for isa in Isa::available() {
        let shape = KvShape { num_layers: 1, num_kv_heads: 1, head_dim: 8, dtype: DType::F32 };
        let mut cache = CpuKvCache::new(shape, 1).unwrap();
        let mut fast = CpuServing::with_isa(&mut cache, &[], isa);
        let mut plainly = plain(&[5]);
        for (rows, heads, dim) in [(5, 3, 8), (1, 1, 64), (700, 2, 40)] {
            let matrix = |n: usize| random((1, rows, n)).squeeze(0).unwrap();
            for rotated in [dim, dim / 4] {
                let (x, cos, sin) = (random((rows, heads, dim)), matrix(rotated / 2), matrix(rotated / 2));
                let (a, b) = (fast.rope(&x, &cos, &sin).unwrap(), plainly.rope(&x, &cos, &sin).unwrap());
                assert!(largest_difference(&a, &b) < 1e-5, "{isa:?}");
            }
            let vector = || random((1, 1, dim)).flatten_all().unwrap();
            let (x, w, bias) = (matrix(dim), vector(), vector());
            let (a, b) = (fast.rms_norm(&x, &w, 1e-5).unwrap(), plainly.rms_norm(&x, &w, 1e-5).unwrap());
            assert!(largest_difference(&a, &b) < 1e-4, "{isa:?}");
            for bias in [None, Some(&bias)] {
                let a = fast.layer_norm(&x, &w, bias, 1e-5).unwrap();
                let b = plainly.layer_norm(&x, &w, bias, 1e-5).unwrap();
                assert!(largest_difference(&a, &b) < 1e-4, "{isa:?}");
            }
            let x = (x * 4.0).unwrap();
            for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
                let (a, b) = (fast.activate(activation, &x).unwrap(), plainly.activate(activation, &x).unwrap());
                assert!(largest_difference(&a, &b) < 1e-5, "{isa:?} {activation:?}");
            }
        }
    }
}
