//! Choosing tokens on the device, so that only their ids come to the host.

use candle_core::{Result, Tensor};

use super::module::{Cuda, plain};
use crate::kernels::Largest;

/// Threads of the one block that goes through a row.
const THREADS: usize = 1024;

/// See [`Backend::largest`](crate::kernels::Backend::largest).
///
/// # Errors
/// The logits are not `[t, vocab]` on this device.
pub fn largest(cuda: &Cuda, logits: &Tensor) -> Result<Vec<Largest>> {
    let (rows, vocab) = logits.dims2()?;
    if rows == 0 {
        return Ok(Vec::new());
    }
    let logits = plain(logits)?;
    // Indices in the first half, the bits of log-probabilities in the second: one copy to the host.
    let out = cuda.uninitialised::<u32>(2 * rows)?;
    let (from, indices, width) = (cuda.address::<f32>(&logits)?, cuda.address_of(&out), vocab as i32);
    let log_probabilities = indices + (rows * size_of::<u32>()) as u64;
    let launch =
        cuda.launch(&cuda.functions.choose_largest).arg(&from).arg(&indices).arg(&log_probabilities).arg(&width);
    // SAFETY: a block writes one index and one log-probability of as many as there are rows, of `vocab` values each.
    unsafe { launch.run([rows, 1, 1], THREADS, 96 * size_of::<f32>())? };
    let found = cuda.device.clone_dtoh(&out)?;
    let (indices, log_probabilities) = found.split_at(rows);
    let largest = |(&index, &bits): (&u32, &u32)| Largest { index, log_probability: f32::from_bits(bits) };
    Ok(indices.iter().zip(log_probabilities).map(largest).collect())
}
