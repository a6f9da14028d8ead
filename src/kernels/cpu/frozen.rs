//! Tensors times frozen matrices: what the CPU's linear layers call. Differentiable with respect to the
//! tensor, never to the matrix.

use std::{
    any::Any,
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};

use super::{
    Isa, Operands, PackedMatrix,
    log_probabilities::log_probabilities,
    matmul::{Product, QuantisedMatrix, multiply, multiply_gated, multiply_mlp},
    pool,
};
use crate::kernels::{
    Activation,
    host::{with_array_of_values, with_values},
    weight::{FrozenWeight, Linear},
};

/// A packed matrix. Cheap to clone.
#[derive(Debug, Clone)]
pub struct FrozenMatrix(Arc<PackedMatrix>);

impl FrozenWeight for FrozenMatrix {
    fn dims(&self) -> (usize, usize) {
        (self.0.n(), self.0.k())
    }

    fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        let ids = ids.to_vec1::<u32>()?;
        let (n, k) = self.dims();
        let mut values = vec![0f32; ids.len() * k];
        for (&id, out) in ids.iter().zip(values.chunks_exact_mut(k)) {
            if id as usize >= n {
                bail!("token {id} is not in a vocabulary of {n}");
            }
            self.0.row(id as usize, out);
        }
        Tensor::from_vec(values, (ids.len(), k), &Device::Cpu)
    }

    fn to_tensor(&self) -> Result<Tensor> {
        let ids: Vec<u32> = (0..self.0.n() as u32).collect();
        self.rows(&Tensor::new(ids, &Device::Cpu)?)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl FrozenMatrix {
    pub fn new(matrix: PackedMatrix) -> Self {
        Self(Arc::new(matrix))
    }

    /// The matrix.
    pub fn matrix(&self) -> &PackedMatrix {
        &self.0
    }

    /// The matrix of a linear layer of a model on this backend.
    ///
    /// # Errors
    /// The layer is of another backend.
    pub fn of(layer: &Linear) -> Result<&Self> {
        layer.weight.downcast()
    }
}

/// Linear layers of one `x` `[t, k]`, `x Wᵀ + bias + residual` each, in one go. Not differentiable.
///
/// # Errors
/// A shape does not fit, or a layer is of another backend.
pub fn linear(x: &Tensor, layers: &[&Linear], residual: Option<&Tensor>) -> Result<Vec<Tensor>> {
    let (rows, k) = x.dims2()?;
    let mut matrices = Vec::with_capacity(layers.len());
    // Of each layer that has one; most models have none.
    let mut biases = Vec::new();
    for layer in layers {
        let matrix = FrozenMatrix::of(layer)?.matrix();
        fits(matrix, k)?;
        matrices.push(matrix);
        if let Some(bias) = &layer.bias {
            biases.push(with_values(bias, |bias| Ok(bias.to_vec()))?);
        }
    }
    let run = |x: &[f32], residual: Option<&[f32]>| {
        let mut biases = biases.iter();
        let mut products = Vec::with_capacity(layers.len());
        for (&weight, layer) in matrices.iter().zip(layers) {
            let bias = layer.bias.as_ref().and_then(|_| biases.next()).map(Vec::as_slice);
            products.push(Product { weight, bias, residual });
        }
        Ok(multiply(Isa::best(), pool::global(), x, rows, &products))
    };
    let results = match residual {
        Some(residual) => with_array_of_values([x, residual], |[x, residual]| run(x, Some(residual)))?,
        None => with_values(x, |x| run(x, None))?,
    };
    matrices.iter().zip(results).map(|(matrix, y)| Tensor::from_vec(y, (rows, matrix.n()), x.device())).collect()
}

/// Of each row of `x` `[t, k]`, the log-probabilities of ids; see [`Kernels::score`](crate::kernels::Kernels::score).
///
/// # Errors
/// As [`linear`].
pub fn score(x: &Tensor, head: &Linear, softcap: Option<f64>, ids: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
    let (rows, k) = x.dims2()?;
    let matrix = FrozenMatrix::of(head)?.matrix();
    fits(matrix, k)?;
    if ids.len() != rows {
        bail!("ids of {} rows were given for {rows} rows", ids.len());
    }
    let bias = head.bias.as_ref().map(|bias| with_values(bias, |bias| Ok(bias.to_vec()))).transpose()?;
    let (bias, softcap) = (bias.as_deref(), softcap.map(|cap| cap as f32));
    with_values(x, |x| Ok(log_probabilities(Isa::best(), pool::global(), x, matrix, bias, softcap, ids)))
}

/// `activation(x gateᵀ) * (x upᵀ)` of layers without a bias. Not differentiable.
///
/// # Errors
/// A shape does not fit, or a layer is of another backend.
pub fn gated_linear(activation: Activation, gate: &Linear, up: &Linear, x: &Tensor) -> Result<Tensor> {
    let (rows, k) = x.dims2()?;
    let (gate, up) = (FrozenMatrix::of(gate)?.matrix(), FrozenMatrix::of(up)?.matrix());
    fits(gate, k)?;
    fits(up, k)?;
    let y = with_values(x, |x| Ok(multiply_gated(Isa::best(), pool::global(), activation, x, rows, gate, up)))?;
    Tensor::from_vec(y, (rows, gate.n()), x.device())
}

/// A gated MLP of a gate and an up projection without a bias; see [`Kernels::gated_mlp`](crate::kernels::Kernels::gated_mlp).
/// Not differentiable.
///
/// # Errors
/// As [`linear`].
pub fn gated_mlp(
    activation: Activation,
    layers: [&Linear; 2],
    down: &Linear,
    x: &Tensor,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let (rows, k) = x.dims2()?;
    let [gate, up] = layers.map(FrozenMatrix::of);
    let (gate, up, weight) = (gate?.matrix(), up?.matrix(), FrozenMatrix::of(down)?.matrix());
    fits(gate, k)?;
    fits(up, k)?;
    fits(weight, gate.n())?;
    let bias = down.bias.as_ref().map(|bias| with_values(bias, |bias| Ok(bias.to_vec()))).transpose()?;
    let run = |x: &[f32], residual: Option<&[f32]>| {
        let down = Product { weight, bias: bias.as_deref(), residual };
        Ok(multiply_mlp(Isa::best(), pool::global(), activation, x, rows, [gate, up], down))
    };
    let y = match residual {
        Some(residual) => with_array_of_values([x, residual], |[x, residual]| run(x, Some(residual)))?,
        None => with_values(x, |x| run(x, None))?,
    };
    Tensor::from_vec(y, (rows, weight.n()), x.device())
}

/// Transposed copies of frozen matrices, which the gradient of a product reads. Each is made when a gradient first
/// asks for it. Quantised matrices need none: [`QuantisedMatrix`] multiplies with them as they are. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Transposes(Arc<Mutex<HashMap<usize, Transposed>>>);

/// A copy, and what it was made of, which keeps the address that it is found by.
#[derive(Debug, Clone)]
struct Transposed {
    _of: FrozenMatrix,
    matrix: Arc<PackedMatrix>,
}

impl Transposes {
    /// `x Wᵀ` of a layer `[t, k]`, differentiable with respect to `x`; without the layer's bias.
    ///
    /// The gradient is of the very weights of the product. Where the product rounds `x`, to bf16 or to integers, it passes
    /// straight through the rounding, as if there were none.
    ///
    /// # Errors
    /// A shape does not fit, or the layer is of another backend.
    pub fn product(&self, x: &Tensor, layer: &Linear) -> Result<Tensor> {
        let op = FrozenProduct { matrix: FrozenMatrix::of(layer)?.clone(), transposes: self.clone() };
        x.contiguous()?.apply_op1(op)
    }

    /// The gradient of `x` from that of `x Wᵀ`, `grad` `[rows, n]`, plus `residual` `[rows, k]`.
    ///
    /// # Errors
    /// There is no memory for what gradients are computed with.
    pub fn input_gradient(
        &self,
        matrix: &FrozenMatrix,
        grad: &[f32],
        rows: usize,
        residual: Option<&[f32]>,
    ) -> Result<Vec<f32>> {
        if let Some(quantised) = QuantisedMatrix::of(matrix.matrix()) {
            let mut values = quantised.multiply(Isa::best(), pool::global(), grad, rows);
            values.iter_mut().zip(residual.unwrap_or_default()).for_each(|(value, residual)| *value += residual);
            return Ok(values);
        }
        let transposed = self.of(matrix)?;
        let product = Product { weight: &transposed, bias: None, residual };
        let products = multiply(Isa::best(), pool::global(), grad, rows, &[product]);
        Ok(products.into_iter().next().unwrap_or_default())
    }

    fn of(&self, frozen: &FrozenMatrix) -> Result<Arc<PackedMatrix>> {
        let key = Arc::as_ptr(&frozen.0) as usize;
        // Held while a copy is made: nobody else may make the same one.
        let mut copies = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(copy) = copies.get(&key) {
            return Ok(Arc::clone(&copy.matrix));
        }
        let matrix = Arc::new(transposed(frozen.matrix())?);
        copies.insert(key, Transposed { _of: frozen.clone(), matrix: Arc::clone(&matrix) });
        Ok(matrix)
    }
}

fn transposed(matrix: &PackedMatrix) -> Result<PackedMatrix> {
    let (n, k) = (matrix.n(), matrix.k());
    let mut values = vec![0f32; n * k];
    let mut row = vec![0f32; k];
    for i in 0..n {
        matrix.row(i, &mut row);
        values[i..].iter_mut().step_by(n).zip(&row).for_each(|(to, x)| *to = *x);
    }
    Ok(match matrix.operands() {
        Operands::F32 | Operands::Int8 => PackedMatrix::from_f32(&values, k, n)?,
        Operands::Bf16 => PackedMatrix::from_f32_rounded(&values, k, n)?,
    })
}

fn fits(matrix: &PackedMatrix, k: usize) -> Result<()> {
    if matrix.k() != k {
        bail!("a linear layer of {} inputs was given {k}", matrix.k());
    }
    Ok(())
}

/// The product with a gradient: candle's own has one for both sides and computes both, and a frozen
/// weight's is as costly as the input's and thrown away.
struct FrozenProduct {
    matrix: FrozenMatrix,
    transposes: Transposes,
}

impl CustomOp1 for FrozenProduct {
    fn name(&self) -> &'static str {
        "frozen-product"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, k) = layout.shape().dims2()?;
        let matrix = self.matrix.matrix();
        fits(matrix, k)?;
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("rows that do not lie in order") };
        let x = &x.as_slice::<f32>()?[start..end];
        let y = product(matrix, x, rows);
        Ok((CpuStorage::F32(y), (rows, matrix.n()).into()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let rows = grad.dim(0)?;
        let values = with_values(grad, |grad| self.transposes.input_gradient(&self.matrix, grad, rows, None))?;
        Ok(Some(Tensor::from_vec(values, (rows, self.matrix.matrix().k()), grad.device())?))
    }
}

fn product(matrix: &PackedMatrix, x: &[f32], rows: usize) -> Vec<f32> {
    let product = Product { weight: matrix, bias: None, residual: None };
    multiply(Isa::best(), pool::global(), x, rows, &[product]).into_iter().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::*;
    use crate::kernels::{
        Backend as _, QuantisedProducts,
        cpu::CpuBackend,
        quantized::{BlockFormat, tests::modest_blocks},
        weight::{Blocks, Matrix},
    };

    #[test]
    fn frozen_products_and_their_input_gradients_equal_candles_own() {
        let device = Device::Cpu;
        let weight = Tensor::randn(0f32, 1.0, (7, 5), &device).unwrap();
        let x = Var::randn(0f32, 1.0, (3, 5), &device).unwrap();
        let scale = Tensor::randn(0f32, 1.0, (3, 7), &device).unwrap();
        let plain = x.as_tensor().matmul(&weight.t().unwrap()).unwrap();
        let grad = |y: &Tensor| {
            let grads = (y * &scale).unwrap().sum_all().unwrap().backward().unwrap();
            grads.get(x.as_tensor()).expect("a gradient to the input").to_vec2::<f32>().unwrap()
        };
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 0.1)] {
            let weight = CpuBackend::new().weight(Matrix::Values(weight.clone()), dtype).unwrap();
            let layer = Linear { name: "layer".to_owned(), weight, bias: None };
            let transposes = Transposes::default();
            let ours = transposes.product(x.as_tensor(), &layer).unwrap();
            let close = |a: Vec<Vec<f32>>, b: Vec<Vec<f32>>| {
                for (a, b) in a.iter().flatten().zip(b.iter().flatten()) {
                    assert!((a - b).abs() < tolerance, "{a} {b}");
                }
            };
            close(ours.to_vec2().unwrap(), plain.to_vec2().unwrap());
            close(grad(&ours), grad(&plain));
            assert_eq!(transposes.0.lock().unwrap().len(), 1);
            grad(&transposes.product(x.as_tensor(), &layer).unwrap());
            assert_eq!(transposes.0.lock().unwrap().len(), 1, "one copy of each matrix");
        }
    }

    #[test]
    fn input_gradients_of_quantised_matrices_are_of_their_values_and_make_no_copy() {
        let (format, n, k, rows) = (BlockFormat::Q4_1, 37, 64, 5);
        let bytes = modest_blocks(format, n, k, 4);
        let mut values = vec![0f32; n * k];
        format.dequantize(&bytes, &mut values);
        let values = Tensor::from_vec(values, (n, k), &Device::Cpu).unwrap();
        let x = Var::randn(0f32, 1.0, (rows, k), &Device::Cpu).unwrap();
        let scale = Tensor::randn(0f32, 1.0, (rows, n), &Device::Cpu).unwrap();
        let expected = scale.matmul(&values).unwrap().to_vec2::<f32>().unwrap();
        for quantised in [QuantisedProducts::Exact, QuantisedProducts::Integers] {
            let blocks = Blocks { format, bytes: bytes.clone().into(), shape: vec![n, k] };
            let backend = CpuBackend::new().with_quantised(quantised);
            let weight = backend.weight(Matrix::Blocks(blocks), DType::F32).unwrap();
            let layer = Linear { name: "layer".to_owned(), weight, bias: None };
            let transposes = Transposes::default();
            let y = transposes.product(x.as_tensor(), &layer).unwrap();
            let grads = (y * &scale).unwrap().sum_all().unwrap().backward().unwrap();
            let found = grads.get(x.as_tensor()).unwrap().to_vec2::<f32>().unwrap();
            for (a, b) in found.iter().flatten().zip(expected.iter().flatten()) {
                assert!((a - b).abs() < 1e-4, "{quantised:?}: {a} {b}");
            }
            assert!(transposes.0.lock().unwrap().is_empty(), "{quantised:?}");
        }
    }
}
