//! A task of a product: which micro-panels it multiplies with which rows, and the epilogue that stores a block's sums.

use std::ops::Range;

use super::{
    super::{
        Isa,
        block::{
            Ahead, BLOCK_COLUMNS, BLOCK_ROWS, FEW_ROWS, TILE_ROWS, block_bf16, block_f32, few_rows_widened, widen_panel,
        },
        integer::{self, STRIPE},
        packed::{Data, PANEL_WIDTH, PackedMatrix, TILE_K, TILE_WORDS},
        rows,
        simd::{LANES, Simd},
    },
    activations::Activations,
};
use crate::kernels::Activation;

/// What is done with a block's sums.
#[derive(Debug, Clone, Copy)]
pub(super) enum Epilogue {
    /// Stores 32 columns, each with its bias and residual added.
    Store,
    /// Stores 16 columns: the activation of the first micro-panel's times the second's.
    Gate(Activation),
    /// As `Gate`, rounded to bf16 and laid out as the left operand of another product: `[row tiles][n / 32][16][16 pairs]`.
    GateTiles(Activation, *mut u32),
}

/// Every `step`th micro-panel of a matrix, from the micro-panel `from` on.
#[derive(Debug, Clone, Copy)]
pub(super) struct MicroPanels<'a> {
    pub(super) weight: &'a PackedMatrix,
    first: *const u32,
    /// Values of four bytes in a micro-panel.
    size: usize,
    from: usize,
    last: usize,
}

impl<'a> MicroPanels<'a> {
    pub(super) fn new(weight: &'a PackedMatrix, from: usize) -> Self {
        let (first, size) = match &weight.data {
            Data::F32(data) => (data.as_slice().as_ptr().cast(), PANEL_WIDTH * weight.k()),
            Data::Bf16(data) => (data.as_slice().as_ptr(), weight.tiles() * TILE_WORDS),
            // Each micro-panel is dequantised when it is its turn.
            Data::Blocks(..) => (std::ptr::null(), 0),
            Data::Integers(matrix) => (matrix.data.as_slice().as_ptr(), matrix.scheme.panel_bytes(weight.k()) / 4),
        };
        Self { weight, first, size, from, last: weight.panels().saturating_sub(1) }
    }

    /// The micro-panel of a column tile; the last one in place of one past the end, whose result is not stored.
    fn index(&self, tile: usize, step: usize) -> usize {
        (self.from + tile * step).min(self.last)
    }

    /// Where that micro-panel is; null for one that is yet to be dequantised.
    fn get(&self, tile: usize, step: usize) -> *const u32 {
        self.first.wrapping_add(self.index(tile, step) * self.size)
    }

    /// As [`get`](Self::get), dequantised or widened to f32 in `scratch` where the micro-kernel reads that.
    ///
    /// # Safety
    /// `scratch` is as [`run_blocks`] wants it.
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, job: &Job, tile: usize, step: usize, scratch: &mut [f32]) -> *const u32 {
        match &self.weight.data {
            Data::Blocks(..) => self.weight.dequantize_panel(self.index(tile, step), scratch),
            // SAFETY: the micro-panel has tiles for `k`, and the scratch as many rows.
            Data::Bf16(_) if job.widens => unsafe {
                widen_panel::<S>(self.get(tile, step), job.k, scratch.as_mut_ptr());
            },
            Data::F32(_) | Data::Bf16(_) | Data::Integers(_) => return self.get(tile, step),
        }
        scratch.as_ptr().cast()
    }
}

/// One matrix's part of a product, in column tiles of two micro-panels.
pub(super) struct Target<'a> {
    pub(super) column_tiles: usize,
    pub(super) n: usize,
    pub(super) panels: [MicroPanels<'a>; 2],
    pub(super) step: usize,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) residual: Option<&'a [f32]>,
    pub(super) out: *mut f32,
}

/// One call of `multiply`: what all tasks share.
pub(super) struct Job<'a> {
    pub(super) isa: Isa,
    pub(super) x: Activations,
    pub(super) rows: usize,
    pub(super) k: usize,
    /// Micro-panels of bf16 are widened to f32 before they are multiplied.
    widens: bool,
    /// Some micro-panels are dequantised or widened, to a thread's scratch.
    pub(super) dequantises: bool,
    pub(super) targets: &'a [Target<'a>],
    pub(super) epilogue: Epilogue,
}

impl<'a> Job<'a> {
    pub(super) fn new(
        isa: Isa,
        x: Activations,
        rows: usize,
        k: usize,
        targets: &'a [Target<'a>],
        epilogue: Epilogue,
    ) -> Self {
        let widens = matches!(x, Activations::Rounded(_)) && rows > FEW_ROWS;
        let is_blocks = |p: &MicroPanels| matches!(p.weight.data, Data::Blocks(..));
        let dequantises = widens || targets.iter().flat_map(|t| &t.panels).any(is_blocks);
        Self { isa, x, rows, k, widens, dequantises, targets, epilogue }
    }
}

// SAFETY: threads write disjoint blocks of the outputs (also of the epilogue's tiles) and only read everything else.
unsafe impl Sync for Job<'_> {}

/// The sums of a block.
#[repr(align(64))]
pub(super) struct Sums(pub(super) [f32; BLOCK_ROWS * BLOCK_COLUMNS]);

impl Sums {
    #[inline(always)]
    pub(super) fn zero() -> Self {
        Self([0.0; BLOCK_ROWS * BLOCK_COLUMNS])
    }
}

/// Multiplies the blocks of a range of column tiles and of row blocks. `scratch` is for the two micro-panels of a
/// column tile, if they are not stored as they are multiplied.
///
/// # Safety
/// The job's pointers are valid for its shapes, and no other thread has these blocks. If micro-panels are dequantised
/// or widened, half of `scratch` holds one in f32, for an even number of inner values.
#[inline(always)]
pub(super) unsafe fn run_blocks<S: Simd>(job: &Job, tiles: Range<usize>, blocks: Range<usize>, scratch: &mut [f32]) {
    let (scratch0, scratch1) = scratch.split_at_mut(scratch.len() / 2);
    let mut sums = Sums::zero();
    let sums = sums.0.as_mut_ptr();
    let (mut passed, mut first) = (0, true);
    for target in job.targets {
        let own = tiles.start.max(passed) - passed..tiles.end.min(passed + target.column_tiles).max(passed) - passed;
        passed += target.column_tiles;
        for tile in own {
            let [p0, p1] = target.panels;
            // SAFETY: each half of the scratch holds a micro-panel.
            let (b0, b1) = unsafe {
                (p0.load::<S>(job, tile, target.step, scratch0), p1.load::<S>(job, tile, target.step, scratch1))
            };
            // Past the last column tile this is the last one again, which costs nothing.
            let next = target.panels.map(|p| p.get((tile + 1).min(target.column_tiles - 1), target.step));
            for block in blocks.clone() {
                let ahead = Ahead { next, part: block - blocks.start, parts: blocks.len(), first };
                first = false;
                let row = block * BLOCK_ROWS;
                let rows = (job.rows - row).min(BLOCK_ROWS);
                // SAFETY: the block's rows and the micro-panels are within the job's shapes.
                unsafe {
                    match job.x {
                        Activations::Rounded(x) if !job.widens => {
                            few_rows_widened::<S>(x.add(row * job.k), rows, job.k, [b0, b1], sums);
                        }
                        Activations::F32(x) | Activations::Rounded(x) => {
                            block_f32::<S>(x.add(row * job.k), rows, job.k, job.k, [b0.cast(), b1.cast()], sums);
                        }
                        Activations::Int8(groups) => {
                            let x = groups.add(row * (job.k / STRIPE));
                            for (i, (p, b)) in [(p0, b0), (p1, b1)].into_iter().enumerate() {
                                if let Data::Integers(matrix) = &p.weight.data {
                                    let sums = sums.add(i * PANEL_WIDTH);
                                    integer::panel::<S>(matrix.scheme, x, rows, job.k, b.cast(), sums);
                                }
                            }
                        }
                        Activations::Bf16(packed) => {
                            let k_tiles = job.k.div_ceil(TILE_K);
                            let a = packed.add(row / TILE_ROWS * k_tiles * TILE_WORDS);
                            block_bf16::<S>(job.isa, a, rows, k_tiles, [b0, b1], sums, ahead);
                        }
                    }
                    match job.epilogue {
                        Epilogue::Store => store::<S>(target, tile, row, rows, sums),
                        Epilogue::Gate(of) => gate::<S>(target, of, tile, row, rows, sums),
                        Epilogue::GateTiles(of, to) => gate_tiles::<S>(target, of, tile, row, rows, sums, to),
                    }
                }
            }
        }
    }
}

/// Stores a block's columns with bias and residual.
///
/// # Safety
/// The target's pointers are valid for rows `first..first + rows`, `sums` for a block.
#[inline(always)]
unsafe fn store<S: Simd>(target: &Target, tile: usize, first: usize, rows: usize, sums: *const f32) {
    let column = tile * BLOCK_COLUMNS;
    let columns = (target.n - column).min(BLOCK_COLUMNS);
    for row in 0..rows {
        let at = (first + row) * target.n + column;
        // SAFETY: `at..at + columns` is within `[rows, n]`.
        unsafe {
            let (sums, out) = (sums.add(row * BLOCK_COLUMNS), target.out.add(at));
            let whole = columns / LANES * LANES;
            for i in (0..whole).step_by(LANES) {
                let mut y = S::load(sums.add(i));
                if let Some(bias) = target.bias {
                    y = S::add(y, S::load(bias.as_ptr().add(column + i)));
                }
                if let Some(residual) = target.residual {
                    y = S::add(y, S::load(residual.as_ptr().add(at + i)));
                }
                S::store(out.add(i), y);
            }
            for i in whole..columns {
                let mut y = *sums.add(i);
                if let Some(bias) = target.bias {
                    y += bias[column + i];
                }
                if let Some(residual) = target.residual {
                    y += residual[at + i];
                }
                *out.add(i) = y;
            }
        }
    }
}

/// Stores the activation of a block's first micro-panel times its second.
///
/// # Safety
/// As [`store`].
#[inline(always)]
unsafe fn gate<S: Simd>(
    target: &Target,
    activation: Activation,
    tile: usize,
    first: usize,
    rows: usize,
    sums: *const f32,
) {
    let column = tile * PANEL_WIDTH;
    let columns = (target.n - column).min(PANEL_WIDTH);
    for row in 0..rows {
        // SAFETY: the columns are within `[rows, n]`.
        unsafe {
            let (sums, out) = (sums.add(row * BLOCK_COLUMNS), target.out.add((first + row) * target.n + column));
            let y = S::mul(rows::apply::<S>(activation, S::load(sums)), S::load(sums.add(PANEL_WIDTH)));
            if columns == PANEL_WIDTH {
                S::store(out, y);
            } else {
                let mut all = [0f32; PANEL_WIDTH];
                S::store(all.as_mut_ptr(), y);
                std::ptr::copy_nonoverlapping(all.as_ptr(), out, columns);
            }
        }
    }
}

/// As [`gate`], into tiles of bf16: also zeros in place of columns that fill the last tile up. Rows that do are left as they
/// are, for nobody reads their sums.
///
/// # Safety
/// `sums` is valid for a block, `to` for the tiles of all row blocks by the target's columns.
#[inline(always)]
unsafe fn gate_tiles<S: Simd>(
    target: &Target,
    activation: Activation,
    tile: usize,
    first: usize,
    rows: usize,
    sums: *const f32,
    to: *mut u32,
) {
    let k_tiles = target.n.div_ceil(TILE_K);
    let fills_up = tile + 1 == target.column_tiles && tile.is_multiple_of(2);
    for row in 0..rows {
        let at = ((first + row) / TILE_ROWS * k_tiles + tile / 2) * TILE_WORDS + row % TILE_ROWS * (TILE_K / 2);
        // SAFETY: the block's rows are within the row tiles, and two column tiles are half of a tile's columns each.
        unsafe {
            let to = to.add(at).cast::<u16>().add(tile % 2 * PANEL_WIDTH);
            let sums = sums.add(row * BLOCK_COLUMNS);
            S::store_bf16(to, S::mul(rows::apply::<S>(activation, S::load(sums)), S::load(sums.add(PANEL_WIDTH))));
            if fills_up {
                S::store_bf16(to.add(PANEL_WIDTH), S::splat(0.0));
            }
        }
    }
}
