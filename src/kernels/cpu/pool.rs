//! The threads that kernels run on. They wait a moment for more work before they sleep, because a
//! forward pass hands out hundreds of small pieces with next to nothing between them.

use std::{
    cell::UnsafeCell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::*},
    },
    thread,
};

/// Turns of the waiting loop before a thread sleeps: some tens of microseconds.
const SPINS: u32 = 20_000;

/// A fixed number of threads, the caller's among them.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    /// Held by the one caller that has the threads; others do their work alone.
    busy: Mutex<()>,
    threads: usize,
}

#[derive(Debug)]
struct Shared {
    /// The job's number in the high bits, [`OPEN`] while it takes helpers, and how many it has.
    state: AtomicU64,
    job: JobCell,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
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

/// What the threads run: `tasks` calls of a borrowed function.
#[derive(Debug)]
struct JobCell(UnsafeCell<Option<Job>>);

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

static GLOBAL: OnceLock<Pool> = OnceLock::new();

/// Sets the number of threads of [`global`], if it is not in use yet; false if it is.
pub fn set_threads(threads: usize) -> bool {
    GLOBAL.set(Pool::new(threads)).is_ok()
}

/// The pool of this process: one thread for each core, unless [`set_threads`] said otherwise.
pub fn global() -> &'static Pool {
    GLOBAL.get_or_init(|| Pool::new(thread::available_parallelism().map_or(1, usize::from)))
}

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
            thread::Builder::new().name(format!("kernels-{i}")).spawn(move || shared.help()).is_ok()
        });
        let threads = 1 + started.count();
        Self { shared, busy: Mutex::new(()), threads }
    }

    /// How many threads work on a job.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `run` with each of `0..tasks`, once, on all threads, and returns when all calls have.
    /// If another caller has the threads, or there is one task, the calls are made here.
    ///
    /// # Panics
    /// If a call does.
    pub fn run(&self, tasks: usize, run: &(dyn Fn(usize) + Sync)) {
        let free = if tasks > 1 && self.threads > 1 { self.busy.try_lock().ok() } else { None };
        let Some(_busy) = free else {
            (0..tasks).for_each(run);
            return;
        };
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The pointer is used by helpers that are counted in
        // `state`, and this function does not return before their count is zero.
        let run: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(run) };
        let job = Job { tasks, run };
        // SAFETY: this caller holds `busy`, and the last job was closed and left by all helpers.
        unsafe { *shared.job.0.get() = Some(job) };
        shared.next.store(0, Relaxed);
        // In one order with the look at `sleepers`: a thread goes to sleep either before it, and is
        // woken, or after it, and sees the job.
        shared.state.fetch_add(NUMBER + OPEN, SeqCst);
        if shared.sleepers.load(SeqCst) > 0 {
            drop(lock(&shared.asleep));
            shared.wake.notify_all();
        }
        shared.work(job);
        shared.state.fetch_and(!OPEN, AcqRel);
        let mut turns = 0u32;
        while shared.state.load(Acquire) & HELPERS != 0 {
            turns += 1;
            // A helper whose core was taken away may be long.
            if turns > SPINS { thread::yield_now() } else { std::hint::spin_loop() }
        }
        let panic = lock(&shared.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.store(CLOSED, SeqCst);
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
            lock(&self.panic).get_or_insert(panic);
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
                if let Some(job) = unsafe { *self.job.0.get() } {
                    self.work(job);
                }
                self.state.fetch_sub(1, AcqRel);
                turns = 0;
                continue;
            }
            turns += 1;
            if turns < SPINS {
                std::hint::spin_loop();
            } else {
                self.sleep(last);
                turns = 0;
            }
        }
    }

    fn sleep(&self, last: u64) {
        let mut asleep = lock(&self.asleep);
        self.sleepers.fetch_add(1, SeqCst);
        loop {
            let state = self.state.load(SeqCst);
            if state == CLOSED || (state & OPEN != 0 && state / NUMBER != last) {
                break;
            }
            asleep = self.wake.wait(asleep).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_however_many_callers_there_are() {
        let pool = Pool::new(3);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for tasks in [0, 1, 2, 7, 100] {
                        for _ in 0..200 {
                            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                            pool.run(tasks, &|i| {
                                counts[i].fetch_add(1, Relaxed);
                            });
                            assert!(counts.iter().all(|c| c.load(Relaxed) == 1));
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_leaves_the_pool_sound() {
        let pool = Pool::new(2);
        for at in [0, 5, 63] {
            let caught = catch_unwind(AssertUnwindSafe(|| pool.run(64, &|i| assert_ne!(i, at))));
            assert!(caught.is_err());
            let sum = AtomicUsize::new(0);
            pool.run(10, &|i| {
                sum.fetch_add(i, Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn sleeping_threads_wake_for_work() {
        let pool = Pool::new(2);
        for _ in 0..3 {
            // Until the other thread has gone to sleep.
            while pool.shared.sleepers.load(SeqCst) == 0 {
                thread::yield_now();
            }
            // Two tasks that wait for each other need two threads.
            let met = AtomicUsize::new(0);
            pool.run(2, &|_| {
                met.fetch_add(1, SeqCst);
                while met.load(SeqCst) < 2 {
                    thread::yield_now();
                }
            });
        }
    }
}
