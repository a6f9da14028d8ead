//! The calibration that a tuning run ends with: learned on what the new prompt says of the held-out examples.

use std::{collections::HashSet, sync::Arc};

use super::{
    TuneError,
    calibrate::{LEAST_EXAMPLES, LabelEvidence, LearnedCalibration},
    evidence,
    inference::Inference,
    init::InitError,
    plan::{HeldOut, Plan},
};
use crate::{
    model::Model,
    packing::{InputToken, text_len},
    prompt::{LearnedPrompt, calibration::Calibration, label_scores::LabelTokens, labels::Verbalizer},
    tokenizer::Tokenizer,
};

/// What came of a calibration.
#[derive(Debug)]
pub enum HeldOutCalibration {
    /// There are fewer held-out examples, none of which was trained on, than [`LEAST_EXAMPLES`].
    TooFew { found: usize },
    /// It was learned, and is stored if it can be trusted.
    Learned(LearnedCalibration),
    /// The engine did not score the labels. The prompt is finished all the same.
    Failed(TuneError),
}

impl HeldOutCalibration {
    /// What goes into `task.json`.
    pub fn stored(&self) -> Option<&Calibration> {
        match self {
            Self::Learned(learned) if learned.is_better => Some(&learned.calibration),
            Self::Learned(_) | Self::TooFew { .. } | Self::Failed(_) => None,
        }
    }
}

/// Learns the calibration of a tuned prompt on the plan's held-out examples, without those that are also trained on.
/// `None` where the task has no labels.
pub fn learn(
    model: &Arc<Model>,
    tokenizer: &Tokenizer,
    plan: &Plan,
    prompt: &Arc<LearnedPrompt>,
) -> Option<HeldOutCalibration> {
    let labels = plan.labels.as_ref()?;
    let trained: HashSet<&[InputToken]> = plan.train.iter().map(|example| example.input.as_slice()).collect();
    let own = |input: &[InputToken]| plan.held_out_is != HeldOut::Training && !trained.contains(input);
    let examples = plan.held_out.iter().filter(|example| own(&example.input));
    let (inputs, answers): (Vec<Vec<InputToken>>, Vec<&[u32]>) =
        examples.map(|example| (example.input.clone(), example.answer.as_slice())).unzip();
    if inputs.len() < LEAST_EXAMPLES {
        return Some(HeldOutCalibration::TooFew { found: inputs.len() });
    }
    Some(match score(model, tokenizer, labels, prompt, &inputs, &answers) {
        Ok(evidence) => HeldOutCalibration::Learned(evidence.learn()),
        Err(error) => HeldOutCalibration::Failed(error),
    })
}

/// The probabilities of the labels, as a server with this prompt would compute them.
fn score(
    model: &Arc<Model>,
    tokenizer: &Tokenizer,
    labels: &Verbalizer,
    prompt: &Arc<LearnedPrompt>,
    inputs: &[Vec<InputToken>],
    answers: &[&[u32]],
) -> Result<LabelEvidence, TuneError> {
    let eos_token_ids = &model.info().eos_token_ids;
    let words: LabelTokens = evidence::ended_labels(tokenizer, labels, &[], eos_token_ids)?;
    let mut taught = Vec::new();
    for label in labels.labels() {
        let word = labels.word_for(label).unwrap_or(label);
        taught.push((label, tokenizer.tokenize_continuation(word).map_err(InitError::Tokenizer)?));
    }
    // An answer is its label's first word and the end-of-sequence token.
    let label_of = |answer: &&[u32]| {
        let word = answer.split_last().map_or(&[][..], |(_, word)| word);
        taught.iter().find(|(_, ids)| ids == word).map(|(label, _)| *label)
    };
    let longest = inputs.iter().map(|input| text_len(input)).max().unwrap_or(0);
    let longest_word = words.continuations().iter().map(Vec::len).max().unwrap_or(0);
    let engine = Inference::start(model, Some(prompt), longest, longest_word)?;
    evidence::ask(&engine, &words, inputs, answers.iter().map(label_of))
}
