//! Packed positions to the rows that a forward pass begins with.

use candle_core::{Device, Result, Tensor, bail};

use super::InputToken;
use crate::model::Model;

/// Positions of one sequence, and the rows of its virtual tokens.
#[derive(Debug, Clone, Copy)]
pub struct EmbeddingSource<'a> {
    pub tokens: &'a [InputToken],
    /// `[virtual tokens, hidden]` in any float type and on any device; needed where `tokens` has virtual
    /// tokens.
    pub prompt_rows: Option<&'a Tensor>,
}

/// The embeddings of all sources, packed one after another: `[total tokens, hidden]` in the type that the
/// model computes in. Differentiable with regard to the prompts' rows.
///
/// # Errors
/// There are virtual tokens and no rows for them, or fewer.
pub fn embed(model: &Model, sources: &[EmbeddingSource<'_>]) -> Result<Tensor> {
    let device = &model.info().device;
    let ids: Vec<u32> = sources
        .iter()
        .flat_map(|source| source.tokens)
        .filter_map(|token| match token {
            InputToken::Vocab(id) => Some(*id),
            InputToken::Virtual(_) => None,
        })
        .collect();
    let words = if ids.is_empty() { None } else { Some(model.embed(&Tensor::new(ids, &Device::Cpu)?)?) };
    let mut rows = Vec::new();
    let mut taken = 0;
    for source in sources {
        for run in source.tokens.chunk_by(follows) {
            match (run[0], &words) {
                (InputToken::Virtual(first), _) => {
                    let Some(prompt) = source.prompt_rows else {
                        bail!("a sequence has virtual tokens but no embeddings for them")
                    };
                    let prompt = prompt.narrow(0, first as usize, run.len())?;
                    rows.push(prompt.to_device(device)?.to_dtype(model.activation_dtype())?);
                }
                (InputToken::Vocab(_), Some(words)) => {
                    rows.push(words.narrow(0, taken, run.len())?);
                    taken += run.len();
                }
                (InputToken::Vocab(_), None) => bail!("vocabulary tokens without embeddings"),
            }
        }
    }
    Tensor::cat(&rows, 0)
}

/// Whether two positions' rows stand side by side where they come from.
fn follows(first: &InputToken, second: &InputToken) -> bool {
    match (first, second) {
        (InputToken::Vocab(_), InputToken::Vocab(_)) => true,
        (InputToken::Virtual(a), InputToken::Virtual(b)) => a + 1 == *b,
        _ => false,
    }
}
