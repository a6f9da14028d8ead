//! A prompt on test data, beside the model without a prompt and with an instruction in words.

use std::{collections::BTreeMap, sync::Arc};

use serde::Serialize;

use super::{
    TuneError,
    data::{DataError, Dataset, Faults},
    inference::Inference,
    metrics,
};
use crate::{
    model::Model,
    packing::{Packing, PromptShape},
    prompt::{LearnedPrompt, Version, labels::Verbalizer, spec::SpecialTokens, template::PromptTemplate},
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
    /// For a labelled task: how often each label was expected and answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub confusion: Option<BTreeMap<String, BTreeMap<String, usize>>>,
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
    pub template: &'a PromptTemplate,
    pub special_tokens: SpecialTokens,
    pub labels: Option<&'a Verbalizer>,
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
        let longest = inputs.iter().map(Vec::len).max().unwrap_or(0);
        let words = self.labels.map(|labels| self.label_tokens(labels)).transpose()?.unwrap_or_default();
        let longest_word = words.iter().map(|(_, ids)| ids.len()).max().unwrap_or(0);
        let engine = Inference::start(self.model, prompt, longest, self.max_tokens.max(longest_word))?;
        let generated = engine.greedy(&inputs, self.max_tokens, done)?;
        let mut outputs = Vec::with_capacity(generated.len());
        for ids in &generated {
            let output = self.tokenizer.decode(ids).map_err(super::init::InitError::Tokenizer)?;
            outputs.push(match variant {
                PromptVariant::Learned(_) => output.trim().to_owned(),
                // A model that was never told when to stop is not blamed for what it adds.
                PromptVariant::NoPrompt | PromptVariant::Instruction(_) => first_line(&output).to_owned(),
            });
        }
        match self.labels {
            Some(labels) => {
                let likeliest = likeliest(&engine, &words, &inputs)?;
                Ok(self.score_labels(variant, labels, likeliest, outputs))
            }
            None => Ok(self.score_texts(variant.name(), outputs)),
        }
    }

    fn inputs(&self, variant: &PromptVariant<'_>) -> Result<Vec<Vec<u32>>, TuneError> {
        let shape = PromptShape::of(variant.learned().map(Arc::as_ref));
        let budget = Packing::of(self.model.info()).budget(shape);
        let mut faults = Vec::new();
        let mut inputs = Vec::new();
        for example in &self.data.examples {
            let input = match self.special_tokens {
                SpecialTokens::Special => example.input.clone(),
                SpecialTokens::Text => example.input.map(|text| self.tokenizer.escape(text)),
            };
            let ids = self.template.render(&input).map_err(|e| e.to_string()).and_then(|rendered| {
                let text = match variant {
                    PromptVariant::Instruction(instruction) => format!("{instruction}\n{rendered}"),
                    PromptVariant::Learned(_) | PromptVariant::NoPrompt => rendered,
                };
                let ids = self.tokenizer.tokenize_escaped(&text).map_err(|e| e.to_string())?;
                budget.check(ids.len(), 1).map_err(|fault| format!("{fault}; shorten it"))?;
                Ok(ids)
            });
            match ids {
                Ok(ids) => inputs.push(ids),
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
        let metrics = [
            ("exact_match", metrics::exact_match(&outputs, &references)),
            ("token_f1", metrics::token_f1(&outputs, &references)),
            ("chrf", metrics::chrf(&outputs, &references)),
            ("bleu", metrics::bleu(&outputs, &references)),
        ];
        Column { name, metrics: metrics.into(), confusion: None, outputs }
    }

    fn score_labels(
        &self,
        variant: &PromptVariant<'_>,
        labels: &Verbalizer,
        likeliest: Vec<Option<String>>,
        outputs: Vec<String>,
    ) -> Column {
        let expected: Vec<String> = self.data.examples.iter().map(|e| e.label.clone().unwrap_or_default()).collect();
        let answered: Vec<Option<String>> = outputs.iter().map(|o| labels.label_of(o).map(str::to_owned)).collect();
        let confusion = metrics::confusion(&answered, &expected)
            .into_iter()
            .map(|(label, row)| {
                (label, row.into_iter().map(|(answer, n)| (answer.unwrap_or_else(|| NO_LABEL.to_owned()), n)).collect())
            })
            .collect();
        let metrics = [
            ("accuracy", metrics::accuracy(&answered, &expected)),
            ("macro_f1", metrics::macro_f1(&answered, &expected)),
            ("choice_accuracy", metrics::accuracy(&likeliest, &expected)),
        ];
        Column { name: variant.name(), metrics: metrics.into(), confusion: Some(confusion), outputs }
    }

    /// Each label with the tokens of its word; a label whose word has none is left out.
    fn label_tokens(&self, labels: &Verbalizer) -> Result<Vec<(String, Vec<u32>)>, TuneError> {
        let mut words = Vec::new();
        for label in labels.labels() {
            let word = labels.word_for(label).unwrap_or(label);
            let ids = self.tokenizer.tokenize_continuation(word).map_err(super::init::InitError::Tokenizer)?;
            words.push((label.to_owned(), ids));
        }
        words.retain(|(_, ids)| !ids.is_empty());
        Ok(words)
    }
}

/// The label whose word is the likeliest answer to each input.
fn likeliest(
    engine: &Inference,
    words: &[(String, Vec<u32>)],
    inputs: &[Vec<u32>],
) -> Result<Vec<Option<String>>, TuneError> {
    if words.is_empty() {
        return Ok(vec![None; inputs.len()]);
    }
    let continuations: Vec<Vec<u32>> = words.iter().map(|(_, ids)| ids.clone()).collect();
    let best = |scores: Option<Vec<f64>>| {
        let best = scores?.into_iter().enumerate().max_by(|a, b| a.1.total_cmp(&b.1))?.0;
        Some(words[best].0.clone())
    };
    Ok(engine.score(inputs, &continuations)?.into_iter().map(best).collect())
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
