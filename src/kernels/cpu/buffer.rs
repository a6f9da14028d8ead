//! Zeroed memory for what lives long and is read again and again: weights, keys and values, the
//! kernels' scratch. It is aligned to cache lines, taken from the system only where it is touched, and
//! in huge pages, which spare the processor a walk of its page tables at every 4 KiB of a stream.

use std::{
    marker::PhantomData,
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError},
};

use bytemuck::Pod;
use memmap2::{MmapMut, MmapOptions};

/// Bytes that small buffers share: many huge pages.
const REGION: usize = 32 << 20;
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

/// A mapping that buffers have parts of. It goes when the last of them does.
#[derive(Debug)]
struct Region {
    /// Never borrowed after it was made: the buffers' pointers are the only way to it.
    _memory: MmapMut,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: `start` is only a number here; what is behind it belongs to the buffers.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn new(len: usize) -> std::io::Result<Self> {
        let mut memory = MmapOptions::new().len(len).no_reserve_swap().map_anon()?;
        #[cfg(target_os = "linux")]
        {
            // Only a wish: without it all is as right and a little slower.
            let _ = memory.advise(memmap2::Advice::HugePage);
        }
        let start = NonNull::from(&mut *memory).cast();
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
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| {
            std::io::Error::new(std::io::ErrorKind::OutOfMemory, "more bytes than there are addresses")
        })?;
        if bytes == 0 {
            return Ok(Self::empty());
        }
        let (region, values) = cut(bytes)?;
        Ok(Self { region: Some(region), values: values.cast(), len, owns: PhantomData })
    }

    /// Replaces the values by at least `len` zeros if there are fewer.
    ///
    /// # Panics
    /// If the system does not give the memory.
    pub fn make_room(&mut self, len: usize) {
        if self.len < len {
            #[expect(clippy::expect_used, reason = "as a `Vec`, which aborts")]
            let more = Self::zeroed(len.next_power_of_two()).expect("memory for the kernels' scratch");
            *self = more;
        }
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
        let mut all: Vec<Buffer<u32>> = [1, 17, 1000, 3 << 20, 0, 5].map(|n| Buffer::zeroed(n).unwrap()).into();
        for (i, buffer) in all.iter_mut().enumerate() {
            assert!(buffer.as_slice().iter().all(|x| *x == 0));
            assert!(buffer.len == 0 || buffer.as_slice().as_ptr().addr().is_multiple_of(LINE));
            buffer.as_mut_slice().fill(i as u32 + 1);
        }
        for (i, buffer) in all.iter().enumerate() {
            assert!(buffer.as_slice().iter().all(|x| *x == i as u32 + 1));
        }
        assert!(Buffer::<u32>::zeroed(usize::MAX).is_err());
    }
}
