//! Runs small jobs of the thread pool in every order in which their threads' steps can interleave (up to a number of
//! preemptions), with the reorderings that the memory model allows. A lost wake-up shows as a deadlock, a job that is
//! read while it is replaced as a data race.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Instant,
};

use loom::{
    model::Builder,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::*},
    },
};
use threads::Pool;

/// What `src/kernels/cpu/pool/sync.rs` names, of loom.
mod sync {
    pub(super) use loom::{
        cell::UnsafeCell,
        hint::spin_loop,
        sync::{
            Arc, Condvar, Mutex, MutexGuard,
            atomic::{AtomicU64, AtomicUsize, Ordering},
        },
        thread::{Builder, yield_now},
    };

    /// A thread looks once, then sleeps, so that models stay small.
    pub(super) const SPINS: u32 = 1;
}

#[path = "../../../src/kernels/cpu/pool/threads.rs"]
mod threads;

/// Runs `tasks` tasks and asserts that each has run once when they return, with all that it wrote.
fn each_once(pool: &Pool, tasks: usize) {
    let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
    pool.run(tasks, &|i| {
        counts[i].fetch_add(1, Relaxed);
    });
    assert!(counts.iter().all(|count| count.load(Relaxed) == 1));
}

fn check(name: &str, preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let began = Instant::now();
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
    println!("{name}: holds ({:.1} s)", began.elapsed().as_secs_f64());
}

fn main() {
    // Panics that models provoke are not worth a message; those of the checker itself are.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if panic.payload().downcast_ref::<&str>() != Some(&"provoked") {
            report(panic);
        }
    }));
    check("two threads run every task once, job after job", 3, || {
        let pool = Pool::new(2);
        assert_eq!(pool.threads(), 2);
        each_once(&pool, 2);
        each_once(&pool, 3);
    });
    check("three threads run every task once", 2, || each_once(&Pool::new(3), 3));
    check("a panic reaches the caller and the next job runs whole", 3, || {
        let pool = Pool::new(2);
        let ended = AtomicUsize::new(0);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(2, &|i| {
                if i == 0 {
                    std::panic::panic_any("provoked");
                }
                ended.fetch_add(1, Relaxed);
            });
        }));
        assert_eq!(caught.unwrap_err().downcast_ref::<&str>(), Some(&"provoked"));
        assert!(ended.load(Relaxed) <= 1);
        each_once(&pool, 2);
    });
    // Each task waits for the other: a sleeping thread that is not woken leaves the caller waiting without an end, which
    // loom reports as too many branches.
    check("two tasks that wait for each other have two threads", 3, || {
        let pool = Pool::new(2);
        let met = AtomicUsize::new(0);
        pool.run(2, &|_| {
            met.fetch_add(1, AcqRel);
            while met.load(Acquire) < 2 {
                loom::thread::yield_now();
            }
        });
    });
    check("two callers at once", 2, || {
        let pool = Arc::new(Pool::new(2));
        let other = Arc::clone(&pool);
        let caller = loom::thread::spawn(move || each_once(&other, 2));
        each_once(&pool, 2);
        caller.join().unwrap();
    });
}
