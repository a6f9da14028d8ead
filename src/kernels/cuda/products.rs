//! Products with frozen matrices: cuBLAS for many rows, our own kernels for up to four.

use candle_core::{DType, Result, Tensor, bail, cuda::cudarc::cublas};
use cudarc::driver::{CudaSlice, DeviceRepr};
use half::bf16;

use super::{
    module::{Cuda, ELEMENT_THREADS, element_grid, plain},
    weight::{CudaWeight, adjacent},
};
use crate::kernels::{
    Activation,
    weight::{FrozenWeight as _, Linear},
};

/// Rows up to which a product is made by our own kernels.
pub const FEW_ROWS: usize = 4;
/// Threads of a block of those; see `cu/products.cu`.
const PRODUCT_THREADS: usize = 128;
const PRODUCT_SHARED_BYTES: usize = 16;

/// `x` in bf16, in order.
///
/// # Errors
/// There is no memory.
pub fn rounded(cuda: &Cuda, x: &Tensor) -> Result<Tensor> {
    if x.dtype() == DType::BF16 {
        return x.contiguous();
    }
    let x = plain(x)?;
    let out = cuda.uninitialised::<bf16>(x.elem_count())?;
    let (from, to, count) = (cuda.address::<f32>(&x)?, cuda.address_of(&out), x.elem_count());
    // SAFETY: both have `count` values, of f32 and of bf16.
    unsafe {
        let launch = cuda.launch(&cuda.functions.round_to_bf16).arg(&from).arg(&to).arg(&count);
        launch.run(element_grid(count), ELEMENT_THREADS, 0)?;
    }
    Ok(cuda.tensor(out, x.shape()))
}

/// The parameter of the kernel `multiply`; see `cu/products.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct MatrixParam {
    weight: u64,
    bias: u64,
    residual: u64,
    out: u64,
    n: i32,
}

// SAFETY: plain numbers, in the order and sizes of the kernel's structure.
unsafe impl DeviceRepr for MatrixParam {}

/// Linear layers of one `x` `[t, k]`, which is f32 or bf16: `x Wᵀ + bias + residual` each. `rounded_x` is `x` in bf16, if
/// there is such a copy already. Not differentiable.
///
/// # Errors
/// A shape does not fit, or a layer is of another backend.
pub fn linear(
    cuda: &Cuda,
    x: &Tensor,
    rounded_x: Option<&Tensor>,
    layers: &[&Linear],
    residual: Option<&Tensor>,
) -> Result<Vec<Tensor>> {
    let (rows, k) = x.dims2()?;
    let weights = layers.iter().map(|layer| CudaWeight::of(layer, k)).collect::<Result<Vec<_>>>()?;
    let residual = residual.map(plain).transpose()?;
    for weight in &weights {
        if let Some(residual) = residual.as_ref().filter(|r| r.dims() != [rows, weight.dims().0]) {
            bail!("a residual {:?} does not fit a product of {rows} rows and {}", residual.dims(), weight.dims().0);
        }
    }
    let all_bf16 = weights.iter().all(|weight| weight.is_bf16());
    let x = match rounded_x {
        Some(rounded) if all_bf16 => rounded.clone(),
        _ if all_bf16 => rounded(cuda, x)?,
        _ => plain(x)?,
    };
    let mut biases = Vec::with_capacity(layers.len());
    for layer in layers {
        biases.push(layer.bias.as_ref().map(plain).transpose()?);
    }
    if all_bf16 && rows <= FEW_ROWS && k.is_multiple_of(8) && (1..=3).contains(&layers.len()) {
        return multiply(cuda, &x, &weights, &biases, residual.as_ref());
    }
    let mut results = Vec::with_capacity(layers.len());
    for group in adjacent(&weights)? {
        let total: usize = group.clone().map(|i| weights[i].dims().0).sum();
        let (out, adds) = match &residual {
            Some(residual) if group.len() == 1 => (copy(cuda, residual)?, true),
            Some(_) => bail!("a residual is added to the product of one matrix"),
            None => (cuda.uninitialised(rows * total)?, false),
        };
        let first = weights[group.start];
        let x = if first.is_bf16() { rounded(cuda, &x)? } else { plain(&x)? };
        gemm(cuda, Side::Forward, &x, first, total, &out, adds)?;
        let mut column = 0;
        for i in group.clone() {
            let n = weights[i].dims().0;
            if let Some(bias) = &biases[i] {
                let to = cuda.address_of(&out) + (column * size_of::<f32>()) as u64;
                let (bias, count, width, stride) = (cuda.address::<f32>(bias)?, rows * n, n as i32, total as i32);
                let launch =
                    cuda.launch(&cuda.functions.add_bias).arg(&to).arg(&bias).arg(&count).arg(&width).arg(&stride);
                // SAFETY: the layer's columns of every row, of which there are `width`, are within the result, and its bias
                // is as wide.
                unsafe { launch.run(element_grid(count), ELEMENT_THREADS, 0)? };
            }
            column += n;
        }
        let all = cuda.tensor(out, (rows, total));
        column = 0;
        for i in group {
            let n = weights[i].dims().0;
            results.push(if n == total { all.clone() } else { all.narrow(1, column, n)? });
            column += n;
        }
    }
    Ok(results)
}

/// `activation(gate(x)) * up(x)`, in bf16 where the weights are. Not differentiable.
///
/// # Errors
/// As [`linear`].
pub fn gated_linear(
    cuda: &Cuda,
    activation: Activation,
    gate: &Linear,
    up: &Linear,
    x: &Tensor,
    rounded_x: Option<&Tensor>,
) -> Result<Tensor> {
    let (rows, k) = x.dims2()?;
    let (gate_weight, up_weight) = (CudaWeight::of(gate, k)?, CudaWeight::of(up, k)?);
    let (n, is_bf16, activation) =
        (gate_weight.dims().0, gate_weight.is_bf16() && up_weight.is_bf16(), activation_number(activation));
    if up_weight.dims().0 != n {
        bail!("a gate of {n} and a linear layer of {} beside it", up_weight.dims().0);
    }
    let count = rows * n;
    let f = &cuda.functions;
    let few = rows > 0 && rows <= FEW_ROWS && k.is_multiple_of(8) && gate.bias.is_none() && up.bias.is_none();
    if is_bf16 && few {
        let x = rounded_x.map_or_else(|| rounded(cuda, x), |x| Ok(x.clone()))?;
        let out = cuda.uninitialised::<bf16>(count)?;
        let function = [&f.multiply_gated_1, &f.multiply_gated_2, &f.multiply_gated_3, &f.multiply_gated_4][rows - 1];
        let (from, k, to, n) = (cuda.address::<bf16>(&x)?, k as i32, cuda.address_of(&out), n as i32);
        let (gate, up) = (gate_weight.address()?, up_weight.address()?);
        // SAFETY: x has the function's number of rows of k values, both matrices n of them, and the result rows of n.
        unsafe {
            let launch = cuda.launch(function).arg(&from).arg(&k).arg(&gate).arg(&up).arg(&to).arg(&n).arg(&activation);
            launch.run([blocks(rows, n as usize), 1, 1], PRODUCT_THREADS, PRODUCT_SHARED_BYTES)?;
        }
        return Ok(cuda.tensor(out, (rows, n as usize)));
    }
    let both = linear(cuda, x, rounded_x, &[gate, up], None)?;
    let ((gate, stride), (up, up_stride)) = (cuda.rows_of::<f32>(&both[0])?, cuda.rows_of::<f32>(&both[1])?);
    if stride != up_stride {
        bail!("rows of a gate begin every {stride} values and those beside it every {up_stride}");
    }
    let (width, stride) = (n as i32, stride as i32);
    // SAFETY: gate and up have rows of `width` values, which begin every `stride`, and the result as many values; the
    // function is that of the result's type.
    let run = |function, to: u64| unsafe {
        let launch = cuda.launch(function).arg(&gate).arg(&up).arg(&to).arg(&count).arg(&width).arg(&stride);
        launch.arg(&activation).run(element_grid(count), ELEMENT_THREADS, 0)
    };
    if is_bf16 {
        let out = cuda.uninitialised::<bf16>(count)?;
        run(&f.gate_up_bf16, cuda.address_of(&out))?;
        Ok(cuda.tensor(out, (rows, n)))
    } else {
        let out = cuda.uninitialised::<f32>(count)?;
        run(&f.gate_up_f32, cuda.address_of(&out))?;
        Ok(cuda.tensor(out, (rows, n)))
    }
}

/// The number that the kernels know an activation function by.
pub fn activation_number(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
        Activation::Relu => 3,
    }
}

/// Blocks for so many columns, or pairs of them: for one row each has a block, for more a warp.
fn blocks(rows: usize, units: usize) -> usize {
    if rows == 1 { units } else { units.div_ceil(PRODUCT_THREADS / 32) }
}

/// Up to four rows of `x` in bf16 by up to three matrices in bf16, in one launch.
fn multiply(
    cuda: &Cuda,
    x: &Tensor,
    weights: &[&CudaWeight],
    biases: &[Option<Tensor>],
    residual: Option<&Tensor>,
) -> Result<Vec<Tensor>> {
    let (rows, k) = x.dims2()?;
    if rows == 0 {
        return weights.iter().map(|w| Tensor::zeros((0, w.dims().0), DType::F32, x.device())).collect();
    }
    let mut params = [MatrixParam::default(); 3];
    let mut outs = Vec::with_capacity(weights.len());
    // Columns, or pairs of columns of one matrix.
    let mut units = 0;
    for ((param, weight), bias) in params.iter_mut().zip(weights).zip(biases) {
        let n = weight.dims().0;
        let out = cuda.uninitialised::<f32>(rows * n)?;
        *param = MatrixParam {
            weight: weight.address()?,
            bias: cuda.address_or_null::<f32>(bias.as_ref())?,
            residual: cuda.address_or_null::<f32>(residual)?,
            out: cuda.address_of(&out),
            n: n as i32,
        };
        outs.push((out, n));
        units += if rows == 1 { n } else { n.div_ceil(2) };
    }
    let f = &cuda.functions;
    let function = [&f.multiply_1, &f.multiply_2, &f.multiply_3, &f.multiply_4][rows - 1];
    let (from, k) = (cuda.address::<bf16>(x)?, k as i32);
    let [first, second, third] = &params;
    // SAFETY: x has the function's number of rows of k values; each matrix has n rows of k, its bias n values, its
    // residual and its result rows of n. A matrix that is not there has no columns.
    unsafe {
        let launch = cuda.launch(function).arg(&from).arg(&k).arg(first).arg(second).arg(third);
        launch.run([blocks(rows, units), 1, 1], PRODUCT_THREADS, PRODUCT_SHARED_BYTES)?;
    }
    Ok(outs.into_iter().map(|(out, n)| cuda.tensor(out, (rows, n))).collect())
}

fn copy(cuda: &Cuda, x: &Tensor) -> Result<CudaSlice<f32>> {
    let mut out = cuda.uninitialised::<f32>(x.elem_count())?;
    let (storage, layout) = x.storage_and_layout();
    let candle_core::Storage::Cuda(storage) = &*storage else { bail!("a residual that is not on the device") };
    let values = storage.as_cuda_slice::<f32>()?;
    let from = values.slice(layout.start_offset()..layout.start_offset() + x.elem_count());
    cuda.device.memcpy_dtod(&from, &mut out)?;
    Ok(out)
}

/// Which product with a matrix `W` `[n, k]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `x Wᵀ`, `[t, k]` to `[t, n]`.
    Forward,
    /// `g W`, `[t, n]` to `[t, k]`: the gradient of the input.
    Backward,
}

/// A product by cuBLAS: `x` is in the weight's type, the result and all sums in f32. It is added to `out` if `adds`.
///
/// Forward, `n` is the columns of the result: the rows of the weight and of those that lie right after it.
pub fn gemm(
    cuda: &Cuda,
    side: Side,
    x: &Tensor,
    weight: &CudaWeight,
    n: usize,
    out: &CudaSlice<f32>,
    adds: bool,
) -> Result<()> {
    use cublas::sys::{cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType};

    let (rows, k) = (x.dim(0)?, weight.dims().1);
    if rows == 0 || n == 0 || k == 0 {
        return Ok(());
    }
    let (operation, width, inner) = match side {
        Side::Forward => (cublasOperation_t::CUBLAS_OP_T, n, k),
        Side::Backward => (cublasOperation_t::CUBLAS_OP_N, k, n),
    };
    let (dtype, from) = match weight.is_bf16() {
        true => (cudaDataType::CUDA_R_16BF, cuda.address::<bf16>(x)?),
        false => (cudaDataType::CUDA_R_32F, cuda.address::<f32>(x)?),
    };
    let (one, beta) = (1f32, if adds { 1f32 } else { 0.0 });
    let blas = cuda.device.cublas_handle();
    // SAFETY: cuBLAS reads matrices by columns. In its eyes the row-major W is [k, n], x is [inner, rows] and the result
    // [width, rows], all without gaps; the scalars are f32 on the host, as the handle's mode and the compute type say.
    unsafe {
        cublas::result::gemm_ex(
            *blas.handle(),
            operation,
            cublasOperation_t::CUBLAS_OP_N,
            width as i32,
            rows as i32,
            inner as i32,
            (&raw const one).cast(),
            weight.address()? as *const _,
            dtype,
            k as i32,
            from as *const _,
            dtype,
            inner as i32,
            (&raw const beta).cast(),
            cuda.address_of(out) as *mut _,
            cudaDataType::CUDA_R_32F,
            width as i32,
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .map_err(|error| candle_core::Error::Msg(format!("cuBLAS: {error}")))
}
