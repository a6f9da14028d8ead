//! Named tensors out of safetensors or GGUF files, checked against what the decoder asks for.

use std::{collections::HashMap, sync::Arc};

use candle_core::{DType, Device, Shape, Tensor};
use safetensors::SafeTensors;

use super::{ModelError, ModelFiles, gguf::Gguf};
use crate::kernels::{
    quantized::BlockFormat,
    weight::{Blocks, Matrix},
};

/// Tensors by name, on the host. What the decoder asks for and does not find is collected, so that one error
/// lists all of it.
#[derive(Debug)]
pub struct Weights {
    tensors: HashMap<String, Tensor>,
    /// Where tensors are read from when they are asked for.
    gguf: Option<Arc<Gguf>>,
    faults: Vec<String>,
    dtype: DType,
    num_parameters: usize,
}

impl Weights {
    /// Reads every weights file, one at a time, and casts its tensors to `dtype`.
    ///
    /// Of a GGUF file, the tensors are read one by one as they are asked for.
    pub fn read(files: &ModelFiles, dtype: DType) -> Result<Self, ModelError> {
        if let Some(gguf) = files.as_gguf() {
            let num_parameters = gguf.tensors().map(|(_, shape)| shape.iter().product::<usize>()).sum();
            return Ok(Self {
                tensors: HashMap::new(),
                gguf: Some(Arc::clone(gguf)),
                faults: Vec::new(),
                dtype,
                num_parameters,
            });
        }
        let mut tensors = HashMap::new();
        for file in files.weight_files()? {
            let bytes = files.read(&file)?;
            let parsed = SafeTensors::deserialize(&bytes).map_err(|e| files.file_error(&file, e.to_string()))?;
            for (name, view) in parsed.iter() {
                let stored: DType = view
                    .dtype()
                    .try_into()
                    .map_err(|e: candle_core::Error| files.file_error(&file, format!("tensor {name}: {e}")))?;
                let tensor =
                    Tensor::from_raw_buffer(view.data(), stored, view.shape(), &Device::Cpu)?.to_dtype(dtype)?;
                tensors.insert(name.to_owned(), tensor);
            }
        }
        let num_parameters = tensors.values().map(Tensor::elem_count).sum();
        Ok(Self { tensors, gguf: None, faults: Vec::new(), dtype, num_parameters })
    }

    /// The number of values in all files.
    pub fn num_parameters(&self) -> usize {
        self.num_parameters
    }

    /// The type that all tensors have.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Whether a tensor of that name is there.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name) || self.gguf.as_ref().is_some_and(|gguf| gguf.has(name))
    }

    /// The shape of a tensor, if it is there.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match &self.gguf {
            Some(gguf) => gguf.shape(name),
            None => self.tensors.get(name).map(|tensor| tensor.dims().to_vec()),
        }
    }

    /// Takes a tensor out. One that is missing or of another shape is noted for
    /// [`finish`](Self::finish), and zeros stand in for it until then.
    pub fn take(&mut self, name: &str, shape: impl Into<Shape>) -> Result<Tensor, ModelError> {
        let shape = shape.into();
        match self.shape(name) {
            Some(found) if found == shape.dims() => {
                if let Some(tensor) = self.remove(name)? {
                    return Ok(tensor);
                }
            }
            Some(found) => self.faults.push(format!("{name} has shape {found:?}, expected {:?}", shape.dims())),
            None => self.faults.push(format!("{name} {:?} is missing", shape.dims())),
        }
        // One value, broadcast: a config.json with wrong sizes must not make us allocate them.
        Ok(Tensor::zeros(1, self.dtype, &Device::Cpu)?.broadcast_as(shape)?)
    }

    /// As [`take`](Self::take), a matrix `[n, k]`. The quantised blocks of a GGUF file stay as they are: the backend
    /// decides what to make of them.
    pub fn take_matrix(&mut self, name: &str, n: usize, k: usize) -> Result<Matrix, ModelError> {
        if let Some(gguf) = self.gguf.as_ref().filter(|gguf| gguf.shape(name).as_deref() == Some(&[n, k]))
            && let Some(blocks) = gguf.read(name)?
        {
            return Ok(match blocks.format {
                BlockFormat::F32 => Matrix::Values(
                    Tensor::from_vec(values_of(gguf, name, &blocks)?, (n, k), &Device::Cpu)?.to_dtype(self.dtype)?,
                ),
                _ => Matrix::Blocks(blocks),
            });
        }
        Ok(Matrix::Values(self.take(name, (n, k))?))
    }

    fn remove(&mut self, name: &str) -> Result<Option<Tensor>, ModelError> {
        let Some(gguf) = &self.gguf else { return Ok(self.tensors.remove(name)) };
        let Some(blocks) = gguf.read(name)? else { return Ok(None) };
        let values = values_of(gguf, name, &blocks)?;
        Ok(Some(Tensor::from_vec(values, blocks.shape, &Device::Cpu)?.to_dtype(self.dtype)?))
    }

    /// Fails with all faults at once. Tensors that nothing asked for are fine: files carry caches
    /// such as `rotary_emb.inv_freq`, and a tied `lm_head`.
    pub fn finish(self) -> Result<(), ModelError> {
        match self.faults.len() {
            0 => Ok(()),
            n => {
                let more = if n > 8 { format!(", and {} more", n - 8) } else { String::new() };
                Err(ModelError::Weights(format!("{}{more}", self.faults[..n.min(8)].join(", "))))
            }
        }
    }
}

fn values_of(gguf: &Gguf, name: &str, blocks: &Blocks) -> Result<Vec<f32>, ModelError> {
    blocks.values().map_err(|e| ModelError::File {
        model: gguf.name().to_owned(),
        file: format!("the tensor {name}"),
        reason: e.to_string(),
    })
}
