//! Norm, rope and log-probabilities in one pass each, with their gradients by hand.

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};

use crate::kernels::cpu::{
    Isa, dispatch, pool, rows,
    simd::{LANES, Simd},
};
use crate::kernels::host::{slice, with_array_of_values, with_values};

/// Root-mean-square norm.
pub(super) struct RmsNorm {
    pub weight: Vec<f32>,
    pub eps: f32,
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "tuning-rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = rows::rms_norm(Isa::best(), pool::global(), slice(x, layout)?, &self.weight, self.eps);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let out = with_array_of_values([x, grad], |[x, grad]| {
            Ok(rows::rms_norm_gradient(Isa::best(), pool::global(), x, &self.weight, self.eps, grad))
        })?;
        Ok(Some(Tensor::from_vec(out, x.shape(), &Device::Cpu)?))
    }
}

/// A rotation; its gradient is the rotation back.
pub(super) struct Rope {
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "tuning-rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, _, head_dim) = layout.shape().dims3()?;
        let x = slice(x, layout)?;
        let out = rows::rope(Isa::best(), pool::global(), x, rows, head_dim, &self.cos, &self.sin);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (rows, _, head_dim) = x.dims3()?;
        let back: Vec<f32> = self.sin.iter().map(|sin| -sin).collect();
        let out = with_values(grad, |grad| {
            Ok(rows::rope(Isa::best(), pool::global(), grad, rows, head_dim, &self.cos, &back))
        })?;
        Ok(Some(Tensor::from_vec(out, x.shape(), &Device::Cpu)?))
    }
}

/// The log-probability of one target in each row of logits `[t, vocab]`: a log-softmax that never
/// stores more than it is asked for. f32 on a CPU.
pub(super) struct LogProbabilities {
    /// A column for each row.
    pub targets: Vec<u32>,
}

impl CustomOp1 for LogProbabilities {
    fn name(&self) -> &'static str {
        "tuning-log-probabilities"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, vocab) = layout.shape().dims2()?;
        if rows != self.targets.len() || self.targets.iter().any(|&t| t as usize >= vocab) {
            bail!("{} targets do not fit logits [{rows}, {vocab}]", self.targets.len());
        }
        let logits = slice(logits, layout)?;
        let (isa, mut out) = (Isa::best(), vec![0f32; rows]);
        let to = Out(out.as_mut_ptr());
        pool::global().run(rows, &|i| {
            let to = &to;
            let (row, target) = (&logits[i * vocab..][..vocab], self.targets[i] as usize);
            let mut sums = [0f32; 2];
            let result = &mut sums;
            // SAFETY: the instructions are there.
            unsafe { dispatch!(isa, log_sum(row: &[f32], result: &mut [f32; 2])) };
            // SAFETY: there is a value for each row, and this task alone has it.
            unsafe { *to.0.add(i) = row[target] - sums[0] - sums[1] };
        });
        Ok((CpuStorage::F32(out), self.targets.len().into()))
    }

    fn bwd(&self, logits: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let vocab = logits.dim(1)?;
        let (isa, mut values) = (Isa::best(), vec![0f32; logits.elem_count()]);
        let to = Out(values.as_mut_ptr());
        with_array_of_values([logits, grad], |[logits, grads]| {
            pool::global().run(self.targets.len(), &|i| {
                let (row, grad) = (&logits[i * vocab..][..vocab], grads[i]);
                let to = &to;
                // SAFETY: there is a row for each target, and this task alone has it.
                let to = unsafe { to.0.add(i * vocab) };
                // SAFETY: `to` is as long as the row.
                unsafe { dispatch!(isa, softmax_gradient(row: &[f32], grad: f32, to: *mut f32)) };
                // SAFETY: a target is a column, which the forward pass has checked.
                unsafe { *to.add(self.targets[i] as usize) += grad };
            });
            Ok(())
        })?;
        Ok(Some(Tensor::from_vec(values, logits.shape(), &Device::Cpu)?))
    }
}

/// A pointer that threads write disjoint rows behind.
struct Out(*mut f32);

// SAFETY: every task has its own row.
unsafe impl Sync for Out {}

/// A row's largest value, and the logarithm of the sum of exponentials above it.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
unsafe fn log_sum<S: Simd>(row: &[f32], result: &mut [f32; 2]) {
    let (chunks, last) = row.as_chunks::<LANES>();
    // SAFETY: a chunk is of 16 values.
    unsafe {
        let mut largest = S::splat(f32::NEG_INFINITY);
        for chunk in chunks {
            largest = S::max(largest, S::load(chunk.as_ptr()));
        }
        let max = last.iter().copied().fold(S::largest(largest), f32::max);
        let mut sum = S::splat(0.0);
        for chunk in chunks {
            sum = S::add(sum, S::exp(S::sub(S::load(chunk.as_ptr()), S::splat(max))));
        }
        let sum = S::sum(sum) + last.iter().map(|x| (x - max).exp()).sum::<f32>();
        *result = [max, sum.ln()];
    }
}

/// `-grad * softmax(row)`
///
/// # Safety
/// `to` is as long as the row.
#[inline(always)]
unsafe fn softmax_gradient<S: Simd>(row: &[f32], grad: f32, to: *mut f32) {
    let mut sums = [0f32; 2];
    // SAFETY: every index is within the row, and the processor has the instructions.
    unsafe {
        log_sum::<S>(row, &mut sums);
        let shift = sums[0] + sums[1];
        let (chunks, last) = row.as_chunks::<LANES>();
        let factor = S::splat(-grad);
        for (i, chunk) in chunks.iter().enumerate() {
            let p = S::exp(S::sub(S::load(chunk.as_ptr()), S::splat(shift)));
            S::store(to.add(i * LANES), S::mul(p, factor));
        }
        for (i, x) in last.iter().enumerate() {
            *to.add(chunks.len() * LANES + i) = -grad * (x - shift).exp();
        }
    }
}
