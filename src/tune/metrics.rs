//! How close texts are to those that were expected: plain functions of strings.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
};

/// The part of the outputs that are the references, outer white space aside; 0 to 1.
pub fn exact_match(outputs: &[String], references: &[String]) -> f64 {
    mean(outputs.iter().zip(references).map(|(o, r)| f64::from(o.trim() == r.trim())))
}

/// The mean F1 of words, as SQuAD's script counts it: lower case, without punctuation and without
/// a, an, the (Rajpurkar et al. 2016); 0 to 1.
pub fn token_f1(outputs: &[String], references: &[String]) -> f64 {
    mean(outputs.iter().zip(references).map(|(o, r)| {
        let (o, r) = (squad_words(o), squad_words(r));
        if o.is_empty() || r.is_empty() {
            return f64::from(o == r);
        }
        let common = overlap(&counts(o.iter()), &counts(r.iter())) as f64;
        if common == 0.0 { 0.0 } else { 2.0 * common / (o.len() + r.len()) as f64 }
    }))
}

fn squad_words(text: &str) -> Vec<String> {
    let plain: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    plain.split_whitespace().filter(|w| !["a", "an", "the"].contains(w)).map(str::to_owned).collect()
}

/// chrF2 of a corpus (Popović 2015): character n-grams up to 6, white space left out; 0 to 100, as
/// sacrebleu computes it.
pub fn chrf(outputs: &[String], references: &[String]) -> f64 {
    const ORDER: usize = 6;
    const BETA_SQUARED: f64 = 4.0;
    // For each order: n-grams of the outputs, of the references, and common ones.
    let mut totals = [[0u64; 3]; ORDER];
    for (output, reference) in outputs.iter().zip(references) {
        let letters = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<Vec<char>>();
        let (output, reference) = (letters(output), letters(reference));
        for (order, total) in totals.iter_mut().enumerate() {
            let (o, r) = (counts(output.windows(order + 1)), counts(reference.windows(order + 1)));
            if !r.is_empty() {
                total[0] += o.values().sum::<u64>();
            }
            total[1] += r.values().sum::<u64>();
            total[2] += overlap(&o, &r);
        }
    }
    let usable: Vec<_> = totals.iter().filter(|t| t[0] > 0 && t[1] > 0).collect();
    let average = |i: usize| mean(usable.iter().map(|t| t[2] as f64 / t[i] as f64));
    let (precision, recall) = (average(0), average(1));
    match precision + recall > 0.0 {
        true => 100.0 * (1.0 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall),
        false => 0.0,
    }
}

/// BLEU of a corpus (Papineni et al. 2002) with the 13a tokenizer and exponential smoothing; 0 to
/// 100, as sacrebleu computes it by default.
pub fn bleu(outputs: &[String], references: &[String]) -> f64 {
    const ORDER: usize = 4;
    let (mut correct, mut total) = ([0u64; ORDER], [0u64; ORDER]);
    let (mut output_length, mut reference_length) = (0, 0);
    for (output, reference) in outputs.iter().zip(references) {
        let (output, reference) = (words_13a(output), words_13a(reference));
        output_length += output.len();
        reference_length += reference.len();
        for order in 0..ORDER {
            let (o, r) = (counts(output.windows(order + 1)), counts(reference.windows(order + 1)));
            total[order] += o.values().sum::<u64>();
            correct[order] += overlap(&o, &r);
        }
    }
    if correct.iter().all(|&c| c == 0) {
        return 0.0;
    }
    let mut smoothing = 1.0;
    let mut logs = 0.0;
    for (&correct, &total) in correct.iter().zip(&total) {
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
    let shortness = match output_length < reference_length {
        true => (1.0 - reference_length as f64 / output_length as f64).exp(),
        false => 1.0,
    };
    100.0 * shortness * (logs / ORDER as f64).exp()
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

fn mean(values: impl Iterator<Item = f64>) -> f64 {
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
    let mut labels: Vec<&String> = expected.iter().chain(answered.iter().flatten()).collect();
    labels.sort();
    labels.dedup();
    mean(labels.into_iter().map(|label| {
        let pairs = || answered.iter().zip(expected);
        let right = pairs().filter(|(a, e)| a.as_ref() == Some(label) && *e == label).count();
        let claimed = pairs().filter(|(a, _)| a.as_ref() == Some(label)).count();
        let there = pairs().filter(|(_, e)| *e == label).count();
        2.0 * right as f64 / (claimed + there) as f64
    }))
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
        let f1 = |a: &str, b: &str| token_f1(&owned(&[a]), &owned(&[b]));
        close(f1("The Eiffel Tower!", "eiffel tower"), 1.0);
        close(f1("the red car", "a red bus stop"), 0.4);
        close(f1("", "the"), 1.0);
        close(f1("x", ""), 0.0);
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
