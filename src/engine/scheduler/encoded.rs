//! The encoder's inputs of running sequences: which there are, and whose output is there.

use std::collections::{HashMap, HashSet};

use super::{Scheduler, Step};
use crate::engine::{encoder::InputKey, sequence::Sequence};

/// An encoder's input that running sequences have.
pub(super) struct RunningInput {
    pub positions: usize,
    /// Whether its output is there.
    pub encoded: bool,
}

impl Scheduler {
    /// The encoder's inputs whose output a running sequence needs again.
    pub fn encoded_inputs(&self) -> HashSet<InputKey> {
        self.encoder_inputs().into_iter().filter_map(|(key, input)| input.encoded.then_some(key)).collect()
    }

    /// The encoder's inputs of all running sequences, equal ones once.
    pub(super) fn encoder_inputs(&self) -> HashMap<InputKey, RunningInput> {
        let mut inputs = HashMap::new();
        for sequence in self.running.iter().filter_map(|id| self.sequences.get(id)) {
            if let Some(input) = &sequence.encoder {
                let (positions, encoded) = (input.tokens.len(), sequence.encoded);
                inputs.entry(input.key).or_insert(RunningInput { positions, encoded }).encoded |= encoded;
            }
        }
        inputs
    }

    /// What a step encoded is there for all running sequences that have the same input.
    pub(super) fn share_encoded(&mut self, step: &Step) {
        let key = |id| self.sequences.get(&id).and_then(Sequence::encoder_key);
        let encoded: HashSet<_> = step.chunks.iter().filter(|c| c.encodes).filter_map(|c| key(c.id)).collect();
        if encoded.is_empty() {
            return;
        }
        for id in &self.running {
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.encoded |= sequence.encoder_key().is_some_and(|key| encoded.contains(&key));
            }
        }
    }
}
