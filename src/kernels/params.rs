//! What attention and the activation of an MLP are computed with: the same for every backend.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::relative_position_bias::RelativePositionBias;

/// The parameters of one attention layer: scaling, biases and the mask.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionParams {
    /// What the product of a query and a key is multiplied with, usually `head_dim^-1/2`.
    pub scale: f32,
    /// A scaled score `s` becomes `softcap * tanh(s / softcap)` (Gemma 2).
    pub softcap: Option<f32>,
    /// Sliding-window attention: each position attends to itself and the `window - 1` before it. With
    /// none, to itself and all before it.
    pub window: Option<usize>,
    /// ALiBi (Press et al. 2022), `[heads]`: a score gets its head's slope times the key's distance,
    /// which is never above zero.
    pub alibi_slopes: Option<Arc<[f32]>>,
    /// A bias that is added to a score by its head and its key's distance (T5).
    pub relative_position_bias: Option<Arc<RelativePositionBias>>,
    /// Causal attention: each position attends to itself and those before it. Without it (an encoder), each
    /// attends to all of its sequence, which then has to lie in one call, with no window and no slopes.
    pub causal: bool,
}

impl AttentionParams {
    /// Causal attention with scores times `scale`, and nothing else.
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
pub(super) const GELU_TANH: [f32; 2] = [1.595_769, 0.044_715];

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

/// How products of a GGUF file's quantised weights are computed on a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantisedProducts {
    /// With the values that the blocks stand for, in f32.
    Exact,
    /// With activations that are rounded to 8 bits, as integers: several times as fast.
    Integers,
}
