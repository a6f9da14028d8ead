//! A stripe's codes as the values in f32 that they stand for, row by row: what a product reads that runs over the rows of
//! the matrix, not over its columns.

use super::{
    super::simd::{LANES, Simd},
    IntegerMatrix, NEST, STEPS, STRIPE, Scheme,
};

/// Words of four bytes in a step.
const STEP_WORDS: usize = LANES;

impl IntegerMatrix {
    /// Writes stripe `stripe` of the 16 rows of micro-panel `panel` as two micro-panels `[16 rows][16 inner values]`: the first
    /// half of the stripe to `out[0]`, the second to `out[1]`. They are the values that ggml computes of the blocks, bit for bit;
    /// rows past the last one are zero.
    ///
    /// # Panics
    /// If there is no such stripe.
    ///
    /// # Safety
    /// Each of `out` is valid for 16 rows of 16; the instructions are as for [`Simd`].
    #[inline(always)]
    pub unsafe fn stripe<S: Simd>(&self, panel: usize, stripe: usize, out: [*mut f32; 2]) {
        let scheme = self.scheme;
        let size = scheme.stripe_bytes() / 4;
        let chunk = scheme.head_bytes() / 4 + NEST * size;
        let panel_words = scheme.panel_bytes(self.k) / 4;
        let words = &self.data.as_slice()[panel * panel_words..][..panel_words];
        let (head, stripes) = words[stripe / NEST * chunk..].split_at(scheme.head_bytes() / 4);
        let stripe = &stripes[stripe % NEST * size..][..size];
        let [low, high] = scheme.code_bytes();
        let codes = match scheme.bits {
            4 => by_row(|t, i| low_bits(stripe, t, i)),
            5 => by_row(|t, i| low_bits(stripe, t, i) | (stripe[low / 4 + i] >> t & 0x0101_0101) << 4),
            6 => by_row(|t, i| {
                let high = stripe[low / 4 + t / 4 * STEP_WORDS + i] >> (t % 4 * 2) & 0x0303_0303;
                low_bits(stripe, t, i) | high << 4
            }),
            _ => by_row(|t, i| stripe[t * STEP_WORDS + i]),
        };
        // SAFETY: a row of codes is two vectors of bytes, and the outputs hold 16 rows of a vector.
        unsafe {
            let scales = scales::<S>(scheme, head, &stripe[(low + high) / 4..]);
            let zero = S::splat(scheme.zero as f32);
            for (i, codes) in codes.iter().enumerate() {
                for (half, [scale, least]) in scales.iter().enumerate() {
                    let code = S::load_u8(codes.as_ptr().cast::<u8>().add(half * LANES));
                    let mut x = S::mul(S::sub(code, zero), S::splat(scale[i]));
                    if scheme.minimum {
                        x = S::add(x, S::splat(least[i]));
                    }
                    S::store(out[half].add(i * LANES), x);
                }
            }
        }
    }
}

/// For each row the codes of a stripe in their order, four to a word: `word(t, i)` has those of step `t` of row `i`.
#[inline(always)]
fn by_row(word: impl Fn(usize, usize) -> u32) -> [[u32; STEPS]; LANES] {
    let mut rows = [[0; STEPS]; LANES];
    for t in 0..STEPS {
        for (i, row) in rows.iter_mut().enumerate() {
            row[t] = word(t, i);
        }
    }
    rows
}

/// The low four bits of four codes: of step `t` of row `i`.
#[inline(always)]
fn low_bits(stripe: &[u32], t: usize, i: usize) -> u32 {
    stripe[t % (STEPS / 2) * STEP_WORDS + i] >> (t / (STEPS / 2) * 4) & 0x0f0f_0f0f
}

/// Of each half of a stripe the 16 rows' scales and their least values, from the head and from what comes after the codes.
///
/// # Safety
/// As for [`Simd`]; `head` and `after` are those of the scheme.
#[inline(always)]
unsafe fn scales<S: Simd>(scheme: Scheme, head: &[u32], after: &[u32]) -> [[[f32; LANES]; 2]; 2] {
    let groups = STRIPE / scheme.group;
    let (head, after) = (head.as_ptr().cast::<u16>(), after.as_ptr());
    let mut all = [[[0f32; LANES]; 2]; 2];
    for (half, [scales, minima]) in all.iter_mut().enumerate() {
        let group = half * groups / 2;
        // SAFETY: there is a vector of scales for each group (or of halves, for the only one), then one of least values if
        // the scheme has them; so it is in the head of a nested one.
        unsafe {
            let (scale, least) = if scheme.nested {
                let of = |group: usize| after.cast::<u8>().add(group * LANES);
                let least =
                    scheme.minimum.then(|| S::mul(S::load_f16(head.add(LANES)), S::load_u8(of(groups + group))));
                (S::mul(S::load_f16(head), S::load_i8(of(group).cast())), least)
            } else {
                let halves = after.cast::<u16>();
                (S::load_f16(halves), scheme.minimum.then(|| S::load_f16(halves.add(LANES))))
            };
            S::store(scales.as_mut_ptr(), scale);
            if let Some(least) = least {
                S::store(minima.as_mut_ptr(), least);
            }
        }
    }
    all
}
