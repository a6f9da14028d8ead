//! Activations as integers of 8 bits, in groups of 32 with a scale each.

use super::{
    super::{
        Buffer, Isa, dispatch,
        pool::Pool,
        simd::{LANES, Simd},
    },
    STRIPE,
};

/// 32 inner values of a row, each `scale * code`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub struct Group {
    /// From -127 to 127.
    pub codes: [i8; STRIPE],
    /// The sums of the first and of the second half's codes.
    pub sums: [i32; 2],
    pub scale: f32,
    /// The sums in values, and their sum.
    pub values: [f32; 2],
    pub value: f32,
}

const _: () = assert!(size_of::<Group>() == 64);

/// Rounds `x`, rows of `k` values, to groups: `[rows][k / 32]`.
pub fn quantise(isa: Isa, pool: &Pool, x: &[f32], k: usize, scratch: &mut Buffer<u32>) -> *const Group {
    let groups = x.len() / STRIPE;
    // Room to begin at a whole group.
    const WORDS: usize = size_of::<Group>() / 4;
    let words = scratch.scratch((groups + 1) * WORDS);
    let first = words.as_mut_ptr().cast::<Group>();
    let first = first.wrapping_byte_add(misaligned(first));
    struct Out(*mut Group);
    // SAFETY: each task writes its own groups.
    unsafe impl Sync for Out {}
    let out = Out(first);
    let per_row = k / STRIPE;
    let rows = groups.checked_div(per_row).unwrap_or(0);
    let tasks = if rows < 8 { 1 } else { (4 * pool.threads()).min(rows) };
    pool.run(tasks, &|task| {
        let out = &out;
        let own = task * rows / tasks * per_row..(task + 1) * rows / tasks * per_row;
        let (from, to) = (&x[own.start * STRIPE..own.end * STRIPE], out.0.wrapping_add(own.start));
        // SAFETY: `to` has a group for each 32 values of `from`, within the scratch.
        unsafe { dispatch!(isa, quantise_groups(from: &[f32], to: *mut Group)) };
    });
    first
}

/// Bytes from a pointer to the next whole group.
fn misaligned(at: *const Group) -> usize {
    let align = align_of::<Group>();
    (align - at.addr() % align) % align
}

/// # Safety
/// `to` is valid for a group for each 32 values of `from`.
#[inline(always)]
unsafe fn quantise_groups<S: Simd>(from: &[f32], to: *mut Group) {
    for (i, x) in from.as_chunks::<STRIPE>().0.iter().enumerate() {
        // SAFETY: two vectors are 32 values.
        unsafe { to.add(i).write(quantised::<S>(x)) };
    }
}

/// # Safety
/// As for [`Simd`].
#[inline(always)]
unsafe fn quantised<S: Simd>(x: &[f32; STRIPE]) -> Group {
    // SAFETY: two vectors are 32 values.
    unsafe {
        let (a, b) = (S::load(x.as_ptr()), S::load(x.as_ptr().add(LANES)));
        let zero = S::splat(0.0);
        let sizes = S::max(S::max(a, S::sub(zero, a)), S::max(b, S::sub(zero, b)));
        let largest = S::largest(sizes);
        let scale = largest / 127.0;
        // What is not finite makes the whole group so, and its row with it.
        let is_finite = S::sum(S::mul(S::add(a, b), zero)) == 0.0 && largest.is_finite();
        if !is_finite {
            return Group { scale: f32::NAN, values: [f32::NAN; 2], value: f32::NAN, ..Group::default() };
        }
        if scale < f32::MIN_POSITIVE {
            return Group::default();
        }
        let inverse = S::splat(127.0 / largest);
        let mut rounded = [0f32; STRIPE];
        S::store(rounded.as_mut_ptr(), S::round(S::mul(a, inverse)));
        S::store(rounded.as_mut_ptr().add(LANES), S::round(S::mul(b, inverse)));
        let mut codes = [0i8; STRIPE];
        codes.iter_mut().zip(rounded).for_each(|(code, x)| *code = (x as i32).clamp(-127, 127) as i8);
        let sum = |codes: &[i8]| codes.iter().map(|&code| i32::from(code)).sum::<i32>();
        let sums = [sum(&codes[..STRIPE / 2]), sum(&codes[STRIPE / 2..])];
        let values = sums.map(|sum| sum as f32 * scale);
        Group { codes, sums, scale, values, value: (sums[0] + sums[1]) as f32 * scale }
    }
}
