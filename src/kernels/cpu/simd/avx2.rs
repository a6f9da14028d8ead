//! [`Simd`] for processors with AVX2 and FMA.

use std::arch::x86_64::*;

use super::Simd;

/// AVX2 and FMA: two registers of eight lanes. (Each is named: what a closure does in `array::map` is
/// compiled without the instructions, and every one becomes a call.)
#[derive(Debug, Clone, Copy)]
pub struct Avx2;

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
    type I = [__m256i; 2];
    type B = [__m256i; 2];
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
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> Self::I {
        // SAFETY: as `both`.
        unsafe { [_mm256_set1_epi32(x); 2] }
    }
    #[inline(always)]
    unsafe fn to_f32(x: Self::I) -> Self::V {
        // SAFETY: as `both`.
        unsafe { [_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])] }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::V {
        // SAFETY: the caller vouches for F16C; 16 values are readable.
        unsafe {
            let half = |at: usize| _mm_loadu_si128(from.add(at).cast());
            [_mm256_cvtph_ps(half(0)), _mm256_cvtph_ps(half(8))]
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::V {
        // SAFETY: as `both`; 16 values are readable.
        unsafe {
            let all = _mm_loadu_si128(from.cast());
            Self::to_f32([_mm256_cvtepi8_epi32(all), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(all))])
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::V {
        // SAFETY: as `both`; 16 values are readable.
        unsafe {
            let all = _mm_loadu_si128(from.cast());
            Self::to_f32([_mm256_cvtepu8_epi32(all), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(all))])
        }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        // SAFETY: as `both`; 64 bytes are readable.
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn splat_u8(x: u8) -> Self::B {
        // SAFETY: as `both`.
        unsafe { [_mm256_set1_epi8(x.cast_signed()); 2] }
    }
    #[inline(always)]
    unsafe fn and(a: Self::B, b: Self::B) -> Self::B {
        // SAFETY: as `both`.
        unsafe { [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B {
        // SAFETY: as `both`.
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn shift_left(a: Self::B, bits: i32) -> Self::B {
        // SAFETY: as `both`.
        unsafe {
            let bits = _mm_cvtsi32_si128(bits);
            [_mm256_sll_epi16(a[0], bits), _mm256_sll_epi16(a[1], bits)]
        }
    }
    #[inline(always)]
    unsafe fn shift_right(a: Self::B, bits: i32) -> Self::B {
        // SAFETY: as `both`.
        unsafe {
            let bits = _mm_cvtsi32_si128(bits);
            [_mm256_srl_epi16(a[0], bits), _mm256_srl_epi16(a[1], bits)]
        }
    }
    #[inline(always)]
    unsafe fn dot_u6(acc: Self::I, w: Self::B, x: u32) -> Self::I {
        // SAFETY: as `both`. Two products of at most 63 and 127 fit 16 bits.
        unsafe {
            let (x, ones) = (_mm256_set1_epi32(x.cast_signed()), _mm256_set1_epi16(1));
            let add = |acc, w| _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
            [add(acc[0], w[0]), add(acc[1], w[1])]
        }
    }
    #[inline(always)]
    unsafe fn dot_u8(acc: Self::I, w: Self::B, x: u32) -> Self::I {
        // SAFETY: as `both`. The low and the high halves of bytes by themselves.
        unsafe {
            let low = Self::splat_u8(15);
            let high = Self::and(Self::shift_right(w, 4), low);
            let sixteenths = Self::dot_u6(Self::splat_i32(0), high, x);
            let acc = [
                _mm256_add_epi32(acc[0], _mm256_slli_epi32::<4>(sixteenths[0])),
                _mm256_add_epi32(acc[1], _mm256_slli_epi32::<4>(sixteenths[1])),
            ];
            Self::dot_u6(acc, Self::and(w, low), x)
        }
    }
}
