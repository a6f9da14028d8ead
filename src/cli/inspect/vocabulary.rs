//! Virtual tokens beside those of the vocabulary: norms, and which embeddings point the same way.

use candle_core::{Device, Result, Tensor};

use super::subject::Rows;
use crate::{
    model::{
        Model,
        neighbours::{Nearest, Neighbours},
    },
    tokenizer::Tokenizer,
};

/// What the vocabulary's embeddings are like, and each virtual token's nearest.
#[derive(Debug)]
pub struct Vocabulary {
    /// Sorted.
    pub norms: Vec<f64>,
    /// Ids with their cosine similarity, the nearest first, of each virtual token.
    pub nearest: Vec<Vec<(u32, f32)>>,
}

impl Vocabulary {
    /// Compares each row with each token that the tokenizer knows, as the model embeds it.
    pub fn of(model: &Model, tokenizer: &Tokenizer, rows: &Rows, count: usize) -> Result<Self> {
        let hidden = model.info().hidden_size;
        let rows = Tensor::from_slice(&rows.values, (rows.values.len() / hidden, hidden), &Device::Cpu)?;
        let num_tokens = model.info().vocab_size.min(tokenizer.vocab_size());
        let mut neighbours = Neighbours::new(&rows, num_tokens, count)?;
        let Nearest { nearest, vocabulary_norms, .. } = loop {
            if let Some(found) = neighbours.compare_chunk(model)? {
                break found;
            }
        };
        let mut norms: Vec<f64> = vocabulary_norms.into_iter().map(f64::from).collect();
        norms.sort_by(f64::total_cmp);
        Ok(Self { norms, nearest })
    }

    /// How much of the vocabulary has a smaller norm, in percent.
    pub fn percentile(&self, norm: f64) -> f64 {
        100.0 * self.norms.partition_point(|n| *n < norm) as f64 / self.norms.len().max(1) as f64
    }

    /// The norm that `percent` of the vocabulary is at or below.
    pub fn norm_at(&self, percent: f64) -> f64 {
        let last = self.norms.len().saturating_sub(1);
        let at = (percent / 100.0 * last as f64).round() as usize;
        self.norms.get(at).copied().unwrap_or_default()
    }
}
