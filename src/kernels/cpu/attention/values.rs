//! The weighted sum of the values that a tile's queries see.

use super::{
    Ahead, Step,
    tile::{BLOCK_SCORES, TILE_ROWS},
};
#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu::amx;
use crate::kernels::{
    cpu::{
        Precision,
        simd::{LANES, Simd},
    },
    layout::BLOCK_SIZE,
};

#[repr(align(64))]
struct Tile([f32; TILE_ROWS * 64]);

/// The values of all blocks, weighted: `sums` `[16][dim]`.
///
/// # Safety
/// `planes` says where blocks of the cache begin, and the pointers are valid for the step's shapes, as many blocks and 16
/// rows.
#[inline(always)]
pub(super) unsafe fn weigh_values<S: Simd>(
    step: &Step,
    planes: &[usize],
    head: usize,
    count: usize,
    scores: *const f32,
    weights: *const u32,
    sums: *mut f32,
) {
    #[cfg(target_arch = "x86_64")]
    if step.isa.has_tiles() && step.precision == Precision::Bf16 {
        let mut tile = Tile([0f32; TILE_ROWS * 64]);
        let next = match planes.first() {
            Some(&first) if head + 1 < step.kv_heads => step.keys(first, head + 1),
            _ => std::ptr::null_mut(),
        };
        for d in (0..step.dim).step_by(64) {
            let values = amx::Values {
                base: step.words.wrapping_add(step.head_offset(head) + step.plane + d),
                offsets: planes,
                dims: step.dim,
                // All dimensions of the next block's values are prefetched with the first ones of this one's.
                lines: if d == 0 { step.plane / LANES } else { 0 },
                next,
            };
            let n = (step.dim - d).min(64);
            // SAFETY: as the caller says; 64 or, at the end, 32 dimensions are left.
            unsafe {
                amx::configure();
                match n == 64 {
                    true => amx::weigh_values::<true>(weights, values, tile.0.as_mut_ptr()),
                    false => amx::weigh_values::<false>(weights, values, tile.0.as_mut_ptr()),
                }
                for (i, row) in tile.0.chunks_exact(64).enumerate().take(count) {
                    std::ptr::copy_nonoverlapping(row.as_ptr(), sums.add(i * step.dim + d), n);
                }
            }
        }
        return;
    }
    for i in 0..count {
        let mut d = 0;
        while d < step.dim {
            // SAFETY: as the caller says.
            unsafe {
                let (scores, weights) = (scores.add(i * BLOCK_SIZE), weights.add(i * BLOCK_SIZE / 2));
                let row = Row { planes, head, scores, weights, first: i == 0 };
                let sums = sums.add(i * step.dim + d);
                d += match step.dim - d {
                    left if left >= 4 * LANES => row_values::<S, 4>(step, row, d, sums),
                    _ => row_values::<S, 1>(step, row, d, sums),
                };
            }
        }
    }
}

/// One query of a tile.
#[derive(Clone, Copy)]
struct Row<'a> {
    /// Where each block begins.
    planes: &'a [usize],
    head: usize,
    /// Its row of the first block's scores, and of the weights in bf16.
    scores: *const f32,
    weights: *const u32,
    /// It is the tile's first, which prefetches what is read next.
    first: bool,
}

/// One query's `C` vectors of dimensions from `d` on.
///
/// # Safety
/// As [`weigh_values`].
#[inline(always)]
unsafe fn row_values<S: Simd, const C: usize>(step: &Step, row: Row, d: usize, sums: *mut f32) -> usize {
    let Row { planes, head, scores, weights, first } = row;
    // SAFETY: as the caller says.
    unsafe {
        let mut acc = [S::splat(0.0); C];
        for (i, &plane) in planes.iter().enumerate() {
            let ahead = if first && d == 0 { step.after_values(planes, i, head) } else { Ahead::NOTHING };
            let values = step.keys(plane, head).add(step.plane + d);
            match step.precision {
                Precision::F32 => {
                    for position in 0..BLOCK_SIZE {
                        ahead.prefetch(position, step.dim);
                        let weight = S::splat(*scores.add(i * BLOCK_SCORES + position));
                        let values = values.cast::<f32>().add(position * step.dim);
                        for (c, acc) in acc.iter_mut().enumerate() {
                            *acc = S::fma(S::load(values.add(c * LANES)), weight, *acc);
                        }
                    }
                }
                Precision::Bf16 => {
                    for pair in 0..BLOCK_SIZE / 2 {
                        ahead.prefetch(pair, step.dim);
                        let weight = *weights.add(i * BLOCK_SCORES / 2 + pair);
                        let values = values.add(pair * step.dim);
                        for (c, acc) in acc.iter_mut().enumerate() {
                            *acc = S::dot(*acc, S::load_pairs(values.add(c * LANES)), weight);
                        }
                    }
                }
            }
        }
        for (c, acc) in acc.iter().enumerate() {
            S::store(sums.add(c * LANES), *acc);
        }
    }
    C * LANES
}
