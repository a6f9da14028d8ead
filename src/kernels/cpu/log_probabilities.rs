//! Log-probabilities of some ids of each row, of logits that are never all there: a slice of the vocabulary after
//! another is multiplied, and of each chunk of a row a maximum and a sum are kept.

use std::sync::{Mutex, PoisonError};

use super::{
    Isa, PackedMatrix,
    block::BLOCK_COLUMNS,
    dispatch,
    matmul::multiply_slices,
    pool::Pool,
    simd::{LANES, Simd},
};
use crate::kernels::rows::{self, CHUNK};

const _: () = assert!(CHUNK.is_multiple_of(BLOCK_COLUMNS));

/// Bytes of the logits of a slice, so that they stay in the L2 caches.
const SLICE_BYTES: usize = 2 << 20;

/// What is known of one row.
#[derive(Debug, Clone)]
struct Row {
    /// The largest logit of each chunk, and the sum of `e^(logit - that)`.
    chunks: Vec<(f32, f32)>,
    /// The logits of the ids that are asked for.
    found: Vec<f32>,
    is_usable: bool,
}

/// Of each row of `x` `[rows, k]` the natural log-probabilities of ids under the softmax of its logits `x Wᵀ + bias`,
/// which `softcap` limits to `cap * tanh(logit / cap)`. All are NaN of a row that no token can be chosen from; that of an
/// id outside of the vocabulary is negative infinity.
///
/// # Panics
/// If a shape does not fit.
pub fn log_probabilities(
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    weight: &PackedMatrix,
    bias: Option<&[f32]>,
    softcap: Option<f32>,
    ids: &[Vec<u32>],
) -> Vec<Vec<f32>> {
    let (rows, vocab) = (ids.len(), weight.n());
    let empty = |ids: &Vec<u32>| {
        let found = vec![f32::NEG_INFINITY; ids.len()];
        Mutex::new(Row { chunks: Vec::with_capacity(vocab.div_ceil(CHUNK)), found, is_usable: true })
    };
    let states: Vec<Mutex<Row>> = ids.iter().map(empty).collect();
    let columns = (SLICE_BYTES / (size_of::<f32>() * rows.max(1)) / CHUNK).max(1) * CHUNK;
    multiply_slices(isa, pool, x, rows, weight, bias, columns, |start, logits| {
        let values: Vec<Mutex<&mut [f32]>> =
            logits.chunks_exact_mut(columns.min(vocab - start)).map(Mutex::new).collect();
        pool.run(rows, &|i| {
            let mut row = values[i].lock().unwrap_or_else(PoisonError::into_inner);
            let mut state = states[i].lock().unwrap_or_else(PoisonError::into_inner);
            let row: &mut [f32] = &mut row;
            if let Some(cap) = softcap {
                row.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
            }
            let of: &mut Row = &mut state;
            // SAFETY: nothing is asked of the caller but the instructions, which `isa` has.
            unsafe { dispatch!(isa, chunk_sums(row: &[f32], of: &mut Row)) };
            for (id, found) in ids[i].iter().zip(&mut of.found) {
                if let Some(x) = (*id as usize).checked_sub(start).and_then(|at| row.get(at)) {
                    *found = *x;
                }
            }
        });
    });
    states.into_iter().map(|row| row.into_inner().unwrap_or_else(PoisonError::into_inner).finish()).collect()
}

impl Row {
    fn finish(self) -> Vec<f32> {
        let max = self.chunks.iter().fold(f32::NEG_INFINITY, |max, chunk| max.max(chunk.0));
        let sum: f64 =
            self.chunks.iter().map(|&(of_chunk, sum)| f64::from(sum) * f64::from(of_chunk - max).exp()).sum();
        let log_sum = f64::from(max) + sum.ln();
        let log_sum = if self.is_usable && log_sum.is_finite() { log_sum } else { f64::NAN };
        self.found.into_iter().map(|x| (f64::from(x) - log_sum) as f32).collect()
    }
}

/// Notes of each chunk of a row its largest value and the sum of `e^(value - largest)`, zero of a chunk that is all negative
/// infinity, and whether a token can be chosen from it.
///
/// # Safety
/// Nothing is asked of the caller but the instructions.
#[inline(always)]
unsafe fn chunk_sums<S: Simd>(row: &[f32], of: &mut Row) {
    let Row { chunks, is_usable, .. } = of;
    for chunk in row.chunks(CHUNK) {
        *is_usable &= rows::is_usable(chunk);
        let (whole, rest) = chunk.as_chunks::<LANES>();
        // What is added at the end has no weight.
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..rest.len()].copy_from_slice(rest);
        // SAFETY: each part holds a vector.
        unsafe {
            let mut largest = S::load(last.as_ptr());
            for part in whole {
                largest = S::max(S::load(part.as_ptr()), largest);
            }
            let largest = S::largest(largest);
            if largest == f32::NEG_INFINITY {
                chunks.push((largest, 0.0));
                continue;
            }
            let max = S::splat(largest);
            let mut sum = S::splat(0.0);
            for part in whole {
                sum = S::add(sum, S::exp(S::sub(S::load(part.as_ptr()), max)));
            }
            let mut sum = S::sum(sum);
            if !rest.is_empty() {
                S::store(last.as_mut_ptr(), S::exp(S::sub(S::load(last.as_ptr()), max)));
                sum += last[..rest.len()].iter().sum::<f32>();
            }
            chunks.push((largest, sum));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_those_of_whole_rows_however_many_rows_there_are_and_nan_where_no_token_can_be_chosen() {
        let pool = Pool::new(2);
        for (vocab, k) in [(1, 8), (300, 40), (5000, 33)] {
            let values = |n: usize, seed: usize| -> Vec<f32> {
                (0..n).map(|i| (((i + seed) * 7919) % 1013) as f32 / 500.0 - 1.0).collect()
            };
            let (weights, bias) = (values(vocab * k, 3), values(vocab, 5));
            let matrices = [
                PackedMatrix::from_f32(&weights, vocab, k).unwrap(),
                PackedMatrix::from_f32_rounded(&weights, vocab, k).unwrap(),
            ];
            for rows in [1, 5, 130] {
                let x = values(rows * k, rows);
                let ids: Vec<Vec<u32>> = (0..rows as u32)
                    .map(|i| (0..i % 4).map(|j| (i * 37 + j * 1999) % vocab as u32).collect())
                    .collect();
                for (matrix, bias, softcap) in [(0, None, None), (0, Some(&bias[..]), Some(2.0)), (1, None, None)] {
                    let weight = &matrices[matrix];
                    let mut logits = Vec::new();
                    let all = vocab.next_multiple_of(BLOCK_COLUMNS);
                    multiply_slices(Isa::best(), &pool, &x, rows, weight, bias, all, |_, values| {
                        logits.extend_from_slice(values);
                    });
                    let run =
                        |isa, x: &[f32], ids: &[Vec<u32>]| log_probabilities(isa, &pool, x, weight, bias, softcap, ids);
                    let found = run(Isa::best(), &x, &ids);
                    for (i, row) in logits.chunks_exact(vocab).enumerate() {
                        let capped = |x: f32| f64::from(softcap.map_or(x, |cap: f32| cap * (x / cap).tanh()));
                        let sum: f64 = row.iter().map(|&x| capped(x).exp()).sum();
                        for (id, found) in ids[i].iter().zip(&found[i]) {
                            let expected = capped(row[*id as usize]) - sum.ln();
                            assert!((f64::from(*found) - expected).abs() < 1e-5, "{vocab} {rows}: {found} {expected}");
                        }
                        let alone = run(Isa::best(), &x[i * k..][..k], &ids[i..=i]);
                        assert_eq!(alone[0], found[i], "other bits alone");
                    }
                    for isa in Isa::available() {
                        for (a, b) in run(isa, &x, &ids).iter().flatten().zip(found.iter().flatten()) {
                            assert!((a - b).abs() < 2e-3, "{isa:?}: {a} {b}");
                        }
                    }
                }
            }
            let mut bad = values(2 * k, 1);
            bad[0] = f32::NAN;
            let found =
                log_probabilities(Isa::best(), &pool, &bad, &matrices[0], None, None, &[vec![0], vec![0, 9999]]);
            assert!(found[0][0].is_nan() && found[1][0].is_finite() && found[1][1] == f32::NEG_INFINITY);
        }
    }
}
