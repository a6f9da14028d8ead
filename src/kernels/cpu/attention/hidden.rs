//! Which blocks a tile of queries sees some key of, and which of their keys a query does not attend to.

use std::ops::Range;

use super::tile::BLOCK_SCORES;
use crate::kernels::layout::{BLOCK_SIZE, Segment, TokenTree};

/// The keys that a query does not attend to.
pub(super) struct Hidden<'a> {
    /// Rows of the sequence outside are hidden.
    seen: Range<usize>,
    /// Of rows in a tree of tokens, those that are no ancestors of the query are hidden, too.
    branches: Option<Branches<'a>>,
}

struct Branches<'a> {
    tree: &'a TokenTree,
    /// The query's row in the tree.
    query: u32,
    window: Option<usize>,
}

/// The first row of its sequence that a query's window has, or an earlier one where the sequence ends with a tree.
fn oldest(segment: &Segment, query: usize, window: Option<usize>) -> usize {
    let Some(window) = window else { return 0 };
    let oldest = (segment.position(query) + 1).saturating_sub(window);
    segment.tree.as_ref().map_or(oldest, |tree| oldest.min(tree.start()))
}

/// The blocks that some query of a tile sees a key of, in order; the tile's queries belong to these rows of a sequence.
/// Other branches of a tree may fill blocks that none of them sees.
pub(super) fn visible_blocks(
    segment: &Segment,
    queries: Range<usize>,
    window: Option<usize>,
) -> impl Iterator<Item = usize> {
    // In a tree, later rows may have earlier positions.
    let oldest = queries.clone().map(|query| oldest(segment, query, window)).min().unwrap_or(0);
    let (first, last) = (queries.start, queries.end.div_ceil(BLOCK_SIZE));
    let tree = segment.tree.as_deref().filter(|tree| first >= tree.start());
    let own = first / BLOCK_SIZE;
    (oldest / BLOCK_SIZE..last).filter(move |&block| {
        // What later rows of the tile see are its own rows and rows that the first one sees, too.
        let is_seen = |tree: &TokenTree| {
            let keys = tree.start().max(block * BLOCK_SIZE)..(block + 1) * BLOCK_SIZE;
            block >= own || block * BLOCK_SIZE < tree.start() || keys.into_iter().any(|key| segment.sees(first, key))
        };
        tree.is_none_or(is_seen)
    })
}

impl<'a> Hidden<'a> {
    /// Of row `query` of a sequence.
    pub fn new(segment: &'a Segment, query: usize, window: Option<usize>) -> Self {
        let branches = segment.tree.as_deref().and_then(|tree| {
            let node = query.checked_sub(tree.start())?;
            (node < tree.ends().len()).then_some(Branches { tree, query: node as u32, window })
        });
        Self { seen: oldest(segment, query, window)..query + 1, branches }
    }

    /// Writes `value` over the scores of hidden keys.
    ///
    /// # Safety
    /// `scores` is the query's row of the first of these blocks.
    #[inline(always)]
    pub unsafe fn fill(&self, scores: *mut f32, blocks: &[usize], value: f32) {
        let line = self.branches.as_ref().map_or(self.seen.end, |branches| branches.tree.start());
        for (i, block) in blocks.iter().enumerate() {
            let keys = block * BLOCK_SIZE..(block + 1) * BLOCK_SIZE;
            if self.seen.start <= keys.start && keys.end <= line {
                continue;
            }
            // SAFETY: the query's row of a block.
            let scores = unsafe { std::slice::from_raw_parts_mut(scores.add(i * BLOCK_SCORES), BLOCK_SIZE) };
            let hidden_before = self.seen.start.saturating_sub(keys.start).min(BLOCK_SIZE);
            let seen = self.seen.end.saturating_sub(keys.start).min(BLOCK_SIZE);
            scores[..hidden_before].fill(value);
            scores[seen..].fill(value);
            if let Some(branches) = &self.branches {
                let first = line.max(keys.start);
                branches.fill(&mut scores[(first - keys.start).min(seen)..seen], first - line, value);
            }
        }
    }
}

impl Branches<'_> {
    /// As [`Hidden::fill`], for the scores of rows of the tree from `first` on.
    #[inline(always)]
    fn fill(&self, scores: &mut [f32], first: usize, value: f32) {
        let rows = first..first + scores.len();
        let (Some(ends), Some(depths)) = (self.tree.ends().get(rows.clone()), self.tree.depths().get(rows)) else {
            return;
        };
        for (score, end) in scores.iter_mut().zip(ends) {
            *score = if *end > self.query { *score } else { value };
        }
        if let Some(window) = self.window {
            let own = self.tree.depths()[self.query as usize];
            for (score, depth) in scores.iter_mut().zip(depths) {
                // An ancestor's depth is less.
                if own.saturating_sub(*depth) as usize >= window {
                    *score = value;
                }
            }
        }
    }
}
