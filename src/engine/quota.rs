//! How many positions of a step each tenant may take, so that none stretches the steps of the
//! others.
//!
//! While only one tenant has work, it may take the whole step. Otherwise the tenant that ranks
//! first, with the least service, takes what it wants. Each other may take all it wants if that is not much more;
//! else as much as the first, or a fixed number, whichever is more. So what a busy tenant adds to
//! a light one's step is bounded by what the light one asks for itself, and those that ask for
//! about the same do not hold each other back.

use std::collections::HashMap;

use super::fairness::Rank;

/// What is left of a step.
#[derive(Debug)]
pub struct Quota {
    /// Positions left in the step.
    left: usize,
    /// The tenant with the least service, if there are others beside it.
    first: Option<u64>,
    /// What each of the others may still take.
    each: HashMap<u64, usize>,
    /// Positions left for the others together: half of the step is always the first's, if it wants it.
    others_left: usize,
}

/// A tenant that wants no more than this many times what the first wants is not held back.
const NOT_MUCH_MORE: usize = 2;

impl Quota {
    /// A step of `tokens` positions for tenants given as (key, rank, wanted positions); with
    /// several, each may take `fair` in any case.
    pub fn new(tokens: usize, fair: usize, tenants: &[(u64, Rank, usize)]) -> Self {
        let least = tenants.iter().min_by_key(|(tenant, rank, wanted)| (*rank, *wanted, *tenant));
        let Some(&(first, _, most)) = least.filter(|_| tenants.len() > 1) else {
            return Self { left: tokens, first: None, each: HashMap::new(), others_left: tokens };
        };
        let may = |wanted| if wanted <= NOT_MUCH_MORE * most { wanted } else { most.max(fair) };
        let each = tenants.iter().map(|&(tenant, _, wanted)| (tenant, may(wanted))).collect();
        Self { left: tokens, first: Some(first), each, others_left: tokens - most.min(tokens / 2) }
    }

    /// How many more positions a tenant may take.
    pub fn left(&self, tenant: u64) -> usize {
        match self.first {
            Some(first) if first != tenant => {
                let own = self.each.get(&tenant).copied().unwrap_or(0);
                self.left.min(self.others_left).min(own)
            }
            _ => self.left,
        }
    }

    /// Takes up to `wanted` positions for a tenant; returns how many.
    pub fn take(&mut self, tenant: u64, wanted: usize) -> usize {
        let granted = wanted.min(self.left(tenant));
        self.left -= granted;
        if self.first.is_some_and(|first| first != tenant) {
            self.others_left -= granted;
            if let Some(own) = self.each.get_mut(&tenant) {
                *own -= granted;
            }
        }
        granted
    }

    /// Takes positions that count for no tenant: they cost next to nothing.
    pub fn spend(&mut self, positions: usize) {
        self.left = self.left.saturating_sub(positions);
    }

    /// Positions left in the step.
    pub fn remaining(&self) -> usize {
        self.left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn had(counter: f64) -> Rank {
        Rank { priority: 0, owner: 0.0, counter }
    }

    #[test]
    fn a_lone_tenant_takes_the_whole_step() {
        let mut quota = Quota::new(100, 8, &[(1, had(5.0), 500)]);
        assert_eq!((quota.take(1, 70), quota.take(1, 70), quota.remaining()), (70, 30, 0));
    }

    #[test]
    fn a_busy_tenant_takes_no_more_than_its_part_beside_a_light_one() {
        let tenants = [(1, had(900.0), 64), (2, had(3.0), 1)];
        let mut quota = Quota::new(100, 8, &tenants);
        assert_eq!((quota.take(1, 64), quota.take(2, 1), quota.take(1, 1)), (8, 1, 0));
    }

    #[test]
    fn tenants_that_want_about_the_same_do_not_hold_each_other_back() {
        let tenants = [(1, had(1.0), 200), (2, had(3.0), 300), (3, had(3.0), 900)];
        let mut quota = Quota::new(1000, 8, &tenants);
        assert_eq!((quota.take(2, 300), quota.take(3, 900), quota.take(1, 200)), (300, 200, 200));
    }

    #[test]
    fn half_of_a_small_step_is_left_for_the_tenant_with_the_least_service() {
        let tenants = [(1, had(9.0), 64), (2, had(3.0), 500), (3, had(9.0), 64)];
        let mut quota = Quota::new(32, 32, &tenants);
        assert_eq!((quota.take(1, 12), quota.take(3, 64), quota.take(2, 500)), (12, 4, 16));
    }
}
