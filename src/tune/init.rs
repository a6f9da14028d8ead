//! Initial values of a prompt. Where it begins decides much of where it ends: rows that look like
//! words are better than noise (Lester et al. 2021, figure 3), and so are the keys and values of a
//! text.

use candle_core::{DType, Device, Result, Tensor};
use rand::Rng;
use rand_distr::StandardNormal;

use super::{
    forward::Forward,
    order,
    parameters::{Method, Parameters},
};
use crate::examples::TokenizedExample;
use crate::{
    model::Model,
    prompt::learned::LearnedPrompt,
    tokenizer::{Tokenizer, TokenizerError},
};

/// The vocabulary's first ids are its most frequent words, as Lester et al. sample them.
const FREQUENT: usize = 5000;

/// Where a prompt begins. Words give rows by their embeddings, and key-values by what the model
/// computes for them.
#[derive(Debug, Clone)]
pub enum Init {
    /// A text's tokens, repeated or cut to the length of the prompt.
    Text(String),
    /// Training examples in random order with their answers, the end of as many as fit.
    Examples,
    /// Random words of the vocabulary.
    Vocab,
    /// Another prompt's rows or key-values, repeated or cut: transfer between tasks (Vu et al. 2022).
    Prompt(LearnedPrompt),
    /// Normal noise as large as the embedding table's values, or as key-values are.
    Random,
}

/// Why there are no initial values.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error("the initial text has no tokens; give at least one word")]
    EmptyText,
    #[error("the vocabulary has no token that is not special")]
    NoVocabulary,
    #[error("the initial prompt consists of {found}, but the type {method} learns {expected}")]
    OtherKind { found: &'static str, method: &'static str, expected: &'static str },
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error("cannot compute the initial values: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// What initial values are made of.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    pub forward: &'a Forward,
    pub tokenizer: &'a Tokenizer,
    /// The training examples.
    pub examples: &'a [TokenizedExample],
    pub seed: u64,
}

impl Source<'_> {
    fn model(&self) -> &Model {
        self.forward.model()
    }

    /// Initial values of `parameters`, in their order.
    pub fn values(&self, init: &Init, parameters: &Parameters) -> std::result::Result<Vec<f32>, InitError> {
        let (method, n) = (parameters.method(), parameters.virtual_tokens());
        match method {
            Method::PromptTuning => self.rows(init, n, method),
            Method::PTuning(encoder) => Ok(encoder.values(&self.rows(init, n, method)?, n, self.seed)?),
            Method::PrefixTuning => {
                let layers = self.key_values(init, n, method)?;
                Ok(parameters.readers().flat_map(|layer| layers[layer].concat()).collect())
            }
        }
    }

    /// `[n, hidden]`, row by row.
    fn rows(&self, init: &Init, n: usize, method: Method) -> std::result::Result<Vec<f32>, InitError> {
        match init {
            Init::Text(_) | Init::Examples | Init::Vocab => {
                let ids = Tensor::new(self.words(init, n)?, &self.model().info().device)?;
                Ok(host(&self.model().embed(&ids)?)?)
            }
            Init::Prompt(LearnedPrompt::Embeddings(embeddings)) => Ok(repeated(&embeddings.rows, n)?),
            Init::Prompt(other) => Err(other_kind(other, method, "embeddings")),
            Init::Random => {
                let std = embedding_scale(self.model())?;
                Ok(noise(&mut order::rng(self.seed, order::INIT), n * self.model().info().hidden_size, std))
            }
        }
    }

    /// For each layer of the model the keys and the values, `[n, kv_dim]` each, row by row.
    fn key_values(&self, init: &Init, n: usize, method: Method) -> std::result::Result<Vec<[Vec<f32>; 2]>, InitError> {
        Ok(match init {
            Init::Text(_) | Init::Examples | Init::Vocab => self.computed(init, n)?,
            Init::Prompt(LearnedPrompt::KeyValues(kv)) => {
                let rows = |x: &Tensor| repeated(&x.transpose(0, 1)?.flatten_from(1)?, n);
                kv.layers.iter().map(|l| Ok([rows(&l.keys)?, rows(&l.values)?])).collect::<Result<_>>()?
            }
            Init::Prompt(other) => return Err(other_kind(other, method, "key-values")),
            Init::Random => {
                let mut rng = order::rng(self.seed, order::INIT);
                let like = self.computed(&Init::Vocab, n)?;
                like.into_iter().map(|kv| kv.map(|x| noise(&mut rng, x.len(), root_mean_square(&x)))).collect()
            }
        })
    }

    /// The keys and values that the model computes for words. They begin with what comes before every
    /// text, of the tokenizer's or the decoder's start: attention rests there. A decoder after an encoder
    /// writes the words that the encoder reads.
    fn computed(&self, init: &Init, n: usize) -> std::result::Result<Vec<[Vec<f32>; 2]>, InitError> {
        let around = self.tokenizer.tokenize("")?;
        let mut ids = match &self.model().info().encoder {
            None => around.iter().copied().take(n).collect(),
            Some(encoder) => vec![encoder.start_token],
        };
        let words = self.words(init, (n - ids.len()).max(1))?;
        ids.extend(&words);
        ids.truncate(n);
        let layers = self.forward.key_values(&ids, &[words, around].concat())?;
        Ok(layers.iter().map(|(k, v)| Ok([host(k)?, host(v)?])).collect::<Result<_>>()?)
    }

    /// `n` token ids.
    fn words(&self, init: &Init, n: usize) -> std::result::Result<Vec<u32>, InitError> {
        match init {
            Init::Text(words) => {
                let ids = self.tokenizer.tokenize_continuation(words)?;
                if ids.is_empty() {
                    return Err(InitError::EmptyText);
                }
                Ok(ids.iter().copied().cycle().take(n).collect())
            }
            Init::Examples => {
                let line_break = self.tokenizer.tokenize_continuation("\n")?;
                let mut ids = Vec::new();
                for i in order::shuffled(self.examples.len(), self.seed, order::INIT) {
                    let example = &self.examples[i];
                    let words = example.text_ids().into_iter().chain(example.answer.iter().copied());
                    ids.extend(words.filter(|id| !self.tokenizer.is_special(*id)));
                    ids.extend(&line_break);
                    if ids.len() >= n {
                        break;
                    }
                }
                if ids.is_empty() {
                    return Err(InitError::EmptyText);
                }
                // The end is whole, so that what follows the prompt follows an answer.
                ids.reverse();
                let mut words: Vec<u32> = ids.iter().copied().cycle().take(n).collect();
                words.reverse();
                Ok(words)
            }
            Init::Vocab | Init::Prompt(_) | Init::Random => {
                let mut rng = order::rng(self.seed, order::INIT);
                let rows = self.model().info().vocab_size.min(self.tokenizer.vocab_size()) as u32;
                let words: Vec<u32> = (0..rows).filter(|&id| !self.tokenizer.is_special(id)).take(FREQUENT).collect();
                if words.is_empty() {
                    return Err(InitError::NoVocabulary);
                }
                Ok((0..n).map(|_| words[rng.random_range(0..words.len())]).collect())
            }
        }
    }
}

fn other_kind(found: &LearnedPrompt, method: Method, expected: &'static str) -> InitError {
    InitError::OtherKind { found: found.kind(), method: method.name(), expected }
}

/// `n` rows of a matrix, from the first again after the last.
fn repeated(rows: &Tensor, n: usize) -> Result<Vec<f32>> {
    let rows = rows.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
    Ok(rows.iter().cycle().take(n).flatten().copied().collect())
}

fn host(x: &Tensor) -> Result<Vec<f32>> {
    x.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()
}

fn noise(rng: &mut impl Rng, n: usize, std: f64) -> Vec<f32> {
    (0..n).map(|_| rng.sample::<f64, _>(StandardNormal) * std).map(|x| x as f32).collect()
}

fn root_mean_square(values: &[f32]) -> f64 {
    (values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / values.len().max(1) as f64).sqrt()
}

/// The root mean square of the embedding table's values: the natural unit of a prompt's values,
/// and so of its learning rate. Models differ in it by a factor of a hundred.
pub fn embedding_scale(model: &Model) -> Result<f64> {
    // Rows past the tokenizer's vocabulary are often zero, but few.
    Ok(model.embedding_mean_square()?.sqrt())
}

/// The unit of a run's learning rate: how large what is learned is. An encoder's weights are of
/// one size for every model.
pub fn rate_unit(parameters: &Parameters, initial: &[f32], model: &Model) -> Result<f64> {
    match parameters.method() {
        Method::PromptTuning => embedding_scale(model),
        Method::PTuning(_) => Ok(1.0),
        Method::PrefixTuning => Ok(root_mean_square(initial)),
    }
}
