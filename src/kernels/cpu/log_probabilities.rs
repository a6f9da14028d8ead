//! Log-probabilities of some ids of each row, of logits that are never all there: of each chunk of the vocabulary and each
//! row a maximum and a sum are kept.

use std::sync::{Mutex, PoisonError};

use super::{
    Isa, PackedMatrix,
    block::BLOCK_COLUMNS,
    dispatch,
    matmul::multiply_slices,
    pool::Pool,
    simd::{LANES, Simd},
};
use crate::kernels::rows;

/// Logits of a row in a chunk, which a thread computes at once: so many, since the first weights of a chunk are waited for.
const CHUNK: usize = 512;
const _: () = assert!(CHUNK.is_multiple_of(BLOCK_COLUMNS));

/// What is known of a chunk of the vocabulary.
#[derive(Debug, Clone, Default)]
struct Chunk {
    /// Of each row.
    rows: Vec<RowSums>,
    /// The logits of the ids that are asked for: the row, the place among its ids, the id's place in the chunk; then its logit.
    found: Vec<([usize; 3], f32)>,
}

/// What is known of a chunk of a row's logits.
#[derive(Debug, Clone, Copy)]
struct RowSums {
    /// The largest logit.
    max: f32,
    /// The sum of `e^(logit - max)`; zero of a chunk that is all negative infinity.
    sum: f32,
    /// Whether a token can be chosen from it.
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
    let mut chunks = vec![Chunk::default(); vocab.div_ceil(CHUNK)];
    for (row, ids) in ids.iter().enumerate() {
        for (i, id) in ids.iter().enumerate().filter(|(_, id)| (**id as usize) < vocab) {
            chunks[*id as usize / CHUNK].found.push(([row, i, *id as usize % CHUNK], 0.0));
        }
    }
    let chunks: Vec<Mutex<Chunk>> = chunks.into_iter().map(Mutex::new).collect();
    multiply_slices(isa, pool, x, rows, weight, bias, CHUNK, &|index, logits| {
        if let Some(cap) = softcap {
            logits.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
        }
        let width = CHUNK.min(vocab - index * CHUNK);
        let mut chunk = chunks[index].lock().unwrap_or_else(PoisonError::into_inner);
        for ([row, _, at], logit) in &mut chunk.found {
            *logit = logits[*row * width + *at];
        }
        let of = &mut chunk.rows;
        let logits: &[f32] = logits;
        // SAFETY: nothing is asked of the caller but the instructions, which `isa` has.
        unsafe { dispatch!(isa, sums(logits: &[f32], width: usize, of: &mut Vec<RowSums>)) };
    });
    let chunks: Vec<Chunk> =
        chunks.into_iter().map(|chunk| chunk.into_inner().unwrap_or_else(PoisonError::into_inner)).collect();
    let log_sums: Vec<f64> = (0..rows).map(|row| log_sum(chunks.iter().map(|chunk| chunk.rows[row]))).collect();
    let of_row = |(ids, log_sum): (&Vec<u32>, &f64)| {
        let unknown = if log_sum.is_nan() { f32::NAN } else { f32::NEG_INFINITY };
        vec![unknown; ids.len()]
    };
    let mut found: Vec<Vec<f32>> = ids.iter().zip(&log_sums).map(of_row).collect();
    for ([row, i, _], logit) in chunks.iter().flat_map(|chunk| &chunk.found) {
        found[*row][*i] = (f64::from(*logit) - log_sums[*row]) as f32;
    }
    found
}

/// The logarithm of the sum of `e^logit` of a row; NaN of one that no token can be chosen from.
fn log_sum(chunks: impl Iterator<Item = RowSums> + Clone) -> f64 {
    let max = chunks.clone().fold(f32::NEG_INFINITY, |max, chunk| max.max(chunk.max));
    let sum: f64 = chunks.clone().map(|chunk| f64::from(chunk.sum) * f64::from(chunk.max - max).exp()).sum();
    let log_sum = f64::from(max) + sum.ln();
    if chunks.into_iter().all(|chunk| chunk.is_usable) && log_sum.is_finite() { log_sum } else { f64::NAN }
}

/// The sums of a chunk of all rows `[rows, width]`.
///
/// # Safety
/// Nothing is asked of the caller but the instructions.
#[inline(always)]
unsafe fn sums<S: Simd>(logits: &[f32], width: usize, of: &mut Vec<RowSums>) {
    of.reserve(logits.len() / width);
    for row in logits.chunks_exact(width) {
        // SAFETY: as the caller says.
        of.push(unsafe { row_sums::<S>(row) });
    }
}

/// # Safety
/// Nothing is asked of the caller but the instructions.
#[inline(always)]
unsafe fn row_sums<S: Simd>(row: &[f32]) -> RowSums {
    // So many vectors at once, since a vector's maximum or sum waits for the one before.
    const AT_ONCE: usize = 4;
    let is_usable = rows::is_usable(row);
    let (whole, rest) = row.as_chunks::<{ AT_ONCE * LANES }>();
    // What is added at the end has no weight.
    let mut last = [f32::NEG_INFINITY; AT_ONCE * LANES];
    last[..rest.len()].copy_from_slice(rest);
    // SAFETY: each part holds so many vectors.
    unsafe {
        let mut largest = [S::splat(f32::NEG_INFINITY); AT_ONCE];
        for part in whole.iter().chain([&last]) {
            for (i, largest) in largest.iter_mut().enumerate() {
                *largest = S::max(S::load(part.as_ptr().add(i * LANES)), *largest);
            }
        }
        let [a, b, c, d] = largest;
        let largest = S::largest(S::max(S::max(a, b), S::max(c, d)));
        if largest == f32::NEG_INFINITY {
            return RowSums { max: largest, sum: 0.0, is_usable };
        }
        let max = S::splat(largest);
        let mut sums = [S::splat(0.0); AT_ONCE];
        for part in whole {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = S::add(*sum, S::exp(S::sub(S::load(part.as_ptr().add(i * LANES)), max)));
            }
        }
        let [a, b, c, d] = sums;
        let mut sum = S::sum(S::add(S::add(a, b), S::add(c, d)));
        if !rest.is_empty() {
            for last in last.as_chunks_mut::<LANES>().0 {
                S::store(last.as_mut_ptr(), S::exp(S::sub(S::load(last.as_ptr()), max)));
            }
            sum += last[..rest.len()].iter().sum::<f32>();
        }
        RowSums { max: largest, sum, is_usable }
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
                    let whole = Mutex::new(&mut logits);
                    let all = vocab.next_multiple_of(BLOCK_COLUMNS);
                    multiply_slices(Isa::best(), &pool, &x, rows, weight, bias, all, &|_, values| {
                        whole.lock().unwrap().extend_from_slice(values);
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
