//! Initial values of a prompt. Where it begins decides much of where it ends: rows that look like
//! words are better than noise (Lester et al. 2021, figure 3).

use candle_core::{DType, Device, Result, Tensor};
use rand::Rng;
use rand_distr::StandardNormal;

use super::order;
use crate::{
    model::Model,
    prompt::learned::LearnedPrompt,
    text::{Text, TextError},
};

/// The vocabulary's first ids are its most frequent words, as Lester et al. sample them.
const FREQUENT: usize = 5000;

/// Where a prompt begins.
#[derive(Debug, Clone)]
pub enum Init {
    /// The embeddings of a text's tokens, repeated or cut to the length of the prompt.
    Text(String),
    /// Embeddings of random words of the vocabulary.
    Vocab,
    /// Another prompt's rows, repeated or cut: transfer between tasks (Vu et al. 2022).
    Prompt(LearnedPrompt),
    /// Normal noise as large as the embedding table's values.
    Random,
}

/// Why there are no initial values.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error("the text to begin with has no tokens; give at least one word")]
    EmptyText,
    #[error("the vocabulary has no token that is not special")]
    NoVocabulary,
    #[error(
        "the prompt to begin with is one of {kind}, and only rows of embeddings can be taken over; give the task of a \
         prompt of embeddings"
    )]
    NoRows { kind: &'static str },
    #[error(transparent)]
    Text(#[from] TextError),
    #[error("cannot compute the initial values: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// `[n, hidden]` initial values, row by row.
pub fn values(
    init: &Init,
    n: usize,
    model: &Model,
    text: &Text,
    seed: u64,
) -> std::result::Result<Vec<f32>, InitError> {
    let mut rng = order::rng(seed, order::INIT);
    match init {
        Init::Text(words) => {
            let ids = text.encode_continuation(words)?;
            if ids.is_empty() {
                return Err(InitError::EmptyText);
            }
            Ok(rows_of(model, ids.iter().copied().cycle().take(n).collect())?)
        }
        Init::Vocab => {
            let rows = model.info().vocab_size.min(text.vocab_size()) as u32;
            let words: Vec<u32> = (0..rows).filter(|&id| !text.is_special(id)).take(FREQUENT).collect();
            if words.is_empty() {
                return Err(InitError::NoVocabulary);
            }
            Ok(rows_of(model, (0..n).map(|_| words[rng.random_range(0..words.len())]).collect())?)
        }
        Init::Prompt(LearnedPrompt::Embeddings(embeddings)) => {
            let rows = embeddings.rows.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
            Ok(rows.iter().cycle().take(n).flatten().copied().collect())
        }
        Init::Prompt(other) => Err(InitError::NoRows { kind: other.kind() }),
        Init::Random => {
            let std = embedding_scale(model)?;
            Ok((0..n * model.info().hidden_size)
                .map(|_| rng.sample::<f64, _>(StandardNormal) * std)
                .map(|x| x as f32)
                .collect())
        }
    }
}

fn rows_of(model: &Model, ids: Vec<u32>) -> Result<Vec<f32>> {
    let rows = model.embed(&Tensor::new(ids, &model.info().device)?)?;
    rows.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()
}

/// The root mean square of the embedding table's values: the natural unit of a prompt's values,
/// and so of its learning rate. Models differ in it by a factor of a hundred.
pub fn embedding_scale(model: &Model) -> Result<f64> {
    // Rows past the tokenizer's vocabulary are often zero, but few.
    let mean_square = model.embedding_table()?.to_dtype(DType::F32)?.sqr()?.mean_all()?;
    Ok(f64::from(mean_square.to_scalar::<f32>()?).sqrt())
}
