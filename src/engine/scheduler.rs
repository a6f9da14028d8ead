//! What to compute next. Pure data: no clock, channel or tensor.
//!
//! There is no prefill phase and no decode phase. A sequence has tokens and a count of computed
//! ones, and every step lets the count catch up: a new request by a chunk of its input, a running
//! one by the token it just got.

use std::collections::{HashMap, VecDeque};

use super::{
    block_manager::BlockManager,
    request::InputToken,
    sequence::{Sequence, SequenceId},
};
use crate::kernels::kv_cache::BLOCK_SIZE;

/// Bounds of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that run at once.
    pub max_batch: usize,
    /// Positions computed in one step.
    pub max_step_tokens: usize,
    /// Blocks in the cache.
    pub num_blocks: usize,
}

/// One step's work: for each sequence, the positions to compute.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    pub chunks: Vec<Chunk>,
}

/// Positions `start..start + len` of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    pub id: SequenceId,
    pub start: usize,
    pub len: usize,
    /// The chunk ends at the sequence's last token, so the next one is to be chosen.
    pub samples: bool,
}

/// Waiting and running sequences and the blocks they hold.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    blocks: BlockManager,
    sequences: HashMap<SequenceId, Sequence>,
    waiting: VecDeque<SequenceId>,
    /// Oldest first: the youngest gives way when blocks run out.
    running: Vec<SequenceId>,
    preemptions: u64,
}

impl Scheduler {
    /// Nothing waits, nothing runs, every block is free.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            blocks: BlockManager::new(limits.num_blocks),
            sequences: HashMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            preemptions: 0,
        }
    }

    /// The longest sequence that can run at all, alone.
    pub fn max_sequence(&self) -> usize {
        self.limits.num_blocks * BLOCK_SIZE
    }

    /// Puts a sequence at the end of the queue. The caller keeps it within
    /// [`max_sequence`](Self::max_sequence), its new tokens included.
    pub fn add(&mut self, id: SequenceId, sequence: Sequence) {
        self.waiting.push_back(id);
        self.sequences.insert(id, sequence);
    }

    /// A sequence that has been added and not removed.
    pub fn get(&self, id: SequenceId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// Takes a sequence out, waiting or running, and frees its blocks.
    pub fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(&id)?;
        self.blocks.release(&mut sequence.blocks);
        self.waiting.retain(|&w| w != id);
        self.running.retain(|&r| r != id);
        Some(sequence)
    }

    /// Chooses the next step and gives its positions their blocks. Running sequences go first,
    /// oldest first; when blocks run out the youngest is put back in the queue, to be computed
    /// anew from its own prompt and tokens. Then waiting ones join, in order.
    pub fn schedule(&mut self) -> Step {
        let mut step = Step::default();
        let mut budget = self.limits.max_step_tokens;
        let mut next = 0;
        let preemptions = self.preemptions;
        while next < self.running.len() && budget > 0 {
            let id = self.running[next];
            match self.chunk(id, budget) {
                Some(chunk) => {
                    budget -= chunk.len;
                    step.chunks.push(chunk);
                    next += 1;
                }
                // The youngest may be this very one; then the loop ends.
                None => self.preempt_youngest(),
            }
        }
        // A sequence that just gave up its blocks must not come straight back for what is left of
        // them: it would only be put off again.
        let may_join = self.preemptions == preemptions;
        while may_join && budget > 0 && self.running.len() < self.limits.max_batch {
            let Some(&id) = self.waiting.front() else { break };
            let Some(chunk) = self.chunk(id, budget) else { break };
            self.waiting.pop_front();
            self.running.push(id);
            budget -= chunk.len;
            step.chunks.push(chunk);
        }
        step
    }

    /// Records that a step was computed and which token each sampling chunk got.
    pub fn commit(&mut self, step: &Step, tokens: &[(SequenceId, u32)]) {
        for chunk in &step.chunks {
            if let Some(sequence) = self.sequences.get_mut(&chunk.id) {
                sequence.num_computed = chunk.start + chunk.len;
            }
        }
        for (id, token) in tokens {
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.tokens.push(InputToken::Vocab(*token));
            }
        }
    }

    /// Every sequence, waiting or running.
    pub fn ids(&self) -> Vec<SequenceId> {
        self.running.iter().chain(&self.waiting).copied().collect()
    }

    /// Whether nothing is left to do.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Blocks held by sequences.
    pub fn blocks_used(&self) -> usize {
        self.blocks.total() - self.blocks.num_free()
    }

    /// How often a sequence was put back for want of blocks.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// The next positions of a sequence, with blocks for them; `None` if there are too few.
    fn chunk(&mut self, id: SequenceId, budget: usize) -> Option<Chunk> {
        let sequence = self.sequences.get_mut(&id)?;
        let start = sequence.num_computed;
        let len = sequence.num_pending().min(budget);
        if !self.blocks.grow(&mut sequence.blocks, start + len) {
            return None;
        }
        Some(Chunk { id, start, len, samples: start + len == sequence.tokens.len() })
    }

    fn preempt_youngest(&mut self) {
        let Some(id) = self.running.pop() else { return };
        if let Some(sequence) = self.sequences.get_mut(&id) {
            self.blocks.release(&mut sequence.blocks);
            sequence.num_computed = 0;
        }
        self.waiting.push_front(id);
        self.preemptions += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    fn input(n: usize) -> Sequence {
        Sequence::new(vec![InputToken::Vocab(0); n])
    }

    #[test]
    fn a_long_input_is_computed_in_chunks_beside_a_running_one() {
        let mut s = Scheduler::new(Limits { max_batch: 4, max_step_tokens: 10, num_blocks: 8 });
        s.add(SequenceId(1), input(3));
        let step = s.schedule();
        assert_eq!(step.chunks, [Chunk { id: SequenceId(1), start: 0, len: 3, samples: true }]);
        s.commit(&step, &[(SequenceId(1), 7)]);
        s.add(SequenceId(2), input(12));
        let step = s.schedule();
        assert_eq!(step.chunks[0], Chunk { id: SequenceId(1), start: 3, len: 1, samples: true });
        assert_eq!(step.chunks[1], Chunk { id: SequenceId(2), start: 0, len: 9, samples: false });
        s.commit(&step, &[(SequenceId(1), 8)]);
        assert_eq!(s.schedule().chunks[1], Chunk { id: SequenceId(2), start: 9, len: 3, samples: true });
    }

    #[test]
    fn the_youngest_gives_way_when_blocks_run_out_and_comes_back() {
        let mut s = Scheduler::new(Limits { max_batch: 4, max_step_tokens: 256, num_blocks: 3 });
        s.add(SequenceId(1), input(32));
        s.add(SequenceId(2), input(40));
        let step = s.schedule();
        assert_eq!(step.chunks.len(), 2);
        s.commit(&step, &[(SequenceId(1), 0), (SequenceId(2), 0)]);
        let step = s.schedule();
        assert_eq!(step.chunks, [Chunk { id: SequenceId(1), start: 32, len: 1, samples: true }]);
        assert_eq!((s.num_waiting(), s.preemptions()), (1, 1));
        s.commit(&step, &[(SequenceId(1), 0)]);
        s.remove(SequenceId(1));
        // All 41 tokens anew: the one it was given before is kept.
        assert_eq!(s.schedule().chunks, [Chunk { id: SequenceId(2), start: 0, len: 41, samples: true }]);
    }

    /// What happens to one request in the simulation below.
    #[derive(Debug, Clone)]
    struct Arrival {
        at: usize,
        input: usize,
        new: usize,
        cancel_after: Option<usize>,
    }

    fn arrivals() -> impl Strategy<Value = Vec<Arrival>> {
        let one = (0usize..40, 1usize..90, 1usize..40, prop::option::weighted(0.2, 0usize..30))
            .prop_map(|(at, input, new, cancel_after)| Arrival { at, input, new, cancel_after });
        prop::collection::vec(one, 1..24)
    }

    proptest! {
        /// Random arrivals, lengths and cancels over a small cache: every request ends, in bounded
        /// time, with exactly its tokens; no block is leaked or in two tables; steps keep their bounds.
        #[test]
        fn every_request_ends_and_no_block_is_lost_or_shared(
            arrivals in arrivals(),
            max_batch in 1usize..6,
            max_step_tokens in 1usize..80,
            spare_blocks in 0usize..6,
        ) {
            // The largest possible request, 90 + 40 positions, just fits.
            let limits = Limits { max_batch, max_step_tokens, num_blocks: 5 + spare_blocks };
            let mut s = Scheduler::new(limits);
            let mut given: BTreeMap<SequenceId, usize> = BTreeMap::new();
            let work: usize = arrivals.iter().map(|a| a.input + a.new).sum();
            let mut clock = 0;
            let mut ended = HashSet::new();
            while ended.len() < arrivals.len() {
                for (i, a) in arrivals.iter().enumerate().filter(|(_, a)| a.at == clock) {
                    s.add(SequenceId(i as u64), input(a.input));
                }
                for (i, a) in arrivals.iter().enumerate() {
                    let id = SequenceId(i as u64);
                    if a.cancel_after.is_some_and(|n| a.at + n == clock) && s.remove(id).is_some() {
                        ended.insert(id);
                    }
                }
                let step = s.schedule();
                prop_assert!(step.chunks.iter().map(|c| c.len).sum::<usize>() <= max_step_tokens);
                prop_assert!(step.chunks.len() <= max_batch);
                prop_assert_eq!(step.chunks.iter().map(|c| c.id).collect::<HashSet<_>>().len(), step.chunks.len());
                let tables: Vec<_> = s.sequences.values().flat_map(|q| &q.blocks).collect();
                prop_assert_eq!(tables.iter().collect::<HashSet<_>>().len(), tables.len());
                prop_assert_eq!(tables.len(), s.blocks_used());
                for c in &step.chunks {
                    let q = s.get(c.id).unwrap();
                    prop_assert_eq!(c.start, q.num_computed);
                    prop_assert!(c.len > 0 && c.start + c.len <= q.blocks.len() * BLOCK_SIZE);
                    prop_assert_eq!(c.samples, c.start + c.len == q.tokens.len());
                }
                let tokens: Vec<_> = step.chunks.iter().filter(|c| c.samples).map(|c| (c.id, 0)).collect();
                s.commit(&step, &tokens);
                for (id, _) in tokens {
                    let n = given.entry(id).or_default();
                    *n += 1;
                    let a = &arrivals[id.0 as usize];
                    if *n == a.new {
                        let done = s.remove(id).unwrap();
                        prop_assert_eq!(done.tokens.len(), a.input + a.new);
                        ended.insert(id);
                    }
                }
                clock += 1;
                // Recomputing after preemption costs steps, but never without end.
                prop_assert!(clock < 100 + work * (arrivals.len() + 1), "starved");
            }
            prop_assert!(s.is_empty());
            prop_assert_eq!(s.blocks_used(), 0);
        }
    }
}
