//! Learned prompts that are computed ahead of their first request, when nobody waits.

use super::{Chunk, Scheduler, Step};
use crate::engine::{quota::Quota, request::SequenceId, sequence::Sequence};

/// Positions of a prompt that are warmed in one step while nothing else runs: a request that comes
/// in the meantime waits for no more than that.
const WARM_UP_TOKENS: usize = 256;

impl Scheduler {
    /// Lets a learned prompt, and nothing after it, be computed when there is time and room. It
    /// removes itself when that is done or cannot be; false if it never can.
    pub fn add_warm_up(&mut self, id: SequenceId, sequence: Sequence) -> bool {
        let possible = (1..=self.max_sequence()).contains(&sequence.tokens.len());
        if possible {
            self.warm_ups.push_back(id);
            self.sequences.insert(id, sequence);
        }
        possible
    }

    /// Drops the prompts that were to be warmed.
    pub fn cancel_warm_ups(&mut self) {
        self.stop_warming();
        for id in self.warm_ups.drain(..) {
            self.sequences.remove(&id);
        }
    }

    /// Adds some of a prompt to be warmed, if nobody waits.
    pub(super) fn warm_up(&mut self, quota: &Quota, step: &mut Step) {
        if !self.queue.is_empty() {
            return;
        }
        while self.warming.is_none() {
            let Some(id) = self.warm_ups.pop_front() else { return };
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            let is_new = sequence.namespace.is_some_and(|namespace| !self.cache.contains_prompt(namespace));
            let has_room = is_new && self.cache.has_room_for_prompt(sequence.tokens.len());
            if let Some(copy) = has_room.then(|| self.cache.join(sequence, 0)).flatten() {
                step.copies.extend(copy);
                self.warming = Some(id);
            } else if is_new && !step.chunks.is_empty() {
                // There may be room when those that run now are done.
                self.warm_ups.push_front(id);
                return;
            } else {
                self.sequences.remove(&id);
            }
        }
        let most = if step.chunks.is_empty() { WARM_UP_TOKENS } else { self.limits.fair_step_tokens };
        if let Some((id, sequence)) = self.warming.and_then(|id| Some((id, self.sequences.get(&id)?))) {
            let len = sequence.num_pending().min(quota.remaining()).min(most);
            if len > 0 {
                step.chunks.push(Chunk { id, start: sequence.num_computed, len, wanted: 0, encodes: false });
            }
        }
    }

    /// Takes the blocks of the prompt that is being warmed, if there is one.
    pub(super) fn stop_warming(&mut self) -> bool {
        let Some(id) = self.warming.take() else { return false };
        if let Some(sequence) = self.sequences.get_mut(&id) {
            self.cache.release(sequence);
            self.warm_ups.push_front(id);
        }
        true
    }
}
