//! Attention with its gradient by hand: of rows to rows of their own sequence, before or around them,
//! and to an encoder's output.
//!
//! A task is one sequence's queries of one key head: small dense products of all of them with all of its keys, in
//! which keys that a query does not see have weight zero.

mod head;
mod seen;

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp3, Device, Layout, Result, Shape, Tensor, bail};

use self::head::HeadGradients;
pub(super) use self::head::HeadTask;
use crate::kernels::cpu::{Isa, pool, tensors::written};
use crate::kernels::{
    AttentionParams,
    host::{slice, with_array_of_values},
};
pub(super) use seen::{Seen, Sequences};

/// Of `q` `[t, heads, head_dim]`, each row to what it sees of `k` and `v`, both `[keys, kv_heads,
/// head_dim]`: `[t, heads * head_dim]`. A row that sees nothing comes out zero.
pub(super) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, seen: Vec<Seen>, params: &AttentionParams) -> Result<Tensor> {
    let ((t, heads, head_dim), (keys, kv_heads, _)) = (q.dims3()?, k.dims3()?);
    let end = seen.iter().map(|s| s.own.end.max(s.shared)).max().unwrap_or(0);
    let rows: usize = seen.iter().map(|s| s.rows.len()).sum();
    if t != rows || end > keys || k.dims() != [keys, kv_heads, head_dim] || v.dims() != k.dims() {
        bail!("attention was given {:?} and {:?} for {rows} rows that see {end}", q.dims(), k.dims());
    }
    let op = Attention { seen, keys, heads, kv_heads, head_dim, params: params.clone() };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

struct Attention {
    /// For each sequence.
    seen: Vec<Seen>,
    keys: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    params: AttentionParams,
}

/// Where tasks write rows that are theirs alone.
struct Out(*mut f32);

// SAFETY: every task writes the queries of its own sequence and its own heads.
unsafe impl Sync for Out {}

impl Attention {
    fn task<'a>(&'a self, task: usize, [q, k, v]: [&'a [f32]; 3]) -> HeadTask<'a> {
        HeadTask {
            seen: &self.seen[task / self.kv_heads],
            kv_head: task % self.kv_heads,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            params: &self.params,
            q,
            k,
            v,
        }
    }

    fn forward(&self, values: [&[f32]; 3]) -> Vec<f32> {
        let len = values[0].len();
        let fill = |out: *mut f32| {
            let out = Out(out);
            pool::global().run(self.seen.len() * self.kv_heads, &|task| {
                let out = &out;
                // SAFETY: `out` has room for all queries, and this task alone has its own.
                unsafe { self.task(task, values).forward(Isa::best(), out.0) };
            });
        };
        // SAFETY: the sequences' rows are all rows, and the tasks of a sequence write all heads of each.
        unsafe { written(len, fill) }
    }

    /// The gradients of queries, keys and values. Keys that several sequences see sum up in the sequences' order, so the
    /// result does not depend on the threads.
    fn backward(&self, values: [&[f32]; 3], grad: &[f32]) -> [Vec<f32>; 3] {
        let tasks = self.seen.len() * self.kv_heads;
        let of_keys: Vec<Mutex<HeadGradients>> = (0..tasks).map(|_| Mutex::default()).collect();
        let fill = |out: *mut f32| {
            let out = Out(out);
            pool::global().run(tasks, &|task| {
                let out = &out;
                // SAFETY: as in `forward`.
                let gradients = unsafe { self.task(task, values).backward(Isa::best(), grad, out.0) };
                *of_keys[task].lock().unwrap_or_else(PoisonError::into_inner) = gradients;
            });
        };
        // SAFETY: as in `forward`.
        let of_queries = unsafe { written(values[0].len(), fill) };
        let width = self.kv_heads * self.head_dim;
        let (mut to_k, mut to_v) = (vec![0f32; self.keys * width], vec![0f32; self.keys * width]);
        for (task, gradients) in of_keys.into_iter().enumerate() {
            let gradients = gradients.into_inner().unwrap_or_else(PoisonError::into_inner);
            let keys = self.seen[task / self.kv_heads].keys();
            for (to, from) in [(&mut to_k, &gradients.k), (&mut to_v, &gradients.v)] {
                for (row, from) in keys.clone().zip(from.chunks_exact(self.head_dim)) {
                    let to = &mut to[row * width + task % self.kv_heads * self.head_dim..][..self.head_dim];
                    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
                }
            }
        }
        [of_queries, to_k, to_v]
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
        let out = self.forward([slice(q, q_layout)?, slice(k, k_layout)?, slice(v, v_layout)?]);
        let rows = q_layout.shape().dims3()?.0;
        Ok((CpuStorage::F32(out), (rows, self.heads * self.head_dim).into()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [to_q, to_k, to_v] =
            with_array_of_values([q, k, v, grad], |[q, k, v, grad]| Ok(self.backward([q, k, v], grad)))?;
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), &Device::Cpu).map(Some);
        Ok((tensor(to_q, q)?, tensor(to_k, k)?, tensor(to_v, v)?))
    }
}
