//! Virtual tokens beside those of the vocabulary: norms, and which embeddings point the same way.

use candle_core::{DType, Device, Result, Tensor};

use super::subject::Rows;
use crate::{model::Model, tokenizer::Tokenizer};

/// Embeddings that are compared at once.
const CHUNK: usize = 4096;

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
        let num_rows = rows.values.len() / hidden;
        let virtual_tokens = Tensor::from_slice(&rows.values, (num_rows, hidden), &Device::Cpu)?;
        let virtual_tokens = unit(&virtual_tokens)?.0;
        let num_tokens = model.info().vocab_size.min(tokenizer.vocab_size()) as u32;
        let mut norms = Vec::with_capacity(num_tokens as usize);
        let mut nearest = vec![Vec::new(); num_rows];
        for start in (0..num_tokens).step_by(CHUNK) {
            let ids = Tensor::arange(start, num_tokens.min(start + CHUNK as u32), &model.info().device)?;
            let embedded = model.embed(&ids)?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            let (embedded, lengths) = unit(&embedded)?;
            norms.extend(lengths.iter().map(|&n| f64::from(n)));
            let similar = virtual_tokens.matmul(&embedded.t()?.contiguous()?)?.to_vec2::<f32>()?;
            for (best, similar) in nearest.iter_mut().zip(similar) {
                best.extend((start..).zip(similar));
                best.sort_by(|a, b| b.1.total_cmp(&a.1));
                best.truncate(count);
            }
        }
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

/// Rows of length 1, and the lengths that they had. A row of zeros stays one.
fn unit(rows: &Tensor) -> Result<(Tensor, Vec<f32>)> {
    let lengths = rows.sqr()?.sum_keepdim(1)?.sqrt()?;
    let unit = rows.broadcast_div(&lengths.clamp(f32::MIN_POSITIVE, f32::MAX)?)?;
    Ok((unit, lengths.flatten_all()?.to_vec1()?))
}
