//! A gated MLP as one operation, with its gradient by hand: what is between its layers is never a tensor of the graph.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, cpu::erf::erf_f64};

use crate::kernels::cpu::{
    Isa, dispatch,
    frozen::{FrozenMatrix, Transposes},
    matmul::{Product, multiply},
    pool,
    rows::apply,
    simd::{LANES, Simd},
};
use crate::kernels::{
    Activation,
    host::{slice, with_array_of_values},
    params::GELU_TANH,
    weight::Linear,
};

/// Values that one thread works on at a time.
const CHUNK: usize = 4096;

/// `down(activation(gate(x)) * up(x))`, plus a residual, of layers without biases but the last.
pub struct GatedMlp {
    activation: Activation,
    gate: FrozenMatrix,
    up: FrozenMatrix,
    down: FrozenMatrix,
    bias: Option<Vec<f32>>,
    transposes: Transposes,
    /// What `gate` and `up` gave, until the gradient has been computed.
    inner: Mutex<Option<[Vec<f32>; 2]>>,
}

impl GatedMlp {
    /// # Errors
    /// A layer is of another backend.
    pub fn new(
        activation: Activation,
        [gate, up]: [&Linear; 2],
        down: &Linear,
        transposes: Transposes,
    ) -> Result<Self> {
        let bias = down.bias.as_ref().map(|bias| bias.flatten_all()?.to_vec1()).transpose()?;
        let [gate, up, down] =
            [FrozenMatrix::of(gate)?, FrozenMatrix::of(up)?, FrozenMatrix::of(down)?].map(Clone::clone);
        Ok(Self { activation, gate, up, down, bias, transposes, inner: Mutex::new(None) })
    }

    /// The MLP of `x` `[rows, in]`.
    ///
    /// # Errors
    /// A shape does not fit.
    pub fn forward(self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        let x = x.contiguous()?;
        match residual {
            Some(residual) => x.apply_op2(&residual.contiguous()?, self),
            None => x.apply_op1(self),
        }
    }

    /// What `gate` and `up` give, and the product of the activation of one and the other.
    fn inner(&self, x: &[f32], rows: usize) -> [Vec<f32>; 2] {
        let product = |matrix: &'_ FrozenMatrix| -> Vec<f32> {
            let product = Product { weight: matrix.matrix(), bias: None, residual: None };
            multiply(Isa::best(), pool::global(), x, rows, &[product]).into_iter().next().unwrap_or_default()
        };
        [product(&self.gate), product(&self.up)]
    }

    fn value(&self, x: &[f32], rows: usize, residual: Option<&[f32]>) -> Vec<f32> {
        let inner = self.inner(x, rows);
        let gated = gated(Isa::best(), self.activation, &inner);
        *self.inner.lock().unwrap_or_else(PoisonError::into_inner) = Some(inner);
        let product = Product { weight: self.down.matrix(), bias: self.bias.as_deref(), residual };
        multiply(Isa::best(), pool::global(), &gated, rows, &[product]).into_iter().next().unwrap_or_default()
    }

    /// The gradient of `x`.
    fn gradient(&self, x: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let (rows, _) = x.dims2()?;
        let values = with_array_of_values([x, grad], |[x, grad]| {
            let kept = self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
            let mut inner = kept.unwrap_or_else(|| self.inner(x, rows));
            let to_gated = self.transposes.input_gradient(&self.down, grad, rows, None)?;
            gated_gradient(Isa::best(), self.activation, &mut inner, &to_gated);
            let of_gate = self.transposes.input_gradient(&self.gate, &inner[0], rows, None)?;
            self.transposes.input_gradient(&self.up, &inner[1], rows, Some(&of_gate))
        })?;
        Tensor::from_vec(values, x.shape(), x.device())
    }

    fn shape(&self, rows: usize) -> Shape {
        (rows, self.down.matrix().n()).into()
    }
}

impl CustomOp1 for GatedMlp {
    fn name(&self) -> &'static str {
        "tuning-gated-mlp"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let rows = layout.shape().dims2()?.0;
        Ok((CpuStorage::F32(self.value(slice(x, layout)?, rows, None)), self.shape(rows)))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.gradient(x, grad).map(Some)
    }
}

impl CustomOp2 for GatedMlp {
    fn name(&self) -> &'static str {
        "tuning-gated-mlp"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let rows = layout.shape().dims2()?.0;
        let residual = slice(residual, residual_layout)?;
        Ok((CpuStorage::F32(self.value(slice(x, layout)?, rows, Some(residual))), self.shape(rows)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _residual: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(self.gradient(x, grad)?), Some(grad.clone())))
    }
}

/// A pointer that threads write disjoint chunks behind.
struct Out(*mut f32);

// SAFETY: every task has its own chunk.
unsafe impl Sync for Out {}

/// `activation(gate) * up`, value by value.
///
/// # Panics
/// If the two are not of one length.
pub(super) fn gated(isa: Isa, activation: Activation, [gate, up]: &[Vec<f32>; 2]) -> Vec<f32> {
    assert_eq!(gate.len(), up.len());
    let mut out = vec![0f32; gate.len()];
    let to = Out(out.as_mut_ptr());
    pool::global().run(gate.len().div_ceil(CHUNK), &|chunk| {
        let (to, first) = (&to, chunk * CHUNK);
        let len = (gate.len() - first).min(CHUNK);
        let (gate, up) = (&gate[first..][..len], &up[first..][..len]);
        // SAFETY: the chunk is within `out`.
        let to = unsafe { to.0.add(first) };
        // SAFETY: `to` is valid for as many values as both have.
        unsafe { dispatch!(isa, gate_values(activation: Activation, gate: &[f32], up: &[f32], to: *mut f32)) };
    });
    out
}

/// Replaces a gate's and its partner's values by their gradients, from that of [`gated`].
///
/// # Panics
/// If the three are not of one length.
pub(super) fn gated_gradient(isa: Isa, activation: Activation, [gate, up]: &mut [Vec<f32>; 2], grad: &[f32]) {
    let n = grad.len();
    assert!(gate.len() == n && up.len() == n);
    let (gates, ups) = (Out(gate.as_mut_ptr()), Out(up.as_mut_ptr()));
    pool::global().run(n.div_ceil(CHUNK), &|chunk| {
        let (gates, ups, first) = (&gates, &ups, chunk * CHUNK);
        let grad = &grad[first..n.min(first + CHUNK)];
        // SAFETY: the chunk is within both.
        let (gate, up) = unsafe { (gates.0.add(first), ups.0.add(first)) };
        // SAFETY: both are valid for as many values as `grad` has.
        unsafe {
            dispatch!(isa, gate_gradients(activation: Activation, gate: *mut f32, up: *mut f32, grad: &[f32]));
        }
    });
}

/// # Safety
/// `to` is valid for as many values as `gate` and `up` have.
#[inline(always)]
unsafe fn gate_values<S: Simd>(activation: Activation, gate: &[f32], up: &[f32], to: *mut f32) {
    let whole = gate.len() / LANES * LANES;
    // SAFETY: every index is below the length; the last values pass through vectors of their own.
    unsafe {
        for i in (0..whole).step_by(LANES) {
            let y = apply::<S>(activation, S::load(gate.as_ptr().add(i)));
            S::store(to.add(i), S::mul(y, S::load(up.as_ptr().add(i))));
        }
        let (gate, up) = (&gate[whole..], &up[whole..]);
        let mut last = [[0f32; LANES]; 2];
        last[0][..gate.len()].copy_from_slice(gate);
        last[1][..up.len()].copy_from_slice(up);
        let y = S::mul(apply::<S>(activation, S::load(last[0].as_ptr())), S::load(last[1].as_ptr()));
        S::store(last[0].as_mut_ptr(), y);
        std::ptr::copy_nonoverlapping(last[0].as_ptr(), to.add(whole), gate.len());
    }
}

/// # Safety
/// `gate` and `up` are valid for as many values as `grad` has.
#[inline(always)]
unsafe fn gate_gradients<S: Simd>(activation: Activation, gate: *mut f32, up: *mut f32, grad: &[f32]) {
    let whole = grad.len() / LANES * LANES;
    // SAFETY: every index is below the length; the last values pass through vectors of their own.
    unsafe {
        for i in (0..whole).step_by(LANES) {
            gradients_of_16::<S>(activation, gate.add(i), up.add(i), grad.as_ptr().add(i));
        }
        let left = grad.len() - whole;
        let mut last = [[0f32; LANES]; 3];
        for (last, from) in last.iter_mut().zip([gate.cast_const(), up.cast_const(), grad.as_ptr()]) {
            std::ptr::copy_nonoverlapping(from.add(whole), last.as_mut_ptr(), left);
        }
        let [last_gate, last_up, last_grad] = &mut last;
        gradients_of_16::<S>(activation, last_gate.as_mut_ptr(), last_up.as_mut_ptr(), last_grad.as_ptr());
        std::ptr::copy_nonoverlapping(last_gate.as_ptr(), gate.add(whole), left);
        std::ptr::copy_nonoverlapping(last_up.as_ptr(), up.add(whole), left);
    }
}

/// # Safety
/// All three are valid for 16 values.
#[inline(always)]
unsafe fn gradients_of_16<S: Simd>(activation: Activation, gate: *mut f32, up: *mut f32, grad: *const f32) {
    // SAFETY: as the caller says.
    unsafe {
        let (value, slope) = value_and_slope::<S>(activation, S::load(gate));
        let grad = S::load(grad);
        S::store(gate, S::mul(S::mul(grad, S::load(up)), slope));
        S::store(up, S::mul(grad, value));
    }
}

/// The activation function of 16 values, and its derivative there.
///
/// # Safety
/// As the methods of [`Simd`].
#[inline(always)]
unsafe fn value_and_slope<S: Simd>(activation: Activation, x: S::V) -> (S::V, S::V) {
    // SAFETY: as the caller says; the arrays hold 16 values.
    unsafe {
        let one = S::splat(1.0);
        match activation {
            Activation::Silu => {
                let s = sigmoid::<S>(x);
                let value = S::mul(x, s);
                (value, S::fma(value, S::sub(one, s), s))
            }
            Activation::GeluTanh => {
                let (a, b) = (S::splat(GELU_TANH[0]), S::splat(GELU_TANH[1]));
                let squared = S::mul(S::mul(x, x), b);
                let s = sigmoid::<S>(S::mul(S::mul(x, a), S::add(squared, one)));
                let value = S::mul(x, s);
                let inner = S::mul(a, S::fma(squared, S::splat(3.0), one));
                (value, S::fma(S::mul(value, S::sub(one, s)), inner, s))
            }
            Activation::Relu | Activation::Gelu => {
                let mut values = [[0f32; LANES]; 2];
                S::store(values[0].as_mut_ptr(), x);
                let [value, slope] = &mut values;
                for (value, slope) in value.iter_mut().zip(slope) {
                    (*value, *slope) = if activation == Activation::Relu { relu(*value) } else { gelu(*value) };
                }
                (S::load(values[0].as_ptr()), S::load(values[1].as_ptr()))
            }
        }
    }
}

/// # Safety
/// As the methods of [`Simd`].
#[inline(always)]
unsafe fn sigmoid<S: Simd>(x: S::V) -> S::V {
    // SAFETY: as the caller says.
    unsafe { S::div(S::splat(1.0), S::add(S::splat(1.0), S::exp(S::sub(S::splat(0.0), x)))) }
}

fn relu(x: f32) -> (f32, f32) {
    if x > 0.0 { (x, 1.0) } else { (0.0, 0.0) }
}

/// `x * Phi(x)`, by way of the error function in f64, and `Phi(x) + x * phi(x)`.
fn gelu(x: f32) -> (f32, f32) {
    let x = f64::from(x);
    let below = 0.5 * (1.0 + erf_f64(x * std::f64::consts::FRAC_1_SQRT_2));
    let density = (-0.5 * x * x).exp() * (0.5 * std::f64::consts::FRAC_1_SQRT_2 * std::f64::consts::FRAC_2_SQRT_PI);
    ((x * below) as f32, (below + x * density) as f32)
}
