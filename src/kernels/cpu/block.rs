//! The micro-kernels of a product (GEMM): up to 32 rows by two micro-panels of 16 columns, summed over all of `k` in
//! one order, so that a row's sums are the same whichever rows it shares a block with.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::{
    Isa,
    packed::{PANEL_WIDTH, TILE_K, TILE_WORDS},
    simd::Simd,
};

/// Rows of a block.
pub(super) const BLOCK_ROWS: usize = 32;
/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 16;
/// Columns of a block.
pub(super) const BLOCK_COLUMNS: usize = 2 * PANEL_WIDTH;

/// How many cache lines ahead of its use a micro-panel is prefetched. The hardware prefetcher foresees a stream only
/// within a page of 4 KiB, and a few rows use a page up faster than memory answers.
const LINES_AHEAD: usize = 24;

/// Prefetches the line of a micro-panel that will be needed soon. After the last line of one that is a line of the next.
#[inline(always)]
fn prefetch<T>(panel: *const T, line: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch is no access; it may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(panel.wrapping_add((line + LINES_AHEAD) * PANEL_WIDTH).cast()) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = (panel, line);
}

/// What a block may prefetch while it computes.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// The micro-panels of the next column tile.
    pub next: [*const u32; 2],
    /// Which of how many blocks of its column tile it is: each prefetches its part of `next`.
    pub part: usize,
    pub parts: usize,
    /// It is the first block of a task, whose own micro-panels nobody has prefetched.
    pub first: bool,
}

/// A block of a product in f32. A row of `x` begins `stride` values after the one before it.
///
/// # Safety
/// `x` is valid for `rows` rows of `k`, each micro-panel for `k` of 16, `sums` for a block.
#[inline(always)]
pub(super) unsafe fn block_f32<S: Simd>(
    x: *const f32,
    rows: usize,
    stride: usize,
    k: usize,
    panels: [*const f32; 2],
    sums: *mut f32,
) {
    // SAFETY: as the caller says.
    unsafe {
        match one_panel::<S>(rows) {
            true => {
                for (i, panel) in panels.into_iter().enumerate() {
                    panel_f32::<S>(x, rows, stride, k, panel, sums.add(i * PANEL_WIDTH));
                }
            }
            false => panels_f32::<S>(x, rows, stride, k, panels, sums),
        }
    }
}

/// Whether more rows by one micro-panel make better use of the registers than fewer rows by both. (A few rows have too
/// few independent sums in one micro-panel to hide the latency of a multiply-add.)
#[inline(always)]
fn one_panel<S: Simd>(rows: usize) -> bool {
    S::REGISTERS < 32 && rows > 3
}

/// All rows by both micro-panels at once.
///
/// # Safety
/// As [`block_f32`].
#[inline(always)]
unsafe fn panels_f32<S: Simd>(
    x: *const f32,
    rows: usize,
    stride: usize,
    k: usize,
    panels: [*const f32; 2],
    sums: *mut f32,
) {
    let mut row = 0;
    // SAFETY: `row` plus the rows of each call never exceeds `rows`.
    unsafe {
        while row < rows {
            let (x, sums) = (x.add(row * stride), sums.add(row * BLOCK_COLUMNS));
            row += match rows - row {
                left if left >= 8 && S::REGISTERS >= 32 => rows_f32::<S, 8, 2>(x, stride, k, panels, sums),
                left if left >= 4 => rows_f32::<S, 4, 2>(x, stride, k, panels, sums),
                left if left >= 2 => rows_f32::<S, 2, 2>(x, stride, k, panels, sums),
                _ => rows_f32::<S, 1, 2>(x, stride, k, panels, sums),
            };
        }
    }
}

/// All rows by one micro-panel, for sixteen registers of eight lanes: twelve hold sums, the others a micro-panel's
/// weights and a value of `x`.
///
/// # Safety
/// As [`rows_f32`].
#[inline(always)]
unsafe fn panel_f32<S: Simd>(x: *const f32, rows: usize, stride: usize, k: usize, panel: *const f32, sums: *mut f32) {
    let mut row = 0;
    // SAFETY: `row` plus the rows of each call never exceeds `rows`.
    unsafe {
        while row < rows {
            let (x, sums) = (x.add(row * stride), sums.add(row * BLOCK_COLUMNS));
            row += match rows - row {
                // Two calls of four rows are faster than one of six and one of two.
                8 | 7 | 4 => rows_f32::<S, 4, 1>(x, stride, k, [panel], sums),
                5 => rows_f32::<S, 5, 1>(x, stride, k, [panel], sums),
                3 => rows_f32::<S, 3, 1>(x, stride, k, [panel], sums),
                2 => rows_f32::<S, 2, 1>(x, stride, k, [panel], sums),
                1 => rows_f32::<S, 1, 1>(x, stride, k, [panel], sums),
                _ => rows_f32::<S, 6, 1>(x, stride, k, [panel], sums),
            };
        }
    }
}

/// `R` rows by `P` micro-panels, their sums in registers.
///
/// # Safety
/// `x` is valid for `R` rows of `k`, each micro-panel for `k` of 16, `sums` for `R` rows of a block.
#[inline(always)]
unsafe fn rows_f32<S: Simd, const R: usize, const P: usize>(
    x: *const f32,
    stride: usize,
    k: usize,
    panels: [*const f32; P],
    sums: *mut f32,
) -> usize {
    // SAFETY: `i` stays below `k`, `r` below `R` and `p` below `P`.
    unsafe {
        let mut acc = [[S::splat(0.0); P]; R];
        for i in 0..k {
            if R <= 3 {
                panels.iter().for_each(|&panel| prefetch(panel, i));
            }
            let w = panels.map(|panel| S::load(panel.add(i * PANEL_WIDTH)));
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = S::splat(*x.add(r * stride + i));
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = S::fma(w, x, *acc);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (p, acc) in acc.iter().enumerate() {
                S::store(sums.add(r * BLOCK_COLUMNS + p * PANEL_WIDTH), *acc);
            }
        }
    }
    R
}

/// Up to how many rows are multiplied with weights that are widened as they are loaded; for more, a micro-panel is
/// widened once before.
pub(super) const FEW_ROWS: usize = 3;

/// A few rows of a product in bf16 without instructions for it. `x` has been rounded to bf16.
///
/// # Safety
/// `x` is valid for `rows` rows of `k`, each micro-panel for the tiles of `k`, `sums` for a block.
#[inline(always)]
pub(super) unsafe fn few_rows_widened<S: Simd>(
    x: *const f32,
    rows: usize,
    k: usize,
    panels: [*const u32; 2],
    sums: *mut f32,
) {
    for row in 0..rows {
        // SAFETY: as the caller says.
        unsafe { row_widened::<S>(x.add(row * k), k, panels, sums.add(row * BLOCK_COLUMNS)) };
    }
}

/// Widens a micro-panel of bf16 to one of f32, `[k][16]`.
///
/// # Safety
/// `panel` is valid for the tiles of `k`, `to` for an even number of rows of 16 not below `k`.
#[inline(always)]
pub(super) unsafe fn widen_panel<S: Simd>(panel: *const u32, k: usize, to: *mut f32) {
    for pair in 0..k.div_ceil(2) {
        // SAFETY: as the caller says.
        unsafe {
            let [low, high] = S::widen(S::load_pairs(panel.add(pair * PANEL_WIDTH)));
            S::store(to.add(2 * pair * PANEL_WIDTH), low);
            S::store(to.add((2 * pair + 1) * PANEL_WIDTH), high);
        }
    }
}

/// One row, whose weights are widened as they are loaded: they are used once, and memory is what takes the time.
///
/// # Safety
/// As [`few_rows_widened`], for one row.
#[inline(always)]
unsafe fn row_widened<S: Simd>(x: *const f32, k: usize, panels: [*const u32; 2], sums: *mut f32) {
    // SAFETY: as the caller says; a micro-panel has values for an even number of inner ones.
    unsafe {
        let mut acc = [S::splat(0.0); 2];
        for pair in 0..k / 2 {
            let (a, b) = (S::splat(*x.add(2 * pair)), S::splat(*x.add(2 * pair + 1)));
            for (acc, panel) in acc.iter_mut().zip(panels) {
                prefetch(panel, pair);
                let [low, high] = S::widen(S::load_pairs(panel.add(pair * PANEL_WIDTH)));
                *acc = S::fma(high, b, S::fma(low, a, *acc));
            }
        }
        if k % 2 == 1 {
            let a = S::splat(*x.add(k - 1));
            for (acc, panel) in acc.iter_mut().zip(panels) {
                let [low, _] = S::widen(S::load_pairs(panel.add(k / 2 * PANEL_WIDTH)));
                *acc = S::fma(low, a, *acc);
            }
        }
        S::store(sums, acc[0]);
        S::store(sums.add(PANEL_WIDTH), acc[1]);
    }
}

/// A block of a product in bf16, by the processor's instructions for it.
///
/// # Safety
/// `a` is valid for two row tiles of `tiles` tiles, each micro-panel for as many, `sums` for a block.
#[inline(always)]
pub(super) unsafe fn block_bf16<S: Simd>(
    isa: Isa,
    a: *const u32,
    rows: usize,
    tiles: usize,
    [b0, b1]: [*const u32; 2],
    sums: *mut f32,
    ahead: Ahead,
) {
    #[cfg(target_arch = "x86_64")]
    if isa.has_tiles() {
        // SAFETY: as the caller says; the instruction set has tiles.
        unsafe {
            amx::configure();
            let Ahead { next, part, parts, first } = ahead;
            match rows > TILE_ROWS {
                true => {
                    let prefetch = match first || parts == 1 {
                        true => amx::Prefetch::Own(next),
                        false => amx::Prefetch::Next { next, part, parts },
                    };
                    amx::block_2x2([a, a.add(tiles * TILE_WORDS)], [b0, b1], tiles, sums, prefetch);
                }
                false => amx::block_1x2(a, [b0, b1], tiles, sums, next),
            }
        }
        return;
    }
    let _ = (isa, ahead);
    let mut row = 0;
    // SAFETY: rows of one call lie in one row tile, as their number divides 16.
    unsafe {
        while row < rows {
            let a = a.add(row / TILE_ROWS * tiles * TILE_WORDS + row % TILE_ROWS * (TILE_K / 2));
            let sums = sums.add(row * BLOCK_COLUMNS);
            row += match rows - row {
                left if left >= 8 => rows_bf16::<S, 8>(a, tiles, b0, b1, sums),
                left if left >= 4 => rows_bf16::<S, 4>(a, tiles, b0, b1, sums),
                left if left >= 2 => rows_bf16::<S, 2>(a, tiles, b0, b1, sums),
                _ => rows_bf16::<S, 1>(a, tiles, b0, b1, sums),
            };
        }
    }
}

/// `R` rows of one row tile by two micro-panels.
///
/// # Safety
/// As [`block_bf16`], for `R` rows that start at `a`.
#[inline(always)]
unsafe fn rows_bf16<S: Simd, const R: usize>(
    a: *const u32,
    tiles: usize,
    b0: *const u32,
    b1: *const u32,
    sums: *mut f32,
) -> usize {
    // SAFETY: every index stays within its tile.
    unsafe {
        let mut acc = [[S::splat(0.0); 2]; R];
        for t in 0..tiles {
            for pair in 0..TILE_K / 2 {
                let at = t * TILE_WORDS + pair * PANEL_WIDTH;
                let w = [S::load_pairs(b0.add(at)), S::load_pairs(b1.add(at))];
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = *a.add(t * TILE_WORDS + r * (TILE_K / 2) + pair);
                    acc[0] = S::dot(acc[0], w[0], x);
                    acc[1] = S::dot(acc[1], w[1], x);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            S::store(sums.add(r * BLOCK_COLUMNS), acc[0]);
            S::store(sums.add(r * BLOCK_COLUMNS + PANEL_WIDTH), acc[1]);
        }
    }
    R
}
