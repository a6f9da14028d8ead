//! Zeroed memory for what lives long and is read again and again: weights, keys and values, the
//! kernels' scratch. It is aligned to cache lines, taken from the system only where it is touched, and
//! in huge pages, which spare the processor a walk of its page tables at every 4 KiB of a stream.

use std::{
    marker::PhantomData,
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError},
};

use bytemuck::Pod;
#[cfg(not(miri))]
use memmap2::{MmapMut, MmapOptions};

/// Bytes that small buffers share: many huge pages. (Miri clears them one by one.)
const REGION: usize = if cfg!(miri) { 1 << 20 } else { 32 << 20 };
/// Bytes of a cache line, which every buffer is aligned to.
const LINE: usize = 64;

/// A fixed number of values of a plain type, zero at first.
#[derive(Debug)]
pub struct Buffer<T> {
    /// The memory that the values are in; `None` without any.
    region: Option<Arc<Region>>,
    values: NonNull<T>,
    len: usize,
    owns: PhantomData<T>,
}

// SAFETY: a buffer alone has its part of the region, as a `Vec` has its memory.
unsafe impl<T: Send> Send for Buffer<T> {}
// SAFETY: as above; a shared buffer can only be read.
unsafe impl<T: Sync> Sync for Buffer<T> {}

/// Zeroed memory from the system.
#[cfg(not(miri))]
type Memory = MmapMut;
/// Miri has no huge pages and follows memory of the allocator best.
#[cfg(miri)]
type Memory = Vec<Line>;

#[cfg(miri)]
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "only its size and alignment count")] [u8; LINE]);

#[cfg(not(miri))]
fn map(len: usize) -> std::io::Result<Memory> {
    let memory = MmapOptions::new().len(len).no_reserve_swap().map_anon()?;
    #[cfg(target_os = "linux")]
    {
        // Only a wish: without it all is as right and a little slower.
        let _ = memory.advise(memmap2::Advice::HugePage);
    }
    Ok(memory)
}

#[cfg(miri)]
#[expect(clippy::unnecessary_wraps, reason = "as where the system gives the memory")]
fn map(len: usize) -> std::io::Result<Memory> {
    Ok(vec![Line([0; LINE]); len.div_ceil(LINE)])
}

/// A mapping that buffers have parts of. It goes when the last of them does.
#[derive(Debug)]
struct Region {
    /// Never borrowed after it was made: the buffers' pointers are the only way to it.
    _memory: Memory,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: `start` is only a number here; what is behind it belongs to the buffers.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn new(len: usize) -> std::io::Result<Self> {
        let mut memory = map(len)?;
        let start = NonNull::from(&mut *memory).cast::<u8>();
        assert!(start.addr().get().is_multiple_of(LINE), "a mapping that does not begin at a cache line");
        Ok(Self { _memory: memory, start, len })
    }
}

/// The region that small buffers are cut from, and how much of it is given away.
static SHARED: Mutex<Option<(Arc<Region>, usize)>> = Mutex::new(None);

/// `bytes` of zeros that nobody else has.
fn cut(bytes: usize) -> std::io::Result<(Arc<Region>, NonNull<u8>)> {
    if bytes > REGION / 4 {
        let region = Arc::new(Region::new(bytes)?);
        let start = region.start;
        return Ok((region, start));
    }
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    let (region, used) = match shared.take() {
        Some((region, used)) if used + bytes <= region.len => (region, used),
        _ => (Arc::new(Region::new(REGION)?), 0),
    };
    // SAFETY: `used + bytes` is within the region.
    let part = unsafe { region.start.add(used) };
    *shared = Some((Arc::clone(&region), used + bytes.next_multiple_of(LINE)));
    Ok((region, part))
}

impl<T> Buffer<T> {
    /// No values, and no memory.
    pub const fn empty() -> Self {
        Self { region: None, values: NonNull::dangling(), len: 0, owns: PhantomData }
    }
}

impl<T: Pod> Buffer<T> {
    /// # Errors
    /// The system does not give the address space.
    pub fn zeroed(len: usize) -> std::io::Result<Self> {
        const { assert!(align_of::<T>() <= LINE, "a type that is aligned to more than a cache line") };
        let bytes = len.checked_mul(size_of::<T>()).filter(|bytes| *bytes <= isize::MAX as usize - LINE);
        let bytes = bytes.ok_or_else(|| {
            std::io::Error::new(std::io::ErrorKind::OutOfMemory, "more bytes than there are addresses")
        })?;
        if bytes == 0 {
            return Ok(Self::empty());
        }
        let (region, start) = cut(bytes)?;
        let values = start.cast::<T>();
        assert!(values.is_aligned(), "a part of a region that is not aligned");
        Ok(Self { region: Some(region), values, len, owns: PhantomData })
    }

    /// The first `len` values of a scratch buffer, which is replaced by a larger one of zeros if it has fewer. What
    /// they hold is of no use to the caller.
    ///
    /// # Panics
    /// If the system does not give the memory.
    pub fn scratch(&mut self, len: usize) -> &mut [T] {
        if self.len < len {
            let larger = Self::zeroed(len.checked_next_power_of_two().unwrap_or(usize::MAX));
            #[expect(clippy::expect_used, reason = "as a `Vec`, which aborts")]
            let larger = larger.expect("memory for the kernels' scratch");
            *self = larger;
        }
        &mut self.as_mut_slice()[..len]
    }

    /// The values.
    pub fn as_slice(&self) -> &[T] {
        debug_assert!(self.region.is_some() || self.len == 0);
        // SAFETY: the part of the region is aligned for any plain type, holds `len` values, all of
        // whose bits are valid, and lives as long as the buffer.
        unsafe { std::slice::from_raw_parts(self.values.as_ptr(), self.len) }
    }

    /// The values, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as `as_slice`; nobody else has this part.
        unsafe { std::slice::from_raw_parts_mut(self.values.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zero_aligned_and_apart() {
        let mut all: Vec<Buffer<u32>> =
            [1, 17, 1000, if cfg!(miri) { 1 << 17 } else { 3 << 20 }, 0, 5].map(|n| Buffer::zeroed(n).unwrap()).into();
        for (i, buffer) in all.iter_mut().enumerate() {
            assert!(buffer.as_slice().iter().all(|x| *x == 0));
            assert!(buffer.len == 0 || buffer.as_slice().as_ptr().addr().is_multiple_of(LINE));
            buffer.as_mut_slice().fill(i as u32 + 1);
        }
        for (i, buffer) in all.iter().enumerate() {
            assert!(buffer.as_slice().iter().all(|x| *x == i as u32 + 1));
        }
    }

    #[test]
    fn a_length_without_so_many_addresses_is_an_error() {
        for len in [usize::MAX, usize::MAX / 4, isize::MAX as usize / 4] {
            assert!(Buffer::<u32>::zeroed(len).is_err(), "{len}");
        }
    }

    #[test]
    #[should_panic(expected = "memory for the kernels' scratch")]
    fn scratch_whose_next_power_of_two_cannot_be_counted_is_a_panic() {
        Buffer::<u32>::empty().scratch(usize::MAX / 2 + 2);
    }

    #[test]
    fn scratch_grows_and_is_kept() {
        let mut buffer = Buffer::<f32>::empty();
        buffer.scratch(100).fill(1.0);
        let at = buffer.as_slice().as_ptr();
        assert!(buffer.scratch(0).is_empty());
        assert_eq!(buffer.scratch(128).len(), 128);
        assert_eq!(buffer.as_slice().as_ptr(), at);
        assert!(buffer.scratch(129).iter().all(|x| *x == 0.0));
    }
}
