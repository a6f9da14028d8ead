//! The micro-kernel: up to 32 rows of activations by one micro-panel of codes.

use super::{
    super::{block::BLOCK_COLUMNS, packed::PANEL_WIDTH, simd::Simd},
    Group, NEST, STEP_BYTES, STEPS, STRIPE, Scheme,
};

/// How many bytes ahead of its use a micro-panel is prefetched.
const BYTES_AHEAD: usize = 2048;

/// Rows of activations by a micro-panel of this scheme: 16 columns of `sums`, a block.
///
/// # Safety
/// `x` is valid for `rows` rows of `k / 32` groups, `panel` for a micro-panel of `k`, `sums` for `rows` rows of a block from
/// the micro-panel's column on.
#[inline(always)]
pub unsafe fn panel<S: Simd>(scheme: Scheme, x: *const Group, rows: usize, k: usize, panel: *const u8, sums: *mut f32) {
    let Scheme { bits, group, zero, minimum, nested } = scheme;
    // SAFETY: as the caller says.
    unsafe {
        match (bits, group, zero, minimum, nested) {
            (4, 32, 8, false, false) => all_rows::<S, 4, 32, 8, false, false>(x, rows, k, panel, sums),
            (4, 32, 0, true, false) => all_rows::<S, 4, 32, 0, true, false>(x, rows, k, panel, sums),
            (5, 32, 16, false, false) => all_rows::<S, 5, 32, 16, false, false>(x, rows, k, panel, sums),
            (5, 32, 0, true, false) => all_rows::<S, 5, 32, 0, true, false>(x, rows, k, panel, sums),
            (8, 32, 128, false, false) => all_rows::<S, 8, 32, 128, false, false>(x, rows, k, panel, sums),
            (4, 16, 0, true, true) => all_rows::<S, 4, 16, 0, true, true>(x, rows, k, panel, sums),
            (4, 16, 4, false, true) => all_rows::<S, 4, 16, 4, false, true>(x, rows, k, panel, sums),
            (4, 32, 0, true, true) => all_rows::<S, 4, 32, 0, true, true>(x, rows, k, panel, sums),
            (5, 32, 0, true, true) => all_rows::<S, 5, 32, 0, true, true>(x, rows, k, panel, sums),
            (6, 16, 32, false, true) => all_rows::<S, 6, 16, 32, false, true>(x, rows, k, panel, sums),
            other => unreachable!("no format has the scheme {other:?}"),
        }
    }
}

/// # Safety
/// As [`panel`]; the constants are those of the scheme.
#[inline(always)]
unsafe fn all_rows<
    S: Simd,
    const BITS: usize,
    const GROUP: usize,
    const ZERO: i32,
    const MINIMUM: bool,
    const NESTED: bool,
>(
    x: *const Group,
    rows: usize,
    k: usize,
    panel: *const u8,
    sums: *mut f32,
) {
    let stripes = k / STRIPE;
    let mut row = 0;
    // SAFETY: `row` plus the rows of each call never exceeds `rows`.
    unsafe {
        while row < rows {
            let (x, sums) = (x.add(row * stripes), sums.add(row * BLOCK_COLUMNS));
            row += match rows - row {
                left if left >= 8 && S::REGISTERS >= 32 => {
                    few_rows::<S, 8, BITS, GROUP, ZERO, MINIMUM, NESTED>(x, stripes, panel, sums)
                }
                left if left >= 4 => few_rows::<S, 4, BITS, GROUP, ZERO, MINIMUM, NESTED>(x, stripes, panel, sums),
                left if left >= 2 => few_rows::<S, 2, BITS, GROUP, ZERO, MINIMUM, NESTED>(x, stripes, panel, sums),
                _ => few_rows::<S, 1, BITS, GROUP, ZERO, MINIMUM, NESTED>(x, stripes, panel, sums),
            };
        }
    }
}

/// `R` rows, their sums in registers.
///
/// # Safety
/// As [`panel`], for `R` rows.
#[inline(always)]
unsafe fn few_rows<
    S: Simd,
    const R: usize,
    const BITS: usize,
    const GROUP: usize,
    const ZERO: i32,
    const MINIMUM: bool,
    const NESTED: bool,
>(
    x: *const Group,
    stripes: usize,
    panel: *const u8,
    sums: *mut f32,
) -> usize {
    let scheme = Scheme { bits: BITS, group: GROUP, zero: ZERO, minimum: MINIMUM, nested: NESTED };
    let [low, high] = scheme.code_bytes();
    let groups = STRIPE / GROUP;
    let mut at = panel;
    // SAFETY: `at` moves over the heads and stripes of the micro-panel, `stripe` and `row` over the groups.
    unsafe {
        let zero = S::splat(0.0);
        let (mut d, mut m) = (zero, zero);
        let mut acc = [zero; R];
        for stripe in 0..stripes {
            if NESTED && stripe % NEST == 0 {
                d = S::load_f16(at.cast());
                if MINIMUM {
                    m = S::load_f16(at.add(2 * PANEL_WIDTH).cast());
                }
                at = at.add(scheme.head_bytes());
            }
            if R <= 4 {
                for line in 0..scheme.stripe_bytes().div_ceil(64) {
                    prefetch(at.wrapping_add(BYTES_AHEAD + 64 * line));
                }
            }
            let after = at.add(low + high);
            let steps = unpack::<S, BITS>(at);
            for group in 0..groups {
                let (scale, least) = if NESTED {
                    let of = |offset: usize| after.add((offset + group) * PANEL_WIDTH);
                    let least = if MINIMUM { S::mul(m, S::load_u8(of(groups))) } else { zero };
                    (S::mul(d, S::load_i8(of(0).cast())), least)
                } else {
                    let least = if MINIMUM { S::load_f16(after.add(2 * PANEL_WIDTH).cast()) } else { zero };
                    (S::load_f16(after.cast()), least)
                };
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = &*x.add(r * stripes + stripe);
                    for half in if groups == 1 { 0..2 } else { group..group + 1 } {
                        let mut dot = S::splat_i32(-ZERO * x.sums[half]);
                        let own = steps.iter().enumerate().skip(half * STEPS / 2).take(STEPS / 2);
                        for (t, step) in own {
                            let codes = x.codes.as_ptr().add(4 * t).cast::<u32>().read_unaligned();
                            dot = if BITS == 8 { S::dot_u8(dot, *step, codes) } else { S::dot_u6(dot, *step, codes) };
                        }
                        *acc = S::fma(S::to_f32(dot), S::mul(scale, S::splat(x.scales[half])), *acc);
                    }
                    if MINIMUM {
                        let value = if groups == 1 { x.value } else { x.values[group] };
                        *acc = S::fma(least, S::splat(value), *acc);
                    }
                }
            }
            at = at.add(scheme.stripe_bytes());
        }
        for (r, acc) in acc.iter().enumerate() {
            S::store(sums.add(r * BLOCK_COLUMNS), *acc);
        }
    }
    R
}

/// The codes of a stripe, a step in each vector.
///
/// # Safety
/// `at` is valid for a stripe.
#[inline(always)]
unsafe fn unpack<S: Simd, const BITS: usize>(at: *const u8) -> [S::B; STEPS] {
    // SAFETY: the steps and the bits after them are within the stripe.
    unsafe {
        let low = S::splat_u8(15);
        let mut steps = [low; STEPS];
        if BITS == 8 {
            steps.iter_mut().enumerate().for_each(|(t, step)| *step = S::load_bytes(at.add(t * STEP_BYTES)));
            return steps;
        }
        for t in 0..STEPS / 2 {
            let both = S::load_bytes(at.add(t * STEP_BYTES));
            steps[t] = S::and(both, low);
            steps[t + STEPS / 2] = S::and(S::shift_right(both, 4), low);
        }
        let high = at.add(STEPS / 2 * STEP_BYTES);
        if BITS == 5 {
            let (bits, mask) = (S::load_bytes(high), S::splat_u8(16));
            for (t, step) in steps.iter_mut().enumerate() {
                let bit = if t <= 4 { S::shift_left(bits, 4 - t as i32) } else { S::shift_right(bits, t as i32 - 4) };
                *step = S::or(*step, S::and(bit, mask));
            }
        }
        if BITS == 6 {
            let mask = S::splat_u8(48);
            for (t, step) in steps.iter_mut().enumerate() {
                let bits = S::load_bytes(high.add(t / 4 * STEP_BYTES));
                let at = 2 * (t as i32 % 4);
                let bits = if at <= 4 { S::shift_left(bits, 4 - at) } else { S::shift_right(bits, at - 4) };
                *step = S::or(*step, S::and(bits, mask));
            }
        }
        steps
    }
}

#[inline(always)]
fn prefetch(at: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch is no access; it may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = at;
}
