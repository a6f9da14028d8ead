//! Plain candle operations: differentiable, and the reference that the other kernels are held to.
//!
//! candle's fused norm, rope and softmax have no backward and say nothing when one is asked for,
//! so nothing here uses them.

use std::ops::Range;

use candle_core::{D, Device, Result, Tensor, bail};

use super::{
    AttentionParams, Kernels, cross::EncodedBatch, past::PastKeyValues, relative_position_bias::RelativePositionBias,
    widened,
};

/// Attention over whole sequences that lie one after another in the packed rows; no cache.
///
/// Sequences may begin with the same rows: these are then computed once, and their gradient is the
/// sum over the sequences.
#[derive(Debug)]
pub struct DenseKernels {
    /// `[sequences * longest]`: the packed row of each place in a right-padded batch.
    pad: Tensor,
    /// `[t]`: the place in the padded batch of each packed row.
    unpad: Tensor,
    /// `[longest, longest]` for each window that was asked for: 0 where row i sees column j, -inf elsewhere.
    masks: Vec<(Option<usize>, Tensor)>,
    sequences: usize,
    longest: usize,
    given: Option<PastKeyValues>,
    /// The keys and values of each layer, where they are asked for.
    recorded: Option<Vec<(Tensor, Tensor)>>,
    /// The rows of each sequence's own.
    own: Vec<Range<usize>>,
    /// What the encoder made of each sequence's input.
    encoded: Option<EncodedBatch>,
}

impl DenseKernels {
    /// Kernels for sequences of these lengths, each at least 1, packed in this order.
    pub fn new(lengths: &[usize], device: &Device) -> Result<Self> {
        Self::with_prefix(0, lengths, device)
    }

    /// Kernels for sequences that all begin with the first `prefix` packed rows, which lie there
    /// once, and go on with rows of their own, `lengths`, each at least 1, packed in this order.
    pub fn with_prefix(prefix: usize, lengths: &[usize], device: &Device) -> Result<Self> {
        let longest = prefix + lengths.iter().copied().max().unwrap_or(0);
        let mut pad = Vec::with_capacity(lengths.len() * longest);
        // The prefix's rows come out the same in each sequence; the first one's are taken.
        let mut unpad: Vec<u32> = (0..prefix as u32).collect();
        let mut own = Vec::with_capacity(lengths.len());
        let mut start = prefix;
        for (i, &length) in lengths.iter().enumerate() {
            own.push(start..start + length);
            pad.extend(0..prefix as u32);
            // Padding comes after a sequence's rows, so the causal mask alone keeps it unseen;
            // any row will do for it.
            pad.extend((0..longest - prefix).map(|j| (start + j.min(length - 1)) as u32));
            unpad.extend((0..length).map(|j| (i * longest + prefix + j) as u32));
            start += length;
        }
        Ok(Self {
            pad: Tensor::new(pad, device)?,
            unpad: Tensor::new(unpad, device)?,
            masks: Vec::new(),
            sequences: lengths.len(),
            longest,
            given: None,
            recorded: None,
            own,
            encoded: None,
        })
    }

    /// With these keys and values, if there are any, in place of the first rows' own.
    pub fn with_past(self, given: impl Into<Option<PastKeyValues>>) -> Self {
        Self { given: given.into(), ..self }
    }

    /// Keeps the keys and values of each layer, `[t, kv_heads, head_dim]`, as attention reads them.
    pub fn recording(self) -> Self {
        Self { recorded: Some(Vec::new()), ..self }
    }

    /// What was recorded, layer by layer.
    pub fn into_recorded(self) -> Vec<(Tensor, Tensor)> {
        self.recorded.unwrap_or_default()
    }

    /// With what an encoder made of each sequence's input, if there is one.
    pub fn with_encoded(self, encoded: impl Into<Option<EncodedBatch>>) -> Self {
        Self { encoded: encoded.into(), ..self }
    }

    /// Each sequence's own rows of `q` against all of its keys and values, `seen`. Rows that sequences
    /// share see none and come out zero.
    fn unmasked(
        &self,
        q: &Tensor,
        (k, v): (&Tensor, &Tensor),
        seen: &[Range<usize>],
        params: &AttentionParams,
    ) -> Result<Tensor> {
        let (t, heads, dim) = q.dims3()?;
        if self.own.last().map_or(0, |last| last.end) != t || seen.len() != self.own.len() {
            bail!("{t} rows and {} inputs do not fit the sequences {:?}", seen.len(), self.own)
        }
        let shared = self.own.first().map_or(0, |first| first.start);
        let mut out = Vec::with_capacity(1 + seen.len());
        if shared > 0 {
            out.push(Tensor::zeros((shared, heads * dim), q.dtype(), q.device())?);
        }
        for (own, seen) in self.own.iter().zip(seen) {
            let (kv_heads, rows, keys) = (k.dim(1)?, own.len(), seen.len());
            let heads_first = |x: &Tensor| {
                let x = x.narrow(0, seen.start, keys)?.unsqueeze(2)?;
                let x = x.expand((keys, kv_heads, heads / kv_heads, dim))?;
                x.reshape((keys, heads, dim))?.transpose(0, 1)?.contiguous()
            };
            let q = q.narrow(0, own.start, rows)?.transpose(0, 1)?.contiguous()?;
            let scores = (q.matmul(&heads_first(k)?.t()?)? * f64::from(params.scale))?;
            let mut scores = scores.to_dtype(widened(q.dtype()))?;
            if let Some(softcap) = params.softcap.map(f64::from) {
                scores = ((scores / softcap)?.tanh()? * softcap)?;
            }
            if let Some(bias) = &params.relative_position_bias {
                scores = (&scores + distances(bias, rows, keys, q.device())?.to_dtype(scores.dtype())?)?;
            }
            let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(v.dtype())?;
            out.push(weights.matmul(&heads_first(v)?)?.transpose(0, 1)?.reshape((rows, heads * dim))?);
        }
        Tensor::cat(&out, 0)
    }

    /// The mask of a window.
    fn mask(&mut self, window: Option<usize>) -> Result<Tensor> {
        if let Some((_, mask)) = self.masks.iter().find(|(w, _)| *w == window) {
            return Ok(mask.clone());
        }
        let sees = |i: usize, j: usize| j <= i && window.is_none_or(|w| i - j < w);
        let value = |i, j| if sees(i, j) { 0f32 } else { f32::NEG_INFINITY };
        let values: Vec<f32> = (0..self.longest).flat_map(|i| (0..self.longest).map(move |j| value(i, j))).collect();
        let mask = Tensor::from_vec(values, (self.longest, self.longest), self.pad.device())?;
        self.masks.push((window, mask.clone()));
        Ok(mask)
    }

    /// `[heads, longest, longest]`: what ALiBi adds to the score of row i and column j.
    fn alibi(&self, slopes: &[f32]) -> Result<Tensor> {
        let distance = |i, j| (j as f32) - (i as f32);
        let values: Vec<f32> = (0..self.longest).flat_map(|i| (0..self.longest).map(move |j| distance(i, j))).collect();
        let distances = Tensor::from_vec(values, (1, self.longest, self.longest), self.pad.device())?;
        Tensor::new(slopes, self.pad.device())?.reshape((slopes.len(), 1, 1))?.broadcast_mul(&distances)
    }

    /// `[t, heads, d]` to `[sequences, heads, longest, d]`, each key head repeated `groups` times.
    fn batch(&self, x: &Tensor, groups: usize) -> Result<Tensor> {
        let (_, heads, dim) = x.dims3()?;
        let (b, l) = (self.sequences, self.longest);
        let x = x.index_select(&self.pad, 0)?.reshape((b, l, heads, dim))?.transpose(1, 2)?;
        let x = match groups {
            1 => x,
            _ => x.unsqueeze(2)?.expand((b, heads, groups, l, dim))?.reshape((b, heads * groups, l, dim))?,
        };
        x.contiguous()
    }
}

impl Kernels for DenseKernels {
    fn rms_norm(&mut self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        let wide = x.to_dtype(widened(x.dtype()))?;
        let mean_square = wide.sqr()?.mean_keepdim(D::Minus1)?;
        wide.broadcast_div(&(mean_square + eps)?.sqrt()?)?.to_dtype(x.dtype())?.broadcast_mul(weight)
    }

    fn rope(&mut self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let (half, dim) = (cos.dim(D::Minus1)?, x.dim(D::Minus1)?);
        let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
        let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        match dim - 2 * half {
            0 => Tensor::cat(&[first, second], D::Minus1),
            rest => Tensor::cat(&[first, second, x.narrow(D::Minus1, 2 * half, rest)?], D::Minus1),
        }
    }

    fn attention(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        let (k, v) = &match &self.given {
            Some(given) => given.replace(layer, k, v)?,
            None => (k.clone(), v.clone()),
        };
        if let Some(recorded) = &mut self.recorded {
            recorded.push((k.clone(), v.clone()));
        }
        if !params.causal {
            return self.unmasked(q, (k, v), &self.own, params);
        }
        let (_, heads, dim) = q.dims3()?;
        let groups = heads / k.dim(1)?;
        let mask = self.mask(params.window)?;
        let (q, k, v) = (self.batch(q, 1)?, self.batch(k, groups)?, self.batch(v, groups)?);
        let scores = (q.matmul(&k.t()?)? * f64::from(params.scale))?;
        let mut scores = scores.to_dtype(widened(q.dtype()))?;
        if let Some(softcap) = params.softcap.map(f64::from) {
            scores = ((scores / softcap)?.tanh()? * softcap)?;
        }
        if let Some(slopes) = &params.alibi_slopes {
            scores = scores.broadcast_add(&self.alibi(slopes)?.to_dtype(scores.dtype())?)?;
        }
        if let Some(bias) = &params.relative_position_bias {
            let bias = distances(bias, self.longest, self.longest, q.device())?;
            scores = scores.broadcast_add(&bias.to_dtype(scores.dtype())?)?;
        }
        let scores = scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(v.dtype())?;
        let out = weights.matmul(&v)?.transpose(1, 2)?.contiguous()?;
        out.reshape((self.sequences * self.longest, heads * dim))?.index_select(&self.unpad, 0)
    }

    fn cross_attention(&mut self, layer: usize, q: &Tensor, params: &AttentionParams) -> Result<Tensor> {
        let Some(encoded) = &self.encoded else {
            bail!("layer {layer} attends to an encoder's output, and there is none")
        };
        self.unmasked(q, encoded.layer(layer, self.own.len())?, &encoded.inputs, params)
    }
}

/// `[heads, queries, keys]`: what is added to each score for the distance, both counted from 0.
fn distances(bias: &RelativePositionBias, queries: usize, keys: usize, device: &Device) -> Result<Tensor> {
    let heads = bias.heads();
    let places = (0..heads).flat_map(|h| (0..queries).flat_map(move |i| (0..keys).map(move |j| (h, i, j))));
    let values: Vec<f32> = places.map(|(head, query, key)| bias.at(head, query, key)).collect();
    Tensor::from_vec(values, (heads, queries, keys), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_that_is_shared_gives_what_each_sequence_gives_with_its_own_copy() {
        let device = Device::Cpu;
        let (prefix, lengths) = (3, [4, 1, 2]);
        let random = |heads: usize| Tensor::randn(0f32, 1.0, (prefix + 7, heads, 8), &device).unwrap();
        let (q, k, v) = (random(4), random(2), random(2));
        let params = AttentionParams { window: Some(5), ..AttentionParams::scaled(0.3) };
        let mut kernels = DenseKernels::with_prefix(prefix, &lengths, &device).unwrap();
        let shared = kernels.attention(0, &q, &k, &v, &params).unwrap().to_vec2::<f32>().unwrap();
        let mut start = prefix;
        for length in lengths {
            let rows: Vec<u32> = (0..prefix).chain(start..start + length).map(|r| r as u32).collect();
            let index = Tensor::new(rows.as_slice(), &device).unwrap();
            let pick = |x: &Tensor| x.index_select(&index, 0).unwrap();
            let mut kernels = DenseKernels::new(&[prefix + length], &device).unwrap();
            let alone =
                kernels.attention(0, &pick(&q), &pick(&k), &pick(&v), &params).unwrap().to_vec2::<f32>().unwrap();
            for (row, alone) in rows.iter().zip(&alone) {
                for (a, b) in shared[*row as usize].iter().zip(alone) {
                    assert!((a - b).abs() < 1e-5, "row {row}");
                }
            }
            start += length;
        }
    }
}
