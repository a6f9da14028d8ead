//! Who runs: sequences join the batch while there are places, blocks and positions for them, and
//! whoever ranks last gives way when there are too few.

use std::collections::{HashMap, HashSet};

use super::{Scheduler, Step};
use crate::engine::{
    cache::Cache,
    fairness::{self, INPUT_COST, Rank},
    quota::Quota,
    request::SequenceId,
    sequence::Sequence,
};

/// A waiting request takes the place of a running one whose tenant has this many times its own
/// tenant's places.
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
        let running = self.running.iter().filter_map(|id| self.sequences.get(id));
        let most = match running.filter(|s| s.work() == 1).count() {
            0 => self.limits.config.max_step_tokens,
            tokens => self.limits.config.max_step_tokens.min(tokens + self.limits.config.max_prefill_tokens),
        };
        // What those that join now will have had after it, so that tenants join in turn.
        let mut joined: HashMap<(i32, u64), f64> = HashMap::new();
        let mut joined_of_owner: HashMap<(i32, u64), f64> = HashMap::new();
        let mut served = HashSet::new();
        loop {
            let next = self.queue.next(|priority, tenant| {
                let more = |joined: &HashMap<_, f64>, key| joined.get(&(priority, key)).copied().unwrap_or(0.0);
                let rank = self.ledger.rank(priority, tenant);
                let owner = rank.owner + self.ledger.owner(priority, tenant).map_or(0.0, |o| more(&joined_of_owner, o));
                let counter = rank.counter + more(&joined, tenant);
                (!served.contains(&tenant)).then_some(Rank { priority, owner, counter })
            });
            let Some((id, sequence)) = next.and_then(|id| Some((id, self.sequences.get(&id)?))) else { break };
            let (priority, tenant) = (sequence.priority, sequence.tenant);
            let planned = self.planned_before(sequence, quota);
            if planned.values().sum::<usize>() >= most {
                break;
            }
            if planned.get(&tenant.key).is_some_and(|tokens| *tokens >= quota.left(tenant.key)) {
                served.insert(tenant.key);
                continue;
            }
            if !self.join(id, step) {
                break;
            }
            let work = self.sequences.get(&id).map_or(0, Sequence::work).min(quota.left(tenant.key));
            let cost = work as f64 * INPUT_COST;
            *joined.entry((priority, tenant.key)).or_default() += cost / fairness::weight(tenant);
            *joined_of_owner.entry((priority, tenant.owner)).or_default() += cost;
        }
    }

    /// What each tenant will take of the step, by what it wants and may, before a waiting sequence
    /// gets any: for those that wait for one token, for those that joined in this step, and for
    /// inputs that rank before it. A long input that ranks after it is no reason to wait.
    fn planned_before(&self, waiting: &Sequence, quota: &Quota) -> HashMap<u64, usize> {
        let rank = self.rank(waiting);
        let mut planned: HashMap<u64, usize> = HashMap::new();
        for sequence in self.running.iter().filter_map(|id| self.sequences.get(id)) {
            if sequence.work() == 1 || sequence.joined == self.now || self.rank(sequence) <= rank {
                *planned.entry(sequence.tenant.key).or_default() += sequence.work();
            }
        }
        planned.iter_mut().for_each(|(&tenant, tokens)| *tokens = (*tokens).min(quota.left(tenant)));
        planned
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
            let has_place =
                self.running.len() < self.limits.config.max_batch && encoded + more <= self.limits.max_encoded;
            if has_place && let Some(copy) = self.cache.join(sequence, spare) {
                step.copies.extend(copy);
                sequence.joined = self.now;
                sequence.encoded = same.is_some_and(|input| input.encoded);
                let (priority, tenant) = (sequence.priority, sequence.tenant.key);
                if sequence.cached_tokens.is_none() {
                    sequence.charged = sequence.num_computed.min(sequence.num_input);
                    sequence.cached_tokens = Some(sequence.charged);
                }
                self.queue.remove(priority, tenant, id);
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
    /// tenant that has far more than its share of places.
    fn victim_for(&self, id: SequenceId) -> Option<SequenceId> {
        let waiting = self.sequences.get(&id)?;
        // Those that joined in this very step may have copies to come.
        let settled = |s: &Sequence| s.joined < self.now;
        if let Some(last) = self.last_of(|s| settled(s) && s.priority > waiting.priority) {
            return Some(last);
        }
        if let Some(most) = self.owner_with_far_more(waiting) {
            return self.last_of(|s| settled(s) && s.tenant.owner == most && s.priority >= waiting.priority);
        }
        let place = |tenant| 1.0 / fairness::weight(tenant);
        let mut places: HashMap<u64, f64> = HashMap::new();
        for sequence in self.running.iter().filter_map(|id| self.sequences.get(id)) {
            *places.entry(sequence.tenant.key).or_default() += place(sequence.tenant);
        }
        let own = waiting.tenant.key;
        let after = places.remove(&own).unwrap_or(0.0) + place(waiting.tenant);
        let (most, count) = places.into_iter().max_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)))?;
        if count < after * FAR_MORE_PLACES {
            return None;
        }
        self.last_of(|s| settled(s) && s.tenant.key == most && s.priority >= waiting.priority)
    }

    /// The tenant that has far more sequences in the batch than the waiting one's would have, if there is one.
    fn owner_with_far_more(&self, waiting: &Sequence) -> Option<u64> {
        let mut places: HashMap<u64, f64> = HashMap::new();
        for sequence in self.running.iter().filter_map(|id| self.sequences.get(id)) {
            *places.entry(sequence.tenant.owner).or_default() += 1.0;
        }
        let after = places.remove(&waiting.tenant.owner).unwrap_or(0.0) + 1.0;
        let (most, count) = places.into_iter().max_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)))?;
        (count >= after * FAR_MORE_PLACES).then_some(most)
    }

    /// Of the running sequences that `may` allows, the one that ranks last: lowest priority, then
    /// the tenant with the most service, then the youngest.
    fn last_of(&self, may: impl Fn(&Sequence) -> bool) -> Option<SequenceId> {
        let candidates = self.running.iter().filter_map(|&id| Some((id, self.sequences.get(&id)?)));
        candidates.filter(|(_, s)| may(s)).map(|(id, s)| (self.rank(s), id)).max().map(|(_, id)| id)
    }

    /// Puts a running sequence back in the queue, to be computed anew from its own prompt and
    /// tokens, or found in the cache if it is still there by then.
    fn preempt(&mut self, id: SequenceId) {
        self.running.retain(|&running| running != id);
        if let Some(sequence) = self.sequences.get_mut(&id) {
            self.cache.release(sequence);
            sequence.encoded = false;
            self.queue.push_front(sequence.priority, sequence.tenant.key, id);
            self.preemptions += 1;
        }
    }
}
