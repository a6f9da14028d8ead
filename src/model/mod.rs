//! The frozen model: embeddings in, hidden states out. It has never heard of prompts.

mod branch;
pub mod config;
pub mod decoder;
mod encoder;
mod error;
pub mod family;
pub mod files;
pub mod gguf;
#[cfg(feature = "hub")]
pub mod hub;
mod layer;
mod names;
pub mod neighbours;
pub mod random;
mod relative;
mod rotation;
mod source;
pub mod tokenizer;
pub mod weights;

use std::sync::Arc;

use bytesize::ByteSize;
use candle_core::{DType, Device, Result, Tensor, bail};
use sha2::{Digest as _, Sha256};

pub use config::{EncoderConfig, ModelConfig};
pub use error::ModelError;
pub use files::{ChatFiles, ModelFiles};

use crate::kernels::{
    Backend, DeviceMemory, Kernels,
    layout::{BatchLayout, KvShape},
};
use decoder::Decoder;
use encoder::Encoder;

/// A loaded model: weights that nothing changes.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    info: ModelInfo,
    encoder: Option<Encoder>,
    decoder: Decoder,
    backend: Arc<dyn Backend>,
}

/// The facts of a model that other layers need.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// The folder's or hub's name.
    pub name: String,
    /// 16 hex digits that tell one set of weights from another; see [`ModelFiles::fingerprint`].
    pub fingerprint: String,
    pub hidden_size: usize,
    pub vocab_size: usize,
    /// Layers of the decoder.
    pub num_layers: usize,
    /// The encoder before the decoder, if there is one.
    pub encoder: Option<EncoderConfig>,
    /// Heads of keys and values.
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// The most positions of one sequence.
    pub context_length: usize,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
    /// What the embeddings of tokens were multiplied with (Gemma); rows that are given to
    /// [`Model::forward`] in their place are taken as they are.
    pub embedding_scale: Option<f64>,
    pub num_parameters: usize,
    /// How a conversation becomes a text.
    pub chat: ChatFiles,
    pub device: Device,
    pub dtype: DType,
}

/// Whether so many values fit into a device's free memory.
fn check_fits(parameters: usize, dtype: DType, memory: DeviceMemory) -> std::result::Result<(), ModelError> {
    let needed = parameters.saturating_mul(dtype.size_in_bytes());
    if needed <= memory.free {
        return Ok(());
    }
    let size = |bytes: usize| ByteSize(bytes as u64);
    let (free, total) = (size(memory.free), size(memory.total));
    Err(ModelError::DoesNotFit { parameters, dtype: dtype.as_str(), needed: size(needed), free, total })
}

impl Model {
    /// Reads the weights for `backend` in `dtype`.
    pub fn load(files: &ModelFiles, backend: Arc<dyn Backend>, dtype: DType) -> std::result::Result<Self, ModelError> {
        let config = files.config()?;
        let mut weights = weights::Weights::read(files, dtype)?;
        let num_parameters = weights.num_parameters();
        if let Some(memory) = backend.memory()? {
            check_fits(num_parameters, dtype, memory)?;
        }
        let encoder = Encoder::load(&config, &mut weights, &*backend)?;
        let decoder = Decoder::load(&config, &mut weights, &*backend)?;
        weights.finish()?;
        let info = ModelInfo {
            name: files.name().to_owned(),
            fingerprint: files.fingerprint()?,
            hidden_size: config.hidden_size,
            vocab_size: config.vocab_size,
            num_layers: config.num_layers,
            encoder: config.encoder.clone(),
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            context_length: config.context_length,
            eos_token_ids: files.eos_token_ids(&config)?,
            embedding_scale: decoder.embedding_scale(),
            num_parameters,
            chat: files.chat()?,
            device: backend.device().clone(),
            dtype,
        };
        Ok(Self { config, info, encoder, decoder, backend })
    }

    /// What the model is.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Its shape, from `config.json`.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What the model runs on.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// The shape of its key-value cache, which is in bf16 where the weights are.
    pub fn kv_shape(&self) -> KvShape {
        let c = &self.config;
        let dtype = match self.info.dtype {
            DType::BF16 => DType::BF16,
            dtype => self.backend.activation_dtype(dtype),
        };
        KvShape { num_layers: c.num_layers, num_kv_heads: c.num_kv_heads, head_dim: c.head_dim, dtype }
    }

    /// The type of hidden states: on a CPU never less than f32, whatever the weights are.
    pub fn activation_dtype(&self) -> DType {
        self.decoder.activation_dtype()
    }

    /// Token embeddings: `[t]` u32 ids to `[t, hidden]`.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        self.decoder.embed(ids)
    }

    /// The mean of the squares of all values that [`embed`](Self::embed) gives. The table is gone through in parts: of a
    /// quantised one, all values in f32 would be the largest thing in memory.
    pub fn embedding_mean_square(&self) -> Result<f64> {
        self.decoder.embedding_mean_square()
    }

    /// Packed embeddings `[t, hidden]` of any number of sequences to the final hidden states of the rows that are wanted,
    /// `[wanted, hidden]`. The layout says at which position of its sequence each row is; which rows belong together is
    /// known to `kernels` alone, made for the same layout. Learned positions and a norm of embeddings are added here, to
    /// every row. Differentiable with respect to `x` if the kernels are.
    pub fn forward(&self, x: &Tensor, batch: &BatchLayout, kernels: &mut dyn Kernels) -> Result<Tensor> {
        self.decoder.forward(x, batch, kernels)
    }

    /// Packed embeddings `[t, hidden]` of any number of inputs of an encoder, each in one piece, to its
    /// hidden states `[t, hidden]`.
    ///
    /// # Errors
    /// The model has no encoder, or a kernel fails.
    pub fn run_encoder(&self, x: &Tensor, kernels: &mut dyn Kernels) -> Result<Tensor> {
        match &self.encoder {
            Some(encoder) => encoder.forward(x, kernels),
            None => bail!("the model {} has no encoder", self.info.name),
        }
    }

    /// What the decoder's layers find in hidden states of the encoder `[t, hidden]`: for each layer
    /// keys and values, both `[t, kv_heads, head_dim]`.
    pub fn cross_key_values(&self, encoded: &Tensor, kernels: &mut dyn Kernels) -> Result<Vec<(Tensor, Tensor)>> {
        self.decoder.cross_key_values(encoded, kernels)
    }

    /// Bytes of keys and values that one position of an encoder's input takes; 0 without an encoder.
    pub fn cross_bytes(&self) -> usize {
        let c = &self.config;
        let values = 2 * c.num_layers * c.num_kv_heads * c.head_dim;
        c.encoder.as_ref().map_or(0, |_| values * size_of::<f32>())
    }

    /// Hidden states `[t, hidden]` to logits `[t, vocab]` in f32; in f64 for a model in f64.
    pub fn logits(&self, hidden: &Tensor, kernels: &mut dyn Kernels) -> Result<Tensor> {
        self.decoder.logits(hidden, kernels)
    }

    /// Of each row of hidden states `[t, hidden]`, the natural log-probabilities of some ids; see [`Kernels::score`].
    pub fn score(&self, hidden: &Tensor, ids: &[Vec<u32>], kernels: &mut dyn Kernels) -> Result<Vec<Vec<f32>>> {
        self.decoder.score(hidden, ids, kernels)
    }

    /// The SHA-256 of every weight as it lies in memory: equal before and after anything that
    /// must not change the model.
    pub fn weights_digest(&self) -> Result<[u8; 32]> {
        let mut hash = Sha256::new();
        let encoder = self.encoder.iter().flat_map(Encoder::tensors);
        for tensor in self.decoder.tensors().chain(encoder) {
            // bf16 to f32 and f32 to f64 are exact, so this hashes the very bits.
            let values = tensor?.to_device(&Device::Cpu)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            values.iter().for_each(|x| hash.update(x.to_bits().to_le_bytes()));
        }
        Ok(hash.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_that_do_not_fit_a_device_are_refused_with_the_arithmetic() {
        let memory = DeviceMemory { free: 10 << 30, total: 12 << 30 };
        assert!(check_fits(5 << 30, DType::BF16, memory).is_ok());
        let error = check_fits(8_000_000_000, DType::BF16, memory).unwrap_err().to_string();
        for words in ["8000000000 parameters in bf16 are 14.9 GiB", "10.0 GiB of 12.0 GiB are free"] {
            assert!(error.contains(words), "{error}");
        }
        assert!(check_fits(usize::MAX, DType::F32, memory).is_err());
    }
}
