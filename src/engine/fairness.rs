//! How much service each tenant, and each of its tasks, has had: weighted virtual token counters.
//!
//! After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). A counter rises with what is computed, and
//! whoever has the least is next. There are two levels: first the tenants share, by equal parts, then the tasks of one
//! tenant, by their weights. So a tenant with many tasks gets no more than one with a single task, and a busy task does
//! not starve another one of its tenant. Whoever had nothing to do is lifted to the least counter of those that have, so
//! that nobody saves up a claim. As long as two want more than they get, their counters stay within a bound of each other
//! that does not depend on how much more they want.
//!
//! What has a lower priority waits for all that has a higher one, however little its tenant had. So counters are kept, and
//! compared, within one priority: else a request that waits at a low priority would save up a claim for others of its
//! tenant. Service at a priority counts at lower ones too.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, HashMap, hash_map},
};

use super::request::Tenant;

/// What one computed position of input costs; one that was found in the cache costs nothing.
pub const INPUT_COST: f64 = 1.0;
/// What one new token costs: it takes a step of its own.
pub const OUTPUT_COST: f64 = 2.0;

/// Idle tenants are looked through when there are this many more than busy ones.
const MAX_IDLE: usize = 1024;

/// Priorities that nobody has are looked through when there are this many more than others.
const MAX_IDLE_LEVELS: usize = 16;

/// Who goes first: the lower priority number, then the tenant that had less service, then the task that had less.
#[derive(Debug, Clone, Copy)]
pub struct Rank {
    pub priority: i32,
    /// Of the tenant.
    pub owner: f64,
    /// Of the tenant's task.
    pub counter: f64,
}

impl Ord for Rank {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_owner = self.priority.cmp(&other.priority).then(self.owner.total_cmp(&other.owner));
        by_owner.then(self.counter.total_cmp(&other.counter))
    }
}

impl PartialOrd for Rank {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Rank {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Rank {}

/// A tenant's weight, or 1 if it is none.
pub fn weight(tenant: Tenant) -> f64 {
    if tenant.weight.is_finite() { tenant.weight.max(1e-6) } else { 1.0 }
}

/// The counters of all tenants and their tasks, by priority.
#[derive(Debug, Default)]
pub struct Ledger {
    tiers: BTreeMap<i32, Tier>,
}

/// The counters of one priority.
#[derive(Debug, Default)]
struct Tier {
    owners: Level,
    /// The tasks of each tenant that has sequences.
    tasks: HashMap<u64, Level>,
    /// Whose each busy task is.
    owner_of: HashMap<u64, u64>,
}

impl Tier {
    fn rank(&self, priority: i32, key: u64) -> Rank {
        let Some(owner) = self.owner_of.get(&key) else {
            return Rank { priority, owner: self.owners.floor, counter: 0.0 };
        };
        let counter = self.tasks.get(owner).map_or(0.0, |level| level.counter(key));
        Rank { priority, owner: self.owners.counter(*owner), counter }
    }
}

impl Ledger {
    /// One more sequence of a tenant's task.
    pub fn enter(&mut self, priority: i32, tenant: Tenant) {
        let tier = self.tiers.entry(priority).or_default();
        tier.owners.enter(tenant.owner);
        tier.tasks.entry(tenant.owner).or_default().enter(tenant.key);
        tier.owner_of.insert(tenant.key, tenant.owner);
    }

    /// One sequence less of a tenant's task.
    pub fn leave(&mut self, priority: i32, key: u64) {
        if let Some(tier) = self.tiers.get_mut(&priority)
            && let Some(&owner) = tier.owner_of.get(&key)
        {
            tier.owners.leave(owner);
            let is_idle = tier.tasks.get_mut(&owner).is_none_or(|level| level.leave(key));
            if is_idle {
                tier.owner_of.remove(&key);
            }
            if tier.tasks.len() > tier.owners.num_busy + MAX_IDLE {
                tier.tasks.retain(|_, level| level.num_busy > 0);
            }
        }
        let busy = self.tiers.values().filter(|tier| tier.owners.num_busy > 0).count();
        if self.tiers.len() > busy + MAX_IDLE_LEVELS {
            self.tiers.retain(|_, tier| tier.owners.num_busy > 0);
        }
    }

    /// Counts service for a tenant's task at a priority: there, and at all lower ones that it waits at too.
    pub fn charge(&mut self, priority: i32, tenant: Tenant, cost: f64) {
        for tier in self.tiers.range_mut(priority..).map(|(_, tier)| tier) {
            tier.owners.charge(tenant.owner, cost);
            if let Some(level) = tier.tasks.get_mut(&tenant.owner) {
                level.charge(tenant.key, cost / weight(tenant));
            }
        }
    }

    /// Where a tenant's task stands at a priority.
    pub fn rank(&self, priority: i32, key: u64) -> Rank {
        let nothing = Rank { priority, owner: 0.0, counter: 0.0 };
        self.tiers.get(&priority).map_or(nothing, |tier| tier.rank(priority, key))
    }

    /// Whose a task is that has sequences at a priority.
    pub fn owner(&self, priority: i32, key: u64) -> Option<u64> {
        self.tiers.get(&priority)?.owner_of.get(&key).copied()
    }

    /// The tasks with sequences, each once, where it stands best.
    pub fn busy(&self) -> HashMap<u64, Rank> {
        let mut busy = HashMap::new();
        for (&priority, tier) in &self.tiers {
            for &key in tier.owner_of.keys() {
                if let hash_map::Entry::Vacant(entry) = busy.entry(key) {
                    entry.insert(tier.rank(priority, key));
                }
            }
        }
        busy
    }

    /// Whether nobody has a sequence.
    pub fn is_idle(&self) -> bool {
        self.tiers.values().all(|tier| tier.owners.num_busy == 0)
    }
}

/// Counters of one kind: of tenants, or of the tasks of one.
#[derive(Debug, Default)]
struct Level {
    entries: HashMap<u64, Entry>,
    /// No busy tenant has, or will have, less.
    floor: f64,
    num_busy: usize,
}

#[derive(Debug)]
struct Entry {
    counter: f64,
    /// Its sequences, waiting or running.
    live: usize,
}

impl Level {
    fn enter(&mut self, key: u64) {
        self.raise_floor();
        let floor = self.floor;
        let entry = self.entries.entry(key).or_insert(Entry { counter: floor, live: 0 });
        if entry.live == 0 {
            entry.counter = entry.counter.max(floor);
            self.num_busy += 1;
        }
        entry.live += 1;
    }

    /// Returns whether nothing of it is left.
    fn leave(&mut self, key: u64) -> bool {
        let Some(entry) = self.entries.get_mut(&key).filter(|entry| entry.live > 0) else { return true };
        entry.live -= 1;
        if entry.live > 0 {
            return false;
        }
        self.num_busy -= 1;
        if self.num_busy == 0 {
            self.floor = self.floor.max(entry.counter);
        }
        if self.entries.len() > self.num_busy + MAX_IDLE {
            self.raise_floor();
            // They would be lifted to the floor when they come back: nothing is forgotten.
            let floor = self.floor;
            self.entries.retain(|_, entry| entry.live > 0 || entry.counter > floor);
        }
        true
    }

    fn charge(&mut self, key: u64, share: f64) {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.counter += share;
        }
    }

    fn counter(&self, key: u64) -> f64 {
        self.entries.get(&key).map_or(self.floor, |entry| entry.counter)
    }

    fn busy(&self) -> impl Iterator<Item = (u64, f64)> + '_ {
        self.entries.iter().filter(|(_, entry)| entry.live > 0).map(|(&key, entry)| (key, entry.counter))
    }

    fn raise_floor(&mut self) {
        let least = self.busy().map(|(_, counter)| counter).reduce(f64::min);
        self.floor = self.floor.max(least.unwrap_or(0.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(key: u64, weight: f64) -> Tenant {
        Tenant { owner: 0, key, weight }
    }

    #[test]
    fn service_counts_less_for_a_heavier_tenant() {
        let mut ledger = Ledger::default();
        let tenants = [tenant(1, 1.0), tenant(2, 4.0)];
        tenants.iter().for_each(|&tenant| ledger.enter(0, tenant));
        tenants.iter().for_each(|&tenant| ledger.charge(0, tenant, 8.0));
        assert_eq!((ledger.rank(0, 1).counter, ledger.rank(0, 2).counter), (8.0, 2.0));
    }

    #[test]
    fn whoever_was_idle_comes_back_at_the_least_counter_and_never_lower_than_its_own() {
        let mut level = Level::default();
        level.enter(1);
        level.enter(2);
        level.charge(1, 50.0);
        level.charge(2, 20.0);
        level.enter(3);
        assert_eq!(level.counter(3), 20.0);
        level.leave(1);
        level.enter(1);
        assert_eq!(level.counter(1), 50.0);
        // All gone: the last to leave sets what the next begins with.
        for key in [3, 1, 2] {
            level.leave(key);
        }
        level.enter(4);
        assert_eq!((level.counter(4), level.num_busy), (20.0, 1));
    }

    #[test]
    fn a_tenant_stands_where_it_stands_best_and_each_priority_has_its_own_counters() {
        let mut ledger = Ledger::default();
        ledger.enter(5, tenant(1, 1.0));
        ledger.enter(0, tenant(2, 1.0));
        ledger.charge(0, tenant(2, 1.0), 100.0);
        // What waits at priority 5 is no claim at priority 0; service at 0 counts at 5 as well.
        ledger.enter(0, tenant(1, 1.0));
        assert_eq!((ledger.rank(0, 1).counter, ledger.rank(5, 1).counter), (100.0, 0.0));
        ledger.charge(0, tenant(1, 1.0), 3.0);
        ledger.charge(5, tenant(1, 1.0), 4.0);
        assert_eq!((ledger.rank(0, 1).counter, ledger.rank(5, 1).counter), (103.0, 7.0));
        assert_eq!((ledger.busy()[&1].priority, ledger.busy()[&1].counter), (0, 103.0));
        for (priority, key) in [(0, 1), (0, 2), (5, 1)] {
            assert!(!ledger.is_idle());
            ledger.leave(priority, key);
        }
        assert!(ledger.is_idle());
    }

    #[test]
    fn tenants_and_priorities_that_went_away_do_not_pile_up() {
        let mut ledger = Ledger::default();
        ledger.enter(0, tenant(0, 1.0));
        for key in 1..10_000 {
            for priority in [0, key as i32] {
                ledger.enter(priority, tenant(key, 1.0));
                ledger.leave(priority, key);
            }
        }
        for key in 1..10_000 {
            ledger.enter(0, Tenant { owner: key, key: 20_000 + key, weight: 1.0 });
            ledger.leave(0, 20_000 + key);
        }
        let tier = &ledger.tiers[&0];
        assert!(tier.tasks[&0].entries.len() <= MAX_IDLE + 2, "{}", tier.tasks[&0].entries.len());
        assert!(tier.owners.entries.len() <= MAX_IDLE + 2 && tier.tasks.len() <= MAX_IDLE + 2);
        assert_eq!(tier.owner_of.len(), 1);
        assert!(ledger.tiers.len() <= MAX_IDLE_LEVELS + 2, "{}", ledger.tiers.len());
    }

    #[test]
    fn a_tenants_tasks_share_what_the_tenant_gets() {
        let mut ledger = Ledger::default();
        let of = |owner, key| Tenant { owner, key, weight: 1.0 };
        let tenants = [of(1, 11), of(1, 12), of(1, 13), of(2, 21)];
        tenants.iter().for_each(|&tenant| ledger.enter(0, tenant));
        tenants[..3].iter().for_each(|&tenant| ledger.charge(0, tenant, 10.0));
        ledger.charge(0, tenants[3], 20.0);
        // Each task of the first tenant had less, and together they had more.
        let first = tenants.iter().min_by_key(|tenant| ledger.rank(0, tenant.key)).unwrap();
        assert_eq!(first.key, 21);
        ledger.charge(0, tenants[3], 11.0);
        ledger.charge(0, tenants[0], 0.5);
        let mut order = tenants;
        order.sort_by_key(|tenant| ledger.rank(0, tenant.key));
        assert_eq!(order.map(|tenant| tenant.key), [12, 13, 11, 21]);
    }

    #[test]
    fn a_weight_that_is_no_weight_does_no_harm() {
        let mut ledger = Ledger::default();
        for (key, weight) in [(1, 0.0), (2, f64::NAN), (3, f64::INFINITY), (4, -1.0)] {
            ledger.enter(0, tenant(key, weight));
            ledger.charge(0, tenant(key, weight), 1.0);
            assert!(ledger.rank(0, key).counter.is_finite());
        }
    }
}
