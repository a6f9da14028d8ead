//! Prefetching of the keys or values that attention reads next.

/// The plane of keys or values that is read after the current one, which a kernel prefetches on its way through this
/// one: planes are short runs in a large memory, which the hardware prefetcher does not foresee, and prefetching
/// all of one at once would wait for memory instead of computing.
#[derive(Clone, Copy)]
pub(super) struct Ahead(pub(super) Option<*const u32>);

impl Ahead {
    pub(super) const NOTHING: Self = Self(None);

    /// Prefetches part `i` of it, the parts being of `words` words.
    #[inline(always)]
    pub(super) fn prefetch(self, i: usize, words: usize) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        if let Some(plane) = self.0 {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            for word in (i * words..(i + 1) * words).step_by(16) {
                // SAFETY: a prefetch is no access; it may name any address.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(plane.wrapping_add(word).cast()) };
            }
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        let _ = (self.0, i, words);
    }
}
