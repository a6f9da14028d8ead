//! Products with packed matrices (GEMM): `y = x Wᵀ`, with a bias, a residual or a gate added on the way out.
//!
//! A product is cut into blocks of 32 rows by two micro-panels of 16 columns. Each block runs over all of `k` in one
//! order, so a row's result is the same whichever rows it shares a block with. What several blocks of rows share, the
//! micro-panels of one block's columns, is called a column tile.

mod activations;
mod tasks;
mod transposed;

use std::{cell::RefCell, ops::Range};

use activations::Activations;
pub use transposed::QuantisedMatrix;

use tasks::{Epilogue, Job, MicroPanels, Target, run_blocks};

use super::{
    Buffer, Isa,
    block::{BLOCK_COLUMNS, BLOCK_ROWS},
    dispatch, elements,
    packed::{Operands, PackedMatrix, TILE_K},
    pool::Pool,
    rows,
    tensors::written,
};
use crate::kernels::Activation;

/// Bytes of `x` that a task goes through again for each of its column tiles, so that they stay in the L2 cache.
const ACTIVATION_BYTES: usize = 768 << 10;

/// One product of several with the same `x`.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    pub weight: &'a PackedMatrix,
    /// `[n]`
    pub bias: Option<&'a [f32]>,
    /// `[rows, n]`, added to the result.
    pub residual: Option<&'a [f32]>,
}

/// Multiplies `x` `[rows, k]` with each matrix: `[rows, n]` each.
///
/// # Panics
/// If a shape does not fit.
pub fn multiply(isa: Isa, pool: &Pool, x: &[f32], rows: usize, products: &[Product]) -> Vec<Vec<f32>> {
    let Some(first) = products.first() else { return Vec::new() };
    let (k, operands) = (first.weight.k(), first.weight.operands());
    if products.iter().any(|product| product.weight.operands() != operands) {
        // A file may keep some matrices quantised and others not.
        return products
            .iter()
            .flat_map(|product| multiply(isa, pool, x, rows, std::slice::from_ref(product)))
            .collect();
    }
    with_activations(isa, pool, x, [rows, k], operands, |x| multiply_activations(isa, pool, x, rows, products))
}

/// As [`multiply`], of at least one matrix.
fn multiply_activations(isa: Isa, pool: &Pool, x: Activations, rows: usize, products: &[Product]) -> Vec<Vec<f32>> {
    let (k, operands) = (products[0].weight.k(), products[0].weight.operands());
    let mut outs: Vec<Vec<f32>> =
        products.iter().map(|p| Vec::with_capacity(elements(&[rows, p.weight.n()]))).collect();
    let mut targets = Vec::with_capacity(products.len());
    for (p, out) in products.iter().zip(&mut outs) {
        let n = p.weight.n();
        assert!(p.weight.k() == k && p.weight.operands() == operands, "matrices of one width and of the same operands");
        assert!(p.bias.is_none_or(|b| b.len() == n) && p.residual.is_none_or(|r| r.len() == rows * n));
        targets.push(Target {
            column_tiles: p.weight.panels().div_ceil(2),
            n,
            panels: [MicroPanels::new(p.weight, 0), MicroPanels::new(p.weight, 1)],
            step: 2,
            bias: p.bias,
            residual: p.residual,
            out: out.as_mut_ptr(),
        });
    }
    // SAFETY: each target is as long as its matrix is wide, its bias and residual are, and `outs` has the capacity.
    unsafe { run(isa, pool, x, rows, k, &targets, Epilogue::Store) };
    for (out, p) in outs.iter_mut().zip(products) {
        // SAFETY: the capacity is at least this, and the column tiles of a target are all of its columns.
        unsafe { out.set_len(rows * p.weight.n()) };
    }
    outs
}

/// Calls `f` with each slice of `columns` columns of `x Wᵀ + bias`: its index, and its values `[rows, columns]`, the last
/// slice perhaps with fewer columns. The threads compute a slice each and call `f` at once, so that its values are in the cache of a
/// core.
///
/// # Panics
/// If a shape does not fit, or a slice would not end with a column tile.
#[expect(clippy::too_many_arguments, reason = "a product's shapes and where it goes")]
pub fn multiply_slices(
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    rows: usize,
    weight: &PackedMatrix,
    bias: Option<&[f32]>,
    columns: usize,
    f: &(dyn Fn(usize, &mut [f32]) + Sync),
) {
    thread_local!(static SLICE: RefCell<Buffer<f32>> = const { RefCell::new(Buffer::empty()) });
    let (n, k) = (weight.n(), weight.k());
    assert!(columns.is_multiple_of(BLOCK_COLUMNS) && columns > 0, "{columns}");
    assert!(bias.is_none_or(|bias| bias.len() == n));
    with_activations(isa, pool, x, [rows, k], weight.operands(), |x| {
        let x = &x;
        pool.run(n.div_ceil(columns), &|task| {
            let slice = task * columns..n.min((task + 1) * columns);
            let first = slice.start / BLOCK_COLUMNS * 2;
            SLICE.with_borrow_mut(|out| {
                let out = out.scratch(elements(&[rows, slice.len()]));
                let target = Target {
                    column_tiles: slice.len().div_ceil(BLOCK_COLUMNS),
                    n: slice.len(),
                    panels: [MicroPanels::new(weight, first), MicroPanels::new(weight, first + 1)],
                    step: 2,
                    bias: bias.map(|bias| &bias[slice]),
                    residual: None,
                    out: out.as_mut_ptr(),
                };
                let job = Job::new(isa, *x, rows, k, std::slice::from_ref(&target), Epilogue::Store);
                // SAFETY: the slice's values have room, the bias is as long as it, and the matrix has micro-panels for it.
                unsafe { run_task(&job, 0..target.column_tiles, 0..rows.div_ceil(BLOCK_ROWS)) };
                f(task, out);
            });
        });
    });
}

/// `activation(x gateᵀ) * (x upᵀ)`, `[rows, n]`.
///
/// # Panics
/// As [`multiply`].
pub fn multiply_gated(
    isa: Isa,
    pool: &Pool,
    activation: Activation,
    x: &[f32],
    rows: usize,
    gate: &PackedMatrix,
    up: &PackedMatrix,
) -> Vec<f32> {
    let (n, k) = (gate.n(), gate.k());
    if gate.operands() != up.operands() {
        assert!(gate.n() == up.n() && gate.k() == up.k(), "matrices of one width");
        let product =
            |weight| multiply(isa, pool, x, rows, &[Product { weight, bias: None, residual: None }]).remove(0);
        let mut gates = rows::activate(isa, pool, activation, &product(gate), n);
        gates.iter_mut().zip(product(up)).for_each(|(gate, up)| *gate *= up);
        return gates;
    }
    with_activations(isa, pool, x, [rows, k], gate.operands(), |x| {
        let fill = |out| {
            let target = gated_target(gate, up, out);
            // SAFETY: the target is as long as both matrices are wide, and so is `out`.
            unsafe { run(isa, pool, x, rows, k, &[target], Epilogue::Gate(activation)) };
        };
        // SAFETY: the column tiles are all columns.
        unsafe { written(elements(&[rows, n]), fill) }
    })
}

/// The micro-panels of a gate and of what it lets through, side by side.
///
/// # Panics
/// If the matrices are not of one width and of the same operands.
fn gated_target<'a>(gate: &'a PackedMatrix, up: &'a PackedMatrix, out: *mut f32) -> Target<'a> {
    let (n, k) = (gate.n(), gate.k());
    assert!(
        up.n() == n && up.k() == k && up.operands() == gate.operands(),
        "matrices of one width and of the same operands"
    );
    Target {
        column_tiles: gate.panels(),
        n,
        panels: [MicroPanels::new(gate, 0), MicroPanels::new(up, 0)],
        step: 1,
        bias: None,
        residual: None,
        out,
    }
}

/// A gated MLP: the product of `down` and what [`multiply_gated`] returns, `[rows, down.n]`, bit for bit. What is between them
/// is kept in tiles of bf16 only, where the processor multiplies those.
///
/// # Panics
/// As [`multiply`].
pub fn multiply_mlp(
    isa: Isa,
    pool: &Pool,
    activation: Activation,
    x: &[f32],
    rows: usize,
    [gate, up]: [&PackedMatrix; 2],
    down: Product,
) -> Vec<f32> {
    thread_local!(static INNER: RefCell<Buffer<u32>> = const { RefCell::new(Buffer::empty()) });
    let both = [gate.operands(), down.weight.operands()];
    let (n, k) = (gate.n(), gate.k());
    if both != [Operands::Bf16; 2] || !isa.multiplies_bf16() || down.weight.k() != n {
        let inner = multiply_gated(isa, pool, activation, x, rows, gate, up);
        return multiply(isa, pool, &inner, rows, &[down]).remove(0);
    }
    INNER.with_borrow_mut(|scratch| {
        let tiles = scratch.scratch(elements(&[rows.div_ceil(BLOCK_ROWS), BLOCK_ROWS, n.div_ceil(TILE_K), TILE_K / 2]));
        with_activations(isa, pool, x, [rows, k], gate.operands(), |x| {
            let target = gated_target(gate, up, std::ptr::null_mut());
            let epilogue = Epilogue::GateTiles(activation, tiles.as_mut_ptr());
            // SAFETY: the target is as long as both matrices are wide, and the scratch holds the tiles.
            unsafe { run(isa, pool, x, rows, k, &[target], epilogue) };
        });
        multiply_activations(isa, pool, Activations::Bf16(tiles.as_ptr()), rows, &[down]).remove(0)
    })
}

/// Calls `f` with `x` `[rows, k]` as matrices of these operands are multiplied with it.
///
/// # Panics
/// If `x` is not of that shape.
fn with_activations<R>(
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    [rows, k]: [usize; 2],
    operands: Operands,
    f: impl FnOnce(Activations) -> R,
) -> R {
    thread_local!(static ACTIVATIONS: RefCell<Buffer<u32>> = const { RefCell::new(Buffer::empty()) });
    assert_eq!(x.len(), elements(&[rows, k]));
    ACTIVATIONS.with_borrow_mut(|scratch| f(Activations::new(isa, pool, x, [rows, k], operands, scratch)))
}

/// Computes all targets: splits them into tasks for the pool.
///
/// # Safety
/// `x` is of `rows` rows of `k`, laid out for the precision of the targets' matrices, which are `k` wide. Each target has as many column tiles as its matrices have
/// columns for, and its output is valid for `rows` rows of them, its bias for one, its residual for `rows`.
unsafe fn run(isa: Isa, pool: &Pool, x: Activations, rows: usize, k: usize, targets: &[Target], epilogue: Epilogue) {
    if rows == 0 {
        return;
    }
    let job = Job::new(isa, x, rows, k, targets, epilogue);
    let column_tiles: usize = targets.iter().map(|t| t.column_tiles).sum();
    let blocks = rows.div_ceil(BLOCK_ROWS);
    let bytes = BLOCK_ROWS * k * if matches!(x, Activations::Bf16(_) | Activations::Int8(_)) { 2 } else { 4 };
    let blocks_per_task = (ACTIVATION_BYTES / bytes.max(1)).clamp(1, blocks);
    let row_tasks = blocks.div_ceil(blocks_per_task);
    let blocks_per_task = blocks.div_ceil(row_tasks);
    // Small enough that the threads end together, large enough that handing out costs nothing.
    let tiles_per_task = column_tiles.div_ceil(pool.threads() * if blocks > 1 { 4 } else { 8 }).max(1);
    let column_tasks = column_tiles.div_ceil(tiles_per_task);
    pool.run(row_tasks * column_tasks, &|task| {
        let (row_task, column_task) = (task / column_tasks, task % column_tasks);
        let first = column_task * tiles_per_task;
        let tiles = first..column_tiles.min(first + tiles_per_task);
        let first = row_task * blocks_per_task;
        let blocks = first..blocks.min(first + blocks_per_task);
        // SAFETY: the job's pointers are valid for its shapes, as the caller says, and every task has its own column tiles and
        // blocks.
        unsafe { run_task(&job, tiles, blocks) };
    });
}

/// Computes some column tiles for some blocks of rows.
///
/// # Safety
/// The job's pointers are valid for its shapes, and no other thread has these blocks.
unsafe fn run_task(job: &Job, tiles: Range<usize>, blocks: Range<usize>) {
    // A column tile's micro-panels, where they are not stored as they are multiplied.
    thread_local!(static DEQUANTISED: RefCell<Buffer<f32>> = const { RefCell::new(Buffer::empty()) });
    DEQUANTISED.with_borrow_mut(|scratch| {
        let len = if job.dequantises { BLOCK_COLUMNS * job.k.next_multiple_of(2) } else { 0 };
        let scratch = scratch.scratch(len);
        // SAFETY: as the caller says; the scratch holds two micro-panels if any is dequantised.
        unsafe {
            dispatch!(job.isa, run_blocks(job: &Job, tiles: Range<usize>, blocks: Range<usize>, scratch: &mut [f32]));
        }
    });
}

#[cfg(test)]
mod tests;
