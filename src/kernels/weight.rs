//! Frozen matrices: as a file has them, as a backend keeps them, and the linear layers made of them.

use std::{any::Any, fmt, sync::Arc};

use candle_core::{Device, Result, Tensor, bail};

use super::{Kernels, quantized::BlockFormat, stored::StoredBytes};

/// A matrix `[n, k]` as a file has it, on the host.
#[derive(Debug, Clone)]
pub enum Matrix {
    /// Values of any float type.
    Values(Tensor),
    /// ggml's blocks of a GGUF file.
    Blocks(Blocks),
}

/// The values of a tensor in one of ggml's formats, as a GGUF file has them or in that file.
#[derive(Debug, Clone)]
pub struct Blocks {
    pub format: BlockFormat,
    /// In PyTorch's order: the last dimension is the one whose values lie side by side.
    pub shape: Vec<usize>,
    pub bytes: StoredBytes,
}

impl Blocks {
    /// All values, in f32.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn values(&self) -> std::io::Result<Vec<f32>> {
        let mut values = vec![0f32; self.shape.iter().product()];
        self.format.dequantize(self.bytes.read(0..self.bytes.len(), &mut Vec::new())?, &mut values);
        Ok(values)
    }
}

impl Matrix {
    /// `n` rows from `first` on.
    ///
    /// # Errors
    /// There are no such rows.
    pub fn rows(&self, first: usize, n: usize) -> Result<Self> {
        match self {
            Self::Values(values) => Ok(Self::Values(values.narrow(0, first, n)?)),
            Self::Blocks(blocks) => {
                let (rows, k) = self.dims2()?;
                if first + n > rows {
                    bail!("rows {first} to {} of a matrix of {rows}", first + n);
                }
                let size = blocks.bytes.len() / rows.max(1);
                let bytes = blocks.bytes.range(first * size..(first + n) * size)?;
                Ok(Self::Blocks(Blocks { format: blocks.format, bytes, shape: vec![n, k] }))
            }
        }
    }

    /// Its rows and columns.
    ///
    /// # Errors
    /// It is no matrix.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        match self {
            Self::Values(values) => values.dims2(),
            Self::Blocks(blocks) => match blocks.shape[..] {
                [n, k] => Ok((n, k)),
                _ => bail!("a matrix was expected, found {:?}", blocks.shape),
            },
        }
    }

    /// Its values, on the host; in f32 if they are in blocks.
    ///
    /// # Errors
    /// The shape does not fit the bytes, or the file cannot be read.
    pub fn values(&self) -> Result<Tensor> {
        match self {
            Self::Values(values) => Ok(values.clone()),
            Self::Blocks(blocks) => Tensor::from_vec(blocks.values()?, blocks.shape.as_slice(), &Device::Cpu),
        }
    }
}

/// A frozen matrix `[n, k]` as a backend keeps it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Weight(Arc<dyn FrozenWeight>);

/// What a backend implements for the matrices it keeps.
pub trait FrozenWeight: fmt::Debug + Send + Sync {
    /// Rows `n` and columns `k`.
    fn dims(&self) -> (usize, usize);

    /// Rows `ids` `[t]` of the matrix, `[t, k]`, in the type of activations: an embedding, where it is the table. The ids
    /// are best on the host.
    ///
    /// # Errors
    /// There is no such row.
    fn rows(&self, ids: &Tensor) -> Result<Tensor>;

    /// The whole matrix, `[n, k]`.
    ///
    /// # Errors
    /// There is no memory.
    fn to_tensor(&self) -> Result<Tensor>;

    /// For the backend that made it.
    fn as_any(&self) -> &dyn Any;
}

impl Weight {
    /// A backend's matrix.
    pub fn new(weight: impl FrozenWeight + 'static) -> Self {
        Self(Arc::new(weight))
    }

    /// The backend's own type.
    ///
    /// # Errors
    /// Another backend made it.
    pub fn downcast<T: 'static>(&self) -> Result<&T> {
        match self.0.as_any().downcast_ref() {
            Some(own) => Ok(own),
            None => bail!("a weight of another backend: {:?}", self.0.dims()),
        }
    }
}

impl std::ops::Deref for Weight {
    type Target = dyn FrozenWeight;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

/// A linear layer `y = x Wᵀ + b` that is never trained.
#[derive(Debug, Clone)]
pub struct Linear {
    /// What the model's files call it.
    pub name: String,
    /// `[out, in]`
    pub weight: Weight,
    /// `[out]`
    pub bias: Option<Tensor>,
}

impl Linear {
    /// `[t, in]` to `[t, out]`.
    ///
    /// # Errors
    /// The input does not fit.
    pub fn forward(&self, x: &Tensor, kernels: &mut dyn Kernels) -> Result<Tensor> {
        let [y] = Self::forward_all([self], x, kernels)?;
        Ok(y)
    }

    /// As [`forward`](Self::forward), added to `residual` `[t, out]`.
    ///
    /// # Errors
    /// As there.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor, kernels: &mut dyn Kernels) -> Result<Tensor> {
        let [y] = exactly(kernels.linear(x, &[self], Some(residual))?)?;
        Ok(y)
    }

    /// Several layers of one input.
    ///
    /// # Errors
    /// As there.
    pub fn forward_all<const N: usize>(
        layers: [&Self; N],
        x: &Tensor,
        kernels: &mut dyn Kernels,
    ) -> Result<[Tensor; N]> {
        exactly(kernels.linear(x, &layers, None)?)
    }

    /// The weight, and the bias if there is one.
    pub fn tensors(&self) -> impl Iterator<Item = Result<Tensor>> {
        std::iter::once(self.weight.to_tensor()).chain(self.bias.clone().map(Ok))
    }
}

fn exactly<const N: usize>(results: Vec<Tensor>) -> Result<[Tensor; N]> {
    results.try_into().map_err(|found: Vec<_>| {
        candle_core::Error::Msg(format!("a backend gave {} results for {N} linear layers", found.len()))
    })
}
