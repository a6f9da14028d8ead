//! Who runs: sequences join the batch while there are places, blocks and positions for them, and
//! whoever ranks last gives way when there are too few.

use std::collections::{HashMap, HashSet};

use super::{Scheduler, Step};
use crate::engine::{
    cache::Cache,
    fairness::INPUT_COST,
    quota::Quota,
    sequence::{Sequence, SequenceId},
};

/// A waiting request takes the place of a running one whose account has this many times its own
/// account's places.
const FAR_MORE_PLACES: f64 = 4.0;

impl Scheduler {
    /// Gives every running sequence blocks for all its tokens. When there are too few, whoever
    /// ranks last goes back to the queue; false if that happened.
    pub(super) fn extend_running(&mut self) -> bool {
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

    /// Lets waiting sequences join while there are places, blocks and positions for them.
    pub(super) fn admit(&mut self, quota: &Quota, step: &mut Step) {
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
}
