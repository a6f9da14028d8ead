//! How much service each tenant has had: a weighted virtual token counter.
//!
//! After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Each tenant has a
//! counter that rises with what is computed for it, divided by its weight; whoever has the least is
//! next. A tenant that had nothing to do is lifted to the least counter of those that have, so
//! that nobody saves up a claim. As long as two tenants want more than they get, their counters
//! stay within a bound of each other that does not depend on how much more they want.
//!
//! What has a lower priority waits for all that has a higher one, however little its tenant had. So
//! counters are kept, and compared, within one priority: else a request that waits at a low priority
//! would save up a claim for others of its tenant. Service at a priority counts at lower ones too.

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

/// Who goes first: the lower priority number, then whoever had less service.
#[derive(Debug, Clone, Copy)]
pub struct Rank {
    pub priority: i32,
    pub counter: f64,
}

impl Ord for Rank {
    fn cmp(&self, other: &Self) -> Ordering {
        self.priority.cmp(&other.priority).then(self.counter.total_cmp(&other.counter))
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

/// The counters of all tenants, by priority.
#[derive(Debug, Default)]
pub struct Ledger {
    levels: BTreeMap<i32, Level>,
}

impl Ledger {
    /// One more sequence of a tenant.
    pub fn enter(&mut self, priority: i32, tenant: Tenant) {
        self.levels.entry(priority).or_default().enter(tenant);
    }

    /// One sequence less of a tenant.
    pub fn leave(&mut self, priority: i32, key: u64) {
        if let Some(level) = self.levels.get_mut(&priority) {
            level.leave(key);
        }
        let busy = self.levels.values().filter(|level| level.num_busy > 0).count();
        if self.levels.len() > busy + MAX_IDLE_LEVELS {
            self.levels.retain(|_, level| level.num_busy > 0);
        }
    }

    /// Counts service for a tenant at a priority: there, and at all lower ones that it waits at too.
    pub fn charge(&mut self, priority: i32, tenant: Tenant, cost: f64) {
        for level in self.levels.range_mut(priority..).map(|(_, level)| level) {
            level.charge(tenant.key, cost / weight(tenant));
        }
    }

    /// Where a tenant stands at a priority.
    pub fn rank(&self, priority: i32, key: u64) -> Rank {
        Rank { priority, counter: self.levels.get(&priority).map_or(0.0, |level| level.counter(key)) }
    }

    /// The tenants with sequences, each once, where it stands best.
    pub fn busy(&self) -> HashMap<u64, Rank> {
        let mut busy = HashMap::new();
        for (&priority, level) in &self.levels {
            for (key, counter) in level.busy() {
                if let hash_map::Entry::Vacant(entry) = busy.entry(key) {
                    entry.insert(Rank { priority, counter });
                }
            }
        }
        busy
    }

    /// Whether no tenant has a sequence.
    pub fn is_idle(&self) -> bool {
        self.levels.values().all(|level| level.num_busy == 0)
    }
}

/// The counters of one priority.
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
    fn enter(&mut self, tenant: Tenant) {
        self.raise_floor();
        let floor = self.floor;
        let entry = self.entries.entry(tenant.key).or_insert(Entry { counter: floor, live: 0 });
        if entry.live == 0 {
            entry.counter = entry.counter.max(floor);
            self.num_busy += 1;
        }
        entry.live += 1;
    }

    fn leave(&mut self, key: u64) {
        let Some(entry) = self.entries.get_mut(&key).filter(|entry| entry.live > 0) else { return };
        entry.live -= 1;
        if entry.live > 0 {
            return;
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
        Tenant { key, weight }
    }

    #[test]
    fn service_counts_less_for_a_heavier_account() {
        let mut ledger = Ledger::default();
        let tenants = [tenant(1, 1.0), tenant(2, 4.0)];
        tenants.iter().for_each(|&tenant| ledger.enter(0, tenant));
        tenants.iter().for_each(|&tenant| ledger.charge(0, tenant, 8.0));
        assert_eq!((ledger.rank(0, 1).counter, ledger.rank(0, 2).counter), (8.0, 2.0));
    }

    #[test]
    fn whoever_was_idle_comes_back_at_the_least_counter_and_never_lower_than_its_own() {
        let mut level = Level::default();
        level.enter(tenant(1, 1.0));
        level.enter(tenant(2, 1.0));
        level.charge(1, 50.0);
        level.charge(2, 20.0);
        level.enter(tenant(3, 1.0));
        assert_eq!(level.counter(3), 20.0);
        level.leave(1);
        level.enter(tenant(1, 1.0));
        assert_eq!(level.counter(1), 50.0);
        // All gone: the last to leave sets what the next begins with.
        for key in [3, 1, 2] {
            level.leave(key);
        }
        level.enter(tenant(4, 1.0));
        assert_eq!((level.counter(4), level.num_busy), (20.0, 1));
    }

    #[test]
    fn an_account_stands_where_it_stands_best_and_each_priority_has_its_own_counters() {
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
        assert_eq!(ledger.busy()[&1], Rank { priority: 0, counter: 103.0 });
        for (priority, key) in [(0, 1), (0, 2), (5, 1)] {
            assert!(!ledger.is_idle());
            ledger.leave(priority, key);
        }
        assert!(ledger.is_idle());
    }

    #[test]
    fn accounts_and_priorities_that_went_away_do_not_pile_up() {
        let mut ledger = Ledger::default();
        ledger.enter(0, tenant(0, 1.0));
        for key in 1..10_000 {
            for priority in [0, key as i32] {
                ledger.enter(priority, tenant(key, 1.0));
                ledger.leave(priority, key);
            }
        }
        assert!(ledger.levels[&0].entries.len() <= MAX_IDLE + 2, "{}", ledger.levels[&0].entries.len());
        assert!(ledger.levels.len() <= MAX_IDLE_LEVELS + 2, "{}", ledger.levels.len());
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
