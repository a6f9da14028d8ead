//! Labels and the words that stand for them in the model's output.

use std::collections::{BTreeMap, HashMap};

/// The most labels of a task.
pub const MAX_LABELS: usize = 1024;
/// The most words of one label.
pub const MAX_WORDS: usize = 64;

/// A task's labels with their words, checked: nothing is empty and no word stands for two labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verbalizer {
    labels: BTreeMap<String, Vec<String>>,
    /// Folded label or word to label.
    lookup: HashMap<String, String>,
}

/// Why labels cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    #[error("there are {found} labels; the maximum is {MAX_LABELS}")]
    TooManyLabels { found: usize },
    #[error("the label {label:?} has {found} words; the maximum is {MAX_WORDS}")]
    TooManyWords { label: String, found: usize },
    #[error("a label is empty")]
    EmptyLabel,
    #[error("the label {label:?} has no word; give at least one that the model writes for it")]
    NoWord { label: String },
    #[error("a word of the label {label:?} is empty")]
    EmptyWord { label: String },
    #[error("{word:?} stands for the labels {first:?} and {second:?}; letter case and outer spaces do not count")]
    Shared { word: String, first: String, second: String },
}

impl Verbalizer {
    /// Checks the labels of a `task.json`.
    pub fn new(labels: &BTreeMap<String, Vec<String>>) -> Result<Self, LabelError> {
        if labels.len() > MAX_LABELS {
            return Err(LabelError::TooManyLabels { found: labels.len() });
        }
        let mut lookup: HashMap<String, String> = HashMap::new();
        let mut trimmed = BTreeMap::new();
        for (label, words) in labels {
            // Spaces around a label are not part of it; those of a word may be, for the tokens that are taught.
            let label = &label.trim().to_owned();
            if let Some(first) = lookup.get(&fold(label)) {
                let (word, first) = (label.clone(), first.clone());
                return Err(LabelError::Shared { word, first, second: label.clone() });
            }
            if label.trim().is_empty() {
                return Err(LabelError::EmptyLabel);
            }
            if words.is_empty() {
                return Err(LabelError::NoWord { label: label.clone() });
            }
            if words.len() > MAX_WORDS {
                return Err(LabelError::TooManyWords { label: label.clone(), found: words.len() });
            }
            for word in std::iter::once(label).chain(words) {
                if word.trim().is_empty() {
                    return Err(LabelError::EmptyWord { label: label.clone() });
                }
                if let Some(first) = lookup.insert(fold(word), label.clone()).filter(|first| first != label) {
                    return Err(LabelError::Shared { word: word.clone(), first, second: label.clone() });
                }
            }
            trimmed.insert(label.clone(), words.clone());
        }
        Ok(Self { labels: trimmed, lookup })
    }

    /// The labels, sorted.
    pub fn labels(&self) -> impl ExactSizeIterator<Item = &str> {
        self.labels.keys().map(String::as_str)
    }

    /// Each label with its words, sorted by label.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &[String])> {
        self.labels.iter().map(|(label, words)| (label.as_str(), words.as_slice()))
    }

    /// The word that a tuner teaches for a label: its first.
    pub fn word_for(&self, label: &str) -> Option<&str> {
        self.labels.get(label)?.first().map(String::as_str)
    }

    /// The label that a model's output stands for: the whole text is a label or one of its words,
    /// whatever its letter case and outer spaces.
    pub fn label_of(&self, output: &str) -> Option<&str> {
        self.lookup.get(&fold(output)).map(String::as_str)
    }
}

fn fold(text: &str) -> String {
    text.trim().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verbalizer(labels: &[(&str, &[&str])]) -> Result<Verbalizer, LabelError> {
        let owned = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect();
        Verbalizer::new(&labels.iter().map(|(l, w)| ((*l).to_owned(), owned(w))).collect())
    }

    #[test]
    fn an_output_is_matched_without_its_case_and_outer_spaces() {
        let v = verbalizer(&[("pos", &["great", "Good"]), ("neg", &[" bad"])]).expect("valid");
        for (output, label) in [(" GREAT\n", "pos"), ("good", "pos"), ("bad", "neg"), ("Neg", "neg")] {
            assert_eq!(v.label_of(output), Some(label), "{output}");
        }
        for none in ["", "great movie", "gre", "other"] {
            assert_eq!(v.label_of(none), None, "{none}");
        }
        assert_eq!(v.word_for("pos"), Some("great"));
        assert_eq!(v.word_for("POS"), None);
        assert_eq!(v.labels().collect::<Vec<_>>(), ["neg", "pos"]);
    }

    #[test]
    fn a_word_of_two_labels_is_refused() {
        assert!(matches!(verbalizer(&[("a", &["x"]), ("b", &["X "])]), Err(LabelError::Shared { .. })));
        assert!(matches!(verbalizer(&[("a", &["b"]), ("b", &["c"])]), Err(LabelError::Shared { .. })));
        assert!(verbalizer(&[("a", &["a", "A", "x", "x"])]).is_ok());
    }

    #[test]
    fn empty_labels_and_words_are_refused() {
        assert_eq!(verbalizer(&[(" ", &["x"])]), Err(LabelError::EmptyLabel));
        assert_eq!(verbalizer(&[("a", &[])]), Err(LabelError::NoWord { label: "a".into() }));
        assert_eq!(verbalizer(&[("a", &["x", " "])]), Err(LabelError::EmptyWord { label: "a".into() }));
    }
}
