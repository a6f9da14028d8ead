//! The sizes of a tile of queries.

use crate::kernels::layout::BLOCK_SIZE;

/// Queries of a tile.
pub(super) const TILE_ROWS: usize = 16;
/// Scores, or weights, of a tile against a block: 16 rows of 32.
pub(super) const BLOCK_SCORES: usize = TILE_ROWS * BLOCK_SIZE;
/// Pairs of bf16 in a row of a tile.
pub(super) const TILE_PAIRS: usize = 16;
