//! Activations as integers of 8 bits, in halves of 16 with a scale each. (With a scale for each 32, as ggml has it, the
//! perplexity of a small model rises by a third more.)

use super::{
    super::{
        Buffer, Isa, dispatch,
        pool::Pool,
        simd::{LANES, Simd},
    },
    STRIPE,
};

/// 32 inner values of a row, in two halves: each value is its half's scale times its code.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub struct Group {
    /// From -127 to 127.
    pub codes: [i8; STRIPE],
    /// The sums of the first and of the second half's codes.
    pub sums: [i32; 2],
    pub scales: [f32; 2],
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
    let mut group = Group::default();
    for half in 0..2 {
        // SAFETY: a vector is half of the values.
        let (rounded, scale) = unsafe {
            let x = S::load(x.as_ptr().add(half * LANES));
            let zero = S::splat(0.0);
            let largest = S::largest(S::max(x, S::sub(zero, x)));
            // What is not finite makes the whole group so, and its row with it.
            if S::sum(S::mul(x, zero)) != 0.0 || !largest.is_finite() {
                return Group { scales: [f32::NAN; 2], values: [f32::NAN; 2], value: f32::NAN, ..Group::default() };
            }
            let scale = largest / 127.0;
            if scale < f32::MIN_POSITIVE {
                continue;
            }
            let mut rounded = [0f32; LANES];
            S::store(rounded.as_mut_ptr(), S::round(S::mul(x, S::splat(127.0 / largest))));
            (rounded, scale)
        };
        let codes = &mut group.codes[half * LANES..][..LANES];
        codes.iter_mut().zip(rounded).for_each(|(code, x)| *code = (x as i32).clamp(-127, 127) as i8);
        let sum: i32 = codes.iter().map(|&code| i32::from(code)).sum();
        (group.sums[half], group.scales[half], group.values[half]) = (sum, scale, sum as f32 * scale);
    }
    group.value = group.values[0] + group.values[1];
    group
}
