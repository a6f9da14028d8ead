//! Examples with their answers before an input (in-context learning): what a learned prompt is compared with where training
//! data are at hand.

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
};

use serde::Serialize;

use super::{TuneError, order};
use crate::examples::{DataError, Dataset, Example, Faults};
use crate::{
    input::{InputEncoder, InputError},
    model::Model,
    packing::{InputToken, PromptShape, text_len},
    prompt::{Version, template::Input},
    tokenizer::Tokenizer,
};

/// The fewest examples where no number is asked for; there is one for each label at least.
const SHOTS: usize = 8;
/// The most examples where no number is asked for.
const MOST_BY_DEFAULT: usize = 32;

/// Examples that were chosen to stand before inputs.
#[derive(Debug, Clone)]
pub struct Shots {
    /// The data that they are from.
    pub path: PathBuf,
    /// The line of each.
    pub lines: Vec<usize>,
    /// How many examples of the data were not considered, because they are also among the inputs to be answered.
    pub excluded: usize,
    /// Each as the task's template renders it, with its answer and a line break.
    texts: Vec<String>,
}

/// How many examples stood before the inputs of an evaluation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ShotsUsed {
    /// Before each input that had room for all.
    pub examples: usize,
    /// Before the input that had room for the fewest.
    pub fewest: usize,
    /// The number of inputs that had room for fewer than all.
    pub inputs_with_fewer: usize,
}

impl ShotsUsed {
    /// Counts an input that had `count` of `all` examples before it.
    pub fn add(&mut self, count: usize, all: usize) {
        self.fewest = if self.examples == 0 { count } else { self.fewest.min(count) };
        self.examples = all;
        self.inputs_with_fewer += usize::from(count < all);
    }
}

/// How many examples are put before an input where no number is asked for, in a task of so many labels.
pub fn default_count(labels: usize) -> usize {
    labels.clamp(SHOTS, MOST_BY_DEFAULT)
}

impl Shots {
    /// Chooses `count` of `examples` by `seed`, or all if there are fewer; of each label as many as of the others, as far as
    /// there are. What is also an input of `data` is left out: its answer would be given away.
    ///
    /// # Errors
    /// No example is left, or one that was chosen does not fit the template.
    pub fn choose(
        version: &Version,
        tokenizer: &Tokenizer,
        model: &Model,
        examples: &Dataset,
        data: &Dataset,
        (count, seed): (usize, u64),
    ) -> Result<Self, TuneError> {
        let encoder = InputEncoder { shape: PromptShape::None, ..InputEncoder::of(version, tokenizer) };
        // What does not fit the template is named where it is answered.
        let asked: HashSet<String> = data.examples.iter().filter_map(|e| encoder.text(&e.input).ok()).collect();
        let is_asked = |example: &&Example| encoder.text(&example.input).is_ok_and(|text| asked.contains(&text));
        let (same, others): (Vec<&Example>, Vec<&Example>) = examples.examples.iter().partition(is_asked);
        if others.is_empty() {
            return Err(TuneError::NoExamplesLeft { examples: examples.path.clone(), data: data.path.clone() });
        }
        // An encoder's template need not say where an input ends.
        let separates = model.info().encoder.is_some();
        let mut shots =
            Self { path: examples.path.clone(), lines: Vec::new(), excluded: same.len(), texts: Vec::new() };
        let mut faults = Vec::new();
        for example in balanced(&others, count, seed) {
            match encoder.text(&example.input) {
                Ok(text) => {
                    let separator = if separates && !text.ends_with('\n') { "\n" } else { "" };
                    shots.lines.push(example.line);
                    shots.texts.push(format!("{text}{separator}{}\n", encoder.safe_text(&example.output)));
                }
                Err(fault) => faults.push((example.line, fault.to_string())),
            }
        }
        match faults.is_empty() {
            true => Ok(shots),
            false => Err(DataError::Faults(Faults { path: shots.path, faults }).into()),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// The positions of an input after as many examples as fit into `room` tokens with it, and their number. An input that
    /// leaves no room stands alone, shortened to `limit` tokens where the task says how.
    ///
    /// # Errors
    /// The input does not fit the template.
    pub fn before(
        &self,
        encoder: &InputEncoder<'_>,
        input: &Input,
        room: usize,
        limit: usize,
    ) -> Result<(Vec<InputToken>, usize), InputError> {
        // Examples go before text of the input does.
        let whole = InputEncoder { truncate: None, ..*encoder };
        let mut found = None;
        let (mut least, mut most) = (1, self.len());
        let mut count = most;
        while least <= most {
            let positions = whole.encode_after(&self.texts[..count].concat(), input, room)?;
            if text_len(&positions) <= room {
                found = Some((positions, count));
                least = count + 1;
            } else {
                most = count - 1;
            }
            count = least.midpoint(most);
        }
        match found {
            Some(found) => Ok(found),
            None => Ok((encoder.encode(input, limit)?, 0)),
        }
    }
}

/// `count` examples in rounds, each of which has one of each label that still has some, in an order of its own; so every
/// beginning of them is balanced, too.
fn balanced<'a>(examples: &[&'a Example], count: usize, seed: u64) -> Vec<&'a Example> {
    let mut by_label: BTreeMap<Option<&str>, Vec<&'a Example>> = BTreeMap::new();
    for i in order::shuffled(examples.len(), seed, order::SHOTS) {
        by_label.entry(examples[i].label.as_deref()).or_default().push(examples[i]);
    }
    let groups: Vec<Vec<&Example>> = by_label.into_values().collect();
    let rounds = groups.iter().map(Vec::len).max().unwrap_or(0);
    let in_round = |round: usize| {
        let labels = order::shuffled(groups.len(), seed, round as u64).into_iter();
        labels.filter_map(|label| groups[label].get(round).copied()).collect::<Vec<_>>()
    };
    (0..rounds).flat_map(in_round).take(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples(labels: &[&str]) -> Vec<Example> {
        let example = |(i, label): (usize, &&str)| Example {
            line: i + 1,
            input: Input::Text(format!("input {i}")),
            output: (*label).to_owned(),
            label: Some((*label).to_owned()),
        };
        labels.iter().enumerate().map(example).collect()
    }

    #[test]
    fn every_beginning_of_the_chosen_examples_is_balanced_and_the_seed_decides() {
        let labels: Vec<&str> = (0..40).map(|i| if i < 30 { "a" } else { ["b", "c"][i % 2] }).collect();
        let examples = examples(&labels);
        let all: Vec<&Example> = examples.iter().collect();
        let chosen = |count: usize, seed: u64| {
            balanced(&all, count, seed).into_iter().map(|e| (e.output.clone(), e.line)).collect::<Vec<_>>()
        };
        let nine = chosen(9, 1);
        for end in [3, 6, 9] {
            for label in ["a", "b", "c"] {
                assert_eq!(nine[..end].iter().filter(|(l, _)| l == label).count(), end / 3, "{nine:?}");
            }
        }
        assert_eq!(chosen(9, 1), nine);
        assert_eq!(chosen(6, 1), nine[..6]);
        assert_ne!(chosen(9, 2), nine);
        let mut lines: Vec<usize> = chosen(100, 1).into_iter().map(|(_, line)| line).collect();
        lines.sort_unstable();
        assert_eq!(lines, (1..=40).collect::<Vec<_>>());
    }

    #[test]
    fn what_was_used_is_counted() {
        let mut used = ShotsUsed::default();
        [8, 3, 8, 5].into_iter().for_each(|count| used.add(count, 8));
        assert_eq!(used, ShotsUsed { examples: 8, fewest: 3, inputs_with_fewer: 2 });
        assert_eq!([default_count(0), default_count(10), default_count(900)], [8, 10, 32]);
    }
}
