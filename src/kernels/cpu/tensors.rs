//! Memory that kernels write before anything reads it.

/// `len` values that `f` writes, without clearing them first.
///
/// # Safety
/// `f` writes all of them.
pub(super) unsafe fn written(len: usize, f: impl FnOnce(*mut f32)) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    f(values.as_mut_ptr());
    // SAFETY: there is room for `len`, and all of them have been written.
    unsafe { values.set_len(len) };
    values
}
