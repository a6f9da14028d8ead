//! Learns a prompt by differentiating the forward that serves, and measures it.
//!
//! [`plan`] checks what was asked for, [`job`] runs it; the rest are their parts, usable alone:
//!
//! - [`data`], [`room`]: JSON Lines to token ids, every fault listed; how long an example may be
//! - [`parameters`], [`encoder`]: what is learned in each way, and the prompt that it makes
//! - [`init`]: initial values
//! - [`forward`], [`loss`]: a batch through the model; the loss of a prompt and its gradient
//! - [`optim`], [`schedule`], [`order`]: AdamW, the learning rate and the examples of each step
//! - [`trainer`], [`sweep`]: the loop, and the search for its learning rate
//! - [`checkpoint`], [`output`], [`report`]: what is left on disk
//! - [`generate`], [`metrics`], [`evaluate`]: how good a prompt is, beside what a text prompt gives

pub mod checkpoint;
pub mod data;
pub mod encoder;
pub mod evaluate;
pub mod forward;
pub mod generate;
pub mod init;
pub mod job;
pub mod loss;
pub mod metrics;
pub mod optim;
pub mod order;
pub mod output;
pub mod parameters;
pub mod plan;
pub mod report;
pub mod room;
pub mod schedule;
pub mod sweep;
pub mod trainer;

use std::{io, path::PathBuf};

use crate::prompt::{format::Faults, template::TemplateError};

/// Why a prompt was not tuned. Whatever was in the output folder is still there.
#[derive(Debug, thiserror::Error)]
pub enum TuneError {
    #[error(transparent)]
    Data(#[from] data::DataError),
    #[error(transparent)]
    Init(#[from] init::InitError),
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::CheckpointError),
    #[error("--template: {0}")]
    Template(#[from] TemplateError),
    /// An option's value is out of range.
    #[error("{option} is {found}, expected {expected}")]
    Option { option: &'static str, found: String, expected: &'static str },
    #[error("--virtual-tokens is {found}, expected 1 to {limit}, which is what the model's context has room for")]
    VirtualTokens { found: usize, limit: usize },
    /// PEFT has no keys and values for such a model.
    #[error(
        "keys and values are those of {encoder} layers, as many as the model's encoder has, and its decoder has \
         {decoder}: --type prefix has no form for it; take --type prompt or p-tuning"
    )]
    DeeperDecoder { encoder: usize, decoder: usize },
    #[error(
        "the model {model} names no end-of-sequence token, so an answer could not end; add eos_token_id to its \
         config.json"
    )]
    NoEos { model: String },
    /// The output folder belongs to a running server.
    #[error(
        "{} holds versions that a server manages; give another --output, then `softserve push` it", output.display()
    )]
    Managed { output: PathBuf },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot draw {}: {reason}", path.display())]
    Curve { path: PathBuf, reason: String },
    /// The files that were written would be refused by `serve`.
    #[error("the tuned prompt cannot be served: {0}")]
    Unservable(#[from] Faults),
    #[error("the loss stopped being a number at step {step} with the learning rate {rate}; give a lower --lr")]
    Diverged { rate: f64, step: usize },
    #[error(
        "none of the learning rates {tried:?} lowered the held-out loss of {start:.3}; look at the data, or give --lr"
    )]
    NoRate { start: f64, tried: Vec<f64> },
    #[error(
        "the prompt is no better than its initial values (loss {loss:.3}, learning rate {rate}); look at the data, or \
         give another --lr or more --steps"
    )]
    NoGain { rate: f64, loss: f64 },
    #[error("interrupted; go on with the same options and --resume (the state is in {})", checkpoint.display())]
    Interrupted { checkpoint: PathBuf },
    #[error("interrupted while the learning rate was chosen; nothing was saved yet")]
    InterruptedSweep,
    #[error("the forward pass failed: {0}")]
    Tensor(#[from] candle_core::Error),
}
