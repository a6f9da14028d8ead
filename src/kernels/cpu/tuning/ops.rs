//! Norm, rope, gate and log-probabilities in one pass each, with their gradients by hand.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{host, slice};
use crate::kernels::{host::dot, params::GELU_TANH};

/// Root-mean-square norm.
pub(super) struct RmsNorm {
    pub weight: Vec<f32>,
    pub eps: f32,
}

impl RmsNorm {
    /// One over a row's root mean square.
    fn scale(&self, x: &[f32]) -> f32 {
        (dot(x, x) / x.len() as f32 + self.eps).sqrt().recip()
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "tuning-rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout)?;
        let width = self.weight.len();
        let mut out = vec![0f32; x.len()];
        out.par_chunks_exact_mut(width).zip(x.par_chunks_exact(width)).for_each(|(out, x)| {
            let scale = self.scale(x);
            for ((out, x), weight) in out.iter_mut().zip(x).zip(&self.weight) {
                *out = x * scale * weight;
            }
        });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (values, grads) = (host(x)?, host(grad)?);
        let width = self.weight.len();
        let mut out = vec![0f32; values.len()];
        out.par_chunks_exact_mut(width)
            .zip(values.par_chunks_exact(width).zip(grads.par_chunks_exact(width)))
            .for_each(|(out, (x, grad))| {
                let scale = self.scale(x);
                for ((out, grad), weight) in out.iter_mut().zip(grad).zip(&self.weight) {
                    *out = grad * weight;
                }
                let along = dot(out, x) * scale * scale / width as f32;
                for (out, x) in out.iter_mut().zip(x) {
                    *out = scale * (*out - x * along);
                }
            });
        Ok(Some(Tensor::from_vec(out, x.shape(), &Device::Cpu)?))
    }
}

/// A rotation; its gradient is the rotation back.
pub(super) struct Rope {
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
}

impl Rope {
    fn rotate(&self, x: &[f32], rows: usize, head_dim: usize, sign: f32) -> Vec<f32> {
        let half = self.cos.len() / rows.max(1);
        let width = x.len() / rows.max(1);
        let mut out = x.to_vec();
        out.par_chunks_exact_mut(width.max(1)).zip(x.par_chunks_exact(width.max(1))).enumerate().for_each(
            |(row, (out, x))| {
                let (cos, sin) = (&self.cos[row * half..][..half], &self.sin[row * half..][..half]);
                for (out, x) in out.chunks_exact_mut(head_dim).zip(x.chunks_exact(head_dim)) {
                    let (first, second) = out.split_at_mut(half);
                    let (a, b) = x.split_at(half);
                    for i in 0..half {
                        let sin = sign * sin[i];
                        first[i] = a[i] * cos[i] - b[i] * sin;
                        second[i] = b[i] * cos[i] + a[i] * sin;
                    }
                }
            },
        );
        out
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "tuning-rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, _, head_dim) = layout.shape().dims3()?;
        Ok((CpuStorage::F32(self.rotate(slice(x, layout)?, rows, head_dim, 1.0)), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (rows, _, head_dim) = x.dims3()?;
        let out = self.rotate(&host(grad)?, rows, head_dim, -1.0);
        Ok(Some(Tensor::from_vec(out, x.shape(), &Device::Cpu)?))
    }
}

/// `activation(gate) * up`, by the activation's value and slope.
pub(super) struct Gated(pub fn(f32) -> (f32, f32));

fn sigmoid(x: f32) -> f32 {
    (1.0 + (-x).exp()).recip()
}

pub(super) fn silu(x: f32) -> (f32, f32) {
    let s = sigmoid(x);
    (x * s, s * (1.0 + x * (1.0 - s)))
}

pub(super) fn gelu_tanh(x: f32) -> (f32, f32) {
    let [a, b] = GELU_TANH;
    let s = sigmoid(a * x * (1.0 + b * x * x));
    (x * s, s + x * s * (1.0 - s) * a * (1.0 + 3.0 * b * x * x))
}

pub(super) fn relu(x: f32) -> (f32, f32) {
    if x > 0.0 { (x, 1.0) } else { (0.0, 0.0) }
}

/// Values that one thread works on at a time.
const CHUNK: usize = 4096;

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "tuning-gated"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (slice(gate, gate_layout)?, slice(up, up_layout)?);
        let mut out = vec![0f32; gate.len()];
        out.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK))).for_each(
            |(out, (gate, up))| {
                for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
                    *out = (self.0)(*g).0 * u;
                }
            },
        );
        Ok((CpuStorage::F32(out), gate_layout.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (gates, ups, grads) = (host(gate)?, host(up)?, host(grad)?);
        let (mut to_gate, mut to_up) = (vec![0f32; gates.len()], vec![0f32; gates.len()]);
        let inputs = gates.par_chunks(CHUNK).zip(ups.par_chunks(CHUNK)).zip(grads.par_chunks(CHUNK));
        to_gate.par_chunks_mut(CHUNK).zip(to_up.par_chunks_mut(CHUNK)).zip(inputs).for_each(
            |((to_gate, to_up), ((gate, up), grad))| {
                for i in 0..gate.len() {
                    let (value, slope) = (self.0)(gate[i]);
                    to_up[i] = grad[i] * value;
                    to_gate[i] = grad[i] * up[i] * slope;
                }
            },
        );
        let tensor = |values| Tensor::from_vec(values, gate.shape(), &Device::Cpu);
        Ok((Some(tensor(to_gate)?), Some(tensor(to_up)?)))
    }
}

/// The log-probability of one target in each row of logits `[t, vocab]`: a log-softmax that never
/// stores more than it is asked for. f32 on a CPU.
pub(super) struct LogProbabilities {
    /// A column for each row.
    pub targets: Vec<u32>,
}

/// A row's largest value, and the logarithm of the sum of exponentials above it.
fn log_sum(row: &[f32]) -> (f32, f32) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (max, row.iter().map(|x| (x - max).exp()).sum::<f32>().ln())
}

impl CustomOp1 for LogProbabilities {
    fn name(&self) -> &'static str {
        "tuning-log-probabilities"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, vocab) = layout.shape().dims2()?;
        if rows != self.targets.len() || self.targets.iter().any(|&t| t as usize >= vocab) {
            bail!("{} targets do not fit logits [{rows}, {vocab}]", self.targets.len());
        }
        let logits = slice(logits, layout)?;
        let rows = logits.par_chunks_exact(vocab).zip(&self.targets);
        let out: Vec<f32> = rows
            .map(|(row, &target)| {
                let (max, log_sum) = log_sum(row);
                row[target as usize] - max - log_sum
            })
            .collect();
        Ok((CpuStorage::F32(out), self.targets.len().into()))
    }

    fn bwd(&self, logits: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let vocab = logits.dim(1)?;
        let (mut values, grads) = (host(logits)?, host(grad)?);
        values.par_chunks_exact_mut(vocab).zip(&self.targets).zip(&grads).for_each(|((row, &target), grad)| {
            let (max, log_sum) = log_sum(row);
            row.iter_mut().for_each(|x| *x = -grad * (*x - max - log_sum).exp());
            row[target as usize] += grad;
        });
        Ok(Some(Tensor::from_vec(values, logits.shape(), &Device::Cpu)?))
    }
}
