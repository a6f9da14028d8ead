//! Row-wise kernels: norms, rotary embedding, activation functions, rounding, argmax.

use candle_core::cpu::erf::erf_f64;

use super::{
    Isa, dispatch,
    pool::Pool,
    simd::{LANES, Simd},
    tensors::written,
};
use crate::kernels::{Activation, params::GELU_TANH};

/// The fewest values that are worth a task of their own.
const TASK_VALUES: usize = 16 * 1024;

/// Calls `f` with ranges of rows that together are `0..rows`, on all threads if there is enough to do.
fn split(pool: &Pool, rows: usize, width: usize, f: &(dyn Fn(std::ops::Range<usize>) + Sync)) {
    let tasks = match rows.saturating_mul(width).div_ceil(TASK_VALUES) {
        0 | 1 => 1,
        // As many for each thread.
        several => several.next_multiple_of(pool.threads()),
    };
    let per_task = rows.div_ceil(tasks).max(1);
    pool.run(rows.div_ceil(per_task), &|task| f(task * per_task..rows.min((task + 1) * per_task)));
}

/// A pointer that threads write disjoint rows behind.
struct Out(*mut f32);

// SAFETY: see above; `split` gives every row to one task.
unsafe impl Sync for Out {}

/// Root-mean-square norm of each row of `x` `[rows, weight.len()]`.
///
/// # Panics
/// If a length does not fit.
pub fn rms_norm(isa: Isa, pool: &Pool, x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let width = weight.len();
    assert!(x.is_empty() || x.len().is_multiple_of(width));
    let fill = |out: *mut f32| {
        let out = Out(out);
        split(pool, x.len() / width.max(1), width, &|rows| {
            let out = &out;
            for row in rows {
                let x = &x[row * width..][..width];
                // SAFETY: the row is within `out`, which is as long as `x`.
                let to = unsafe { out.0.add(row * width) };
                // SAFETY: `x`, `weight` and `to` are of one length.
                unsafe { dispatch!(isa, norm_row(x: &[f32], weight: &[f32], eps: f32, to: *mut f32)) };
            }
        });
    };
    // SAFETY: the rows are all of `x`, and each is written whole.
    unsafe { written(x.len(), fill) }
}

/// # Safety
/// `weight` and `to` are as long as `x`.
#[inline(always)]
unsafe fn norm_row<S: Simd>(x: &[f32], weight: &[f32], eps: f32, to: *mut f32) {
    let (n, whole) = (x.len(), x.len() / LANES * LANES);
    let (x, weight) = (x.as_ptr(), weight.as_ptr());
    // SAFETY: every index is below `n`.
    unsafe {
        let mut acc = S::splat(0.0);
        for i in (0..whole).step_by(LANES) {
            let v = S::load(x.add(i));
            acc = S::fma(v, v, acc);
        }
        let mut squares = S::sum(acc);
        for i in whole..n {
            squares += *x.add(i) * *x.add(i);
        }
        let scale = (squares / n as f32 + eps).sqrt().recip();
        let scales = S::splat(scale);
        for i in (0..whole).step_by(LANES) {
            S::store(to.add(i), S::mul(S::mul(S::load(x.add(i)), scales), S::load(weight.add(i))));
        }
        for i in whole..n {
            *to.add(i) = *x.add(i) * scale * *weight.add(i);
        }
    }
}

/// The gradient of `x` from that of its root-mean-square norm, `grad` `[rows, weight.len()]`.
///
/// # Panics
/// If a length does not fit.
pub fn rms_norm_gradient(isa: Isa, pool: &Pool, x: &[f32], weight: &[f32], eps: f32, grad: &[f32]) -> Vec<f32> {
    let width = weight.len();
    assert!(x.len() == grad.len() && (x.is_empty() || x.len().is_multiple_of(width)));
    let fill = |out: *mut f32| {
        let out = Out(out);
        split(pool, x.len() / width.max(1), width, &|rows| {
            let out = &out;
            for row in rows {
                let (x, grad) = (&x[row * width..][..width], &grad[row * width..][..width]);
                // SAFETY: the row is within `out`, which is as long as `x`.
                let to = unsafe { out.0.add(row * width) };
                // SAFETY: `x`, `weight`, `grad` and `to` are of one length.
                unsafe {
                    dispatch!(isa, norm_gradient(x: &[f32], weight: &[f32], eps: f32, grad: &[f32], to: *mut f32));
                }
            }
        });
    };
    // SAFETY: the rows are all of `x`, and each is written whole.
    unsafe { written(x.len(), fill) }
}

/// # Safety
/// `weight`, `grad` and `to` are as long as `x`.
#[inline(always)]
unsafe fn norm_gradient<S: Simd>(x: &[f32], weight: &[f32], eps: f32, grad: &[f32], to: *mut f32) {
    let (n, whole) = (x.len(), x.len() / LANES * LANES);
    let (x, weight, grad) = (x.as_ptr(), weight.as_ptr(), grad.as_ptr());
    // SAFETY: every index is below `n`.
    unsafe {
        let (mut squares, mut along) = (S::splat(0.0), S::splat(0.0));
        for i in (0..whole).step_by(LANES) {
            let v = S::load(x.add(i));
            squares = S::fma(v, v, squares);
            along = S::fma(S::mul(S::load(grad.add(i)), S::load(weight.add(i))), v, along);
        }
        let (mut squares, mut along) = (S::sum(squares), S::sum(along));
        for i in whole..n {
            squares += *x.add(i) * *x.add(i);
            along += *grad.add(i) * *weight.add(i) * *x.add(i);
        }
        let scale = (squares / n as f32 + eps).sqrt().recip();
        let along = along * scale * scale / n as f32;
        for i in (0..whole).step_by(LANES) {
            let g = S::mul(S::load(grad.add(i)), S::load(weight.add(i)));
            let y = S::sub(g, S::mul(S::load(x.add(i)), S::splat(along)));
            S::store(to.add(i), S::mul(y, S::splat(scale)));
        }
        for i in whole..n {
            *to.add(i) = scale * (*grad.add(i) * *weight.add(i) - *x.add(i) * along);
        }
    }
}

/// Layer norm of each row of `x` `[rows, weight.len()]`, by `weight` and `bias`.
///
/// # Panics
/// If a length does not fit.
pub fn layer_norm(isa: Isa, pool: &Pool, x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32) -> Vec<f32> {
    let width = weight.len();
    assert!(x.is_empty() || x.len().is_multiple_of(width));
    let zeros = if bias.is_none() { vec![0f32; width] } else { Vec::new() };
    let bias = bias.unwrap_or(&zeros);
    assert!(bias.len() == width);
    let fill = |out: *mut f32| {
        let out = Out(out);
        split(pool, x.len() / width.max(1), width, &|rows| {
            let out = &out;
            for row in rows {
                let x = &x[row * width..][..width];
                // SAFETY: the row is within `out`, which is as long as `x`.
                let to = unsafe { out.0.add(row * width) };
                // SAFETY: `x`, `weight`, `bias` and `to` are of one length.
                unsafe {
                    dispatch!(isa, layer_norm_row(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, to: *mut f32))
                };
            }
        });
    };
    // SAFETY: the rows are all of `x`, and each is written whole.
    unsafe { written(x.len(), fill) }
}

/// # Safety
/// `weight`, `bias` and `to` are as long as `x`.
#[inline(always)]
unsafe fn layer_norm_row<S: Simd>(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, to: *mut f32) {
    let (n, whole) = (x.len(), x.len() / LANES * LANES);
    let (x, weight, bias) = (x.as_ptr(), weight.as_ptr(), bias.as_ptr());
    // SAFETY: every index is below `n`.
    unsafe {
        let mut acc = S::splat(0.0);
        for i in (0..whole).step_by(LANES) {
            acc = S::add(acc, S::load(x.add(i)));
        }
        let mut sum = S::sum(acc);
        for i in whole..n {
            sum += *x.add(i);
        }
        let mean = sum / n as f32;
        let means = S::splat(mean);
        let mut acc = S::splat(0.0);
        for i in (0..whole).step_by(LANES) {
            let v = S::sub(S::load(x.add(i)), means);
            acc = S::fma(v, v, acc);
        }
        let mut squares = S::sum(acc);
        for i in whole..n {
            squares += (*x.add(i) - mean) * (*x.add(i) - mean);
        }
        let scale = (squares / n as f32 + eps).sqrt().recip();
        let scales = S::splat(scale);
        for i in (0..whole).step_by(LANES) {
            let v = S::mul(S::sub(S::load(x.add(i)), means), scales);
            S::store(to.add(i), S::fma(v, S::load(weight.add(i)), S::load(bias.add(i))));
        }
        for i in whole..n {
            *to.add(i) = (*x.add(i) - mean) * scale * *weight.add(i) + *bias.add(i);
        }
    }
}

/// Half-split rotation of the first dimensions of each head of `x` `[rows, heads, head_dim]` by its
/// row's `cos` and `sin` `[rows, half]`: of the first two `half`s. The others stay.
///
/// # Panics
/// If a length does not fit.
pub fn rope(isa: Isa, pool: &Pool, x: &[f32], rows: usize, head_dim: usize, cos: &[f32], sin: &[f32]) -> Vec<f32> {
    let half = cos.len().checked_div(rows).unwrap_or(0);
    let width = x.len().checked_div(rows).unwrap_or(0);
    assert!(cos.len() == sin.len() && cos.len() == rows * half && x.len() == rows * width);
    assert!(2 * half <= head_dim && (rows == 0 || width.is_multiple_of(head_dim)));
    let fill = |out: *mut f32| {
        let out = Out(out);
        split(pool, rows, width, &|rows| {
            let out = &out;
            for row in rows {
                let (cos, sin) = (&cos[row * half..][..half], &sin[row * half..][..half]);
                for (head, x) in x[row * width..][..width].chunks_exact(head_dim).enumerate() {
                    // SAFETY: the head is within `out`, which is as long as `x`.
                    let to = unsafe { out.0.add(row * width + head * head_dim) };
                    // SAFETY: `x` and `to` hold one head, `cos` and `sin` at most half as much each.
                    unsafe { dispatch!(isa, rope_head(x: &[f32], cos: &[f32], sin: &[f32], to: *mut f32)) };
                }
            }
        });
    };
    // SAFETY: the rows' heads are all of `x`, and each is written whole.
    unsafe { written(x.len(), fill) }
}

/// # Safety
/// `x` and `to` are as long as each other, and at least twice as long as `cos` and `sin`.
#[inline(always)]
unsafe fn rope_head<S: Simd>(x: &[f32], cos: &[f32], sin: &[f32], to: *mut f32) {
    let (half, dim) = (cos.len(), x.len());
    let whole = half / LANES * LANES;
    let (x, cos, sin) = (x.as_ptr(), cos.as_ptr(), sin.as_ptr());
    // SAFETY: every index of `cos` and `sin` is below `half`, of `x` and `to` below `dim`.
    unsafe {
        for i in (0..whole).step_by(LANES) {
            let (a, b) = (S::load(x.add(i)), S::load(x.add(half + i)));
            let (c, s) = (S::load(cos.add(i)), S::load(sin.add(i)));
            S::store(to.add(i), S::sub(S::mul(a, c), S::mul(b, s)));
            S::store(to.add(half + i), S::fma(b, c, S::mul(a, s)));
        }
        for i in whole..half {
            let (a, b, c, s) = (*x.add(i), *x.add(half + i), *cos.add(i), *sin.add(i));
            *to.add(i) = a * c - b * s;
            *to.add(half + i) = b * c + a * s;
        }
        std::ptr::copy_nonoverlapping(x.add(2 * half), to.add(2 * half), dim - 2 * half);
    }
}

/// The activation function of each value of `x` `[rows, width]`.
///
/// # Panics
/// If a length does not fit.
pub fn activate(isa: Isa, pool: &Pool, activation: Activation, x: &[f32], width: usize) -> Vec<f32> {
    assert!(x.is_empty() || x.len().is_multiple_of(width));
    let fill = |out: *mut f32| {
        let out = Out(out);
        split(pool, x.len() / width.max(1), width, &|rows| {
            let out = &out;
            for row in rows {
                let x = &x[row * width..][..width];
                // SAFETY: the row is within `out`, which is as long as `x`.
                let to = unsafe { out.0.add(row * width) };
                // SAFETY: `to` is as long as `x`.
                unsafe { dispatch!(isa, activate_row(activation: Activation, x: &[f32], to: *mut f32)) };
            }
        });
    };
    // SAFETY: the rows are all of `x`, and each is written whole.
    unsafe { written(x.len(), fill) }
}

/// # Safety
/// `to` is as long as `x`.
#[inline(always)]
unsafe fn activate_row<S: Simd>(activation: Activation, x: &[f32], to: *mut f32) {
    let whole = x.len() / LANES * LANES;
    // SAFETY: every index is below the length of `x`; the last values pass through a vector of their own.
    unsafe {
        for i in (0..whole).step_by(LANES) {
            S::store(to.add(i), apply::<S>(activation, S::load(x.as_ptr().add(i))));
        }
        let mut last = [0f32; LANES];
        last[..x.len() - whole].copy_from_slice(&x[whole..]);
        S::store(last.as_mut_ptr(), apply::<S>(activation, S::load(last.as_ptr())));
        std::ptr::copy_nonoverlapping(last.as_ptr(), to.add(whole), x.len() - whole);
    }
}

/// The activation function of 16 values.
///
/// # Safety
/// As the methods of [`Simd`].
#[inline(always)]
pub(super) unsafe fn apply<S: Simd>(activation: Activation, x: S::V) -> S::V {
    // SAFETY: as the caller says; the array holds 16 values.
    unsafe {
        match activation {
            Activation::Silu => times_sigmoid::<S>(x, x),
            Activation::GeluTanh => {
                let inner = S::fma(S::mul(x, x), S::splat(GELU_TANH[1]), S::splat(1.0));
                times_sigmoid::<S>(x, S::mul(S::mul(x, S::splat(GELU_TANH[0])), inner))
            }
            Activation::Relu => S::max(x, S::splat(0.0)),
            Activation::Gelu => {
                let mut values = [0f32; LANES];
                S::store(values.as_mut_ptr(), x);
                values.iter_mut().for_each(gelu);
                S::load(values.as_ptr())
            }
        }
    }
}

/// `x * sigmoid(of)`
///
/// # Safety
/// As the methods of [`Simd`].
#[inline(always)]
unsafe fn times_sigmoid<S: Simd>(x: S::V, of: S::V) -> S::V {
    // SAFETY: as the caller says.
    unsafe { S::div(x, S::add(S::splat(1.0), S::exp(S::sub(S::splat(0.0), of)))) }
}

/// `x * Phi(x)`, by way of the error function in f64.
fn gelu(value: &mut f32) {
    let x = f64::from(*value);
    *value = (0.5 * x * (1.0 + erf_f64(x * std::f64::consts::FRAC_1_SQRT_2))) as f32;
}

/// Rounds each value to bf16, kept as f32; rows of `width` are not split between threads.
///
/// # Panics
/// If `to` is not as long as `x`.
pub(super) fn round(isa: Isa, pool: &Pool, x: &[f32], width: usize, to: &mut [f32]) {
    assert_eq!(x.len(), to.len());
    let out = Out(to.as_mut_ptr());
    split(pool, x.len() / width.max(1), width, &|rows| {
        let out = &out;
        let x = &x[rows.start * width..rows.end * width];
        // SAFETY: the rows are within `to`, which is as long as all of `x`.
        let to = unsafe { out.0.add(rows.start * width) };
        // SAFETY: `to` is valid for the rows of `x`.
        unsafe { dispatch!(isa, round_values(x: &[f32], to: *mut f32)) };
    });
}

/// # Safety
/// `to` is valid for as many values as `x`.
#[inline(always)]
unsafe fn round_values<S: Simd>(x: &[f32], to: *mut f32) {
    let whole = x.len() / LANES * LANES;
    // SAFETY: every index is below the length of both.
    unsafe {
        for i in (0..whole).step_by(LANES) {
            S::store(to.add(i), S::to_bf16(S::load(x.as_ptr().add(i))));
        }
        for (i, x) in x.iter().enumerate().skip(whole) {
            *to.add(i) = half::bf16::from_f32(*x).to_f32();
        }
    }
}

/// The index of the largest value, the first of equals, as torch's argmax; 0 if there is none. NaN is
/// never larger.
pub fn argmax(isa: Isa, x: &[f32]) -> usize {
    const PART: usize = 1024;
    let (mut best, mut best_part) = (f32::NEG_INFINITY, 0);
    for (i, part) in x.chunks(PART).enumerate() {
        let mut value = f32::NEG_INFINITY;
        let to = &raw mut value;
        // SAFETY: `to` is valid for one value.
        unsafe { dispatch!(isa, largest(part: &[f32], to: *mut f32)) };
        if value > best {
            (best, best_part) = (value, i);
        }
    }
    let from = best_part * PART;
    x.iter().skip(from).position(|x| *x == best).map_or(0, |i| from + i)
}

/// # Safety
/// `to` is valid for one value.
#[inline(always)]
unsafe fn largest<S: Simd>(x: &[f32], to: *mut f32) {
    let (n, whole) = (x.len(), x.len() / (4 * LANES) * (4 * LANES));
    let x = x.as_ptr();
    // SAFETY: every index is below `n`.
    unsafe {
        let mut acc = [S::splat(f32::NEG_INFINITY); 4];
        for i in (0..whole).step_by(4 * LANES) {
            for (j, acc) in acc.iter_mut().enumerate() {
                // The second operand stays where the first is no number.
                *acc = S::max(S::load(x.add(i + j * LANES)), *acc);
            }
        }
        let mut best = S::largest(S::max(S::max(acc[0], acc[1]), S::max(acc[2], acc[3])));
        for i in whole..n {
            best = best.max(*x.add(i));
        }
        *to = best;
    }
}

#[cfg(test)]
mod tests;
