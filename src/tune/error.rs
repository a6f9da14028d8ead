//! Why a prompt was not tuned or measured: facts and values. What a user can type against it is said by
//! whoever asked.

use std::{fmt, io, path::PathBuf};

use super::{checkpoint::CheckpointError, init::InitError};
use crate::examples::DataError;
use crate::{
    engine::{StartError, SubmitError},
    prompt::{format::Faults, grammar::GrammarError, soft::PlaceError, template::TemplateError},
};

/// Why a prompt was not tuned or measured. Whatever was in the output folder is still there.
#[derive(Debug, thiserror::Error)]
pub enum TuneError {
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Init(#[from] InitError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("the template: {0}")]
    Template(#[from] TemplateError),
    #[error("the template: {0}")]
    Place(#[from] PlaceError),
    /// A number is out of its range.
    #[error("{setting} is {found}, expected {expected}")]
    OutOfRange { setting: Setting, found: String, expected: String },
    /// PEFT has no keys and values for such a model.
    #[error(
        "PEFT's prefix tuning stores keys and values for {encoder} layers, the number of the model's encoder, and its \
         decoder has {decoder}: a prefix cannot be tuned for this model"
    )]
    DeeperDecoder { encoder: usize, decoder: usize },
    #[error(
        "the model {model} names no end-of-sequence token, so an answer could not end; add eos_token_id to its \
         config.json"
    )]
    NoEos { model: String },
    /// The output folder belongs to a running server.
    #[error("{} holds versions that a server manages", output.display())]
    Managed { output: PathBuf },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot draw {}: {reason}", path.display())]
    Curve { path: PathBuf, reason: String },
    /// The files that were written would be refused by `serve`.
    #[error("the tuned prompt cannot be served: {0}")]
    Unservable(#[from] Faults),
    /// A label's words have no tokens.
    #[error("the label {label:?} has no word that the tokenizer makes a token of")]
    NoLabelTokens { label: String },
    /// There is nothing to put into the context.
    #[error(
        "every example of {} is also an input of {}, so none can stand before the others; give examples that are not \
         tested on",
        examples.display(),
        data.display()
    )]
    NoExamplesLeft { examples: PathBuf, data: PathBuf },
    #[error("the loss stopped being a number at step {step} with the learning rate {rate}")]
    Diverged { rate: f64, step: usize },
    #[error("none of the learning rates {tried:?} lowered the held-out loss of {start:.3}")]
    NoRate { start: f64, tried: Vec<f64> },
    #[error("the prompt is no better than its initial values (loss {loss:.3}, learning rate {rate})")]
    NoGain { rate: f64, loss: f64 },
    #[error("interrupted; the state is in {}", checkpoint.display())]
    Interrupted { checkpoint: PathBuf },
    #[error("interrupted while the learning rate was chosen; nothing was saved yet")]
    InterruptedSweep,
    #[error("interrupted during cross-validation; nothing was saved yet")]
    InterruptedCrossValidation,
    #[error("the forward pass failed: {0}")]
    Tensor(#[from] candle_core::Error),
    #[error("the engine does not start: {0}")]
    Engine(#[from] StartError),
    /// The engine that answers an evaluation's inputs does not take one.
    #[error("an input cannot be answered: {0}")]
    Submit(#[from] SubmitError),
    #[error(
        "the model's output is not finite: with this prompt values overflow in the forward pass; tune it again with a lower learning rate"
    )]
    NotFinite,
    #[error("the task's grammar cannot be used: {0}")]
    Grammar(#[from] GrammarError),
    #[error("the task's grammar allows no next token: {reason}")]
    NoTokenAllowed { reason: String },
    #[error("the engine failed while it answered the inputs; its log has the cause")]
    EngineFailed,
}

/// What a run is set by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    VirtualTokens,
    LearningRate,
    /// The part of the steps over which the learning rate rises.
    Warmup,
    WeightDecay,
    /// The largest norm of a gradient.
    Clip,
    /// The part of the inputs' words that is left out in training.
    WordDropout,
    /// On the values in training.
    Noise,
    BatchSize,
    /// Forward passes for one update.
    Accumulate,
    /// Steps between evaluations.
    EvalEvery,
    /// Units in a layer of P-tuning's network.
    EncoderHidden,
    Steps,
    Epochs,
    /// Folds of a cross-validation.
    Folds,
    /// The field of an input that is shortened.
    Truncate,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::VirtualTokens => "the number of virtual tokens",
            Self::LearningRate => "the learning rate",
            Self::Warmup => "the warm-up",
            Self::WeightDecay => "the weight decay",
            Self::Clip => "the largest norm of a gradient",
            Self::WordDropout => "the part of the words that is left out",
            Self::Noise => "the noise on the values",
            Self::BatchSize => "the batch size",
            Self::Accumulate => "the number of forward passes for one update",
            Self::EvalEvery => "the number of steps between evaluations",
            Self::EncoderHidden => "the number of units in the prompt encoder's layers",
            Self::Steps => "the number of steps",
            Self::Epochs => "the number of epochs",
            Self::Folds => "the number of folds",
            Self::Truncate => "the field to shorten",
        })
    }
}
