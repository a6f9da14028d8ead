//! Tensors times frozen matrices: what the model's layers call. Differentiable with respect to the
//! tensor, never to the matrix.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::{
    Isa, PackedMatrix, Precision,
    matmul::{Product, multiply, multiply_gated},
    pool,
    tensors::with_values,
};
use crate::kernels::Activation;

/// A packed matrix, and its transpose once a gradient has asked for it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct FrozenMatrix(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    matrix: PackedMatrix,
    transposed: OnceLock<PackedMatrix>,
}

impl FrozenMatrix {
    pub fn new(matrix: PackedMatrix) -> Self {
        Self(Arc::new(Inner { matrix, transposed: OnceLock::new() }))
    }

    /// The matrix.
    pub fn matrix(&self) -> &PackedMatrix {
        &self.0.matrix
    }

    /// `x Wᵀ + bias + residual`: `x` `[t, k]`, `bias` `[n]`, `residual` and the result `[t, n]`.
    /// Differentiable with respect to `x` and `residual`.
    pub fn forward(&self, x: &Tensor, bias: Option<&Tensor>, residual: Option<&Tensor>) -> Result<Tensor> {
        if x.track_op() || residual.is_some_and(|r| r.track_op()) {
            let mut y = x.contiguous()?.apply_op1(FrozenProduct(self.clone()))?;
            if let Some(bias) = bias {
                y = y.broadcast_add(bias)?;
            }
            return match residual {
                Some(residual) => residual + y,
                None => Ok(y),
            };
        }
        let [y] = Self::forward_all([(self, bias)], x, residual)?;
        Ok(y)
    }

    /// Several products of one `x`, each with its bias, in one go. Not differentiable.
    pub fn forward_all<const N: usize>(
        matrices: [(&Self, Option<&Tensor>); N],
        x: &Tensor,
        residual: Option<&Tensor>,
    ) -> Result<[Tensor; N]> {
        let (rows, k) = x.dims2()?;
        let mut biases: [Option<Vec<f32>>; N] = [const { None }; N];
        for ((matrix, bias), values) in matrices.iter().zip(&mut biases) {
            fits(matrix.matrix(), k)?;
            *values = bias.map(|b| with_values(b, |b| Ok(b.to_vec()))).transpose()?;
        }
        let run = |residual: Option<&[f32]>| {
            let products: Vec<_> = matrices
                .iter()
                .zip(&biases)
                .map(|((matrix, _), bias)| Product { weight: matrix.matrix(), bias: bias.as_deref(), residual })
                .collect();
            with_values(x, |x| Ok(multiply(Isa::best(), pool::global(), x, rows, &products)))
        };
        let results = match residual {
            Some(residual) => with_values(residual, |residual| run(Some(residual)))?,
            None => run(None)?,
        };
        let tensors: Vec<Tensor> = matrices
            .iter()
            .zip(results)
            .map(|((matrix, _), y)| Tensor::from_vec(y, (rows, matrix.matrix().n()), x.device()))
            .collect::<Result<_>>()?;
        tensors.try_into().map_err(|_| candle_core::Error::Msg("as many results as matrices".to_owned()))
    }

    /// `activation(x gateᵀ) * (x upᵀ)`. Not differentiable.
    pub fn forward_gated(gate: &Self, up: &Self, activation: Activation, x: &Tensor) -> Result<Tensor> {
        let (rows, k) = x.dims2()?;
        let (gate, up) = (gate.matrix(), up.matrix());
        fits(gate, k)?;
        fits(up, k)?;
        let y = with_values(x, |x| Ok(multiply_gated(Isa::best(), pool::global(), activation, x, rows, gate, up)))?;
        Tensor::from_vec(y, (rows, gate.n()), x.device())
    }

    fn transposed(&self) -> Result<&PackedMatrix> {
        if let Some(transposed) = self.0.transposed.get() {
            return Ok(transposed);
        }
        let matrix = self.matrix();
        let (n, k) = (matrix.n(), matrix.k());
        let mut values = vec![0f32; n * k];
        let mut row = vec![0f32; k];
        for i in 0..n {
            matrix.row(i, &mut row);
            values[i..].iter_mut().step_by(n).zip(&row).for_each(|(to, x)| *to = *x);
        }
        let packed = match matrix.precision() {
            Precision::F32 => PackedMatrix::from_f32(&values, k, n)?,
            Precision::Bf16 => PackedMatrix::from_f32_rounded(&values, k, n)?,
        };
        Ok(self.0.transposed.get_or_init(|| packed))
    }
}

fn fits(matrix: &PackedMatrix, k: usize) -> Result<()> {
    if matrix.k() != k {
        bail!("a linear layer of {} inputs was given {k}", matrix.k());
    }
    Ok(())
}

/// The product with a gradient: candle's own has one for both sides and computes both, and a frozen
/// weight's is as costly as the input's and thrown away.
struct FrozenProduct(FrozenMatrix);

impl CustomOp1 for FrozenProduct {
    fn name(&self) -> &'static str {
        "frozen-product"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, k) = layout.shape().dims2()?;
        let matrix = self.0.matrix();
        fits(matrix, k)?;
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("rows that do not lie in order") };
        let x = &x.as_slice::<f32>()?[start..end];
        let y = product(matrix, x, rows);
        Ok((CpuStorage::F32(y), (rows, matrix.n()).into()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let transposed = self.0.transposed()?;
        let rows = grad.dim(0)?;
        let values = with_values(grad, |grad| Ok(product(transposed, grad, rows)))?;
        Ok(Some(Tensor::from_vec(values, (rows, transposed.n()), grad.device())?))
    }
}

fn product(matrix: &PackedMatrix, x: &[f32], rows: usize) -> Vec<f32> {
    let product = Product { weight: matrix, bias: None, residual: None };
    multiply(Isa::best(), pool::global(), x, rows, &[product]).into_iter().next().unwrap_or_default()
}
