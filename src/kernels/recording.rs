//! Kernels that keep the keys and values that attention reads.

use candle_core::{Result, Tensor};

use super::{Activation, AttentionParams, Kernels, weight::Linear};

/// Other kernels, with a record of each layer's keys and values.
pub struct Recording {
    inner: Box<dyn Kernels>,
    layers: Vec<(Tensor, Tensor)>,
}

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recording").field("layers", &self.layers.len()).finish_non_exhaustive()
    }
}

impl Recording {
    pub fn new(inner: Box<dyn Kernels>) -> Self {
        Self { inner, layers: Vec::new() }
    }

    /// Keys and values of each layer, both `[t, kv_heads, head_dim]`, as attention read them.
    pub fn into_layers(self) -> Vec<(Tensor, Tensor)> {
        self.layers
    }
}

impl Kernels for Recording {
    fn linear(&mut self, x: &Tensor, layers: &[&Linear], residual: Option<&Tensor>) -> Result<Vec<Tensor>> {
        self.inner.linear(x, layers, residual)
    }

    fn gated_linear(&mut self, activation: Activation, gate: &Linear, up: &Linear, x: &Tensor) -> Result<Tensor> {
        self.inner.gated_linear(activation, gate, up, x)
    }

    fn rms_norm(&mut self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        self.inner.rms_norm(x, weight, eps)
    }

    fn layer_norm(&mut self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        self.inner.layer_norm(x, weight, bias, eps)
    }

    fn rope(&mut self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        self.inner.rope(x, cos, sin)
    }

    fn attention(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        self.layers.push((k.clone(), v.clone()));
        self.inner.attention(layer, q, k, v, params)
    }

    fn cross_attention(&mut self, layer: usize, q: &Tensor, params: &AttentionParams) -> Result<Tensor> {
        self.inner.cross_attention(layer, q, params)
    }

    fn activate(&mut self, activation: Activation, x: &Tensor) -> Result<Tensor> {
        self.inner.activate(activation, x)
    }

    fn log_probabilities(&mut self, logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
        self.inner.log_probabilities(logits, targets)
    }
}
