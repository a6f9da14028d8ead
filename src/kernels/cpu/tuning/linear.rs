//! A linear layer with a residual as one operation, with its gradient by hand.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use crate::kernels::cpu::{
    Isa,
    frozen::{FrozenMatrix, Transposes},
    matmul::{Product, multiply},
    pool,
};
use crate::kernels::{
    host::{slice, with_values},
    weight::Linear,
};

/// `x Wᵀ + bias + residual`
pub struct Added {
    matrix: FrozenMatrix,
    bias: Option<Vec<f32>>,
    transposes: Transposes,
}

impl Added {
    /// # Errors
    /// The layer is of another backend.
    pub fn new(layer: &Linear, transposes: Transposes) -> Result<Self> {
        let bias = layer.bias.as_ref().map(|bias| bias.flatten_all()?.to_vec1()).transpose()?;
        Ok(Self { matrix: FrozenMatrix::of(layer)?.clone(), bias, transposes })
    }

    /// Of `x` `[rows, in]` and `residual` `[rows, out]`.
    ///
    /// # Errors
    /// A shape does not fit.
    pub fn forward(self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        x.contiguous()?.apply_op2(&residual.contiguous()?, self)
    }
}

impl CustomOp2 for Added {
    fn name(&self) -> &'static str {
        "tuning-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let rows = layout.shape().dims2()?.0;
        let weight = self.matrix.matrix();
        let residual = Some(slice(residual, residual_layout)?);
        let product = Product { weight, bias: self.bias.as_deref(), residual };
        let values = multiply(Isa::best(), pool::global(), slice(x, layout)?, rows, &[product]);
        Ok((CpuStorage::F32(values.into_iter().next().unwrap_or_default()), (rows, weight.n()).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _residual: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let rows = grad.dim(0)?;
        let values = with_values(grad, |grad| self.transposes.input_gradient(&self.matrix, grad, rows, None))?;
        Ok((Some(Tensor::from_vec(values, x.shape(), x.device())?), Some(grad.clone())))
    }
}
