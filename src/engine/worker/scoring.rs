//! Requests that score continuations: each is a group of sequences, the parts of its tree. There is one, unless the tree
//! is large; others begin when the first has computed the input, which they find in the cache.

use std::sync::Arc;

use super::{
    Running, Task, Worker,
    group::{Group, GroupId},
};
use crate::engine::{
    request::{CacheNamespace, Event, SequenceId},
    score::ScorePlan,
    sequence::Sequence,
};

impl Worker {
    /// Lets the first part of a request wait for its turn; `sequence` has the input alone.
    pub(super) fn accept_score(&mut self, id: SequenceId, plan: ScorePlan, sequence: Sequence, running: Running) {
        // The parts find in the cache what the first computed, also those of a request that shares with nobody.
        let namespace = match (&sequence.encoder, sequence.namespace) {
            (Some(input), _) => input.key.as_namespace(),
            (None, Some(namespace)) => namespace,
            (None, None) => CacheNamespace::of_request(id.0),
        };
        let Sequence { tokens: input, encoder, public_prefix, tenant, priority, .. } = sequence;
        let parts = plan.parts(self.scheduler.max_sequence().saturating_sub(input.len()));
        let (scores, left, cached_tokens) = (plan.begin(), parts.len(), 0);
        let group = Group {
            plan,
            parts,
            scores,
            left,
            input,
            encoder,
            namespace,
            public_prefix,
            tenant,
            priority,
            cached_tokens,
        };
        if let Some(first) = group.sequence(0) {
            self.groups.insert(id.0, group);
            self.jobs.insert(id, Running { task: Task::Score { group: id.0, part: 0 }, ..running });
            self.scheduler.add(id, first);
        }
    }

    /// Ends parts of which all is computed: after the first the others wait for their turn, and a request without parts
    /// left is answered.
    pub(super) fn end_parts(&mut self, ids: &[SequenceId]) {
        for &id in ids {
            let Some(&Running { task: Task::Score { group: group_id, part }, .. }) = self.jobs.get(&id) else {
                continue;
            };
            if !self.scheduler.get(id).is_some_and(Sequence::is_scored) {
                continue;
            }
            let cached = self.scheduler.get(id).and_then(|sequence| sequence.cached_tokens).unwrap_or(0);
            let Some(group) = self.groups.get_mut(&group_id) else { continue };
            group.left -= 1;
            if part == 0 {
                group.cached_tokens = cached;
            }
            if group.left == 0 {
                let (log_probs, cached_tokens) = (group.plan.finish(&group.scores), group.cached_tokens);
                self.end(id, Event::Scored { log_probs, cached_tokens });
                continue;
            }
            let others = if part == 0 { 1..group.parts.len() } else { 0..0 };
            let sequences: Vec<_> = others.filter_map(|part| Some((part, group.sequence(part)?))).collect();
            for (part, sequence) in sequences {
                let new = self.new_id();
                let Some(job) = self.jobs.get(&id) else { continue };
                let job = Running {
                    prompt: job.prompt.clone(),
                    task: Task::Score { group: group_id, part },
                    deadline: job.deadline,
                    events: job.events.clone(),
                    cached_tokens: Arc::clone(&job.cached_tokens),
                    slot: None,
                };
                self.jobs.insert(new, job);
                self.scheduler.add(new, sequence);
            }
            self.scheduler.remove(id);
            self.jobs.remove(&id);
        }
    }

    /// Takes the other parts of a group out, and the group.
    pub(super) fn forget_group(&mut self, group_id: GroupId) {
        if self.groups.remove(&group_id).is_none() {
            return;
        }
        let of_group = |job: &Running| matches!(job.task, Task::Score { group, .. } if group == group_id);
        let ids: Vec<SequenceId> = self.jobs.iter().filter(|(_, job)| of_group(job)).map(|(id, _)| *id).collect();
        for id in ids {
            self.scheduler.remove(id);
            self.jobs.remove(&id);
        }
    }
}
