//! Serving kernels for a CPU, over the blocks of a [`CpuKvCache`].
//!
//! Every row is computed by itself, in one order, so its result does not depend on which other
//! rows are in the step.

use candle_core::{Device, Result, Tensor, bail};

use super::{
    Isa, attention, frozen,
    kv_cache::CpuKvCache,
    pool, rows,
    unmasked::{self, Heads, Span},
};
use crate::kernels::{
    Activation, AttentionParams, Kernels,
    cross::CrossKeyValues,
    host::{with_all_values, with_array_of_values, with_values},
    layout::Segment,
    weight::Linear,
};

/// The kernels of one step. Tensors are f32, whatever the precision of weights and cache.
#[derive(Debug)]
pub struct CpuServing<'a> {
    cache: &'a mut CpuKvCache,
    segments: &'a [Segment],
    /// For each segment, what its encoder made; empty for a model without an encoder.
    encoded: &'a [&'a CrossKeyValues],
    isa: Isa,
}

impl<'a> CpuServing<'a> {
    /// Kernels for packed rows that lie as `segments` says, in that order.
    pub fn new(cache: &'a mut CpuKvCache, segments: &'a [Segment]) -> Self {
        Self::with_isa(cache, segments, Isa::best())
    }

    /// As [`new`](Self::new), with other instructions than the best.
    pub fn with_isa(cache: &'a mut CpuKvCache, segments: &'a [Segment], isa: Isa) -> Self {
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
        let y = with_all_values(&[q, k, v], |values| {
            let mut first = 0;
            let span = |segment: &Segment| {
                let part = first * width..(first + segment.rows) * width;
                first += segment.rows;
                Span { rows: segment.rows, keys: &values[1][part.clone()], values: &values[2][part] }
            };
            let spans: Vec<Span> = self.segments.iter().map(span).collect();
            Ok(unmasked::attend(pool::global(), &spans, values[0], Heads { heads, kv_heads, head_dim }, params))
        })?;
        Tensor::from_vec(y, (t, heads * head_dim), &Device::Cpu)
    }
}

impl Kernels for CpuServing<'_> {
    fn linear(&mut self, x: &Tensor, layers: &[&Linear], residual: Option<&Tensor>) -> Result<Vec<Tensor>> {
        frozen::linear(x, layers, residual)
    }

    fn gated_linear(&mut self, activation: Activation, gate: &Linear, up: &Linear, x: &Tensor) -> Result<Tensor> {
        if gate.bias.is_none() && up.bias.is_none() {
            return frozen::gated_linear(activation, gate, up, x);
        }
        let (gate, up) = (gate.forward(x, self)?, up.forward(x, self)?);
        self.activate(activation, &gate)? * up
    }

    fn gated_mlp(
        &mut self,
        activation: Activation,
        [gate, up]: [&Linear; 2],
        down: &Linear,
        x: &Tensor,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        if gate.bias.is_none() && up.bias.is_none() {
            return frozen::gated_mlp(activation, [gate, up], down, x, residual);
        }
        let inner = self.gated_linear(activation, gate, up, x)?;
        Ok(frozen::linear(&inner, &[down], residual)?.remove(0))
    }

    fn score(&mut self, x: &Tensor, head: &Linear, softcap: Option<f64>, ids: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        frozen::score(x, head, softcap, ids)
    }

    fn rms_norm(&mut self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        let y = with_array_of_values([x, weight], |[x, weight]| {
            Ok(rows::rms_norm(self.isa, pool::global(), x, weight, eps as f32))
        })?;
        Tensor::from_vec(y, x.shape(), &Device::Cpu)
    }

    fn layer_norm(&mut self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        let bias = bias.map(|b| with_values(b, |b| Ok(b.to_vec()))).transpose()?;
        let y = with_array_of_values([x, weight], |[x, weight]| {
            Ok(rows::layer_norm(self.isa, pool::global(), x, weight, bias.as_deref(), eps as f32))
        })?;
        Tensor::from_vec(y, x.shape(), &Device::Cpu)
    }

    fn rope(&mut self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let (t, _, dim) = x.dims3()?;
        let y = with_array_of_values([x, cos, sin], |[x, cos, sin]| {
            Ok(rows::rope(self.isa, pool::global(), x, t, dim, cos, sin))
        })?;
        Tensor::from_vec(y, x.shape(), &Device::Cpu)
    }

    fn activate(&mut self, activation: Activation, x: &Tensor) -> Result<Tensor> {
        let (_, width) = x.dims2()?;
        let y = with_values(x, |x| Ok(rows::activate(self.isa, pool::global(), activation, x, width)))?;
        Tensor::from_vec(y, x.shape(), &Device::Cpu)
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
        let shape = self.cache.layout();
        if t != rows || k.dims() != [t, shape.num_kv_heads, shape.head_dim] || head_dim != shape.head_dim {
            candle_core::bail!(
                "attention was given {:?} and {:?} for a step of {rows} rows and {shape:?}",
                q.dims(),
                k.dims()
            );
        }
        let y = with_array_of_values([q, k, v], |[q, k, v]| {
            let rows = attention::Rows { q, k, v, heads, params };
            Ok(attention::attend(self.isa, pool::global(), self.cache, layer, self.segments, rows))
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
        let mut tensors = vec![q];
        let mut kv_heads = 1;
        for encoded in self.encoded {
            let (keys, values) = encoded.layer(layer)?;
            kv_heads = keys.dim(1)?;
            tensors.extend([keys, values]);
        }
        let y = with_all_values(&tensors, |values| {
            let (q, encoded) = (values[0], values[1..].as_chunks::<2>().0);
            let pairs = self.segments.iter().zip(encoded);
            let spans: Vec<_> =
                pairs.map(|(segment, &[keys, values])| Span { rows: segment.rows, keys, values }).collect();
            Ok(unmasked::attend(pool::global(), &spans, q, Heads { heads, kv_heads, head_dim }, params))
        })?;
        Tensor::from_vec(y, (t, heads * head_dim), &Device::Cpu)
    }
}

#[cfg(test)]
mod tests;
