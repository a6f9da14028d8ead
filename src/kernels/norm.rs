//! Norms of rows, as plain data.

use candle_core::Tensor;

/// A norm over the last dimension of what it is given, with its weights.
#[derive(Debug, Clone)]
pub struct Norm {
    /// What a normed row is multiplied with.
    pub weight: Tensor,
    pub kind: NormKind,
    /// What is added to the mean of squares.
    pub eps: f64,
}

/// The kinds of norms.
#[derive(Debug, Clone)]
pub enum NormKind {
    /// Root-mean-square norm (Zhang & Sennrich 2019).
    Rms,
    /// Layer norm (Ba et al. 2016), with its bias if there is one.
    Layer(Option<Tensor>),
}

impl Norm {
    /// Its weight, and its bias if there is one.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor> {
        let bias = match &self.kind {
            NormKind::Rms => None,
            NormKind::Layer(bias) => bias.clone(),
        };
        std::iter::once(self.weight.clone()).chain(bias)
    }
}

/// The norms of queries and keys before they are rotated (Henry et al. 2020, QKNorm).
#[derive(Debug, Clone)]
pub struct QkNorms {
    pub queries: Norm,
    pub keys: Norm,
    /// Whether each head is normed by itself; all heads of a row as one otherwise.
    pub by_head: bool,
}
