//! The block formats of ggml: weights in groups of 32 or 256 small integers with shared scales, and how
//! they become f32. The layouts and the order of operations are ggml's (`ggml-quants.c`), so that
//! every value is the one that ggml computes, bit for bit.

use std::ops::Range;

use half::{bf16, f16};

/// The format of a matrix's values in a GGUF file: plain floats, or blocks of quantised values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockFormat {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

/// Values in a block of the K formats.
const SUPER: usize = 256;
/// How many values of a format without blocks are read at a time.
const RUN: usize = 256;
/// Rows that [`BlockFormat::dequantize_panel`] writes side by side.
pub const PANEL_WIDTH: usize = 16;

/// Calls `$f` with the size in bytes and in values of a block of `$format`, and the function that dequantises one.
macro_rules! by_format {
    ($format:expr, $f:ident($($arg:expr),*)) => {
        match $format {
            BlockFormat::F32 => $f::<4, 1>($($arg),*, |b, out| out[0] = f32::from_le_bytes(*b)),
            BlockFormat::F16 => $f::<2, 1>($($arg),*, |b, out| out[0] = f16::from_le_bytes(*b).to_f32()),
            BlockFormat::Bf16 => $f::<2, 1>($($arg),*, |b, out| out[0] = bf16::from_le_bytes(*b).to_f32()),
            BlockFormat::Q4_0 => $f::<18, 32>($($arg),*, q4_0),
            BlockFormat::Q4_1 => $f::<20, 32>($($arg),*, q4_1),
            BlockFormat::Q5_0 => $f::<22, 32>($($arg),*, q5_0),
            BlockFormat::Q5_1 => $f::<24, 32>($($arg),*, q5_1),
            BlockFormat::Q8_0 => $f::<34, 32>($($arg),*, q8_0),
            BlockFormat::Q2K => $f::<84, 256>($($arg),*, q2_k),
            BlockFormat::Q3K => $f::<110, 256>($($arg),*, q3_k),
            BlockFormat::Q4K => $f::<144, 256>($($arg),*, q4_k),
            BlockFormat::Q5K => $f::<176, 256>($($arg),*, q5_k),
            BlockFormat::Q6K => $f::<210, 256>($($arg),*, q6_k),
        }
    };
}

impl BlockFormat {
    /// Values in a block.
    pub fn values(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => SUPER,
        }
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bytes of a row of `k` values; `None` if they are not whole blocks, or more bytes than can be counted.
    pub fn row_bytes(self, k: usize) -> Option<usize> {
        if !k.is_multiple_of(self.values()) {
            return None;
        }
        (k / self.values()).checked_mul(self.bytes())
    }

    /// Dequantises whole blocks.
    ///
    /// # Panics
    /// If `bytes` are not the blocks of as many values as `out` holds.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(Some(bytes.len()), self.row_bytes(out.len()), "whole blocks of {self:?}");
        by_format!(self, row(bytes, out));
    }

    /// Dequantises up to 16 rows of `k` values, one after another in `bytes`, to the columns of a micro-panel `out`
    /// `[k][16]`; columns that have no row are zero.
    #[inline(always)]
    pub fn dequantize_panel(self, bytes: &[u8], k: usize, out: &mut [f32]) {
        by_format!(self, panel(bytes, k, out));
    }

    /// Dequantises the values `columns` of rows of `k` values, which lie one after another in `bytes`, to micro-panels whose
    /// columns they are: 16 of row `i` are at `16 * i` of a micro-panel, and the next 16 in the next micro-panel, `size` values
    /// after it. What fills the last micro-panel up is zero. `columns` are whole blocks.
    #[inline(always)]
    pub fn dequantize_columns(self, bytes: &[u8], k: usize, columns: Range<usize>, size: usize, out: &mut [f32]) {
        by_format!(self, side_by_side(bytes, k, columns, size, out));
    }
}

#[inline(always)]
fn row<const SIZE: usize, const VALUES: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; SIZE], &mut [f32; VALUES]),
) {
    let ((blocks, _), (values, _)) = (bytes.as_chunks::<SIZE>(), out.as_chunks_mut::<VALUES>());
    blocks.iter().zip(values).for_each(|(b, out)| block(b, out));
}

#[inline(always)]
fn panel<const SIZE: usize, const VALUES: usize>(
    bytes: &[u8],
    k: usize,
    out: &mut [f32],
    block: impl Fn(&[u8; SIZE], &mut [f32; VALUES]),
) {
    let run = if VALUES == 1 { RUN } else { VALUES };
    let row_bytes = k / VALUES * SIZE;
    let rows = bytes.len().checked_div(row_bytes).unwrap_or(0);
    let mut values = [[0f32; SUPER]; PANEL_WIDTH];
    for start in (0..k).step_by(run) {
        let n = run.min(k - start);
        let from = start / VALUES * SIZE;
        for (i, values) in values.iter_mut().enumerate().take(rows) {
            row(&bytes[i * row_bytes + from..][..n / VALUES * SIZE], &mut values[..n], &block);
        }
        let (out, _) = out[start * PANEL_WIDTH..(start + n) * PANEL_WIDTH].as_chunks_mut::<PANEL_WIDTH>();
        for (j, out) in out.iter_mut().enumerate() {
            out.iter_mut().zip(&values).for_each(|(out, row)| *out = row[j]);
        }
    }
}

#[inline(always)]
fn side_by_side<const SIZE: usize, const VALUES: usize>(
    bytes: &[u8],
    k: usize,
    columns: Range<usize>,
    size: usize,
    out: &mut [f32],
    block: impl Fn(&[u8; SIZE], &mut [f32; VALUES]),
) {
    let run = if VALUES == 1 { RUN } else { VALUES };
    let mut values = [0f32; SUPER];
    for (i, bytes) in bytes.chunks_exact((k / VALUES * SIZE).max(1)).enumerate() {
        for start in columns.clone().step_by(run) {
            let n = run.min(columns.end - start);
            let filled = n.next_multiple_of(PANEL_WIDTH);
            row(&bytes[start / VALUES * SIZE..][..n / VALUES * SIZE], &mut values[..n], &block);
            values[n..filled].fill(0.0);
            let first = (start - columns.start) / PANEL_WIDTH;
            for (j, values) in values[..filled].as_chunks::<PANEL_WIDTH>().0.iter().enumerate() {
                out[(first + j) * size + i * PANEL_WIDTH..][..PANEL_WIDTH].copy_from_slice(values);
            }
        }
    }
}

#[inline(always)]
fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

#[inline(always)]
fn q4_0(b: &[u8; 18], out: &mut [f32; 32]) {
    let d = half(b, 0);
    for (j, q) in b[2..].iter().enumerate() {
        out[j] = f32::from(i16::from(q & 15) - 8) * d;
        out[j + 16] = f32::from(i16::from(q >> 4) - 8) * d;
    }
}

#[inline(always)]
fn q4_1(b: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half(b, 0), half(b, 2));
    for (j, q) in b[4..].iter().enumerate() {
        out[j] = f32::from(q & 15) * d + m;
        out[j + 16] = f32::from(q >> 4) * d + m;
    }
}

/// The fifth bits of the two values of byte `j`.
#[inline(always)]
fn fifth_bits(high: &[u8], j: usize) -> (u8, u8) {
    let bits = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    ((((bits >> j) & 1) << 4) as u8, (((bits >> (j + 16)) & 1) << 4) as u8)
}

#[inline(always)]
fn q5_0(b: &[u8; 22], out: &mut [f32; 32]) {
    let d = half(b, 0);
    for (j, q) in b[6..].iter().enumerate() {
        let (low, high) = fifth_bits(&b[2..6], j);
        out[j] = f32::from(i16::from(q & 15 | low) - 16) * d;
        out[j + 16] = f32::from(i16::from(q >> 4 | high) - 16) * d;
    }
}

#[inline(always)]
fn q5_1(b: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half(b, 0), half(b, 2));
    for (j, q) in b[8..].iter().enumerate() {
        let (low, high) = fifth_bits(&b[4..8], j);
        out[j] = f32::from(q & 15 | low) * d + m;
        out[j + 16] = f32::from(q >> 4 | high) * d + m;
    }
}

#[inline(always)]
fn q8_0(b: &[u8; 34], out: &mut [f32; 32]) {
    let d = half(b, 0);
    for (out, q) in out.iter_mut().zip(&b[2..]) {
        *out = f32::from(q.cast_signed()) * d;
    }
}

/// `[16 scales][64][d][dmin]`: 2 bits a value, a scale and a minimum of 4 bits for each 16.
#[inline(always)]
fn q2_k(b: &[u8; 84], out: &mut [f32; 256]) {
    let (scales, qs, d, min) = (&b[..16], &b[16..80], half(b, 80), half(b, 82));
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let (dl, ml) = (d * f32::from(scales[group] & 15), min * f32::from(scales[group] >> 4));
        let (shift, qs) = (group % 8 / 2 * 2, &qs[group / 8 * 32 + group % 2 * 16..]);
        for (out, q) in out.iter_mut().zip(qs) {
            *out = dl * f32::from(q >> shift & 3) - ml;
        }
    }
}

/// `[32 high bits][64][12 scales][d]`: 3 bits a value, a scale of 6 bits for each 16.
#[inline(always)]
fn q3_k(b: &[u8; 110], out: &mut [f32; 256]) {
    let (high, qs, scales, d) = (&b[..32], &b[32..96], &b[96..108], half(b, 108));
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let low = if group < 8 { scales[group] & 15 } else { scales[group - 8] >> 4 };
        let scale = low | (scales[8 + group % 4] >> (group / 4 * 2) & 3) << 4;
        let dl = d * f32::from(i16::from(scale) - 32);
        let (shift, at) = (group % 8 / 2 * 2, group % 2 * 16);
        for (j, out) in out.iter_mut().enumerate() {
            let q = i16::from(qs[group / 8 * 32 + at + j] >> shift & 3);
            let less = if high[at + j] >> (group / 2) & 1 == 0 { 4 } else { 0 };
            *out = dl * f32::from(q - less);
        }
    }
}

/// The scale and the minimum of one of eight groups, 6 bits each, in 12 bytes.
#[inline(always)]
fn scale_and_min(group: usize, scales: &[u8]) -> (f32, f32) {
    let (scale, min) = match group {
        0..4 => (scales[group] & 63, scales[group + 4] & 63),
        _ => (scales[group + 4] & 15 | scales[group - 4] >> 6 << 4, scales[group + 4] >> 4 | scales[group] >> 6 << 4),
    };
    (f32::from(scale), f32::from(min))
}

/// `[d][dmin][12 scales][128]`: 4 bits a value, a scale and a minimum for each 32.
#[inline(always)]
fn q4_k(b: &[u8; 144], out: &mut [f32; 256]) {
    let (d, min, scales) = (half(b, 0), half(b, 2), &b[4..16]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, least) = scale_and_min(group, scales);
        let (d, m) = (d * scale, min * least);
        let shift = group % 2 * 4;
        for (out, q) in out.iter_mut().zip(&b[16 + group / 2 * 32..]) {
            *out = d * f32::from(q >> shift & 15) - m;
        }
    }
}

/// `[d][dmin][12 scales][32 high bits][128]`: 5 bits a value, as [`q4_k`].
#[inline(always)]
fn q5_k(b: &[u8; 176], out: &mut [f32; 256]) {
    let (d, min, scales, high) = (half(b, 0), half(b, 2), &b[4..16], &b[16..48]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, least) = scale_and_min(group, scales);
        let (d, m) = (d * scale, min * least);
        let shift = group % 2 * 4;
        for ((out, q), high) in out.iter_mut().zip(&b[48 + group / 2 * 32..]).zip(high) {
            *out = d * f32::from((q >> shift & 15) + (high >> group & 1) * 16) - m;
        }
    }
}

/// `[128 low][64 high][16 scales][d]`: 6 bits a value, a scale of 8 bits for each 16.
#[inline(always)]
fn q6_k(b: &[u8; 210], out: &mut [f32; 256]) {
    let (low, high, scales, d) = (&b[..128], &b[128..192], &b[192..208], half(b, 208));
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        // Two halves of 128 values; in each, four quarters that share their bytes of high bits.
        let (part, quarter, at) = (group / 8, group % 8 / 2, group % 2 * 16);
        let dl = d * f32::from(scales[group].cast_signed());
        let low = &low[part * 64 + quarter % 2 * 32 + at..];
        for ((out, low), high) in out.iter_mut().zip(low).zip(&high[part * 32 + at..]) {
            let q = low >> (quarter / 2 * 4) & 15 | (high >> (quarter * 2) & 3) << 4;
            *out = dl * f32::from(i16::from(q) - 32);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::borrow::Cow;

    use candle_core::{
        Device,
        quantized::{GgmlDType, QStorage, QTensor},
    };
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    pub const FORMATS: [(BlockFormat, GgmlDType); 13] = [
        (BlockFormat::F32, GgmlDType::F32),
        (BlockFormat::F16, GgmlDType::F16),
        (BlockFormat::Bf16, GgmlDType::BF16),
        (BlockFormat::Q4_0, GgmlDType::Q4_0),
        (BlockFormat::Q4_1, GgmlDType::Q4_1),
        (BlockFormat::Q5_0, GgmlDType::Q5_0),
        (BlockFormat::Q5_1, GgmlDType::Q5_1),
        (BlockFormat::Q8_0, GgmlDType::Q8_0),
        (BlockFormat::Q2K, GgmlDType::Q2K),
        (BlockFormat::Q3K, GgmlDType::Q3K),
        (BlockFormat::Q4K, GgmlDType::Q4K),
        (BlockFormat::Q5K, GgmlDType::Q5K),
        (BlockFormat::Q6K, GgmlDType::Q6K),
    ];

    fn random_bytes(n: usize, seed: u64) -> Vec<u8> {
        let mut rng = StdRng::seed_from_u64(seed);
        (0..n).map(|_| rng.random()).collect()
    }

    /// Random blocks of `rows` of `k` values, none of them infinite or NaN.
    pub fn random_blocks(format: BlockFormat, rows: usize, k: usize, seed: u64) -> Vec<u8> {
        // Without this bit no exponent is the highest.
        random_bytes(rows * format.row_bytes(k).unwrap(), seed).into_iter().map(|b| b & 0xbf).collect()
    }

    /// Blocks whose values are of an order that products do not overflow.
    pub fn modest_blocks(format: BlockFormat, rows: usize, k: usize, seed: u64) -> Vec<u8> {
        let mut bytes = random_blocks(format, rows, k, seed);
        let halves: &[usize] = match format {
            BlockFormat::Q2K => &[80, 82],
            BlockFormat::Q3K => &[108],
            BlockFormat::Q6K => &[208],
            BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4K | BlockFormat::Q5K => &[0, 2],
            _ => &[0],
        };
        let mut rng = StdRng::seed_from_u64(seed + 1);
        for block in bytes.chunks_exact_mut(format.bytes()) {
            for &at in halves {
                let x = f16::from_f32(rng.random_range(-0.01..0.01));
                block[at..at + 2].copy_from_slice(&x.to_le_bytes());
            }
        }
        bytes
    }

    #[test]
    #[cfg_attr(miri, ignore = "there is no unsafe code in it, and all that candle does is interpreted")]
    fn every_bit_pattern_means_what_it_means_in_ggml() {
        let k = 512;
        for (ours, theirs) in FORMATS {
            assert_eq!((ours.values(), ours.bytes()), (theirs.block_size(), theirs.type_size()), "{ours:?}");
            for seed in 0..20 {
                let bytes = random_bytes(4 * ours.row_bytes(k).unwrap(), seed);
                let storage = QStorage::from_data(Cow::Owned(bytes.clone()), &Device::Cpu, theirs).unwrap();
                let tensor = QTensor::new(storage, (4, k)).unwrap();
                let expected: Vec<f32> =
                    tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                let mut got = vec![0f32; 4 * k];
                ours.dequantize(&bytes, &mut got);
                for (a, b) in got.iter().zip(&expected) {
                    assert!(a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(), "{ours:?}: {a} and {b}");
                }
            }
        }
    }

    #[test]
    fn a_panel_is_the_transpose_of_its_rows() {
        for (format, _) in FORMATS {
            let (rows, k) = (5, if format.values() == 1 { 300 } else { 512 });
            let bytes = random_blocks(format, rows, k, 3);
            let mut plain = vec![0f32; rows * k];
            format.dequantize(&bytes, &mut plain);
            let mut panel = vec![1f32; k * 16];
            format.dequantize_panel(&bytes, k, &mut panel);
            for (i, x) in panel.iter().enumerate() {
                let (column, at) = (i % 16, i / 16);
                assert_eq!(*x, if column < rows { plain[column * k + at] } else { 0.0 }, "{format:?} at {i}");
            }
        }
    }

    #[test]
    fn columns_are_micro_panels_of_the_rows_themselves() {
        for (format, _) in FORMATS {
            let (rows, k) = (5, if format.values() == 1 { 300 } else { 1024 });
            let bytes = random_blocks(format, rows, k, 3);
            let mut plain = vec![0f32; rows * k];
            format.dequantize(&bytes, &mut plain);
            for columns in [0..k, 256..k, 256..256 + format.values().min(k - 256)] {
                let size = 6 * 16;
                let panels = columns.len().div_ceil(16);
                let mut out = vec![7f32; panels * size];
                format.dequantize_columns(&bytes, k, columns.clone(), size, &mut out);
                for (i, x) in out.iter().enumerate() {
                    let (row, column) = (i % size / 16, i / size * 16 + i % 16);
                    let expected = match row {
                        5 => 7.0,
                        _ if column < columns.len() => plain[row * k + columns.start + column],
                        _ => 0.0,
                    };
                    assert_eq!(*x, expected, "{format:?} {columns:?} at {i}");
                }
            }
        }
    }
}
