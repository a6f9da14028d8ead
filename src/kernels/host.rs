//! Tensors as slices on the host, and sums over them that every backend's host code shares.

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};

/// Calls `f` with the values of an f32 tensor on the CPU, copied only if they are not contiguous.
///
/// # Errors
/// The tensor is of another type or on another device, or `f` fails.
pub fn with_values<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    with_array_of_values([x], |[x]| f(x))
}

/// As [`with_values`], of a number of tensors that is known where it is called: nothing is allocated for them.
///
/// # Errors
/// As there.
pub fn with_array_of_values<const N: usize, R>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> Result<R>,
) -> Result<R> {
    let mut copies = [const { None }; N];
    for (copy, x) in copies.iter_mut().zip(tensors) {
        *copy = contiguous_copy(x)?;
    }
    let guards: [_; N] = std::array::from_fn(|i| copies[i].as_ref().unwrap_or(tensors[i]).storage_and_layout());
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&guards) {
        *slice = values(storage, layout)?;
    }
    f(slices)
}

/// As [`with_values`], of several tensors, in their order.
///
/// # Errors
/// As there.
pub fn with_all_values<R>(tensors: &[&Tensor], f: impl FnOnce(&[&[f32]]) -> Result<R>) -> Result<R> {
    let tensors = tensors.iter().map(|x| x.contiguous()).collect::<Result<Vec<_>>>()?;
    let guards: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let slices = guards.iter().map(|(storage, layout)| values(storage, layout)).collect::<Result<Vec<_>>>()?;
    f(&slices)
}

/// A copy whose values lie in order, if the tensor's own do not.
fn contiguous_copy(x: &Tensor) -> Result<Option<Tensor>> {
    if x.is_contiguous() { Ok(None) } else { x.contiguous().map(Some) }
}

fn values<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    match storage {
        Storage::Cpu(CpuStorage::F32(values)) => Ok(&values[layout.start_offset()..][..layout.shape().elem_count()]),
        other => {
            bail!("f32 values on the CPU are needed, found {:?} on {:?}", other.dtype(), other.device().location())
        }
    }
}

/// The values of an operation's f32 input, whose layout says that they lie in order.
///
/// # Errors
/// They do not, or are of another type.
pub fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("values that lie in order are needed"),
    }
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
