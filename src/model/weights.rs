//! Named tensors out of safetensors files, checked against what the decoder asks for.

use std::collections::HashMap;

use candle_core::{DType, Device, Shape, Tensor};
use safetensors::SafeTensors;

use super::{ModelError, ModelFiles};

/// Tensors by name. What the decoder asks for and does not find is collected, so that one error
/// lists all of it.
#[derive(Debug)]
pub struct Weights {
    tensors: HashMap<String, Tensor>,
    faults: Vec<String>,
    device: Device,
    dtype: DType,
    num_parameters: usize,
}

impl Weights {
    /// Reads every weights file, one at a time, and casts its tensors to `dtype` on `device`.
    pub fn read(files: &ModelFiles, device: &Device, dtype: DType) -> Result<Self, ModelError> {
        let mut tensors = HashMap::new();
        for file in files.weight_files()? {
            let bytes = files.read(&file)?;
            let parsed = SafeTensors::deserialize(&bytes).map_err(|e| files.file_error(&file, e.to_string()))?;
            for (name, view) in parsed.iter() {
                let stored: DType = view
                    .dtype()
                    .try_into()
                    .map_err(|e: candle_core::Error| files.file_error(&file, format!("tensor {name}: {e}")))?;
                let tensor = Tensor::from_raw_buffer(view.data(), stored, view.shape(), &Device::Cpu)?
                    .to_dtype(dtype)?
                    .to_device(device)?;
                tensors.insert(name.to_owned(), tensor);
            }
        }
        let num_parameters = tensors.values().map(Tensor::elem_count).sum();
        Ok(Self { tensors, faults: Vec::new(), device: device.clone(), dtype, num_parameters })
    }

    /// The number of values in all files.
    pub fn num_parameters(&self) -> usize {
        self.num_parameters
    }

    /// The type that all tensors have.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where all tensors are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether a tensor of that name is there.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Takes a tensor out. One that is missing or of another shape is noted for
    /// [`finish`](Self::finish), and zeros stand in for it until then.
    pub fn take(&mut self, name: &str, shape: impl Into<Shape>) -> Result<Tensor, ModelError> {
        let shape = shape.into();
        match self.tensors.remove(name) {
            Some(tensor) if *tensor.shape() == shape => return Ok(tensor),
            Some(tensor) => {
                self.faults.push(format!("{name} has shape {:?}, expected {:?}", tensor.dims(), shape.dims()));
            }
            None => self.faults.push(format!("{name} {:?} is missing", shape.dims())),
        }
        // One value, broadcast: a config.json with wrong sizes must not make us allocate them.
        Ok(Tensor::zeros(1, self.dtype, &self.device)?.broadcast_as(shape)?)
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
