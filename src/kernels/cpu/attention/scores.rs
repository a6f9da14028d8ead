//! A tile's queries, and their scores against the keys of a block.

use super::{
    Ahead, Step,
    tile::{TILE_PAIRS, TILE_ROWS},
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

/// Copies a tile's queries, in the precision of the keys, to `to`; `at` says where query `i` begins in the packed rows.
/// Rows of the tile after the last query are zero.
///
/// # Safety
/// `to` is valid for a tile of queries.
#[inline(always)]
pub(super) unsafe fn load_queries<S: Simd>(step: &Step, count: usize, at: impl Fn(usize) -> usize, to: *mut u32) {
    for i in 0..TILE_ROWS {
        let q = if i < count { &step.rows.q[at(i)..][..step.head_dim] } else { &[] };
        match step.precision {
            Precision::F32 => {
                // SAFETY: row `i` of `[16][dim]`.
                let to = unsafe { std::slice::from_raw_parts_mut(to.cast::<f32>().add(i * step.dim), step.dim) };
                to[..q.len()].copy_from_slice(q);
                to[q.len()..].fill(0.0);
            }
            Precision::Bf16 => {
                for pair in (0..step.dim / 2).step_by(LANES / 2) {
                    let mut values = [0f32; LANES];
                    let left = q.len().saturating_sub(pair * 2).min(LANES);
                    values[..left].copy_from_slice(&q[q.len().min(pair * 2)..][..left]);
                    // SAFETY: eight pairs of row `i` of the tile that holds them.
                    unsafe {
                        let tile = to.add(pair / TILE_PAIRS * TILE_ROWS * TILE_PAIRS);
                        S::store_bf16(tile.add(i * TILE_PAIRS + pair % TILE_PAIRS).cast(), S::load(values.as_ptr()));
                    }
                }
            }
        }
    }
}

/// Scores of a tile's queries against a block's keys, unscaled: `out` is `[16][32]`.
///
/// # Safety
/// The pointers are valid for the step's shapes and 16 rows of scores.
#[inline(always)]
pub(super) unsafe fn block_scores<S: Simd>(
    step: &Step,
    q: *const u32,
    k: *const u32,
    count: usize,
    out: *mut f32,
    ahead: Ahead,
) {
    #[cfg(target_arch = "x86_64")]
    if step.isa.has_tiles() && step.precision == Precision::Bf16 {
        ahead.prefetch(0, step.plane);
        // SAFETY: as the caller says; the instruction set has tiles.
        unsafe {
            amx::configure();
            amx::scores(q, k, step.dim / (2 * TILE_PAIRS), out);
        }
        return;
    }
    let mut i = 0;
    // SAFETY: `i` plus the rows of each call never exceeds 16.
    unsafe {
        while i < count {
            let out = out.add(i * BLOCK_SIZE);
            let ahead = if i == 0 { ahead } else { Ahead::NOTHING };
            i += match count - i {
                left if left >= 4 && S::REGISTERS >= 32 => rows_scores::<S, 4>(step, q, i, k, out, ahead),
                left if left >= 2 => rows_scores::<S, 2>(step, q, i, k, out, ahead),
                _ => rows_scores::<S, 1>(step, q, i, k, out, ahead),
            };
        }
    }
}

/// # Safety
/// As [`block_scores`], for queries `first..first + R`.
#[inline(always)]
unsafe fn rows_scores<S: Simd, const R: usize>(
    step: &Step,
    q: *const u32,
    first: usize,
    k: *const u32,
    out: *mut f32,
    ahead: Ahead,
) -> usize {
    // SAFETY: as the caller says.
    unsafe {
        let mut acc = [[S::splat(0.0); 2]; R];
        match step.precision {
            Precision::F32 => {
                let (q, k) = (q.cast::<f32>().add(first * step.dim), k.cast::<f32>());
                for d in 0..step.head_dim {
                    ahead.prefetch(d, BLOCK_SIZE);
                    let keys = [S::load(k.add(d * BLOCK_SIZE)), S::load(k.add(d * BLOCK_SIZE + LANES))];
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let q = S::splat(*q.add(r * step.dim + d));
                        acc[0] = S::fma(keys[0], q, acc[0]);
                        acc[1] = S::fma(keys[1], q, acc[1]);
                    }
                }
            }
            Precision::Bf16 => {
                for pair in 0..step.head_dim.div_ceil(2) {
                    ahead.prefetch(pair, BLOCK_SIZE);
                    let tile = q.add(pair / TILE_PAIRS * TILE_ROWS * TILE_PAIRS + pair % TILE_PAIRS);
                    let keys =
                        [S::load_pairs(k.add(pair * BLOCK_SIZE)), S::load_pairs(k.add(pair * BLOCK_SIZE + LANES))];
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let q = *tile.add((first + r) * TILE_PAIRS);
                        acc[0] = S::dot(acc[0], keys[0], q);
                        acc[1] = S::dot(acc[1], keys[1], q);
                    }
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            S::store(out.add(r * BLOCK_SIZE), acc[0]);
            S::store(out.add(r * BLOCK_SIZE + LANES), acc[1]);
        }
    }
    R
}
