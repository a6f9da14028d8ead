//! Products with frozen matrices, with the gradient to their input only.

use std::any::Any;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Layout, MetalStorage, Result, Shape, Storage, Tensor,
    backend::BackendStorage, bail,
};

use crate::kernels::{
    Kernels,
    weight::{FrozenWeight, Linear},
    widened,
};

/// A matrix `[n, k]` in the type of the weights, on the device.
#[derive(Debug)]
pub struct ReferenceWeight(Tensor);

impl ReferenceWeight {
    pub fn new(weight: Tensor) -> Self {
        Self(weight)
    }
}

impl FrozenWeight for ReferenceWeight {
    fn dims(&self) -> (usize, usize) {
        (self.0.dims()[0], self.0.dims()[1])
    }

    fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        // Devices other than the CPU do not check.
        let n = self.dims().0;
        if let Some(id) = ids.to_vec1::<u32>()?.iter().find(|&&id| id as usize >= n) {
            bail!("token {id} is not in a vocabulary of {n}");
        }
        self.0.index_select(&ids.to_device(self.0.device())?, 0)?.to_dtype(widened(self.0.dtype()))
    }

    fn to_tensor(&self) -> Result<Tensor> {
        Ok(self.0.clone())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// See [`Kernels::linear`]. With a weight in bf16 the input is rounded to bf16 and the sums run in f32, as tensor cores
/// and the CPU backend do. A layer of another backend is multiplied by what its weight is as a tensor.
pub fn linear(x: &Tensor, layers: &[&Linear], residual: Option<&Tensor>) -> Result<Vec<Tensor>> {
    let one = |layer: &&Linear| {
        let weight = layer.weight.to_tensor()?;
        let x = match weight.dtype() {
            DType::BF16 => x.to_dtype(DType::BF16)?.to_dtype(x.dtype())?,
            _ => x.clone(),
        };
        let mut y = x.contiguous()?.apply_op1(FrozenMatmul { weight })?;
        if let Some(bias) = &layer.bias {
            y = y.broadcast_add(bias)?;
        }
        match residual {
            Some(residual) => residual + y,
            None => Ok(y),
        }
    };
    layers.iter().map(one).collect()
}

/// See [`Kernels::gated_linear`].
pub fn gated_linear(
    kernels: &mut dyn Kernels,
    activation: crate::kernels::Activation,
    gate: &Linear,
    up: &Linear,
    x: &Tensor,
) -> Result<Tensor> {
    activation.apply(&gate.forward(x, kernels)?)? * up.forward(x, kernels)?
}

/// `x Wᵀ`. candle's own matmul has a gradient for both sides and computes both; a frozen weight's is as costly as the
/// input's and would be thrown away. This one has the input's only, on every device.
struct FrozenMatmul {
    /// `[n, k]`
    weight: Tensor,
}

impl FrozenMatmul {
    /// The weight in the type of `x`.
    fn weight_as(&self, dtype: DType) -> Result<Tensor> {
        self.weight.to_dtype(dtype)?.contiguous()
    }

    /// The product, by the storage of a device; `own` takes the weight's storage as that device's.
    fn product<S: BackendStorage>(
        &self,
        x: &S,
        layout: &Layout,
        own: impl Fn(&Storage) -> Option<&S>,
    ) -> Result<(S, Shape)> {
        let (rows, inner) = layout.shape().dims2()?;
        let (outer, width) = self.weight.dims2()?;
        if inner != width {
            bail!("a linear layer of {width} inputs was given {inner}");
        }
        let transposed = self.weight_as(x.dtype())?.t()?;
        let (storage, weight_layout) = transposed.storage_and_layout();
        let Some(weight) = own(&storage) else { bail!("the input and the frozen weight are on different devices") };
        let y = x.matmul(weight, (1, rows, outer, inner), layout, weight_layout)?;
        Ok((y, (rows, outer).into()))
    }
}

impl CustomOp1 for FrozenMatmul {
    fn name(&self) -> &'static str {
        "frozen-matmul"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.product(x, layout, |storage| match storage {
            Storage::Cpu(own) => Some(own),
            _ => None,
        })
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.product(x, layout, |storage| match storage {
            Storage::Cuda(own) => Some(own),
            _ => None,
        })
    }

    fn metal_fwd(&self, x: &MetalStorage, layout: &Layout) -> Result<(MetalStorage, Shape)> {
        self.product(x, layout, |storage| match storage {
            Storage::Metal(own) => Some(own),
            _ => None,
        })
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.contiguous()?.matmul(&self.weight_as(grad.dtype())?)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::kernels::weight::Weight;

    #[test]
    fn frozen_products_and_their_input_gradients_equal_candles_own() {
        let device = Device::Cpu;
        let weight = Tensor::randn(0f32, 1.0, (7, 5), &device).unwrap();
        let x = Var::randn(0f32, 1.0, (3, 5), &device).unwrap();
        let scale = Tensor::randn(0f32, 1.0, (3, 7), &device).unwrap();
        let gradient = |y: &Tensor| {
            let gradients = (y * &scale).unwrap().sum_all().unwrap().backward().unwrap();
            gradients.get(x.as_tensor()).expect("a gradient to the input").to_vec2::<f32>().unwrap()
        };
        let plain = x.as_tensor().matmul(&weight.t().unwrap()).unwrap();
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 1e-2), (DType::BF16, 0.1)] {
            let weight = Weight::new(ReferenceWeight::new(weight.to_dtype(dtype).unwrap()));
            let layer = Linear { name: "layer".to_owned(), weight, bias: None };
            let ours = linear(x.as_tensor(), &[&layer], None).unwrap().remove(0);
            let close = |a: Vec<Vec<f32>>, b: Vec<Vec<f32>>| {
                for (a, b) in a.iter().flatten().zip(b.iter().flatten()) {
                    assert!((a - b).abs() < tolerance, "{dtype:?}: {a} {b}");
                }
            };
            close(ours.to_vec2().unwrap(), plain.to_vec2().unwrap());
            close(gradient(&ours), gradient(&plain));
        }
    }

    #[test]
    fn an_input_that_does_not_fit_is_an_error() {
        let weight = Tensor::zeros((7, 5), DType::F32, &Device::Cpu).unwrap();
        let layer = Linear { name: "layer".to_owned(), weight: Weight::new(ReferenceWeight::new(weight)), bias: None };
        let x = Tensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap();
        let error = linear(&x, &[&layer], None).unwrap_err().to_string();
        assert!(error.contains("5 inputs was given 4"), "{error}");
    }
}
