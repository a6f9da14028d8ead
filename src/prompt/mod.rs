//! What a task is: its name, its learned prompt, its template and labels.
//!
//! Values only: nothing here locks, and only [`files`] reads or writes them on disk. Everything a
//! request needs from its task hangs off one immutable [`Version`](task::Version).

pub mod calibration;
pub mod chat;
pub mod encode;
pub mod files;
#[cfg(test)]
pub(crate) mod fixtures;
pub mod format;
pub mod grammar;
pub mod label_scores;
pub mod labels;
mod layout;
pub mod learned;
pub mod peft;
pub mod peft_type;
pub mod soft;
pub mod spec;
pub mod task;
pub mod template;
mod weights;

pub use learned::LearnedPrompt;
pub use peft_type::PeftType;
pub use task::{Digest, TaskName, Version};
