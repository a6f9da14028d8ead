//! The codes of a matrix in micro-panels: how they are taken out of ggml's blocks, and back.
//!
//! A micro-panel has 16 rows of the matrix as columns. It is a line of stripes of 32 inner values; before each eight stripes
//! of a nested scheme comes a head. A stripe has eight steps of four inner values, `[16 columns][4]` each. Codes of 8 bits
//! are eight steps one after another. Of others the low four bits of step `t` and of step `t + 4` share bytes; after those
//! come the fifth bits, a bit of a byte for each step, or the fifth and sixth, two bits of a byte for each of four steps.

use half::f16;
use rayon::prelude::*;

use super::{
    super::{Buffer, elements, simd::LANES},
    NEST, STEP_BYTES, STEPS, STRIPE, Scheme,
};
use crate::kernels::{quantized::BlockFormat, stored::StoredBytes};

/// About so many bytes of a file are read at a time.
const PIECE: usize = 256 << 10;

/// A quantised matrix `[n, k]` whose products are computed with integers.
#[derive(Debug)]
pub struct IntegerMatrix {
    pub(in super::super) scheme: Scheme,
    pub(in super::super) data: Buffer<u32>,
    pub(super) k: usize,
}

/// 256 inner values of one column, or fewer: their codes and scales.
struct Codes {
    codes: [u8; NEST * STRIPE],
    /// Of each group: a scale and a least value, as small integers where the scheme is nested, else in f16.
    scales: [f16; NEST],
    minima: [f16; NEST],
    nested_scales: [i8; 16],
    nested_minima: [u8; 16],
    d: f16,
    m: f16,
}

impl Default for Codes {
    fn default() -> Self {
        Self {
            codes: [0; NEST * STRIPE],
            scales: [f16::ZERO; NEST],
            minima: [f16::ZERO; NEST],
            nested_scales: [0; 16],
            nested_minima: [0; 16],
            d: f16::ZERO,
            m: f16::ZERO,
        }
    }
}

fn half(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// The bits of byte `j` and of byte `j + 16` among four bytes of fifth bits.
fn fifth(high: &[u8], j: usize) -> [u8; 2] {
    [high[j / 8] >> (j % 8) & 1, high[2 + j / 8] >> (j % 8) & 1].map(|bit| bit << 4)
}

impl Codes {
    /// Those of whole blocks, of a column's `NEST` stripes or of its last ones.
    fn read(format: BlockFormat, bytes: &[u8]) -> Self {
        let mut all = Self::default();
        for (i, block) in bytes.chunks_exact(format.bytes()).enumerate() {
            all.read_block(format, block, i);
        }
        all
    }

    /// The `i`th block, which is the only one of a nested scheme.
    fn read_block(&mut self, format: BlockFormat, b: &[u8], i: usize) {
        if !self.read_nested(format, b) {
            let codes = &mut self.codes[i * STRIPE..(i + 1) * STRIPE];
            self.scales[i] = half(b, 0);
            let (has_minimum, has_fifth) = match format {
                BlockFormat::Q4_1 => (true, false),
                BlockFormat::Q5_0 => (false, true),
                BlockFormat::Q5_1 => (true, true),
                _ => (false, false),
            };
            if has_minimum {
                self.minima[i] = half(b, 2);
            }
            if format == BlockFormat::Q8_0 {
                codes.iter_mut().zip(&b[2..]).for_each(|(code, q)| *code = q ^ 0x80);
                return;
            }
            let from = 2 + 2 * usize::from(has_minimum);
            let qs = &b[from + 4 * usize::from(has_fifth)..];
            for j in 0..STRIPE / 2 {
                let [low, high] = if has_fifth { fifth(&b[from..], j) } else { [0; 2] };
                codes[j] = qs[j] & 15 | low;
                codes[j + STRIPE / 2] = qs[j] >> 4 | high;
            }
        }
    }

    /// Whether the format is a nested one, whose block was read.
    fn read_nested(&mut self, format: BlockFormat, b: &[u8]) -> bool {
        match format {
            BlockFormat::Q2K => {
                (self.d, self.m) = (half(b, 80), half(b, 82));
                for group in 0..16 {
                    self.nested_scales[group] = (b[group] & 15).cast_signed();
                    self.nested_minima[group] = b[group] >> 4;
                    let (shift, qs) = (group % 8 / 2 * 2, &b[16 + group / 8 * 32 + group % 2 * 16..]);
                    self.group(group, 16, |j| qs[j] >> shift & 3);
                }
            }
            BlockFormat::Q3K => {
                self.d = half(b, 108);
                let (high, qs, scales) = (&b[..32], &b[32..96], &b[96..108]);
                for group in 0..16 {
                    let low = scales[group % 8] >> (group / 8 * 4) & 15;
                    let scale = low | (scales[8 + group % 4] >> (group / 4 * 2) & 3) << 4;
                    self.nested_scales[group] = scale.cast_signed() - 32;
                    let (shift, at) = (group % 8 / 2 * 2, group % 2 * 16);
                    let code = |j: usize| {
                        let low = qs[group / 8 * 32 + at + j] >> shift & 3;
                        low | (high[at + j] >> (group / 2) & 1) << 2
                    };
                    self.group(group, 16, code);
                }
            }
            BlockFormat::Q4K | BlockFormat::Q5K => {
                (self.d, self.m) = (half(b, 0), half(b, 2));
                let scales = &b[4..16];
                let is_five = format == BlockFormat::Q5K;
                for group in 0..8 {
                    let (scale, minimum) = match group {
                        0..4 => (scales[group] & 63, scales[group + 4] & 63),
                        _ => (
                            scales[group + 4] & 15 | scales[group - 4] >> 6 << 4,
                            scales[group + 4] >> 4 | scales[group] >> 6 << 4,
                        ),
                    };
                    self.nested_scales[group] = scale.cast_signed();
                    self.nested_minima[group] = minimum;
                    let (shift, qs) = (group % 2 * 4, &b[if is_five { 48 } else { 16 } + group / 2 * 32..]);
                    let fifth = |j: usize| if is_five { (b[16 + j] >> group & 1) << 4 } else { 0 };
                    self.group(group, 32, |j| qs[j] >> shift & 15 | fifth(j));
                }
            }
            BlockFormat::Q6K => {
                self.d = half(b, 208);
                let (low, high, scales) = (&b[..128], &b[128..192], &b[192..208]);
                for (group, scale) in scales.iter().enumerate() {
                    self.nested_scales[group] = scale.cast_signed();
                    let (part, quarter, at) = (group / 8, group % 8 / 2, group % 2 * 16);
                    let (low, high) = (&low[part * 64 + quarter % 2 * 32 + at..], &high[part * 32 + at..]);
                    let code = |j: usize| low[j] >> (quarter / 2 * 4) & 15 | (high[j] >> (quarter * 2) & 3) << 4;
                    self.group(group, 16, code);
                }
            }
            _ => return false,
        }
        true
    }

    fn group(&mut self, group: usize, size: usize, code: impl Fn(usize) -> u8) {
        self.codes[group * size..][..size].iter_mut().enumerate().for_each(|(j, to)| *to = code(j));
    }

    /// Writes column `column` of a head and of up to `NEST` stripes after it.
    fn write(&self, scheme: Scheme, out: &mut [u8], column: usize) {
        let put_half = |out: &mut [u8], at: usize, x: f16| {
            out[at + 2 * column..][..2].copy_from_slice(&x.to_le_bytes());
        };
        let (head, stripes) = out.split_at_mut(scheme.head_bytes());
        if scheme.nested {
            put_half(head, 0, self.d);
            if scheme.minimum {
                // What is taken away is added so.
                put_half(head, 2 * LANES, -self.m);
            }
        }
        let [low, high] = scheme.code_bytes();
        for (i, stripe) in stripes.chunks_exact_mut(scheme.stripe_bytes()).enumerate() {
            let codes = &self.codes[i * STRIPE..(i + 1) * STRIPE];
            for (j, &code) in codes.iter().enumerate() {
                let (step, at) = (j / 4, 4 * column + j % 4);
                if scheme.bits == 8 {
                    stripe[step * STEP_BYTES + at] = code;
                    continue;
                }
                stripe[step % (STEPS / 2) * STEP_BYTES + at] |= (code & 15) << (step / (STEPS / 2) * 4);
                match scheme.bits {
                    5 => stripe[low + at] |= (code >> 4) << step,
                    6 => stripe[low + step / 4 * STEP_BYTES + at] |= (code >> 4) << (step % 4 * 2),
                    _ => {}
                }
            }
            let after = &mut stripe[low + high..];
            if scheme.nested {
                let groups = STRIPE / scheme.group;
                for group in 0..groups {
                    let at = group * LANES + column;
                    after[at] = self.nested_scales[i * groups + group].cast_unsigned();
                    if scheme.minimum {
                        after[groups * LANES + at] = self.nested_minima[i * groups + group];
                    }
                }
            } else {
                put_half(after, 0, self.scales[i]);
                if scheme.minimum {
                    put_half(after, 2 * LANES, self.minima[i]);
                }
            }
        }
    }
}

impl IntegerMatrix {
    /// Lays the blocks of `n` rows of `k` values out; `None` of a format whose values are floats.
    ///
    /// # Errors
    /// There is no memory, or the file cannot be read.
    ///
    /// # Panics
    /// If `bytes` are not the blocks of `n` rows.
    pub fn new(format: BlockFormat, bytes: &StoredBytes, n: usize, k: usize) -> std::io::Result<Option<Self>> {
        let Some(scheme) = Scheme::of(format) else { return Ok(None) };
        let row_bytes = format.row_bytes(k);
        assert_eq!(Some(bytes.len()), row_bytes.and_then(|row| n.checked_mul(row)));
        let row_bytes = row_bytes.unwrap_or(0);
        let panel_bytes = scheme.panel_bytes(k);
        let mut data = Buffer::zeroed(elements(&[n.div_ceil(LANES), panel_bytes / 4]))?;
        // What one column's codes are read of at once.
        let values = NEST * STRIPE;
        let chunk_bytes = scheme.head_bytes() + NEST * scheme.stripe_bytes();
        if panel_bytes > 0 {
            let rows_bytes = LANES * row_bytes;
            let together = (PIECE / rows_bytes).max(1);
            let pieces = data.as_mut_slice().par_chunks_mut(together * panel_bytes / 4).enumerate();
            pieces.try_for_each_init(Vec::new, |space, (piece, out): (_, &mut [u32])| {
                let start = piece * together * rows_bytes;
                let bytes = bytes.read(start..bytes.len().min(start + together * rows_bytes), space)?;
                let out: &mut [u8] = bytemuck::cast_slice_mut(out);
                for (rows, out) in bytes.chunks(rows_bytes).zip(out.chunks_exact_mut(panel_bytes)) {
                    for (column, row) in rows.chunks_exact(row_bytes).enumerate() {
                        let blocks = row.chunks(values / format.values() * format.bytes());
                        for (blocks, out) in blocks.zip(out.chunks_mut(chunk_bytes)) {
                            Codes::read(format, blocks).write(scheme, out, column);
                        }
                    }
                }
                Ok::<_, std::io::Error>(())
            })?;
        }
        Ok(Some(Self { scheme, data, k }))
    }

    /// Bytes that a product reads.
    pub fn num_bytes(&self) -> usize {
        size_of_val(self.data.as_slice())
    }

    /// Writes row `i` `[k]` to `out`: the values that ggml computes of its blocks, bit for bit.
    ///
    /// # Panics
    /// If there is no such row or `out` has another length.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.k);
        let scheme = self.scheme;
        let (panel, column) = (i / LANES, i % LANES);
        let panel_bytes = scheme.panel_bytes(self.k);
        let bytes: &[u8] = bytemuck::cast_slice(self.data.as_slice());
        let bytes = &bytes[panel * panel_bytes..][..panel_bytes];
        let half = |bytes: &[u8], at: usize| half(bytes, at + 2 * column).to_f32();
        let [low, high] = scheme.code_bytes();
        let groups = STRIPE / scheme.group;
        let chunks = bytes.chunks(scheme.head_bytes() + NEST * scheme.stripe_bytes());
        for (chunk, out) in chunks.zip(out.chunks_mut(NEST * STRIPE)) {
            let (head, stripes) = chunk.split_at(scheme.head_bytes());
            for (stripe, out) in stripes.chunks_exact(scheme.stripe_bytes()).zip(out.chunks_mut(STRIPE)) {
                let after = &stripe[low + high..];
                for (j, out) in out.iter_mut().enumerate() {
                    let at = j / scheme.group * LANES + column;
                    let (d, m) = match scheme.nested {
                        true => {
                            let d = half(head, 0) * f32::from(after[at].cast_signed());
                            let least = || half(head, 2 * LANES) * f32::from(after[groups * LANES + at]);
                            (d, scheme.minimum.then(least))
                        }
                        false => (half(after, 0), scheme.minimum.then(|| half(after, 2 * LANES))),
                    };
                    let x = (i32::from(code(scheme, stripe, j, column)) - scheme.zero) as f32 * d;
                    *out = m.map_or(x, |m| x + m);
                }
            }
        }
    }
}

/// The code of inner value `j` of a stripe.
fn code(scheme: Scheme, stripe: &[u8], j: usize, column: usize) -> u8 {
    let (step, at) = (j / 4, 4 * column + j % 4);
    if scheme.bits == 8 {
        return stripe[step * STEP_BYTES + at];
    }
    let [low, _] = scheme.code_bytes();
    let code = stripe[step % (STEPS / 2) * STEP_BYTES + at] >> (step / (STEPS / 2) * 4) & 15;
    match scheme.bits {
        5 => code | (stripe[low + at] >> step & 1) << 4,
        6 => code | (stripe[low + step / 4 * STEP_BYTES + at] >> (step % 4 * 2) & 3) << 4,
        _ => code,
    }
}
