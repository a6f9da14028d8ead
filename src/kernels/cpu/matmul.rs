//! Products with packed matrices: `y = x Wᵀ`, with a bias, a residual or a gate added on the way out.
//!
//! A product is cut into blocks of 32 rows by two panels. Each block runs over all of `k` in one
//! order, so a row's result is the same whichever rows it shares a block with.

use std::{cell::RefCell, ops::Range};

use super::{
    Buffer, Isa,
    block::{
        Ahead, BLOCK_COLUMNS, BLOCK_ROWS, FEW_ROWS, TILE_ROWS, block_bf16, block_f32, few_rows_widened, widen_panel,
    },
    dispatch,
    packed::{Data, PANEL, PackedMatrix, Precision, TILE, TILE_K},
    pool::Pool,
    rows,
    simd::{LANES, Simd},
    tensors::written,
};
use crate::kernels::Activation;

/// Bytes of `x` that a task works through again and again, to stay in the second cache.
const LEFT_BYTES: usize = 768 << 10;

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
/// If a shape does not fit, or the matrices have different precisions.
pub fn multiply(isa: Isa, pool: &Pool, x: &[f32], rows: usize, products: &[Product]) -> Vec<Vec<f32>> {
    let Some(first) = products.first() else { return Vec::new() };
    let (k, precision) = (first.weight.k(), first.weight.precision());
    let mut outs: Vec<Vec<f32>> = products.iter().map(|p| Vec::with_capacity(rows * p.weight.n())).collect();
    let mut targets = Vec::with_capacity(products.len());
    for (p, out) in products.iter().zip(&mut outs) {
        let n = p.weight.n();
        assert!(p.weight.k() == k && p.weight.precision() == precision, "matrices of one kind");
        assert!(p.bias.is_none_or(|b| b.len() == n) && p.residual.is_none_or(|r| r.len() == rows * n));
        targets.push(Target {
            units: p.weight.panels().div_ceil(2),
            n,
            panels: [Panels::new(p.weight, 0), Panels::new(p.weight, 1)],
            step: 2,
            bias: p.bias,
            residual: p.residual,
            out: out.as_mut_ptr(),
        });
    }
    run(isa, pool, x, rows, k, precision, &targets, Finish::Store);
    for (out, p) in outs.iter_mut().zip(products) {
        // SAFETY: the capacity is at least this, and the units of a target are all of its columns.
        unsafe { out.set_len(rows * p.weight.n()) };
    }
    outs
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
    assert!(up.n() == n && up.k() == k && up.precision() == gate.precision(), "matrices of one kind");
    let fill = |out| {
        let target = Target {
            units: gate.panels(),
            n,
            panels: [Panels::new(gate, 0), Panels::new(up, 0)],
            step: 1,
            bias: None,
            residual: None,
            out,
        };
        run(isa, pool, x, rows, k, gate.precision(), &[target], Finish::Gate(activation));
    };
    // SAFETY: the units are all columns.
    unsafe { written(rows * n, fill) }
}

/// What happens to a block's sums.
#[derive(Debug, Clone, Copy)]
enum Finish {
    /// 32 columns, each with its bias and residual.
    Store,
    /// 16 columns, each of a gate and what it lets through.
    Gate(Activation),
}

/// Every `step`th panel of a matrix, from some panel on.
#[derive(Debug, Clone, Copy)]
struct Panels<'a> {
    weight: &'a PackedMatrix,
    first: *const u32,
    /// Values of four bytes in a panel.
    size: usize,
    from: usize,
    last: usize,
}

impl<'a> Panels<'a> {
    fn new(weight: &'a PackedMatrix, from: usize) -> Self {
        let (first, size) = match &weight.data {
            Data::F32(data) => (data.as_slice().as_ptr().cast(), PANEL * weight.k()),
            Data::Bf16(data) => (data.as_slice().as_ptr(), weight.tiles() * TILE),
            // Each panel is made when it is its turn.
            Data::Blocks(..) => (std::ptr::null(), 0),
        };
        Self { weight, first, size, from, last: weight.panels().saturating_sub(1) }
    }

    /// The panel of a unit; the last one in place of one that is not there, whose result nobody
    /// keeps.
    fn index(&self, unit: usize, step: usize) -> usize {
        (self.from + unit * step).min(self.last)
    }

    /// Where that panel is; null for one that is still to be made.
    fn get(&self, unit: usize, step: usize) -> *const u32 {
        // SAFETY: the index is of a panel of the matrix, or the size zero.
        unsafe { self.first.add(self.index(unit, step) * self.size) }
    }

    /// As [`get`](Self::get), made in `room` as f32 if it is not as the job reads it.
    ///
    /// # Safety
    /// `room` is as [`work`] wants it.
    #[inline(always)]
    unsafe fn make<S: Simd>(&self, job: &Job, unit: usize, step: usize, room: &mut [f32]) -> *const u32 {
        match &self.weight.data {
            Data::Blocks(..) => self.weight.dequantize_panel(self.index(unit, step), room),
            // SAFETY: the panel has tiles for `k`, and the room as many rows.
            Data::Bf16(_) if job.widens => unsafe { widen_panel::<S>(self.get(unit, step), job.k, room.as_mut_ptr()) },
            Data::F32(_) | Data::Bf16(_) => return self.get(unit, step),
        }
        room.as_ptr().cast()
    }
}

/// One matrix's part of the work, in units of two panels.
struct Target<'a> {
    units: usize,
    n: usize,
    panels: [Panels<'a>; 2],
    step: usize,
    bias: Option<&'a [f32]>,
    residual: Option<&'a [f32]>,
    out: *mut f32,
}

/// The left side as the kernels read it.
#[derive(Clone, Copy)]
enum Left {
    /// `[rows, k]`
    F32(*const f32),
    /// As `F32`, rounded to bf16, for panels of bf16.
    Rounded(*const f32),
    /// `[row tiles][k / 32][16][16 pairs]`
    Bf16(*const u32),
}

struct Job<'a> {
    isa: Isa,
    left: Left,
    rows: usize,
    k: usize,
    /// Panels of bf16 are made f32 before they are multiplied.
    widens: bool,
    targets: &'a [Target<'a>],
    finish: Finish,
}

// SAFETY: threads write disjoint blocks of the outputs and only read everything else.
unsafe impl Sync for Job<'_> {}

#[expect(clippy::too_many_arguments, reason = "the private end of two functions")]
fn run(
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    rows: usize,
    k: usize,
    precision: Precision,
    targets: &[Target],
    finish: Finish,
) {
    assert_eq!(x.len(), rows * k);
    if rows == 0 {
        return;
    }
    thread_local!(static TILES: RefCell<Buffer<u32>> = const { RefCell::new(Buffer::empty()) });
    // A unit's panels where they are not in memory already.
    thread_local!(static MADE: RefCell<Buffer<f32>> = const { RefCell::new(Buffer::empty()) });
    TILES.with_borrow_mut(|tiles| {
        let left = match precision {
            Precision::F32 => Left::F32(x.as_ptr()),
            Precision::Bf16 if isa.multiplies_bf16() => Left::Bf16(pack_left(isa, pool, x, rows, k, tiles)),
            Precision::Bf16 => Left::Rounded(round_left(isa, pool, x, k, tiles)),
        };
        let widens = matches!(left, Left::Rounded(_)) && rows > FEW_ROWS;
        let made = widens || targets.iter().flat_map(|t| &t.panels).any(|p| matches!(p.weight.data, Data::Blocks(..)));
        let job = Job { isa, left, rows, k, widens, targets, finish };
        let units: usize = targets.iter().map(|t| t.units).sum();
        let blocks = rows.div_ceil(BLOCK_ROWS);
        let bytes = BLOCK_ROWS * k * if matches!(left, Left::Bf16(_)) { 2 } else { 4 };
        let blocks_per_task = (LEFT_BYTES / bytes.max(1)).clamp(1, blocks);
        let row_tasks = blocks.div_ceil(blocks_per_task);
        let blocks_per_task = blocks.div_ceil(row_tasks);
        // Small enough that the threads end together, large enough that handing out costs nothing.
        let units_per_task = units.div_ceil(pool.threads() * if blocks > 1 { 4 } else { 8 }).max(1);
        let unit_tasks = units.div_ceil(units_per_task);
        pool.run(row_tasks * unit_tasks, &|task| {
            let (row_task, unit_task) = (task / unit_tasks, task % unit_tasks);
            let first = unit_task * units_per_task;
            let units = first..units.min(first + units_per_task);
            let first = row_task * blocks_per_task;
            let blocks = first..blocks.min(first + blocks_per_task);
            let job = &job;
            MADE.with_borrow_mut(|room| {
                if made {
                    room.make_room(BLOCK_COLUMNS * k.next_multiple_of(2));
                }
                let room = room.as_mut_slice();
                // SAFETY: the job's pointers are valid for its shapes, which `multiply` has checked, and
                // every task has its own units and blocks.
                dispatch!(job.isa, work(job: &Job, units: Range<usize>, blocks: Range<usize>, room: &mut [f32]));
            });
        });
    });
}

/// Rounds `x` to bf16, kept as f32.
fn round_left(isa: Isa, pool: &Pool, x: &[f32], k: usize, rounded: &mut Buffer<u32>) -> *const f32 {
    rounded.make_room(x.len());
    let values: &mut [f32] = bytemuck::cast_slice_mut(&mut rounded.as_mut_slice()[..x.len()]);
    rows::round(isa, pool, x, k, values);
    values.as_ptr()
}

/// Rounds `x` to bf16 and lays it out in tiles; rows and columns that are missing of a tile are zero.
fn pack_left(isa: Isa, pool: &Pool, x: &[f32], rows: usize, k: usize, tiles: &mut Buffer<u32>) -> *const u32 {
    let row_tiles = rows.div_ceil(BLOCK_ROWS) * (BLOCK_ROWS / TILE_ROWS);
    let size = k.div_ceil(TILE_K) * TILE;
    tiles.make_room(row_tiles * size);
    struct Out(*mut u32);
    // SAFETY: each task writes its own tiles.
    unsafe impl Sync for Out {}
    let out = Out(tiles.as_mut_slice().as_mut_ptr());
    // A decode step's few rows are not worth handing out.
    let per_task = if rows <= 2 * BLOCK_ROWS { row_tiles } else { 4 };
    pool.run(row_tiles.div_ceil(per_task), &|task| {
        for tile in task * per_task..row_tiles.min((task + 1) * per_task) {
            let out = &out;
            // SAFETY: `tile` is one of `row_tiles`, each of `size` values.
            let to = unsafe { out.0.add(tile * size) };
            let rows = tile * TILE_ROWS..rows.min((tile + 1) * TILE_ROWS).max(tile * TILE_ROWS);
            let from = &x[(rows.start * k).min(x.len())..(rows.end * k).min(x.len())];
            // SAFETY: `to` is a row of tiles for `k` columns, and `from` at most 16 rows of them.
            dispatch!(isa, pack_tile(from: &[f32], k: usize, to: *mut u32));
        }
    });
    tiles.as_slice().as_ptr()
}

/// # Safety
/// `to` is valid for the tiles of 16 rows of `k` values; `from` has at most 16 rows.
#[inline(always)]
unsafe fn pack_tile<S: Simd>(from: &[f32], k: usize, to: *mut u32) {
    let tiles = k.div_ceil(TILE_K);
    let rows = from.len().checked_div(k).unwrap_or(0);
    // SAFETY: every pointer stays within the 16 rows and `tiles` tiles.
    unsafe {
        if rows < TILE_ROWS || !k.is_multiple_of(TILE_K) {
            std::ptr::write_bytes(to, 0, tiles * TILE);
        }
        for row in 0..rows {
            let x = from.as_ptr().add(row * k);
            for t in 0..tiles {
                let to = to.add(t * TILE + row * (TILE_K / 2)).cast::<u16>();
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

#[repr(align(64))]
struct Sums([f32; BLOCK_ROWS * BLOCK_COLUMNS]);

/// The blocks of some units (columns) and row blocks. `room` is for the two panels of a unit, if they are not
/// in memory as they are read.
///
/// # Safety
/// The job's pointers are valid for its shapes, and no other thread has these blocks. If panels are made,
/// half of `room` holds one in f32, for an even number of inner values.
#[inline(always)]
unsafe fn work<S: Simd>(job: &Job, units: Range<usize>, blocks: Range<usize>, room: &mut [f32]) {
    let (room0, room1) = room.split_at_mut(room.len() / 2);
    let mut sums = Sums([0.0; BLOCK_ROWS * BLOCK_COLUMNS]);
    let sums = sums.0.as_mut_ptr();
    let (mut passed, mut cold) = (0, true);
    for target in job.targets {
        let own = units.start.max(passed) - passed..units.end.min(passed + target.units).max(passed) - passed;
        passed += target.units;
        for unit in own {
            let [p0, p1] = target.panels;
            // SAFETY: each half of the room holds a panel.
            let (b0, b1) =
                unsafe { (p0.make::<S>(job, unit, target.step, room0), p1.make::<S>(job, unit, target.step, room1)) };
            // Past the last unit this is the last one again, which costs nothing.
            let next = target.panels.map(|p| p.get((unit + 1).min(target.units - 1), target.step));
            for block in blocks.clone() {
                let part = block - blocks.start;
                let ahead = Ahead { next, part, parts: blocks.len(), cold };
                cold = false;
                let first = block * BLOCK_ROWS;
                let rows = (job.rows - first).min(BLOCK_ROWS);
                // SAFETY: the block's rows and the panels are within the job's shapes.
                unsafe {
                    match job.left {
                        Left::Rounded(x) if !job.widens => {
                            few_rows_widened::<S>(x.add(first * job.k), rows, job.k, [b0, b1], sums);
                        }
                        Left::F32(x) | Left::Rounded(x) => {
                            block_f32::<S>(x.add(first * job.k), rows, job.k, [b0.cast(), b1.cast()], sums);
                        }
                        Left::Bf16(tiles) => {
                            let k_tiles = job.k.div_ceil(TILE_K);
                            let a = tiles.add(first / TILE_ROWS * k_tiles * TILE);
                            block_bf16::<S>(job.isa, a, rows, k_tiles, [b0, b1], sums, ahead);
                        }
                    }
                    match job.finish {
                        Finish::Store => store::<S>(target, unit, first, rows, sums),
                        Finish::Gate(of) => gate::<S>(target, of, unit, first, rows, sums),
                    }
                }
            }
        }
    }
}

/// Writes a block's columns with bias and residual.
///
/// # Safety
/// The target's pointers are valid for rows `first..first + rows`, `sums` for a block.
#[inline(always)]
unsafe fn store<S: Simd>(target: &Target, unit: usize, first: usize, rows: usize, sums: *const f32) {
    let column = unit * BLOCK_COLUMNS;
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

/// Writes the activation of a block's first panel times its second.
///
/// # Safety
/// As [`store`].
#[inline(always)]
unsafe fn gate<S: Simd>(
    target: &Target,
    activation: Activation,
    unit: usize,
    first: usize,
    rows: usize,
    sums: *const f32,
) {
    let column = unit * PANEL;
    let columns = (target.n - column).min(PANEL);
    for row in 0..rows {
        // SAFETY: the columns are within `[rows, n]`.
        unsafe {
            let (sums, out) = (sums.add(row * BLOCK_COLUMNS), target.out.add((first + row) * target.n + column));
            let y = S::mul(rows::apply::<S>(activation, S::load(sums)), S::load(sums.add(PANEL)));
            if columns == PANEL {
                S::store(out, y);
            } else {
                let mut all = [0f32; PANEL];
                S::store(all.as_mut_ptr(), y);
                std::ptr::copy_nonoverlapping(all.as_ptr(), out, columns);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;
    use crate::kernels::quantized::tests::{FORMATS, random_blocks};

    fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(seed);
        (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    fn rounded(x: &[f32]) -> Vec<f32> {
        x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect()
    }

    /// `x Wᵀ`, in f64.
    fn plain(x: &[f32], w: &[f32], rows: usize, n: usize, k: usize) -> Vec<f64> {
        let dot = |r: usize, c: usize| (0..k).map(|i| f64::from(x[r * k + i]) * f64::from(w[c * k + i])).sum();
        (0..rows * n).map(|i| dot(i / n, i % n)).collect()
    }

    fn check(what: &str, ours: &[f32], plain: impl Iterator<Item = f64>) {
        for (i, (a, b)) in ours.iter().zip(plain).enumerate() {
            assert!((f64::from(*a) - b).abs() < 2e-4 * (1.0 + b.abs()), "{what}: {a} and {b} at {i}");
        }
    }

    const SHAPES: [(usize, usize, usize); 7] =
        [(1, 1, 1), (3, 17, 33), (16, 32, 64), (33, 50, 31), (40, 96, 70), (65, 5, 128), (100, 33, 95)];

    #[test]
    fn products_equal_plain_ones_on_odd_shapes() {
        let pool = Pool::new(3);
        for (rows, n, k) in SHAPES {
            let (x, w) = (random(rows * k, 1), random(n * k, 2));
            let (bias, residual) = (random(n, 3), random(rows * n, 4));
            for isa in Isa::available() {
                for precision in [Precision::F32, Precision::Bf16] {
                    let what = format!("{isa:?} {precision:?} {rows} {n} {k}");
                    let (weight, exact) = match precision {
                        Precision::F32 => (PackedMatrix::from_f32(&w, n, k).unwrap(), plain(&x, &w, rows, n, k)),
                        Precision::Bf16 => {
                            let exact = plain(&rounded(&x), &rounded(&w), rows, n, k);
                            (PackedMatrix::from_f32_rounded(&w, n, k).unwrap(), exact)
                        }
                    };
                    let bare = Product { weight: &weight, bias: None, residual: None };
                    let full = Product { bias: Some(&bias), residual: Some(&residual), ..bare };
                    let results = multiply(isa, &pool, &x, rows, &[bare, full]);
                    check(&what, &results[0], exact.iter().copied());
                    let added = |(i, y): (usize, &f64)| y + f64::from(bias[i % n]) + f64::from(residual[i]);
                    check(&what, &results[1], exact.iter().enumerate().map(added));
                    let gated = multiply_gated(isa, &pool, Activation::Silu, &x, rows, &weight, &weight);
                    check(&what, &gated, exact.iter().map(|y| y / (1.0 + (-y).exp()) * y));
                    let gated = multiply_gated(isa, &pool, Activation::Relu, &x, rows, &weight, &weight);
                    check(&what, &gated, exact.iter().map(|y| y.max(0.0) * y));
                }
            }
        }
    }

    #[test]
    fn products_with_blocks_are_bit_for_bit_those_with_the_same_values() {
        let pool = Pool::new(2);
        for (i, (format, _)) in FORMATS.into_iter().enumerate() {
            for (rows, n, units) in [(1, 50, 1), (3, 16, 2), (40, 33, 1), (70, 5, 2)] {
                let k = units * if format.values() == 1 { 33 } else { format.values() };
                let bytes = random_blocks(format, n, k, i as u64);
                let mut values = vec![0f32; n * k];
                format.dequantize(&bytes, &mut values);
                let blocks = PackedMatrix::from_blocks(format, bytes, n, k);
                let plain = PackedMatrix::from_f32(&values, n, k).unwrap();
                let x = random(rows * k, 8);
                for isa in Isa::available() {
                    let products = |weight| {
                        let product = Product { weight, bias: None, residual: None };
                        let mixed = Product { weight: &plain, ..product };
                        let all = multiply(isa, &pool, &x, rows, &[product, mixed, product]);
                        [all.concat(), multiply_gated(isa, &pool, Activation::Silu, &x, rows, weight, weight)].concat()
                    };
                    let bits = |x: Vec<f32>| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert!(bits(products(&blocks)) == bits(products(&plain)), "{isa:?} {format:?} {rows} {n} {k}");
                }
                let mut row = vec![0f32; k];
                blocks.row(n - 1, &mut row);
                assert_eq!(row, values[(n - 1) * k..]);
            }
        }
    }

    #[test]
    fn a_row_is_the_same_bit_for_bit_alone_and_among_others() {
        let pool = Pool::new(2);
        // Besides the others, as many blocks of a unit as share the asking for the next one in each way, and
        // so many rows that tasks part them.
        for (rows, n, k) in SHAPES.into_iter().chain([(170, 40, 65), (290, 40, 33), (600, 3, 1500)]) {
            let (x, w) = (random(rows * k, 5), random(n * k, 6));
            for isa in Isa::available() {
                for weight in
                    [PackedMatrix::from_f32(&w, n, k).unwrap(), PackedMatrix::from_f32_rounded(&w, n, k).unwrap()]
                {
                    let product = Product { weight: &weight, bias: None, residual: None };
                    let all = &multiply(isa, &pool, &x, rows, &[product])[0];
                    let gated = multiply_gated(isa, &pool, Activation::Silu, &x, rows, &weight, &weight);
                    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    for row in (0..rows).step_by(1 + rows / 128) {
                        let x = &x[row * k..][..k];
                        let what = format!("{isa:?} {:?} {rows} {n} {k}, row {row}", weight.precision());
                        let alone = &multiply(isa, &pool, x, 1, &[product])[0];
                        assert!(bits(alone) == bits(&all[row * n..][..n]), "{what}");
                        let alone = multiply_gated(isa, &pool, Activation::Silu, x, 1, &weight, &weight);
                        assert!(bits(&alone) == bits(&gated[row * n..][..n]), "{what}, gated");
                    }
                }
            }
        }
    }
}
