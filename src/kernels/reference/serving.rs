//! The reference's serving kernels: one sequence after another, over what it has in the key-value cache.

use std::ops::Range;

use candle_core::{Result, Tensor, bail};

use super::{attention::attend, kv_cache::ReferenceKvCache, products, tuning::rotate};
use crate::kernels::{
    Activation, AttentionParams, Kernels,
    cross::CrossKeyValues,
    layout::{BatchLayout, Segment},
    weight::Linear,
};

/// The kernels of one step.
#[derive(Debug)]
pub struct ReferenceServing<'a> {
    cache: &'a mut ReferenceKvCache,
    batch: &'a BatchLayout,
    encoded: &'a [&'a CrossKeyValues],
}

impl<'a> ReferenceServing<'a> {
    pub fn new(cache: &'a mut ReferenceKvCache, batch: &'a BatchLayout, encoded: &'a [&'a CrossKeyValues]) -> Self {
        Self { cache, batch, encoded }
    }

    /// Each segment with its packed rows.
    fn segments(&self) -> impl Iterator<Item = (&'a Segment, Range<usize>)> + use<'a> {
        self.batch.segments.iter().zip(self.batch.rows())
    }

    fn check(&self, q: &Tensor) -> Result<()> {
        match (q.dim(0)?, self.batch.num_rows()) {
            (found, expected) if found != expected => bail!("{found} rows were given for a batch of {expected}"),
            _ => Ok(()),
        }
    }
}

impl Kernels for ReferenceServing<'_> {
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
        self.check(q)?;
        let mut out = Vec::with_capacity(self.batch.segments.len());
        for (segment, rows) in self.segments() {
            let of = |x: &Tensor| x.narrow(0, rows.start, rows.len());
            let (q, k, v) = (of(q)?, of(k)?, of(v)?);
            out.push(match params.causal {
                true => {
                    self.cache.write_rows(layer, &segment.blocks, segment.start, &k, &v)?;
                    let (k, v) = self.cache.gather(layer, &segment.blocks, segment.start + segment.rows)?;
                    attend(&q, &k, &v, segment, params)?
                }
                false => attend(&q, &k, &v, segment, params)?,
            });
        }
        Tensor::cat(&out, 0)
    }

    fn cross_attention(&mut self, layer: usize, q: &Tensor, params: &AttentionParams) -> Result<Tensor> {
        self.check(q)?;
        if self.encoded.len() != self.batch.segments.len() {
            bail!("{} sequences attend to {} encoder inputs", self.batch.segments.len(), self.encoded.len());
        }
        let one = |((segment, rows), encoded): ((&Segment, Range<usize>), &&CrossKeyValues)| {
            let (keys, values) = encoded.layer(layer)?;
            attend(&q.narrow(0, rows.start, rows.len())?, keys, values, segment, params)
        };
        let out = self.segments().zip(self.encoded).map(one).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&out, 0)
    }
}
