//! The indices of one step on the device: each row's position, where its keys and values lie, and which rows are wanted.
//! Uploaded once and in one piece, read by every layer.

use candle_core::{Result, Tensor, bail};

use super::module::Cuda;
use crate::kernels::layout::{BLOCK_SIZE, BatchLayout, RowIndices};

/// Rows of a segment from which on attention runs by tiles of queries on tensor cores.
const TILED_ROWS: usize = 16;
/// Queries in a tile; see `cu/prefill.cu`.
pub const TILE_QUERIES: usize = 64;

/// Keys that one CUDA block goes through for a row that attends to `keys`, as `cu/attention.cu` has it.
fn split_length(keys: usize) -> usize {
    match keys {
        0..=8192 => 512,
        8193..=32768 => 1024,
        _ => 4096,
    }
}

/// Offsets into one array of u32 on the device.
#[derive(Debug)]
pub struct StepIndices {
    values: Tensor,
    address: u64,
    t: usize,
    slots: usize,
    tables_of_rows: usize,
    rows: usize,
    tiles: usize,
    tables: usize,
    positions: usize,
    /// Where the wanted rows are and how many, if these are not all.
    wanted: Option<(usize, usize)>,
    /// Rows that attention computes one by one, and the most splits that one of them has.
    pub num_rows: usize,
    pub splits: usize,
    /// Tiles of queries.
    pub num_tiles: usize,
}

impl StepIndices {
    /// The indices of a batch whose segments all have block tables. `pack` heads share a tile of queries; with none,
    /// attention runs by rows only.
    ///
    /// # Errors
    /// A block table is too short or names a block that there is not, or there is no memory.
    pub fn new(cuda: &Cuda, batch: &BatchLayout, num_blocks: usize, pack: Option<usize>) -> Result<Self> {
        let t = batch.num_rows();
        let (mut places, mut slots, mut of_rows) =
            (Vec::with_capacity(t), Vec::with_capacity(t), Vec::with_capacity(t));
        let (mut list, mut tiles, mut tables, mut trees) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut splits = 1;
        for (segment, rows) in batch.segments.iter().zip(batch.rows()) {
            let (end, blocks) = (segment.start + segment.rows, &segment.blocks);
            if end > blocks.len() * BLOCK_SIZE || blocks.iter().any(|&block| block as usize >= num_blocks) {
                bail!("{end} rows do not lie in the blocks {blocks:?} of {num_blocks}");
            }
            if segment.tree.as_ref().is_some_and(|tree| tree.start() + tree.depths().len() < end) {
                bail!("a tree ends before row {end} of its sequence");
            }
            // Before each block table is where its sequence's tree begins, in the same array.
            trees.extend(segment.tree.as_ref().map(|tree| (tables.len(), tree)));
            tables.push(0);
            let begins = tables.len() as u32;
            tables.extend_from_slice(&blocks[..end.div_ceil(BLOCK_SIZE)]);
            let slot = |i: usize| blocks[i / BLOCK_SIZE] * BLOCK_SIZE as u32 + (i % BLOCK_SIZE) as u32;
            slots.extend((segment.start..end).map(slot));
            places.extend((segment.start..end).map(|place| place as u32));
            of_rows.extend(std::iter::repeat_n(begins, segment.rows));
            match pack.filter(|_| segment.rows >= TILED_ROWS) {
                Some(pack) => {
                    let most = TILE_QUERIES / pack;
                    for first in (0..segment.rows).step_by(most) {
                        let n = most.min(segment.rows - first);
                        tiles.extend([rows.start + first, n, segment.start + first].map(|x| x as u32));
                        tiles.push(begins);
                    }
                }
                None => {
                    list.extend(rows.map(|row| row as u32));
                    splits = (segment.start + 1..=end)
                        .map(|keys| keys.div_ceil(split_length(keys)))
                        .fold(splits, usize::max);
                }
            }
        }
        let (num_rows, num_tiles) = (list.len(), tiles.len() / 4);
        for (at, tree) in trees {
            tables[at] = tables.len() as u32;
            tables.extend([tree.start() as u32, tree.depths().len() as u32]);
            tables.extend(tree.ends().iter().chain(tree.depths()));
        }
        let mut all = places;
        let mut append = |values: Vec<u32>| {
            let at = all.len();
            all.extend(values);
            at
        };
        let (slots, tables_of_rows, rows) = (append(slots), append(of_rows), append(list));
        let (tiles, tables) = (append(tiles), append(tables));
        let positions = append(batch.positions());
        let are_all = batch.wanted.iter().copied().eq(0..t as u32);
        let wanted = (!are_all).then(|| (append(batch.wanted.clone()), batch.wanted.len()));
        // An empty upload is refused.
        all.push(0);
        let values = cuda.device.clone_htod(&all)?;
        let (address, values) = (cuda.address_of(&values), cuda.tensor(values, all.len()));
        Ok(Self {
            values,
            address,
            t,
            slots,
            tables_of_rows,
            rows,
            tiles,
            tables,
            positions,
            wanted,
            num_rows,
            splits,
            num_tiles,
        })
    }

    /// The positions of the rows and which are wanted: parts of the same upload.
    ///
    /// # Errors
    /// Never, of a step that was made here.
    pub fn of_rows(&self) -> Result<RowIndices> {
        let part = |(at, len): (usize, usize)| self.values.narrow(0, at, len);
        Ok(RowIndices { positions: part((self.positions, self.t))?, wanted: self.wanted.map(part).transpose()? })
    }

    fn at(&self, offset: usize) -> u64 {
        self.address + (offset * size_of::<u32>()) as u64
    }

    /// `[t]`: how many rows of its sequence come before each packed row.
    pub fn places(&self) -> u64 {
        self.at(0)
    }

    /// `[t]`: the slot in the cache that a row's keys and values go to.
    pub fn slots(&self) -> u64 {
        self.at(self.slots)
    }

    /// `[t]`: where a row's block table begins in [`tables`](Self::tables).
    pub fn tables_of_rows(&self) -> u64 {
        self.at(self.tables_of_rows)
    }

    /// `[num_rows]`: the packed rows that attention computes one by one.
    pub fn rows(&self) -> u64 {
        self.at(self.rows)
    }

    /// `[num_tiles, 4]`: first packed row, rows, how many rows of its sequence come before the first, and beginning of the
    /// block table.
    pub fn tiles(&self) -> u64 {
        self.at(self.tiles)
    }

    /// The block tables of all segments, one after another, each after a word that says where the segment's tree is in the
    /// same array; see `cu/tree.cuh`.
    pub fn tables(&self) -> u64 {
        self.at(self.tables)
    }
}
