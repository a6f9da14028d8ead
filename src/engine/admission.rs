//! Admission in a bounded queue, of which no tenant may take all.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// From this many slots on, one tenant leaves an eighth of them to the others.
const SHARED_FROM: usize = 8;

/// How many slots there are, and who has them.
#[derive(Debug)]
pub(super) struct Admission {
    limit: usize,
    limit_each: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    total: usize,
    /// Only of tenants that have one.
    by_tenant: HashMap<u64, usize>,
}

/// One slot, free again when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Arc<Admission>,
    tenant: u64,
}

impl Admission {
    /// `limit` slots, of which one tenant gets at most `limit_each`.
    pub(super) fn new(limit: usize, limit_each: usize) -> Arc<Self> {
        Arc::new(Self { limit, limit_each, taken: Mutex::default() })
    }

    /// Admission for requests: where there are some, one tenant does not get all, so that a light one
    /// still gets in while a busy one is refused.
    pub(super) fn for_requests(limit: usize) -> Arc<Self> {
        Self::new(limit, if limit >= SHARED_FROM { limit - limit / 8 } else { limit })
    }

    /// Takes a slot; if there is none for this tenant, how many may wait.
    pub(super) fn take(this: &Arc<Self>, tenant: u64) -> Result<Slot, usize> {
        let mut taken = this.lock();
        if taken.total >= this.limit {
            return Err(this.limit);
        }
        let own = taken.by_tenant.get(&tenant).copied().unwrap_or(0);
        if own >= this.limit_each {
            return Err(this.limit_each);
        }
        taken.by_tenant.insert(tenant, own + 1);
        taken.total += 1;
        Ok(Slot { slots: Arc::clone(this), tenant })
    }

    /// How many are taken.
    pub(super) fn taken(&self) -> usize {
        self.lock().total
    }

    /// How many there are.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.slots.lock();
        taken.total -= 1;
        if let Some(own) = taken.by_tenant.get_mut(&self.tenant) {
            *own -= 1;
            if *own == 0 {
                taken.by_tenant.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_account_leaves_places_to_others_where_there_are_enough() {
        let slots = Admission::for_requests(16);
        let mut held: Vec<_> = (0..14).map(|_| Admission::take(&slots, 1).unwrap()).collect();
        assert_eq!(Admission::take(&slots, 1).unwrap_err(), 14);
        held.extend([2, 3].map(|tenant| Admission::take(&slots, tenant).unwrap()));
        assert_eq!((Admission::take(&slots, 4).unwrap_err(), slots.taken()), (16, 16));
        held.remove(0);
        assert!(Admission::take(&slots, 1).is_ok());
        drop(held);
        assert_eq!(slots.taken(), 0);
        assert!(slots.lock().by_tenant.is_empty());

        let few = Admission::for_requests(2);
        let _both = [Admission::take(&few, 1).unwrap(), Admission::take(&few, 1).unwrap()];
        assert_eq!(Admission::take(&few, 1).unwrap_err(), 2);
    }
}
