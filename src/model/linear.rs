//! A frozen matrix: the product with it, and the gradient to its input only.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, backend::BackendStorage, bail};

/// `y = x Wᵀ + b` with a weight that is never trained.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// `weight` is `[out, in]`, `bias` `[out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// The weight, and the bias if there is one.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        std::iter::once(&self.weight).chain(&self.bias)
    }

    /// `[t, in]` to `[t, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = if x.track_op() && x.device().is_cpu() {
            x.contiguous()?.apply_op1(FrozenMatmul { weight: self.weight.clone() })?
        } else {
            x.matmul(&self.weight.t()?)?
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// candle's matmul has a gradient for both sides and computes both; a frozen weight's is as costly
/// as the input's and thrown away. This one has the input's only.
struct FrozenMatmul {
    weight: Tensor,
}

impl CustomOp1 for FrozenMatmul {
    fn name(&self) -> &'static str {
        "frozen-matmul"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, inner) = layout.shape().dims2()?;
        let (outer, width) = self.weight.dims2()?;
        if inner != width {
            bail!("a linear layer of {width} inputs was given {inner}");
        }
        let transposed = self.weight.t()?;
        let (storage, weight_layout) = transposed.storage_and_layout();
        let Storage::Cpu(weight) = &*storage else { bail!("the frozen weight is not on the CPU") };
        let y = x.matmul(weight, (1, rows, outer, inner), layout, weight_layout)?;
        Ok((y, (rows, outer).into()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.contiguous()?.matmul(&self.weight)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn the_frozen_product_and_its_input_gradient_equal_candles_own() {
        let device = Device::Cpu;
        let weight = Tensor::randn(0f32, 1.0, (7, 5), &device).unwrap();
        let x = Var::randn(0f32, 1.0, (3, 5), &device).unwrap();
        let scale = Tensor::randn(0f32, 1.0, (3, 7), &device).unwrap();
        let ours = Linear::new(weight.clone(), None).forward(x.as_tensor()).unwrap();
        let plain = x.as_tensor().matmul(&weight.t().unwrap()).unwrap();
        let grad = |y: &Tensor| {
            let grads = (y * &scale).unwrap().sum_all().unwrap().backward().unwrap();
            grads.get(x.as_tensor()).expect("a gradient to the input").to_vec2::<f32>().unwrap()
        };
        assert_eq!(ours.to_vec2::<f32>().unwrap(), plain.to_vec2::<f32>().unwrap());
        for (a, b) in grad(&ours).iter().flatten().zip(grad(&plain).iter().flatten()) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
    }
}
