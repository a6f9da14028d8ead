//! Admission in a bounded queue, of which no tenant, and no task of one, may take all.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::request::Tenant;

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
    /// By a tenant's task, and by tenant where there are keys; only of those that have one.
    by_key: HashMap<Key, usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    Owner(u64),
    Task(u64),
}

/// Whose slots a request counts to. Without keys all are one tenant's, which may take what there is.
fn keys(tenant: Tenant) -> impl Iterator<Item = Key> {
    let owner = (tenant.owner != 0).then_some(Key::Owner(tenant.owner));
    owner.into_iter().chain([Key::Task(tenant.key)])
}

/// One slot, free again when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Arc<Admission>,
    tenant: Tenant,
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
    pub(super) fn take(this: &Arc<Self>, tenant: Tenant) -> Result<Slot, usize> {
        let mut taken = this.lock();
        if taken.total >= this.limit {
            return Err(this.limit);
        }
        if keys(tenant).any(|key| taken.by_key.get(&key).copied().unwrap_or(0) >= this.limit_each) {
            return Err(this.limit_each);
        }
        for key in keys(tenant) {
            *taken.by_key.entry(key).or_default() += 1;
        }
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
        for key in keys(self.tenant) {
            if let Some(own) = taken.by_key.get_mut(&key) {
                *own -= 1;
                if *own == 0 {
                    taken.by_key.remove(&key);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_task_or_tenant_leaves_places_to_others_where_there_are_enough() {
        let of = |key| Tenant { key, ..Tenant::default() };
        let slots = Admission::for_requests(16);
        let mut held: Vec<_> = (0..14).map(|_| Admission::take(&slots, of(1)).unwrap()).collect();
        assert_eq!(Admission::take(&slots, of(1)).unwrap_err(), 14);
        held.extend([2, 3].map(|key| Admission::take(&slots, of(key)).unwrap()));
        assert_eq!((Admission::take(&slots, of(4)).unwrap_err(), slots.taken()), (16, 16));
        held.remove(0);
        assert!(Admission::take(&slots, of(1)).is_ok());
        drop(held);
        assert_eq!(slots.taken(), 0);
        assert!(slots.lock().by_key.is_empty());

        let few = Admission::for_requests(2);
        let _both = [Admission::take(&few, of(1)).unwrap(), Admission::take(&few, of(1)).unwrap()];
        assert_eq!(Admission::take(&few, of(1)).unwrap_err(), 2);

        // Where there are keys, the tasks of one tenant together leave some to other tenants.
        let slots = Admission::for_requests(16);
        let of = |owner, key| Tenant { owner, key, weight: 1.0 };
        let held: Vec<_> = (0..14).map(|key| Admission::take(&slots, of(7, key)).unwrap()).collect();
        assert_eq!(Admission::take(&slots, of(7, 99)).unwrap_err(), 14);
        assert!(Admission::take(&slots, of(8, 100)).is_ok());
        drop(held);
        assert!(slots.lock().by_key.is_empty());
    }
}
