//! Paged attention over the blocks of a [`CpuKvCache`]: of each sequence's new rows against all its
//! positions, a tile of 16 queries of one key-value head at a time.
//!
//! All scores of a tile are kept, so the softmax needs no running maximum: one pass over the keys, the softmax, one
//! pass over the values. Masked positions have weight zero and add nothing, so a query's numbers do not depend on the
//! other queries of its tile.

mod hidden;
mod prefetch;
mod scores;
mod softmax;
mod tile;
mod values;
mod write;

use std::{cell::Cell, ops::Range};

use hidden::{Hidden, visible_blocks};
use prefetch::Ahead;
use scores::{block_scores, load_queries};
use softmax::{shape_scores, softmax};
use tile::{BLOCK_SCORES, TILE_ROWS};
use values::weigh_values;
use write::{parts, write_rows};

use super::{
    Buffer, Isa, Precision, dispatch, elements,
    kv_cache::CpuKvCache,
    pool::Pool,
    simd::{LANES, Simd},
    tensors::written,
};
use crate::kernels::{
    AttentionParams, KvCache as _,
    layout::{BLOCK_SIZE, Segment},
};

/// Queries, keys and values of a step's rows, packed as the segments say.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// `[t, heads, head_dim]`
    pub q: &'a [f32],
    /// `[t, kv_heads, head_dim]`
    pub k: &'a [f32],
    /// As `k`.
    pub v: &'a [f32],
    pub heads: usize,
    pub params: &'a AttentionParams,
}

/// Writes the rows' keys and values to the cache, then attends: `[t, heads * head_dim]`.
///
/// # Panics
/// If a shape does not fit, a segment has too few blocks or one that does not exist, or a block that one segment
/// writes to appears a second time in the segments' block tables.
pub fn attend(
    isa: Isa,
    pool: &Pool,
    cache: &mut CpuKvCache,
    layer: usize,
    segments: &[Segment],
    rows: Rows,
) -> Vec<f32> {
    let shape = cache.layout();
    for s in segments {
        let end = s.start.checked_add(s.rows).map(|end| end.div_ceil(BLOCK_SIZE));
        assert!(s.rows > 0 && end.is_some_and(|end| end <= s.blocks.len()), "{s:?} has too few blocks");
        assert!(s.blocks.iter().all(|&b| (b as usize) < cache.num_blocks()), "{s:?} has no such block");
    }
    let t: usize = segments.iter().map(|s| s.rows).sum();
    assert!(layer < shape.num_layers && shape.head_dim > 0 && rows.heads.is_multiple_of(shape.num_kv_heads));
    assert!(rows.q.len() == elements(&[t, rows.heads, shape.head_dim]));
    assert!(rows.k.len() == elements(&[t, shape.num_kv_heads, shape.head_dim]) && rows.v.len() == rows.k.len());
    assert!(
        rows.params.causal && rows.params.relative_position_bias.as_ref().is_none_or(|bias| bias.heads() == rows.heads)
    );
    assert!(rows.params.window != Some(0) && rows.params.alibi_slopes.as_ref().is_none_or(|s| s.len() == rows.heads));
    assert_written_blocks_are_not_shared(segments, cache.num_blocks());
    let offset = |block, head| cache.offset(layer, block, head);
    // One plan for all heads: where each segment's rows begin, and its tiles.
    let groups = rows.heads / shape.num_kv_heads;
    let mut first = 0;
    let mut tiles = Vec::new();
    let mut starts = Vec::with_capacity(segments.len());
    for (index, s) in segments.iter().enumerate() {
        starts.push(first);
        first += s.rows;
        tiles.extend((0..(s.rows * groups).div_ceil(TILE_ROWS)).map(|tile| (index, tile)));
    }
    // The offset of every segment's blocks for head 0; the next head is two planes (keys, values) further.
    let planes: Vec<Vec<usize>> = segments.iter().map(|s| s.blocks.iter().map(|&b| offset(b, 0)).collect()).collect();
    let mut step = Step {
        isa,
        segments,
        planes: &planes,
        starts: &starts,
        rows,
        groups,
        kv_heads: shape.num_kv_heads,
        head_dim: shape.head_dim,
        dim: shape.padded_dim(),
        plane: shape.plane(),
        precision: shape.precision,
        words: cache.words_mut().as_mut_ptr(),
        out: std::ptr::null_mut(),
    };
    // A segment of one tile is written by the task that attends to it: its keys and values are then still in the cache
    // of that core.
    let writes: Vec<(usize, Range<usize>)> = (0..segments.len())
        .filter(|&i| !step.is_one_tile(i))
        .flat_map(|i| parts(&segments[i]).map(move |rows| (i, rows)))
        .collect();
    pool.run(writes.len() * step.kv_heads, &|task| {
        let ((index, rows), head) = (writes[task % writes.len()].clone(), task / writes.len());
        let step = &step;
        // SAFETY: shapes are checked above; a block that is written belongs to one segment, and this task
        // alone has its rows of this head, which are all that the step writes to their blocks.
        unsafe { dispatch!(step.isa, write_rows(step: &Step, index: usize, head: usize, rows: Range<usize>)) };
    });
    let fill = |out: *mut f32| {
        step.out = out;
        // A sequence's heads lie side by side in memory; they are split over tasks only where there are too few
        // tasks otherwise.
        let parts = if tiles.len() >= 4 * pool.threads() { 1 } else { step.kv_heads };
        let heads_per_task = step.kv_heads / parts;
        pool.run(tiles.len() * parts, &|task| {
            // The last tiles of a long segment see the most positions: they go first.
            let (index, tile) = tiles[tiles.len() - 1 - task / parts];
            for head in (0..heads_per_task).map(|h| task % parts * heads_per_task + h) {
                let step = &step;
                // SAFETY: shapes are checked above; the keys and values of segments of several tiles have
                // been written; this task alone has its rows of the output, and this head of the blocks that are
                // written for a segment of one tile.
                unsafe { dispatch!(step.isa, attend_tile(step: &Step, index: usize, head: usize, tile: usize)) };
            }
        });
    };
    // SAFETY: the tiles of all heads are all of the rows.
    unsafe { written(rows.q.len(), fill) }
}

/// Panics if a block that one segment writes to is written to or read by another, or has two places in a segment's own
/// block table. What threads do with the cache is free of data races if none is.
fn assert_written_blocks_are_not_shared(segments: &[Segment], num_blocks: usize) {
    let mut written = vec![0u64; num_blocks.div_ceil(64)];
    let bit = |block: u32| (block as usize / 64, 1 << (block % 64));
    // Blocks after those that are written are neither read nor written in this call.
    let touched = |s: &Segment| (s.start / BLOCK_SIZE, (s.start + s.rows).div_ceil(BLOCK_SIZE));
    for s in segments {
        let (first, end) = touched(s);
        for &block in &s.blocks[first..end] {
            let (word, bit) = bit(block);
            assert!(written[word] & bit == 0, "block {block} is written for two parts of the step: {s:?}");
            written[word] |= bit;
        }
    }
    for s in segments {
        for &block in &s.blocks[..touched(s).0] {
            let (word, bit) = bit(block);
            assert!(
                written[word] & bit == 0,
                "block {block} is read by one part of the step and written by another: {s:?}"
            );
        }
    }
}

/// One layer of a step.
struct Step<'a> {
    isa: Isa,
    segments: &'a [Segment],
    /// For each segment, where each of its blocks begins.
    planes: &'a [Vec<usize>],
    /// The first packed row of each segment.
    starts: &'a [usize],
    rows: Rows<'a>,
    /// Query heads of a key-value head.
    groups: usize,
    kv_heads: usize,
    head_dim: usize,
    /// `head_dim`, padded.
    dim: usize,
    /// Words in one head's keys, or its values, of a block.
    plane: usize,
    precision: Precision,
    words: *mut u32,
    out: *mut f32,
}

// SAFETY: threads write disjoint positions of the cache, which nobody else reads before they are written,
// and disjoint rows of the output; everything else they only read.
unsafe impl Sync for Step<'_> {}

impl Step<'_> {
    /// Whether all queries of a segment and a key-value head are in one tile.
    fn is_one_tile(&self, index: usize) -> bool {
        self.segments[index].rows * self.groups <= TILE_ROWS
    }

    /// How far a head is from head 0 of the same block.
    #[inline(always)]
    fn head_offset(&self, head: usize) -> usize {
        head * 2 * self.plane
    }

    /// A head's keys in a block that begins at `plane`; its values come [`plane`](Self::plane) words later.
    #[inline(always)]
    fn keys(&self, plane: usize, head: usize) -> *mut u32 {
        self.words.wrapping_add(plane + self.head_offset(head))
    }

    /// What is read after the keys of the `i`th of some blocks: those of the next one, then the first block's values.
    #[inline(always)]
    fn after_keys(&self, planes: &[usize], i: usize, head: usize) -> Ahead {
        Ahead(match planes.get(i + 1) {
            Some(&next) => Some(self.keys(next, head).cast_const()),
            None => planes.first().map(|&first| self.keys(first, head).wrapping_add(self.plane).cast_const()),
        })
    }

    /// What is read after a block's values: those of the next block, then the next head's keys.
    #[inline(always)]
    fn after_values(&self, planes: &[usize], i: usize, head: usize) -> Ahead {
        match (planes.get(i + 1), planes.first()) {
            (Some(&next), _) => Ahead(Some(self.keys(next, head).wrapping_add(self.plane))),
            (None, Some(&first)) if head + 1 < self.kv_heads => Ahead(Some(self.keys(first, head + 1))),
            _ => Ahead::NOTHING,
        }
    }
}

/// A thread's memory for one tile; it grows with the longest sequence seen.
struct Scratch {
    /// The blocks that some query of the tile sees a key of, and where each begins.
    blocks: Vec<usize>,
    planes: Vec<usize>,
    /// f32 `[16][dim]`, or bf16 `[dim / 32][16][16 pairs]`.
    queries: Buffer<u32>,
    /// `[blocks][16][32]`: scores, then weights.
    scores: Buffer<f32>,
    /// `[blocks][16][16]` pairs of weights in bf16.
    weights: Buffer<u32>,
    /// `[16][dim]`
    sums: Buffer<f32>,
}

impl Scratch {
    const fn new() -> Self {
        Self {
            blocks: Vec::new(),
            planes: Vec::new(),
            queries: Buffer::empty(),
            scores: Buffer::empty(),
            weights: Buffer::empty(),
            sums: Buffer::empty(),
        }
    }
}

/// Attention of a tile: 16 queries of one key-value head. Query `i` of a segment is head `i % groups` of row `i / groups`.
///
/// # Safety
/// The step's pointers are valid for its shapes, and no other thread has this tile. The segment's keys and
/// values are written, unless it has no other tile.
#[inline(always)]
unsafe fn attend_tile<S: Simd>(step: &Step, index: usize, head: usize, tile: usize) {
    thread_local!(static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch::new()) });
    // Taken out and put back: a closure would be compiled without the instructions of `S`.
    let mut scratch = SCRATCH.replace(Scratch::new());
    let segment = &step.segments[index];
    let first = tile * TILE_ROWS;
    let count = (segment.rows * step.groups - first).min(TILE_ROWS);
    // The row of its sequence that a query belongs to.
    let row = |i: usize| segment.start + (first + i) / step.groups;
    let params = step.rows.params;
    scratch.blocks.clear();
    scratch.blocks.extend(visible_blocks(segment, row(0)..row(count - 1) + 1, params.window));
    let blocks = &scratch.blocks[..];
    scratch.planes.clear();
    scratch.planes.extend(blocks.iter().map(|&block| step.planes[index][block]));
    let planes = &scratch.planes[..];
    let queries = scratch.queries.scratch(TILE_ROWS * step.dim).as_mut_ptr();
    let scores = scratch.scores.scratch(blocks.len() * BLOCK_SCORES).as_mut_ptr();
    let weights = scratch.weights.scratch(blocks.len() * BLOCK_SCORES / 2).as_mut_ptr();
    let sums = scratch.sums.scratch(TILE_ROWS * step.dim.max(64)).as_mut_ptr();
    // Where a query, and its result, lies in the packed rows.
    let at = |i: usize| {
        let (row, group) = ((first + i) / step.groups, (first + i) % step.groups);
        ((step.starts[index] + row) * step.rows.heads + head * step.groups + group) * step.head_dim
    };
    // SAFETY: the scratch is as large as the shapes below; every block is one of the segment's.
    unsafe {
        if step.is_one_tile(index) {
            write_rows::<S>(step, index, head, 0..step.segments[index].rows);
        }
        load_queries::<S>(step, count, at, queries);
        for (i, &plane) in planes.iter().enumerate() {
            let keys = step.keys(plane, head);
            let ahead = step.after_keys(planes, i, head);
            block_scores::<S>(step, queries, keys, count, scores.add(i * BLOCK_SCORES), ahead);
        }
        let mut scales = [0f32; TILE_ROWS];
        for (i, scale) in scales.iter_mut().enumerate().take(count) {
            let weights = match step.precision {
                Precision::Bf16 => weights.add(i * BLOCK_SIZE / 2),
                Precision::F32 => std::ptr::null_mut(),
            };
            let scores = scores.add(i * BLOCK_SIZE);
            let factor = match (params.softcap, &params.alibi_slopes, &params.relative_position_bias) {
                (None, None, None) => params.scale,
                (softcap, slopes, bias) => {
                    let query_head = head * step.groups + (first + i) % step.groups;
                    let slope = slopes.as_ref().map_or(0.0, |s| s[query_head]);
                    let position = segment.position(row(i));
                    shape_scores::<S>(scores, blocks, params.scale, softcap, slope, position as f32);
                    let keys = |(i, block): (usize, &usize)| {
                        let (first, at) = (block * BLOCK_SIZE, i * BLOCK_SCORES);
                        (0..BLOCK_SIZE).map(move |slot| (first + slot, at + slot))
                    };
                    let keys = blocks.iter().enumerate().flat_map(keys).filter(|(key, _)| *key <= row(i));
                    if let (Some(tree), true) = (&segment.tree, slope != 0.0) {
                        for (key, at) in keys.clone().filter(|(key, _)| *key >= tree.start()) {
                            *scores.add(at) += slope * (segment.position(key) as f32 - key as f32);
                        }
                    }
                    if let Some(bias) = bias {
                        for (key, at) in keys {
                            *scores.add(at) += bias.at(query_head, position, segment.position(key));
                        }
                    }
                    1.0
                }
            };
            let hidden = Hidden::new(segment, row(i), params.window);
            *scale = softmax::<S>(scores, &hidden, blocks, factor, weights.cast());
        }
        weigh_values::<S>(step, planes, head, count, scores, weights, sums);
        for (i, scale) in scales.iter().enumerate().take(count) {
            let (from, to) = (sums.add(i * step.dim), step.out.add(at(i)));
            let whole = step.head_dim / LANES * LANES;
            for d in (0..whole).step_by(LANES) {
                S::store(to.add(d), S::mul(S::load(from.add(d)), S::splat(*scale)));
            }
            for d in whole..step.head_dim {
                *to.add(d) = *from.add(d) * scale;
            }
        }
    }
    SCRATCH.set(scratch);
}

#[cfg(test)]
mod tests;
