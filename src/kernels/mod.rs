//! Norms, rope, attention and activations: what serving and tuning do differently. The decoder is given one of
//! these and knows nothing else of where it runs.

pub mod cpu;
pub mod cross;
pub mod dense;
pub mod fused;
pub mod kv_cache;
pub mod paged;
pub mod past;
pub mod relative_position_bias;

use std::sync::Arc;

use candle_core::{D, DType, Result, Tensor, bail};

use relative_position_bias::RelativePositionBias;

/// What is between a score and its weight, and which positions are seen at all.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionParams {
    /// What the product of a query and a key is multiplied with, usually `head_dim^-1/2`.
    pub scale: f32,
    /// A scaled score `s` becomes `softcap * tanh(s / softcap)` (Gemma 2).
    pub softcap: Option<f32>,
    /// A position sees itself and those right before it, so many in all; all of them if there is none.
    pub window: Option<usize>,
    /// `[heads]`: to a score is added its head's slope times the key's distance, which is not above
    /// zero (ALiBi, Press et al. 2022).
    pub alibi_slopes: Option<Arc<[f32]>>,
    /// What is added to a score for its head and its key's distance (T5).
    pub relative_position_bias: Option<Arc<RelativePositionBias>>,
    /// Whether a position sees only itself and those before it. If not, it sees all of its sequence,
    /// which has to be in one call then, with no window and no slopes (an encoder).
    pub causal: bool,
}

impl AttentionParams {
    /// Scores times `scale`, and nothing else.
    pub fn scaled(scale: f32) -> Self {
        Self { scale, softcap: None, window: None, alibi_slopes: None, relative_position_bias: None, causal: true }
    }
}

/// The activation function of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// `x * Phi(x)` with the normal distribution's Phi (Hendrycks & Gimpel 2016).
    Gelu,
    /// The same with Phi approximated by a hyperbolic tangent.
    GeluTanh,
    Relu,
}

/// `GeluTanh` is `x * sigmoid(a x (1 + b x²))`, with a twice the root of 2/pi.
const GELU_TANH: [f32; 2] = [1.595_769, 0.044_715];

impl Activation {
    /// Of every value, in plain differentiable operations.
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => x.silu(),
            Self::Gelu => x.gelu_erf(),
            Self::GeluTanh => x.gelu(),
            Self::Relu => x.relu(),
        }
    }
}

/// The operations of a decoder that have a differentiable and a fast form.
///
/// Rows are packed: `t` rows of any number of sequences side by side, no padding. An
/// implementation knows which rows belong to which sequence and where their keys and values are.
pub trait Kernels {
    /// Root-mean-square norm (Zhang & Sennrich 2019) over the last dimension of `x`, by `weight`,
    /// which is as long.
    fn rms_norm(&mut self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor>;

    /// Layer norm (Ba et al. 2016) over the last dimension of `x`, by `weight` and `bias`, which are
    /// as long.
    fn layer_norm(&mut self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        let wide = x.to_dtype(widened(x.dtype()))?;
        let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let y = centred.broadcast_div(&(variance + eps)?.sqrt()?)?.to_dtype(x.dtype())?.broadcast_mul(weight)?;
        match bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    /// Rotary embedding (Su et al. 2021), half-split form, of the first dimensions of each head of
    /// `x` `[t, heads, head_dim]`: of twice as many as per-row `cos` and `sin` have columns. The
    /// other dimensions stay.
    fn rope(&mut self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor>;

    /// Attention of layer `layer`, causal unless `params` says otherwise: `q` `[t, heads, head_dim]` against the keys and values
    /// of the same sequence, those of this call `[t, kv_heads, head_dim]` and those of earlier
    /// calls. Returns `[t, heads * head_dim]`.
    fn attention(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        params: &AttentionParams,
    ) -> Result<Tensor>;

    /// Attention of a decoder's layer `layer` to what its encoder made of each sequence's input, all of
    /// it: `q` `[t, heads, head_dim]` to `[t, heads * head_dim]`.
    fn cross_attention(&mut self, layer: usize, q: &Tensor, params: &AttentionParams) -> Result<Tensor> {
        let _ = (q, params);
        bail!("layer {layer} attends to an encoder's output, and these kernels were given none")
    }

    /// The activation function of an MLP, of every value of `x` `[t, intermediate]`.
    fn activate(&mut self, activation: Activation, x: &Tensor) -> Result<Tensor> {
        activation.apply(x)
    }

    /// `activation(gate) * up` of a gated MLP, both `[t, intermediate]`.
    fn gated(&mut self, activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        activation.apply(gate)? * up
    }
}

/// Sums run in at least f32.
fn widened(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
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
