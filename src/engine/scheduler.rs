//! What to compute next. Pure data: no clock, channel or tensor.
//!
//! There is no prefill phase and no decode phase. A sequence has tokens and a count of computed
//! ones, and every step lets the count catch up: a new request by a chunk of its input, a running
//! one by the token it just got.
//!
//! A step is made in order: running sequences get the blocks they need (whoever ranks last gives
//! way), waiting ones join, then each takes positions: those that wait for one token only, then
//! inputs, then prompts to be warmed. The rank is the priority, then the account's counter
//! ([`fairness`](super::fairness)), then age.

use std::collections::{HashMap, HashSet, VecDeque};

pub use super::cache::BlockCopy;
use super::{
    cache::Cache,
    encoder::InputKey,
    fairness::{INPUT_COST, Ledger, OUTPUT_COST},
    queue::Queue,
    quota::Quota,
    request::{CacheRoot, InputToken},
    sequence::{Sequence, SequenceId},
};
use crate::kernels::kv_cache::BLOCK_SIZE;

/// A waiting request takes the place of a running one whose account has this many times its own
/// account's places.
const FAR_MORE_PLACES: f64 = 4.0;

/// For this many steps after an account's last sequence, one that fills the batch keeps to what it
/// may take beside others: whoever comes back soon does not find a long step under way.
const LINGER: u64 = 256;

/// Positions of a prompt that are warmed in one step while nothing else runs: a request that comes
/// in the meantime waits for no more than that.
const WARM_UP_TOKENS: usize = 256;

/// Bounds of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that run at once.
    pub max_batch: usize,
    /// Positions computed in one step.
    pub max_step_tokens: usize,
    /// Positions of inputs computed in a step in which other sequences get their next token.
    pub max_prefill_tokens: usize,
    /// Positions that each account may always take of a step that several share; see [`Quota`].
    pub fair_step_tokens: usize,
    /// Blocks in the cache.
    pub num_blocks: usize,
    /// Positions of encoders' inputs whose output is kept at once; 0 without an encoder.
    pub max_encoded: usize,
    /// Whether sequences of one root share what is equal.
    pub prefix_sharing: bool,
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
    /// The chunk ends at the sequence's last token, so the next one is to be chosen.
    pub samples: bool,
    /// The encoder's input is computed first, all of it.
    pub encodes: bool,
}

/// An encoder's input that running sequences have.
struct RunningInput {
    positions: usize,
    /// Whether its output is there.
    encoded: bool,
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
    /// Accounts that had sequences a short while ago, and until which step.
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
            cache: Cache::new(limits.num_blocks, limits.prefix_sharing),
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
        self.ledger.enter(sequence.account);
        self.queue.push_back(sequence.priority, sequence.account.key, id);
        self.sequences.insert(id, sequence);
    }

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
        // them: it would only be put off again.
        if self.extend_running() {
            self.admit(&quota, &mut step);
        }
        self.fill(&mut quota, &mut step);
        self.warm_up(&quota, &mut step);
        step
    }

    /// Records that a step was computed and which token each sampling chunk got.
    pub fn commit(&mut self, step: &Step, tokens: &[(SequenceId, u32)]) {
        self.cache.end_copies();
        for chunk in &step.chunks {
            if let Some(sequence) = self.sequences.get_mut(&chunk.id) {
                sequence.num_computed = chunk.start + chunk.len;
                sequence.encoded |= chunk.encodes;
                self.cache.learn(sequence);
            }
        }
        self.share_encoded(step);
        for (id, token) in tokens {
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.tokens.push(InputToken::Vocab(*token));
                self.ledger.charge(sequence.account.key, OUTPUT_COST);
            }
        }
        if let Some(id) = self.warming.filter(|id| self.sequences.get(id).is_none_or(|s| s.num_pending() == 0)) {
            self.remove(id);
        }
    }

    /// The encoder's inputs whose output a running sequence needs again.
    pub fn encoded_inputs(&self) -> HashSet<InputKey> {
        self.encoder_inputs().into_iter().filter_map(|(key, input)| input.encoded.then_some(key)).collect()
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
    pub fn take_prompt_changes(&mut self) -> Vec<(CacheRoot, bool)> {
        self.cache.take_prompt_changes()
    }

    /// How often a running sequence was put back in the queue.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// What each account may take of the next step.
    fn quota(&mut self) -> Quota {
        // By account: positions wanted, and sequences.
        let mut wanted: HashMap<u64, (usize, usize)> = HashMap::new();
        for sequence in self.running.iter().copied().chain(self.queue.iter()).filter_map(|id| self.sequences.get(&id)) {
            // Of what a waiting one will find, its prompt is known at once.
            let is_found = sequence.root.is_some_and(|root| self.cache.contains_prompt(root));
            let found = if is_found { sequence.num_virtual.saturating_sub(sequence.num_computed) } else { 0 };
            let (positions, sequences) = wanted.entry(sequence.account.key).or_default();
            *positions += sequence.work() - found;
            *sequences += 1;
        }
        let tokens = self.limits.max_step_tokens;
        let busy = self.ledger.busy();
        let mut accounts: Vec<_> =
            busy.map(|(key, counter)| (key, counter, wanted.get(&key).map_or(0, |w| w.0.min(tokens)))).collect();
        self.recent.retain(|_, until| *until > self.now);
        // Only an account that would fill the batch is held back: others share a step as it comes.
        if wanted.values().all(|w| 2 * w.1 < self.limits.max_batch) {
            accounts.clear();
        } else if let Some(&absent) = self.recent.keys().find(|key| !wanted.contains_key(key)) {
            accounts.push((absent, f64::NEG_INFINITY, 0));
        }
        Quota::new(tokens, self.limits.fair_step_tokens, &accounts)
    }

    /// Gives every running sequence blocks for all its tokens. When there are too few, whoever
    /// ranks last goes back to the queue; false if that happened.
    fn extend_running(&mut self) -> bool {
        let before = self.preemptions;
        loop {
            let running = self.running.iter().filter_map(|id| self.sequences.get(id));
            if running.map(Cache::missing).sum::<usize>() <= self.cache.num_available() {
                break;
            }
            if !self.stop_warming() {
                let Some(last) = self.last_of(|_| true) else { break };
                self.preempt(last);
            }
        }
        for id in &self.running {
            if let Some(sequence) = self.sequences.get_mut(id) {
                self.cache.grow(sequence);
            }
        }
        self.preemptions == before
    }

    /// The encoder's inputs of all running sequences, equal ones once.
    fn encoder_inputs(&self) -> HashMap<InputKey, RunningInput> {
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
    fn share_encoded(&mut self, step: &Step) {
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

    /// Lets waiting sequences join while there are places, blocks and positions for them.
    fn admit(&mut self, quota: &Quota, step: &mut Step) {
        // What each account will take of the step, by what it wants and may.
        let mut planned: HashMap<u64, usize> = HashMap::new();
        for sequence in self.running.iter().filter_map(|id| self.sequences.get(id)) {
            *planned.entry(sequence.account.key).or_default() += sequence.work();
        }
        planned.iter_mut().for_each(|(&account, tokens)| *tokens = (*tokens).min(quota.left(account)));
        let running = self.running.iter().filter_map(|id| self.sequences.get(id));
        let most = match running.filter(|s| s.work() == 1).count() {
            0 => self.limits.max_step_tokens,
            tokens => self.limits.max_step_tokens.min(tokens + self.limits.max_prefill_tokens),
        };
        let mut served = HashSet::new();
        while planned.values().sum::<usize>() < most {
            let rank = |account| (!served.contains(&account)).then(|| self.ledger.counter(account));
            let Some(id) = self.queue.next(rank) else { break };
            let Some(account) = self.sequences.get(&id).map(|s| s.account.key) else { break };
            let tokens = planned.entry(account).or_default();
            if *tokens >= quota.left(account) {
                served.insert(account);
                continue;
            }
            if !self.join(id, step) {
                break;
            }
            let work = self.sequences.get(&id).map_or(0, Sequence::work);
            *tokens = (*tokens + work).min(quota.left(account));
        }
    }

    /// Moves a waiting sequence to the running ones, in place of others if it must and may.
    fn join(&mut self, id: SequenceId, step: &mut Step) -> bool {
        loop {
            // Each running sequence may soon want one more block.
            let spare = self.running.len().min(self.limits.num_blocks / 16);
            let inputs = self.encoder_inputs();
            let encoded: usize = inputs.values().map(|input| input.positions).sum();
            let Some(sequence) = self.sequences.get_mut(&id) else { return false };
            let same = sequence.encoder_key().and_then(|key| inputs.get(&key));
            let more = if same.is_some() { 0 } else { sequence.num_encoder() };
            let has_place = self.running.len() < self.limits.max_batch && encoded + more <= self.limits.max_encoded;
            if has_place && let Some(copy) = self.cache.join(sequence, spare) {
                step.copies.extend(copy);
                sequence.joined = self.now;
                sequence.encoded = same.is_some_and(|input| input.encoded);
                let (priority, account) = (sequence.priority, sequence.account.key);
                if sequence.cached_tokens.is_none() {
                    let cached = sequence.num_computed.min(sequence.num_input);
                    sequence.cached_tokens = Some(cached);
                    let input = sequence.num_input - cached + more;
                    self.ledger.charge(account, input as f64 * INPUT_COST);
                }
                self.queue.remove(priority, account, id);
                self.running.push(id);
                return true;
            }
            if has_place && self.stop_warming() {
                continue;
            }
            let Some(victim) = self.victim_for(id) else { return false };
            self.preempt(victim);
        }
    }

    /// A running sequence that is to give way to a waiting one: of a lower priority, or of an
    /// account that has far more than its share of places.
    fn victim_for(&self, id: SequenceId) -> Option<SequenceId> {
        let waiting = self.sequences.get(&id)?;
        // Those that joined in this very step may have copies to come.
        let settled = |s: &Sequence| s.joined < self.now;
        if let Some(last) = self.last_of(|s| settled(s) && s.priority > waiting.priority) {
            return Some(last);
        }
        let mut places: HashMap<u64, f64> = HashMap::new();
        for sequence in self.running.iter().filter_map(|id| self.sequences.get(id)) {
            *places.entry(sequence.account.key).or_default() += 1.0;
        }
        let own = waiting.account.key;
        let share = |account: u64, places: f64| places / self.ledger.weight(account);
        let after = share(own, places.get(&own).copied().unwrap_or(0.0) + 1.0);
        let others = places.iter().filter(|(account, _)| **account != own);
        let (&most, &count) =
            others.max_by(|a, b| share(*a.0, *a.1).total_cmp(&share(*b.0, *b.1)).then(a.0.cmp(b.0)))?;
        if share(most, count) < after * FAR_MORE_PLACES {
            return None;
        }
        self.last_of(|s| settled(s) && s.account.key == most && s.priority >= waiting.priority)
    }

    /// Of the running sequences that `may` allows, the one that ranks last: lowest priority, then
    /// the account with the most service, then the youngest.
    fn last_of(&self, may: impl Fn(&Sequence) -> bool) -> Option<SequenceId> {
        let candidates = self.running.iter().filter_map(|&id| Some((id, self.sequences.get(&id)?)));
        let ranked =
            candidates.filter(|(_, s)| may(s)).map(|(id, s)| (s.priority, self.ledger.counter(s.account.key), id));
        ranked.max_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2))).map(|(_, _, id)| id)
    }

    /// Puts a running sequence back in the queue, to be computed anew from its own prompt and
    /// tokens, or found in the cache if it is still there by then.
    fn preempt(&mut self, id: SequenceId) {
        self.running.retain(|&running| running != id);
        if let Some(sequence) = self.sequences.get_mut(&id) {
            self.cache.release(sequence);
            sequence.encoded = false;
            self.queue.push_front(sequence.priority, sequence.account.key, id);
            self.preemptions += 1;
        }
    }

    /// Gives running sequences their positions of this step.
    fn fill(&mut self, quota: &mut Quota, step: &mut Step) {
        let ranked = self.running.iter().filter_map(|&id| {
            let s = self.sequences.get(&id)?;
            let is_input = s.work() > 1;
            // Where not all can have their token, they take turns; inputs are finished one by one.
            let turn = if is_input { 0 } else { s.last_turn };
            Some((is_input, s.priority, self.ledger.counter(s.account.key), turn, id))
        });
        let mut order: Vec<_> = ranked.collect();
        order.sort_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)).then(a.2.total_cmp(&b.2)).then((a.3, a.4).cmp(&(b.3, b.4))));
        let mut inputs_left = self.limits.max_step_tokens;
        let mut encoding = HashSet::new();
        for (is_input, .., id) in order {
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            let (key, account) = (sequence.encoder_key(), sequence.account.key);
            // One that is computed in this step for another sequence is there before the decoder runs.
            let unencoded = if key.is_some_and(|key| encoding.contains(&key)) { 0 } else { sequence.num_unencoded() };
            let wanted = if is_input { (unencoded + sequence.num_pending()).min(inputs_left) } else { 1 };
            // An encoder's input cannot be cut: the first of a step is taken in any case, others if
            // they fit.
            if unencoded > 0 && !encoding.is_empty() && unencoded >= wanted.min(quota.left(account)) {
                continue;
            }
            let taken = quota.take(account, wanted);
            if is_input {
                inputs_left -= taken;
            } else if taken > 0 {
                inputs_left = self.limits.max_prefill_tokens;
            }
            if taken > 0 {
                let len = taken.saturating_sub(unencoded).max(1);
                encoding.extend(key.filter(|_| unencoded > 0));
                let start = sequence.num_computed;
                self.turns += 1;
                sequence.last_turn = self.turns;
                let samples = start + len == sequence.tokens.len();
                step.chunks.push(Chunk { id, start, len, samples, encodes: unencoded > 0 });
            }
        }
    }

    /// Adds some of a prompt to be warmed, if nobody waits.
    fn warm_up(&mut self, quota: &Quota, step: &mut Step) {
        if !self.queue.is_empty() {
            return;
        }
        while self.warming.is_none() {
            let Some(id) = self.warm_ups.pop_front() else { return };
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            let is_new = sequence.root.is_some_and(|root| !self.cache.contains_prompt(root));
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
                step.chunks.push(Chunk { id, start: sequence.num_computed, len, samples: false, encodes: false });
            }
        }
    }

    /// Takes the blocks of the prompt that is being warmed, if there is one.
    fn stop_warming(&mut self) -> bool {
        let Some(id) = self.warming.take() else { return false };
        if let Some(sequence) = self.sequences.get_mut(&id) {
            self.cache.release(sequence);
            self.warm_ups.push_front(id);
        }
        true
    }

    fn take_out(&mut self, id: SequenceId) -> Option<Sequence> {
        let sequence = self.sequences.remove(&id)?;
        if self.warming == Some(id) {
            self.warming = None;
            return Some(sequence);
        }
        let account = sequence.account.key;
        let running = self.running.len();
        self.running.retain(|&r| r != id);
        let was_live = self.running.len() < running || self.queue.remove(sequence.priority, account, id);
        if was_live {
            self.ledger.leave(account);
            self.recent.insert(account, self.now + LINGER);
        } else {
            self.warm_ups.retain(|&w| w != id);
        }
        Some(sequence)
    }
}

#[cfg(test)]
mod latency;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
