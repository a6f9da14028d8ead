//! Tuning kernels for a CPU: each operation of a decoder in one pass, with its gradient by hand.
//! They compute what the reference's tuning kernels do, several times as fast.

mod attention;
mod linear;
mod mlp;
mod ops;

use candle_core::{Result, Tensor, bail};

use super::frozen::{self, Transposes};
use crate::kernels::{
    Activation, AttentionParams, Kernels, Tuning, cross::EncodedBatch, layout::BatchLayout, past::PastKeyValues,
    weight::Linear,
};
use attention::{Sequences, attend};
use linear::Added;
use mlp::GatedMlp;
use ops::{LogProbabilities, RmsNorm, Rope};

/// A tuning job on the CPU: it keeps the transposed copies that gradients read.
#[derive(Debug, Default)]
pub struct CpuTuning {
    transposes: Transposes,
}

impl Tuning for CpuTuning {
    fn kernels(
        &self,
        batch: &BatchLayout,
        past: Option<PastKeyValues>,
        encoded: Option<EncodedBatch>,
    ) -> Result<Box<dyn Kernels>> {
        let (sequences, transposes) = (Sequences::new(batch), self.transposes.clone());
        Ok(Box::new(CpuTuningKernels { sequences, past, encoded, transposes }))
    }
}

/// Whole sequences that lie one after another in the packed rows and may share their first rows;
/// no cache. Activations are f32.
#[derive(Debug)]
struct CpuTuningKernels {
    sequences: Sequences,
    past: Option<PastKeyValues>,
    encoded: Option<EncodedBatch>,
    transposes: Transposes,
}

impl Kernels for CpuTuningKernels {
    fn linear(&mut self, x: &Tensor, layers: &[&Linear], residual: Option<&Tensor>) -> Result<Vec<Tensor>> {
        if !x.track_op() && !residual.is_some_and(Tensor::track_op) {
            return frozen::linear(x, layers, residual);
        }
        let one = |layer: &&Linear| match residual {
            Some(residual) => Added::new(layer, self.transposes.clone())?.forward(x, residual),
            None => match &layer.bias {
                Some(bias) => self.transposes.product(x, layer)?.broadcast_add(bias),
                None => self.transposes.product(x, layer),
            },
        };
        layers.iter().map(one).collect()
    }

    fn gated_linear(&mut self, activation: Activation, gate: &Linear, up: &Linear, x: &Tensor) -> Result<Tensor> {
        if !x.track_op() && gate.bias.is_none() && up.bias.is_none() {
            return frozen::gated_linear(activation, gate, up, x);
        }
        activation.apply(&gate.forward(x, self)?)? * up.forward(x, self)?
    }

    fn gated_mlp(
        &mut self,
        activation: Activation,
        [gate, up]: [&Linear; 2],
        down: &Linear,
        x: &Tensor,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let has_biases = gate.bias.is_some() || up.bias.is_some();
        let has_gradient = x.track_op() || residual.is_some_and(Tensor::track_op);
        if has_biases || !has_gradient {
            let inner = self.gated_linear(activation, gate, up, x)?;
            return Ok(self.linear(&inner, &[down], residual)?.remove(0));
        }
        GatedMlp::new(activation, [gate, up], down, self.transposes.clone())?.forward(x, residual)
    }

    fn rms_norm(&mut self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        x.contiguous()?.apply_op1(RmsNorm { weight: host(weight)?, eps: eps as f32 })
    }

    fn rope(&mut self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        x.contiguous()?.apply_op1(Rope { cos: host(cos)?, sin: host(sin)? })
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
        attend(q, k, v, self.sequences.seen(params), params)
    }

    fn cross_attention(&mut self, layer: usize, q: &Tensor, params: &AttentionParams) -> Result<Tensor> {
        let Some(encoded) = &self.encoded else {
            bail!("layer {layer} attends to an encoder's output, and there is none")
        };
        let (k, v) = encoded.layer(layer, self.sequences.len())?;
        attend(q, k, v, self.sequences.seen_of(&encoded.inputs), params)
    }

    fn log_probabilities(&mut self, logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
        logits.contiguous()?.apply_op1(LogProbabilities { targets: targets.to_vec() })
    }
}

fn host(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1()
}

#[cfg(test)]
mod tests;
