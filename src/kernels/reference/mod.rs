//! The reference backend: plain candle operations on any device of candle's, for serving and tuning. It gathers
//! keys and values, masks and multiplies step by step: slow, and what other backends are held to and start from.

mod attention;
mod kv_cache;
mod products;
mod serving;
pub mod tuning;

use std::sync::Arc;

use candle_core::{DType, Device, Result, bail};

use super::{
    Backend, Kernels, KvCache, Tuning,
    cross::CrossKeyValues,
    layout::{BLOCK_SIZE, BatchLayout, KvShape},
    weight::{Matrix, Weight},
};
#[cfg(feature = "cuda")]
pub(super) use attention::attend;
use kv_cache::ReferenceKvCache;
use products::ReferenceWeight;
use serving::ReferenceServing;
use tuning::ReferenceTuning;

/// Plain candle operations on one device. Weights are in f32, bf16, f16 or f64; activations are f32, or f64 where the
/// weights are. Quantised weights are dequantised when they are loaded.
#[derive(Debug)]
pub struct ReferenceBackend {
    device: Device,
}

impl ReferenceBackend {
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone() }
    }
}

impl Backend for ReferenceBackend {
    fn name(&self) -> String {
        format!("reference ({:?})", self.device.location())
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn activation_dtype(&self, weights: DType) -> DType {
        super::widened(weights)
    }

    fn weight(&self, matrix: Matrix, dtype: DType) -> Result<Weight> {
        if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16 | DType::F64) {
            bail!("the reference backend computes with weights in f32, bf16, f16 or f64, not in {}", dtype.as_str());
        }
        let weight = matrix.values()?.to_dtype(dtype)?.to_device(&self.device)?.contiguous()?;
        Ok(Weight::new(ReferenceWeight::new(weight)))
    }

    fn block_bytes(&self, shape: &KvShape) -> usize {
        2 * shape.num_layers * BLOCK_SIZE * shape.num_kv_heads * shape.head_dim * shape.dtype.size_in_bytes()
    }

    fn kv_cache(&self, shape: KvShape, num_blocks: usize) -> Result<Box<dyn KvCache>> {
        Ok(Box::new(ReferenceKvCache::new(shape, num_blocks, &self.device)?))
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
            Some(cache) => Ok(Box::new(ReferenceServing::new(cache, batch, encoded))),
            None => bail!("the key-value cache is of another backend"),
        }
    }

    fn tuning(&self) -> Arc<dyn Tuning> {
        Arc::new(ReferenceTuning::new(&self.device))
    }
}
