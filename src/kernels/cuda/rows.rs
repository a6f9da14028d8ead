//! Norms, alone and of sums, choices of rows, rotary embedding and activations: kernels of `cu/rows.cu`.

use candle_core::{DType, Result, Tensor, bail};
use half::bf16;

use super::{
    module::{Cuda, ELEMENT_THREADS, element_grid, plain, threads_for},
    products::activation_number,
};
use crate::kernels::{
    Activation,
    norm::{Norm, NormKind},
};

/// Bytes of shared memory of a kernel that adds up a row.
const SUM_BYTES: usize = 32 * size_of::<f32>();

/// What a norm gives: in f32, and in bf16 for products with weights in bf16 where that was asked for.
#[derive(Debug)]
pub struct Normed {
    pub values: Tensor,
    pub rounded: Option<Tensor>,
}

/// A norm of every row of `x`. `rounds` asks for the copy in bf16.
///
/// # Errors
/// The norm is of another width, or there is no memory.
pub fn norm(cuda: &Cuda, x: &Tensor, norm: &Norm, rounds: bool) -> Result<Normed> {
    let x = plain(x)?;
    let (rows, width) = rows_and_width(&x);
    let (weight, bias) = weights(norm, width)?;
    let out = cuda.uninitialised::<f32>(x.elem_count())?;
    let rounded = copy_in_bf16(cuda, &x, rounds)?;
    let (from, weight, to) = (cuda.address::<f32>(&x)?, cuda.address::<f32>(&weight)?, cuda.address_of(&out));
    let (bias, copy) = (cuda.address_or_null::<f32>(bias.as_ref())?, cuda.address_or_null::<bf16>(rounded.as_ref())?);
    let (n, eps) = (width as i32, norm.eps as f32);
    let launch = match norm.kind {
        NormKind::Rms => cuda.launch(&cuda.functions.rms_norm).arg(&from).arg(&weight),
        NormKind::Layer(_) => cuda.launch(&cuda.functions.layer_norm).arg(&from).arg(&weight).arg(&bias),
    };
    let launch = launch.arg(&to).arg(&copy).arg(&n).arg(&eps);
    // SAFETY: x, the result and its copy have `rows` rows of `width` values, weight and bias one, or the bias is null.
    unsafe { launch.run([rows, 1, 1], threads_for(width), SUM_BYTES)? };
    Ok(Normed { values: cuda.tensor(out, x.shape()), rounded })
}

/// Whether [`add_norm`] norms a branch by `after` before it adds it.
pub fn norms_before_it_adds(after: &Norm, of_sum: &Norm) -> bool {
    matches!((&after.kind, &of_sum.kind), (NormKind::Rms, NormKind::Rms))
}

/// `residual + x`, where `x` is first normed by `after` if there is one, and a norm of that sum.
///
/// # Errors
/// A shape does not fit, [`norms_before_it_adds`] does not hold, or there is no memory.
pub fn add_norm(
    cuda: &Cuda,
    x: &Tensor,
    after: Option<&Norm>,
    residual: &Tensor,
    of_sum: &Norm,
    rounds: bool,
) -> Result<(Tensor, Normed)> {
    if residual.dims() != x.dims() {
        bail!("a branch {:?} does not fit its residual stream {:?}", x.dims(), residual.dims());
    }
    if after.is_some_and(|after| !norms_before_it_adds(after, of_sum)) {
        bail!("a sum of what a layer norm gives, or before one, is not made in one launch");
    }
    let (x, residual) = (plain(x)?, plain(residual)?);
    let (rows, width) = rows_and_width(&x);
    let (weight, bias) = weights(of_sum, width)?;
    let first = after.map(|after| weights(after, width)).transpose()?.map(|(weight, _)| weight);
    let (sum, out) = (cuda.uninitialised::<f32>(x.elem_count())?, cuda.uninitialised::<f32>(x.elem_count())?);
    let rounded = copy_in_bf16(cuda, &x, rounds)?;
    let (from, stream) = (cuda.address::<f32>(&x)?, cuda.address::<f32>(&residual)?);
    let (weight, bias) = (cuda.address::<f32>(&weight)?, cuda.address_or_null::<f32>(bias.as_ref())?);
    let (first, copy) = (cuda.address_or_null::<f32>(first.as_ref())?, cuda.address_or_null::<bf16>(rounded.as_ref())?);
    let (to_sum, to, n) = (cuda.address_of(&sum), cuda.address_of(&out), width as i32);
    let (first_eps, eps) = (after.map_or(0.0, |after| after.eps as f32), of_sum.eps as f32);
    let launch = match of_sum.kind {
        NormKind::Rms => {
            let launch = cuda.launch(&cuda.functions.add_rms_norm).arg(&from).arg(&first).arg(&stream).arg(&weight);
            launch.arg(&to_sum).arg(&to).arg(&copy).arg(&n).arg(&first_eps).arg(&eps)
        }
        NormKind::Layer(_) => {
            let launch = cuda.launch(&cuda.functions.add_layer_norm).arg(&from).arg(&stream).arg(&weight).arg(&bias);
            launch.arg(&to_sum).arg(&to).arg(&copy).arg(&n).arg(&eps)
        }
    };
    // SAFETY: x, the residual, the sum, the result and its copy have `rows` rows of `width` values, the weights and the bias
    // one each; the copy, the first weight and the bias may be null.
    unsafe { launch.run([rows, 1, 1], threads_for(width), SUM_BYTES)? };
    Ok((cuda.tensor(sum, x.shape()), Normed { values: cuda.tensor(out, x.shape()), rounded }))
}

fn rows_and_width(x: &Tensor) -> (usize, usize) {
    let width = x.dims().last().copied().unwrap_or(1);
    (x.elem_count() / width.max(1), width)
}

/// Weight and bias of a norm of rows of `width` values, in f32.
fn weights(norm: &Norm, width: usize) -> Result<(Tensor, Option<Tensor>)> {
    let bias = match &norm.kind {
        NormKind::Rms => None,
        NormKind::Layer(bias) => bias.as_ref().map(plain).transpose()?,
    };
    let weight = plain(&norm.weight)?;
    for values in [Some(&weight), bias.as_ref()].into_iter().flatten() {
        if values.elem_count() != width {
            bail!("a norm of {} values was given rows of {width}", values.elem_count());
        }
    }
    Ok((weight, bias))
}

fn copy_in_bf16(cuda: &Cuda, x: &Tensor, is_wanted: bool) -> Result<Option<Tensor>> {
    let copy = || Ok(cuda.tensor(cuda.uninitialised::<bf16>(x.elem_count())?, x.shape()));
    is_wanted.then(copy).transpose()
}

/// Rows of `x` `[n, width]` in f32 or bf16 by their indices, u32 on the device. A row that is not there is NaN.
///
/// # Errors
/// A shape or a type does not fit, or there is no memory.
pub fn pick(cuda: &Cuda, x: &Tensor, rows: &Tensor) -> Result<Tensor> {
    let ((n, width), count) = (x.dims2()?, rows.dims1()?);
    let bytes = width * x.dtype().size_in_bytes();
    let from = match x.dtype() {
        DType::F32 if x.is_contiguous() => cuda.address::<f32>(x)?,
        DType::BF16 if x.is_contiguous() => cuda.address::<bf16>(x)?,
        _ => return x.index_select(rows, 0),
    };
    if !bytes.is_multiple_of(4) || !from.is_multiple_of(4) {
        return x.index_select(rows, 0);
    }
    let out = match x.dtype() {
        DType::BF16 => cuda.tensor(cuda.uninitialised::<bf16>(count * width)?, (count, width)),
        _ => cuda.tensor(cuda.uninitialised::<f32>(count * width)?, (count, width)),
    };
    let to = if x.dtype() == DType::BF16 { cuda.address::<bf16>(&out)? } else { cuda.address::<f32>(&out)? };
    let (ids, n, words) = (cuda.address::<u32>(rows)?, n as u32, (bytes / 4) as i32);
    let launch = cuda.launch(&cuda.functions.pick_rows).arg(&from).arg(&ids).arg(&to).arg(&n).arg(&words);
    let parts = (bytes / 4).div_ceil(ELEMENT_THREADS).clamp(1, 8);
    // SAFETY: x has `n` rows of `words` words, the result one for each of as many indices, and the kernel compares each with
    // `n`.
    unsafe { launch.run([count, parts, 1], ELEMENT_THREADS, 0)? };
    Ok(out)
}

/// Rotary embedding of `x` `[t, heads, dim]`; see [`Kernels::rope`](crate::kernels::Kernels::rope).
///
/// # Errors
/// A shape does not fit, or there is no memory.
pub fn rope(cuda: &Cuda, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (t, heads, dim) = x.dims3()?;
    let half = cos.dim(1)?;
    if 2 * half > dim || cos.dims() != [t, half] || sin.dims() != cos.dims() {
        bail!("a rotary embedding of {:?} does not fit {:?}", cos.dims(), x.dims());
    }
    let (x, cos, sin) = (plain(x)?, plain(cos)?, plain(sin)?);
    let count = x.elem_count();
    let out = cuda.uninitialised::<f32>(count)?;
    let (from, to) = (cuda.address::<f32>(&x)?, cuda.address_of(&out));
    let (c, s) = (cuda.address::<f32>(&cos)?, cuda.address::<f32>(&sin)?);
    let (heads, width, half) = (heads as i32, dim as i32, half as i32);
    let launch = cuda.launch(&cuda.functions.rope).arg(&from).arg(&c).arg(&s).arg(&to).arg(&heads).arg(&width);
    // SAFETY: the shapes were checked.
    unsafe { launch.arg(&half).arg(&count).run(element_grid(count), ELEMENT_THREADS, 0)? };
    Ok(cuda.tensor(out, x.shape()))
}

/// An activation function of every value of `x`.
///
/// # Errors
/// There is no memory.
pub fn activate(cuda: &Cuda, activation: Activation, x: &Tensor) -> Result<Tensor> {
    let x = plain(x)?;
    let count = x.elem_count();
    let out = cuda.uninitialised::<f32>(count)?;
    let (from, to, activation) = (cuda.address::<f32>(&x)?, cuda.address_of(&out), activation_number(activation));
    let launch = cuda.launch(&cuda.functions.activate_rows).arg(&from).arg(&to).arg(&count).arg(&activation);
    // SAFETY: both have `count` values.
    unsafe { launch.run(element_grid(count), ELEMENT_THREADS, 0)? };
    Ok(cuda.tensor(out, x.shape()))
}
