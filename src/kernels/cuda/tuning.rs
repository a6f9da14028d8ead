//! Tuning kernels for a GPU: the reference's, with products of our own whose gradients go to the input only.

use std::sync::Arc;

use candle_core::{CpuStorage, CudaStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};

use super::{
    module::Cuda,
    products::{self, Side, gemm, rounded},
    weight::CudaWeight,
};
use crate::kernels::{
    Activation, AttentionParams, Kernels, Tuning,
    cross::EncodedBatch,
    layout::BatchLayout,
    past::PastKeyValues,
    reference::tuning::ReferenceTuningKernels,
    weight::{FrozenWeight as _, Linear},
};

/// A tuning job on a GPU: it keeps nothing, since cuBLAS reads a matrix from either side.
#[derive(Debug)]
pub struct CudaTuning {
    cuda: Arc<Cuda>,
}

impl CudaTuning {
    pub fn new(cuda: Arc<Cuda>) -> Self {
        Self { cuda }
    }
}

impl Tuning for CudaTuning {
    fn kernels(
        &self,
        batch: &BatchLayout,
        past: Option<PastKeyValues>,
        encoded: Option<EncodedBatch>,
    ) -> Result<Box<dyn Kernels>> {
        let device = Device::Cuda(self.cuda.device.clone());
        let rest = ReferenceTuningKernels::new(batch, &device)?.with_past(past).with_encoded(encoded);
        Ok(Box::new(CudaTuningKernels { cuda: Arc::clone(&self.cuda), rest }))
    }
}

#[derive(Debug)]
struct CudaTuningKernels {
    cuda: Arc<Cuda>,
    /// Everything but products.
    rest: ReferenceTuningKernels,
}

impl Kernels for CudaTuningKernels {
    fn linear(&mut self, x: &Tensor, layers: &[&Linear], residual: Option<&Tensor>) -> Result<Vec<Tensor>> {
        if !x.track_op() && !residual.is_some_and(Tensor::track_op) {
            return products::linear(&self.cuda, x, None, layers, residual);
        }
        let one = |layer: &&Linear| {
            let mut y = differentiable(x, layer)?;
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

    fn gated_linear(&mut self, activation: Activation, gate: &Linear, up: &Linear, x: &Tensor) -> Result<Tensor> {
        activation.apply(&gate.forward(x, self)?)? * up.forward(x, self)?
    }

    fn rope(&mut self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        self.rest.rope(x, cos, sin)
    }

    fn attention(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        self.rest.attention(layer, q, k, v, params)
    }

    fn cross_attention(&mut self, layer: usize, q: &Tensor, params: &AttentionParams) -> Result<Tensor> {
        self.rest.cross_attention(layer, q, params)
    }
}

/// `x Wᵀ` of a layer with the gradient to `x` alone: what tuning computes with.
///
/// # Errors
/// The input does not fit, or the layer is of another backend.
fn differentiable(x: &Tensor, layer: &Linear) -> Result<Tensor> {
    let weight = CudaWeight::of(layer, x.dims2()?.1)?.clone();
    x.contiguous()?.apply_op1(FrozenProduct { weight, side: Side::Forward })
}

struct FrozenProduct {
    weight: CudaWeight,
    side: Side,
}

impl CustomOp1 for FrozenProduct {
    fn name(&self) -> &'static str {
        "frozen-product"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("a product with a weight on a GPU was given an input on the CPU")
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let cuda = self.weight.cuda();
        let (rows, _) = layout.shape().dims2()?;
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("rows that do not lie in order") };
        let mut values = cuda.uninitialised::<f32>(end - start)?;
        cuda.device.memcpy_dtod(&x.as_cuda_slice::<f32>()?.slice(start..end), &mut values)?;
        let x = cuda.tensor(values, layout.shape());
        let x = if self.weight.is_bf16() { rounded(cuda, &x)? } else { x };
        let (n, k) = self.weight.dims();
        let width = if self.side == Side::Forward { n } else { k };
        let out = cuda.uninitialised(rows * width)?;
        gemm(cuda, self.side, &x, &self.weight, n, &out, false)?;
        Ok((CudaStorage::wrap_cuda_slice(out, cuda.device.clone()), (rows, width).into()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let side = match self.side {
            Side::Forward => Side::Backward,
            Side::Backward => Side::Forward,
        };
        Ok(Some(grad.contiguous()?.apply_op1(Self { weight: self.weight.clone(), side })?))
    }
}
