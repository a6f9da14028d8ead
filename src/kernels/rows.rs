//! What choosing a token does with a row of logits on the host, `[vocab]`: a maximum, exponentials and sums, by chunks.
//!
//! A row is looked at in chunks of [`CHUNK`] values, of which a maximum or a sum is kept, so that a value is found again
//! by looking into one chunk only.

use std::fmt;

/// Values in a chunk of a row.
pub const CHUNK: usize = 256;

/// Operations on rows of f32 values. The portable ones are the default, and what others are held to.
pub trait RowKernels: fmt::Debug + Sync {
    /// The index of the largest value, the first of equals; 0 of an empty row. NaN is never the largest.
    fn argmax(&self, row: &[f32]) -> usize {
        let mut best = (0, f32::NEG_INFINITY);
        for (i, &x) in row.iter().enumerate() {
            if x > best.1 {
                best = (i, x);
            }
        }
        if best.1 == f32::NEG_INFINITY { row.iter().position(|x| *x == best.1).unwrap_or(0) } else { best.0 }
    }

    /// Whether a token can be chosen from the row: no value is NaN or positive infinity. A model may give tokens that
    /// it never writes negative infinity.
    fn is_usable(&self, row: &[f32]) -> bool {
        is_usable(row)
    }

    /// The largest value of each chunk. NaN is never the largest.
    fn chunk_maxima(&self, row: &[f32], maxima: &mut Vec<f32>) {
        maxima.clear();
        maxima.extend(row.chunks(CHUNK).map(|chunk| chunk.iter().copied().fold(f32::NEG_INFINITY, f32::max)));
    }

    /// `e^((x - max) / temperature)` of each value x that is at least `least`, 0 of the others, and the sum of each
    /// chunk.
    fn weights(&self, row: &[f32], params: WeightParams, weights: &mut Vec<f32>, sums: &mut Vec<f32>) {
        weights.clear();
        weights.extend(row.iter().map(|&x| match x >= params.least {
            true => ((x - params.max) * params.inverse_temperature).max(-87.0).exp(),
            false => 0.0,
        }));
        sums.clear();
        sums.extend(weights.chunks(CHUNK).map(|chunk| chunk.iter().sum::<f32>()));
    }

    /// The sum of each chunk, of the weights alone that rank before a token: those above `pivot`, and those equal to it
    /// at an index below `tie`.
    fn sums_before(&self, weights: &[f32], pivot: f32, tie: usize, sums: &mut Vec<f32>) {
        sums.clear();
        sums.extend(weights.chunks(CHUNK).enumerate().map(|(i, chunk)| {
            let before = |(j, w): (usize, &f32)| if ranks_before(*w, i * CHUNK + j, pivot, tie) { *w } else { 0.0 };
            chunk.iter().enumerate().map(before).sum::<f32>()
        }));
    }
}

/// See [`RowKernels::is_usable`].
#[inline(always)]
pub fn is_usable(row: &[f32]) -> bool {
    // Without branches within a chunk, so that it is compiled to vector instructions.
    row.chunks(CHUNK).all(|chunk| chunk.iter().fold(true, |usable, x| usable & (*x < f32::INFINITY)))
}

/// The natural log-probabilities of ids under the softmax of a row of logits, as
/// [`Kernels::score`](super::Kernels::score) has them.
pub fn log_probabilities(row: &[f32], ids: &[u32]) -> Vec<f32> {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let log_sum = max + row.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln();
    let log_sum = if is_usable(row) && log_sum.is_finite() { log_sum } else { f64::NAN };
    let logit = |id: &u32| row.get(*id as usize).map_or(f64::NEG_INFINITY, |x| f64::from(*x));
    ids.iter().map(|id| (logit(id) - log_sum) as f32).collect()
}

/// What [`RowKernels::weights`] computes with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WeightParams {
    /// The largest value of the row.
    pub max: f32,
    pub inverse_temperature: f32,
    /// Smaller values get no weight.
    pub least: f32,
}

/// Whether a weight at an index ranks before `pivot` at `tie`: it is larger, or as large and earlier.
pub fn ranks_before(weight: f32, index: usize, pivot: f32, tie: usize) -> bool {
    weight > pivot || weight == pivot && index < tie
}

/// The portable row kernels.
#[derive(Debug)]
pub struct PortableRows;

impl RowKernels for PortableRows {}
