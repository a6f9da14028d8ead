//! Attention with its gradient by hand: of rows to rows of their own sequence, before or around them,
//! and to an encoder's output.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp3, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{add, host, slice};
use crate::kernels::{AttentionParams, host::dot, layout::BatchLayout};

/// Sequences in packed rows: first those that all share, then each one's own.
#[derive(Debug, Clone)]
pub(super) struct Sequences {
    prefix: usize,
    own: Vec<Range<usize>>,
}

/// The keys that a query attends to, in their order: of the shared rows, then of its own.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    shared: Range<usize>,
    own: Range<usize>,
    /// The query's place among them.
    place: usize,
}

impl Sequences {
    pub fn new(batch: &BatchLayout) -> Self {
        Self { prefix: batch.shared, own: batch.rows().collect() }
    }

    /// How many sequences there are.
    pub fn len(&self) -> usize {
        self.own.len()
    }

    /// What each row sees of its own sequence.
    pub fn seen(&self, params: &AttentionParams) -> Vec<Seen> {
        let of = |row: usize, shared: usize, own: &Range<usize>| {
            let end = if params.causal { row + 1 } else { own.end };
            let all = shared + end - own.start;
            let hidden = params.window.map_or(0, |window| all.saturating_sub(window));
            Seen {
                shared: hidden.min(shared)..shared,
                own: own.start + hidden.saturating_sub(shared)..end,
                place: shared + row - own.start - hidden,
            }
        };
        let first = (0..self.prefix).map(|row| of(row, 0, &(0..self.prefix)));
        first.chain(self.own.iter().flat_map(|own| own.clone().map(|row| of(row, self.prefix, own)))).collect()
    }

    /// What each row sees of other rows, `inputs`, one for each sequence. Shared rows see none.
    pub fn seen_of(&self, inputs: &[Range<usize>]) -> Vec<Seen> {
        let all = |input: &Range<usize>| Seen { shared: 0..0, own: input.clone(), place: 0 };
        let first = (0..self.prefix).map(|_| all(&(0..0)));
        let own = self.own.iter().zip(inputs).flat_map(|(own, input)| own.clone().map(|_| all(input)));
        first.chain(own).collect()
    }
}

impl Seen {
    fn keys(&self) -> impl Iterator<Item = usize> + Clone + use<> {
        self.shared.clone().chain(self.own.clone())
    }
}

/// Of `q` `[t, heads, head_dim]`, each row to what it sees of `k` and `v`, both `[keys, kv_heads,
/// head_dim]`: `[t, heads * head_dim]`. A row that sees nothing comes out zero.
pub(super) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, seen: Vec<Seen>, params: &AttentionParams) -> Result<Tensor> {
    let ((t, heads, head_dim), (keys, kv_heads, _)) = (q.dims3()?, k.dims3()?);
    let end = seen.iter().map(|s| s.own.end.max(s.shared.end)).max().unwrap_or(0);
    if t != seen.len() || end > keys || k.dims() != [keys, kv_heads, head_dim] || v.dims() != k.dims() {
        bail!("attention was given {:?} and {:?} for {} rows that see {end}", q.dims(), k.dims(), seen.len());
    }
    let op = Attention { seen, keys, heads, kv_heads, head_dim, params: params.clone() };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

struct Attention {
    /// For each query.
    seen: Vec<Seen>,
    keys: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    params: AttentionParams,
}

/// Gradients of one key head and its query heads, each `[rows, …, head_dim]`.
struct HeadGradients {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Attention {
    /// The part of row `row` that belongs to a head, of `[rows, heads, head_dim]`.
    fn head<'a>(&self, x: &'a [f32], heads: usize, row: usize, head: usize) -> &'a [f32] {
        &x[(row * heads + head) * self.head_dim..][..self.head_dim]
    }

    /// The softmax of a query's scores over the rows it sees, in their order; `slopes` becomes how
    /// much each score moves with the product of query and key.
    fn weights(&self, q: &[f32], k: &[f32], row: usize, head: usize, out: &mut Vec<f32>, slopes: &mut Vec<f32>) {
        let AttentionParams { scale, softcap, alibi_slopes, relative_position_bias, .. } = &self.params;
        let kv_head = head / (self.heads / self.kv_heads);
        let seen = &self.seen[row];
        out.clear();
        out.extend(seen.keys().map(|j| dot(q, self.head(k, self.kv_heads, j, kv_head)) * scale));
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
            out.iter_mut().enumerate().for_each(|(i, score)| *score -= alibi[head] * (seen.place - i) as f32);
        }
        if let Some(bias) = relative_position_bias {
            out.iter_mut().enumerate().for_each(|(i, score)| *score += bias.at(head, seen.place, i));
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
                for (j, &weight) in self.seen[row].keys().zip(weights.iter()) {
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
        let zeros = |rows: usize| vec![0f32; rows * dim];
        let mut out = HeadGradients { q: zeros(self.seen.len() * groups), k: zeros(self.keys), v: zeros(self.keys) };
        let (mut weights, mut slopes, mut grads) = (Vec::new(), Vec::new(), Vec::new());
        for (row, seen) in self.seen.iter().enumerate() {
            for group in 0..groups {
                let head = kv_head * groups + group;
                let (query, grad) = (self.head(q, self.heads, row, head), self.head(grad, self.heads, row, head));
                self.weights(query, k, row, head, &mut weights, &mut slopes);
                grads.clear();
                grads.extend(seen.keys().map(|j| dot(grad, self.head(v, self.kv_heads, j, kv_head))));
                let mean: f32 = weights.iter().zip(&grads).map(|(w, g)| w * g).sum();
                let dq = &mut out.q[(row * groups + group) * dim..][..dim];
                for (i, j) in seen.keys().enumerate() {
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
        Ok((CpuStorage::F32(out), (self.seen.len(), self.heads * self.head_dim).into()))
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
            let width = like.elem_count() / like.dim(0)?.max(1) / self.kv_heads;
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
