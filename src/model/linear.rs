//! A frozen matrix: the product with it, and the gradient to its input only.

use candle_core::{
    CpuStorage, CustomOp1, DType, Layout, Result, Shape, Storage, Tensor, backend::BackendStorage, bail,
};
use half::bf16;

use crate::kernels::{
    Activation, Kernels,
    cpu::{FrozenMatrix, PackedMatrix, quantized::BlockFormat, tensors::with_values},
};

/// `y = x Wᵀ + b` with a weight that is never trained.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

/// `[out, in]`, as it lies in memory.
#[derive(Debug, Clone)]
pub enum Weight {
    /// For the kernels of a CPU: f32, bf16 or blocks, with activations in f32.
    Packed(FrozenMatrix),
    /// For candle's own product.
    Plain(Tensor),
}

impl Weight {
    /// Packs what the CPU has kernels for; f16 is kept as f32, which holds it exactly.
    pub fn new(weight: Tensor) -> Result<Self> {
        let (n, k) = weight.dims2()?;
        if !weight.device().is_cpu() {
            return Ok(Self::Plain(weight));
        }
        let packed = match weight.dtype() {
            DType::F32 => with_values(&weight, |w| Ok(PackedMatrix::from_f32(w, n, k)?))?,
            DType::F16 => with_values(&weight.to_dtype(DType::F32)?, |w| Ok(PackedMatrix::from_f32(w, n, k)?))?,
            DType::BF16 => {
                let weight = weight.contiguous()?;
                let (storage, layout) = weight.storage_and_layout();
                let Storage::Cpu(storage) = &*storage else { bail!("the weight is not on the CPU") };
                let values = &storage.as_slice::<bf16>()?[layout.start_offset()..][..n * k];
                PackedMatrix::from_bf16(values, n, k)?
            }
            _ => return Ok(Self::Plain(weight)),
        };
        Ok(Self::Packed(FrozenMatrix::new(packed)))
    }

    /// Keeps blocks of `n` rows of `k` values as they are, for the kernels of a CPU.
    pub fn from_blocks(format: BlockFormat, bytes: Vec<u8>, n: usize, k: usize) -> Self {
        Self::Packed(FrozenMatrix::new(PackedMatrix::from_blocks(format, bytes, n, k)))
    }

    /// Rows `ids` of the matrix, `[t, in]`, in the type of activations.
    pub fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain(weight) => weight.index_select(ids, 0),
            Self::Packed(weight) => {
                let (ids, matrix) = (ids.to_vec1::<u32>()?, weight.matrix());
                let (n, k) = (matrix.n(), matrix.k());
                let mut values = vec![0f32; ids.len() * k];
                for (&id, out) in ids.iter().zip(values.chunks_exact_mut(k)) {
                    if id as usize >= n {
                        bail!("token {id} is not in a vocabulary of {n}");
                    }
                    matrix.row(id as usize, out);
                }
                Tensor::from_vec(values, (ids.len(), k), &candle_core::Device::Cpu)
            }
        }
    }

    /// The whole matrix, `[out, in]`.
    pub fn to_tensor(&self) -> Result<Tensor> {
        match self {
            Self::Plain(weight) => Ok(weight.clone()),
            Self::Packed(weight) => {
                let ids: Vec<u32> = (0..weight.matrix().n() as u32).collect();
                self.rows(&Tensor::new(ids, &candle_core::Device::Cpu)?)
            }
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Packed(weight) => weight.forward(x, None, None),
            Self::Plain(weight) if x.track_op() && x.device().is_cpu() => {
                x.contiguous()?.apply_op1(FrozenMatmul { weight: weight.clone() })
            }
            Self::Plain(weight) => x.matmul(&weight.t()?),
        }
    }
}

impl Linear {
    /// `bias` is `[out]`.
    pub fn new(weight: Weight, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// The weight, and the bias if there is one.
    pub fn tensors(&self) -> impl Iterator<Item = Result<Tensor>> {
        std::iter::once(self.weight.to_tensor()).chain(self.bias.clone().map(Ok))
    }

    /// `[t, in]` to `[t, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.weight {
            Weight::Packed(weight) => weight.forward(x, self.bias.as_ref(), None),
            weight => match &self.bias {
                Some(bias) => weight.forward(x)?.broadcast_add(bias),
                None => weight.forward(x),
            },
        }
    }

    /// As [`forward`](Self::forward), added to `residual` `[t, out]`.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        match &self.weight {
            Weight::Packed(weight) => weight.forward(x, self.bias.as_ref(), Some(residual)),
            Weight::Plain(_) => residual + self.forward(x)?,
        }
    }

    /// Several layers of one input, in one go where that is faster.
    pub fn forward_all<const N: usize>(layers: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        let packed = layers.map(|l| match &l.weight {
            Weight::Packed(weight) => Some((weight, l.bias.as_ref())),
            Weight::Plain(_) => None,
        });
        if !x.track_op() && packed.iter().all(Option::is_some) {
            let packed: Vec<_> = packed.into_iter().flatten().collect();
            if let Ok(packed) = packed.try_into() {
                return FrozenMatrix::forward_all::<N>(packed, x, None);
            }
        }
        let all = layers.iter().map(|l| l.forward(x)).collect::<Result<Vec<_>>>()?;
        all.try_into().map_err(|_| candle_core::Error::Msg("as many results as layers".to_owned()))
    }

    /// `activation(gate(x)) * up(x)`, in one go where that is faster.
    pub fn forward_gated(
        gate: &Self,
        up: &Self,
        activation: Activation,
        x: &Tensor,
        kernels: &mut dyn Kernels,
    ) -> Result<Tensor> {
        match (&gate.weight, &up.weight) {
            (Weight::Packed(g), Weight::Packed(u)) if !x.track_op() && gate.bias.is_none() && up.bias.is_none() => {
                FrozenMatrix::forward_gated(g, u, activation, x)
            }
            _ => kernels.gated(activation, &gate.forward(x)?, &up.forward(x)?),
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
        for (weight, tolerance) in [
            (Weight::Plain(weight.clone()), 1e-5),
            (Weight::new(weight.clone()).unwrap(), 1e-5),
            (Weight::new(weight.to_dtype(DType::BF16).unwrap()).unwrap(), 0.1),
        ] {
            let ours = Linear::new(weight, None).forward(x.as_tensor()).unwrap();
            let close = |a: Vec<Vec<f32>>, b: Vec<Vec<f32>>| {
                for (a, b) in a.iter().flatten().zip(b.iter().flatten()) {
                    assert!((a - b).abs() < tolerance, "{a} {b}");
                }
            };
            close(ours.to_vec2().unwrap(), plain.to_vec2().unwrap());
            close(grad(&ours), grad(&plain));
        }
    }
}
