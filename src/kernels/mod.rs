//! The seam between a model and what it runs on: a [`Backend`] keeps weights and the key-value cache, and its
//! [`Kernels`] are the operations of one forward pass. Nothing above this module names a backend; [`open`] chooses one.

pub mod cpu;
pub mod cross;
#[cfg(feature = "cuda")]
mod cuda;
pub mod host;
pub mod layout;
pub mod norm;
mod open;
mod params;
pub mod past;
pub mod quantized;
pub mod recording;
pub mod reference;
pub mod relative_position_bias;
pub mod rows;
pub mod stored;
#[cfg(test)]
mod suite;
pub mod weight;

use std::{any::Any, fmt, sync::Arc};

use candle_core::{D, DType, Device, Result, Tensor};

use cross::{CrossKeyValues, EncodedBatch};
use layout::{BatchLayout, BlockId, KvShape, RowIndices};
use norm::{Norm, NormKind, QkNorms};
pub use open::{BackendKind, HAS_CUDA, cpu, gpu, open, prepare_process, reference, return_freed_memory, set_threads};
pub use params::{Activation, AttentionParams, QuantisedProducts};
use past::PastKeyValues;
use rows::{PortableRows, RowKernels};
use weight::{Linear, Matrix, Weight};

/// Where a model runs: it keeps frozen weights and the key-value cache, and makes the kernels of each forward pass.
/// One for a process.
pub trait Backend: fmt::Debug + Send + Sync {
    /// What it calls itself in a log, with the instructions or the device it uses.
    fn name(&self) -> String;

    /// The device that hidden states and small tensors (norms, biases, position tables) are on.
    fn device(&self) -> &Device;

    /// The type of activations for weights of type `weights`.
    fn activation_dtype(&self, weights: DType) -> DType;

    /// Keeps a matrix for [`Kernels::linear`]: packed, uploaded, or as the blocks of its file, computed with as `dtype`.
    ///
    /// # Errors
    /// The backend does not compute with that type, or there is no memory.
    fn weight(&self, matrix: Matrix, dtype: DType) -> Result<Weight>;

    /// Matrices that are multiplied with the same input, so that the backend may keep them one after another and multiply
    /// all at once. They come back in their order.
    ///
    /// # Errors
    /// There is no memory.
    fn side_by_side(&self, weights: Vec<Weight>) -> Result<Vec<Weight>> {
        Ok(weights)
    }

    /// Bytes of one block of a cache of this shape, over all layers.
    fn block_bytes(&self, shape: &KvShape) -> usize;

    /// The memory of a device that has its own, in bytes; `None` where it is the system's.
    ///
    /// # Errors
    /// The device does not answer.
    fn memory(&self) -> Result<Option<DeviceMemory>> {
        Ok(None)
    }

    /// An empty key-value cache of `num_blocks` blocks.
    ///
    /// # Errors
    /// There is no memory.
    fn kv_cache(&self, shape: KvShape, num_blocks: usize) -> Result<Box<dyn KvCache>>;

    /// The kernels of one step of serving: keys and values of its rows are written to `cache` and those of earlier
    /// positions read from there. `encoded` has, for each segment, the cross-attention's keys and values; it is empty for
    /// a model without an encoder. Not differentiable.
    ///
    /// # Errors
    /// The cache is of another backend, or the layout has shared rows.
    fn serving<'a>(
        &'a self,
        cache: &'a mut dyn KvCache,
        batch: &'a BatchLayout,
        encoded: &'a [&'a CrossKeyValues],
    ) -> Result<Box<dyn Kernels + 'a>>;

    /// What a tuning job computes with. What it derives from the weights, such as transposed copies for gradients,
    /// belongs to the job and goes with it.
    fn tuning(&self) -> Arc<dyn Tuning>;

    /// The largest value of each row of logits `[t, vocab]`, where the backend finds it without copying the rows to the
    /// host; `None` where they are there already.
    ///
    /// # Errors
    /// The device fails.
    fn largest(&self, _logits: &Tensor) -> Result<Option<Vec<Largest>>> {
        Ok(None)
    }

    /// What tokens are chosen with on the host.
    fn row_kernels(&self) -> &dyn RowKernels {
        &PortableRows
    }

    /// Calls `task` with each of `0..tasks`, on the threads that the backend computes with where it has some.
    fn parallel(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}

/// The largest value of a row of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Largest {
    /// Its index, the first of equals.
    pub index: u32,
    /// The natural logarithm of its probability; NaN if no token can be chosen from the row, since a value is NaN or
    /// positive infinity or all are negative infinity.
    pub log_probability: f32,
}

/// Memory of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    pub free: usize,
    pub total: usize,
}

/// Keys and values of all sequences in blocks of [`BLOCK_SIZE`](layout::BLOCK_SIZE) positions.
pub trait KvCache: fmt::Debug + Send {
    /// The shape it was made for.
    fn shape(&self) -> &KvShape;

    /// How many blocks there are.
    fn num_blocks(&self) -> usize;

    /// Copies a block's first `slots` positions, of every layer, to another block.
    ///
    /// # Errors
    /// There is no such block, or both are the same.
    fn copy(&mut self, from: BlockId, to: BlockId, slots: usize) -> Result<()>;

    /// Writes keys and values of one layer that no forward pass computed, both `[num_kv_heads, rows, head_dim]` in any
    /// float type on any device, to the positions from `start` of a sequence that has these blocks.
    ///
    /// # Errors
    /// A shape does not fit, or there is no such layer or block.
    fn write(&mut self, layer: usize, blocks: &[BlockId], start: usize, keys: &Tensor, values: &Tensor) -> Result<()>;

    /// For the backend that made it.
    fn as_any_mut(&mut self) -> &mut dyn Any;
}

/// A tuning job's side of a backend.
pub trait Tuning: fmt::Debug + Send + Sync {
    /// Differentiable kernels for whole sequences, without a cache. `past` stands in for the keys and values of the
    /// layout's shared rows; `encoded` is what an encoder made of each sequence's input.
    ///
    /// # Errors
    /// The layout does not fit.
    fn kernels(
        &self,
        batch: &BatchLayout,
        past: Option<PastKeyValues>,
        encoded: Option<EncodedBatch>,
    ) -> Result<Box<dyn Kernels>>;
}

/// The operations of one forward pass, the products with the weights included.
///
/// Rows are packed: `t` rows of any number of sequences side by side, without padding. An implementation knows from its
/// [`BatchLayout`] which rows belong to which sequence and where their keys and values are.
pub trait Kernels {
    /// The positions of the step's rows and the rows that are wanted of it, on the device. `batch` is the layout that the
    /// kernels were made for, `heads` how many heads of queries each layer has.
    fn row_indices(&mut self, batch: &BatchLayout, _heads: usize, device: &Device) -> Result<RowIndices> {
        let (positions, wanted) = (batch.positions(), batch.wanted.as_slice());
        Ok(RowIndices { positions: Tensor::new(positions, device)?, wanted: Some(Tensor::new(wanted, device)?) })
    }

    /// Rows of `x` `[n, width]`, by their indices on the device.
    fn pick(&mut self, x: &Tensor, rows: &Tensor) -> Result<Tensor> {
        x.index_select(rows, 0)
    }

    /// Linear layers of one input: for each `x Wᵀ + bias`, plus `residual` if there is one. `x` is `[t, in]`, each
    /// result and `residual` `[t, out]`.
    fn linear(&mut self, x: &Tensor, layers: &[&Linear], residual: Option<&Tensor>) -> Result<Vec<Tensor>>;

    /// The inner layers of a gated MLP: `activation(gate(x)) * up(x)`, `[t, in]` to `[t, intermediate]`.
    fn gated_linear(&mut self, activation: Activation, gate: &Linear, up: &Linear, x: &Tensor) -> Result<Tensor>;

    /// A gated MLP: `down` of what [`gated_linear`](Self::gated_linear) returns for `[gate, up]`, plus `residual` if there is
    /// one. `x` is `[t, in]`, the result and `residual` `[t, out]`.
    fn gated_mlp(
        &mut self,
        activation: Activation,
        [gate, up]: [&Linear; 2],
        down: &Linear,
        x: &Tensor,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let inner = self.gated_linear(activation, gate, up, x)?;
        Ok(self.linear(&inner, &[down], residual)?.remove(0))
    }

    /// Of each row of `x` `[t, in]`, the natural log-probabilities of its ids under the softmax of the logits that `head`
    /// makes of it and `softcap` limits to `cap * tanh(logit / cap)`. All of a row are NaN if no token can be chosen from
    /// it: a logit is NaN or positive infinity, or all are negative infinity. That of an id outside of the vocabulary is
    /// negative infinity.
    ///
    /// The logits of many rows are large, so they are never all kept.
    ///
    /// # Errors
    /// A shape does not fit, or a device fails.
    fn score(&mut self, x: &Tensor, head: &Linear, softcap: Option<f64>, ids: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        const ROWS: usize = 32;
        let mut all = Vec::with_capacity(ids.len());
        for (i, ids) in ids.chunks(ROWS).enumerate() {
            let x = x.narrow(0, i * ROWS, ids.len())?;
            let logits = self.linear(&x, &[head], None)?.pop().map(|logits| capped(&logits, softcap));
            let Some(logits) = logits.transpose()? else { candle_core::bail!("a layer gave no result") };
            let vocab = logits.dim(1)?;
            host::with_values(&logits.to_dtype(DType::F32)?.to_device(&Device::Cpu)?, |logits| {
                all.extend(ids.iter().zip(logits.chunks(vocab)).map(|(ids, row)| rows::log_probabilities(row, ids)));
                Ok(())
            })?;
        }
        Ok(all)
    }

    /// Root-mean-square norm (Zhang & Sennrich 2019) over the last dimension of `x`, by `weight`,
    /// which is as long.
    fn rms_norm(&mut self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        let wide = x.to_dtype(widened(x.dtype()))?;
        let mean_square = wide.sqr()?.mean_keepdim(D::Minus1)?;
        wide.broadcast_div(&(mean_square + eps)?.sqrt()?)?.to_dtype(x.dtype())?.broadcast_mul(weight)
    }

    /// Layer norm (Ba et al. 2016) over the last dimension of `x`, by `weight` and `bias`, which are
    /// as long.
    fn layer_norm(&mut self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        let wide = x.to_dtype(widened(x.dtype()))?;
        let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let y = centred.broadcast_div(&(variance + eps)?.sqrt()?)?.to_dtype(x.dtype())?.broadcast_mul(weight)?;
        match bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    /// A norm over the last dimension of `x`.
    fn norm(&mut self, x: &Tensor, norm: &Norm) -> Result<Tensor> {
        match &norm.kind {
            NormKind::Rms => self.rms_norm(x, &norm.weight, norm.eps),
            NormKind::Layer(bias) => self.layer_norm(x, &norm.weight, bias.as_ref(), norm.eps),
        }
    }

    /// Whether what a product of so many rows is added to is better left to an [`add_norm`](Self::add_norm) after it.
    fn adds_in_norm(&self, _rows: usize) -> bool {
        false
    }

    /// The end of a branch: `residual + x`, or `residual +` the norm `after` of `x` where there is one, and the norm `of_sum`
    /// of that sum. Both are returned, in this order.
    fn add_norm(
        &mut self,
        x: &Tensor,
        after: Option<&Norm>,
        residual: &Tensor,
        of_sum: &Norm,
    ) -> Result<(Tensor, Tensor)> {
        let sum = match after {
            Some(after) => (residual + self.norm(x, after)?)?,
            None => (residual + x)?,
        };
        let normed = self.norm(&sum, of_sum)?;
        Ok((sum, normed))
    }

    /// Rotary embedding (Su et al. 2021), half-split form, of the first dimensions of each head of
    /// `x` `[t, heads, head_dim]`: of twice as many as per-row `cos` and `sin` have columns. The
    /// other dimensions stay.
    fn rope(&mut self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor>;

    /// Attention of layer `layer`, causal unless `params` says otherwise: `q` `[t, heads, head_dim]` against the keys and
    /// values of the same sequence, those of this call `[t, kv_heads, head_dim]` and those of earlier
    /// calls. Returns `[t, heads * head_dim]`.
    fn attention(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        params: &AttentionParams,
    ) -> Result<Tensor>;

    /// [`rope`](Self::rope) of queries and keys, where there is a rotation (cos and sin), and then
    /// [`attention`](Self::attention). `q` has `t` rows of all heads' values, `k` and `v` of all kv heads' values, in two
    /// dimensions or three; `head_dim` says how many are a head's.
    fn rotary_attention(
        &mut self,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        head_dim: usize,
        rotation: Option<(&Tensor, &Tensor)>,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        let heads = |x: &Tensor| x.reshape((x.dims()[0], x.elem_count() / (x.dims()[0] * head_dim).max(1), head_dim));
        let (mut q, mut k) = (heads(q)?, heads(k)?);
        if let Some((cos, sin)) = rotation {
            (q, k) = (self.rope(&q, cos, sin)?, self.rope(&k, cos, sin)?);
        }
        self.attention(layer, &q, &k, &heads(v)?, params)
    }

    /// Queries `[t, heads * head_dim]` and keys, each by its norm.
    fn norm_queries_and_keys(
        &mut self,
        [q, k]: [&Tensor; 2],
        head_dim: usize,
        norms: &QkNorms,
    ) -> Result<(Tensor, Tensor)> {
        let heads = |x: &Tensor| match norms.by_head {
            true => x.reshape((x.dims()[0], x.dims()[1] / head_dim.max(1), head_dim)),
            false => Ok(x.clone()),
        };
        Ok((self.norm(&heads(q)?, &norms.queries)?, self.norm(&heads(k)?, &norms.keys)?))
    }

    /// [`norm_queries_and_keys`](Self::norm_queries_and_keys) and then [`rotary_attention`](Self::rotary_attention).
    fn normed_rotary_attention(
        &mut self,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        head_dim: usize,
        norms: &QkNorms,
        rotation: Option<(&Tensor, &Tensor)>,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        let (q, k) = self.norm_queries_and_keys([q, k], head_dim, norms)?;
        self.rotary_attention(layer, [&q, &k, v], head_dim, rotation, params)
    }

    /// Attention of a decoder's layer `layer` to what its encoder made of each sequence's input, all of
    /// it: `q` `[t, heads, head_dim]` to `[t, heads * head_dim]`.
    fn cross_attention(&mut self, layer: usize, q: &Tensor, params: &AttentionParams) -> Result<Tensor>;

    /// The activation function of an MLP without a gate, of every value of `x` `[t, intermediate]`.
    fn activate(&mut self, activation: Activation, x: &Tensor) -> Result<Tensor> {
        activation.apply(x)
    }

    /// The natural log-probability of one target in each row of logits `[t, vocab]`: `[t]`.
    fn log_probabilities(&mut self, logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
        let targets = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
        candle_nn::ops::log_softmax(logits, D::Minus1)?.gather(&targets, 1)?.squeeze(1)
    }
}

/// `cap * tanh(x / cap)`, if there is a cap.
///
/// # Errors
/// The device fails.
pub fn capped(x: &Tensor, softcap: Option<f64>) -> Result<Tensor> {
    match softcap {
        Some(cap) => (x / cap)?.tanh()? * cap,
        None => Ok(x.clone()),
    }
}

/// The type that sums run in: at least f32.
fn widened(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}
