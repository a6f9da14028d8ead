//! The synchronisation primitives of the thread pool. `.ci/loom` compiles `threads.rs` against the primitives of the
//! loom model checker instead, which have the same names.

pub(super) use std::{
    hint::spin_loop,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread::{Builder, yield_now},
};

/// Turns of a waiting loop before a thread sleeps: some tens of microseconds. (Miri interprets each turn.)
pub(super) const SPINS: u32 = if cfg!(miri) { 20 } else { 20_000 };

/// [`std::cell::UnsafeCell`] with loom's accessors.
#[derive(Debug)]
pub(super) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

impl<T> UnsafeCell<T> {
    pub(super) fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    /// Calls `f` with a pointer that is only read through.
    pub(super) fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
        f(self.0.get())
    }

    /// Calls `f` with a pointer that may be written through.
    pub(super) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
        f(self.0.get())
    }
}
