//! The encoder of an encoder-decoder model: layers in which every row sees all of its input.

use candle_core::{Result, Tensor};

use super::{
    ModelConfig,
    branch::Stream,
    layer::Layer,
    source::{Loaded, Source},
    weights::Weights,
};
use crate::kernels::{Backend, Kernels, norm::Norm};

/// The layers of an encoder. Its embeddings are the decoder's.
#[derive(Debug)]
pub struct Encoder {
    layers: Vec<Layer>,
    final_norm: Norm,
}

impl Encoder {
    /// Takes the encoder's tensors out of `weights`, if the model has one.
    pub fn load(config: &ModelConfig, weights: &mut Weights, backend: &dyn Backend) -> Loaded<Option<Self>> {
        let Some(config) = config.of_encoder() else { return Ok(None) };
        let mut source = Source::of_encoder(&config, weights, backend);
        let bias = source.relative_position_bias(&config)?;
        let layer = |i| Layer::load(&config, i, bias.as_ref(), &mut source);
        let layers = (0..config.num_layers).map(layer).collect::<Loaded<_>>()?;
        let name = source.names().final_norm;
        Ok(Some(Self { layers, final_norm: source.norm(None, name, config.hidden_size)? }))
    }

    /// See [`Model::encode`](super::Model::encode).
    pub fn forward(&self, x: &Tensor, kernels: &mut dyn Kernels) -> Result<Tensor> {
        let mut stream = Stream::new(x.clone());
        for (i, layer) in self.layers.iter().enumerate() {
            let next = self.layers.get(i + 1).map_or(Some(&self.final_norm), Layer::first_norm);
            stream = layer.forward(i, stream, next, None, &[], kernels)?;
        }
        stream.into_normed(Some(&self.final_norm), kernels)
    }

    /// Every weight, in a fixed order, one at a time.
    pub fn tensors(&self) -> impl Iterator<Item = Result<Tensor>> {
        self.layers.iter().flat_map(Layer::tensors).chain(self.final_norm.tensors().map(Ok))
    }
}
