//! How the quantised values of each of ggml's formats are kept: a value is `d * (code - zero)`, or `d * code + m`.

use super::{super::simd::LANES, NEST, STEP_BYTES, STEPS, STRIPE};
use crate::kernels::quantized::BlockFormat;

/// What is the same for all values of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheme {
    /// Bits of a code: 4, 5, 6 or 8.
    pub bits: usize,
    /// Inner values that share a scale: 16 or 32.
    pub group: usize,
    /// The code of zero.
    pub zero: i32,
    /// Whether there is a least value `m` of each group.
    pub minimum: bool,
    /// Whether scales and least values are themselves small integers, times one number for each 256 inner values.
    pub nested: bool,
}

impl Scheme {
    /// That of a format; `None` of one whose values are floats.
    pub fn of(format: BlockFormat) -> Option<Self> {
        let simple = |bits, zero, minimum| Self { bits, group: 32, zero, minimum, nested: false };
        let nested = |bits, group, zero| Self { bits, group, zero, minimum: zero == 0, nested: true };
        Some(match format {
            BlockFormat::F32 | BlockFormat::F16 | BlockFormat::Bf16 => return None,
            BlockFormat::Q4_0 => simple(4, 8, false),
            BlockFormat::Q4_1 => simple(4, 0, true),
            BlockFormat::Q5_0 => simple(5, 16, false),
            BlockFormat::Q5_1 => simple(5, 0, true),
            BlockFormat::Q8_0 => simple(8, 128, false),
            BlockFormat::Q2K => nested(4, 16, 0),
            BlockFormat::Q3K => nested(4, 16, 4),
            BlockFormat::Q4K => nested(4, 32, 0),
            BlockFormat::Q5K => nested(5, 32, 0),
            BlockFormat::Q6K => nested(6, 16, 32),
        })
    }

    /// Bytes of the codes' low parts in a stripe, and of their high bits after them.
    pub(super) fn code_bytes(self) -> [usize; 2] {
        match self.bits {
            4 => [STEPS / 2 * STEP_BYTES, 0],
            5 => [STEPS / 2 * STEP_BYTES, STEP_BYTES],
            6 => [STEPS / 2 * STEP_BYTES, 2 * STEP_BYTES],
            _ => [STEPS * STEP_BYTES, 0],
        }
    }

    /// Bytes of a stripe: codes, then scales, then least values; a byte each where they are nested, else f16.
    pub(super) fn stripe_bytes(self) -> usize {
        let of_each = if self.nested { STRIPE / self.group * LANES } else { 2 * LANES };
        self.code_bytes().iter().sum::<usize>() + of_each * (1 + usize::from(self.minimum))
    }

    /// Bytes before each eight stripes of a nested scheme: what scales and least values are multiplied by, in f16.
    pub(super) fn head_bytes(self) -> usize {
        if self.nested { 2 * LANES * (1 + usize::from(self.minimum)) } else { 0 }
    }

    /// Bytes of a micro-panel of `k` inner values.
    pub fn panel_bytes(self, k: usize) -> usize {
        k / STRIPE * self.stripe_bytes() + k / (NEST * STRIPE) * self.head_bytes()
    }
}
