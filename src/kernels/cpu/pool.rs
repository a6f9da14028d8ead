//! The threads that kernels run on. They wait a moment for more work before they sleep, because a
//! forward pass hands out hundreds of small pieces with next to nothing between them.

mod sync;
mod threads;

use std::{sync::OnceLock, thread};

pub use threads::Pool;

static GLOBAL: OnceLock<Pool> = OnceLock::new();

/// Sets the number of threads of [`global`], if it is not in use yet; false if it is.
pub fn set_threads(threads: usize) -> bool {
    GLOBAL.set(Pool::new(threads)).is_ok()
}

/// The pool of this process: one thread for each core, unless [`set_threads`] said otherwise.
pub fn global() -> &'static Pool {
    GLOBAL.get_or_init(|| Pool::new(thread::available_parallelism().map_or(1, usize::from)))
}

#[cfg(test)]
mod tests {
    use std::{
        panic::{AssertUnwindSafe, catch_unwind},
        sync::{
            Mutex,
            atomic::{AtomicUsize, Ordering::*},
        },
        time::{Duration, Instant},
    };

    use super::*;

    /// Repetitions of a test that looks for a race; fewer under Miri, which interprets.
    const TIMES: usize = if cfg!(miri) { 5 } else { 200 };

    /// Runs as many tasks as there are threads, each of which waits for all others; false if they have not met after
    /// a while, as when one thread runs one task after another.
    fn all_threads_meet(pool: &Pool) -> bool {
        let met = AtomicUsize::new(0);
        let late = Instant::now() + Duration::from_secs(60);
        pool.run(pool.threads(), &|_| {
            met.fetch_add(1, SeqCst);
            while met.load(SeqCst) < pool.threads() && Instant::now() < late {
                thread::yield_now();
            }
        });
        Instant::now() < late
    }

    #[test]
    fn every_task_runs_once_however_many_callers_there_are() {
        let pool = Pool::new(3);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for tasks in [0, 1, 2, 7, 100] {
                        for _ in 0..TIMES {
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
    fn a_panic_in_a_task_reaches_the_caller_and_the_threads_still_work_side_by_side() {
        let pool = Pool::new(4);
        for at in [0, 5, 63] {
            let caught = catch_unwind(AssertUnwindSafe(|| pool.run(64, &|i| assert_ne!(i, at, "task {i}"))));
            let message = *caught.unwrap_err().downcast::<String>().unwrap();
            assert!(message.contains(&format!("task {at}")), "{message}");
            assert!(all_threads_meet(&pool), "the pool has become serial");
            let sum = AtomicUsize::new(0);
            pool.run(10, &|i| {
                sum.fetch_add(i, Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn panics_in_all_tasks_at_once_reach_the_caller_as_one() {
        /// Panics when it is dropped, as what somebody panics with may.
        struct Bad;
        impl Drop for Bad {
            fn drop(&mut self) {
                if !thread::panicking() {
                    panic!("dropped");
                }
            }
        }
        let pool = Pool::new(3);
        let met = AtomicUsize::new(0);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(3, &|_| {
                met.fetch_add(1, SeqCst);
                while met.load(SeqCst) < 3 {
                    thread::yield_now();
                }
                std::panic::panic_any(Bad);
            });
        }));
        std::mem::forget(caught.unwrap_err());
        assert!(all_threads_meet(&pool));
    }

    #[test]
    fn a_task_may_use_the_pool_itself() {
        let pool = Pool::new(2);
        let sums = Mutex::new(0);
        pool.run(4, &|i| pool.run(3, &|j| *sums.lock().unwrap() += i * 10 + j));
        assert_eq!(sums.into_inner().unwrap(), 192);
    }

    #[test]
    fn sleeping_threads_wake_for_work() {
        let pool = Pool::new(2);
        for _ in 0..3 {
            // Until the other thread has gone to sleep.
            while pool.sleepers() == 0 {
                thread::yield_now();
            }
            assert!(all_threads_meet(&pool));
        }
    }
}
