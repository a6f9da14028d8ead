//! The instruction sets that kernels are compiled for, and which of them this processor has.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::amx;

/// An instruction set that this processor was found to have. Kernels for it may be called wherever there is a value:
/// only [`best`](Self::best), [`available`](Self::available) and [`PORTABLE`](Self::PORTABLE) make one. The order is
/// from the plainest to the fastest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(Kind);

/// What [`dispatch`](super::dispatch) chooses by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl Isa {
    /// What every processor of this architecture has.
    pub const PORTABLE: Self = Self(Kind::Portable);

    /// The fastest that this machine has.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().last().copied().unwrap_or(Self::PORTABLE))
    }

    /// All that this machine has, the fastest last. Under Miri, which interprets no vector instructions, the portable
    /// one alone.
    pub fn available() -> Vec<Self> {
        let mut all = vec![Self::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        if !cfg!(miri) {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            let bf16 = avx512 && is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni");
            let amx = bf16 && amx::usable();
            let found = [(avx2, Kind::Avx2), (avx512, Kind::Avx512), (bf16, Kind::Avx512Bf16), (amx, Kind::Amx)];
            all.extend(found.into_iter().filter(|(has, _)| *has).map(|(_, kind)| Self(kind)));
        }
        all
    }

    /// Whether there are instructions for products of bf16 pairs.
    pub fn multiplies_bf16(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 >= Kind::Avx512Bf16;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Whether there are tile registers (AMX) and products of bf16 tiles.
    #[inline(always)]
    pub(super) fn has_tiles(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == Kind::Amx;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Which of the instruction sets it is.
    #[inline(always)]
    pub(super) fn kind(self) -> Kind {
        self.0
    }

    /// Its name in a log.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Bf16 => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Kind::Amx => "amx-bf16",
        }
    }
}

impl std::fmt::Debug for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_available_go_from_the_portable_one_to_the_best() {
        let all = Isa::available();
        assert_eq!(all.first(), Some(&Isa::PORTABLE));
        assert_eq!(all.last(), Some(&Isa::best()));
        assert!(all.is_sorted_by(|a, b| a < b));
    }
}
