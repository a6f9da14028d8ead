//! Requests that score continuations: each is a group of sequences, the branches of its plan, that share what the
//! request has.

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
    /// Lets the first branch of a request wait for its turn; `sequence` has the input alone.
    pub(super) fn accept_score(&mut self, id: SequenceId, plan: ScorePlan, sequence: Sequence, running: Running) {
        // The branches find in the cache what others computed, also those of a request that shares with nobody.
        let namespace = match (&sequence.encoder, sequence.namespace) {
            (Some(input), _) => input.key.as_namespace(),
            (None, Some(namespace)) => namespace,
            (None, None) => CacheNamespace::of_request(id.0),
        };
        let Sequence { tokens: input, encoder, public_prefix, tenant, priority, .. } = sequence;
        let (scores, left) = (plan.begin(), 1);
        let group =
            Group { plan, scores, left, input, encoder, namespace, public_prefix, tenant, priority, cached_tokens: 0 };
        if let Some(first) = group.sequence(0) {
            self.groups.insert(id.0, group);
            self.jobs.insert(id, Running { task: Task::Score { group: id.0, branch: 0 }, ..running });
            self.scheduler.add(id, first);
        }
    }

    /// Ends branches of which all is computed: those that leave them wait for their turn, and a request without
    /// branches left is answered.
    pub(super) fn end_branches(&mut self, ids: &[SequenceId]) {
        for &id in ids {
            let Some(&Running { task: Task::Score { group: group_id, branch }, .. }) = self.jobs.get(&id) else {
                continue;
            };
            if !self.scheduler.get(id).is_some_and(Sequence::is_scored) {
                continue;
            }
            let cached = self.scheduler.get(id).and_then(|sequence| sequence.cached_tokens).unwrap_or(0);
            let Some(group) = self.groups.get_mut(&group_id) else { continue };
            if branch == 0 {
                group.cached_tokens = cached;
            }
            let next = group.plan.branches().get(branch).map_or_else(Vec::new, |branch| branch.next.clone());
            group.left = group.left + next.len() - 1;
            let sequences: Vec<_> = next.iter().filter_map(|&index| Some((index, group.sequence(index)?))).collect();
            if group.left == 0 {
                let (log_probs, cached_tokens) = (group.plan.finish(&group.scores), group.cached_tokens);
                self.end(id, Event::Scored { log_probs, cached_tokens });
                continue;
            }
            for (branch, sequence) in sequences {
                let new = self.new_id();
                let Some(job) = self.jobs.get(&id) else { continue };
                let job = Running {
                    prompt: job.prompt.clone(),
                    task: Task::Score { group: group_id, branch },
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

    /// Takes the other branches of a group out, and the group.
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
