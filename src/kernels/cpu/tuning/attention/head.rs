//! Attention of one sequence's queries of one key head, and its gradient: products of small dense matrices.
//!
//! With Q, K, V and the output's gradient D of `[queries, dim]` and `[keys, dim]`, weights P = softmax(Q Kᵀ) and their
//! gradient G = D Vᵀ, scores get the gradient S = P ∘ (G - rowsum(P ∘ G)), and then the gradients are S K of the queries,
//! Sᵀ Q of the keys and Pᵀ D of the values.

use std::cell::Cell;

use super::{
    super::super::{
        Isa,
        block::{BLOCK_COLUMNS, BLOCK_ROWS, block_f32},
        dispatch,
        packed::PANEL_WIDTH,
        simd::{LANES, Simd},
    },
    seen::Seen,
};
use crate::kernels::AttentionParams;

/// One sequence and one key head.
pub struct HeadTask<'a> {
    pub seen: &'a Seen,
    pub kv_head: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub params: &'a AttentionParams,
    /// `[t, heads, head_dim]`
    pub q: &'a [f32],
    /// `[keys, kv_heads, head_dim]`
    pub k: &'a [f32],
    /// As `k`.
    pub v: &'a [f32],
}

/// Gradients of a sequence's keys and values of one head, `[keys, head_dim]` each.
#[derive(Default)]
pub struct HeadGradients {
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

/// A thread's memory for one task; it grows with the largest.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    panels: Vec<f32>,
    weights: Vec<f32>,
    grads: Vec<f32>,
    slopes: Vec<f32>,
    out: Vec<f32>,
}

thread_local!(static SCRATCH: Cell<Scratch> = Cell::default());

/// Room for the right side of a product: zeroed micro-panels of 16 columns, `[columns / 16][inner][16]`, an even number of
/// them. Returns how many columns they have.
fn panels(out: &mut Vec<f32>, inner: usize, columns: usize) -> usize {
    let width = columns.next_multiple_of(BLOCK_COLUMNS);
    out.clear();
    out.resize(inner * width, 0.0);
    width
}

/// Panels of a matrix whose row `i` is `row(i)`, as it is: inner index by rows.
fn panels_of_rows<'a>(
    out: &mut Vec<f32>,
    inner: usize,
    columns: usize,
    rows: impl Iterator<Item = (usize, &'a [f32])>,
) -> usize {
    let width = panels(out, inner, columns);
    for (i, row) in rows {
        for (panel, values) in row.chunks(PANEL_WIDTH).enumerate() {
            out[(panel * inner + i) * PANEL_WIDTH..][..values.len()].copy_from_slice(values);
        }
    }
    width
}

/// Panels of a matrix whose column `i` is `row(i)`: transposed.
fn panels_of_columns<'a>(
    out: &mut Vec<f32>,
    inner: usize,
    columns: usize,
    rows: impl Iterator<Item = (usize, &'a [f32])>,
) -> usize {
    let width = panels(out, inner, columns);
    for (i, row) in rows {
        let panel = &mut out[i / PANEL_WIDTH * inner * PANEL_WIDTH + i % PANEL_WIDTH..];
        panel.iter_mut().step_by(PANEL_WIDTH).zip(row).for_each(|(to, value)| *to = *value);
    }
    width
}

/// `x` `[rows, inner]` by panels of `width` columns: `out` `[rows, width]`.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
unsafe fn product<S: Simd>(x: &[f32], rows: usize, inner: usize, panels: &[f32], width: usize, out: &mut Vec<f32>) {
    assert!(x.len() >= rows * inner && panels.len() >= inner * width && width.is_multiple_of(BLOCK_COLUMNS));
    out.clear();
    out.resize(rows * width, 0.0);
    let mut sums = [0f32; BLOCK_ROWS * BLOCK_COLUMNS];
    for column in (0..width).step_by(BLOCK_COLUMNS) {
        let at = |panel: usize| panels[(column / PANEL_WIDTH + panel) * inner * PANEL_WIDTH..].as_ptr();
        for row in (0..rows).step_by(BLOCK_ROWS) {
            let count = (rows - row).min(BLOCK_ROWS);
            // SAFETY: the block's rows are within `x`, the panels are of `inner` rows, and `sums` is a block.
            unsafe {
                block_f32::<S>(x[row * inner..].as_ptr(), count, inner, inner, [at(0), at(1)], sums.as_mut_ptr());
            }
            for (i, sums) in sums.chunks_exact(BLOCK_COLUMNS).take(count).enumerate() {
                out[(row + i) * width + column..][..BLOCK_COLUMNS].copy_from_slice(sums);
            }
        }
    }
}

impl<'a> HeadTask<'a> {
    fn groups(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn num_queries(&self) -> usize {
        self.seen.rows.len() * self.groups()
    }

    /// Where query `i` lies in `[t, heads, head_dim]`: group `i % groups` of row `i / groups`.
    fn at(&self, i: usize) -> usize {
        let (row, group) = (self.seen.rows.start + i / self.groups(), i % self.groups());
        (row * self.heads + self.kv_head * self.groups() + group) * self.head_dim
    }

    /// The queries' values of `[t, heads, head_dim]`, with their numbers.
    fn of_queries<'b>(&self, x: &'b [f32]) -> impl Iterator<Item = (usize, &'b [f32])> + use<'a, 'b, '_> {
        (0..self.num_queries()).map(|i| (i, &x[self.at(i)..][..self.head_dim]))
    }

    /// The keys' values of `[keys, kv_heads, head_dim]`, with their numbers.
    fn of_keys<'b>(&self, x: &'b [f32]) -> impl Iterator<Item = (usize, &'b [f32])> + use<'a, 'b> {
        let (width, first, dim) = (self.kv_heads * self.head_dim, self.kv_head * self.head_dim, self.head_dim);
        self.seen.keys().map(move |row| &x[row * width + first..][..dim]).enumerate()
    }

    /// Writes the task's part of `[t, heads * head_dim]`.
    ///
    /// # Safety
    /// `out` is valid for all rows, and nobody else has this task's.
    pub unsafe fn forward(&self, isa: Isa, out: *mut f32) {
        let task = self;
        if self.seen.num_keys() == 0 {
            // SAFETY: as the caller says.
            unsafe { self.store(&vec![0.0; self.num_queries() * self.head_dim], self.head_dim, out) };
            return;
        }
        // SAFETY: as the caller says.
        unsafe { dispatch!(isa, forward(task: &HeadTask<'_>, out: *mut f32)) };
    }

    /// The gradients of keys and values; writes those of the queries to `out`, which is as `q`. `grad` is the output's.
    ///
    /// # Safety
    /// As [`forward`](Self::forward).
    pub unsafe fn backward(&self, isa: Isa, grad: &[f32], out: *mut f32) -> HeadGradients {
        let task = self;
        let mut gradients = HeadGradients::default();
        if self.seen.num_keys() == 0 {
            // SAFETY: as the caller says.
            unsafe { self.store(&vec![0.0; self.num_queries() * self.head_dim], self.head_dim, out) };
            return gradients;
        }
        let to = &mut gradients;
        // SAFETY: as the caller says.
        unsafe { dispatch!(isa, backward(task: &HeadTask<'_>, grad: &[f32], out: *mut f32, to: &mut HeadGradients)) };
        gradients
    }

    /// Stores rows of `width` values where the queries lie.
    ///
    /// # Safety
    /// As [`forward`](Self::forward).
    unsafe fn store(&self, rows: &[f32], width: usize, out: *mut f32) {
        for i in 0..self.num_queries() {
            let row = &rows[i * width..][..self.head_dim];
            // SAFETY: `at` is where the query's values lie, and the caller says that they are this task's.
            unsafe { std::ptr::copy_nonoverlapping(row.as_ptr(), out.add(self.at(i)), self.head_dim) };
        }
    }

    /// The softmax of the queries' scores: `[queries, width]`, zero where a query does not see a key. With a soft cap, `slopes`
    /// becomes how much each score moves with the product of query and key.
    ///
    /// # Safety
    /// The processor has the instructions of `S`.
    #[inline(always)]
    unsafe fn weights<S: Simd>(&self, scratch: &mut Scratch) -> usize {
        let (keys, dim) = (self.seen.num_keys(), self.head_dim);
        let Scratch { queries, panels, weights, slopes, .. } = scratch;
        queries.clear();
        self.of_queries(self.q).for_each(|(_, q)| queries.extend_from_slice(q));
        let width = panels_of_columns(panels, dim, keys, self.of_keys(self.k));
        // SAFETY: as the caller says.
        unsafe { product::<S>(queries, self.num_queries(), dim, panels, width, weights) };
        slopes.clear();
        let AttentionParams { scale, softcap, alibi_slopes, relative_position_bias, .. } = self.params;
        for (i, scores) in weights.chunks_exact_mut(width).enumerate() {
            let (row, head) = (i / self.groups(), self.kv_head * self.groups() + i % self.groups());
            let visible = self.seen.visible[row].clone();
            let place = self.seen.place + row;
            match softcap {
                Some(cap) => slopes.extend(scores.iter_mut().map(|score| {
                    let t = (*score * scale / cap).tanh();
                    *score = t * cap;
                    (1.0 - t * t) * scale
                })),
                None => scores.iter_mut().for_each(|score| *score *= scale),
            }
            if let Some(alibi) = alibi_slopes {
                scores[..keys].iter_mut().enumerate().for_each(|(j, s)| *s -= alibi[head] * (place as f32 - j as f32));
            }
            if let Some(bias) = relative_position_bias {
                scores[..keys].iter_mut().enumerate().for_each(|(j, score)| *score += bias.at(head, place, j));
            }
            // SAFETY: as the caller says.
            unsafe { softmax::<S>(scores, visible) };
        }
        width
    }
}

/// The softmax of the scores in `visible`, in place; the others become zero. `scores` is a multiple of 16 long.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
unsafe fn softmax<S: Simd>(scores: &mut [f32], visible: std::ops::Range<usize>) {
    if visible.is_empty() {
        scores.fill(0.0);
        return;
    }
    scores[..visible.start].fill(f32::NEG_INFINITY);
    scores[visible.end..].fill(f32::NEG_INFINITY);
    // SAFETY: chunks are of 16 values, and the processor has the instructions.
    unsafe {
        let mut largest = S::splat(f32::NEG_INFINITY);
        for chunk in scores.chunks_exact(LANES) {
            largest = S::max(largest, S::load(chunk.as_ptr()));
        }
        let largest = S::splat(S::largest(largest));
        for chunk in scores.chunks_exact_mut(LANES) {
            S::store(chunk.as_mut_ptr(), S::exp(S::sub(S::load(chunk.as_ptr()), largest)));
        }
        scores[..visible.start].fill(0.0);
        scores[visible.end..].fill(0.0);
        let mut sum = S::splat(0.0);
        for chunk in scores.chunks_exact(LANES) {
            sum = S::add(sum, S::load(chunk.as_ptr()));
        }
        let scale = S::splat(S::sum(sum).recip());
        for chunk in scores.chunks_exact_mut(LANES) {
            S::store(chunk.as_mut_ptr(), S::mul(S::load(chunk.as_ptr()), scale));
        }
    }
}

/// See [`HeadTask::forward`].
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn forward<S: Simd>(task: &HeadTask<'_>, to: *mut f32) {
    // Taken out and put back: a closure would be compiled without the instructions of `S`.
    let mut scratch = SCRATCH.take();
    // SAFETY: as the caller says.
    unsafe {
        let keys = task.weights::<S>(&mut scratch);
        let Scratch { panels, weights, out, .. } = &mut scratch;
        let width = panels_of_rows(panels, keys, task.head_dim, task.of_keys(task.v));
        product::<S>(weights, task.num_queries(), keys, panels, width, out);
        task.store(out, width, to);
    }
    SCRATCH.set(scratch);
}

/// See [`HeadTask::backward`].
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn backward<S: Simd>(task: &HeadTask<'_>, grad: &[f32], to: *mut f32, gradients: &mut HeadGradients) {
    let mut scratch = SCRATCH.take();
    let (queries, dim) = (task.num_queries(), task.head_dim);
    // SAFETY: as the caller says.
    unsafe {
        let keys = task.weights::<S>(&mut scratch);
        let Scratch { queries: left, panels, weights, grads, slopes, out } = &mut scratch;
        left.clear();
        task.of_queries(grad).for_each(|(_, grad)| left.extend_from_slice(grad));
        panels_of_columns(panels, dim, keys, task.of_keys(task.v));
        product::<S>(left, queries, dim, panels, keys, grads);

        // Weights and gradients of a query's rows side by side, for their products with the queries of all rows.
        transpose(task.of_queries(grad), queries, dim, left);
        panels_of_rows(panels, queries, keys, weights.chunks_exact(keys).enumerate());
        product::<S>(left, dim, queries, panels, keys, out);
        gradients.v = transposed_back(out, dim, keys, task.seen.num_keys());

        let scale = S::splat(task.params.scale);
        for (i, (weights, grads)) in weights.chunks_exact(keys).zip(grads.chunks_exact_mut(keys)).enumerate() {
            let mut sum = S::splat(0.0);
            for (weights, grads) in weights.chunks_exact(LANES).zip(grads.chunks_exact(LANES)) {
                sum = S::fma(S::load(weights.as_ptr()), S::load(grads.as_ptr()), sum);
            }
            let mean = S::splat(S::sum(sum));
            for (j, (weights, grads)) in weights.chunks_exact(LANES).zip(grads.chunks_exact_mut(LANES)).enumerate() {
                let slope = match slopes.get(i * keys + j * LANES..) {
                    Some(slopes) if slopes.len() >= LANES => S::load(slopes.as_ptr()),
                    _ => scale,
                };
                let grad = S::sub(S::load(grads.as_ptr()), mean);
                S::store(grads.as_mut_ptr(), S::mul(S::mul(S::load(weights.as_ptr()), grad), slope));
            }
        }
        let width = panels_of_rows(panels, keys, dim, task.of_keys(task.k));
        product::<S>(grads, queries, keys, panels, width, out);
        task.store(out, width, to);

        transpose(task.of_queries(task.q), queries, dim, left);
        panels_of_rows(panels, queries, keys, grads.chunks_exact(keys).enumerate());
        product::<S>(left, dim, queries, panels, keys, out);
        gradients.k = transposed_back(out, dim, keys, task.seen.num_keys());
    }
    SCRATCH.set(scratch);
}

/// `[queries, dim]` to `[dim, queries]`.
fn transpose<'a>(rows: impl Iterator<Item = (usize, &'a [f32])>, queries: usize, dim: usize, to: &mut Vec<f32>) {
    to.clear();
    to.resize(queries * dim, 0.0);
    for (i, row) in rows {
        to[i..].iter_mut().step_by(queries).zip(row).for_each(|(to, value)| *to = *value);
    }
}

/// The first `keys` columns of `[dim, width]` as rows: `[keys, dim]`.
fn transposed_back(from: &[f32], dim: usize, width: usize, keys: usize) -> Vec<f32> {
    let mut to = vec![0f32; keys * dim];
    for (j, to) in to.chunks_exact_mut(dim).enumerate() {
        to.iter_mut().zip(from[j..].iter().step_by(width)).for_each(|(to, value)| *to = *value);
    }
    to
}
