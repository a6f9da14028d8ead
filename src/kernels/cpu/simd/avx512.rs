//! [`Simd`] for processors with AVX-512, with and without its products of bf16 pairs.

use std::arch::x86_64::*;

use super::Simd;

/// AVX-512 F, BW and DQ.
#[derive(Debug, Clone, Copy)]
pub struct Avx512;

/// AVX-512 with products of bf16 (BF16) and of bytes (VNNI).
#[derive(Debug, Clone, Copy)]
pub struct Avx512Bf16;

/// The part of [`Avx512`] and [`Avx512Bf16`] that is the same.
macro_rules! avx512 {
    () => {
        type V = __m512;
        type P = __m512i;
        type I = __m512i;
        type B = __m512i;
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
        #[inline(always)]
        unsafe fn splat_i32(x: i32) -> __m512i {
            // SAFETY: as `splat`.
            unsafe { _mm512_set1_epi32(x) }
        }
        #[inline(always)]
        unsafe fn to_f32(x: __m512i) -> __m512 {
            // SAFETY: as `splat`.
            unsafe { _mm512_cvtepi32_ps(x) }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const u16) -> __m512 {
            // SAFETY: as `splat`; 16 values are readable.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        }
        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> __m512 {
            // SAFETY: as `splat`; 16 values are readable.
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
        }
        #[inline(always)]
        unsafe fn load_u8(from: *const u8) -> __m512 {
            // SAFETY: as `splat`; 16 values are readable.
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
        }
        #[inline(always)]
        unsafe fn load_bytes(from: *const u8) -> __m512i {
            // SAFETY: as `splat`; 64 bytes are readable.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }
        #[inline(always)]
        unsafe fn splat_u8(x: u8) -> __m512i {
            // SAFETY: as `splat`.
            unsafe { _mm512_set1_epi8(x.cast_signed()) }
        }
        #[inline(always)]
        unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: as `splat`.
            unsafe { _mm512_and_si512(a, b) }
        }
        #[inline(always)]
        unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: as `splat`.
            unsafe { _mm512_or_si512(a, b) }
        }
        #[inline(always)]
        unsafe fn shift_left(a: __m512i, bits: i32) -> __m512i {
            // SAFETY: as `splat`.
            unsafe { _mm512_sll_epi16(a, _mm_cvtsi32_si128(bits)) }
        }
        #[inline(always)]
        unsafe fn shift_right(a: __m512i, bits: i32) -> __m512i {
            // SAFETY: as `splat`.
            unsafe { _mm512_srl_epi16(a, _mm_cvtsi32_si128(bits)) }
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
    #[inline(always)]
    unsafe fn dot_u6(acc: __m512i, w: __m512i, x: u32) -> __m512i {
        // SAFETY: as `splat`. Two products of at most 63 and 127 fit 16 bits.
        unsafe {
            let products = _mm512_maddubs_epi16(w, _mm512_set1_epi32(x.cast_signed()));
            _mm512_add_epi32(acc, _mm512_madd_epi16(products, _mm512_set1_epi16(1)))
        }
    }
    #[inline(always)]
    unsafe fn dot_u8(acc: __m512i, w: __m512i, x: u32) -> __m512i {
        // SAFETY: as `splat`. The low and the high halves of bytes by themselves.
        unsafe {
            let low = Self::splat_u8(15);
            let sixteenths = Self::dot_u6(_mm512_setzero_si512(), Self::and(Self::shift_right(w, 4), low), x);
            let acc = _mm512_add_epi32(acc, _mm512_slli_epi32::<4>(sixteenths));
            Self::dot_u6(acc, Self::and(w, low), x)
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
    #[inline(always)]
    unsafe fn dot_u6(acc: __m512i, w: __m512i, x: u32) -> __m512i {
        // SAFETY: the caller vouches for AVX-512 VNNI.
        unsafe { _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x.cast_signed())) }
    }
    #[inline(always)]
    unsafe fn dot_u8(acc: __m512i, w: __m512i, x: u32) -> __m512i {
        // SAFETY: any bytes are fine for the instruction.
        unsafe { Self::dot_u6(acc, w, x) }
    }
}
