//! Vectors of sixteen lanes of f32. A kernel is written once over [`Simd`] and compiled once for each implementation:
//! the portable one here, which the tests hold the others to, and those for the vector instructions of x86-64.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::{Avx512, Avx512Bf16};

/// Lanes of a vector.
pub const LANES: usize = 16;

/// Vector instructions of one kind of processor.
///
/// # Safety
/// Every method may only be called where the processor has the instructions of the implementation
/// and inside a function compiled for them (see [`crate::kernels::cpu::Isa`]). Pointers need not
/// be aligned and must be valid for the 16 values (or pairs of values) that the method reads or
/// writes.
pub trait Simd: Copy {
    /// Sixteen values.
    type V: Copy;
    /// Sixteen pairs of bf16 values, the first of each pair in the low half.
    type P: Copy;
    /// Sixteen integers of 32 bits.
    type I: Copy;
    /// 64 bytes, four to a lane.
    type B: Copy;
    /// Vectors of sixteen lanes that the processor's registers hold.
    const REGISTERS: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// To the nearest whole number.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `a * 2^n` for whole `n` of -126 to 127.
    unsafe fn scale(a: Self::V, n: Self::V) -> Self::V;
    /// The sum of all lanes.
    unsafe fn sum(a: Self::V) -> f32;
    /// The largest lane.
    unsafe fn largest(a: Self::V) -> f32;
    /// Rounded to bf16, nearest even.
    unsafe fn store_bf16(to: *mut u16, v: Self::V);
    /// As [`store_bf16`](Self::store_bf16), kept as f32.
    unsafe fn to_bf16(v: Self::V) -> Self::V;
    unsafe fn load_pairs(from: *const u32) -> Self::P;
    /// The first of each pair, and the second.
    unsafe fn widen(pairs: Self::P) -> [Self::V; 2];
    /// Adds to each lane the two products of its pair in `w` with the pair `x`.
    unsafe fn dot(acc: Self::V, w: Self::P, x: u32) -> Self::V;
    unsafe fn splat_i32(x: i32) -> Self::I;
    unsafe fn to_f32(x: Self::I) -> Self::V;
    /// Sixteen values of f16.
    unsafe fn load_f16(from: *const u16) -> Self::V;
    unsafe fn load_i8(from: *const i8) -> Self::V;
    unsafe fn load_u8(from: *const u8) -> Self::V;
    unsafe fn load_bytes(from: *const u8) -> Self::B;
    unsafe fn splat_u8(x: u8) -> Self::B;
    unsafe fn and(a: Self::B, b: Self::B) -> Self::B;
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B;
    /// Shifts bytes by 0 to 7 bits; what comes in from a byte's neighbour is not defined.
    unsafe fn shift_left(a: Self::B, bits: i32) -> Self::B;
    unsafe fn shift_right(a: Self::B, bits: i32) -> Self::B;
    /// Adds to each lane the products of its four bytes in `w`, which are at most 63, with the four signed bytes `x`, none of
    /// which is -128.
    unsafe fn dot_u6(acc: Self::I, w: Self::B, x: u32) -> Self::I;
    /// As [`dot_u6`](Self::dot_u6), of any bytes.
    unsafe fn dot_u8(acc: Self::I, w: Self::B, x: u32) -> Self::I;

    /// `e^x`, to about two units in the last place, for x within -87 and 88 and as if it were.
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        // SAFETY: the caller vouches for the processor.
        unsafe {
            // Beyond these the result would leave the bounds of `scale`.
            let x = Self::min(Self::max(x, Self::splat(-87.0)), Self::splat(88.0));
            let n = Self::round(Self::mul(x, Self::splat(std::f32::consts::LOG2_E)));
            // Cody and Waite: the remainder, with ln 2 in two parts.
            let r = Self::fma(n, Self::splat(-0.693_359_4), x);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            // Cephes expf, the minimax polynomial for |r| <= ln 2 / 2.
            let mut p = Self::splat(1.987_569_1e-4);
            for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                p = Self::fma(p, r, Self::splat(c));
            }
            let p = Self::fma(Self::mul(r, r), p, Self::add(r, Self::splat(1.0)));
            Self::scale(p, n)
        }
    }
}

/// To bf16, nearest even.
#[inline(always)]
pub fn bf16(x: f32) -> u16 {
    half::bf16::from_f32(x).to_bits()
}

/// Plain Rust, for any processor.
#[derive(Debug, Clone, Copy)]
pub struct Portable;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

#[inline(always)]
fn low(pair: u32) -> f32 {
    f32::from_bits(pair << 16)
}

#[inline(always)]
fn high(pair: u32) -> f32 {
    f32::from_bits(pair & 0xffff_0000)
}

impl Simd for Portable {
    type V = [f32; LANES];
    type P = [u32; LANES];
    type I = [i32; LANES];
    type B = [[u8; 4]; LANES];
    const REGISTERS: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: the caller vouches for 16 readable values.
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        // SAFETY: the caller vouches for 16 writable values.
        unsafe { to.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Two roundings: `mul_add` would call a library on processors without the instruction.
        each(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        // Adding and taking away 1.5 * 2^23 drops the fraction.
        each(|i| (a[i] + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    unsafe fn scale(a: Self::V, n: Self::V) -> Self::V {
        each(|i| a[i] * f32::from_bits(((n[i] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn sum(a: Self::V) -> f32 {
        a.iter().sum()
    }
    #[inline(always)]
    unsafe fn largest(a: Self::V) -> f32 {
        a.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn store_bf16(to: *mut u16, v: Self::V) {
        // SAFETY: the caller vouches for 16 writable values.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(v.map(bf16)) }
    }
    #[inline(always)]
    unsafe fn to_bf16(v: Self::V) -> Self::V {
        v.map(|x| low(bf16(x).into()))
    }
    #[inline(always)]
    unsafe fn widen(pairs: Self::P) -> [Self::V; 2] {
        [pairs.map(low), pairs.map(high)]
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const u32) -> Self::P {
        // SAFETY: the caller vouches for 16 readable pairs.
        unsafe { from.cast::<Self::P>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn dot(acc: Self::V, w: Self::P, x: u32) -> Self::V {
        let (first, second) = (low(x), high(x));
        each(|i| acc[i] + low(w[i]) * first + high(w[i]) * second)
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn to_f32(x: Self::I) -> Self::V {
        x.map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::V {
        // SAFETY: the caller vouches for 16 readable values.
        unsafe { from.cast::<[u16; LANES]>().read_unaligned() }.map(|bits| half::f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::V {
        // SAFETY: the caller vouches for 16 readable values.
        unsafe { from.cast::<[i8; LANES]>().read() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::V {
        // SAFETY: the caller vouches for 16 readable values.
        unsafe { from.cast::<[u8; LANES]>().read() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        // SAFETY: the caller vouches for 64 readable bytes.
        unsafe { from.cast::<Self::B>().read() }
    }
    #[inline(always)]
    unsafe fn splat_u8(x: u8) -> Self::B {
        [[x; 4]; LANES]
    }
    #[inline(always)]
    unsafe fn and(a: Self::B, b: Self::B) -> Self::B {
        std::array::from_fn(|i| std::array::from_fn(|j| a[i][j] & b[i][j]))
    }
    #[inline(always)]
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B {
        std::array::from_fn(|i| std::array::from_fn(|j| a[i][j] | b[i][j]))
    }
    #[inline(always)]
    unsafe fn shift_left(a: Self::B, bits: i32) -> Self::B {
        a.map(|lane| lane.map(|byte| byte << bits))
    }
    #[inline(always)]
    unsafe fn shift_right(a: Self::B, bits: i32) -> Self::B {
        a.map(|lane| lane.map(|byte| byte >> bits))
    }
    #[inline(always)]
    unsafe fn dot_u6(acc: Self::I, w: Self::B, x: u32) -> Self::I {
        let x = x.to_le_bytes().map(|x| i32::from(x.cast_signed()));
        std::array::from_fn(|i| acc[i] + w[i].iter().zip(x).map(|(w, x)| i32::from(*w) * x).sum::<i32>())
    }
    #[inline(always)]
    unsafe fn dot_u8(acc: Self::I, w: Self::B, x: u32) -> Self::I {
        // SAFETY: any bytes are fine here.
        unsafe { Self::dot_u6(acc, w, x) }
    }
}
