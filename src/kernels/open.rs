//! The choice of a backend: the one place that names them all.

use std::sync::Arc;

use candle_core::{Device, Result, bail};

use super::{Backend, cpu::CpuBackend, reference::ReferenceBackend};

/// Which backend to run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendKind {
    /// Kernels of our own for CPUs.
    Cpu,
    /// Plain candle operations, on any device of candle's: slow, and what other backends are held to.
    Reference,
}

/// Opens a backend on `device`.
///
/// # Errors
/// The backend does not run on that device.
pub fn open(kind: BackendKind, device: &Device) -> Result<Arc<dyn Backend>> {
    match kind {
        BackendKind::Cpu if device.is_cpu() => Ok(Arc::new(CpuBackend::new())),
        BackendKind::Cpu => bail!("the CPU backend does not run on {:?}", device.location()),
        BackendKind::Reference => Ok(Arc::new(ReferenceBackend::new(device))),
    }
}

/// The CPU backend, with the best instructions that the processor has.
pub fn cpu() -> Arc<dyn Backend> {
    Arc::new(CpuBackend::new())
}

/// The reference backend on the CPU.
pub fn reference() -> Arc<dyn Backend> {
    Arc::new(ReferenceBackend::new(&Device::Cpu))
}

/// Sets how many threads the CPU backend computes with. Only the first call before any work has an effect.
pub fn set_threads(threads: usize) {
    super::cpu::set_threads(threads);
}
