//! How much service each account has had: a weighted virtual token counter.
//!
//! After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Each account has a
//! counter that rises with what is computed for it, divided by its weight; whoever has the least is
//! next. An account that had nothing to do is lifted to the least counter of those that have, so
//! that nobody saves up a claim. As long as two accounts want more than they get, their counters
//! stay within a bound of each other that does not depend on how much more they want.

use std::collections::HashMap;

use super::request::Account;

/// What one computed position of input costs; one that was found in the cache costs nothing.
pub const INPUT_COST: f64 = 1.0;
/// What one new token costs: it takes a step of its own.
pub const OUTPUT_COST: f64 = 2.0;

/// Idle accounts are looked through when there are this many more than busy ones.
const MAX_IDLE: usize = 1024;

/// The counters of all accounts.
#[derive(Debug, Default)]
pub struct Ledger {
    entries: HashMap<u64, Entry>,
    /// No busy account has, or will have, less.
    floor: f64,
    num_busy: usize,
}

#[derive(Debug)]
struct Entry {
    counter: f64,
    weight: f64,
    /// Its sequences, waiting or running.
    live: usize,
}

impl Ledger {
    /// One more sequence of an account.
    pub fn enter(&mut self, account: Account) {
        self.raise_floor();
        let floor = self.floor;
        let entry = self.entries.entry(account.key).or_insert(Entry { counter: floor, weight: 1.0, live: 0 });
        entry.weight = if account.weight.is_finite() { account.weight.max(1e-6) } else { 1.0 };
        if entry.live == 0 {
            entry.counter = entry.counter.max(floor);
            self.num_busy += 1;
        }
        entry.live += 1;
    }

    /// One sequence less of an account.
    pub fn leave(&mut self, key: u64) {
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

    /// Counts service for an account.
    pub fn charge(&mut self, key: u64, cost: f64) {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.counter += cost / entry.weight;
        }
    }

    /// An account's counter.
    pub fn counter(&self, key: u64) -> f64 {
        self.entries.get(&key).map_or(self.floor, |entry| entry.counter)
    }

    /// An account's weight.
    pub fn weight(&self, key: u64) -> f64 {
        self.entries.get(&key).map_or(1.0, |entry| entry.weight)
    }

    /// The accounts with sequences, and their counters.
    pub fn busy(&self) -> impl Iterator<Item = (u64, f64)> + '_ {
        self.entries.iter().filter(|(_, entry)| entry.live > 0).map(|(&key, entry)| (key, entry.counter))
    }

    /// How many accounts have sequences.
    pub fn num_busy(&self) -> usize {
        self.num_busy
    }

    fn raise_floor(&mut self) {
        let least = self.busy().map(|(_, counter)| counter).reduce(f64::min);
        self.floor = self.floor.max(least.unwrap_or(0.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(key: u64, weight: f64) -> Account {
        Account { key, weight }
    }

    #[test]
    fn service_counts_less_for_a_heavier_account() {
        let mut ledger = Ledger::default();
        ledger.enter(account(1, 1.0));
        ledger.enter(account(2, 4.0));
        ledger.charge(1, 8.0);
        ledger.charge(2, 8.0);
        assert_eq!((ledger.counter(1), ledger.counter(2)), (8.0, 2.0));
    }

    #[test]
    fn whoever_was_idle_comes_back_at_the_least_counter_and_never_lower_than_its_own() {
        let mut ledger = Ledger::default();
        ledger.enter(account(1, 1.0));
        ledger.enter(account(2, 1.0));
        ledger.charge(1, 50.0);
        ledger.charge(2, 20.0);
        ledger.enter(account(3, 1.0));
        assert_eq!(ledger.counter(3), 20.0);
        ledger.leave(1);
        ledger.enter(account(1, 1.0));
        assert_eq!(ledger.counter(1), 50.0);
        // All gone: the last to leave sets what the next begins with.
        for key in [3, 1, 2] {
            ledger.leave(key);
        }
        ledger.enter(account(4, 1.0));
        assert_eq!((ledger.counter(4), ledger.num_busy()), (20.0, 1));
    }

    #[test]
    fn accounts_that_went_away_do_not_pile_up() {
        let mut ledger = Ledger::default();
        ledger.enter(account(0, 1.0));
        for key in 1..10_000 {
            ledger.enter(account(key, 1.0));
            ledger.leave(key);
        }
        assert!(ledger.entries.len() <= MAX_IDLE + 2, "{}", ledger.entries.len());
    }

    #[test]
    fn a_weight_that_is_no_weight_does_no_harm() {
        let mut ledger = Ledger::default();
        for (key, weight) in [(1, 0.0), (2, f64::NAN), (3, f64::INFINITY), (4, -1.0)] {
            ledger.enter(account(key, weight));
            ledger.charge(key, 1.0);
            assert!(ledger.counter(key).is_finite());
        }
    }
}
