//! The decoder, one for all families, by config: embeddings and positions, layers, and the output
//! matrix, over packed rows.

use candle_core::{D, DType, Device, Result, Tensor};

use super::{
    ModelConfig,
    branch::Stream,
    layer::Layer,
    rotation::{Rotary, Rotation},
    source::{Loaded, Source},
    weights::Weights,
};
use crate::kernels::{
    Backend, Kernels, capped,
    layout::{BatchLayout, RowIndices},
    norm::Norm,
    weight::{Linear, Weight},
};

/// Rows of the embedding table that are in floats at a time when all are gone through.
const EMBEDDINGS_AT_A_TIME: usize = 1024;

/// The layers of a decoder and the tables around them.
#[derive(Debug)]
pub struct Decoder {
    embeddings: Weight,
    embedding_scale: Option<f64>,
    /// The embeddings of positions, `[context_length, hidden]`.
    positions: Option<Tensor>,
    embedding_norm: Option<Norm>,
    /// Heads of queries in each layer.
    num_heads: usize,
    layers: Vec<Layer>,
    final_norm: Option<Norm>,
    head: Linear,
    output_scale: Option<f64>,
    softcap: Option<f64>,
    rotaries: Vec<Rotary>,
    dtype: DType,
}

impl Decoder {
    /// Takes the decoder's tensors out of `weights`, under the names Hugging Face gives them.
    pub fn load(config: &ModelConfig, weights: &mut Weights, backend: &dyn Backend) -> Loaded<Self> {
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let stored = weights.dtype();
        let dtype = backend.activation_dtype(stored);
        let mut source = Source::new(config, weights, backend);
        let names = source.names();
        let embeddings = source.embeddings(vocab, hidden)?;
        let positions = match config.learned_positions.zip(names.positions) {
            Some((offset, name)) => {
                let table = source.table(name, config.context_length + offset, hidden)?;
                Some(source.activations(table.narrow(0, offset, config.context_length)?.contiguous()?)?)
            }
            None => None,
        };
        let mut norm =
            |is: bool, name: Option<&str>| name.filter(|_| is).map(|name| source.norm(None, name, hidden)).transpose();
        let embedding_norm = norm(config.embedding_norm, names.embedding_norm)?;
        let final_norm = norm(config.final_norm, Some(names.final_norm))?;
        let bias = source.relative_position_bias(config)?;
        let layer = |i| Layer::load(config, i, bias.as_ref(), &mut source);
        let layers = (0..config.num_layers).map(layer).collect::<Loaded<_>>()?;
        let head = match config.tie_word_embeddings && (config.encoder.is_none() || !source.has_head()) {
            true => embeddings.clone(),
            false => source.head(vocab, hidden)?,
        };
        let rotary = |rope| Rotary::new(rope, config.context_length, backend.device(), dtype);
        Ok(Self {
            embeddings,
            embedding_scale: config.embedding_scale.map(|scale| rounded(scale, stored)).transpose()?,
            positions,
            embedding_norm,
            num_heads: config.num_heads,
            layers,
            final_norm,
            head: Linear { name: "lm_head".to_owned(), weight: head, bias: None },
            output_scale: config.output_scale,
            softcap: config.final_softcap,
            rotaries: config.ropes.iter().map(rotary).collect::<Result<_>>()?,
            dtype,
        })
    }

    /// `[t]` ids to `[t, hidden]`.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        self.scaled(self.embeddings.rows(ids)?)
    }

    /// The type of hidden states.
    pub fn activation_dtype(&self) -> DType {
        self.dtype
    }

    /// See [`Model::embedding_mean_square`](super::Model::embedding_mean_square).
    pub fn embedding_mean_square(&self) -> Result<f64> {
        let (vocab, hidden) = self.embeddings.dims();
        let mut sum = 0.0;
        for first in (0..vocab).step_by(EMBEDDINGS_AT_A_TIME) {
            let ids = Tensor::arange(first as u32, vocab.min(first + EMBEDDINGS_AT_A_TIME) as u32, &Device::Cpu)?;
            let squares = self.embed(&ids)?.to_dtype(DType::F32)?.sqr()?.sum(D::Minus1)?;
            sum += squares.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
        }
        Ok(sum / (vocab * hidden) as f64)
    }

    /// What token embeddings are multiplied with.
    pub fn embedding_scale(&self) -> Option<f64> {
        self.embedding_scale
    }

    fn scaled(&self, rows: Tensor) -> Result<Tensor> {
        match self.embedding_scale {
            Some(scale) => rows * scale,
            None => Ok(rows),
        }
    }

    /// See [`Model::forward`](super::Model::forward).
    pub fn forward(&self, x: &Tensor, batch: &BatchLayout, kernels: &mut dyn Kernels) -> Result<Tensor> {
        let RowIndices { positions, wanted } = kernels.row_indices(batch, self.num_heads, x.device())?;
        let last = batch.positions().into_iter().max().unwrap_or(0);
        let of_rows = |rotary: &Rotary| rotary.of_rows(last, &positions, kernels);
        let rotations = self.rotaries.iter().map(of_rows).collect::<Result<Vec<Rotation>>>()?;
        let mut x = match &self.positions {
            Some(table) => (x + kernels.pick(table, &positions)?)?,
            None => x.clone(),
        };
        if let Some(norm) = &self.embedding_norm {
            x = kernels.norm(&x, norm)?;
        }
        let (mut stream, final_norm) = (Stream::new(x), self.final_norm.as_ref());
        for (i, layer) in self.layers.iter().enumerate() {
            let (next, wanted) = match self.layers.get(i + 1) {
                Some(next) => (next.first_norm(), None),
                None => (final_norm, wanted.as_ref()),
            };
            stream = layer.forward(i, stream, next, wanted, &rotations, kernels)?;
        }
        stream.into_normed(final_norm, kernels)
    }

    /// `[t, hidden]` to `[t, vocab]`, in f32; in f64 for a model in f64.
    pub fn logits(&self, hidden: &Tensor, kernels: &mut dyn Kernels) -> Result<Tensor> {
        let logits = self.head.forward(&self.head_input(hidden)?, kernels)?;
        let logits = match logits.dtype() {
            DType::F64 => logits,
            _ => logits.to_dtype(DType::F32)?,
        };
        capped(&logits, self.softcap)
    }

    /// See [`Model::score`](super::Model::score).
    pub fn score(&self, hidden: &Tensor, ids: &[Vec<u32>], kernels: &mut dyn Kernels) -> Result<Vec<Vec<f32>>> {
        kernels.score(&self.head_input(hidden)?, &self.head, self.softcap, ids)
    }

    fn head_input(&self, hidden: &Tensor) -> Result<Tensor> {
        match self.output_scale {
            Some(scale) => hidden * scale,
            None => Ok(hidden.clone()),
        }
    }

    /// See [`Model::cross_key_values`](super::Model::cross_key_values).
    pub fn cross_key_values(&self, encoded: &Tensor, kernels: &mut dyn Kernels) -> Result<Vec<(Tensor, Tensor)>> {
        self.layers.iter().map(|layer| layer.cross_key_values(encoded, kernels)).collect()
    }

    /// Every weight, in a fixed order, one at a time.
    pub fn tensors(&self) -> impl Iterator<Item = Result<Tensor>> {
        let norms = self.embedding_norm.iter().chain(&self.final_norm).flat_map(Norm::tensors);
        let tables = std::iter::once(self.embeddings.to_tensor()).chain(self.positions.clone().map(Ok));
        tables.chain(norms.map(Ok)).chain(self.head.tensors()).chain(self.layers.iter().flat_map(Layer::tensors))
    }
}

/// As a value of the weights' type, which transformers multiplies embeddings with.
fn rounded(x: f64, dtype: DType) -> Result<f64> {
    let x = Tensor::new(x, &Device::Cpu)?;
    x.to_dtype(dtype)?.to_dtype(DType::F64)?.to_scalar()
}
