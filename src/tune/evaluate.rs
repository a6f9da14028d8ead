//! A prompt on test data, beside the model without a prompt and with an instruction in words.

use std::{collections::BTreeMap, sync::Arc};

use serde::Serialize;

use super::{
    TuneError,
    calibrate::{LabelEvidence, Reliability, likeliest},
    evidence,
    in_context::{Shots, ShotsUsed},
    inference::Inference,
    init::InitError,
};
use crate::examples::{DataError, Dataset, Example, Faults};
use crate::quality::{
    self, Bleu, Chrf,
    interval::{Interval, bootstrap, wilson},
    mean,
};
use crate::{
    engine::sampling::mask::TokenConstraint,
    grammar::Grammars,
    input::{InputEncoder, truncation},
    model::Model,
    packing::{InputToken, Packing, PromptShape, text_len},
    prompt::{LearnedPrompt, Version, calibration::Calibration, label_scores::LabelTokens, labels::Verbalizer},
    tokenizer::Tokenizer,
};

/// What the model is given before each input.
#[derive(Debug, Clone)]
pub enum PromptVariant<'a> {
    /// A learned prompt.
    Learned(&'a Arc<LearnedPrompt>),
    /// Nothing.
    NoPrompt,
    /// An instruction in words, on a line of its own.
    Instruction(&'a str),
    /// Other examples with their answers.
    InContext(&'a Shots),
}

impl<'a> PromptVariant<'a> {
    /// The column's name.
    fn name(&self) -> &'static str {
        match self {
            Self::Learned(_) => "tuned",
            Self::NoPrompt => "no_prompt",
            Self::Instruction(_) => "instruction",
            Self::InContext(_) => "in_context",
        }
    }

    fn learned(&self) -> Option<&'a Arc<LearnedPrompt>> {
        match self {
            Self::Learned(prompt) => Some(prompt),
            Self::NoPrompt | Self::Instruction(_) | Self::InContext(_) => None,
        }
    }
}

/// The scores of one variant of the prompt.
#[derive(Debug, Clone, Serialize)]
pub struct Column {
    /// `tuned`, `no_prompt`, `instruction` or `in_context`.
    pub name: &'static str,
    /// By metric; shares are 0 to 1, chrF and BLEU 0 to 100.
    pub metrics: BTreeMap<&'static str, f64>,
    /// By metric, in its unit: the 95 % confidence interval, low and high. Wilson's for shares of the examples, a
    /// percentile bootstrap over examples for others; the ECE has none, since samples with repetitions raise it.
    pub intervals: BTreeMap<&'static str, Interval>,
    /// For a labelled task: how often each label was expected and answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub confusion: Option<BTreeMap<String, BTreeMap<String, usize>>>,
    /// For a labelled task: how well the labels' probabilities agree with what was expected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reliability: Option<Reliability>,
    /// For examples in the context: how many there were before the inputs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shots: Option<ShotsUsed>,
    /// For a labelled task: what the model says of the labels of each example.
    #[serde(skip)]
    pub evidence: Option<LabelEvidence>,
    /// What was compared, for each example.
    #[serde(skip)]
    pub outputs: Vec<String>,
}

/// What an answer that is no label is called.
pub const NO_LABEL: &str = "(no label)";

/// Test data against a task.
#[derive(Debug)]
pub struct Evaluation<'a> {
    pub model: &'a Arc<Model>,
    pub tokenizer: &'a Tokenizer,
    /// The version whose template, special tokens, truncation, grammar and stop strings count.
    pub version: &'a Version,
    pub labels: Option<&'a Verbalizer>,
    /// What corrects the learned prompt's label probabilities.
    pub calibration: Option<&'a Calibration>,
    pub data: &'a Dataset,
    /// The most new tokens of an answer.
    pub max_tokens: usize,
}

impl Evaluation<'_> {
    /// Answers every input greedily on an engine and scores the answers. `done` is told how many are
    /// answered.
    ///
    /// # Errors
    /// An input does not fit, every such line named; or the engine fails.
    pub fn column(&self, variant: &PromptVariant<'_>, done: &mut dyn FnMut(usize)) -> Result<Column, TuneError> {
        let words = self.labels.map(|labels| self.label_tokens(labels, variant)).transpose()?;
        let continuations = words.as_ref().map_or_else(Vec::new, LabelTokens::continuations);
        let longest_answer = continuations.iter().map(Vec::len).max().unwrap_or(0).max(self.max_tokens);
        let (inputs, shots) = self.inputs(variant, longest_answer)?;
        let prompt = variant.learned();
        let longest = inputs.iter().map(|input| text_len(input)).max().unwrap_or(0);
        let engine = Inference::start(self.model, prompt, longest, longest_answer)?;
        let generated = engine.greedy(&inputs, self.max_tokens, self.constraint()?.as_ref(), done)?;
        let mut outputs = Vec::with_capacity(generated.len());
        for ids in &generated {
            let output = self.tokenizer.decode(ids).map_err(InitError::Tokenizer)?;
            outputs.push(match prompt {
                Some(_) => output.trim().to_owned(),
                // A model that was never told when to stop is not blamed for what it adds.
                None => first_line(&output).to_owned(),
            });
        }
        let column = match self.labels.zip(words) {
            Some((labels, words)) => {
                let expected = self.data.examples.iter().map(|example| example.label.as_deref());
                let evidence = evidence::ask(&engine, &words, &inputs, expected)?;
                self.score_labels(variant, labels, evidence, outputs)
            }
            None => self.score_texts(variant.name(), outputs),
        };
        Ok(Column { shots, ..column })
    }

    /// What the task's grammar makes of answers, which a server holds every variant to as well.
    fn constraint(&self) -> Result<Option<Arc<dyn TokenConstraint>>, TuneError> {
        let Some(grammar) = &self.version.spec.grammar else { return Ok(None) };
        let info = self.model.info();
        let grammars = Grammars::new(self.tokenizer.clone(), info.vocab_size, info.eos_token_ids.clone());
        Ok(Some(grammars.compile(grammar)?))
    }

    /// The positions of each input, and how many examples stand before them where the variant has some. Those leave room
    /// for an answer of `longest_answer` tokens.
    fn inputs(
        &self,
        variant: &PromptVariant<'_>,
        longest_answer: usize,
    ) -> Result<(Vec<Vec<InputToken>>, Option<ShotsUsed>), TuneError> {
        let shape = PromptShape::of(variant.learned().map(Arc::as_ref));
        let budget = Packing::of(self.model.info()).budget(shape);
        let encoder = InputEncoder { shape, ..InputEncoder::of(self.version, self.tokenizer) };
        let limit = truncation::limit(budget, self.version);
        let room = match budget.shared {
            // An answer that may be as long as the context gets half of it.
            true => budget.output.saturating_sub(longest_answer.min(budget.output / 2).max(1)),
            false => budget.input,
        };
        let mut used = ShotsUsed::default();
        let mut one = |example: &Example| match variant {
            PromptVariant::Learned(_) | PromptVariant::NoPrompt => encoder.encode(&example.input, limit),
            PromptVariant::Instruction(text) => encoder.encode_after(&format!("{text}\n"), &example.input, limit),
            PromptVariant::InContext(shots) => {
                let (input, count) = shots.before(&encoder, &example.input, room, limit)?;
                used.add(count, shots.len());
                Ok(input)
            }
        };
        let mut faults = Vec::new();
        let mut inputs = Vec::new();
        for example in &self.data.examples {
            let fits = one(example).map_err(|e| e.to_string()).and_then(|input| {
                budget.check(text_len(&input), 1).map_err(|fault| format!("{fault}; shorten it"))?;
                Ok(input)
            });
            match fits {
                Ok(input) => inputs.push(input),
                Err(fault) => faults.push((example.line, fault)),
            }
        }
        match faults.is_empty() {
            true => Ok((inputs, matches!(variant, PromptVariant::InContext(_)).then_some(used))),
            false => Err(DataError::Faults(Faults { path: self.data.path.clone(), faults }).into()),
        }
    }

    fn score_texts(&self, name: &'static str, outputs: Vec<String>) -> Column {
        let references: Vec<String> = self.data.examples.iter().map(|e| e.output.trim().to_owned()).collect();
        let n = references.len();
        let pairs = || outputs.iter().zip(&references);
        let f1: Vec<f64> = pairs().map(|(o, r)| quality::token_f1(o, r)).collect();
        let chrf: Vec<Chrf> = pairs().map(|(o, r)| Chrf::of(o, r)).collect();
        let bleu: Vec<Bleu> = pairs().map(|(o, r)| Bleu::of(o, r)).collect();
        let metrics = [
            ("exact_match", quality::exact_match(&outputs, &references)),
            ("token_f1", mean(f1.iter().copied())),
            ("chrf", chrf.iter().copied().sum::<Chrf>().score()),
            ("bleu", bleu.iter().copied().sum::<Bleu>().score()),
        ];
        let intervals = [
            ("exact_match", wilson(pairs().filter(|(o, r)| quality::is_exact(o, r)).count(), n)),
            ("token_f1", bootstrap(n, |sample| mean(sample.iter().map(|&i| f1[i])))),
            ("chrf", bootstrap(n, |sample| sample.iter().map(|&i| chrf[i]).sum::<Chrf>().score())),
            ("bleu", bootstrap(n, |sample| sample.iter().map(|&i| bleu[i]).sum::<Bleu>().score())),
        ];
        Column {
            name,
            metrics: metrics.into(),
            intervals: intervals.into(),
            confusion: None,
            reliability: None,
            shots: None,
            evidence: None,
            outputs,
        }
    }

    fn score_labels(
        &self,
        variant: &PromptVariant<'_>,
        labels: &Verbalizer,
        evidence: LabelEvidence,
        outputs: Vec<String>,
    ) -> Column {
        let calibration = self.calibration.filter(|_| matches!(variant, PromptVariant::Learned(_)));
        let calibration = calibration.cloned().unwrap_or_else(Calibration::none);
        let probabilities = evidence.probabilities(&calibration);
        let chosen = |probabilities: &Vec<f64>| likeliest(probabilities).map(|(best, _)| evidence.labels[best].clone());
        let chosen: Vec<Option<String>> = probabilities.iter().map(chosen).collect();
        let reliability = evidence.reliability(&calibration);
        let expected: Vec<String> = self.data.examples.iter().map(|e| e.label.clone().unwrap_or_default()).collect();
        let answered: Vec<Option<String>> = outputs.iter().map(|o| labels.label_of(o).map(str::to_owned)).collect();
        let confusion = quality::confusion(&answered, &expected)
            .into_iter()
            .map(|(label, row)| {
                (label, row.into_iter().map(|(answer, n)| (answer.unwrap_or_else(|| NO_LABEL.to_owned()), n)).collect())
            })
            .collect();
        let n = expected.len();
        let right =
            |answers: &[Option<String>]| answers.iter().zip(&expected).filter(|(a, e)| a.as_ref() == Some(e)).count();
        let (pairs, known) = quality::label_pairs(&answered, &expected);
        let briers = evidence.briers(&calibration);
        let intervals = [
            ("accuracy", wilson(right(&answered), n)),
            ("macro_f1", bootstrap(n, |sample| quality::macro_f1_of(sample.iter().map(|&i| pairs[i]), known))),
            ("choice_accuracy", wilson(right(&chosen), n)),
            ("brier", bootstrap(n, |sample| mean(sample.iter().map(|&i| briers[i])))),
        ];
        let metrics = [
            ("accuracy", quality::accuracy(&answered, &expected)),
            ("macro_f1", quality::macro_f1(&answered, &expected)),
            ("choice_accuracy", quality::accuracy(&chosen, &expected)),
            ("brier", reliability.brier),
            ("ece", reliability.ece),
        ];
        Column {
            name: variant.name(),
            metrics: metrics.into(),
            intervals: intervals.into(),
            confusion: Some(confusion),
            reliability: Some(reliability),
            shots: None,
            evidence: Some(evidence),
            outputs,
        }
    }

    /// The labels' token sequences: with a learned prompt as `classify` scores them, otherwise words alone.
    fn label_tokens(&self, labels: &Verbalizer, variant: &PromptVariant<'_>) -> Result<LabelTokens, TuneError> {
        match variant.learned() {
            Some(_) => {
                let stops = self.version.spec.defaults.stop.as_deref().unwrap_or_default();
                evidence::ended_labels(self.tokenizer, labels, stops, &self.model.info().eos_token_ids)
            }
            None => evidence::bare_labels(self.tokenizer, labels),
        }
    }
}

fn first_line(output: &str) -> &str {
    output.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default()
}

/// An instruction in words, from what a task says of itself.
pub fn default_instruction(version: &Version) -> Option<String> {
    let labels: Vec<&str> =
        version.spec.labels.values().filter_map(|words| words.first()).map(String::as_str).collect();
    let choices = (!labels.is_empty()).then(|| format!("Answer with one of: {}.", labels.join(", ")));
    let description = version.spec.description.as_deref().map(str::trim).filter(|d| !d.is_empty());
    match (description, choices) {
        (Some(description), Some(choices)) => Some(format!("{description} {choices}")),
        (Some(description), None) => Some(description.to_owned()),
        (None, choices) => choices,
    }
}
