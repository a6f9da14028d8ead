//! The softmax of a query's scores, and before it what a model adds to them: scale, soft cap, ALiBi.

use super::{hidden::Hidden, tile::BLOCK_SCORES};
use crate::kernels::{
    cpu::simd::{LANES, Simd},
    layout::BLOCK_SIZE,
};

/// Scales a query's scores, caps them and adds `slope` times the distance of a key's row from `origin`.
///
/// # Safety
/// `scores` is the query's row of the first of these blocks.
#[inline(always)]
pub(super) unsafe fn shape_scores<S: Simd>(
    scores: *mut f32,
    blocks: &[usize],
    scale: f32,
    softcap: Option<f32>,
    slope: f32,
    origin: f32,
) {
    const LANE: [f32; LANES] = {
        let mut lane = [0f32; LANES];
        let mut i = 0;
        while i < LANES {
            lane[i] = i as f32;
            i += 1;
        }
        lane
    };
    // SAFETY: every index is within the query's row of a block.
    unsafe {
        for i in 0..2 * blocks.len() {
            let nearest = (blocks[i / 2] * BLOCK_SIZE + i % 2 * LANES) as f32 - origin;
            let at = scores.add(i / 2 * BLOCK_SCORES + i % 2 * LANES);
            let mut score = S::mul(S::load(at), S::splat(scale));
            if let Some(softcap) = softcap {
                // tanh(x) is 1 - 2 / (1 + e^2x)
                let grown = S::add(S::exp(S::mul(score, S::splat(2.0 / softcap))), S::splat(1.0));
                score = S::sub(S::splat(softcap), S::div(S::splat(2.0 * softcap), grown));
            }
            let distance = S::add(S::load(LANE.as_ptr()), S::splat(nearest));
            S::store(at, S::fma(distance, S::splat(slope), score));
        }
    }
}

/// Turns a query's scores, times `factor`, into the softmax's weights before their division by their
/// sum, in place and, if `rounded` is not null, in bf16; the weight of hidden keys is zero.
/// Returns one over the sum.
///
/// # Safety
/// `scores` is the query's row of the first of these blocks, and so is `rounded` if it is not null.
#[inline(always)]
pub(super) unsafe fn softmax<S: Simd>(
    scores: *mut f32,
    hidden: &Hidden,
    blocks: &[usize],
    factor: f32,
    rounded: *mut u16,
) -> f32 {
    // SAFETY: every index is within the query's row of a block.
    unsafe {
        let row = |block: usize| scores.add(block * BLOCK_SCORES);
        hidden.fill(scores, blocks, f32::NEG_INFINITY);
        let mut largest = S::splat(f32::NEG_INFINITY);
        for block in 0..blocks.len() {
            let (a, b) = (S::load(row(block)), S::load(row(block).add(LANES)));
            largest = S::max(largest, S::max(a, b));
        }
        let scale = S::splat(factor);
        let largest = S::splat(S::largest(largest));
        for block in 0..blocks.len() {
            for at in [row(block), row(block).add(LANES)] {
                S::store(at, S::exp(S::mul(S::sub(S::load(at), largest), scale)));
            }
        }
        hidden.fill(scores, blocks, 0.0);
        let mut sums = [S::splat(0.0); 2];
        for block in 0..blocks.len() {
            let weights = [S::load(row(block)), S::load(row(block).add(LANES))];
            sums = [S::add(sums[0], weights[0]), S::add(sums[1], weights[1])];
            if !rounded.is_null() {
                let rounded = rounded.add(block * BLOCK_SCORES);
                S::store_bf16(rounded, weights[0]);
                S::store_bf16(rounded.add(LANES), weights[1]);
            }
        }
        S::sum(S::add(sums[0], sums[1])).recip()
    }
}
