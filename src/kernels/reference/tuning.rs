//! The reference's tuning kernels: plain candle operations, differentiable.
//!
//! candle's fused norm, rope and softmax have no backward and say nothing when one is asked for,
//! so nothing here uses them.

use std::ops::Range;

use candle_core::{D, Device, Result, Tensor, bail};

use super::{
    attention::{alibi, attend, causal_mask, relative},
    products,
};
use crate::kernels::{
    Activation, AttentionParams, Kernels, Tuning,
    cross::EncodedBatch,
    layout::{BatchLayout, Segment},
    past::PastKeyValues,
    weight::Linear,
    widened,
};

/// A tuning job on the reference backend: it keeps nothing.
#[derive(Debug)]
pub struct ReferenceTuning {
    device: Device,
}

impl ReferenceTuning {
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone() }
    }
}

impl Tuning for ReferenceTuning {
    fn kernels(
        &self,
        batch: &BatchLayout,
        past: Option<PastKeyValues>,
        encoded: Option<EncodedBatch>,
    ) -> Result<Box<dyn Kernels>> {
        Ok(Box::new(ReferenceTuningKernels { past, encoded, ..ReferenceTuningKernels::new(batch, &self.device)? }))
    }
}

/// Attention over whole sequences that lie one after another in the packed rows; no cache.
///
/// Sequences may begin with the same rows: these are then computed once, and their gradient is the
/// sum over the sequences.
#[derive(Debug)]
pub struct ReferenceTuningKernels {
    /// `[sequences * longest]`: the packed row of each place in a right-padded batch.
    pad: Tensor,
    /// `[t]`: the place in the padded batch of each packed row.
    unpad: Tensor,
    /// `[longest, longest]`, the causal mask of each window that was asked for.
    masks: Vec<(Option<usize>, Tensor)>,
    sequences: usize,
    longest: usize,
    past: Option<PastKeyValues>,
    /// The rows of each sequence's own.
    own: Vec<Range<usize>>,
    /// What the encoder made of each sequence's input.
    encoded: Option<EncodedBatch>,
}

impl ReferenceTuningKernels {
    /// Kernels for the sequences of a batch, each of at least one row.
    ///
    /// # Errors
    /// The device has no memory for the indices.
    pub fn new(batch: &BatchLayout, device: &Device) -> Result<Self> {
        let prefix = batch.shared;
        let longest = prefix + batch.segments.iter().map(|segment| segment.rows).max().unwrap_or(0);
        let mut pad = Vec::with_capacity(batch.segments.len() * longest);
        // The prefix's rows come out the same in each sequence; the first one's are taken.
        let mut unpad: Vec<u32> = (0..prefix as u32).collect();
        let own: Vec<_> = batch.rows().collect();
        for (i, rows) in own.iter().enumerate() {
            if rows.is_empty() {
                bail!("sequence {i} of the batch has no rows of its own");
            }
            pad.extend(0..prefix as u32);
            // Padding comes after a sequence's rows, so the causal mask alone keeps it unseen;
            // any row will do for it.
            pad.extend((0..longest - prefix).map(|j| (rows.start + j.min(rows.len() - 1)) as u32));
            unpad.extend((0..rows.len()).map(|j| (i * longest + prefix + j) as u32));
        }
        Ok(Self {
            pad: Tensor::new(pad, device)?,
            unpad: Tensor::new(unpad, device)?,
            masks: Vec::new(),
            sequences: own.len(),
            longest,
            past: None,
            own,
            encoded: None,
        })
    }

    /// With these past key values, if there are any, in place of the shared rows' own.
    pub fn with_past(self, past: impl Into<Option<PastKeyValues>>) -> Self {
        Self { past: past.into(), ..self }
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
            let of = |x: &Tensor, rows: &Range<usize>| x.narrow(0, rows.start, rows.len());
            out.push(attend(
                &of(q, own)?,
                &of(k, seen)?,
                &of(v, seen)?,
                &Segment::new(own.len(), 0, Vec::new()),
                params,
            )?);
        }
        Tensor::cat(&out, 0)
    }

    /// All rows of the longest sequence.
    fn whole(&self) -> Segment {
        Segment::new(self.longest, 0, Vec::new())
    }

    /// The mask of a window.
    fn mask(&mut self, window: Option<usize>) -> Result<Tensor> {
        if let Some((_, mask)) = self.masks.iter().find(|(w, _)| *w == window) {
            return Ok(mask.clone());
        }
        let mask = causal_mask(window, &self.whole(), self.longest, self.pad.device())?;
        self.masks.push((window, mask.clone()));
        Ok(mask)
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

impl Kernels for ReferenceTuningKernels {
    fn linear(&mut self, x: &Tensor, layers: &[&Linear], residual: Option<&Tensor>) -> Result<Vec<Tensor>> {
        products::linear(x, layers, residual)
    }

    fn gated_linear(&mut self, activation: Activation, gate: &Linear, up: &Linear, x: &Tensor) -> Result<Tensor> {
        products::gated_linear(self, activation, gate, up, x)
    }

    fn rope(&mut self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        rotate(x, cos, sin)
    }

    fn attention(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        let (k, v) = &match &self.past {
            Some(past) => past.replace(layer, k, v)?,
            None => (k.clone(), v.clone()),
        };
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
            scores = scores
                .broadcast_add(&alibi(slopes, &self.whole(), self.longest, q.device())?.to_dtype(scores.dtype())?)?;
        }
        if let Some(bias) = &params.relative_position_bias {
            let bias = relative(bias, &self.whole(), self.longest, q.device())?;
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

/// Rotary embedding, as [`Kernels::rope`] says.
pub(super) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
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
        let mut kernels = ReferenceTuningKernels::new(&BatchLayout::of_lengths(prefix, &lengths), &device).unwrap();
        let shared = kernels.attention(0, &q, &k, &v, &params).unwrap().to_vec2::<f32>().unwrap();
        let mut start = prefix;
        for length in lengths {
            let rows: Vec<u32> = (0..prefix).chain(start..start + length).map(|r| r as u32).collect();
            let index = Tensor::new(rows.as_slice(), &device).unwrap();
            let pick = |x: &Tensor| x.index_select(&index, 0).unwrap();
            let mut kernels =
                ReferenceTuningKernels::new(&BatchLayout::of_lengths(0, &[prefix + length]), &device).unwrap();
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
