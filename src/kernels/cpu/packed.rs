//! A frozen matrix, packed once into the micro-panels that the kernels read.

use half::bf16;
use rayon::prelude::*;

use super::{
    buffer::Buffer,
    elements,
    integer::IntegerMatrix,
    simd::{LANES, bf16 as round},
};
use crate::kernels::{
    quantized::{self, BlockFormat},
    stored::StoredBytes,
};

/// Rows of a matrix (columns of the product) in one micro-panel.
pub(super) const PANEL_WIDTH: usize = LANES;
const _: () = assert!(PANEL_WIDTH == quantized::PANEL_WIDTH, "blocks are dequantised a micro-panel at a time");
/// Inner values in one tile of bf16.
pub(super) const TILE_K: usize = 32;
/// Words of four bytes, pairs, in a tile of bf16: 16 pairs of inner values by 16 columns. One tile is 1 KiB.
pub(super) const TILE_WORDS: usize = TILE_K / 2 * PANEL_WIDTH;

/// The number format that keys and values, or a matrix's values, are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    F32,
    Bf16,
}

/// What a product's two operands are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operands {
    F32,
    /// Weights and activations are rounded to bf16 and their products added in f32.
    Bf16,
    /// Weights are ggml's quantised values, activations are rounded to 8 bits, and their products added as integers.
    Int8,
}

/// A packed weight matrix `W` `[n, k]`, for products `x Wᵀ`. Micro-panels of 16 rows of `W` lie one after another; in a
/// micro-panel, f32 values are `[k][16]`, and bf16 values `[k / 32][16 pairs][16][2]`, which is both a
/// tile of AMX and what `vdpbf16ps` reads. Micro-panels and tiles are padded with zeros.
///
/// Blocks of a GGUF file stay as they are, row after row: a product dequantises them, 16 rows at a time, to a
/// micro-panel of f32.
#[derive(Debug)]
pub struct PackedMatrix {
    n: usize,
    k: usize,
    pub(super) data: Data,
}

#[derive(Debug)]
pub(super) enum Data {
    F32(Buffer<f32>),
    Bf16(Buffer<u32>),
    Blocks(BlockFormat, Vec<u8>),
    Integers(IntegerMatrix),
}

impl PackedMatrix {
    /// Packs `[n, k]` row-major values as f32.
    ///
    /// # Errors
    /// There is no memory.
    ///
    /// # Panics
    /// If there are not `n * k` values.
    pub fn from_f32(values: &[f32], n: usize, k: usize) -> std::io::Result<Self> {
        assert_eq!(values.len(), elements(&[n, k]));
        let mut data = Buffer::zeroed(elements(&[n.div_ceil(PANEL_WIDTH), PANEL_WIDTH, k]))?;
        if k > 0 {
            data.as_mut_slice().par_chunks_exact_mut(PANEL_WIDTH * k).enumerate().for_each(
                |(panel, out): (_, &mut [f32])| {
                    for (i, row) in values[panel * PANEL_WIDTH * k..].chunks_exact(k).take(PANEL_WIDTH).enumerate() {
                        for (out, x) in out[i..].iter_mut().step_by(PANEL_WIDTH).zip(row) {
                            *out = *x;
                        }
                    }
                },
            );
        }
        Ok(Self { n, k, data: Data::F32(data) })
    }

    /// Packs `[n, k]` row-major values as bf16.
    ///
    /// # Errors
    /// There is no memory.
    ///
    /// # Panics
    /// If there are not `n * k` values.
    pub fn from_bf16(values: &[bf16], n: usize, k: usize) -> std::io::Result<Self> {
        Self::pack_bf16(values, n, k, |x| x.to_bits())
    }

    /// As [`from_bf16`](Self::from_bf16), from f32 values, which it rounds.
    ///
    /// # Errors
    /// There is no memory.
    ///
    /// # Panics
    /// If there are not `n * k` values.
    pub fn from_f32_rounded(values: &[f32], n: usize, k: usize) -> std::io::Result<Self> {
        Self::pack_bf16(values, n, k, |x| round(*x))
    }

    fn pack_bf16<T: Sync>(values: &[T], n: usize, k: usize, bits: impl Fn(&T) -> u16 + Sync) -> std::io::Result<Self> {
        assert_eq!(values.len(), elements(&[n, k]));
        let tiles = k.div_ceil(TILE_K);
        let mut data = Buffer::zeroed(elements(&[n.div_ceil(PANEL_WIDTH), tiles, TILE_WORDS]))?;
        if k > 0 {
            data.as_mut_slice().par_chunks_exact_mut(tiles * TILE_WORDS).enumerate().for_each(
                |(panel, out): (_, &mut [u32])| {
                    for (i, row) in values[panel * PANEL_WIDTH * k..].chunks_exact(k).take(PANEL_WIDTH).enumerate() {
                        for (out, pair) in out[i..].iter_mut().step_by(PANEL_WIDTH).zip(row.chunks(2)) {
                            *out = u32::from(bits(&pair[0])) | pair.get(1).map_or(0, |x| u32::from(bits(x)) << 16);
                        }
                    }
                },
            );
        }
        Ok(Self { n, k, data: Data::Bf16(data) })
    }

    /// Keeps rows of `k` values as the blocks that a GGUF file has. Products are, bit for bit, those of the
    /// same values in f32.
    ///
    /// # Panics
    /// If `bytes` are not the blocks of `n` rows.
    pub fn from_blocks(format: BlockFormat, bytes: Vec<u8>, n: usize, k: usize) -> Self {
        assert_eq!(Some(bytes.len()), format.row_bytes(k).and_then(|row| n.checked_mul(row)));
        Self { n, k, data: Data::Blocks(format, bytes) }
    }

    /// Keeps rows of `k` quantised values as integers, whose products are computed as integers; blocks of floats stay as they
    /// are, as [`from_blocks`](Self::from_blocks) keeps them. What is in a file is read as it is packed.
    ///
    /// # Errors
    /// There is no memory, or the file cannot be read.
    ///
    /// # Panics
    /// If `bytes` are not the blocks of `n` rows.
    pub fn from_blocks_as_integers(
        format: BlockFormat,
        bytes: impl Into<StoredBytes>,
        n: usize,
        k: usize,
    ) -> std::io::Result<Self> {
        let bytes = bytes.into();
        match IntegerMatrix::new(format, &bytes, n, k)? {
            Some(matrix) => Ok(Self { n, k, data: Data::Integers(matrix) }),
            None => Ok(Self::from_blocks(format, bytes.into_memory()?, n, k)),
        }
    }

    /// Rows of the matrix: the width of the product.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns of the matrix: the width of its input.
    pub fn k(&self) -> usize {
        self.k
    }

    /// What its products are computed of.
    pub fn operands(&self) -> Operands {
        match self.data {
            Data::F32(_) | Data::Blocks(..) => Operands::F32,
            Data::Bf16(_) => Operands::Bf16,
            Data::Integers(_) => Operands::Int8,
        }
    }

    /// Bytes that a product reads.
    pub fn num_bytes(&self) -> usize {
        match &self.data {
            Data::F32(data) => size_of_val(data.as_slice()),
            Data::Bf16(data) => size_of_val(data.as_slice()),
            Data::Blocks(_, bytes) => bytes.len(),
            Data::Integers(matrix) => matrix.num_bytes(),
        }
    }

    /// Writes row `i`, `[k]`, to `out`: a row of the embedding table, where embeddings are tied.
    ///
    /// # Panics
    /// If there is no such row or `out` has another length.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n && out.len() == self.k, "row {i} of {} x {} into {}", self.n, self.k, out.len());
        let (panel, lane) = (i / PANEL_WIDTH, i % PANEL_WIDTH);
        match &self.data {
            Data::F32(data) => {
                let from = data.as_slice()[panel * PANEL_WIDTH * self.k + lane..].iter().step_by(PANEL_WIDTH);
                out.iter_mut().zip(from).for_each(|(out, x)| *out = *x);
            }
            Data::Bf16(data) => {
                let from = data.as_slice()[panel * self.tiles() * TILE_WORDS + lane..].iter().step_by(PANEL_WIDTH);
                for (out, pair) in out.chunks_mut(2).zip(from) {
                    out[0] = f32::from_bits(pair << 16);
                    if let Some(second) = out.get_mut(1) {
                        *second = f32::from_bits(pair & 0xffff_0000);
                    }
                }
            }
            Data::Blocks(format, bytes) => {
                let size = bytes.len() / self.n;
                format.dequantize(&bytes[i * size..][..size], out);
            }
            Data::Integers(matrix) => matrix.row(i, out),
        }
    }

    /// Dequantises micro-panel `i` of a matrix of blocks to f32, `[k][16]`; does nothing for another matrix.
    ///
    /// # Panics
    /// If there is no such micro-panel, or `out` is too short for it.
    #[inline(always)]
    pub(super) fn dequantize_panel(&self, i: usize, out: &mut [f32]) {
        if let Data::Blocks(format, bytes) = &self.data {
            let size = bytes.len() / self.n;
            let rows = i * PANEL_WIDTH..self.n.min((i + 1) * PANEL_WIDTH);
            format.dequantize_panel(
                &bytes[rows.start * size..rows.end * size],
                self.k,
                &mut out[..self.k * PANEL_WIDTH],
            );
        }
    }

    /// The number of micro-panels.
    pub(super) fn panels(&self) -> usize {
        self.n.div_ceil(PANEL_WIDTH)
    }

    /// Tiles of bf16 along `k`.
    pub(super) fn tiles(&self) -> usize {
        self.k.div_ceil(TILE_K)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_were_packed() {
        for (n, k) in [(1, 1), (16, 32), (17, 33), (5, 64), (40, 7)] {
            let values: Vec<f32> = (0..n * k).map(|i| i as f32 * 0.37 - 3.0).collect();
            let rounded: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
            let exact = PackedMatrix::from_f32(&values, n, k).unwrap();
            let packed = PackedMatrix::from_bf16(&rounded, n, k).unwrap();
            let rounding = PackedMatrix::from_f32_rounded(&values, n, k).unwrap();
            let mut row = vec![0.0; k];
            for i in 0..n {
                exact.row(i, &mut row);
                assert_eq!(row, values[i * k..][..k]);
                for matrix in [&packed, &rounding] {
                    matrix.row(i, &mut row);
                    assert!(row.iter().zip(&rounded[i * k..]).all(|(a, b)| *a == b.to_f32()));
                }
            }
        }
    }
    #[test]
    fn values_that_are_not_those_of_the_shape_are_refused() {
        // The products of the last two shapes are zero once they overflow.
        for (n, k) in [(3, 2), (usize::MAX / 2 + 1, 2), (2, usize::MAX / 2 + 1)] {
            let refused = |f: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).is_err();
            assert!(refused(&|| drop(PackedMatrix::from_f32(&[], n, k))), "{n} {k}");
            assert!(refused(&|| drop(PackedMatrix::from_bf16(&[], n, k))), "{n} {k}");
            assert!(refused(&|| drop(PackedMatrix::from_blocks(BlockFormat::F16, Vec::new(), n, k))), "{n} {k}");
        }
    }
}
