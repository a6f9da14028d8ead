//! Sixteen lanes of f32, whatever the processor calls them. A kernel is written once over [`Simd`]
//! and compiled once for each implementation; the portable one is what the others are held to.

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
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512, Avx512Bf16};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Simd;

    /// AVX2 and FMA: two registers of eight lanes. (Each is named: what a closure does in `array::map` is
    /// compiled without the instructions, and every one becomes a call.)
    #[derive(Debug, Clone, Copy)]
    pub struct Avx2;

    /// AVX-512 F, BW and DQ.
    #[derive(Debug, Clone, Copy)]
    pub struct Avx512;

    /// AVX-512 with bf16 products.
    #[derive(Debug, Clone, Copy)]
    pub struct Avx512Bf16;

    /// The first values of eight pairs of bf16.
    #[inline(always)]
    unsafe fn low(pairs: __m256i) -> __m256 {
        // SAFETY: the caller vouches for AVX2.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)) }
    }

    /// The second values of eight pairs of bf16.
    #[inline(always)]
    unsafe fn high(pairs: __m256i) -> __m256 {
        // SAFETY: the caller vouches for AVX2.
        unsafe { _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32))) }
    }

    /// `a * 2^n` for whole `n`.
    #[inline(always)]
    unsafe fn scaled(a: __m256, n: __m256) -> __m256 {
        // SAFETY: the caller vouches for AVX2.
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        }
    }

    /// Rounds to bf16 in the high halves, nearest even: half of the last place that is kept, and one more
    /// if that place is odd; a NaN keeps its quiet bit.
    #[inline(always)]
    unsafe fn rounded(v: __m256) -> __m256i {
        // SAFETY: the caller vouches for AVX2.
        unsafe {
            let bits = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            _mm256_blendv_epi8(rounded, quiet, nan)
        }
    }

    /// The operations of [`Avx2`] that act on both registers alike.
    macro_rules! both {
        ($($name:ident($($x:ident),*) = $f:ident;)*) => {$(
            #[inline(always)]
            unsafe fn $name($($x: Self::V),*) -> Self::V {
                // SAFETY: the caller vouches for AVX2 and FMA.
                unsafe { [$f($($x[0]),*), $f($($x[1]),*)] }
            }
        )*};
    }

    impl Simd for Avx2 {
        type V = [__m256; 2];
        type P = [__m256i; 2];
        const REGISTERS: usize = 8;

        both! {
            add(a, b) = _mm256_add_ps;
            sub(a, b) = _mm256_sub_ps;
            mul(a, b) = _mm256_mul_ps;
            div(a, b) = _mm256_div_ps;
            max(a, b) = _mm256_max_ps;
            min(a, b) = _mm256_min_ps;
            fma(a, b, c) = _mm256_fmadd_ps;
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            // SAFETY: as `both`.
            unsafe { [_mm256_set1_ps(x); 2] }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self::V {
            // SAFETY: as `both`; 16 values are readable.
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, v: Self::V) {
            // SAFETY: as `both`; 16 values are writable.
            unsafe {
                _mm256_storeu_ps(to, v[0]);
                _mm256_storeu_ps(to.add(8), v[1]);
            }
        }
        #[inline(always)]
        unsafe fn round(a: Self::V) -> Self::V {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            // SAFETY: as `both`.
            unsafe { [_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])] }
        }
        #[inline(always)]
        unsafe fn scale(a: Self::V, n: Self::V) -> Self::V {
            // SAFETY: as `both`.
            unsafe { [scaled(a[0], n[0]), scaled(a[1], n[1])] }
        }
        #[inline(always)]
        unsafe fn sum(a: Self::V) -> f32 {
            let mut lanes = [0f32; 8];
            // SAFETY: as `both`; the array holds eight values.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), _mm256_add_ps(a[0], a[1])) };
            lanes.iter().sum()
        }
        #[inline(always)]
        unsafe fn largest(a: Self::V) -> f32 {
            let mut lanes = [0f32; 8];
            // SAFETY: as `both`; the array holds eight values.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), _mm256_max_ps(a[0], a[1])) };
            lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max)
        }
        #[inline(always)]
        unsafe fn store_bf16(to: *mut u16, v: Self::V) {
            // SAFETY: as `both`; 16 values are writable. Packing works on halves of the registers, so
            // the middle quarters change places.
            unsafe {
                let (a, b) = (_mm256_srli_epi32::<16>(rounded(v[0])), _mm256_srli_epi32::<16>(rounded(v[1])));
                let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(a, b));
                _mm256_storeu_si256(to.cast(), packed);
            }
        }
        #[inline(always)]
        unsafe fn to_bf16(v: Self::V) -> Self::V {
            // SAFETY: as `both`.
            unsafe { [high(rounded(v[0])), high(rounded(v[1]))] }
        }
        #[inline(always)]
        unsafe fn widen(pairs: Self::P) -> [Self::V; 2] {
            // SAFETY: as `both`.
            unsafe { [[low(pairs[0]), low(pairs[1])], [high(pairs[0]), high(pairs[1])]] }
        }
        #[inline(always)]
        unsafe fn load_pairs(from: *const u32) -> Self::P {
            // SAFETY: as `both`; 16 pairs are readable.
            unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(8).cast())] }
        }
        #[inline(always)]
        unsafe fn dot(acc: Self::V, w: Self::P, x: u32) -> Self::V {
            // SAFETY: as `both`.
            unsafe {
                let [first, second] = Self::widen(w);
                let acc = Self::fma(first, Self::splat(super::low(x)), acc);
                Self::fma(second, Self::splat(super::high(x)), acc)
            }
        }
    }

    /// The part of [`Avx512`] and [`Avx512Bf16`] that is the same.
    macro_rules! avx512 {
        () => {
            type V = __m512;
            type P = __m512i;
            const REGISTERS: usize = 32;

            #[inline(always)]
            unsafe fn splat(x: f32) -> __m512 {
                // SAFETY: the caller vouches for AVX-512.
                unsafe { _mm512_set1_ps(x) }
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> __m512 {
                // SAFETY: as `splat`; 16 values are readable.
                unsafe { _mm512_loadu_ps(from) }
            }
            #[inline(always)]
            unsafe fn store(to: *mut f32, v: __m512) {
                // SAFETY: as `splat`; 16 values are writable.
                unsafe { _mm512_storeu_ps(to, v) }
            }
            #[inline(always)]
            unsafe fn add(a: __m512, b: __m512) -> __m512 {
                // SAFETY: as `splat`.
                unsafe { _mm512_add_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn sub(a: __m512, b: __m512) -> __m512 {
                // SAFETY: as `splat`.
                unsafe { _mm512_sub_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn mul(a: __m512, b: __m512) -> __m512 {
                // SAFETY: as `splat`.
                unsafe { _mm512_mul_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn div(a: __m512, b: __m512) -> __m512 {
                // SAFETY: as `splat`.
                unsafe { _mm512_div_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn max(a: __m512, b: __m512) -> __m512 {
                // SAFETY: as `splat`.
                unsafe { _mm512_max_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn min(a: __m512, b: __m512) -> __m512 {
                // SAFETY: as `splat`.
                unsafe { _mm512_min_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
                // SAFETY: as `splat`.
                unsafe { _mm512_fmadd_ps(a, b, c) }
            }
            #[inline(always)]
            unsafe fn round(a: __m512) -> __m512 {
                // SAFETY: as `splat`.
                unsafe { _mm512_roundscale_ps::<0>(a) }
            }
            #[inline(always)]
            unsafe fn scale(a: __m512, n: __m512) -> __m512 {
                // SAFETY: as `splat`.
                unsafe { _mm512_scalef_ps(a, n) }
            }
            #[inline(always)]
            unsafe fn sum(a: __m512) -> f32 {
                // SAFETY: as `splat`.
                unsafe { _mm512_reduce_add_ps(a) }
            }
            #[inline(always)]
            unsafe fn largest(a: __m512) -> f32 {
                // SAFETY: as `splat`.
                unsafe { _mm512_reduce_max_ps(a) }
            }
            #[inline(always)]
            unsafe fn load_pairs(from: *const u32) -> __m512i {
                // SAFETY: as `splat`; 16 pairs are readable.
                unsafe { _mm512_loadu_si512(from.cast()) }
            }
            #[inline(always)]
            unsafe fn to_bf16(v: __m512) -> __m512 {
                let mut rounded = [0u16; 16];
                // SAFETY: as `splat`; the array holds 16 values.
                unsafe {
                    Self::store_bf16(rounded.as_mut_ptr(), v);
                    let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(rounded.as_ptr().cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                }
            }
            #[inline(always)]
            unsafe fn widen(pairs: __m512i) -> [__m512; 2] {
                // SAFETY: as `splat`.
                unsafe {
                    let high = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
                    [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(high)]
                }
            }
        };
    }

    impl Simd for Avx512 {
        avx512!();

        #[inline(always)]
        unsafe fn store_bf16(to: *mut u16, v: __m512) {
            // SAFETY: as `splat`; 16 values are writable. Nearest even: half of the last place that
            // is kept, and one more if that place is odd; a NaN keeps its quiet bit.
            unsafe {
                let bits = _mm512_castps_si512(v);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
                let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
                let kept = _mm512_srli_epi32::<16>(_mm512_mask_blend_epi32(nan, rounded, quiet));
                _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(kept));
            }
        }
        #[inline(always)]
        unsafe fn dot(acc: __m512, w: __m512i, x: u32) -> __m512 {
            // SAFETY: as `splat`.
            unsafe {
                let first = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(w));
                let second = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
                let acc = _mm512_fmadd_ps(first, _mm512_set1_ps(super::low(x)), acc);
                _mm512_fmadd_ps(second, _mm512_set1_ps(super::high(x)), acc)
            }
        }
    }

    impl Simd for Avx512Bf16 {
        avx512!();

        #[inline(always)]
        unsafe fn store_bf16(to: *mut u16, v: __m512) {
            // SAFETY: the caller vouches for AVX-512 BF16; 16 values are writable, and both types
            // are 256 bits.
            unsafe {
                let rounded: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(v));
                _mm256_storeu_si256(to.cast(), rounded);
            }
        }
        #[inline(always)]
        unsafe fn dot(acc: __m512, w: __m512i, x: u32) -> __m512 {
            // SAFETY: the caller vouches for AVX-512 BF16; all three types are 512 bits.
            unsafe {
                let w = std::mem::transmute::<__m512i, __m512bh>(w);
                let x = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(x as i32));
                _mm512_dpbf16_ps(acc, w, x)
            }
        }
    }
}
