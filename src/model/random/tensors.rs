//! Every tensor that a model of a shape has.

use std::borrow::Cow;

use half::bf16;
use safetensors::{Dtype, View};

use super::draw::fill_normal;
use crate::model::{
    ModelConfig,
    config::{NormKind, QkNorm},
    names::{Mlp, Names, Qkv},
};

/// One tensor; its values are drawn when they are asked for.
#[derive(Debug)]
pub(super) struct RandomTensor {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    fill: Fill,
}

#[derive(Debug, Clone, Copy)]
enum Fill {
    Normal,
    Ones,
    Zeros,
}

/// Every tensor that the decoder takes, under the names Hugging Face gives them and in the shapes of
/// their files.
pub(super) fn tensors(config: &ModelConfig) -> Vec<RandomTensor> {
    let names = config.family.names;
    let prefix = names.prefixes.first().copied().unwrap_or_default();
    let mut list = List { config, names, prefix: prefix.to_owned(), tensors: Vec::new() };
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    list.table(names.embeddings, vocab);
    if let Some((offset, name)) = config.learned_positions.zip(names.positions) {
        list.table(name, config.context_length + offset);
    }
    list.norm_if(config.embedding_norm, names.embedding_norm, hidden);
    list.norm_if(config.final_norm, Some(names.final_norm), hidden);
    list.layers();
    if let Some(encoder) = config.of_encoder() {
        let names = config.family.encoder_names.unwrap_or(config.family.names);
        list.norm(names.final_norm, hidden);
        let mut of_encoder = List { config: &encoder, names, prefix: list.prefix.clone(), tensors: Vec::new() };
        of_encoder.layers();
        list.tensors.append(&mut of_encoder.tensors);
    }
    if !config.tie_word_embeddings {
        list.prefix.clear();
        list.table(names.heads.first().copied().unwrap_or_default(), vocab);
    }
    list.tensors
}

/// Tensors as they are added, all under one prefix.
struct List<'a> {
    config: &'a ModelConfig,
    names: Names,
    prefix: String,
    tensors: Vec<RandomTensor>,
}

impl List<'_> {
    /// Those of all layers.
    fn layers(&mut self) {
        let (config, names, prefix) = (self.config, self.names, self.prefix.clone());
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        for layer in 0..config.num_layers {
            self.prefix = format!("{prefix}{}.{layer}.", names.layers);
            if let Some((bias, name)) = config.relative_bias.filter(|_| layer == 0).zip(names.relative_bias) {
                self.add(&format!("{name}.weight"), &[bias.buckets, config.num_heads], Fill::Normal);
            }
            match names.qkv {
                Qkv::Apart(names) => names.into_iter().zip([q, kv, kv]).for_each(|(name, outer)| {
                    self.linear(name, outer, hidden, config.qkv_bias);
                }),
                Qkv::Stacked(name) | Qkv::ByHead(name) => self.linear(name, q + 2 * kv, hidden, config.qkv_bias),
            }
            self.linear(names.output, hidden, q, config.attention_output_bias);
            match names.mlp {
                Mlp::Gated(names) | Mlp::Either { gated: names, .. } if config.gated_mlp => {
                    names.into_iter().for_each(|name| self.linear(name, inner, hidden, config.mlp_bias))
                }
                Mlp::GatedStacked(name) => self.linear(name, 2 * inner, hidden, config.mlp_bias),
                Mlp::Plain(name) | Mlp::Either { plain: name, .. } | Mlp::Gated([_, name]) => {
                    self.linear(name, inner, hidden, config.mlp_bias)
                }
            }
            self.linear(names.down, hidden, inner, config.mlp_bias);
            for (places, names) in
                [(config.attention_norms, names.attention_norms), (config.mlp_norms, names.mlp_norms)]
            {
                self.norm_if(places.before, names.before, hidden);
                self.norm_if(places.after, names.after, hidden);
                self.norm_if(places.sum, names.sum, hidden);
            }
            let widths = match config.qk_norm {
                None => None,
                Some(QkNorm::Head) => Some([config.head_dim; 2]),
                Some(QkNorm::Projection) => Some([q, kv]),
            };
            if let Some((widths, names)) = widths.zip(names.qk_norms) {
                names.into_iter().zip(widths).for_each(|(name, width)| self.norm(name, width));
            }
            if let Some(names) = names.cross.filter(|_| config.encoder.is_some()) {
                for (name, outer) in names.qkv.into_iter().zip([q, kv, kv]) {
                    self.linear(name, outer, hidden, config.qkv_bias);
                }
                self.linear(names.output, hidden, q, config.attention_output_bias);
                self.norm_if(true, names.norms.before, hidden);
            }
        }
        self.prefix = prefix;
    }

    fn add(&mut self, name: &str, shape: &[usize], fill: Fill) {
        let name = format!("{}{name}", self.prefix);
        self.tensors.push(RandomTensor { name, shape: shape.to_vec(), fill });
    }

    fn table(&mut self, name: &str, rows: usize) {
        self.add(&format!("{name}.weight"), &[rows, self.config.hidden_size], Fill::Normal);
    }

    fn norm_if(&mut self, is: bool, name: Option<&str>, width: usize) {
        if let Some(name) = name.filter(|_| is) {
            self.norm(name, width);
        }
    }

    fn norm(&mut self, name: &str, width: usize) {
        let one = if self.config.norm == NormKind::RmsPlusOne { Fill::Zeros } else { Fill::Ones };
        self.add(&format!("{name}.weight"), &[width], one);
        if self.config.norm == NormKind::Layer {
            self.add(&format!("{name}.bias"), &[width], Fill::Zeros);
        }
    }

    fn linear(&mut self, name: &str, outer: usize, inner: usize, bias: bool) {
        let shape = if self.names.transposed { [inner, outer] } else { [outer, inner] };
        self.add(&format!("{name}.weight"), &shape, Fill::Normal);
        if bias {
            self.add(&format!("{name}.bias"), &[outer], Fill::Normal);
        }
    }
}

impl View for RandomTensor {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        match self.fill {
            Fill::Normal => fill_normal(&mut bytes, &self.name),
            Fill::Zeros => {}
            Fill::Ones => bytes.chunks_exact_mut(2).for_each(|v| v.copy_from_slice(&bf16::ONE.to_le_bytes())),
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }
}
