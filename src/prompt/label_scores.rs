//! Labels as continuations of an input, and what their log-probabilities say of the labels.

use super::{
    calibration::{Calibration, log_sum_exp},
    labels::Verbalizer,
};

/// The token sequences of each label: each of its words, ended by whatever ends an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelTokens {
    labels: Vec<Label>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Label {
    name: String,
    sequences: Vec<Vec<u32>>,
}

/// How likely each of some labels is.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelScores {
    /// Each label with its probability among these labels, the likeliest first; of equals in the order of their names.
    pub probabilities: Vec<(String, f64)>,
    /// The probability of all of them together before they are normalised: near 1 where the model writes nothing else.
    pub mass: f64,
}

impl LabelTokens {
    /// The sequences of all labels. `tokens` gives those of a word; `ends` are the sequences that end an answer, such as
    /// the end-of-sequence token or a stop text.
    ///
    /// # Errors
    /// `tokens` fails, or a label has no word that has tokens; the label's name.
    pub fn new<E: From<NoTokens>>(
        labels: &Verbalizer,
        ends: &[Vec<u32>],
        mut tokens: impl FnMut(&str) -> Result<Vec<u32>, E>,
    ) -> Result<Self, E> {
        let ends = distinct(ends);
        let mut all = Vec::with_capacity(labels.iter().len());
        for (name, words) in labels.iter() {
            let mut sequences = Vec::new();
            for word in words {
                let ids = tokens(word)?;
                // Without anything that ends an answer, the word alone is what counts.
                let ended = ends.iter().map(|end| [ids.as_slice(), end].concat());
                let ended: Vec<_> = if ends.is_empty() { vec![ids.clone()] } else { ended.collect() };
                sequences.extend(ended.into_iter().filter(|sequence| !ids.is_empty() && !sequence.is_empty()));
            }
            // Words that are written with the same tokens count once.
            sequences.sort_unstable();
            sequences.dedup();
            if sequences.is_empty() {
                return Err(NoTokens { label: name.to_owned() }.into());
            }
            all.push(Label { name: name.to_owned(), sequences });
        }
        Ok(Self { labels: all })
    }

    /// Those of some labels, in the order of their names.
    ///
    /// # Errors
    /// One of them is none of these labels; its name.
    pub fn of(&self, names: &[String]) -> Result<Self, String> {
        let mut wanted = vec![false; self.labels.len()];
        for name in names {
            match self.labels.binary_search_by(|label| label.name.as_str().cmp(name)) {
                Ok(i) => wanted[i] = true,
                Err(_) => return Err(name.clone()),
            }
        }
        let labels = self.labels.iter().zip(wanted).filter(|(_, wanted)| *wanted);
        Ok(Self { labels: labels.map(|(label, _)| label.clone()).collect() })
    }

    /// The names of the labels, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.labels.iter().map(|label| label.name.as_str())
    }

    /// Every sequence, to be scored as a continuation.
    pub fn continuations(&self) -> Vec<Vec<u32>> {
        self.labels.iter().flat_map(|label| label.sequences.iter().cloned()).collect()
    }

    /// What the log-probabilities of [`continuations`](Self::continuations), token by token, say of the labels.
    pub fn scores(&self, log_probs: &[Vec<f32>], calibration: &Calibration) -> LabelScores {
        let logs = self.log_masses(log_probs);
        let mass = log_sum_exp(logs.iter().copied()).exp();
        let probabilities = calibration.probabilities(self.names().zip(logs));
        let mut probabilities: Vec<(String, f64)> = self.names().map(str::to_owned).zip(probabilities).collect();
        probabilities.sort_by(|a, b| b.1.total_cmp(&a.1));
        LabelScores { probabilities, mass }
    }

    /// The logarithm of each label's probability, in the order of their names: of several sequences the sum.
    pub fn log_masses(&self, log_probs: &[Vec<f32>]) -> Vec<f64> {
        let mut sums = log_probs.iter().map(|tokens| tokens.iter().map(|&x| f64::from(x)).sum::<f64>());
        let of_label = |label: &Label| {
            let own: Vec<f64> = sums.by_ref().take(label.sequences.len()).collect();
            log_sum_exp(own.into_iter())
        };
        self.labels.iter().map(of_label).collect()
    }
}

/// Ends of which none begins with another: what follows an end is not part of an answer.
fn distinct(ends: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let mut ends: Vec<Vec<u32>> = ends.iter().filter(|end| !end.is_empty()).cloned().collect();
    ends.sort_unstable();
    // An end that begins with another one comes right after it, or after others that do.
    ends.dedup_by(|later, kept| later.starts_with(kept));
    ends
}

/// A label that no token stands for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the label {label:?} has no word that the tokenizer makes a token of")]
pub struct NoTokens {
    pub label: String,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn tokens(labels: &[(&str, &[&str])], ends: &[Vec<u32>]) -> Result<LabelTokens, NoTokens> {
        let owned = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect();
        let labels: BTreeMap<_, _> = labels.iter().map(|(l, w)| ((*l).to_owned(), owned(w))).collect();
        let ids = |word: &str| Ok(word.chars().filter(|c| *c != '?').map(u32::from).collect());
        LabelTokens::new(&Verbalizer::new(&labels).unwrap(), ends, ids)
    }

    #[test]
    fn every_word_is_ended_by_each_end_and_what_follows_an_end_counts_for_nothing() {
        let found = tokens(&[("a", &["x"]), ("b", &["y", "zz"])], &[vec![1], vec![2], vec![2, 3], vec![1]]).unwrap();
        let [x, y, z] = ['x', 'y', 'z'].map(u32::from);
        assert_eq!(
            found.continuations(),
            [vec![x, 1], vec![x, 2], vec![y, 1], vec![y, 2], vec![z, z, 1], vec![z, z, 2]]
        );
        assert_eq!(tokens(&[("a", &["x"])], &[]).unwrap().continuations(), [[x]]);
        assert_eq!(tokens(&[("a", &["?"])], &[vec![1]]), Err(NoTokens { label: "a".to_owned() }));
    }

    #[test]
    fn a_labels_probability_is_that_of_all_its_words() {
        let labels = tokens(&[("a", &["x"]), ("b", &["y", "zz"])], &[vec![1]]).unwrap();
        let log = |p: f64| p.ln() as f32;
        let log_probs = vec![vec![log(0.5), log(0.4)], vec![log(0.2), log(0.5)], vec![log(0.5), log(0.8), log(0.5)]];
        let LabelScores { probabilities, mass } = labels.scores(&log_probs, &Calibration::none());
        let close = |a: f64, b: f64| (a - b).abs() < 1e-6;
        assert!(close(mass, 0.2 + 0.1 + 0.2));
        assert_eq!(probabilities[0].0, "b");
        assert!(close(probabilities[0].1, 0.6) && close(probabilities[1].1, 0.4));
        let only = labels.of(&["a".to_owned()]).unwrap();
        let LabelScores { probabilities, mass } = only.scores(&log_probs[..1], &Calibration::none());
        assert!(close(mass, 0.2) && close(probabilities[0].1, 1.0));
        assert_eq!(labels.of(&["a".to_owned(), "c".to_owned()]), Err("c".to_owned()));
        assert_eq!(labels.of(&["a".to_owned(), "a".to_owned()]), Ok(only));
    }
}
