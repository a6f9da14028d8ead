//! What a run learns: named tensors, laid one after another into the flat values that the optimiser
//! moves and a checkpoint keeps, and the prompt that they make.

use candle_core::{DType, Device, Result, Tensor, Var, bail};

use super::{learned_tensor::LearnedTensor, prompt_encoder::PromptEncoder};
use crate::{
    model::Model,
    prompt::{
        format::Fit,
        learned::{Embeddings, KeyValues, LayerKeyValues, LearnedPrompt},
    },
};

/// How a prompt is learned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// The rows themselves (Lester et al. 2021).
    PromptTuning,
    /// The rows by way of a network that makes them (Liu et al. 2021).
    PTuning(PromptEncoder),
    /// Keys and values of each layer (Li & Liang 2021), without a network.
    PrefixTuning,
}

/// The tensors of a run and what the forward pass takes of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameters {
    method: Method,
    virtual_tokens: usize,
    kv_heads: usize,
    /// For each layer of the model, which of the learned layers of keys and values it reads.
    read: Vec<usize>,
    tensors: Vec<LearnedTensor>,
}

impl Method {
    /// Its name for people.
    pub fn title(self) -> &'static str {
        match self {
            Self::PromptTuning => "prompt tuning",
            Self::PTuning(_) => "P-tuning",
            Self::PrefixTuning => "prefix tuning",
        }
    }

    /// The learning rates to try, in units of how large what is learned is: what Adam may move a value in a step, compared to
    /// the values.
    pub fn relative_rates(self) -> [f64; 5] {
        match self {
            Self::PromptTuning => [0.03, 0.1, 0.3, 1.0, 3.0],
            Self::PTuning(_) => [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
            Self::PrefixTuning => [0.003, 0.01, 0.03, 0.1, 0.3],
        }
    }

    /// What the command line and a checkpoint call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::PromptTuning => "prompt",
            Self::PTuning(_) => "p-tuning",
            Self::PrefixTuning => "prefix",
        }
    }
}

impl Parameters {
    /// The tensors of a prompt of `n` virtual tokens for a model.
    pub fn new(method: Method, n: usize, model: &Model) -> Self {
        let fit = Fit::from(model.info());
        let mut read: Vec<usize> = (0..fit.num_layers).map(|layer| fit.key_values_layer(layer)).collect();
        let mut layers = read.clone();
        layers.sort_unstable();
        layers.dedup();
        read.iter_mut().for_each(|layer| *layer = layers.partition_point(|other| other < layer));
        let tensors = match method {
            Method::PromptTuning => vec![LearnedTensor::new("prompt_embeddings", &[n, fit.hidden_size])],
            Method::PTuning(encoder) => encoder.named(n, fit.hidden_size),
            Method::PrefixTuning => layers
                .into_iter()
                .flat_map(|layer| ["key", "value"].map(|part| format!("layers.{layer}.{part}")))
                .map(|name| LearnedTensor::new(&name, &[n, fit.kv_dim()]))
                .collect(),
        };
        Self { method, virtual_tokens: n, kv_heads: fit.num_kv_heads, read, tensors }
    }

    /// How the prompt is learned.
    pub fn method(&self) -> Method {
        self.method
    }

    /// Positions that the prompt takes.
    pub fn virtual_tokens(&self) -> usize {
        self.virtual_tokens
    }

    /// The tensors, in the order of their values.
    pub fn tensors(&self) -> &[LearnedTensor] {
        &self.tensors
    }

    /// For each learned layer of keys and values, the first layer of the model that reads it.
    pub fn readers(&self) -> impl Iterator<Item = usize> {
        (0..).map_while(|learned| self.read.iter().position(|&read| read == learned))
    }

    /// How many values are learned; never 0.
    #[expect(clippy::len_without_is_empty, reason = "a prompt has a virtual token or more")]
    pub fn len(&self) -> usize {
        self.tensors.iter().map(LearnedTensor::len).sum()
    }

    /// The values as variables, one for each tensor.
    pub fn variables(&self, values: &[f32], device: &Device) -> Result<Vec<Var>> {
        self.split(values, device)?.iter().map(Var::from_tensor).collect()
    }

    /// The prompt that the tensors make, in their dtype; differentiable.
    pub fn prompt(&self, tensors: &[Tensor]) -> Result<LearnedPrompt> {
        if tensors.len() != self.tensors.len() {
            bail!("{} tensors are learned, found {}", self.tensors.len(), tensors.len());
        }
        match self.method {
            Method::PromptTuning => Ok(LearnedPrompt::Embeddings(Embeddings { rows: tensors[0].clone() })),
            Method::PTuning(encoder) => Ok(LearnedPrompt::Embeddings(Embeddings { rows: encoder.rows(tensors)? })),
            Method::PrefixTuning => {
                let heads = |x: &Tensor| {
                    let (n, width) = x.dims2()?;
                    x.reshape((n, self.kv_heads, width / self.kv_heads))?.transpose(0, 1)
                };
                let layers = self
                    .read
                    .iter()
                    .map(|i| Ok(LayerKeyValues { keys: heads(&tensors[2 * i])?, values: heads(&tensors[2 * i + 1])? }));
                Ok(LearnedPrompt::KeyValues(KeyValues { layers: layers.collect::<Result<_>>()? }))
            }
        }
    }

    /// The prompt that values make, in f32 and without gradients.
    pub fn prompt_of(&self, values: &[f32], device: &Device) -> Result<LearnedPrompt> {
        self.prompt(&self.split(values, device)?)
    }

    fn split(&self, values: &[f32], device: &Device) -> Result<Vec<Tensor>> {
        if values.len() != self.len() {
            bail!("{} values are learned, found {}", self.len(), values.len());
        }
        let mut rest = values;
        self.tensors
            .iter()
            .map(|named| {
                let (own, after) = rest.split_at(named.len());
                rest = after;
                Tensor::from_slice(own, named.shape.as_slice(), device)
            })
            .collect()
    }
}

/// The matrix of a prompt as PEFT saves it, in f32: rows `[n, hidden]`, or keys and values
/// `[n, 2 * layers * kv_dim]` with the key and the value of each layer in turn, zeros for those that no
/// layer of the model reads.
pub fn matrix(prompt: &LearnedPrompt, fit: &Fit) -> Result<Tensor> {
    let matrix = match prompt {
        LearnedPrompt::Embeddings(embeddings) => embeddings.rows.clone(),
        LearnedPrompt::KeyValues(kv) => {
            let flat = |x: &Tensor| x.transpose(0, 1)?.flatten_from(1)?.to_device(&Device::Cpu)?.to_dtype(DType::F32);
            let unread = || Tensor::zeros((prompt.num_virtual_tokens(), fit.kv_dim()), DType::F32, &Device::Cpu);
            let mut parts = Vec::new();
            for saved in 0..fit.key_values_layers() {
                let reader = kv.layers.iter().enumerate().find(|(layer, _)| fit.key_values_layer(*layer) == saved);
                parts.extend(match reader {
                    Some((_, layer)) => [flat(&layer.keys)?, flat(&layer.values)?],
                    None => [unread()?, unread()?],
                });
            }
            Tensor::cat(&parts, 1)?
        }
    };
    matrix.detach().to_dtype(DType::F32)?.to_device(&Device::Cpu)
}
