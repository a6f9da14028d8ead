//! The CPU backend: weights packed for its kernels, a key-value cache in the order in which they read it.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Storage, Tensor, bail};
use half::bf16;

use super::{
    FrozenMatrix, Isa, PackedMatrix,
    kv_cache::{CacheShape, CpuKvCache},
    pool,
    serving::CpuServing,
    tuning::CpuTuning,
    vocabulary::CpuRows,
};
use crate::kernels::{
    Backend, Kernels, KvCache, QuantisedProducts, Tuning,
    cross::CrossKeyValues,
    host::with_values,
    layout::{BatchLayout, KvShape},
    rows::RowKernels,
    weight::{Matrix, Weight},
};

/// Kernels of our own for CPUs. Weights are f32, bf16 or ggml's blocks; activations are f32.
#[derive(Debug)]
pub struct CpuBackend {
    rows: CpuRows,
    quantised: QuantisedProducts,
}

impl CpuBackend {
    /// With exact products of quantised weights.
    pub fn new() -> Self {
        Self { rows: CpuRows(Isa::best()), quantised: QuantisedProducts::Exact }
    }

    /// With these products of quantised weights.
    pub fn with_quantised(self, quantised: QuantisedProducts) -> Self {
        Self { quantised, ..self }
    }
}

impl Default for CpuBackend {
    fn default() -> Self {
        Self::new()
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> String {
        format!("cpu ({})", Isa::best().name())
    }

    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn activation_dtype(&self, _weights: DType) -> DType {
        DType::F32
    }

    /// f16 is kept as f32, which holds it exactly. Blocks stay quantised where they are computed with as f32 or as integers.
    fn weight(&self, matrix: Matrix, dtype: DType) -> Result<Weight> {
        let (n, k) = matrix.dims2()?;
        let packed = match (matrix, dtype) {
            (Matrix::Blocks(blocks), DType::F32) if self.quantised == QuantisedProducts::Integers => {
                PackedMatrix::from_blocks_as_integers(blocks.format, blocks.bytes, n, k)?
            }
            (Matrix::Blocks(blocks), DType::F32) => {
                PackedMatrix::from_blocks(blocks.format, blocks.bytes.into_memory()?, n, k)
            }
            (matrix, DType::F32) => pack_f32(&matrix.values()?, n, k)?,
            (matrix, DType::F16) => pack_f32(&matrix.values()?.to_dtype(DType::F16)?, n, k)?,
            (matrix, DType::BF16) => pack_bf16(&matrix.values()?, n, k)?,
            (_, other) => bail!(
                "the CPU backend computes with weights in f32, bf16 or f16, not in {}; the reference backend can",
                other.as_str()
            ),
        };
        Ok(Weight::new(FrozenMatrix::new(packed)))
    }

    fn block_bytes(&self, shape: &KvShape) -> usize {
        CacheShape::of(shape).block_bytes()
    }

    fn kv_cache(&self, shape: KvShape, num_blocks: usize) -> Result<Box<dyn KvCache>> {
        Ok(Box::new(CpuKvCache::new(shape, num_blocks)?))
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
        match cache.as_any_mut().downcast_mut::<CpuKvCache>() {
            Some(cache) => Ok(Box::new(CpuServing::new(cache, &batch.segments).with_encoded(encoded))),
            None => bail!("the key-value cache is of another backend"),
        }
    }

    fn tuning(&self) -> Arc<dyn Tuning> {
        super::process::keep_freed_memory();
        Arc::new(CpuTuning::default())
    }

    fn row_kernels(&self) -> &dyn RowKernels {
        &self.rows
    }

    fn parallel(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        pool::global().run(tasks, task);
    }
}

fn pack_f32(values: &Tensor, n: usize, k: usize) -> Result<PackedMatrix> {
    with_values(&values.to_dtype(DType::F32)?, |w| Ok(PackedMatrix::from_f32(w, n, k)?))
}

fn pack_bf16(values: &Tensor, n: usize, k: usize) -> Result<PackedMatrix> {
    let values = values.to_dtype(DType::BF16)?.contiguous()?;
    let (storage, layout) = values.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("the weight is not on the CPU") };
    let values: &[bf16] = storage.as_slice()?;
    Ok(PackedMatrix::from_bf16(&values[layout.start_offset()..][..n * k], n, k)?)
}
