//! Which positions of a step each running sequence gets, and each tenant at most.

use std::collections::{HashMap, HashSet};

use super::{Chunk, Scheduler, Step};
use crate::engine::{fairness::Rank, quota::Quota};

/// For this many steps after a tenant's last sequence, one that fills the batch keeps to what it
/// may take beside others: whoever comes back soon does not find a long step under way.
pub(super) const LINGER: u64 = 256;

impl Scheduler {
    /// Remembers a tenant whose sequence went, for [`LINGER`] steps.
    pub(super) fn linger(&mut self, tenant: u64) {
        self.recent.insert(tenant, self.now + LINGER);
    }

    /// What each tenant may take of the next step.
    pub(super) fn quota(&mut self) -> Quota {
        // By tenant: positions wanted, and sequences.
        let mut wanted: HashMap<u64, (usize, usize)> = HashMap::new();
        for sequence in self.running.iter().copied().chain(self.queue.iter()).filter_map(|id| self.sequences.get(&id)) {
            // Of what a waiting one will find, its prompt is known at once.
            let is_found = sequence.namespace.is_some_and(|namespace| self.cache.contains_prompt(namespace));
            let known = if is_found { sequence.num_virtual.saturating_sub(sequence.num_computed) } else { 0 };
            let (positions, sequences) = wanted.entry(sequence.tenant.key).or_default();
            // The last one is computed in any case.
            *positions += sequence.work().saturating_sub(known).max(1);
            *sequences += 1;
        }
        let tokens = self.limits.config.max_step_tokens;
        let busy = self.ledger.busy().into_iter();
        let mut tenants: Vec<_> =
            busy.map(|(key, rank)| (key, rank, wanted.get(&key).map_or(0, |w| w.0.min(tokens)))).collect();
        self.recent.retain(|_, until| *until > self.now);
        // Only a tenant that would fill the batch is held back: others share a step as it comes.
        if wanted.values().all(|w| 2 * w.1 < self.limits.config.max_batch) {
            tenants.clear();
        } else if let Some(&absent) = self.recent.keys().find(|key| !wanted.contains_key(key)) {
            tenants.push((absent, Rank { priority: i32::MIN, owner: 0.0, counter: 0.0 }, 0));
        }
        Quota::new(tokens, self.limits.fair_step_tokens, &tenants)
    }

    /// Gives running sequences their positions of this step.
    pub(super) fn fill(&mut self, quota: &mut Quota, step: &mut Step) {
        let ranked = self.running.iter().filter_map(|&id| {
            let s = self.sequences.get(&id)?;
            let is_input = s.work() > 1;
            // Where not all can have their token, they take turns; inputs are finished one by one.
            let turn = if is_input { 0 } else { s.last_turn };
            Some((is_input, self.rank(s), turn, id))
        });
        let mut order: Vec<_> = ranked.collect();
        order.sort_unstable();
        let mut inputs_left = self.limits.config.max_step_tokens;
        let mut encoding = HashSet::new();
        let mut guesses_left = self.draft_budget();
        for (is_input, .., id) in order {
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            let (key, tenant) = (sequence.encoder_key(), sequence.tenant.key);
            // One that is computed in this step for another sequence is there before the decoder runs.
            let unencoded = if key.is_some_and(|key| encoding.contains(&key)) { 0 } else { sequence.num_unencoded() };
            let wanted = if is_input { (unencoded + sequence.num_pending()).min(inputs_left) } else { 1 };
            // An encoder's input cannot be cut: the first of a step is taken in any case, others if
            // they fit.
            if unencoded > 0 && !encoding.is_empty() && unencoded >= wanted.min(quota.left(tenant)) {
                continue;
            }
            let taken = quota.take(tenant, wanted);
            if is_input {
                inputs_left -= taken;
            } else if taken > 0 {
                inputs_left = self.limits.config.max_prefill_tokens;
            }
            if taken > 0 {
                let mut len = taken.saturating_sub(unencoded).max(1);
                let wanted_from = sequence.wanted_from();
                if !is_input && guesses_left > 0 {
                    let guessed = Self::draft(sequence, guesses_left.min(self.limits.draft_tokens));
                    guesses_left -= guessed;
                    quota.spend(guessed);
                    len += guessed;
                }
                encoding.extend(key.filter(|_| unencoded > 0));
                let start = sequence.num_computed;
                self.turns += 1;
                sequence.last_turn = self.turns;
                let wanted = (start + len).saturating_sub(start.max(wanted_from));
                step.chunks.push(Chunk { id, start, len, wanted, encodes: unencoded > 0 });
            }
        }
    }
}
