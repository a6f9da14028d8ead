//! What to compute next. Pure data: no clock, channel or tensor.
//!
//! There is no prefill phase and no decode phase. A sequence has tokens and a count of computed
//! ones, and every step lets the count catch up: a new request by a chunk of its input, a running
//! one by the token it just got.
//!
//! A step is made in order: running sequences get the blocks they need (whoever ranks last gives
//! way) and waiting ones join (`batch`), then each takes positions: those that wait for one token
//! only, then inputs (`fill`), then prompts to be warmed (`warm_up`). The rank is the priority, then
//! the tenant's counter ([`fairness`](super::fairness)), then age.

mod batch;
mod draft;
mod encoded;
mod fill;
mod warm_up;

use std::collections::{HashMap, VecDeque};

pub use super::cache::BlockCopy;
use super::{
    cache::Cache,
    config::EngineConfig,
    fairness::{INPUT_COST, Ledger, OUTPUT_COST, Rank},
    queue::Queue,
    request::{CacheNamespace, InputToken, SequenceId},
    sequence::Sequence,
};
use crate::kernels::layout::BLOCK_SIZE;

/// The configuration, and what was derived from it, from the model and from measurements at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub config: EngineConfig,
    /// Blocks in the cache.
    pub num_blocks: usize,
    /// Positions that each tenant's task may always take of a step that several share; see [`quota`](super::quota).
    pub fair_step_tokens: usize,
    /// Positions of encoders' inputs whose output is kept at once; 0 without an encoder.
    pub max_encoded: usize,
    /// The most tokens of a sequence that are guessed in a step.
    pub draft_tokens: usize,
}

/// One step's work: first the copies, in order, then for each sequence the positions to compute.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    pub copies: Vec<BlockCopy>,
    pub chunks: Vec<Chunk>,
}

/// Positions `start..start + len` of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    pub id: SequenceId,
    pub start: usize,
    pub len: usize,
    /// How many of its last positions have logits that are wanted: the last one's where the next token is to be chosen,
    /// those of several where continuations are scored.
    pub wanted: usize,
    /// The encoder's input is computed first, all of it.
    pub encodes: bool,
}

impl Chunk {
    /// Positions of a sequence's input that this chunk computes for the first time. What is computed
    /// anew after its sequence was preempted was charged before.
    fn cost(&self, sequence: &Sequence) -> usize {
        let end = (self.start + self.len).min(sequence.num_input);
        let encoder = if self.encodes && sequence.charged < sequence.num_input { sequence.num_encoder() } else { 0 };
        end.saturating_sub(self.start.max(sequence.charged)) + encoder
    }
}

/// Waiting and running sequences and the blocks they hold.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    cache: Cache,
    ledger: Ledger,
    sequences: HashMap<SequenceId, Sequence>,
    queue: Queue,
    running: Vec<SequenceId>,
    /// Learned prompts to compute when there is nothing better to do.
    warm_ups: VecDeque<SequenceId>,
    /// The one that has blocks.
    warming: Option<SequenceId>,
    /// Tenants that had sequences a short while ago, and until which step.
    recent: HashMap<u64, u64>,
    /// Counts steps.
    now: u64,
    /// Counts chunks.
    turns: u64,
    preemptions: u64,
}

impl Scheduler {
    /// Nothing waits, nothing runs, every block is free.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            cache: Cache::new(limits.num_blocks, limits.config.prefix_sharing),
            ledger: Ledger::default(),
            sequences: HashMap::new(),
            queue: Queue::default(),
            running: Vec::new(),
            warm_ups: VecDeque::new(),
            warming: None,
            recent: HashMap::new(),
            now: 0,
            turns: 0,
            preemptions: 0,
        }
    }

    /// The longest sequence that can run at all, alone.
    pub fn max_sequence(&self) -> usize {
        self.limits.num_blocks * BLOCK_SIZE
    }

    /// Lets a sequence wait for its turn. The caller keeps it within
    /// [`max_sequence`](Self::max_sequence), its new tokens included, and not empty.
    pub fn add(&mut self, id: SequenceId, sequence: Sequence) {
        self.ledger.enter(sequence.priority, sequence.tenant);
        self.queue.push_back(sequence.priority, sequence.tenant.key, id);
        self.sequences.insert(id, sequence);
    }

    /// A sequence that has been added and not removed.
    pub fn get(&self, id: SequenceId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// Takes a sequence out, waiting or running, and gives its blocks back. What it has computed
    /// stays known for as long as there is room.
    pub fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let mut sequence = self.take_out(id)?;
        self.cache.release(&mut sequence);
        Some(sequence)
    }

    /// Takes the sequences of a step out that could not be computed, and returns their names. Of
    /// what the step was to compute or copy, nothing is relied upon.
    pub fn abort(&mut self, step: &Step) -> Vec<SequenceId> {
        let copied = |s: &Sequence| step.copies.iter().any(|copy| s.blocks.contains(&copy.to));
        let mut failed: Vec<_> = step.chunks.iter().map(|chunk| chunk.id).collect();
        failed.extend(self.sequences.iter().filter(|(_, s)| copied(s)).map(|(&id, _)| id));
        failed.sort_unstable();
        failed.dedup();
        for &id in &failed {
            if let Some(mut sequence) = self.take_out(id) {
                self.cache.discard(&mut sequence);
            }
        }
        self.cache.end_copies();
        failed
    }

    /// Chooses the next step and gives its positions their blocks.
    pub fn schedule(&mut self) -> Step {
        self.now += 1;
        self.cache.end_copies();
        let mut step = Step::default();
        let mut quota = self.quota();
        // A sequence that just gave up its blocks must not come straight back for what is left of
        // them: it would only be preempted again.
        if self.extend_running() {
            self.admit(&quota, &mut step);
        }
        self.fill(&mut quota, &mut step);
        self.warm_up(&quota, &mut step);
        step
    }

    /// Records that a step was computed and which tokens each sampling chunk got: one, and one more for each guess that was
    /// right.
    pub fn commit(&mut self, step: &Step, tokens: &[(SequenceId, u32)]) {
        self.cache.end_copies();
        for chunk in &step.chunks {
            if let Some(sequence) = self.sequences.get_mut(&chunk.id) {
                sequence.num_computed = chunk.start + chunk.len;
                Self::end_draft(sequence, chunk, tokens);
                sequence.encoded |= chunk.encodes;
                self.cache.commit(sequence);
                if self.warming != Some(chunk.id) {
                    let cost = chunk.cost(sequence) as f64 * INPUT_COST;
                    sequence.charged = sequence.charged.max(chunk.start + chunk.len);
                    self.ledger.charge(sequence.priority, sequence.tenant, cost);
                }
            }
        }
        self.share_encoded(step);
        for (id, token) in tokens {
            if let Some(sequence) = self.sequences.get_mut(id) {
                // A guess that was right is there already.
                match &mut sequence.drafting {
                    Some(drafting) if drafting.right > 0 => drafting.right -= 1,
                    _ => sequence.tokens.push(InputToken::Vocab(*token)),
                }
                self.ledger.charge(sequence.priority, sequence.tenant, OUTPUT_COST);
            }
        }
        if let Some(id) = self.warming.filter(|id| self.sequences.get(id).is_none_or(|s| s.num_pending() == 0)) {
            self.remove(id);
        }
    }

    /// Every sequence that waits or runs.
    pub fn ids(&self) -> Vec<SequenceId> {
        self.running.iter().copied().chain(self.queue.iter()).collect()
    }

    /// Whether nothing is left to do.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    pub fn num_waiting(&self) -> usize {
        self.queue.len()
    }

    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// The blocks, and what is known of them.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The learned prompts that came into the cache as a whole (true) or are so no longer, since
    /// the last call.
    pub fn take_prompt_changes(&mut self) -> Vec<(CacheNamespace, bool)> {
        self.cache.take_prompt_changes()
    }

    /// How often a running sequence was preempted.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    fn rank(&self, sequence: &Sequence) -> Rank {
        self.ledger.rank(sequence.priority, sequence.tenant.key)
    }

    fn take_out(&mut self, id: SequenceId) -> Option<Sequence> {
        let sequence = self.sequences.remove(&id)?;
        if self.warming == Some(id) {
            self.warming = None;
            return Some(sequence);
        }
        let (priority, tenant) = (sequence.priority, sequence.tenant.key);
        let running = self.running.len();
        self.running.retain(|&r| r != id);
        let was_live = self.running.len() < running || self.queue.remove(priority, tenant, id);
        if was_live {
            self.ledger.leave(priority, tenant);
            self.linger(tenant);
        } else {
            self.warm_ups.retain(|&w| w != id);
        }
        Some(sequence)
    }
}

#[cfg(test)]
mod tests;
