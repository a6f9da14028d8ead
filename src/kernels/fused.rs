//! Tuning kernels for a CPU: each operation of a decoder in one pass, with its gradient by hand.
//! They compute what [`DenseKernels`](super::dense::DenseKernels) does, several times as fast.

mod attention;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{Activation, AttentionParams, GELU_TANH, Kernels, cross::EncodedBatch, dot, past::PastKeyValues};
use attention::{Sequences, attend};

/// Whole sequences that lie one after another in the packed rows and may share their first rows;
/// no cache. For f32 on a CPU.
#[derive(Debug, Clone)]
pub struct FusedKernels {
    sequences: Sequences,
    given: Option<PastKeyValues>,
    encoded: Option<EncodedBatch>,
}

impl FusedKernels {
    /// Kernels for sequences that all begin with the first `prefix` packed rows, which lie there
    /// once, and go on with rows of their own, `lengths`, packed in this order.
    pub fn with_prefix(prefix: usize, lengths: &[usize]) -> Self {
        Self { sequences: Sequences::new(prefix, lengths), given: None, encoded: None }
    }

    /// With these keys and values, if there are any, in place of the first rows' own.
    pub fn with_past(self, given: impl Into<Option<PastKeyValues>>) -> Self {
        Self { given: given.into(), ..self }
    }

    /// With what an encoder made of each sequence's input, if there is one.
    pub fn with_encoded(self, encoded: impl Into<Option<EncodedBatch>>) -> Self {
        Self { encoded: encoded.into(), ..self }
    }

    /// Whether these kernels can be used.
    pub fn fit(device: &Device, dtype: DType) -> bool {
        device.is_cpu() && dtype == DType::F32
    }
}

impl Kernels for FusedKernels {
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
        let (k, v) = &match &self.given {
            Some(given) => given.replace(layer, k, v)?,
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

    fn gated(&mut self, activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let value_and_slope = match activation {
            Activation::Silu => silu,
            Activation::GeluTanh => gelu_tanh,
            Activation::Relu => relu,
            // Phi is left to candle.
            Activation::Gelu => return activation.apply(gate)? * up,
        };
        gate.contiguous()?.apply_op2(&up.contiguous()?, Gated(value_and_slope))
    }
}

struct RmsNorm {
    weight: Vec<f32>,
    eps: f32,
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
struct Rope {
    cos: Vec<f32>,
    sin: Vec<f32>,
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
struct Gated(fn(f32) -> (f32, f32));

fn sigmoid(x: f32) -> f32 {
    (1.0 + (-x).exp()).recip()
}

fn silu(x: f32) -> (f32, f32) {
    let s = sigmoid(x);
    (x * s, s * (1.0 + x * (1.0 - s)))
}

fn gelu_tanh(x: f32) -> (f32, f32) {
    let [a, b] = GELU_TANH;
    let s = sigmoid(a * x * (1.0 + b * x * x));
    (x * s, s + x * s * (1.0 - s) * a * (1.0 + 3.0 * b * x * x))
}

fn relu(x: f32) -> (f32, f32) {
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
#[derive(Debug)]
pub struct LogProbabilities {
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

/// `out += factor * x`
fn add(out: &mut [f32], factor: f32, x: &[f32]) {
    out.iter_mut().zip(x).for_each(|(out, x)| *out += factor * x);
}

fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("tuning kernels take contiguous values"),
    }
}

fn host(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::Var;

    use super::*;
    use crate::kernels::{dense::DenseKernels, relative_position_bias::RelativePositionBias};

    fn random(shape: impl Into<Shape>) -> Var {
        Var::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
    }

    /// Holds an operation's value and its gradients to every input against the plain one's.
    fn compare(inputs: &[&Var], op: impl FnMut(&mut dyn Kernels) -> Tensor) {
        let fused = FusedKernels::with_prefix(3, &[4, 1, 6]);
        compare_with(fused, DenseKernels::with_prefix(3, &[4, 1, 6], &Device::Cpu).unwrap(), inputs, op);
    }

    fn compare_with(
        mut fused: FusedKernels,
        mut plain: DenseKernels,
        inputs: &[&Var],
        mut op: impl FnMut(&mut dyn Kernels) -> Tensor,
    ) {
        let (a, b) = (op(&mut fused), op(&mut plain));
        let weights = random(a.shape().clone());
        let gradients = |y: &Tensor| {
            let grads = (y * weights.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
            inputs.iter().map(|x| host(grads.get(x.as_tensor()).unwrap()).unwrap()).collect::<Vec<_>>()
        };
        let close = |a: &[f32], b: &[f32]| {
            assert!(a.len() == b.len() && b.iter().any(|x| x.abs() > 0.1));
            a.iter().zip(b).for_each(|(a, b)| assert!((a - b).abs() < 1e-4 * (1.0 + b.abs()), "{a} {b}"));
        };
        close(&host(&a).unwrap(), &host(&b).unwrap());
        gradients(&a).iter().zip(&gradients(&b)).for_each(|(a, b)| close(a, b));
    }

    #[test]
    fn attention_and_its_gradients_equal_the_plain_ones() {
        let plain = AttentionParams::scaled(0.22);
        let slopes: Arc<[f32]> = (1..=6).map(|i| 0.9f32.powi(i)).collect();
        for params in [
            plain.clone(),
            AttentionParams { softcap: Some(1.5), ..plain.clone() },
            AttentionParams { window: Some(2), ..plain.clone() },
            AttentionParams { window: Some(5), softcap: Some(2.0), ..plain.clone() },
            AttentionParams { alibi_slopes: Some(slopes), window: Some(6), ..plain.clone() },
            AttentionParams { relative_position_bias: Some(bias(6)), ..plain },
        ] {
            for (heads, kv_heads) in [(4, 2), (3, 3), (6, 1)] {
                let (q, k, v) = (random((14, heads, 20)), random((14, kv_heads, 20)), random((14, kv_heads, 20)));
                let slopes = params.alibi_slopes.as_ref().map(|s| s[..heads].into());
                let relative_position_bias = params.relative_position_bias.as_ref().map(|_| bias(heads));
                let params = AttentionParams { alibi_slopes: slopes, relative_position_bias, ..params.clone() };
                compare(&[&q, &k, &v], |kernels| kernels.attention(0, &q, &k, &v, &params).unwrap());
            }
        }
    }

    fn bias(heads: usize) -> Arc<RelativePositionBias> {
        RelativePositionBias::new(heads, 4, |head, distance| (head as f32 + 0.3 * distance as f32).sin()).into()
    }

    #[test]
    fn attention_of_and_to_an_encoder_and_its_gradients_equal_the_plain_ones() {
        for (heads, kv_heads) in [(4, 2), (3, 3)] {
            let (q, k, v) = (random((11, heads, 20)), random((11, kv_heads, 20)), random((11, kv_heads, 20)));
            let scaled = AttentionParams { causal: false, ..AttentionParams::scaled(0.22) };
            let biased = AttentionParams { relative_position_bias: Some(bias(heads)), ..scaled.clone() };
            let fused = FusedKernels::with_prefix(0, &[4, 1, 6]);
            let plain = DenseKernels::new(&[4, 1, 6], &Device::Cpu).unwrap();
            compare_with(fused, plain, &[&q, &k, &v], |kernels| kernels.attention(0, &q, &k, &v, &biased).unwrap());

            let (q, encoded) = (random((14, heads, 20)), |(k, v): (&Var, &Var)| EncodedBatch {
                layers: vec![(k.as_tensor().clone(), v.as_tensor().clone())],
                inputs: vec![5..11, 0..5, 5..11],
            });
            let fused = FusedKernels::with_prefix(3, &[4, 1, 6]).with_encoded(encoded((&k, &v)));
            let plain = DenseKernels::with_prefix(3, &[4, 1, 6], &Device::Cpu).unwrap().with_encoded(encoded((&k, &v)));
            compare_with(fused, plain, &[&q, &k, &v], |kernels| kernels.cross_attention(0, &q, &scaled).unwrap());
        }
    }

    #[test]
    fn log_probabilities_and_their_gradient_equal_those_of_log_softmax() {
        let logits = random((14, 50));
        let targets: Vec<u32> = (0..14).map(|i| (i * 7) % 50).collect();
        let index = Tensor::new(targets.as_slice(), &Device::Cpu).unwrap().unsqueeze(1).unwrap();
        let mut calls = 0;
        compare(&[&logits], |_| {
            calls += 1;
            match calls {
                1 => logits.as_tensor().apply_op1(LogProbabilities { targets: targets.clone() }).unwrap(),
                _ => {
                    let all = candle_nn::ops::log_softmax(&logits, candle_core::D::Minus1).unwrap();
                    all.gather(&index, 1).unwrap().squeeze(1).unwrap()
                }
            }
        });
    }

    #[test]
    fn norm_rope_and_gate_and_their_gradients_equal_the_plain_ones() {
        let (x, weight) = (random((14, 24)), random(24));
        compare(&[&x], |kernels| kernels.rms_norm(&x, weight.as_tensor(), 1e-5).unwrap());
        let (x, cos, sin) = (random((14, 3, 8)), random((14, 4)), random((14, 4)));
        compare(&[&x], |kernels| kernels.rope(&x, &cos.as_detached_tensor(), &sin.as_detached_tensor()).unwrap());
        let partial = random((14, 3, 20));
        compare(&[&partial], |kernels| {
            kernels.rope(&partial, &cos.as_detached_tensor(), &sin.as_detached_tensor()).unwrap()
        });
        let (gate, up) = (random((14, 40)), random((14, 40)));
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
            compare(&[&gate, &up], |kernels| kernels.gated(activation, &gate, &up).unwrap());
        }
    }
}
