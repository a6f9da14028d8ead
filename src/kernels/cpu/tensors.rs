//! Memory that kernels write before anything reads it.

/// A vector of `len` values that `f` initialises, without clearing them first. `f` gets a pointer to uninitialised
/// memory, which it must not make a reference of.
///
/// # Safety
/// If `f` returns, it has written all of them.
pub(super) unsafe fn written(len: usize, f: impl FnOnce(*mut f32)) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    f(values.as_mut_ptr());
    // SAFETY: the capacity is at least `len`, and the caller says that all values have been written.
    unsafe { values.set_len(len) };
    values
}
