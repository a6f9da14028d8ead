//! What the engine that serves says of a task's labels after each input, with the token sequences that a server scores.

use super::{TuneError, calibrate::LabelEvidence, inference::Inference, init::InitError};
use crate::{
    packing::InputToken,
    prompt::{
        label_scores::{LabelTokens, NoTokens},
        labels::Verbalizer,
    },
    tokenizer::Tokenizer,
};

/// The labels' token sequences, each word alone: only a learned prompt was taught how an answer ends.
///
/// # Errors
/// A label has no word that the tokenizer makes a token of.
pub fn bare_labels(tokenizer: &Tokenizer, labels: &Verbalizer) -> Result<LabelTokens, TuneError> {
    tokens_of(tokenizer, labels, &[])
}

/// The labels' token sequences as `classify` scores them: each word with what ends an answer after it, which is one of the
/// task's stop texts or an end-of-sequence token.
///
/// # Errors
/// A label has no word that the tokenizer makes a token of.
pub fn ended_labels(
    tokenizer: &Tokenizer,
    labels: &Verbalizer,
    stops: &[String],
    eos_token_ids: &[u32],
) -> Result<LabelTokens, TuneError> {
    let stops = stops.iter().map(|stop| tokenizer.tokenize_continuation(stop));
    let mut ends = stops.collect::<Result<Vec<_>, _>>().map_err(InitError::Tokenizer)?;
    ends.extend(eos_token_ids.iter().map(|&id| vec![id]));
    tokens_of(tokenizer, labels, &ends)
}

fn tokens_of(tokenizer: &Tokenizer, labels: &Verbalizer, ends: &[Vec<u32>]) -> Result<LabelTokens, TuneError> {
    LabelTokens::new(labels, ends, |word| Ok(tokenizer.tokenize_continuation(word).map_err(InitError::Tokenizer)?))
}

/// Asks an engine for the probability of each label after each input. `expected` are the labels' names, one for each input.
///
/// # Errors
/// An input is too long, there are too many sequences, or a forward pass fails.
pub fn ask<'a>(
    engine: &Inference,
    words: &LabelTokens,
    inputs: &[Vec<InputToken>],
    expected: impl Iterator<Item = Option<&'a str>>,
) -> Result<LabelEvidence, TuneError> {
    let labels: Vec<String> = words.names().map(str::to_owned).collect();
    let index = |name: Option<&str>| labels.iter().position(|known| Some(known.as_str()) == name);
    let expected = expected.map(|name| index(name).unwrap_or(labels.len())).collect();
    let one = |log_probs: Option<Vec<Vec<f32>>>| match log_probs {
        Some(log_probs) => words.log_masses(&log_probs),
        // There is nothing to predict from: no label is likelier than another.
        None => vec![f64::NEG_INFINITY; labels.len()],
    };
    let scores = engine.score(inputs, &words.continuations())?.into_iter().map(one).collect();
    Ok(LabelEvidence { labels, scores, expected })
}

impl From<NoTokens> for TuneError {
    fn from(error: NoTokens) -> Self {
        Self::NoLabelTokens { label: error.label }
    }
}
