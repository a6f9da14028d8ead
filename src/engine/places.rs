//! Places in a bounded queue, of which no account may take all.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// From this many places on, one account leaves an eighth of them to the others.
const SHARED_FROM: usize = 8;

/// How many places there are, and who has them.
#[derive(Debug)]
pub(super) struct Places {
    limit: usize,
    limit_each: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    total: usize,
    /// Only of accounts that have one.
    by_account: HashMap<u64, usize>,
}

/// One place, free again when dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    account: u64,
}

impl Places {
    /// `limit` places, of which one account gets at most `limit_each`.
    pub(super) fn new(limit: usize, limit_each: usize) -> Arc<Self> {
        Arc::new(Self { limit, limit_each, taken: Mutex::default() })
    }

    /// Places for requests: where there are some, one account does not get all, so that a light one
    /// still gets in while a busy one is refused.
    pub(super) fn for_requests(limit: usize) -> Arc<Self> {
        Self::new(limit, if limit >= SHARED_FROM { limit - limit / 8 } else { limit })
    }

    /// Takes a place; if there is none for this account, how many may wait.
    pub(super) fn take(this: &Arc<Self>, account: u64) -> Result<Place, usize> {
        let mut taken = this.lock();
        if taken.total >= this.limit {
            return Err(this.limit);
        }
        let own = taken.by_account.get(&account).copied().unwrap_or(0);
        if own >= this.limit_each {
            return Err(this.limit_each);
        }
        taken.by_account.insert(account, own + 1);
        taken.total += 1;
        Ok(Place { places: Arc::clone(this), account })
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

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.total -= 1;
        if let Some(own) = taken.by_account.get_mut(&self.account) {
            *own -= 1;
            if *own == 0 {
                taken.by_account.remove(&self.account);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_account_leaves_places_to_others_where_there_are_enough() {
        let places = Places::for_requests(16);
        let mut held: Vec<_> = (0..14).map(|_| Places::take(&places, 1).unwrap()).collect();
        assert_eq!(Places::take(&places, 1).unwrap_err(), 14);
        held.extend([2, 3].map(|account| Places::take(&places, account).unwrap()));
        assert_eq!((Places::take(&places, 4).unwrap_err(), places.taken()), (16, 16));
        held.remove(0);
        assert!(Places::take(&places, 1).is_ok());
        drop(held);
        assert_eq!(places.taken(), 0);
        assert!(places.lock().by_account.is_empty());

        let few = Places::for_requests(2);
        let _both = [Places::take(&few, 1).unwrap(), Places::take(&few, 1).unwrap()];
        assert_eq!(Places::take(&few, 1).unwrap_err(), 2);
    }
}
