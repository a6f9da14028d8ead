//! A pool of threads that calls one borrowed function with the numbers of tasks. One caller at a time has the threads.
//!
//! A job is published in `Shared::state`: its number, whether it is open to helpers, and how many helpers are in it.
//! Helpers count themselves in by compare-and-swap, and the caller does not return before their count is zero, so
//! what the function borrows outlives every call. `.ci/loom` checks all interleavings of small jobs.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{PoisonError, TryLockError},
};

use super::sync::{
    Arc, AtomicU64, AtomicUsize, Builder, Condvar, Mutex, MutexGuard, Ordering::*, SPINS, UnsafeCell, spin_loop,
    yield_now,
};

/// A fixed number of threads, the caller's among them.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    /// Locked by the one caller that has the threads; other callers run their tasks alone.
    busy: Mutex<()>,
    threads: usize,
}

#[derive(Debug)]
struct Shared {
    /// The job's number in the high bits, [`OPEN`] while helpers may join it, and how many have.
    state: AtomicU64,
    job: JobCell,
    /// The next task of the job that nobody has taken.
    next: AtomicUsize,
    /// The first panic of a task of the job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    asleep: Mutex<()>,
    wake: Condvar,
    sleepers: AtomicUsize,
}

/// Set while threads may join the job.
const OPEN: u64 = 1 << 31;
const HELPERS: u64 = OPEN - 1;
const NUMBER: u64 = 1 << 32;
/// The state that ends the threads.
const CLOSED: u64 = u64::MAX;

/// The job that the threads run.
#[derive(Debug)]
struct JobCell(UnsafeCell<Option<Job>>);

/// `tasks` calls of a borrowed function.
#[derive(Clone, Copy)]
struct Job {
    tasks: usize,
    run: *const (dyn Fn(usize) + Sync),
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("tasks", &self.tasks).finish_non_exhaustive()
    }
}

// SAFETY: the cell is written by the one caller that holds `busy` while the job is not open and no
// helper is in it, and read by helpers only while they are counted in `state`; the function behind
// the pointer is `Sync`.
unsafe impl Sync for JobCell {}
// SAFETY: as above.
unsafe impl Send for JobCell {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// Starts `threads - 1` threads. Where the system refuses one, there are fewer.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: JobCell(UnsafeCell::new(None)),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            asleep: Mutex::new(()),
            wake: Condvar::new(),
            sleepers: AtomicUsize::new(0),
        });
        let started = (1..threads.max(1)).take_while(|i| {
            let shared = Arc::clone(&shared);
            Builder::new().name(format!("kernels-{i}")).spawn(move || shared.help()).is_ok()
        });
        let threads = 1 + started.count();
        Self { shared, busy: Mutex::new(()), threads }
    }

    /// How many threads work on a job, the caller's among them.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// How many threads sleep at the moment.
    #[cfg(test)]
    pub(super) fn sleepers(&self) -> usize {
        self.shared.sleepers.load(SeqCst)
    }

    /// Calls `run` with each of `0..tasks`, once, on all threads, and returns when all calls have.
    /// If another caller has the threads, or there is one task, the calls are made here.
    ///
    /// # Panics
    /// If a call does: with the first panic, once no thread is in a call any more. Tasks that nobody had begun by then
    /// are not called. The pool is as before.
    pub fn run(&self, tasks: usize, run: &(dyn Fn(usize) + Sync)) {
        let free = if tasks > 1 && self.threads > 1 { self.claim() } else { None };
        let Some(busy) = free else {
            (0..tasks).for_each(run);
            return;
        };
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The pointer is used by helpers that are counted in
        // `state`, and this function does not return before their count is zero.
        let run: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(run) };
        let job = Job { tasks, run };
        // SAFETY: this caller holds `busy`, and the last job was closed and left by all helpers.
        shared.job.0.with_mut(|cell| unsafe { *cell = Some(job) });
        shared.next.store(0, Relaxed);
        shared.state.fetch_add(NUMBER + OPEN, AcqRel);
        // A read-modify-write, not a load, so that it has a place in one order with that of a thread that goes to
        // sleep: either that one came before and is seen here, or it comes after and sees the job.
        if shared.sleepers.fetch_add(0, AcqRel) > 0 {
            drop(lock(&shared.asleep));
            shared.wake.notify_all();
        }
        shared.work(job);
        shared.state.fetch_and(!OPEN, AcqRel);
        let mut turns = 0u32;
        while shared.state.load(Acquire) & HELPERS != 0 {
            turns = turns.saturating_add(1);
            // A helper whose core was taken away may be long.
            if turns > SPINS { yield_now() } else { spin_loop() }
        }
        let panic = lock(&shared.panic).take();
        drop(busy);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// The right to use the threads; `None` if another caller has it. A panic cannot leave the pool in a state that
    /// the next job does not replace, so a poisoned lock is as good as another.
    fn claim(&self) -> Option<MutexGuard<'_, ()>> {
        match self.busy.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.store(CLOSED, Release);
        drop(lock(&self.shared.asleep));
        self.shared.wake.notify_all();
    }
}

impl Shared {
    /// Takes tasks until there are none.
    fn work(&self, job: Job) {
        // SAFETY: `Pool::run` keeps the function alive until every helper has left.
        let run = unsafe { &*job.run };
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next.fetch_add(1, Relaxed);
                if task >= job.tasks {
                    break;
                }
                run(task);
            }
        }));
        if let Err(panic) = result {
            // Nobody needs the other tasks any more.
            self.next.store(job.tasks, Relaxed);
            let mut first = lock(&self.panic);
            if first.is_none() {
                *first = Some(panic);
            } else {
                // Dropping what somebody panicked with may panic, and this thread has to leave the job.
                std::mem::forget(panic);
            }
        }
    }

    /// A thread's life: wait for a job, join it, leave it.
    fn help(&self) {
        let mut last = 0;
        let mut turns = 0;
        loop {
            let state = self.state.load(Acquire);
            if state == CLOSED {
                return;
            }
            if state & OPEN != 0 && state / NUMBER != last {
                if self.state.compare_exchange(state, state + 1, AcqRel, Relaxed).is_err() {
                    continue;
                }
                last = state / NUMBER;
                // SAFETY: this thread is counted, so the job stays as it is.
                if let Some(job) = self.job.0.with(|cell| unsafe { *cell }) {
                    self.work(job);
                }
                self.state.fetch_sub(1, AcqRel);
                turns = 0;
                continue;
            }
            turns += 1;
            if turns < SPINS {
                spin_loop();
            } else {
                self.sleep(last);
                turns = 0;
            }
        }
    }

    /// Waits until there is another job than `last`, or the pool is dropped.
    fn sleep(&self, last: u64) {
        let mut asleep = lock(&self.asleep);
        self.sleepers.fetch_add(1, AcqRel);
        loop {
            let state = self.state.load(Acquire);
            if state == CLOSED || (state & OPEN != 0 && state / NUMBER != last) {
                break;
            }
            asleep = self.wake.wait(asleep).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, AcqRel);
    }
}
