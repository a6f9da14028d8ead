//! The choice of a backend: the one place that names them all.

use std::sync::Arc;

use candle_core::{Device, Result, bail};

use super::{Backend, QuantisedProducts, cpu::CpuBackend, reference::ReferenceBackend};

/// Which backend to run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendKind {
    /// Kernels of our own for the device: a CPU, or an NVIDIA GPU.
    Own,
    /// Plain candle operations, on any device of candle's: slow, and what other backends are held to.
    Reference,
}

/// Opens a backend on `device`. How products of quantised weights are computed is a question of the CPU's own kernels only.
///
/// # Errors
/// The backend does not run on that device.
pub fn open(kind: BackendKind, device: &Device, quantised: QuantisedProducts) -> Result<Arc<dyn Backend>> {
    match (kind, device) {
        (BackendKind::Reference, _) => Ok(Arc::new(ReferenceBackend::new(device))),
        (BackendKind::Own, Device::Cpu) => Ok(Arc::new(CpuBackend::new().with_quantised(quantised))),
        #[cfg(feature = "cuda")]
        (BackendKind::Own, Device::Cuda(_)) => Ok(Arc::new(super::cuda::CudaBackend::new(device)?)),
        (BackendKind::Own, other) => bail!("there are no kernels for {:?}", other.location()),
    }
}

/// The NVIDIA GPU of a number, counted from 0.
///
/// # Errors
/// There is no such GPU, no driver, or the program was built without the feature `cuda`.
pub fn gpu(ordinal: usize) -> Result<Device> {
    #[cfg(feature = "cuda")]
    return super::cuda::device(ordinal);
    #[cfg(not(feature = "cuda"))]
    bail!("GPU {ordinal} cannot be used: the program was built without the feature `cuda`")
}

/// Whether the program was built for GPUs.
pub const HAS_CUDA: bool = cfg!(feature = "cuda");

/// The CPU backend, with the best instructions that the processor has.
pub fn cpu() -> Arc<dyn Backend> {
    Arc::new(CpuBackend::new())
}

/// The reference backend on the CPU.
pub fn reference() -> Arc<dyn Backend> {
    Arc::new(ReferenceBackend::new(&Device::Cpu))
}

/// Settings of the process that computing is fastest with; to be called before it starts a thread.
pub fn prepare_process() {
    super::cpu::process::leave_threads_to_our_pool();
}

/// Gives memory that was freed back to the system, such as what was needed to load a model.
pub fn return_freed_memory() {
    super::cpu::process::return_freed_memory();
}

/// Sets how many threads the CPU backend computes with. Only the first call before any work has an effect.
pub fn set_threads(threads: usize) {
    super::cpu::set_threads(threads);
}
