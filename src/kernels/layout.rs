//! A batch as plain host data: which packed rows belong to which sequence, and where their keys and values are.

use candle_core::DType;

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
    /// The position of the first row in its sequence.
    pub start: usize,
    /// The sequence's block table: position p lies in block `blocks[p / BLOCK_SIZE]`. Empty where nothing is
    /// kept in the cache: for the rows of an encoder, and in tuning.
    pub blocks: Vec<BlockId>,
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
        let segment = |&rows: &usize| Segment { rows, start: shared, blocks: Vec::new() };
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
        let own = self.segments.iter().flat_map(|s| s.start as u32..(s.start + s.rows) as u32);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_from_the_shared_rows_or_from_a_segments_start() {
        let tuning = BatchLayout::of_lengths(2, &[3, 1]);
        assert_eq!((tuning.num_rows(), tuning.positions()), (6, vec![0, 1, 2, 3, 4, 2]));
        assert_eq!(tuning.rows().collect::<Vec<_>>(), [2..5, 5..6]);
        assert_eq!(tuning.wanted, [0, 1, 2, 3, 4, 5]);
        let segment = |rows, start| Segment { rows, start, blocks: vec![0, 1] };
        let serving = BatchLayout { segments: vec![segment(2, 31), segment(1, 7)], ..Default::default() };
        assert_eq!((serving.num_rows(), serving.positions()), (3, vec![31, 32, 7]));
    }
}
