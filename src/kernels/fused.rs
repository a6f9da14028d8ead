//! Tuning kernels for a CPU: each operation of a decoder in one pass, with its gradient by hand.
//! They compute what [`DenseKernels`](super::dense::DenseKernels) does, several times as fast.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{Activation, AttentionParams, GELU_TANH, Kernels, dot, given::GivenKeyValues};

/// Whole sequences that lie one after another in the packed rows and may share their first rows;
/// no cache. For f32 on a CPU.
#[derive(Debug, Clone)]
pub struct FusedKernels {
    rows: Arc<Rows>,
    given: Option<GivenKeyValues>,
}

/// Which rows each row attends to: those before `shared`, and from `start` to itself.
#[derive(Debug)]
struct Rows(Vec<(usize, usize)>);

impl FusedKernels {
    /// Kernels for sequences that all begin with the first `prefix` packed rows, which lie there
    /// once, and go on with rows of their own, `lengths`, packed in this order.
    pub fn with_prefix(prefix: usize, lengths: &[usize]) -> Self {
        let mut rows = vec![(0, 0); prefix];
        for &length in lengths {
            let start = rows.len();
            rows.resize(start + length, (prefix, start));
        }
        Self { rows: Arc::new(Rows(rows)), given: None }
    }

    /// With these keys and values in place of the first rows' own.
    pub fn with_given(self, given: GivenKeyValues) -> Self {
        Self { given: Some(given), ..self }
    }

    /// Whether these kernels can be used.
    pub fn fit(device: &Device, dtype: DType) -> bool {
        device.is_cpu() && dtype == DType::F32
    }
}

impl Rows {
    /// The rows that `row` attends to, the last `window` of its sequence up to itself.
    fn seen(&self, row: usize, window: Option<usize>) -> impl Iterator<Item = usize> + Clone {
        let (shared, start) = self.0[row];
        let all = shared + row + 1 - start;
        let hidden = window.map_or(0, |window| all.saturating_sub(window));
        (hidden.min(shared)..shared).chain(start + hidden.saturating_sub(shared)..row + 1)
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
        let (t, heads, head_dim) = q.dims3()?;
        if params.distance_bias.is_some() || !params.causal {
            bail!("the kernels for tuning have no attention of encoder-decoder models");
        }
        if t != self.rows.0.len() {
            bail!("attention was given {t} rows for sequences of {}", self.rows.0.len());
        }
        let rows = Arc::clone(&self.rows);
        let op = Attention { rows, heads, kv_heads: k.dim(1)?, head_dim, params: params.clone() };
        q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
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

struct Attention {
    rows: Arc<Rows>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    params: AttentionParams,
}

/// Gradients of one key head and its query heads, each `[t, …, head_dim]`.
struct HeadGradients {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Attention {
    /// The part of row `row` that belongs to a head, of `[t, heads, head_dim]`.
    fn head<'a>(&self, x: &'a [f32], heads: usize, row: usize, head: usize) -> &'a [f32] {
        &x[(row * heads + head) * self.head_dim..][..self.head_dim]
    }

    /// The softmax of a query's scores over the rows it sees, in their order; `slopes` becomes how
    /// much each score moves with the product of query and key.
    fn weights(&self, q: &[f32], k: &[f32], row: usize, head: usize, out: &mut Vec<f32>, slopes: &mut Vec<f32>) {
        let AttentionParams { scale, softcap, window, alibi_slopes, .. } = &self.params;
        let kv_head = head / (self.heads / self.kv_heads);
        out.clear();
        out.extend(self.rows.seen(row, *window).map(|j| dot(q, self.head(k, self.kv_heads, j, kv_head)) * scale));
        slopes.clear();
        match softcap {
            Some(softcap) => slopes.extend(out.iter_mut().map(|score| {
                let t = (*score / softcap).tanh();
                *score = t * softcap;
                (1.0 - t * t) * scale
            })),
            None => slopes.resize(out.len(), *scale),
        }
        if let Some(alibi) = alibi_slopes {
            let last = out.len() - 1;
            out.iter_mut().enumerate().for_each(|(i, score)| *score -= alibi[head] * (last - i) as f32);
        }
        let max = out.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for weight in out.iter_mut() {
            *weight = (*weight - max).exp();
            sum += *weight;
        }
        out.iter_mut().for_each(|weight| *weight /= sum);
    }

    fn forward(&self, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
        let (width, groups) = (self.heads * self.head_dim, self.heads / self.kv_heads);
        let mut out = vec![0f32; q.len()];
        let memory = || (Vec::new(), Vec::new());
        out.par_chunks_exact_mut(width).enumerate().for_each_init(memory, |(weights, slopes), (row, out)| {
            for (head, out) in out.chunks_exact_mut(self.head_dim).enumerate() {
                self.weights(self.head(q, self.heads, row, head), k, row, head, weights, slopes);
                for (j, &weight) in self.rows.seen(row, self.params.window).zip(weights.iter()) {
                    add(out, weight, self.head(v, self.kv_heads, j, head / groups));
                }
            }
        });
        out
    }

    /// The gradients that flow through one key head. Rows that several sequences share sum up in
    /// one order, so the result does not depend on the threads.
    fn backward(&self, kv_head: usize, q: &[f32], k: &[f32], v: &[f32], grad: &[f32]) -> HeadGradients {
        let (dim, groups) = (self.head_dim, self.heads / self.kv_heads);
        let t = self.rows.0.len();
        let mut out = HeadGradients { q: vec![0.0; t * groups * dim], k: vec![0.0; t * dim], v: vec![0.0; t * dim] };
        let (mut weights, mut slopes, mut grads) = (Vec::new(), Vec::new(), Vec::new());
        for row in 0..t {
            for group in 0..groups {
                let head = kv_head * groups + group;
                let (query, grad) = (self.head(q, self.heads, row, head), self.head(grad, self.heads, row, head));
                self.weights(query, k, row, head, &mut weights, &mut slopes);
                let seen = self.rows.seen(row, self.params.window);
                grads.clear();
                grads.extend(seen.clone().map(|j| dot(grad, self.head(v, self.kv_heads, j, kv_head))));
                let mean: f32 = weights.iter().zip(&grads).map(|(w, g)| w * g).sum();
                let dq = &mut out.q[(row * groups + group) * dim..][..dim];
                for (i, j) in seen.enumerate() {
                    let weight = weights[i];
                    let score = weight * (grads[i] - mean) * slopes[i];
                    add(dq, score, self.head(k, self.kv_heads, j, kv_head));
                    add(&mut out.k[j * dim..][..dim], score, query);
                    add(&mut out.v[j * dim..][..dim], weight, grad);
                }
            }
        }
        out
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "tuning-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let out = self.forward(slice(q, q_layout)?, slice(k, k_layout)?, slice(v, v_layout)?);
        Ok((CpuStorage::F32(out), (self.rows.0.len(), self.heads * self.head_dim).into()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (qs, ks, vs, grads) = (host(q)?, host(k)?, host(v)?, host(grad)?);
        let heads: Vec<HeadGradients> =
            (0..self.kv_heads).into_par_iter().map(|head| self.backward(head, &qs, &ks, &vs, &grads)).collect();
        let joined = |part: fn(&HeadGradients) -> &Vec<f32>, like: &Tensor| {
            let width = like.elem_count() / self.rows.0.len().max(1) / self.kv_heads;
            let mut out = vec![0f32; like.elem_count()];
            for (row, out) in out.chunks_exact_mut(width * self.kv_heads).enumerate() {
                for (head, out) in heads.iter().zip(out.chunks_exact_mut(width)) {
                    out.copy_from_slice(&part(head)[row * width..][..width]);
                }
            }
            Tensor::from_vec(out, like.shape(), &Device::Cpu)
        };
        Ok((Some(joined(|h| &h.q, q)?), Some(joined(|h| &h.k, k)?), Some(joined(|h| &h.v, v)?)))
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
    use candle_core::Var;

    use super::*;
    use crate::kernels::dense::DenseKernels;

    fn random(shape: impl Into<Shape>) -> Var {
        Var::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
    }

    /// Holds an operation's value and its gradients to every input against the plain one's.
    fn compare(inputs: &[&Var], mut op: impl FnMut(&mut dyn Kernels) -> Tensor) {
        let mut fused = FusedKernels::with_prefix(3, &[4, 1, 6]);
        let mut plain = DenseKernels::with_prefix(3, &[4, 1, 6], &Device::Cpu).unwrap();
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
            AttentionParams { alibi_slopes: Some(slopes), window: Some(6), ..plain },
        ] {
            for (heads, kv_heads) in [(4, 2), (3, 3), (6, 1)] {
                let (q, k, v) = (random((14, heads, 20)), random((14, kv_heads, 20)), random((14, kv_heads, 20)));
                let slopes = params.alibi_slopes.as_ref().map(|s| s[..heads].into());
                let params = AttentionParams { alibi_slopes: slopes, ..params.clone() };
                compare(&[&q, &k, &v], |kernels| kernels.attention(0, &q, &k, &v, &params).unwrap());
            }
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
