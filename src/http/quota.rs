//! What a key has used of its limits: requests and tokens of late, and requests that are being answered now.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Instant,
};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use dashmap::DashMap;
use http_body::{Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::problem::{Code, Problem};
use crate::config::{Key, KeyLimits};

/// The use of every key that has limits. It outlives a reading of the keys' file.
#[derive(Debug, Default)]
pub struct Quotas(DashMap<[u8; 32], Arc<Quota>>);

impl Quotas {
    /// The use of a key; `None` for a key without limits.
    pub fn of(&self, key: &Key) -> Option<Arc<Quota>> {
        if key.limits == KeyLimits::default() {
            return None;
        }
        let mut entry = self.0.entry(key.digest).or_insert_with(|| Arc::new(Quota::new(key.limits)));
        if entry.limits != key.limits {
            *entry = Arc::new(Quota::new(key.limits));
        }
        Some(Arc::clone(&entry))
    }
}

/// The use of one key.
#[derive(Debug)]
pub struct Quota {
    limits: KeyLimits,
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    concurrent: Option<Arc<Semaphore>>,
}

/// A request that is being answered counts until this is dropped.
#[derive(Debug)]
pub struct Slot(
    #[expect(dead_code, reason = "it gives the place back when it is dropped")] Option<OwnedSemaphorePermit>,
);

impl Quota {
    fn new(limits: KeyLimits) -> Self {
        Self {
            limits,
            requests: limits.requests_per_minute.map(Bucket::new),
            tokens: limits.tokens_per_minute.map(Bucket::new),
            concurrent: limits.concurrent_requests.map(|n| Arc::new(Semaphore::new(n as usize))),
        }
    }

    /// Admits one request.
    ///
    /// # Errors
    /// A limit of the key is reached.
    pub fn admit(&self) -> Result<Slot, Problem> {
        let refused = |what: String, seconds| {
            let detail = format!("{what}; retry after the number of seconds in the Retry-After header");
            Problem { retry_after: Some(seconds), ..Problem::new(Code::RateLimited, detail) }
        };
        let slot = match &self.concurrent {
            None => None,
            Some(places) => Some(Arc::clone(places).try_acquire_owned().map_err(|_| {
                let most = self.limits.concurrent_requests.unwrap_or_default();
                refused(format!("{most} requests of this key are being answered, which is its maximum"), 1)
            })?),
        };
        // Tokens are counted when they are known, so what matters is whether earlier requests used them up.
        if let Some(tokens) = &self.tokens {
            tokens.check(0.0).map_err(|seconds| {
                let most = self.limits.tokens_per_minute.unwrap_or_default();
                refused(format!("this key may use {most} tokens a minute, and has used them"), seconds)
            })?;
        }
        if let Some(requests) = &self.requests {
            requests.check(1.0).map_err(|seconds| {
                let most = self.limits.requests_per_minute.unwrap_or_default();
                refused(format!("this key may send {most} requests a minute, and has sent them"), seconds)
            })?;
        }
        Ok(Slot(slot))
    }

    /// Counts tokens of an input or an answer.
    pub fn count_tokens(&self, tokens: usize) {
        if let Some(bucket) = &self.tokens {
            bucket.take(tokens as f64);
        }
    }
}

/// A token bucket that may run into debt: a minute's worth at the most, refilled steadily.
#[derive(Debug)]
struct Bucket {
    per_minute: f64,
    state: Mutex<(f64, Instant)>,
}

impl Bucket {
    fn new(per_minute: u32) -> Self {
        let per_minute = f64::from(per_minute);
        Self { per_minute, state: Mutex::new((per_minute, Instant::now())) }
    }

    /// Takes `amount` if it is there, and something is left in any case; else says after how many seconds it will be.
    fn check(&self, amount: f64) -> Result<(), u32> {
        let mut state = self.filled();
        let missing = amount.max(f64::MIN_POSITIVE) - state.0;
        if missing > 0.0 {
            return Err((missing / self.per_minute * 60.0).ceil().max(1.0) as u32);
        }
        state.0 -= amount;
        Ok(())
    }

    /// Takes `amount`, be it there or not.
    fn take(&self, amount: f64) {
        self.filled().0 -= amount;
    }

    fn filled(&self) -> std::sync::MutexGuard<'_, (f64, Instant)> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let (left, then) = *state;
        let refill = (now - then).as_secs_f64() / 60.0 * self.per_minute;
        *state = ((left + refill).min(self.per_minute), now);
        state
    }
}

/// A response whose request counts until its body has been sent, or dropped.
pub fn holding(slot: Slot, response: Response) -> Response {
    response.map(|body| Body::new(Held { body, _slot: slot }))
}

struct Held {
    body: Body,
    _slot: Slot,
}

impl http_body::Body for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quota(requests: Option<u32>, tokens: Option<u32>, concurrent: Option<u32>) -> Quota {
        Quota::new(KeyLimits {
            requests_per_minute: requests,
            tokens_per_minute: tokens,
            concurrent_requests: concurrent,
        })
    }

    #[test]
    fn requests_beyond_the_limit_are_refused_with_the_time_to_wait() {
        let quota = quota(Some(3), None, None);
        for _ in 0..3 {
            assert!(quota.admit().is_ok());
        }
        let refused = quota.admit().expect_err("is over the limit");
        assert_eq!((refused.code, refused.retry_after), (Code::RateLimited, Some(20)));
    }

    #[test]
    fn tokens_are_counted_afterwards_and_a_debt_is_waited_for() {
        let quota = quota(None, Some(60), None);
        assert!(quota.admit().is_ok());
        quota.count_tokens(90);
        let seconds = quota.admit().expect_err("is in debt").retry_after.unwrap_or_default();
        assert!((29..=31).contains(&seconds), "{seconds}");
    }

    #[test]
    fn a_request_that_is_answered_gives_its_place_back() {
        let quota = quota(None, None, Some(1));
        let slot = quota.admit().expect("the first");
        assert!(quota.admit().is_err());
        drop(slot);
        assert!(quota.admit().is_ok());
    }

    #[test]
    fn a_key_keeps_what_it_used_until_its_limits_change() {
        let quotas = Quotas::default();
        let mut key = Key {
            digest: [1; 32],
            name: "a".to_owned(),
            tenant: 1,
            roles: crate::config::Roles::API,
            tasks: crate::config::TaskPatterns::all(),
            expires: None,
            limits: KeyLimits::default(),
        };
        assert!(quotas.of(&key).is_none());
        key.limits.requests_per_minute = Some(1);
        assert!(quotas.of(&key).is_some_and(|quota| quota.admit().is_ok()));
        assert!(quotas.of(&key).is_some_and(|quota| quota.admit().is_err()));
        key.limits.requests_per_minute = Some(2);
        assert!(quotas.of(&key).is_some_and(|quota| quota.admit().is_ok()));
    }
}
