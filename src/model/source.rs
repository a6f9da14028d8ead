//! The decoder's parts as they come out of a file: found by their family's names, unpacked, in the type
//! of activations or ready for the kernels.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};

use super::{ModelConfig, ModelError, config, names::Names, relative, weights::Weights};
use crate::kernels::{
    Backend,
    norm::{Norm, NormKind},
    relative_position_bias::RelativePositionBias,
    weight::{Linear, Matrix, Weight},
};

/// What reading a part gives.
pub type Loaded<T> = std::result::Result<T, ModelError>;

/// A file's tensors, by the names of a family.
#[derive(Debug)]
pub struct Source<'a> {
    backend: &'a dyn Backend,
    weights: &'a mut Weights,
    names: Names,
    prefix: &'static str,
    norm: config::NormKind,
    norm_eps: f64,
}

impl<'a> Source<'a> {
    /// Finds out what comes before the names in this file.
    pub fn new(config: &ModelConfig, weights: &'a mut Weights, backend: &'a dyn Backend) -> Self {
        let names = config.family.names;
        let mut prefixes = names.prefixes.iter().copied();
        let found = prefixes.find(|prefix| weights.has(&format!("{prefix}{}.weight", names.embeddings)));
        let prefix = found.or(names.prefixes.first().copied()).unwrap_or_default();
        Self { backend, weights, names, prefix, norm: config.norm, norm_eps: config.norm_eps }
    }

    /// As [`new`](Self::new), by the names of the encoder, whose shape `config` is.
    pub fn of_encoder(config: &ModelConfig, weights: &'a mut Weights, backend: &'a dyn Backend) -> Self {
        Self {
            names: config.family.encoder_names.unwrap_or(config.family.names),
            ..Self::new(config, weights, backend)
        }
    }

    /// Whether the file has an output matrix of its own.
    pub fn has_head(&self) -> bool {
        self.names.heads.iter().any(|name| self.weights.has(&format!("{name}.weight")))
    }

    /// The relative position bias that the first layer has for all, if the model has one.
    pub fn relative_position_bias(&mut self, config: &ModelConfig) -> Loaded<Option<Arc<RelativePositionBias>>> {
        let Some((bias, name)) = config.relative_bias.zip(self.names.relative_bias) else { return Ok(None) };
        let name = format!("{}.weight", self.path(0, name));
        let shape = [bias.buckets, config.num_heads];
        let is_there = self.weights.shape(&name).is_some_and(|found| found == shape);
        let table = self.weights.take(&name, shape.as_slice())?;
        if !is_there {
            return Ok(None);
        }
        Ok(Some(Arc::new(relative::relative_position_bias(&table, bias, config.causal)?)))
    }

    /// The names of its family.
    pub fn names(&self) -> Names {
        self.names
    }

    /// A table before the layers, `[rows, width]`.
    pub fn table(&mut self, name: &str, rows: usize, width: usize) -> Loaded<Tensor> {
        self.weights.take(&format!("{}{name}.weight", self.prefix), (rows, width))
    }

    /// The embedding table of tokens, `[rows, width]`.
    pub fn embeddings(&mut self, rows: usize, width: usize) -> Loaded<Weight> {
        let name = format!("{}{}.weight", self.prefix, self.names.embeddings);
        let matrix = self.weights.take_matrix(&name, rows, width)?;
        Ok(self.backend.weight(matrix, self.weights.dtype())?)
    }

    /// The output matrix, `[rows, width]`.
    pub fn head(&mut self, rows: usize, width: usize) -> Loaded<Weight> {
        let path = |name: &str| format!("{name}.weight");
        let mut names = self.names.heads.iter().map(|name| path(name));
        let found = names.find(|name| self.weights.has(name));
        let first = || self.names.heads.first().map(|name| path(name));
        let matrix = self.weights.take_matrix(&found.or_else(first).unwrap_or_default(), rows, width)?;
        Ok(self.backend.weight(matrix, self.weights.dtype())?)
    }

    /// A norm of `width` values, of a layer or outside of them.
    pub fn norm(&mut self, layer: Option<usize>, name: &str, width: usize) -> Loaded<Norm> {
        let path = match layer {
            Some(index) => self.path(index, name),
            None => format!("{}{name}", self.prefix),
        };
        let mut weight = self.weights.take(&format!("{path}.weight"), width)?;
        weight = self.activations(weight)?;
        if self.norm == config::NormKind::RmsPlusOne {
            weight = (weight + 1.0)?;
        }
        let kind = match self.norm {
            config::NormKind::Layer => {
                let bias = self.weights.take(&format!("{path}.bias"), width)?;
                NormKind::Layer(Some(self.activations(bias)?))
            }
            config::NormKind::Rms | config::NormKind::RmsPlusOne => NormKind::Rms,
        };
        Ok(Norm { weight, kind, eps: self.norm_eps })
    }

    /// A linear layer of a layer, from `inner` to `outer` values.
    pub fn linear(&mut self, layer: usize, name: &str, outer: usize, inner: usize, bias: bool) -> Loaded<Stored<'a>> {
        let path = self.path(layer, name);
        let name = format!("{path}.weight");
        let weight = match self.names.transposed {
            true => Matrix::Values(self.weights.take(&name, (inner, outer))?.t()?),
            false => self.weights.take_matrix(&name, outer, inner)?,
        };
        let bias = match bias {
            true => {
                let bias = self.weights.take(&format!("{path}.bias"), outer)?;
                Some(self.activations(bias)?)
            }
            false => None,
        };
        Ok(Stored { backend: self.backend, dtype: self.weights.dtype(), path, weight, bias })
    }

    /// Linear layers of the same input, as the backend keeps such.
    pub fn side_by_side<const N: usize>(&self, mut layers: [Linear; N]) -> Result<[Linear; N]> {
        let weights = self.backend.side_by_side(layers.iter().map(|layer| layer.weight.clone()).collect())?;
        for (layer, weight) in layers.iter_mut().zip(weights) {
            layer.weight = weight;
        }
        Ok(layers)
    }

    /// A tensor in the type of activations, on the device.
    pub fn activations(&self, x: Tensor) -> Result<Tensor> {
        x.to_dtype(self.backend.activation_dtype(x.dtype()))?.to_device(self.backend.device())
    }

    fn path(&self, layer: usize, name: &str) -> String {
        format!("{}{}.{layer}.{name}", self.prefix, self.names.layers)
    }
}

/// A linear layer as a file has it: perhaps several in one.
#[derive(Debug)]
pub struct Stored<'a> {
    backend: &'a dyn Backend,
    dtype: DType,
    path: String,
    /// `[out, in]`
    weight: Matrix,
    /// `[out]`
    bias: Option<Tensor>,
}

impl Stored<'_> {
    /// All of it.
    pub fn whole(self) -> Loaded<Linear> {
        let weight = self.backend.weight(self.weight, self.dtype)?;
        Ok(Linear { name: self.path, weight, bias: self.bias })
    }

    /// `n` outputs from `first` on.
    pub fn rows(&self, first: usize, n: usize) -> Loaded<Linear> {
        self.part(self.weight.rows(first, n)?, |x| x.narrow(0, first, n))
    }

    /// Part `part` of three of each head, which all have `dim` outputs.
    pub fn of_heads(&self, part: usize, dim: usize) -> Loaded<Linear> {
        let of = |x: &Tensor| {
            let heads = x.dim(0)? / (3 * dim);
            let rest = &x.dims()[1..];
            let split = x.reshape([&[heads, 3, dim], rest].concat())?.narrow(1, part, 1)?;
            split.reshape([&[heads * dim], rest].concat())
        };
        let weight = of(&self.weight.values()?)?;
        // What lay in blocks is f32 now, and has the values that it had.
        self.part(Matrix::Values(weight.to_dtype(self.dtype)?), of)
    }

    fn part(&self, weight: Matrix, of_bias: impl Fn(&Tensor) -> Result<Tensor>) -> Loaded<Linear> {
        let bias = self.bias.as_ref().map(|bias| of_bias(bias)?.contiguous()).transpose()?;
        Ok(Linear { name: self.path.clone(), weight: self.backend.weight(weight, self.dtype)?, bias })
    }
}
