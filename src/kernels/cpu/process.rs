//! Settings of the whole process that the CPU's kernels are fastest with.

/// Keeps candle from starting threads of its own, which would wait in a loop on the cores that ours compute on, unless the
/// environment says how many it may have. To be called before any thread is started; where there are others, or the system
/// does not say, it does nothing.
pub fn leave_threads_to_our_pool() {
    const VARIABLE: &str = "CANDLE_NUM_THREADS";
    let threads = std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads == 1 && std::env::var_os(VARIABLE).is_none() {
        // SAFETY: this is the only thread, so nobody reads the environment at the same time.
        unsafe { std::env::set_var(VARIABLE, "1") };
    }
}

/// Tells the allocator to keep the memory that is freed to it for the next step, instead of giving it back to the system,
/// which would clear it anew: a step of tuning allocates hundreds of megabytes, again and again the same. Only glibc is told.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// The most that glibc takes for `M_MMAP_THRESHOLD`.
        const LARGEST_THRESHOLD: libc::c_int = 32 << 20;
        // SAFETY: the calls take two numbers and may be made at any time.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST_THRESHOLD);
            libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
            libc::mallopt(libc::M_TOP_PAD, 64 << 20);
        }
    }
}

/// Gives the memory that was freed to the allocator back to the system, which can then use it for something else. Only
/// glibc keeps it otherwise.
pub fn return_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: the call takes a number and may be made at any time.
        unsafe {
            libc::malloc_trim(0);
        }
    }
}
