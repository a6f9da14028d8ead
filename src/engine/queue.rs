//! Who waits, in which order: by priority, then by service had, then first come. Each line is a tenant's task's.

use std::collections::{BTreeMap, VecDeque};

use super::{fairness::Rank, request::SequenceId};

/// Waiting sequences. Holds no lines that are empty.
#[derive(Debug, Default)]
pub struct Queue {
    levels: BTreeMap<i32, Level>,
    len: usize,
}

/// The lines of one priority, by tenant.
type Level = BTreeMap<u64, VecDeque<SequenceId>>;

impl Queue {
    /// Puts a sequence at the end of its line.
    pub fn push_back(&mut self, priority: i32, tenant: u64, id: SequenceId) {
        self.line(priority, tenant).push_back(id);
        self.len += 1;
    }

    /// Puts a sequence that has waited before at the head of its line.
    pub fn push_front(&mut self, priority: i32, tenant: u64, id: SequenceId) {
        self.line(priority, tenant).push_front(id);
        self.len += 1;
    }

    /// Takes a sequence out, wherever it stands. False if it is not there.
    pub fn remove(&mut self, priority: i32, tenant: u64, id: SequenceId) -> bool {
        let Some(level) = self.levels.get_mut(&priority) else { return false };
        let Some(line) = level.get_mut(&tenant) else { return false };
        let Some(at) = line.iter().position(|&waiting| waiting == id) else { return false };
        line.remove(at);
        self.len -= 1;
        if line.is_empty() {
            level.remove(&tenant);
        }
        if level.is_empty() {
            self.levels.remove(&priority);
        }
        true
    }

    /// Who is next: of the lowest priority number that has a tenant in the running, the head of
    /// the line of the tenant that ranks lowest. `rank`, by priority and tenant, is `None` for
    /// those out of the running.
    pub fn next(&self, rank: impl Fn(i32, u64) -> Option<Rank>) -> Option<SequenceId> {
        self.levels.iter().find_map(|(&priority, level)| {
            let heads = level.iter().filter_map(|(&tenant, line)| Some((rank(priority, tenant)?, *line.front()?)));
            heads.min().map(|(_, id)| id)
        })
    }

    /// All of them, in no order that means anything.
    pub fn iter(&self) -> impl Iterator<Item = SequenceId> + '_ {
        self.levels.values().flat_map(BTreeMap::values).flatten().copied()
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn line(&mut self, priority: i32, tenant: u64) -> &mut VecDeque<SequenceId> {
        self.levels.entry(priority).or_default().entry(tenant).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priority_goes_first_then_the_tenant_owed_most_then_who_came_first() {
        let mut queue = Queue::default();
        for (id, priority, tenant) in [(1, 0, 7), (2, 0, 8), (3, 0, 8), (4, -1, 7), (5, 5, 9)] {
            queue.push_back(priority, tenant, SequenceId(id));
        }
        // Tenant 8 was served least.
        let had = |counter| Rank { priority: 0, owner: 0.0, counter };
        let rank = |_, tenant| Some(had(if tenant == 8 { 1.0 } else { 2.0 }));
        let mut order = Vec::new();
        while let Some(id) = queue.next(rank) {
            order.push(id.0);
            assert!((-1..6).any(|p| (7..10).any(|a| queue.remove(p, a, id))));
        }
        assert_eq!(order, [4, 2, 3, 1, 5]);
        assert!(queue.is_empty() && queue.levels.is_empty());
    }

    #[test]
    fn tenants_out_of_the_running_are_passed_over_and_whoever_comes_back_is_at_the_head() {
        let mut queue = Queue::default();
        queue.push_back(0, 1, SequenceId(1));
        queue.push_back(3, 2, SequenceId(2));
        queue.push_front(3, 2, SequenceId(0));
        assert_eq!(
            queue.next(|_, tenant| (tenant != 1).then_some(Rank { priority: 0, owner: 0.0, counter: 0.0 })),
            Some(SequenceId(0))
        );
        assert_eq!(queue.next(|_, _| None), None);
        assert_eq!(queue.iter().count(), queue.len());
        assert!(!queue.remove(0, 2, SequenceId(2)));
    }
}
