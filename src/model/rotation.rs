//! Rotary embeddings as the kernels take them: a cosine and a sine for each row and each pair of dimensions.

use std::sync::{PoisonError, RwLock};

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::config::Rope;
use crate::kernels::Kernels;

/// Cosines and sines, `[rows, dims / 2]` each.
pub type Rotation = (Tensor, Tensor);

/// Positions of the first table of a model on a CPU.
const FIRST_POSITIONS: usize = 1024;

/// A rotary embedding's cosines and sines by position. On a CPU they are computed as far as positions have been asked for: of
/// a long context they would take more memory than its weights, in a small model.
#[derive(Debug)]
pub struct Rotary {
    rope: Rope,
    context_length: usize,
    device: Device,
    dtype: DType,
    /// `[positions, dims / 2]` each.
    table: RwLock<Rotation>,
}

impl Rotary {
    /// Those of positions up to a context length, in `dtype` on a device.
    ///
    /// # Errors
    /// There is no memory on the device.
    pub fn new(rope: &Rope, context_length: usize, device: &Device, dtype: DType) -> Result<Self> {
        // A GPU computes the more steps at once, the less it waits for the host.
        let first = if device.is_cpu() { context_length.min(FIRST_POSITIONS) } else { context_length };
        let table = RwLock::new(table(rope, first, device, dtype)?);
        Ok(Self { rope: rope.clone(), context_length, device: device.clone(), dtype, table })
    }

    /// Of the rows at `positions`, u32 on the device, of which `last` is the largest.
    ///
    /// # Errors
    /// A position is past the context length.
    pub fn of_rows(&self, last: u32, positions: &Tensor, kernels: &mut dyn Kernels) -> Result<Rotation> {
        let (cos, sin) = self.covering((last as usize + 1).min(self.context_length))?;
        Ok((kernels.pick(&cos, positions)?, kernels.pick(&sin, positions)?))
    }

    /// A table of at least so many positions.
    fn covering(&self, positions: usize) -> Result<Rotation> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner).clone();
        if table.0.dim(0)? >= positions {
            return Ok(table);
        }
        let larger = positions.next_power_of_two().min(self.context_length);
        let larger = self::table(&self.rope, larger, &self.device, self.dtype)?;
        let mut kept = self.table.write().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have made a larger one meanwhile.
        if kept.0.dim(0)? < larger.0.dim(0)? {
            *kept = larger.clone();
        }
        Ok(larger)
    }
}

/// Of so many positions, computed in f64 and rounded once.
fn table(rope: &Rope, positions: usize, device: &Device, dtype: DType) -> Result<Rotation> {
    let frequencies = rope.inverse_frequencies();
    let columns = frequencies.len();
    let table = |of: fn(f64) -> f64| {
        let mut values = vec![0f32; positions * columns];
        if columns > 0 {
            values.par_chunks_exact_mut(columns).enumerate().for_each(|(p, row)| {
                for (value, f) in row.iter_mut().zip(&frequencies) {
                    *value = (of(p as f64 * f) * rope.attention_factor) as f32;
                }
            });
        }
        Tensor::from_vec(values, (positions, columns), device)?.to_dtype(dtype)
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kernels::{self, layout::BatchLayout},
        model::config::RopeScaling,
    };

    #[test]
    fn a_table_grows_with_the_positions_and_its_rows_stay_what_they_are() {
        let rope = Rope { theta: 1e4, dims: 8, scaling: RopeScaling::None, attention_factor: 1.5 };
        let (context, device) = (5000, Device::Cpu);
        let rotary = Rotary::new(&rope, context, &device, DType::F32).unwrap();
        let whole = table(&rope, context, &device, DType::F32).unwrap();
        let values = |tensor: &Tensor| tensor.to_vec2::<f32>().unwrap();
        let layout = BatchLayout::default();
        let mut kernels = kernels::reference().tuning().kernels(&layout, None, None).unwrap();
        for (positions, held) in
            [(vec![0, 1023], 1024), (vec![7, 1024, 3], 2048), (vec![2], 2048), (vec![4999, 0], context)]
        {
            let last = *positions.iter().max().unwrap();
            let indices = Tensor::new(positions, &device).unwrap();
            let (cos, sin) = rotary.of_rows(last, &indices, kernels.as_mut()).unwrap();
            assert_eq!(values(&cos), values(&whole.0.index_select(&indices, 0).unwrap()));
            assert_eq!(values(&sin), values(&whole.1.index_select(&indices, 0).unwrap()));
            assert_eq!(rotary.table.read().unwrap().0.dims(), [held, 4]);
        }
        let past = context as u32;
        assert!(rotary.of_rows(past, &Tensor::new(&[past], &device).unwrap(), kernels.as_mut()).is_err());
    }
}
