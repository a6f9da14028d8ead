//! A batch as plain host data: which packed rows belong to which sequence, and where their keys and values are.

use std::sync::Arc;

use candle_core::{DType, Tensor};

/// Positions in one block of the key-value cache.
pub const BLOCK_SIZE: usize = 32;

/// The index of a block in the key-value cache.
pub type BlockId = u32;

/// The shape of a model's key-value cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers of the decoder.
    pub num_layers: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// The type that keys and values are kept in: bf16, f32 or f64.
    pub dtype: DType,
}

/// Consecutive packed rows that belong to one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// How many rows.
    pub rows: usize,
    /// How many rows of its sequence come before them: the index of the first row.
    pub start: usize,
    /// The sequence's block table: row i of the sequence lies in block `blocks[i / BLOCK_SIZE]`. Empty where nothing is
    /// kept in the cache: for the rows of an encoder, and in tuning.
    pub blocks: Vec<BlockId>,
    /// The tree that the sequence ends with, if it does. Only in serving.
    pub tree: Option<Arc<TokenTree>>,
}

impl Segment {
    /// Rows of a sequence in which each row attends to all before it.
    pub fn new(rows: usize, start: usize, blocks: Vec<BlockId>) -> Self {
        Self { rows, start, blocks, tree: None }
    }

    /// The position of a row of the sequence: its index, or what its tree says.
    pub fn position(&self, index: usize) -> usize {
        self.tree.as_ref().map_or(index, |tree| tree.position(index))
    }

    /// Whether row `query` of the sequence attends to row `key`, if no window hides it.
    pub fn sees(&self, query: usize, key: usize) -> bool {
        key <= query && self.tree.as_ref().is_none_or(|tree| tree.sees(query, key))
    }
}

/// The rows that a sequence ends with, where they are no line but a tree, or several: what may follow one beginning,
/// computed in one pass (tree attention; Miao et al. 2024, SpecInfer). A row attends to all rows before the tree, to its
/// ancestors and to itself, and its position is that of a sequence which has these alone.
///
/// Rows lie in depth-first order, so the descendants of a row are those right after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenTree {
    start: usize,
    depths: Vec<u32>,
    ends: Vec<u32>,
}

impl TokenTree {
    /// A tree whose first row has index `start` in its sequence. `depths` has for each of its rows in depth-first order
    /// how many ancestors it has.
    pub fn new(start: usize, depths: Vec<u32>) -> Self {
        let mut ends = vec![depths.len() as u32; depths.len()];
        let mut open: Vec<usize> = Vec::new();
        for (i, depth) in depths.iter().enumerate() {
            while let Some(last) = open.pop_if(|&mut last| depths[last] >= *depth) {
                ends[last] = i as u32;
            }
            open.push(i);
        }
        Self { start, depths, ends }
    }

    /// The index of the tree's first row in its sequence.
    pub fn start(&self) -> usize {
        self.start
    }

    /// For each row of the tree, how many ancestors it has.
    pub fn depths(&self) -> &[u32] {
        &self.depths
    }

    /// For each row of the tree, the row after its last descendant, both counted from the tree's first row.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// The position of the row of an index in the sequence.
    pub fn position(&self, index: usize) -> usize {
        let depth = index.checked_sub(self.start).and_then(|node| self.depths.get(node));
        depth.map_or(index, |depth| self.start + *depth as usize)
    }

    /// Whether row `query` of the sequence attends to row `key`, which does not come after it.
    fn sees(&self, query: usize, key: usize) -> bool {
        let end = key.checked_sub(self.start).and_then(|node| self.ends.get(node));
        end.is_none_or(|end| query < self.start + *end as usize)
    }
}

/// One forward pass: packed rows without padding, first those that all sequences share, then each sequence's own.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BatchLayout {
    /// Rows of a learned prompt that every sequence begins with, computed once for all of them. Only in tuning;
    /// in serving a prompt is shared through the cache.
    pub shared: usize,
    /// The sequences' own rows, in their order.
    pub segments: Vec<Segment>,
    /// The rows whose final hidden states are wanted, such as those that predict a next token.
    pub wanted: Vec<u32>,
}

impl BatchLayout {
    /// Sequences of these lengths after `shared` rows that all begin with; every row is wanted.
    pub fn of_lengths(shared: usize, lengths: &[usize]) -> Self {
        let segment = |&rows: &usize| Segment::new(rows, shared, Vec::new());
        let mut layout = Self { shared, segments: lengths.iter().map(segment).collect(), wanted: Vec::new() };
        layout.wanted = (0..layout.num_rows() as u32).collect();
        layout
    }

    /// How many packed rows there are.
    pub fn num_rows(&self) -> usize {
        self.shared + self.segments.iter().map(|segment| segment.rows).sum::<usize>()
    }

    /// The position of each row in its sequence.
    pub fn positions(&self) -> Vec<u32> {
        let own = self.segments.iter().flat_map(|s| (s.start..s.start + s.rows).map(|index| s.position(index) as u32));
        (0..self.shared as u32).chain(own).collect()
    }

    /// The rows of each sequence's own.
    pub fn rows(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        self.segments.iter().scan(self.shared, |end, segment| {
            *end += segment.rows;
            Some(*end - segment.rows..*end)
        })
    }
}

/// What a forward pass needs to know of its rows beside the layout, as u32 on the device.
#[derive(Debug, Clone)]
pub struct RowIndices {
    /// `[t]`: the position of each row in its sequence.
    pub positions: Tensor,
    /// The rows whose final hidden states are wanted; `None` where these are all rows in their order.
    pub wanted: Option<Tensor>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_from_the_shared_rows_or_from_a_segments_start() {
        let tuning = BatchLayout::of_lengths(2, &[3, 1]);
        assert_eq!((tuning.num_rows(), tuning.positions()), (6, vec![0, 1, 2, 3, 4, 2]));
        assert_eq!(tuning.rows().collect::<Vec<_>>(), [2..5, 5..6]);
        assert_eq!(tuning.wanted, [0, 1, 2, 3, 4, 5]);
        let segment = |rows, start| Segment::new(rows, start, vec![0, 1]);
        let serving = BatchLayout { segments: vec![segment(2, 31), segment(1, 7)], ..Default::default() };
        assert_eq!((serving.num_rows(), serving.positions()), (3, vec![31, 32, 7]));
    }

    #[test]
    fn a_row_of_a_tree_sees_what_comes_before_the_tree_its_ancestors_and_itself() {
        // a, a b, a b c, a d, e, e f.
        let tree = TokenTree::new(10, vec![0, 1, 2, 1, 0, 1]);
        assert_eq!(tree.ends(), [4, 3, 3, 4, 6, 6]);
        let segment = Segment { tree: Some(Arc::new(tree)), ..Segment::new(5, 11, vec![0]) };
        let seen = |query| (0..16).filter(|&key| segment.sees(query, key)).collect::<Vec<_>>();
        let after = |own: &[usize]| (0..10).chain(own.iter().copied()).collect::<Vec<_>>();
        assert_eq!(seen(9), (0..10).collect::<Vec<_>>());
        assert_eq!(seen(12), after(&[10, 11, 12]));
        assert_eq!(seen(13), after(&[10, 13]));
        assert_eq!(seen(15), after(&[14, 15]));
        let batch = BatchLayout { segments: vec![segment], ..Default::default() };
        assert_eq!(batch.positions(), [11, 12, 11, 10, 11]);
    }
}
