//! How attention makes scores of products of queries and keys, as its kernels take it.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Result, Tensor, bail};
use cudarc::driver::DeviceRepr;

use super::module::Cuda;
use crate::kernels::{AttentionParams, relative_position_bias::RelativePositionBias};

/// Relative position biases and ALiBi's slopes on the device: each is uploaded when a layer first asks for it.
#[derive(Debug, Default)]
pub struct BiasTables {
    biases: Mutex<Vec<(Arc<RelativePositionBias>, Tensor)>>,
    slopes: Mutex<Vec<(Arc<[f32]>, Tensor)>>,
}

impl BiasTables {
    fn of_slopes(&self, slopes: &Arc<[f32]>, device: &Device) -> Result<Tensor> {
        let mut tables = self.slopes.lock().unwrap_or_else(PoisonError::into_inner);
        // All layers of a model have equal ones.
        if let Some((_, table)) = tables.iter().find(|(known, _)| known == slopes) {
            return Ok(table.clone());
        }
        let table = Tensor::new(&slopes[..], device)?;
        tables.push((Arc::clone(slopes), table.clone()));
        Ok(table)
    }

    fn of(&self, bias: &Arc<RelativePositionBias>, device: &Device) -> Result<Tensor> {
        let mut tables = self.biases.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, table)) = tables.iter().find(|(known, _)| Arc::ptr_eq(known, bias)) {
            return Ok(table.clone());
        }
        let table = Tensor::new(bias.values(), device)?;
        tables.push((Arc::clone(bias), table.clone()));
        Ok(table)
    }
}

/// What scores are made with; the structure `Scores` of `cu/attention.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ScoresParam {
    scale: f32,
    softcap: f32,
    /// 0 is none.
    pub window: i32,
    farthest: i32,
    slopes: u64,
    bias: u64,
}

// SAFETY: plain numbers, in the order and sizes of the kernels' structure.
unsafe impl DeviceRepr for ScoresParam {}

impl ScoresParam {
    /// The scores of a layer of `heads` heads, and the tables that have to live until the kernels are launched.
    ///
    /// # Errors
    /// A table is of another number of heads, or there is no memory for it.
    pub fn new(
        cuda: &Cuda,
        tables: &BiasTables,
        params: &AttentionParams,
        heads: usize,
    ) -> Result<(Self, Vec<Tensor>)> {
        let mut kept = Vec::new();
        let (mut slopes, mut bias, mut farthest) = (0, 0, 0);
        let device = Device::Cuda(cuda.device.clone());
        if let Some(values) = &params.alibi_slopes {
            if values.len() != heads {
                bail!("{} slopes were given for {heads} heads", values.len());
            }
            let table = tables.of_slopes(values, &device)?;
            slopes = cuda.address::<f32>(&table)?;
            kept.push(table);
        }
        if let Some(of) = &params.relative_position_bias {
            if of.heads() != heads {
                bail!("a relative position bias of {} heads was given for {heads}", of.heads());
            }
            let table = tables.of(of, &device)?;
            farthest = of.farthest() as i32;
            bias = cuda.address::<f32>(&table)?;
            kept.push(table);
        }
        let window = params.window.unwrap_or(0).min(i32::MAX as usize) as i32;
        let softcap = params.softcap.unwrap_or(0.0);
        Ok((Self { scale: params.scale, softcap, window, farthest, slopes, bias }, kept))
    }
}
