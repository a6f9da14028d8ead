//! The left operand of a product, laid out for the micro-kernels: as it is, rounded to bf16, or packed into tiles of bf16.

use super::super::{
    Buffer, Isa,
    block::{BLOCK_ROWS, TILE_ROWS},
    dispatch, elements,
    integer::{Group, quantise},
    packed::{Operands, TILE_K, TILE_WORDS},
    pool::Pool,
    rows,
    simd::{LANES, Simd},
};

/// `x` in the layout that the micro-kernels read.
#[derive(Clone, Copy)]
pub(super) enum Activations {
    /// `[rows, k]`
    F32(*const f32),
    /// As `F32`, rounded to bf16, for micro-panels of bf16.
    Rounded(*const f32),
    /// `[row tiles][k / 32][16][16 pairs]`
    Bf16(*const u32),
    /// `[rows][k / 32]`
    Int8(*const Group),
}

// SAFETY: it is only read.
unsafe impl Sync for Activations {}

impl Activations {
    /// `x` `[rows, k]` as matrices of these operands are multiplied with it. It points to `x` or to `scratch`.
    pub(super) fn new(
        isa: Isa,
        pool: &Pool,
        x: &[f32],
        [rows, k]: [usize; 2],
        operands: Operands,
        scratch: &mut Buffer<u32>,
    ) -> Self {
        match operands {
            Operands::F32 => Self::F32(x.as_ptr()),
            Operands::Bf16 if isa.multiplies_bf16() => Self::Bf16(pack(isa, pool, x, rows, k, scratch)),
            Operands::Int8 => Self::Int8(quantise(isa, pool, x, k, scratch)),
            Operands::Bf16 => Self::Rounded(round(isa, pool, x, k, scratch)),
        }
    }
}

/// Rounds `x` to bf16, kept as f32.
fn round(isa: Isa, pool: &Pool, x: &[f32], k: usize, rounded: &mut Buffer<u32>) -> *const f32 {
    let values: &mut [f32] = bytemuck::cast_slice_mut(rounded.scratch(x.len()));
    rows::round(isa, pool, x, k, values);
    values.as_ptr()
}

/// Rounds `x` to bf16 and lays it out in tiles, padded with zeros to whole tiles.
fn pack(isa: Isa, pool: &Pool, x: &[f32], rows: usize, k: usize, tiles: &mut Buffer<u32>) -> *const u32 {
    let row_tiles = rows.div_ceil(BLOCK_ROWS) * (BLOCK_ROWS / TILE_ROWS);
    let size = k.div_ceil(TILE_K) * TILE_WORDS;
    struct Out(*mut u32);
    // SAFETY: each task writes its own tiles.
    unsafe impl Sync for Out {}
    let out = Out(tiles.scratch(elements(&[row_tiles, size])).as_mut_ptr());
    // The few rows of a decode step are not worth splitting over tasks.
    let per_task = if rows <= 2 * BLOCK_ROWS { row_tiles } else { row_tiles.div_ceil(4 * pool.threads()) };
    pool.run(row_tiles.div_ceil(per_task), &|task| {
        for tile in task * per_task..row_tiles.min((task + 1) * per_task) {
            let out = &out;
            // SAFETY: `tile` is one of `row_tiles`, each of `size` values.
            let to = unsafe { out.0.add(tile * size) };
            let rows = tile * TILE_ROWS..rows.min((tile + 1) * TILE_ROWS).max(tile * TILE_ROWS);
            let from = &x[(rows.start * k).min(x.len())..(rows.end * k).min(x.len())];
            // SAFETY: `to` is a row of tiles for `k` columns, and `from` at most 16 rows of them.
            unsafe { dispatch!(isa, pack_tile(from: &[f32], k: usize, to: *mut u32)) };
        }
    });
    tiles.as_slice().as_ptr()
}

/// Packs up to 16 rows of `k` values into the tiles of a row tile.
///
/// # Safety
/// `to` is valid for the tiles of 16 rows of `k` values; `from` has at most 16 rows.
#[inline(always)]
unsafe fn pack_tile<S: Simd>(from: &[f32], k: usize, to: *mut u32) {
    let tiles = k.div_ceil(TILE_K);
    let rows = from.len().checked_div(k).unwrap_or(0);
    // SAFETY: every pointer stays within the 16 rows and `tiles` tiles.
    unsafe {
        if rows < TILE_ROWS || !k.is_multiple_of(TILE_K) {
            std::ptr::write_bytes(to, 0, tiles * TILE_WORDS);
        }
        for row in 0..rows {
            let x = from.as_ptr().add(row * k);
            for t in 0..tiles {
                let to = to.add(t * TILE_WORDS + row * (TILE_K / 2)).cast::<u16>();
                let left = (k - t * TILE_K).min(TILE_K);
                if left == TILE_K {
                    S::store_bf16(to, S::load(x.add(t * TILE_K)));
                    S::store_bf16(to.add(LANES), S::load(x.add(t * TILE_K + LANES)));
                } else {
                    let mut last = [0f32; TILE_K];
                    std::ptr::copy_nonoverlapping(x.add(t * TILE_K), last.as_mut_ptr(), left);
                    S::store_bf16(to, S::load(last.as_ptr()));
                    S::store_bf16(to.add(LANES), S::load(last.as_ptr().add(LANES)));
                }
            }
        }
    }
}
