//! Products of rows with a quantised matrix itself, `y = x W`, not with its transpose: the gradient of `x Wᵀ`. The matrix is
//! dequantised on the way, so that no transposed copy of it in f32 is needed, which would be many times as large.
//!
//! A task has a range of columns of the matrix. It runs over the matrix's rows in chunks of 256, in order: dequantises the chunk's
//! values in its columns, as micro-panels whose columns are the matrix's, and adds what each row of `x` makes of them to
//! the row's result. So a row's result is the same whichever rows it is computed with, and however many threads there are.

use std::{cell::RefCell, ops::Range};

use super::{
    super::{
        Buffer, Isa,
        block::{BLOCK_COLUMNS, BLOCK_ROWS, block_f32},
        dispatch, elements,
        integer::{IntegerMatrix, STRIPE},
        packed::{Data, PANEL_WIDTH, PackedMatrix},
        pool::Pool,
        simd::{LANES, Simd},
    },
    tasks::Sums,
};
use crate::kernels::quantized::BlockFormat;

/// Rows of the matrix that are dequantised at a time.
const CHUNK: usize = 256;
/// Columns of a task at most: those of a chunk are 256 KiB in f32, which stay in the L2 cache.
const COLUMNS: usize = 256;
/// Rows of `x` of a task at least, where there are so few columns that the rows are split too: each task dequantises for
/// itself.
const FEWEST_ROWS: usize = 64;

/// A packed matrix whose values are kept as the blocks of a file or as codes.
#[derive(Debug, Clone, Copy)]
pub struct QuantisedMatrix<'a> {
    n: usize,
    k: usize,
    values: Values<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Values<'a> {
    Blocks(BlockFormat, &'a [u8]),
    Integers(&'a IntegerMatrix),
}

impl<'a> QuantisedMatrix<'a> {
    /// `None` of a matrix that is kept in floats.
    pub fn of(matrix: &'a PackedMatrix) -> Option<Self> {
        let values = match &matrix.data {
            Data::F32(_) | Data::Bf16(_) => return None,
            Data::Blocks(format, bytes) => Values::Blocks(*format, bytes),
            Data::Integers(matrix) => Values::Integers(matrix),
        };
        Some(Self { n: matrix.n(), k: matrix.k(), values })
    }

    /// `x W` of `x` `[rows, n]`: `[rows, k]`, with the values that the blocks stand for.
    ///
    /// # Panics
    /// If `x` is not of that shape.
    pub fn multiply(self, isa: Isa, pool: &Pool, x: &[f32], rows: usize) -> Vec<f32> {
        thread_local!(static CHUNKS: RefCell<Buffer<f32>> = const { RefCell::new(Buffer::empty()) });
        let Self { n, k, .. } = self;
        assert_eq!(x.len(), elements(&[rows, n]));
        let mut out = vec![0f32; elements(&[rows, k])];
        if out.is_empty() {
            return out;
        }
        // Small enough that the threads end together.
        let unit = self.unit();
        let units = k.div_ceil(unit);
        let columns = unit * units.div_ceil(4 * pool.threads()).min(COLUMNS / unit);
        let column_tasks = k.div_ceil(columns);
        let row_tasks = pool.threads().div_ceil(column_tasks).min(rows / FEWEST_ROWS).max(1);
        let own_rows = rows.div_ceil(row_tasks).next_multiple_of(BLOCK_ROWS);
        let row_tasks = rows.div_ceil(own_rows);
        let job = Job { weight: self, x, out: out.as_mut_ptr() };
        pool.run(row_tasks * column_tasks, &|task| {
            let (row, column) = (task / column_tasks * own_rows, task % column_tasks * columns);
            let (rows, columns) = (row..rows.min(row + own_rows), column..k.min(column + columns));
            let job = &job;
            CHUNKS.with_borrow_mut(|scratch| {
                let panels = columns.len().div_ceil(PANEL_WIDTH);
                let scratch = scratch.scratch(panels * CHUNK * PANEL_WIDTH);
                // SAFETY: `x` and `out` are of the job's shapes, the rows and columns are within them and no other task's, and the
                // scratch holds a chunk of the columns.
                unsafe {
                    dispatch!(isa, run_task(job: &Job, rows: Range<usize>, columns: Range<usize>, scratch: &mut [f32]));
                }
            });
        });
        out
    }

    /// Columns that are dequantised together; a multiple of two micro-panels.
    fn unit(self) -> usize {
        match self.values {
            Values::Blocks(format, _) => format.values().next_multiple_of(BLOCK_COLUMNS),
            Values::Integers(_) => STRIPE,
        }
    }

    /// Dequantises the columns of some rows to micro-panels of [`CHUNK`] rows of 16 columns each; rows begin at a multiple of 16,
    /// columns at a multiple of [`unit`](Self::unit).
    ///
    /// # Safety
    /// As for [`Simd`]; `out` holds the micro-panels.
    #[inline(always)]
    unsafe fn dequantise<S: Simd>(self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        const SIZE: usize = CHUNK * PANEL_WIDTH;
        match self.values {
            Values::Blocks(format, bytes) => {
                let row = bytes.len() / self.n;
                let bytes = &bytes[rows.start * row..rows.end * row];
                format.dequantize_columns(bytes, self.k, columns, SIZE, out);
            }
            Values::Integers(matrix) => {
                for panel in rows.start / PANEL_WIDTH..rows.end.div_ceil(PANEL_WIDTH) {
                    let at = (panel * PANEL_WIDTH - rows.start) * PANEL_WIDTH;
                    for (stripe, out) in (columns.start / STRIPE..).zip(out.chunks_exact_mut(2 * SIZE)) {
                        let (first, second) = out.split_at_mut(SIZE);
                        let out = [first, second].map(|out| out[at..][..LANES * PANEL_WIDTH].as_mut_ptr());
                        // SAFETY: each has room for 16 rows of 16.
                        unsafe { matrix.stripe::<S>(panel, stripe, out) };
                    }
                }
            }
        }
    }
}

/// One product: what all tasks share.
struct Job<'a> {
    weight: QuantisedMatrix<'a>,
    /// `[rows, n]`
    x: &'a [f32],
    /// `[rows, k]`
    out: *mut f32,
}

// SAFETY: threads write disjoint parts of the output and only read everything else.
unsafe impl Sync for Job<'_> {}

/// Adds the products of some rows with some columns to the output.
///
/// # Safety
/// As for [`Simd`]; the job's pointers are valid for its shapes, the rows and columns are within them, no other thread has them,
/// and `scratch` holds a chunk of the columns in whole micro-panels.
#[inline(always)]
unsafe fn run_task<S: Simd>(job: &Job, rows: Range<usize>, columns: Range<usize>, scratch: &mut [f32]) {
    let QuantisedMatrix { n, k, .. } = job.weight;
    let last = columns.len().div_ceil(PANEL_WIDTH) - 1;
    let mut sums = Sums::zero();
    let sums = sums.0.as_mut_ptr();
    for start in (0..n).step_by(CHUNK) {
        let inner = CHUNK.min(n - start);
        // SAFETY: as the caller says.
        unsafe { job.weight.dequantise::<S>(start..start + inner, columns.clone(), scratch) };
        for row in rows.clone().step_by(BLOCK_ROWS) {
            let count = BLOCK_ROWS.min(rows.end - row);
            for column in columns.clone().step_by(BLOCK_COLUMNS) {
                let panel = (column - columns.start) / PANEL_WIDTH;
                // In place of a micro-panel past the last one that one again, whose sums are not stored.
                let panels = [panel, last.min(panel + 1)].map(|i| scratch[i * CHUNK * PANEL_WIDTH..].as_ptr());
                // SAFETY: `inner` values of `count` rows are within `x`, the block's columns within the output's rows.
                unsafe {
                    block_f32::<S>(job.x.as_ptr().add(row * n + start), count, n, inner, panels, sums);
                    let out = job.out.add(row * k + column);
                    add::<S>(sums, count, BLOCK_COLUMNS.min(columns.end - column), out, k);
                }
            }
        }
    }
}

/// Adds some columns of a block's sums to rows of the output, which are `stride` apart.
///
/// # Safety
/// As for [`Simd`]; `sums` is valid for a block, `out` for `columns` values of each row.
#[inline(always)]
unsafe fn add<S: Simd>(sums: *const f32, rows: usize, columns: usize, out: *mut f32, stride: usize) {
    let whole = columns / LANES * LANES;
    for row in 0..rows {
        // SAFETY: as the caller says.
        unsafe {
            let (sums, out) = (sums.add(row * BLOCK_COLUMNS), out.add(row * stride));
            for i in (0..whole).step_by(LANES) {
                S::store(out.add(i), S::add(S::load(out.add(i)), S::load(sums.add(i))));
            }
            for i in whole..columns {
                *out.add(i) += *sums.add(i);
            }
        }
    }
}

#[cfg(test)]
mod tests;
