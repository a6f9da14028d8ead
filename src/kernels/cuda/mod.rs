//! The CUDA backend: kernels of our own for NVIDIA GPUs of compute capability 8.0 and newer, and cuBLAS.
//!
//! The kernels are CUDA C++, in `cu/`. `tests/cuda` compiles the same files for the CPU and holds each to a plain version.

#![allow(unsafe_code, reason = "launches of kernels and functions of the driver; see each block")]

mod choose;
mod driver;
mod kv_cache;
mod module;
mod products;
mod rows;
mod scores;
mod serving;
mod step;
mod tuning;
mod weight;

use std::sync::{Arc, Once};

use candle_core::{DType, Device, Result, Tensor, bail, cuda::WrapErr as _};

use super::{
    Backend, DeviceMemory, Kernels, KvCache, Largest, Tuning,
    cpu::CpuBackend,
    cross::CrossKeyValues,
    layout::{BLOCK_SIZE, BatchLayout, KvShape},
    rows::RowKernels,
    weight::{Matrix, Weight},
};
use kv_cache::CudaKvCache;
use module::Cuda;
use scores::BiasTables;
use serving::CudaServing;
use tuning::CudaTuning;
use weight::CudaWeight;

/// The GPU of a number, as the driver counts them, with a stream of its own.
///
/// # Errors
/// There is no driver, or no such GPU.
pub fn device(ordinal: usize) -> Result<Device> {
    driver::load()?;
    Device::new_cuda_with_stream(ordinal)
}

/// One NVIDIA GPU. Weights are f32 or bf16, f16 is kept as f32, and quantised weights are dequantised when they are
/// loaded; activations are f32.
#[derive(Debug)]
pub struct CudaBackend {
    device: Device,
    cuda: Arc<Cuda>,
    tables: BiasTables,
    name: String,
    /// What tokens are chosen with on the host.
    host: CpuBackend,
    says_that_blocks_are_expanded: Once,
}

impl CudaBackend {
    /// The backend on a CUDA device.
    ///
    /// # Errors
    /// The device is not a GPU, or one that the kernels do not run on.
    pub fn new(device: &Device) -> Result<Self> {
        let cuda = Arc::new(Cuda::new(device)?);
        let context = cuda.stream.context();
        let (name, (major, minor)) = (context.name().w()?, context.compute_capability().w()?);
        let name = format!("cuda ({name}, compute capability {major}.{minor})");
        Ok(Self {
            device: device.clone(),
            cuda,
            tables: BiasTables::default(),
            name,
            host: CpuBackend::new(),
            says_that_blocks_are_expanded: Once::new(),
        })
    }
}

impl Backend for CudaBackend {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn activation_dtype(&self, _weights: DType) -> DType {
        DType::F32
    }

    fn weight(&self, matrix: Matrix, dtype: DType) -> Result<Weight> {
        let dtype = match dtype {
            DType::F32 | DType::F16 => DType::F32,
            DType::BF16 => DType::BF16,
            other => bail!(
                "the CUDA backend computes with weights in f32, bf16 or f16, not in {}; the reference backend can",
                other.as_str()
            ),
        };
        if let Matrix::Blocks(blocks) = &matrix {
            self.says_that_blocks_are_expanded.call_once(|| {
                tracing::info!(
                    format = ?blocks.format,
                    "quantised weights are expanded to {} on the GPU, which takes their full size there",
                    dtype.as_str()
                );
            });
        }
        let values = matrix.values()?.to_dtype(dtype)?.contiguous()?.to_device(&self.device)?;
        Ok(Weight::new(CudaWeight::new(Arc::clone(&self.cuda), values)))
    }

    fn side_by_side(&self, weights: Vec<Weight>) -> Result<Vec<Weight>> {
        weight::side_by_side(&self.cuda, weights)
    }

    fn block_bytes(&self, shape: &KvShape) -> usize {
        2 * shape.num_layers * BLOCK_SIZE * shape.num_kv_heads * shape.head_dim * shape.dtype.size_in_bytes()
    }

    fn memory(&self) -> Result<Option<DeviceMemory>> {
        self.cuda.stream.synchronize().w()?;
        let (free, total) = self.cuda.stream.context().mem_get_info().w()?;
        Ok(Some(DeviceMemory { free, total }))
    }

    fn largest(&self, logits: &Tensor) -> Result<Option<Vec<Largest>>> {
        choose::largest(&self.cuda, logits).map(Some)
    }

    fn kv_cache(&self, shape: KvShape, num_blocks: usize) -> Result<Box<dyn KvCache>> {
        Ok(Box::new(CudaKvCache::new(Arc::clone(&self.cuda), shape, num_blocks)?))
    }

    fn serving<'a>(
        &'a self,
        cache: &'a mut dyn KvCache,
        batch: &'a BatchLayout,
        encoded: &'a [&'a CrossKeyValues],
    ) -> Result<Box<dyn Kernels + 'a>> {
        if batch.shared > 0 {
            bail!("{} rows are shared by sequences that are served; they share what is in the cache", batch.shared);
        }
        match cache.as_any_mut().downcast_mut() {
            Some(cache) => Ok(Box::new(CudaServing::new(&self.cuda, &self.tables, cache, batch, encoded))),
            None => bail!("the key-value cache is of another backend"),
        }
    }

    fn tuning(&self) -> Arc<dyn Tuning> {
        Arc::new(CudaTuning::new(Arc::clone(&self.cuda)))
    }

    fn row_kernels(&self) -> &dyn RowKernels {
        self.host.row_kernels()
    }

    fn parallel(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.host.parallel(tasks, task);
    }
}
