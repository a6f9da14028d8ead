//! Frozen matrices on the device: by themselves, and several one after another.

use std::{any::Any, sync::Arc};

use candle_core::{DType, Result, Tensor, bail};
use half::bf16;

use super::module::{Cuda, ELEMENT_THREADS};
use crate::kernels::weight::{FrozenWeight, Linear, Weight};

/// A matrix `[n, k]` in f32 or bf16 on the device.
#[derive(Debug, Clone)]
pub struct CudaWeight {
    cuda: Arc<Cuda>,
    values: Tensor,
}

impl CudaWeight {
    pub fn new(cuda: Arc<Cuda>, values: Tensor) -> Self {
        Self { cuda, values }
    }

    /// The device that it is on.
    pub fn cuda(&self) -> &Cuda {
        &self.cuda
    }

    /// Whether the values are bf16, not f32.
    pub fn is_bf16(&self) -> bool {
        self.values.dtype() == DType::BF16
    }

    /// Where its values begin.
    ///
    /// # Errors
    /// They are not on this device.
    pub fn address(&self) -> Result<u64> {
        if self.is_bf16() { self.cuda.address::<bf16>(&self.values) } else { self.cuda.address::<f32>(&self.values) }
    }

    /// A layer's weight, of this backend.
    ///
    /// # Errors
    /// The weight is of another backend, or its input is not `k` wide.
    pub fn of(layer: &Linear, k: usize) -> Result<&Self> {
        let weight: &Self = layer.weight.downcast()?;
        if weight.dims().1 != k {
            bail!("a linear layer of {} inputs was given {k}", weight.dims().1);
        }
        Ok(weight)
    }
}

impl FrozenWeight for CudaWeight {
    fn dims(&self) -> (usize, usize) {
        (self.values.dims()[0], self.values.dims()[1])
    }

    fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        let ((n, k), host) = (self.dims(), ids.to_vec1::<u32>()?);
        if let Some(id) = host.iter().find(|&&id| id as usize >= n) {
            bail!("token {id} is not in a vocabulary of {n}");
        }
        let ids = ids.to_device(self.values.device())?;
        let out = self.cuda.uninitialised::<f32>(host.len() * k)?;
        let (table, ids, to, width) =
            (self.address()?, self.cuda.address::<u32>(&ids)?, self.cuda.address_of(&out), k as i32);
        let f = &self.cuda.functions;
        let function = if self.is_bf16() { &f.embed_bf16 } else { &f.embed_f32 };
        // SAFETY: every id is a row of the table, and a block writes row i of as many as there are ids.
        unsafe {
            let launch = self.cuda.launch(function).arg(&table).arg(&ids).arg(&to).arg(&width);
            launch.run([host.len(), 1, 1], ELEMENT_THREADS, 0)?;
        }
        Ok(self.cuda.tensor(out, (host.len(), k)))
    }

    fn to_tensor(&self) -> Result<Tensor> {
        Ok(self.values.clone())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The runs of weights that lie one after another in memory, so that one product gives the columns of all.
pub fn adjacent(weights: &[&CudaWeight]) -> Result<Vec<std::ops::Range<usize>>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    let mut end = None;
    for (i, weight) in weights.iter().enumerate() {
        let begins = (weight.address()?, weight.is_bf16());
        match runs.last_mut().filter(|_| end == Some(begins)) {
            Some(run) => run.end = i + 1,
            None => runs.push(i..i + 1),
        }
        end = Some((begins.0 + (weight.values.elem_count() * weight.values.dtype().size_in_bytes()) as u64, begins.1));
    }
    Ok(runs)
}

/// See [`Backend::side_by_side`](crate::kernels::Backend::side_by_side): copies, which are parts of one tensor.
///
/// # Errors
/// A weight is of another backend, or there is no memory.
pub fn side_by_side(cuda: &Arc<Cuda>, weights: Vec<Weight>) -> Result<Vec<Weight>> {
    let own = weights.iter().map(Weight::downcast::<CudaWeight>).collect::<Result<Vec<_>>>()?;
    let alike =
        own.windows(2).all(|two| two[0].dims().1 == two[1].dims().1 && two[0].values.dtype() == two[1].values.dtype());
    if !alike {
        return Ok(weights);
    }
    let values: Vec<&Tensor> = own.iter().map(|weight| &weight.values).collect();
    let all = Tensor::cat(&values, 0)?;
    let mut first = 0;
    let part = |weight: &&CudaWeight| {
        let n = weight.dims().0;
        first += n;
        Ok(Weight::new(CudaWeight::new(Arc::clone(cuda), all.narrow(0, first - n, n)?)))
    };
    own.iter().map(part).collect()
}
