//! Memory that choosing a token needs, kept by each thread.

use std::cell::RefCell;

/// Memory for rows of the vocabulary's length, kept from token to token.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The logits after penalties and mask.
    pub(super) adjusted: Vec<f32>,
    /// The largest value of each chunk.
    pub(super) maxima: Vec<f32>,
    pub(super) weights: Vec<f32>,
    /// The sum of each chunk's weights.
    pub(super) sums: Vec<f32>,
}

impl Scratch {
    /// Calls `f` with this thread's own.
    pub fn with<R>(f: impl FnOnce(&mut Self) -> R) -> R {
        thread_local! {
            static SCRATCH: RefCell<Scratch> = RefCell::default();
        }
        SCRATCH.with_borrow_mut(f)
    }
}
