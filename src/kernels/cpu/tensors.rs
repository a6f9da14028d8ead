//! Slices for kernels: the values of a candle tensor, and the memory of a result.

use candle_core::{CpuStorage, Result, Storage, Tensor, bail};

/// Calls `f` with the values of an f32 tensor on the CPU, copied only if they do not lie in order.
///
/// # Errors
/// The tensor is of another type or elsewhere, or `f` fails.
pub fn with_values<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cpu(CpuStorage::F32(values)) = &*storage else {
        bail!("a CPU kernel was given {:?} on {:?}, not f32 on the CPU", x.dtype(), x.device())
    };
    f(&values[layout.start_offset()..][..layout.shape().elem_count()])
}

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
