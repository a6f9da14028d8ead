//! Zeroed memory for what is large and lives long: weights and keys and values. It starts at a
//! page, takes memory only where it is touched, and asks for huge pages, which spare the processor
//! a walk of its page tables at every 4 KiB of a stream.

use bytemuck::Pod;
use memmap2::{MmapMut, MmapOptions};

/// A fixed number of values of a plain type, zero at first.
#[derive(Debug)]
pub struct Buffer<T> {
    memory: MmapMut,
    len: usize,
    values: std::marker::PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// # Errors
    /// The system does not give the address space.
    pub fn zeroed(len: usize) -> std::io::Result<Self> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| {
            std::io::Error::new(std::io::ErrorKind::OutOfMemory, "more bytes than there are addresses")
        })?;
        // An empty map is an error.
        let memory = MmapOptions::new().len(bytes.max(1)).no_reserve_swap().map_anon()?;
        #[cfg(target_os = "linux")]
        if bytes >= 1 << 21 {
            // Only a wish: without it all is as right and a little slower.
            let _ = memory.advise(memmap2::Advice::HugePage);
        }
        Ok(Self { memory, len, values: std::marker::PhantomData })
    }

    /// The values.
    pub fn as_slice(&self) -> &[T] {
        bytemuck::cast_slice(&self.memory[..self.len * size_of::<T>()])
    }

    /// The values, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.memory[..self.len * size_of::<T>()])
    }
}
