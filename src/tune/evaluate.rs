//! A prompt on test data, beside the model without a prompt and with an instruction in words.

use std::{collections::BTreeMap, sync::Arc};

use serde::Serialize;

use super::{
    TuneError,
    calibrate::{LabelEvidence, Reliability, likeliest},
    data::{DataError, Dataset, Faults},
    inference::Inference,
    metrics::{
        self, Bleu, Chrf,
        interval::{Interval, bootstrap, wilson},
        mean,
    },
};
use crate::{
    engine::sampling::mask::TokenConstraint,
    grammar::Grammars,
    input::{InputEncoder, truncation},
    model::Model,
    packing::{InputToken, Packing, PromptShape, text_len},
    prompt::{
        LearnedPrompt, Version,
        calibration::Calibration,
        label_scores::{LabelTokens, NoTokens},
        labels::Verbalizer,
    },
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
}

impl<'a> PromptVariant<'a> {
    /// The column's name.
    fn name(&self) -> &'static str {
        match self {
            Self::Learned(_) => "tuned",
            Self::NoPrompt => "no_prompt",
            Self::Instruction(_) => "instruction",
        }
    }

    fn learned(&self) -> Option<&'a Arc<LearnedPrompt>> {
        match self {
            Self::Learned(prompt) => Some(prompt),
            Self::NoPrompt | Self::Instruction(_) => None,
        }
    }
}

/// The scores of one variant of the prompt.
#[derive(Debug, Clone, Serialize)]
pub struct Column {
    /// `tuned`, `no_prompt` or `instruction`.
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
        let inputs = self.inputs(variant)?;
        let prompt = variant.learned();
        let longest = inputs.iter().map(|input| text_len(input)).max().unwrap_or(0);
        let words = self.labels.map(|labels| self.label_tokens(labels, variant)).transpose()?;
        let continuations = words.as_ref().map_or_else(Vec::new, LabelTokens::continuations);
        let longest_word = continuations.iter().map(Vec::len).max().unwrap_or(0);
        let engine = Inference::start(self.model, prompt, longest, self.max_tokens.max(longest_word))?;
        let generated = engine.greedy(&inputs, self.max_tokens, self.constraint()?.as_ref(), done)?;
        let mut outputs = Vec::with_capacity(generated.len());
        for ids in &generated {
            let output = self.tokenizer.decode(ids).map_err(super::init::InitError::Tokenizer)?;
            outputs.push(match variant {
                PromptVariant::Learned(_) => output.trim().to_owned(),
                // A model that was never told when to stop is not blamed for what it adds.
                PromptVariant::NoPrompt | PromptVariant::Instruction(_) => first_line(&output).to_owned(),
            });
        }
        match self.labels.zip(words) {
            Some((labels, words)) => {
                let evidence = self.evidence(&words, engine.score(&inputs, &continuations)?);
                Ok(self.score_labels(variant, labels, evidence, outputs))
            }
            None => Ok(self.score_texts(variant.name(), outputs)),
        }
    }

    /// What the task's grammar makes of answers, which a server holds every variant to as well.
    fn constraint(&self) -> Result<Option<Arc<dyn TokenConstraint>>, TuneError> {
        let Some(grammar) = &self.version.spec.grammar else { return Ok(None) };
        let info = self.model.info();
        let grammars = Grammars::new(self.tokenizer.clone(), info.vocab_size, info.eos_token_ids.clone());
        Ok(Some(grammars.compile(grammar)?))
    }

    fn inputs(&self, variant: &PromptVariant<'_>) -> Result<Vec<Vec<InputToken>>, TuneError> {
        let shape = PromptShape::of(variant.learned().map(Arc::as_ref));
        let budget = Packing::of(self.model.info()).budget(shape);
        let encoder = InputEncoder {
            tokenizer: self.tokenizer,
            template: &self.version.template,
            special_tokens: self.version.spec.special_tokens.unwrap_or_default(),
            truncate: self.version.spec.truncate.as_ref(),
            shape,
        };
        let limit = truncation::limit(budget, self.version);
        let instruction = match variant {
            PromptVariant::Instruction(instruction) => format!("{instruction}\n"),
            PromptVariant::Learned(_) | PromptVariant::NoPrompt => String::new(),
        };
        let mut faults = Vec::new();
        let mut inputs = Vec::new();
        for example in &self.data.examples {
            let input = encoder.encode_after(&instruction, &example.input, limit).map_err(|e| e.to_string());
            let fits = input.and_then(|input| {
                budget.check(text_len(&input), 1).map_err(|fault| format!("{fault}; shorten it"))?;
                Ok(input)
            });
            match fits {
                Ok(input) => inputs.push(input),
                Err(fault) => faults.push((example.line, fault)),
            }
        }
        match faults.is_empty() {
            true => Ok(inputs),
            false => Err(DataError::Faults(Faults { path: self.data.path.clone(), faults }).into()),
        }
    }

    fn score_texts(&self, name: &'static str, outputs: Vec<String>) -> Column {
        let references: Vec<String> = self.data.examples.iter().map(|e| e.output.trim().to_owned()).collect();
        let n = references.len();
        let pairs = || outputs.iter().zip(&references);
        let f1: Vec<f64> = pairs().map(|(o, r)| metrics::token_f1(o, r)).collect();
        let chrf: Vec<Chrf> = pairs().map(|(o, r)| Chrf::of(o, r)).collect();
        let bleu: Vec<Bleu> = pairs().map(|(o, r)| Bleu::of(o, r)).collect();
        let metrics = [
            ("exact_match", metrics::exact_match(&outputs, &references)),
            ("token_f1", mean(f1.iter().copied())),
            ("chrf", chrf.iter().copied().sum::<Chrf>().score()),
            ("bleu", bleu.iter().copied().sum::<Bleu>().score()),
        ];
        let intervals = [
            ("exact_match", wilson(pairs().filter(|(o, r)| metrics::is_exact(o, r)).count(), n)),
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
        let confusion = metrics::confusion(&answered, &expected)
            .into_iter()
            .map(|(label, row)| {
                (label, row.into_iter().map(|(answer, n)| (answer.unwrap_or_else(|| NO_LABEL.to_owned()), n)).collect())
            })
            .collect();
        let n = expected.len();
        let right =
            |answers: &[Option<String>]| answers.iter().zip(&expected).filter(|(a, e)| a.as_ref() == Some(e)).count();
        let (pairs, known) = metrics::label_pairs(&answered, &expected);
        let briers = evidence.briers(&calibration);
        let intervals = [
            ("accuracy", wilson(right(&answered), n)),
            ("macro_f1", bootstrap(n, |sample| metrics::macro_f1_of(sample.iter().map(|&i| pairs[i]), known))),
            ("choice_accuracy", wilson(right(&chosen), n)),
            ("brier", bootstrap(n, |sample| mean(sample.iter().map(|&i| briers[i])))),
        ];
        let metrics = [
            ("accuracy", metrics::accuracy(&answered, &expected)),
            ("macro_f1", metrics::macro_f1(&answered, &expected)),
            ("choice_accuracy", metrics::accuracy(&chosen, &expected)),
            ("brier", reliability.brier),
            ("ece", reliability.ece),
        ];
        Column {
            name: variant.name(),
            metrics: metrics.into(),
            intervals: intervals.into(),
            confusion: Some(confusion),
            reliability: Some(reliability),
            evidence: Some(evidence),
            outputs,
        }
    }

    /// The labels' token sequences. Only a learned prompt was taught how an answer ends, so without one words alone count.
    fn label_tokens(&self, labels: &Verbalizer, variant: &PromptVariant<'_>) -> Result<LabelTokens, TuneError> {
        let tokens = |text: &str| self.tokenizer.tokenize_continuation(text).map_err(super::init::InitError::Tokenizer);
        let ends = match variant {
            PromptVariant::Learned(_) => {
                let stops = self
                    .version
                    .spec
                    .defaults
                    .stop
                    .iter()
                    .flatten()
                    .map(|stop| tokens(stop))
                    .collect::<Result<Vec<_>, _>>()?;
                stops.into_iter().chain(self.model.info().eos_token_ids.iter().map(|&id| vec![id])).collect()
            }
            PromptVariant::NoPrompt | PromptVariant::Instruction(_) => Vec::new(),
        };
        LabelTokens::new(labels, &ends, |word| Ok::<_, TuneError>(tokens(word)?))
    }

    fn evidence(&self, words: &LabelTokens, scores: Vec<Option<Vec<Vec<f32>>>>) -> LabelEvidence {
        let labels: Vec<String> = words.names().map(str::to_owned).collect();
        let known = |label: &Option<String>| labels.iter().position(|known| Some(known) == label.as_ref());
        let expected = self.data.examples.iter().map(|example| known(&example.label).unwrap_or(labels.len())).collect();
        let one = |log_probs: Option<Vec<Vec<f32>>>| match log_probs {
            Some(log_probs) => words.log_masses(&log_probs),
            // There is nothing to predict from: no label is likelier than another.
            None => vec![f64::NEG_INFINITY; labels.len()],
        };
        let scores = scores.into_iter().map(one).collect();
        LabelEvidence { labels, scores, expected }
    }
}

impl From<NoTokens> for TuneError {
    fn from(error: NoTokens) -> Self {
        Self::NoLabelTokens { label: error.label }
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
