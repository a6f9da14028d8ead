//! The options of a tuning run, as whoever starts it gives them.

use std::path::PathBuf;

use super::{
    Setting, TuneError,
    init::{self, Init},
    parameters::Method,
    prompt_encoder::{PromptEncoder, PromptEncoderKind},
    schedule::Decay,
    variation::Variation,
};
use crate::{
    model::Model,
    prompt::{TaskName, labels::Verbalizer, spec::Truncation},
};

/// The least units of an encoder where none are asked for. As many as there are rows make any rows.
const ENCODER_SIZE: usize = 128;

/// The most units of an encoder's layer.
const MAX_ENCODER_SIZE: usize = 16384;

/// The number of folds of a cross-validation where none is asked for.
pub const FOLDS: usize = 3;

/// The most folds of a cross-validation.
const MAX_FOLDS: usize = 100;

/// What is varied in training of a prefix where nothing is asked for and the answers are labels.
const VARIATION_OF_LABELS: Variation = Variation { word_dropout: 0.2, noise: 0.2 };

/// Which type of prompt is learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptType {
    Prompt,
    PTuning {
        encoder: PromptEncoderKind,
        /// Units of a layer; by the number of rows where there is none.
        hidden_size: Option<usize>,
    },
    Prefix,
}

impl PromptType {
    /// What a prompt begins as where nothing is asked for.
    pub fn default_init(self) -> Init {
        match self {
            Self::Prompt | Self::PTuning { .. } => Init::Vocab,
            Self::Prefix => Init::Examples,
        }
    }

    pub(super) fn method(self, virtual_tokens: usize, model: &Model) -> Result<Method, TuneError> {
        Ok(match self {
            Self::Prompt => Method::PromptTuning,
            Self::Prefix => Method::PrefixTuning,
            Self::PTuning { encoder, hidden_size } => Method::PTuning(PromptEncoder {
                kind: encoder,
                hidden_size: hidden_size.unwrap_or(virtual_tokens.max(ENCODER_SIZE)),
                scale: init::embedding_scale(model)?,
            }),
        })
    }
}

/// The options of a run.
#[derive(Debug, Clone)]
pub struct Options {
    pub task: TaskName,
    pub data: PathBuf,
    /// Held-out examples; without them a part of `data`.
    pub eval_data: Option<PathBuf>,
    /// minijinja source; [`default_template`](super::plan::default_template) where there is none.
    pub template: Option<String>,
    /// Which field of an input that is too long is shortened, in tuning as in serving.
    pub truncate: Option<Truncation>,
    pub labels: Option<Verbalizer>,
    pub description: Option<String>,
    pub prompt_type: PromptType,
    /// It races with other types: fewer rates of each are tried.
    pub races: bool,
    /// [`VIRTUAL_TOKENS`](super::plan::VIRTUAL_TOKENS) where there is none.
    pub virtual_tokens: Option<usize>,
    pub init: Init,
    /// What `init` is called in a checkpoint.
    pub init_name: String,
    /// `None` sweeps.
    pub rate: Option<f64>,
    pub length: Length,
    /// Part of the steps that warm up, 0 to 1.
    pub warmup: f64,
    pub decay: Decay,
    pub batch_size: usize,
    pub accumulate: usize,
    pub weight_decay: f64,
    pub clip: f64,
    /// The part of the inputs' words that is left out in training; by the type and the answers where there is none.
    pub word_dropout: Option<f64>,
    /// The noise on the values in training, relative to them; by the type and the answers where there is none.
    pub noise: Option<f64>,
    pub seed: u64,
    pub eval_every: Option<usize>,
    pub patience: usize,
    /// The number of folds of the cross-validation of a run that holds out no examples; 0 is none.
    pub folds: usize,
    /// Held-out examples that were split off are never trained on.
    pub keep_held_out: bool,
}

/// How long a run is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    /// By the number of examples.
    Auto,
    Steps(usize),
    Epochs(f64),
}

impl Options {
    /// The defaults for a task and its data.
    pub fn new(task: TaskName, data: impl Into<PathBuf>) -> Self {
        Self {
            task,
            data: data.into(),
            eval_data: None,
            template: None,
            truncate: None,
            labels: None,
            description: None,
            prompt_type: PromptType::Prompt,
            races: false,
            virtual_tokens: None,
            init: Init::Vocab,
            init_name: "vocab".to_owned(),
            rate: None,
            length: Length::Auto,
            warmup: 0.06,
            decay: Decay::Linear,
            batch_size: 16,
            accumulate: 1,
            weight_decay: 0.0,
            clip: 1.0,
            word_dropout: None,
            noise: None,
            seed: 0,
            eval_every: None,
            patience: 6,
            folds: FOLDS,
            keep_held_out: false,
        }
    }

    /// What is varied in training. With labels, no single word should decide; any other answer may be made of the very words.
    /// Of the types, a prefix is what learns few examples by heart.
    pub(super) fn variation(&self, labelled: bool) -> Variation {
        let varies = labelled && self.prompt_type == PromptType::Prefix;
        let default = if varies { VARIATION_OF_LABELS } else { Variation::default() };
        Variation {
            word_dropout: self.word_dropout.unwrap_or(default.word_dropout),
            noise: self.noise.unwrap_or(default.noise),
        }
    }

    /// Checks every number that needs no model to be checked.
    pub(super) fn check(&self) -> Result<(), TuneError> {
        let range = |setting, found: f64, least: f64, most: f64, expected: &str| {
            let fine = found >= least && found <= most;
            let error = || TuneError::OutOfRange { setting, found: found.to_string(), expected: expected.to_owned() };
            if fine { Ok(()) } else { Err(error()) }
        };
        let rate = self.rate.unwrap_or(1.0);
        range(Setting::LearningRate, rate, f64::MIN_POSITIVE, 1e6, "a positive number")?;
        range(Setting::Warmup, self.warmup, 0.0, 1.0, "a part of the steps, 0 to 1")?;
        range(Setting::WeightDecay, self.weight_decay, 0.0, 1e6, "0 or more")?;
        range(Setting::Clip, self.clip, 0.0, f64::MAX, "a norm, or 0 for none")?;
        let part = "a part of the words, 0 to 0.9";
        range(Setting::WordDropout, self.word_dropout.unwrap_or(0.0), 0.0, 0.9, part)?;
        range(Setting::Noise, self.noise.unwrap_or(0.0), 0.0, 10.0, "0 to 10")?;
        let count = |setting, found: usize| range(setting, found as f64, 1.0, 1e9, "1 or more");
        count(Setting::BatchSize, self.batch_size)?;
        count(Setting::Accumulate, self.accumulate)?;
        let folds = format!("2 to {MAX_FOLDS}, or 0 for no cross-validation");
        match self.folds {
            0 => {}
            n => range(Setting::Folds, n as f64, 2.0, MAX_FOLDS as f64, &folds)?,
        }
        count(Setting::EvalEvery, self.eval_every.unwrap_or(1))?;
        if let PromptType::PTuning { hidden_size: Some(size), .. } = self.prompt_type {
            range(Setting::EncoderHidden, size as f64, 1.0, MAX_ENCODER_SIZE as f64, "1 to 16384")?;
        }
        match self.length {
            Length::Auto => Ok(()),
            Length::Steps(n) => count(Setting::Steps, n),
            Length::Epochs(n) => range(Setting::Epochs, n, f64::MIN_POSITIVE, 1e6, "a positive number"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_prefix_for_labels_is_varied_unless_it_is_asked_for() {
        let options = |word_dropout, noise| Options {
            prompt_type: PromptType::Prefix,
            word_dropout,
            noise,
            ..Options::new("a".parse().expect("a name"), "data.jsonl")
        };
        assert_eq!(options(None, None).variation(false), Variation::default());
        assert_eq!(options(None, None).variation(true), VARIATION_OF_LABELS);
        let prompt = Options { prompt_type: PromptType::Prompt, ..options(None, None) };
        assert_eq!(prompt.variation(true), Variation::default());
        let asked = options(Some(0.1), None).variation(false);
        assert_eq!(asked, Variation { word_dropout: 0.1, noise: 0.0 });
        assert_eq!(options(Some(0.0), Some(0.0)).variation(true), Variation::default());
        assert!(options(Some(0.95), None).check().is_err() && options(None, Some(-1.0)).check().is_err());
        assert!(options(Some(f64::NAN), None).check().is_err());
    }
}
