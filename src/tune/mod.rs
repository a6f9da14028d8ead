//! Learns a prompt by differentiating the forward that serves, and measures it.
//!
//! [`plan`] checks the [`options`] of a run and reads its data, [`job`] runs it; the rest are their parts, usable alone. The data are
//! [`examples`](crate::examples); how good answers are is measured by [`quality`](crate::quality):
//!
//! - [`learned_tensor`], [`parameters`], [`prompt_encoder`]: what is learned in each way, and the prompt that it makes
//! - [`init`]: initial values
//! - [`forward`], [`loss`]: a batch through the model, with gradients; the loss of a prompt and its gradient
//! - [`optim`], [`schedule`], [`order`]: AdamW, the learning rate and the examples of each step
//! - [`variation`]: what differs from pass to pass, so that few examples are not learnt by heart
//! - [`trainer`], [`sweep`]: the loop, and the search for its learning rate
//! - [`split`], [`folds`], [`cross_validation`]: how good a run is, where there are too few examples to hold some out
//! - [`checkpoint`], [`output`], [`report`]: what is left on disk
//! - [`inference`], [`evaluate`]: what the engine answers with a prompt and how good that is,
//!   beside what an instruction in words gives, and examples in the context ([`in_context`])
//! - [`evidence`], [`calibrate`], [`held_out_calibration`]: how likely the engine finds each label, how far that can be
//!   trusted, and the calibration that a run stores
//! - [`TuneError`]: what went wrong, as facts

pub mod calibrate;
pub mod checkpoint;
pub mod cross_validation;
mod error;
pub mod evaluate;
pub mod evidence;
pub mod folds;
pub mod forward;
pub mod held_out_calibration;
pub mod in_context;
pub mod inference;
pub mod init;
pub mod job;
pub mod learned_tensor;
pub mod loss;
pub mod optim;
pub mod options;
pub mod order;
pub mod output;
pub mod parameters;
pub mod plan;
pub mod prompt_encoder;
pub mod report;
pub mod schedule;
pub mod split;
pub mod sweep;
pub mod trainer;
pub mod variation;

pub use error::{Setting, TuneError};
