//! Which words learned prompts are nearest to: compared on the engine's thread, since only it touches the device, a
//! chunk of the vocabulary between two steps.

use std::collections::VecDeque;

use candle_core::Result;
use tokio::sync::oneshot;

use super::admission::Slot;
use crate::model::{
    Model,
    neighbours::{Nearest, Neighbours},
};

/// Comparisons that may wait or run at once; more are refused.
pub(super) const MAX_SEARCHES: usize = 8;

/// A comparison that was asked for.
#[derive(Debug)]
pub(super) struct Search {
    pub neighbours: Neighbours,
    /// Closed when nobody waits any more.
    pub answer: oneshot::Sender<Result<Nearest>>,
    /// Held until it is answered or given up.
    pub _slot: Slot,
}

/// The comparisons that wait, the first of which is under way.
#[derive(Debug, Default)]
pub(super) struct Searches(VecDeque<Search>);

impl Searches {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn push(&mut self, search: Search) {
        self.0.push_back(search);
    }

    /// Gives all of them up; whoever waits sees that no answer comes.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Compares one chunk for the first that somebody still waits for, and answers it if that was the last.
    pub fn run_chunk(&mut self, model: &Model) {
        self.0.retain(|search| !search.answer.is_closed());
        let Some(search) = self.0.front_mut() else { return };
        if let Some(outcome) = search.neighbours.compare_chunk(model).transpose()
            && let Some(Search { answer, .. }) = self.0.pop_front()
        {
            // Whoever waited may just have gone.
            let _ = answer.send(outcome);
        }
    }
}
