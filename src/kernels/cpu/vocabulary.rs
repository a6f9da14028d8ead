//! Rows of logits in vector instructions: maxima, exponentials and sums of chunks.

use super::{
    Isa, dispatch, rows,
    simd::{LANES, Simd},
};
use crate::kernels::rows::{CHUNK, RowKernels, WeightParams, ranks_before};

/// Row kernels for the instructions of this processor.
#[derive(Debug, Clone, Copy)]
pub struct CpuRows(pub Isa);

impl RowKernels for CpuRows {
    fn argmax(&self, row: &[f32]) -> usize {
        rows::argmax(self.0, row)
    }

    fn chunk_maxima(&self, row: &[f32], maxima: &mut Vec<f32>) {
        maxima.clear();
        maxima.resize(row.len().div_ceil(CHUNK), 0.0);
        let to = maxima.as_mut_ptr();
        // SAFETY: `to` is valid for one value a chunk.
        unsafe { dispatch!(self.0, maxima_of(row: &[f32], to: *mut f32)) };
    }

    fn weights(&self, row: &[f32], params: WeightParams, weights: &mut Vec<f32>, sums: &mut Vec<f32>) {
        weights.resize(row.len(), 0.0);
        sums.clear();
        sums.resize(row.len().div_ceil(CHUNK), 0.0);
        let (to, to_sums) = (weights.as_mut_ptr(), sums.as_mut_ptr());
        // SAFETY: `to` is as long as the row, and `to_sums` is valid for one value a chunk.
        unsafe {
            dispatch!(self.0, weights_of(row: &[f32], params: WeightParams, to: *mut f32, to_sums: *mut f32));
        }
        // Few values that are below the least are cleared by a loop that the compiler can vectorise.
        if params.least > f32::NEG_INFINITY {
            for (chunk, (weights, sum)) in row.chunks(CHUNK).zip(weights.chunks_mut(CHUNK).zip(sums.iter_mut())) {
                for (x, weight) in chunk.iter().zip(weights.iter_mut()) {
                    *weight = if *x >= params.least { *weight } else { 0.0 };
                }
                *sum = lane_sum(weights, |_, w| w);
            }
        }
    }

    fn sums_before(&self, weights: &[f32], pivot: f32, tie: usize, sums: &mut Vec<f32>) {
        sums.clear();
        sums.extend(weights.chunks(CHUNK).enumerate().map(|(i, chunk)| {
            let (start, end) = (i * CHUNK, i * CHUNK + chunk.len());
            match (end <= tie, start >= tie) {
                (true, _) => lane_sum(chunk, |_, w| if w >= pivot { w } else { 0.0 }),
                (_, true) => lane_sum(chunk, |_, w| if w > pivot { w } else { 0.0 }),
                _ => lane_sum(chunk, |j, w| if ranks_before(w, start + j, pivot, tie) { w } else { 0.0 }),
            }
        }));
    }
}

/// The sum of a function of each value, in lanes of independent sums.
#[inline]
fn lane_sum(chunk: &[f32], of: impl Fn(usize, f32) -> f32) -> f32 {
    let mut sums = [0f32; LANES];
    let (whole, rest) = chunk.as_chunks::<LANES>();
    for (i, part) in whole.iter().enumerate() {
        for j in 0..LANES {
            sums[j] += of(i * LANES + j, part[j]);
        }
    }
    let start = whole.len() * LANES;
    sums.iter().sum::<f32>() + rest.iter().enumerate().map(|(j, &w)| of(start + j, w)).sum::<f32>()
}

/// # Safety
/// `to` is valid for one value a chunk of the row.
#[inline(always)]
unsafe fn maxima_of<S: Simd>(row: &[f32], to: *mut f32) {
    for (i, chunk) in row.chunks(CHUNK).enumerate() {
        let (whole, rest) = chunk.as_chunks::<LANES>();
        // SAFETY: each part holds a vector, and `i` is below the number of chunks.
        unsafe {
            let mut acc = S::splat(f32::NEG_INFINITY);
            for part in whole {
                // The second operand stays where the first is no number.
                acc = S::max(S::load(part.as_ptr()), acc);
            }
            *to.add(i) = rest.iter().copied().fold(S::largest(acc), f32::max);
        }
    }
}

/// # Safety
/// `to` is valid for as many values as the row has, `sums` for one a chunk.
#[inline(always)]
unsafe fn weights_of<S: Simd>(row: &[f32], params: WeightParams, to: *mut f32, sums: *mut f32) {
    // SAFETY: every index is below the length of the row; the last values pass through a vector of their own.
    unsafe {
        let (max, inverse) = (S::splat(params.max), S::splat(params.inverse_temperature));
        let weight = |x: S::V| S::exp(S::mul(S::sub(x, max), inverse));
        for (i, chunk) in row.chunks(CHUNK).enumerate() {
            let to = to.add(i * CHUNK);
            let (whole, rest) = chunk.as_chunks::<LANES>();
            let mut acc = S::splat(0.0);
            for (j, part) in whole.iter().enumerate() {
                let w = weight(S::load(part.as_ptr()));
                S::store(to.add(j * LANES), w);
                acc = S::add(acc, w);
            }
            let mut sum = S::sum(acc);
            if !rest.is_empty() {
                let mut last = [params.max; LANES];
                last[..rest.len()].copy_from_slice(rest);
                S::store(last.as_mut_ptr(), weight(S::load(last.as_ptr())));
                for (j, w) in last[..rest.len()].iter().enumerate() {
                    *to.add(whole.len() * LANES + j) = *w;
                    sum += w;
                }
            }
            *sums.add(i) = sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::rows::PortableRows;

    fn close(a: &[f32], b: &[f32], what: &str) {
        assert_eq!(a.len(), b.len(), "{what}");
        a.iter().zip(b).for_each(|(a, b)| assert!((a - b).abs() <= 2e-6 * (b.abs() + 1e-3), "{what}: {a} and {b}"));
    }

    #[test]
    fn every_instruction_set_gives_what_the_portable_kernels_give_on_odd_lengths() {
        for n in [0, 1, 15, 17, 255, 256, 257, 5000] {
            let row: Vec<f32> = (0..n).map(|i| ((i * 7919) % 1009) as f32 / 50.0 - 12.0).collect();
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for isa in Isa::available() {
                let (own, what) = (CpuRows(isa), format!("{isa:?} {n}"));
                assert_eq!(own.argmax(&row), PortableRows.argmax(&row), "{what}");
                let (mut a, mut b) = (Vec::new(), Vec::new());
                own.chunk_maxima(&row, &mut a);
                PortableRows.chunk_maxima(&row, &mut b);
                assert_eq!(a, b, "{what}");
                for (inverse_temperature, least) in [(1.0, f32::NEG_INFINITY), (1.0 / 0.7, 2.0), (30.0, -3.0)] {
                    let params = WeightParams { max, inverse_temperature, least };
                    // What is left of another row must not show.
                    let (mut weights, mut sums) = (vec![f32::NAN; 9000], vec![f32::NAN; 3]);
                    own.weights(&row, params, &mut weights, &mut sums);
                    let (mut expected, mut expected_sums) = (Vec::new(), Vec::new());
                    PortableRows.weights(&row, params, &mut expected, &mut expected_sums);
                    close(&weights, &expected, &what);
                    close(&sums, &expected_sums, &what);
                    for tie in [0, n / 3, n / 2, n] {
                        let pivot = expected.get(tie).copied().unwrap_or(0.01);
                        own.sums_before(&expected, pivot, tie, &mut sums);
                        PortableRows.sums_before(&expected, pivot, tie, &mut expected_sums);
                        close(&sums, &expected_sums, &what);
                    }
                }
            }
        }
    }
}
