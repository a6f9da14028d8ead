//! Log-probabilities under the model's own distribution, before temperature and penalties.

use super::{scratch::Scratch, select};
use crate::kernels::rows::{RowKernels, WeightParams};

/// The natural logarithm of the sum of the exponentials of a row of logits.
pub fn log_sum_exp(logits: &[f32], rows: &dyn RowKernels, scratch: &mut Scratch) -> f32 {
    rows.chunk_maxima(logits, &mut scratch.maxima);
    let max = scratch.maxima.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let params = WeightParams { max, inverse_temperature: 1.0, least: f32::NEG_INFINITY };
    rows.weights(logits, params, &mut scratch.weights, &mut scratch.sums);
    max + scratch.sums.iter().map(|&sum| f64::from(sum)).sum::<f64>().ln() as f32
}

/// The log-probability of one id, and the `n` likeliest with theirs, likeliest first, then those of `others` that are not
/// among them.
pub fn of_chosen(
    logits: &[f32],
    id: u32,
    n: usize,
    others: &[u32],
    rows: &dyn RowKernels,
    scratch: &mut Scratch,
) -> (Option<f32>, Vec<(u32, f32)>) {
    let log_sum = log_sum_exp(logits, rows, scratch);
    let mut top: Vec<(u32, f32)> =
        select::largest(logits, n, scratch).into_iter().map(|(id, x)| (id, x - log_sum)).collect();
    for &other in others {
        if let Some(x) = logits.get(other as usize).filter(|_| top.iter().all(|(id, _)| *id != other)) {
            top.push((other, x - log_sum));
        }
    }
    (logits.get(id as usize).map(|x| x - log_sum), top)
}
