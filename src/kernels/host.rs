//! Tensors as slices on the host, and sums over them that every backend's host code shares.

use candle_core::{CpuStorage, Result, Storage, Tensor, bail};

/// Calls `f` with the values of an f32 tensor on the CPU, copied only if they are not contiguous.
///
/// # Errors
/// The tensor is of another type or on another device, or `f` fails.
pub fn with_values<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    with_all_values(&[x], |values| f(values[0]))
}

/// As [`with_values`], of several tensors, in their order.
///
/// # Errors
/// As there.
pub fn with_all_values<R>(tensors: &[&Tensor], f: impl FnOnce(&[&[f32]]) -> Result<R>) -> Result<R> {
    let tensors = tensors.iter().map(|x| x.contiguous()).collect::<Result<Vec<_>>>()?;
    let guards: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let mut slices = Vec::with_capacity(guards.len());
    for (x, (storage, layout)) in tensors.iter().zip(&guards) {
        let Storage::Cpu(CpuStorage::F32(values)) = &**storage else {
            bail!("f32 values on the CPU are needed, found {:?} on {:?}", x.dtype(), x.device().location())
        };
        slices.push(&values[layout.start_offset()..][..layout.shape().elem_count()]);
    }
    f(&slices)
}

/// Lanes of independent sums, which the compiler can keep in one vector register.
const LANES: usize = 16;

/// The dot product of two slices of equal length.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().sum::<f32>() + tail
}
