//! Kernels for CPUs, compiled for several instruction sets, of which the best one is chosen when the program
//! runs. The only unsafe code of the project: no safe function here can be called in a way that is undefined. Public
//! functions check once a call what their unsafe code relies on, and panic if a shape does not fit.
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
pub mod integer;
mod isa;
pub mod kv_cache;
pub mod log_probabilities;
pub mod matmul;
pub mod packed;
pub mod pool;
pub mod process;
pub mod rows;
pub mod serving;
mod simd;
mod tensors;
pub mod tuning;
pub mod unmasked;
pub mod vocabulary;

pub use backend::CpuBackend;
pub use buffer::Buffer;
pub use frozen::FrozenMatrix;
pub use isa::Isa;
pub use packed::{Operands, PackedMatrix, Precision};
pub use pool::set_threads;

/// Calls `$generic::<S, …>(args)` compiled for the instructions that `$isa` has.
///
/// The generic function must be `unsafe fn` and `#[inline(always)]`, so that its body is compiled
/// inside the function that has the instructions enabled. The macro is used in an `unsafe` block, whose comment says
/// why the requirements of the generic function hold.
macro_rules! dispatch {
    ($isa:expr, $generic:ident($($arg:ident: $ty:ty),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2($($arg: $ty),*) {
            // SAFETY: as the caller of `dispatch!` says.
            unsafe { $generic::<$crate::kernels::cpu::simd::Avx2>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn avx512($($arg: $ty),*) {
            // SAFETY: as the caller of `dispatch!` says.
            unsafe { $generic::<$crate::kernels::cpu::simd::Avx512>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c")]
        unsafe fn avx512_bf16($($arg: $ty),*) {
            // SAFETY: as the caller of `dispatch!` says.
            unsafe { $generic::<$crate::kernels::cpu::simd::Avx512Bf16>($($arg),*) }
        }
        let isa: $crate::kernels::cpu::Isa = $isa;
        // The instructions are there: an `Isa` is made only where they were found.
        match isa.kind() {
            $crate::kernels::cpu::isa::Kind::Portable => $generic::<$crate::kernels::cpu::simd::Portable>($($arg),*),
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::cpu::isa::Kind::Avx2 => avx2($($arg),*),
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::cpu::isa::Kind::Avx512 => avx512($($arg),*),
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::cpu::isa::Kind::Avx512Bf16 | $crate::kernels::cpu::isa::Kind::Amx => {
                avx512_bf16($($arg),*);
            }
        }
    }};
}
use dispatch;

/// The number of elements of a shape, so that a length that is compared with it holds for every index.
///
/// # Panics
/// If there are more than can be counted.
fn elements(shape: &[usize]) -> usize {
    #[expect(clippy::expect_used, reason = "a documented panic")]
    shape
        .iter()
        .try_fold(1usize, |product, n| product.checked_mul(*n))
        .expect("a shape with a countable number of elements")
}
