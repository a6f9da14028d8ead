//! Serving kernels for a CPU, over the blocks of a [`KvCache`].
//!
//! Every row is computed by itself, in one order, so its result does not depend on which other
//! rows are in the step.

use candle_core::{Device, Result, Tensor, bail};

use super::{
    Activation, AttentionParams, Kernels,
    cpu::{
        Isa, attention, pool, rows,
        tensors::with_values,
        unmasked::{self, Heads, Span},
    },
    cross::CrossKeyValues,
    kv_cache::{BlockId, KvCache},
};

/// Consecutive packed rows that belong to one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// How many rows.
    pub rows: usize,
    /// The first row's position in its sequence; earlier positions are in the cache.
    pub start: usize,
    /// The sequence's blocks, position p in block p / BLOCK_SIZE; none for the rows of an encoder, of
    /// which nothing is kept.
    pub blocks: Vec<BlockId>,
}

/// The kernels of one step. Tensors are f32, whatever the precision of weights and cache.
#[derive(Debug)]
pub struct PagedKernels<'a> {
    cache: &'a mut KvCache,
    segments: &'a [Segment],
    /// For each segment, what its encoder made; empty for a model without an encoder.
    encoded: &'a [&'a CrossKeyValues],
    isa: Isa,
}

impl<'a> PagedKernels<'a> {
    /// Kernels for packed rows that lie as `segments` says, in that order.
    pub fn new(cache: &'a mut KvCache, segments: &'a [Segment]) -> Self {
        Self::with_isa(cache, segments, Isa::best())
    }

    /// As [`new`](Self::new), with other instructions than the best.
    pub fn with_isa(cache: &'a mut KvCache, segments: &'a [Segment], isa: Isa) -> Self {
        Self { cache, segments, encoded: &[], isa }
    }

    /// With an encoder's output for each segment, in their order.
    pub fn with_encoded(self, encoded: &'a [&'a CrossKeyValues]) -> Self {
        Self { encoded, ..self }
    }

    /// Attention among the rows of each segment, before and after.
    fn unmasked(&self, q: &Tensor, k: &Tensor, v: &Tensor, params: &AttentionParams) -> Result<Tensor> {
        let ((t, heads, head_dim), kv_heads) = (q.dims3()?, k.dim(1)?);
        let rows: usize = self.segments.iter().map(|s| s.rows).sum();
        if t != rows || k.dims() != [t, kv_heads, head_dim] || v.dims() != k.dims() || params.window.is_some() {
            bail!("attention was given {:?} and {:?} for an encoder's {rows} rows", q.dims(), k.dims())
        }
        let width = kv_heads * head_dim;
        let y = with_values(q, |q| {
            with_values(k, |k| {
                with_values(v, |v| {
                    let mut first = 0;
                    let span = |segment: &Segment| {
                        let part = first * width..(first + segment.rows) * width;
                        first += segment.rows;
                        Span { rows: segment.rows, keys: &k[part.clone()], values: &v[part] }
                    };
                    let spans: Vec<Span> = self.segments.iter().map(span).collect();
                    Ok(unmasked::attend(pool::global(), &spans, q, Heads { heads, kv_heads, head_dim }, params))
                })
            })
        })?;
        Tensor::from_vec(y, (t, heads * head_dim), &Device::Cpu)
    }
}

impl Kernels for PagedKernels<'_> {
    fn rms_norm(&mut self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        let y = with_values(weight, |weight| {
            with_values(x, |x| Ok(rows::rms_norm(self.isa, pool::global(), x, weight, eps as f32)))
        })?;
        Tensor::from_vec(y, x.shape(), &Device::Cpu)
    }

    fn layer_norm(&mut self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        let bias = bias.map(|b| with_values(b, |b| Ok(b.to_vec()))).transpose()?;
        let y = with_values(weight, |weight| {
            with_values(x, |x| Ok(rows::layer_norm(self.isa, pool::global(), x, weight, bias.as_deref(), eps as f32)))
        })?;
        Tensor::from_vec(y, x.shape(), &Device::Cpu)
    }

    fn rope(&mut self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let (t, _, dim) = x.dims3()?;
        let y = with_values(cos, |cos| {
            with_values(sin, |sin| with_values(x, |x| Ok(rows::rope(self.isa, pool::global(), x, t, dim, cos, sin))))
        })?;
        Tensor::from_vec(y, x.shape(), &Device::Cpu)
    }

    fn activate(&mut self, activation: Activation, x: &Tensor) -> Result<Tensor> {
        let (_, width) = x.dims2()?;
        let y = with_values(x, |x| Ok(rows::activate(self.isa, pool::global(), activation, x, width)))?;
        Tensor::from_vec(y, x.shape(), &Device::Cpu)
    }

    fn gated(&mut self, activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        self.activate(activation, gate)? * up
    }

    fn attention(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        if !params.causal {
            return self.unmasked(q, k, v, params);
        }
        let (t, heads, head_dim) = q.dims3()?;
        let rows: usize = self.segments.iter().map(|s| s.rows).sum();
        let shape = self.cache.shape();
        if t != rows || k.dims() != [t, shape.num_kv_heads, shape.head_dim] || head_dim != shape.head_dim {
            candle_core::bail!(
                "attention was given {:?} and {:?} for a step of {rows} rows and {shape:?}",
                q.dims(),
                k.dims()
            );
        }
        let y = with_values(q, |q| {
            with_values(k, |k| {
                with_values(v, |v| {
                    let rows = attention::Rows { q, k, v, heads, params };
                    Ok(attention::attend(self.isa, pool::global(), self.cache, layer, self.segments, rows))
                })
            })
        })?;
        Tensor::from_vec(y, (t, heads * head_dim), &Device::Cpu)
    }

    fn cross_attention(&mut self, layer: usize, q: &Tensor, params: &AttentionParams) -> Result<Tensor> {
        let (t, heads, head_dim) = q.dims3()?;
        let rows: usize = self.segments.iter().map(|s| s.rows).sum();
        if t != rows || self.encoded.len() != self.segments.len() {
            let (encoded, segments) = (self.encoded.len(), self.segments.len());
            bail!("cross-attention was given {t} rows and {encoded} inputs for {rows} rows of {segments} sequences")
        }
        let mut spans = Vec::with_capacity(self.segments.len());
        let mut kv_heads = 1;
        for (segment, encoded) in self.segments.iter().zip(self.encoded) {
            let found = encoded.layer(layer)?;
            kv_heads = found.keys.len() / (encoded.positions() * head_dim).max(1);
            spans.push(Span { rows: segment.rows, keys: &found.keys, values: &found.values });
        }
        let shape = Heads { heads, kv_heads, head_dim };
        let y = with_values(q, |q| Ok(unmasked::attend(pool::global(), &spans, q, shape, params)))?;
        Tensor::from_vec(y, (t, heads * head_dim), &Device::Cpu)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::D;

    use super::*;
    use crate::kernels::{
        cpu::Precision,
        cross::EncodedBatch,
        dense::DenseKernels,
        kv_cache::{BLOCK_SIZE, KvShape},
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
        fn paged(&self, isa: Isa, precision: Precision, chunk: usize) -> Tensor {
            let (_, num_kv_heads, head_dim) = self.k.dims3().unwrap();
            let shape = KvShape { num_layers: 2, num_kv_heads, head_dim, precision };
            let mut cache = KvCache::new(shape, 32).unwrap();
            if head_dim == shape.padded_dim() {
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
                        segments.push(Segment { rows, start: done[i], blocks: tables[i].clone() });
                        index.extend((0..rows).map(|j| (starts[i] + done[i] + j) as u32));
                        owners.push((i, rows));
                        done[i] += rows;
                    }
                }
                let index = Tensor::new(index, &Device::Cpu).unwrap();
                let pick = |x: &Tensor| x.index_select(&index, 0).unwrap();
                let mut kernels = PagedKernels::with_isa(&mut cache, &segments, isa);
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
            let mut cache = KvCache::new(
                KvShape { num_layers: 1, num_kv_heads: kv_heads, head_dim: dim, precision: Precision::F32 },
                1,
            )
            .unwrap();
            let segment = |&rows: &usize| Segment { rows, start: 0, blocks: Vec::new() };
            let segments: Vec<_> = lengths.iter().map(segment).collect();
            // The queries of one sequence against the keys of another.
            let encoded =
                EncodedBatch { layers: vec![(case.k.clone(), case.v.clone())], inputs: vec![18..58, 1..18, 0..1] };
            let of = |input: &std::ops::Range<usize>| {
                CrossKeyValues::of_rows(&encoded.layers, input.start, input.len()).unwrap()
            };
            let kept: Vec<_> = encoded.inputs.iter().map(of).collect();
            let kept: Vec<_> = kept.iter().collect();
            let mut dense = DenseKernels::new(&lengths, &Device::Cpu).unwrap().with_encoded(encoded.clone());
            let mut paged = PagedKernels::new(&mut cache, &segments).with_encoded(&kept);
            let own = paged.attention(0, &case.q, &case.k, &case.v, &biased).unwrap();
            let cross = paged.cross_attention(0, &case.q, &params).unwrap();
            let expected = dense.attention(0, &case.q, &case.k, &case.v, &biased).unwrap();
            assert!(largest_difference(&own, &expected) < 2e-5);
            assert!(largest_difference(&cross, &dense.cross_attention(0, &case.q, &params).unwrap()) < 2e-5);
            assert!(paged.cross_attention(1, &case.q, &params).is_err(), "there is one layer");
            let [q, k, v] = [&case.q, &case.k, &case.v].map(|x| x.narrow(0, 1, 17).unwrap());
            let mut alone = PagedKernels::new(&mut cache, &segments[1..2]).with_encoded(&kept[1..2]);
            let part = |x: &Tensor| bits(&x.narrow(0, 1, 17).unwrap());
            assert!(bits(&alone.attention(0, &q, &k, &v, &biased).unwrap()) == part(&own));
            assert!(bits(&alone.cross_attention(0, &q, &params).unwrap()) == part(&cross));
            let mut none = PagedKernels::new(&mut cache, &segments);
            assert!(none.cross_attention(0, &case.q, &params).is_err(), "there is no encoder's output");
        }
    }

    /// Every option of attention, for so many heads.
    fn options(heads: usize, scale: f32) -> Vec<AttentionParams> {
        let plain = AttentionParams::scaled(scale);
        let slopes: std::sync::Arc<[f32]> = (1..=heads as i32).map(|i| 0.7f32.powi(i)).collect();
        vec![
            AttentionParams { window: Some(24), ..plain.clone() },
            AttentionParams { window: Some(1), ..plain.clone() },
            AttentionParams { window: Some(33), softcap: Some(3.0), ..plain.clone() },
            AttentionParams { softcap: Some(0.5), scale: 1.0, ..plain.clone() },
            AttentionParams { alibi_slopes: Some(slopes.clone()), ..plain.clone() },
            AttentionParams { alibi_slopes: Some(slopes), window: Some(32), softcap: Some(5.0), ..plain.clone() },
            AttentionParams { relative_position_bias: Some(bias(heads)), scale: 0.3, ..plain.clone() },
            plain,
        ]
    }

    #[test]
    fn paged_attention_equals_dense_attention_on_odd_shapes_and_any_chunks_are_equal_bit_for_bit() {
        for (heads, kv_heads, dim) in [(6, 2, 20), (9, 3, 64), (2, 2, 128), (7, 1, 96), (4, 4, 16)] {
            let mut case = Case::new(&[1, 31, 32, 33, 70], heads, kv_heads, dim);
            for params in options(heads, (dim as f32).powf(-0.5)) {
                case.params = params;
                let mut dense = DenseKernels::new(&case.lengths, &Device::Cpu).unwrap();
                let expected = dense.attention(1, &case.q, &case.k, &case.v, &case.params).unwrap();
                for isa in Isa::available() {
                    for (precision, tolerance) in [(Precision::F32, 2e-5), (Precision::Bf16, 5e-2)] {
                        let what = format!("{isa:?} {precision:?} {dim} {:?}", case.params);
                        let whole = case.paged(isa, precision, 100);
                        let difference = largest_difference(&whole, &expected);
                        assert!(difference < tolerance, "{what}: {difference}");
                        for chunk in [1, 7, 32] {
                            let chunked = case.paged(isa, precision, chunk);
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
            for precision in [Precision::F32, Precision::Bf16] {
                let expected = case.paged(isa, precision, 100);
                for shared in [1, 8, 13, 31] {
                    let shape = KvShape { num_layers: 2, num_kv_heads: kv_heads, head_dim: dim, precision };
                    let mut cache = KvCache::new(shape, 4).unwrap();
                    cache.words_mut().fill(f32::NAN.to_bits());
                    let attend = |cache: &mut KvCache, start: usize, rows: usize, blocks: &[BlockId]| {
                        let part = |x: &Tensor| x.narrow(0, start, rows).unwrap();
                        let segment = [Segment { rows, start, blocks: blocks.to_vec() }];
                        let mut kernels = PagedKernels::with_isa(cache, &segment, isa);
                        kernels.attention(1, &part(&case.q), &part(&case.k), &part(&case.v), &case.params).unwrap()
                    };
                    attend(&mut cache, 0, 32, &[0]);
                    cache.copy(0, 2, shared);
                    let rest = attend(&mut cache, shared, 40 - shared, &[2, 3]);
                    let expected = expected.narrow(0, shared, 40 - shared).unwrap();
                    assert!(bits(&rest) == bits(&expected), "{isa:?} {precision:?}, {shared} shared");
                }
            }
        }
    }

    #[test]
    fn norms_rope_and_activations_equal_the_plain_ones() {
        for isa in Isa::available() {
            let shape = KvShape { num_layers: 1, num_kv_heads: 1, head_dim: 8, precision: Precision::F32 };
            let mut cache = KvCache::new(shape, 1).unwrap();
            let mut fast = PagedKernels::with_isa(&mut cache, &[], isa);
            let mut plain = DenseKernels::new(&[5], &Device::Cpu).unwrap();
            for (rows, heads, dim) in [(5, 3, 8), (1, 1, 64), (700, 2, 40)] {
                let matrix = |n: usize| random((1, rows, n)).squeeze(0).unwrap();
                for rotated in [dim, dim / 4] {
                    let (x, cos, sin) = (random((rows, heads, dim)), matrix(rotated / 2), matrix(rotated / 2));
                    let (a, b) = (fast.rope(&x, &cos, &sin).unwrap(), plain.rope(&x, &cos, &sin).unwrap());
                    assert!(largest_difference(&a, &b) < 1e-5, "{isa:?}");
                }
                let vector = || random((1, 1, dim)).flatten_all().unwrap();
                let (x, w, bias) = (matrix(dim), vector(), vector());
                let (a, b) = (fast.rms_norm(&x, &w, 1e-5).unwrap(), plain.rms_norm(&x, &w, 1e-5).unwrap());
                assert!(largest_difference(&a, &b) < 1e-4, "{isa:?}");
                for bias in [None, Some(&bias)] {
                    let a = fast.layer_norm(&x, &w, bias, 1e-5).unwrap();
                    let b = plain.layer_norm(&x, &w, bias, 1e-5).unwrap();
                    assert!(largest_difference(&a, &b) < 1e-4, "{isa:?}");
                }
                let x = (x * 4.0).unwrap();
                for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
                    let (a, b) = (fast.activate(activation, &x).unwrap(), plain.activate(activation, &x).unwrap());
                    assert!(largest_difference(&a, &b) < 1e-5, "{isa:?} {activation:?}");
                }
            }
        }
    }
}
