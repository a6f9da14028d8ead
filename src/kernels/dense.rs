//! Plain candle operations: differentiable, and the reference that the other kernels are held to.
//!
//! candle's fused norm, rope and softmax have no backward and say nothing when one is asked for,
//! so nothing here uses them.

use candle_core::{D, Device, Result, Tensor};

use super::{AttentionParams, Kernels, distance_bias::DistanceBias, given::GivenKeyValues, widened};

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
    given: Option<GivenKeyValues>,
    /// The keys and values of each layer, where they are asked for.
    recorded: Option<Vec<(Tensor, Tensor)>>,
    /// The rows of each sequence, if each has its own.
    lengths: Vec<usize>,
    /// Keys and values of an encoder's output, by sequence and layer.
    encoded: Vec<Vec<(Tensor, Tensor)>>,
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
        let mut start = prefix;
        for (i, &length) in lengths.iter().enumerate() {
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
            lengths: if prefix == 0 { lengths.to_vec() } else { Vec::new() },
            encoded: Vec::new(),
        })
    }

    /// With these keys and values in place of the first rows' own.
    pub fn with_given(self, given: GivenKeyValues) -> Self {
        Self { given: Some(given), ..self }
    }

    /// Keeps the keys and values of each layer, `[t, kv_heads, head_dim]`, as attention reads them.
    pub fn recording(self) -> Self {
        Self { recorded: Some(Vec::new()), ..self }
    }

    /// What was recorded, layer by layer.
    pub fn into_recorded(self) -> Vec<(Tensor, Tensor)> {
        self.recorded.unwrap_or_default()
    }

    /// With what an encoder made of each sequence's input: for each layer of the decoder keys and
    /// values `[positions, kv_heads, head_dim]`.
    pub fn with_encoded(self, encoded: Vec<Vec<(Tensor, Tensor)>>) -> Self {
        Self { encoded, ..self }
    }

    /// Each sequence's rows of `q` against all of its keys and values.
    fn unmasked(&self, q: &Tensor, keys: &[(Tensor, Tensor)], params: &AttentionParams) -> Result<Tensor> {
        let (t, heads, dim) = q.dims3()?;
        if self.lengths.iter().sum::<usize>() != t || keys.len() != self.lengths.len() {
            candle_core::bail!("{t} rows and {} inputs do not fit sequences of {:?}", keys.len(), self.lengths)
        }
        let mut first = 0;
        let mut out = Vec::with_capacity(keys.len());
        for (&rows, (k, v)) in self.lengths.iter().zip(keys) {
            let (positions, kv_heads, _) = k.dims3()?;
            let heads_first = |x: &Tensor| {
                let x = x.unsqueeze(2)?.expand((positions, kv_heads, heads / kv_heads, dim))?;
                x.reshape((positions, heads, dim))?.transpose(0, 1)?.contiguous()
            };
            let q = q.narrow(0, first, rows)?.transpose(0, 1)?.contiguous()?;
            let scores = (q.matmul(&heads_first(k)?.t()?)? * f64::from(params.scale))?;
            let mut scores = scores.to_dtype(widened(q.dtype()))?;
            if let Some(softcap) = params.softcap.map(f64::from) {
                scores = ((scores / softcap)?.tanh()? * softcap)?;
            }
            if let Some(bias) = &params.distance_bias {
                scores = (&scores + distances(bias, rows, positions, q.device())?.to_dtype(scores.dtype())?)?;
            }
            let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(v.dtype())?;
            out.push(weights.matmul(&heads_first(v)?)?.transpose(0, 1)?.reshape((rows, heads * dim))?);
            first += rows;
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
            let mut first = 0;
            let own = |&rows: &usize| {
                first += rows;
                Ok((k.narrow(0, first - rows, rows)?, v.narrow(0, first - rows, rows)?))
            };
            let keys = self.lengths.iter().map(own).collect::<Result<Vec<_>>>()?;
            return self.unmasked(q, &keys, params);
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
        if let Some(bias) = &params.distance_bias {
            let bias = distances(bias, self.longest, self.longest, q.device())?;
            scores = scores.broadcast_add(&bias.to_dtype(scores.dtype())?)?;
        }
        let scores = scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(v.dtype())?;
        let out = weights.matmul(&v)?.transpose(1, 2)?.contiguous()?;
        out.reshape((self.sequences * self.longest, heads * dim))?.index_select(&self.unpad, 0)
    }

    fn cross_attention(&mut self, layer: usize, q: &Tensor, params: &AttentionParams) -> Result<Tensor> {
        let of = |layers: &Vec<(Tensor, Tensor)>| match layers.get(layer) {
            Some((k, v)) => Ok((k.clone(), v.clone())),
            None => candle_core::bail!("layer {layer} has no keys and values of an encoder"),
        };
        let keys = self.encoded.iter().map(of).collect::<Result<Vec<_>>>()?;
        self.unmasked(q, &keys, params)
    }
}

/// `[heads, queries, keys]`: what is added to each score for the distance, both counted from 0.
fn distances(bias: &DistanceBias, queries: usize, keys: usize, device: &Device) -> Result<Tensor> {
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
