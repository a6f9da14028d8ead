//! Writes keys and values of a step's rows into the blocks of the cache.

use std::ops::Range;

use super::{
    super::{
        Precision,
        simd::{LANES, Simd},
    },
    Step,
};
use crate::kernels::layout::{BLOCK_SIZE, Segment};

/// A segment's rows in parts for tasks; each part but the last ends with a block.
pub(super) fn parts(segment: &Segment) -> impl Iterator<Item = Range<usize>> {
    const POSITIONS: usize = 2 * BLOCK_SIZE;
    let (start, end) = (segment.start, segment.start + segment.rows);
    (start / POSITIONS..end.div_ceil(POSITIONS))
        .map(move |part| (part * POSITIONS).max(start) - start..((part + 1) * POSITIONS).min(end) - start)
}

/// Writes one head's keys and values of some rows of a segment.
///
/// # Safety
/// The step's pointers are valid for its shapes, and no other thread has this head of the blocks that these rows are in.
#[inline(always)]
pub(super) unsafe fn write_rows<S: Simd>(step: &Step, index: usize, head: usize, rows: Range<usize>) {
    let segment = &step.segments[index];
    let mut row = rows.start;
    while row < rows.end {
        let place = segment.start + row;
        let slot = place % BLOCK_SIZE;
        let n = (BLOCK_SIZE - slot).min(rows.end - row);
        // SAFETY: the block is one of the segment's, and `n` rows from `slot` on end within it.
        unsafe {
            let keys = step.keys(step.planes[index][place / BLOCK_SIZE], head);
            let values = keys.add(step.plane);
            if slot == 0 {
                // What an earlier owner left must be finite, for it is multiplied by a weight of zero.
                std::ptr::write_bytes(values, 0, step.plane);
            }
            let first = step.starts[index] + row;
            match step.precision {
                Precision::F32 => write_f32(step, head, first, n, slot, [keys.cast(), values.cast()]),
                Precision::Bf16 => write_bf16::<S>(step, head, first, n, slot, [keys, values]),
            }
        }
        row += n;
    }
}

/// The keys and values of a packed row and a head.
#[inline(always)]
fn key_and_value<'a>(step: &Step<'a>, head: usize, row: usize) -> [&'a [f32]; 2] {
    let at = (row * step.kv_heads + head) * step.head_dim;
    [step.rows.k, step.rows.v].map(|x| &x[at..][..step.head_dim])
}

/// Keys `[dim][32 positions]` and values `[32 positions][dim]`.
///
/// # Safety
/// The pointers are those of a block of `step.dim` dimensions, in which `slot + n` positions have a place.
#[inline(always)]
unsafe fn write_f32(step: &Step, head: usize, first: usize, n: usize, slot: usize, [keys, values]: [*mut f32; 2]) {
    for i in 0..n {
        let [k, v] = key_and_value(step, head, first + i);
        // SAFETY: the keys and values of a block hold 32 positions of `step.dim` dimensions each.
        unsafe {
            for (d, k) in k.iter().enumerate() {
                *keys.add(d * BLOCK_SIZE + slot + i) = *k;
            }
            std::ptr::copy_nonoverlapping(v.as_ptr(), values.add((slot + i) * step.dim), v.len());
        }
    }
}

/// Keys `[dim / 2][32 positions][2]` and values `[16 pairs of positions][dim][2]`.
///
/// # Safety
/// As [`write_f32`].
#[inline(always)]
unsafe fn write_bf16<S: Simd>(
    step: &Step,
    head: usize,
    first: usize,
    n: usize,
    slot: usize,
    [keys, values]: [*mut u32; 2],
) {
    let mut k_pairs = [[0u32; LANES / 2]; BLOCK_SIZE];
    let mut v_rounded = [[0u16; LANES]; BLOCK_SIZE];
    for d in (0..step.head_dim).step_by(LANES) {
        let width = (step.head_dim - d).min(LANES);
        for i in 0..n {
            let [k, v] = key_and_value(step, head, first + i);
            let mut last = [[0f32; LANES]; 2];
            let [k, v] = if width == LANES {
                [k[d..].as_ptr(), v[d..].as_ptr()]
            } else {
                last[0][..width].copy_from_slice(&k[d..]);
                last[1][..width].copy_from_slice(&v[d..]);
                [last[0].as_ptr(), last[1].as_ptr()]
            };
            // SAFETY: both point to 16 values, and room for 16 is there for each.
            unsafe {
                S::store_bf16(k_pairs[i].as_mut_ptr().cast(), S::load(k));
                S::store_bf16(v_rounded[i].as_mut_ptr(), S::load(v));
            }
        }
        // SAFETY: the keys and values of a block hold 32 positions of `step.dim` dimensions each.
        unsafe {
            for pair in 0..width.div_ceil(2) {
                let to = keys.add((d / 2 + pair) * BLOCK_SIZE + slot);
                for (i, pairs) in k_pairs[..n].iter().enumerate() {
                    *to.add(i) = pairs[pair];
                }
            }
            let mut i = 0;
            while i < n {
                let to = values.add((slot + i) / 2 * step.dim + d);
                // Both positions of a pair at once, where both are written.
                if (slot + i).is_multiple_of(2) && i + 1 < n {
                    for (j, (a, b)) in v_rounded[i].iter().zip(&v_rounded[i + 1]).enumerate().take(width) {
                        *to.add(j) = u32::from(*a) | u32::from(*b) << 16;
                    }
                    i += 2;
                } else {
                    let to = to.cast::<u16>().add((slot + i) % 2);
                    for (j, v) in v_rounded[i].iter().enumerate().take(width) {
                        *to.add(2 * j) = *v;
                    }
                    i += 1;
                }
            }
        }
    }
}
