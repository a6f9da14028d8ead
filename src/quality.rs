//! How close texts are to those that were expected: plain functions of strings. What each example adds to a score of the
//! whole corpus is a value of its own, so that samples of the examples can be scored too.

pub mod interval;

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    iter::Sum,
};

/// The part of the outputs that are the references, outer white space aside; 0 to 1.
pub fn exact_match(outputs: &[String], references: &[String]) -> f64 {
    mean(outputs.iter().zip(references).map(|(o, r)| f64::from(is_exact(o, r))))
}

/// Whether an output is its reference, outer white space aside.
pub fn is_exact(output: &str, reference: &str) -> bool {
    output.trim() == reference.trim()
}

/// The F1 of an output's words, as SQuAD's script counts it: lower case, without punctuation and without
/// a, an, the (Rajpurkar et al. 2016); 0 to 1.
pub fn token_f1(output: &str, reference: &str) -> f64 {
    let (o, r) = (squad_words(output), squad_words(reference));
    if o.is_empty() || r.is_empty() {
        return f64::from(o == r);
    }
    let common = overlap(&counts(o.iter()), &counts(r.iter())) as f64;
    if common == 0.0 { 0.0 } else { 2.0 * common / (o.len() + r.len()) as f64 }
}

fn squad_words(text: &str) -> Vec<String> {
    let plain: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    plain.split_whitespace().filter(|w| !["a", "an", "the"].contains(w)).map(str::to_owned).collect()
}

/// What examples add to chrF2 (Popović 2015): for character n-grams up to 6, white space left out, those of the outputs,
/// those of the references, and common ones. The sum over examples is that of a corpus.
#[derive(Debug, Clone, Copy, Default)]
pub struct Chrf([[u64; 3]; 6]);

impl Chrf {
    /// The counts of one example.
    pub fn of(output: &str, reference: &str) -> Self {
        let letters = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<Vec<char>>();
        let (output, reference) = (letters(output), letters(reference));
        let mut totals = Self::default();
        for (order, total) in totals.0.iter_mut().enumerate() {
            let (o, r) = (counts(output.windows(order + 1)), counts(reference.windows(order + 1)));
            let outputs = if r.is_empty() { 0 } else { o.values().sum::<u64>() };
            *total = [outputs, r.values().sum::<u64>(), overlap(&o, &r)];
        }
        totals
    }

    /// The score, 0 to 100, as sacrebleu computes it.
    pub fn score(&self) -> f64 {
        const BETA_SQUARED: f64 = 4.0;
        let usable = || self.0.iter().filter(|t| t[0] > 0 && t[1] > 0);
        let average = |i: usize| mean(usable().map(|t| t[2] as f64 / t[i] as f64));
        let (precision, recall) = (average(0), average(1));
        match precision + recall > 0.0 {
            true => 100.0 * (1.0 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall),
            false => 0.0,
        }
    }
}

impl Sum for Chrf {
    fn sum<I: Iterator<Item = Self>>(examples: I) -> Self {
        let mut sum = Self::default();
        for example in examples {
            let own = example.0.iter().flatten();
            sum.0.iter_mut().flatten().zip(own).for_each(|(total, count)| *total += count);
        }
        sum
    }
}

/// The longest n-grams of BLEU.
const BLEU_ORDER: usize = 4;

/// What examples add to BLEU (Papineni et al. 2002) with the 13a tokenizer. The sum over examples is that of a corpus.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bleu {
    correct: [u64; BLEU_ORDER],
    total: [u64; BLEU_ORDER],
    output_words: usize,
    reference_words: usize,
}

impl Bleu {
    /// The counts of one example.
    pub fn of(output: &str, reference: &str) -> Self {
        let (output, reference) = (words_13a(output), words_13a(reference));
        let mut own = Self { output_words: output.len(), reference_words: reference.len(), ..Self::default() };
        for order in 0..BLEU_ORDER {
            let (o, r) = (counts(output.windows(order + 1)), counts(reference.windows(order + 1)));
            own.total[order] = o.values().sum::<u64>();
            own.correct[order] = overlap(&o, &r);
        }
        own
    }

    /// The score with exponential smoothing, 0 to 100, as sacrebleu computes it by default.
    pub fn score(&self) -> f64 {
        let (output_words, reference_words) = (self.output_words as f64, self.reference_words as f64);
        if self.correct.iter().all(|&c| c == 0) {
            return 0.0;
        }
        let mut smoothing = 1.0;
        let mut logs = 0.0;
        for (&correct, &total) in self.correct.iter().zip(&self.total) {
            if total == 0 {
                // No output is as long as this order: sacrebleu's log of 0 makes the score 0.
                return 0.0;
            }
            let count = match correct {
                0 => {
                    smoothing *= 2.0;
                    1.0 / smoothing
                }
                n => n as f64,
            };
            logs += (count / total as f64).ln();
        }
        let shortness = match output_words < reference_words {
            true => (1.0 - reference_words / output_words).exp(),
            false => 1.0,
        };
        100.0 * shortness * (logs / BLEU_ORDER as f64).exp()
    }
}

impl Sum for Bleu {
    fn sum<I: Iterator<Item = Self>>(examples: I) -> Self {
        let mut sum = Self::default();
        for example in examples {
            for order in 0..BLEU_ORDER {
                sum.correct[order] += example.correct[order];
                sum.total[order] += example.total[order];
            }
            sum.output_words += example.output_words;
            sum.reference_words += example.reference_words;
        }
        sum
    }
}

/// The tokens of mteval-v13a, as sacrebleu makes them.
fn words_13a(text: &str) -> Vec<String> {
    let mut text = text.trim_end().replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    for (entity, character) in [("&quot;", "\""), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")] {
        text = text.replace(entity, character);
    }
    let alone = |c: char| c.is_ascii_punctuation() && !matches!(c, '\'' | ',' | '-' | '.');
    let mut spaced = String::from(" ");
    for c in text.chars() {
        if alone(c) { spaced.extend([' ', c, ' ']) } else { spaced.push(c) }
    }
    spaced.push(' ');
    let digit = |c: char| c.is_ascii_digit();
    let point = |c: char| matches!(c, '.' | ',');
    let spaced = pairs(&spaced, |a, b| !digit(a) && point(b), |a, b| [a, ' ', b, ' ']);
    let spaced = pairs(&spaced, |a, b| point(a) && !digit(b), |a, b| [' ', a, ' ', b]);
    let spaced = pairs(&spaced, |a, b| digit(a) && b == '-', |a, b| [a, ' ', b, ' ']);
    spaced.split_whitespace().map(str::to_owned).collect()
}

/// Replaces each pair of characters that `found` accepts, left to right, without overlap.
fn pairs(text: &str, found: impl Fn(char, char) -> bool, replaced: impl Fn(char, char) -> [char; 4]) -> String {
    let mut out = String::with_capacity(2 * text.len());
    let mut characters = text.chars().peekable();
    while let Some(a) = characters.next() {
        match characters.peek() {
            Some(&b) if found(a, b) => {
                out.extend(replaced(a, b));
                characters.next();
            }
            _ => out.push(a),
        }
    }
    out
}

fn counts<T: Hash + Eq>(items: impl Iterator<Item = T>) -> HashMap<T, u64> {
    let mut counts = HashMap::new();
    items.for_each(|item| *counts.entry(item).or_insert(0) += 1);
    counts
}

fn overlap<T: Hash + Eq>(a: &HashMap<T, u64>, b: &HashMap<T, u64>) -> u64 {
    a.iter().map(|(item, &n)| n.min(b.get(item).copied().unwrap_or(0))).sum()
}

/// The arithmetic mean, 0 of nothing.
pub fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0), |(sum, n), x| (sum + x, n + 1));
    if n == 0 { 0.0 } else { sum / f64::from(n) }
}

/// How often each label was expected and answered; an answer that is no label is `None`.
pub type Confusion = BTreeMap<String, BTreeMap<Option<String>, usize>>;

/// Counts expected and answered labels.
pub fn confusion(answered: &[Option<String>], expected: &[String]) -> Confusion {
    let mut confusion = Confusion::new();
    for (answer, label) in answered.iter().zip(expected) {
        *confusion.entry(label.clone()).or_default().entry(answer.clone()).or_default() += 1;
    }
    confusion
}

/// The part of the answers that are the expected label, 0 to 1.
pub fn accuracy(answered: &[Option<String>], expected: &[String]) -> f64 {
    mean(answered.iter().zip(expected).map(|(a, e)| f64::from(a.as_ref() == Some(e))))
}

/// The mean of the labels' F1, each weighing the same, over labels that were expected or answered;
/// 0 to 1.
pub fn macro_f1(answered: &[Option<String>], expected: &[String]) -> f64 {
    let (pairs, labels) = label_pairs(answered, expected);
    macro_f1_of(pairs.into_iter(), labels)
}

/// Answered and expected labels as numbers below the second value.
pub fn label_pairs(answered: &[Option<String>], expected: &[String]) -> (Vec<(Option<usize>, usize)>, usize) {
    let mut ids: HashMap<&str, usize> = HashMap::new();
    let mut id = |label| {
        let next = ids.len();
        *ids.entry(label).or_insert(next)
    };
    let pairs = answered.iter().zip(expected);
    let pairs = pairs.map(|(answer, label)| (answer.as_deref().map(&mut id), id(label))).collect();
    (pairs, ids.len())
}

/// [`macro_f1`] of pairs of answered and expected labels that are numbers below `labels`.
pub fn macro_f1_of(pairs: impl Iterator<Item = (Option<usize>, usize)>, labels: usize) -> f64 {
    // Of each label: how often it was right, answered and expected.
    let mut counts = vec![[0usize; 3]; labels];
    for (answered, expected) in pairs {
        counts[expected][2] += 1;
        if let Some(answered) = answered {
            counts[answered][1] += 1;
            counts[answered][0] += usize::from(answered == expected);
        }
    }
    let found = counts.iter().filter(|[_, claimed, there]| claimed + there > 0);
    mean(found.map(|[right, claimed, there]| 2.0 * *right as f64 / (claimed + there) as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUTS: [&str; 6] = [
        "The cat sat on the mat.",
        "It costs $1,234.50 - or 3-4 \"euros\", he said...",
        "Où est la bibliothèque ?",
        "",
        "one two three four five six seven",
        "a &amp; b <tag> it's well-known; 5. end",
    ];
    const REFERENCES: [&str; 6] = [
        "The cat is sitting on the mat.",
        "It costs $1,234.50, or 3-4 euros, she said.",
        "Où se trouve la bibliothèque ?",
        "nothing was said here",
        "one two three four five seven six",
        "a & b <tag> its well known; 5 . end.",
    ];

    fn owned(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|t| (*t).to_owned()).collect()
    }

    fn chrf(outputs: &[String], references: &[String]) -> f64 {
        outputs.iter().zip(references).map(|(o, r)| Chrf::of(o, r)).sum::<Chrf>().score()
    }

    fn bleu(outputs: &[String], references: &[String]) -> f64 {
        outputs.iter().zip(references).map(|(o, r)| Bleu::of(o, r)).sum::<Bleu>().score()
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }

    #[test]
    fn chrf_and_bleu_equal_sacrebleus() {
        // sacrebleu 2.6.0: corpus_chrf and corpus_bleu with their defaults, on the texts above.
        let (outputs, references) = (owned(&OUTPUTS), owned(&REFERENCES));
        close(chrf(&outputs, &references), 60.407949);
        close(bleu(&outputs, &references), 43.385149);
        let alone = [
            (0, 49.648517, 42.383656),
            (1, 67.06646, 30.928521),
            (2, 62.073521, 34.983301),
            (3, 0.0, 0.0),
            (4, 84.235896, 66.87403),
            (5, 65.451463, 53.670888),
        ];
        for (i, expected_chrf, expected_bleu) in alone {
            close(chrf(&outputs[i..=i], &references[i..=i]), expected_chrf);
            close(bleu(&outputs[i..=i], &references[i..=i]), expected_bleu);
        }
    }

    #[test]
    fn words_are_compared_as_squad_does() {
        close(token_f1("The Eiffel Tower!", "eiffel tower"), 1.0);
        close(token_f1("the red car", "a red bus stop"), 0.4);
        close(token_f1("", "the"), 1.0);
        close(token_f1("x", ""), 0.0);
        close(exact_match(&owned(&[" a\n", "b"]), &owned(&["a", "B"])), 0.5);
    }

    #[test]
    fn labels_are_scored_as_scikit_learn_does() {
        // f1_score(["a","a","b","b","c"], ["a","b","b","b","a"], average="macro"): 0.5, 0.8, 0.
        let label = |l: &str| Some(l.to_owned());
        let expected = owned(&["a", "a", "b", "b", "c"]);
        let answered = [label("a"), label("b"), label("b"), label("b"), label("a")];
        close(accuracy(&answered, &expected), 0.6);
        close(macro_f1(&answered, &expected), (0.5 + 0.8) / 3.0);
        let none = [None, label("b"), label("b"), label("b"), label("a")];
        let confusion = confusion(&none, &expected);
        assert_eq!(confusion["a"][&None], 1);
        assert_eq!(confusion["b"][&label("b")], 2);
    }
}
