//! Choosing tokens on the device, so that only their ids come to the host.

use candle_core::{Result, Tensor, bail};
use cudarc::driver::CudaSlice;

use super::module::{Cuda, ELEMENT_THREADS, plain};
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
    let found = find_largest(cuda, &plain(logits)?, rows, vocab)?;
    let found = cuda.device.clone_dtoh(&found)?;
    let (indices, log_probabilities) = found.split_at(rows);
    let largest = |(&index, &bits): (&u32, &u32)| Largest { index, log_probability: f32::from_bits(bits) };
    Ok(indices.iter().zip(log_probabilities).map(largest).collect())
}

/// The index of the largest logit of each row in the first half, the bits of its log-probability in the second: one copy to
/// the host.
fn find_largest(cuda: &Cuda, logits: &Tensor, rows: usize, vocab: usize) -> Result<CudaSlice<u32>> {
    let out = cuda.uninitialised::<u32>(2 * rows)?;
    let (from, indices, width) = (cuda.address::<f32>(logits)?, cuda.address_of(&out), vocab as i32);
    let log_probabilities = indices + (rows * size_of::<u32>()) as u64;
    let launch =
        cuda.launch(&cuda.functions.choose_largest).arg(&from).arg(&indices).arg(&log_probabilities).arg(&width);
    // SAFETY: a block writes one index and one log-probability of as many as there are rows, of `vocab` values each.
    unsafe { launch.run([rows, 1, 1], THREADS, 96 * size_of::<f32>())? };
    Ok(out)
}

/// The log-probabilities of ids of each row of logits `[t, vocab]`, as [`Kernels::score`](crate::kernels::Kernels::score)
/// has them.
///
/// # Errors
/// The logits are not `[t, vocab]` on this device, or there are not ids for as many rows.
pub fn log_probabilities(cuda: &Cuda, logits: &Tensor, ids: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
    let (rows, vocab) = logits.dims2()?;
    if ids.len() != rows {
        bail!("ids of {} rows were given for {rows} rows", ids.len());
    }
    let asked: Vec<u32> = (0u32..).zip(ids).flat_map(|(row, ids)| ids.iter().flat_map(move |&id| [row, id])).collect();
    if asked.is_empty() {
        return Ok(vec![Vec::new(); rows]);
    }
    let logits = plain(logits)?;
    let (largest, count) = (find_largest(cuda, &logits, rows, vocab)?, asked.len() / 2);
    let (pairs, out) = (cuda.device.clone_htod(&asked)?, cuda.uninitialised::<f32>(count)?);
    let (from, best, to) = (cuda.address::<f32>(&logits)?, cuda.address_of(&largest), cuda.address_of(&out));
    let of_best = best + (rows * size_of::<u32>()) as u64;
    let (asked, width, total) = (cuda.address_of(&pairs), vocab as i32, count as i32);
    let launch = cuda.launch(&cuda.functions.pick_log_probabilities).arg(&from).arg(&best).arg(&of_best);
    let launch = launch.arg(&asked).arg(&to).arg(&width).arg(&total);
    // SAFETY: there are `count` pairs, of rows that there are; ids are compared with the vocabulary by the kernel.
    unsafe { launch.run([count.div_ceil(ELEMENT_THREADS), 1, 1], ELEMENT_THREADS, 0)? };
    let found = cuda.device.clone_dtoh(&out)?;
    let mut found = found.into_iter();
    Ok(ids.iter().map(|ids| found.by_ref().take(ids.len()).collect()).collect())
}
