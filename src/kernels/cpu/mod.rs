//! Kernels for CPUs, written for the instructions that a processor has and chosen when the program
//! runs. The only unsafe code of the project.
//!
//! Every row of a result is computed by itself, in one order, whatever other rows there are: a
//! request's answer is the same bit for bit alone, in a batch, in chunks, or from the cache.
#![allow(unsafe_code, reason = "vector instructions, tiles and threads on borrowed data; see each block")]
#![deny(clippy::undocumented_unsafe_blocks, unsafe_op_in_unsafe_fn)]

#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
mod backend;
mod block;
mod buffer;
pub mod frozen;
pub mod kv_cache;
pub mod matmul;
pub mod packed;
pub mod pool;
pub mod rows;
pub mod serving;
mod simd;
mod tensors;
pub mod tuning;
pub mod unmasked;

use std::sync::OnceLock;

pub use backend::CpuBackend;
pub use buffer::Buffer;
pub use frozen::FrozenMatrix;
pub use packed::{PackedMatrix, Precision};
pub use pool::set_threads;

/// Instructions that the kernels are compiled for, from the plainest to the fastest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What every processor of this architecture has.
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 with products of bf16 pairs.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// Tiles of bf16, besides AVX-512 with bf16.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl Isa {
    /// The best that this machine has.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().last().copied().unwrap_or(Self::Portable))
    }

    /// All that this machine has, the best last.
    pub fn available() -> Vec<Self> {
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            let bf16 = avx512 && is_x86_feature_detected!("avx512bf16");
            all.extend(
                [(avx2, Self::Avx2), (avx512, Self::Avx512), (bf16, Self::Avx512Bf16)]
                    .map(|(has, isa)| if has { Some(isa) } else { None })
                    .into_iter()
                    .flatten(),
            );
            if bf16 && amx::usable() {
                all.push(Self::Amx);
            }
        }
        all
    }

    /// Whether there are instructions for products of bf16.
    pub fn multiplies_bf16(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self >= Self::Avx512Bf16;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// What the kernels call themselves in a log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Self::Amx => "amx-bf16",
        }
    }
}

/// Calls `$generic::<S, …>(args)` compiled for the instructions that `$isa` has.
///
/// The generic function must be `unsafe fn` and `#[inline(always)]`, so that its body is compiled
/// inside the function that has the instructions enabled.
macro_rules! dispatch {
    ($isa:expr, $generic:ident($($arg:ident: $ty:ty),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2($($arg: $ty),*) {
            // SAFETY: as the caller of `dispatch!` says.
            unsafe { $generic::<$crate::kernels::cpu::simd::Avx2>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        unsafe fn avx512($($arg: $ty),*) {
            // SAFETY: as the caller of `dispatch!` says.
            unsafe { $generic::<$crate::kernels::cpu::simd::Avx512>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
        unsafe fn avx512_bf16($($arg: $ty),*) {
            // SAFETY: as the caller of `dispatch!` says.
            unsafe { $generic::<$crate::kernels::cpu::simd::Avx512Bf16>($($arg),*) }
        }
        // SAFETY: `Isa` values other than `Portable` exist only where the processor was found to have
        // the instructions; the rest is as the caller says.
        unsafe {
            match $isa {
                $crate::kernels::cpu::Isa::Portable => $generic::<$crate::kernels::cpu::simd::Portable>($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::Isa::Avx2 => avx2($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::Isa::Avx512 => avx512($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::Isa::Avx512Bf16 | $crate::kernels::cpu::Isa::Amx => avx512_bf16($($arg),*),
            }
        }
    }};
}
use dispatch;
