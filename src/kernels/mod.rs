//! Norm, rope and attention: what serving and tuning do differently. The decoder is given one of
//! these and knows nothing else of where it runs.

pub mod cpu;
pub mod dense;
pub mod fused;
pub mod given;
pub mod kv_cache;
pub mod paged;

use candle_core::{Result, Tensor};

/// The operations of a decoder that have a differentiable and a fast form.
///
/// Rows are packed: `t` rows of any number of sequences side by side, no padding. An
/// implementation knows which rows belong to which sequence and where their keys and values are.
pub trait Kernels {
    /// Root-mean-square norm (Zhang & Sennrich 2019) over the last dimension of `x` `[t, hidden]`.
    fn rms_norm(&mut self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor>;

    /// Rotary embedding (Su et al. 2021), half-split form, of `x` `[t, heads, head_dim]` by
    /// per-row `cos` and `sin` `[t, head_dim / 2]`.
    fn rope(&mut self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor>;

    /// Causal attention of layer `layer`: `q` `[t, heads, head_dim]` against the keys and values
    /// of the same sequence, those of this call `[t, kv_heads, head_dim]` and those of earlier
    /// calls. Scores are scaled by `head_dim^-1/2`. Returns `[t, heads * head_dim]`.
    fn attention(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;

    /// `silu(gate) * up` of the MLP, both `[t, intermediate]`.
    fn gated(&mut self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        gate.silu()? * up
    }
}

/// Lanes of independent sums, which the compiler can keep in one vector register.
const LANES: usize = 16;

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().sum::<f32>() + tail
}
