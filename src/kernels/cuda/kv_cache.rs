//! The key-value cache on the device, in the order in which the attention kernels read it.

use std::{any::Any, sync::Arc};

use candle_core::{DType, Device, Result, Tensor, bail};
use cudarc::driver::{CudaFunction, CudaSlice};
use half::bf16;

use super::module::{Cuda, ELEMENT_THREADS, plain};
use crate::kernels::{
    KvCache,
    layout::{BLOCK_SIZE, BlockId, KvShape},
    norm::QkNorms,
};

/// Keys and values of each layer, both `[num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]`.
#[derive(Debug)]
pub struct CudaKvCache {
    cuda: Arc<Cuda>,
    shape: KvShape,
    num_blocks: usize,
    layers: Vec<[Values; 2]>,
}

/// What is done to queries and keys before the keys are written.
#[derive(Debug, Clone, Copy, Default)]
pub struct BeforeWriting<'a> {
    /// Root-mean-square norms of each head.
    pub norms: Option<&'a QkNorms>,
    /// The cosines and sines of a rotary embedding.
    pub rotation: Option<(&'a Tensor, &'a Tensor)>,
}

impl BeforeWriting<'_> {
    /// Whether queries become others.
    pub fn changes_queries(&self) -> bool {
        self.norms.is_some() || self.rotation.is_some()
    }
}

#[derive(Debug)]
enum Values {
    F32(CudaSlice<f32>),
    Bf16(CudaSlice<bf16>),
}

impl CudaKvCache {
    /// A cache of `num_blocks` blocks.
    ///
    /// # Errors
    /// The device has no memory for it, or the type is neither f32 nor bf16.
    pub fn new(cuda: Arc<Cuda>, shape: KvShape, num_blocks: usize) -> Result<Self> {
        if !shape.head_dim.is_multiple_of(2) || shape.head_dim > 256 {
            bail!("the CUDA backend computes with heads of an even size up to 256, and these have {}", shape.head_dim);
        }
        let count = num_blocks * BLOCK_SIZE * shape.num_kv_heads * shape.head_dim;
        let values = || match shape.dtype {
            DType::F32 => Ok(Values::F32(cuda.uninitialised(count)?)),
            DType::BF16 => Ok(Values::Bf16(cuda.uninitialised(count)?)),
            other => bail!("a key-value cache on a GPU is in f32 or bf16, not in {}", other.as_str()),
        };
        let layers = (0..shape.num_layers).map(|_| Ok([values()?, values()?])).collect::<Result<_>>()?;
        Ok(Self { cuda, shape, num_blocks, layers })
    }

    /// The addresses of a layer's keys and values.
    ///
    /// # Errors
    /// There is no such layer.
    pub fn layer(&self, layer: usize) -> Result<[u64; 2]> {
        let Some(layers) = self.layers.get(layer) else {
            bail!("the cache has {} layers, and layer {layer} was asked for", self.layers.len())
        };
        Ok(layers.each_ref().map(|values| match values {
            Values::F32(values) => self.cuda.address_of(values),
            Values::Bf16(values) => self.cuda.address_of(values),
        }))
    }

    /// Whether keys and values are in bf16.
    pub fn is_bf16(&self) -> bool {
        self.shape.dtype == DType::BF16
    }

    /// Writes keys and values, rows of all kv heads' values in f32, to as many slots, the keys as `before` makes them. Queries
    /// go to the address `q_out`, if they change.
    ///
    /// # Errors
    /// A shape does not fit, or there is no such layer.
    ///
    /// # Safety
    /// `slots` is the address of a slot of this cache for every row; `q_out` has room for as many rows of `heads` heads, if
    /// queries change.
    pub unsafe fn prepare_and_write(
        &mut self,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        before: &BeforeWriting<'_>,
        heads: usize,
        slots: u64,
        q_out: u64,
    ) -> Result<()> {
        let KvShape { num_kv_heads, head_dim, .. } = self.shape;
        let (rows, width) = (k.dims()[0], num_kv_heads * head_dim);
        let fits = |x: &Tensor, width: usize| x.dims()[0] == rows && x.elem_count() == rows * width;
        if !fits(q, heads * head_dim) || !fits(k, width) || !fits(v, width) {
            bail!("queries {:?}, keys {:?} and values {:?} do not fit {:?}", q.dims(), k.dims(), v.dims(), self.shape);
        }
        let rotation = match before.rotation {
            Some((cos, sin)) => Some((plain(cos)?, plain(sin)?)),
            None => None,
        };
        let half = rotation.as_ref().map_or(0, |(cos, _)| cos.dims()[1]);
        if let Some((cos, sin)) = rotation.as_ref()
            && (2 * half > head_dim || cos.dims() != [rows, half] || sin.dims() != cos.dims())
        {
            bail!("a rotary embedding of {:?} does not fit {rows} rows of heads of {head_dim}", cos.dims());
        }
        let cuda = Arc::clone(&self.cuda);
        let [(q, q_stride), (k, k_stride), (v, v_stride)] =
            [cuda.rows_of::<f32>(q)?, cuda.rows_of::<f32>(k)?, cuda.rows_of::<f32>(v)?];
        let cos = cuda.address_or_null::<f32>(rotation.as_ref().map(|(cos, _)| cos))?;
        let sin = cuda.address_or_null::<f32>(rotation.as_ref().map(|(_, sin)| sin))?;
        let [keys, values] = self.layer(layer)?;
        let (q_stride, k_stride, v_stride, half) = (q_stride as i32, k_stride as i32, v_stride as i32, half as i32);
        let (heads, kv_heads, dim) = (heads as i32, num_kv_heads as i32, head_dim as i32);
        if let Some(norms) = before.norms {
            let weights = [plain(&norms.queries.weight)?, plain(&norms.keys.weight)?];
            if !norms.by_head || weights.iter().any(|weight| weight.elem_count() != head_dim) {
                bail!("norms of queries and keys that are not of heads of {head_dim}");
            }
            let [q_weight, k_weight] = [cuda.address::<f32>(&weights[0])?, cuda.address::<f32>(&weights[1])?];
            let (q_eps, k_eps) = (norms.queries.eps as f32, norms.keys.eps as f32);
            let function = self.either(|f| [&f.norm_rotate_and_write_f32, &f.norm_rotate_and_write_bf16]);
            let launch = cuda.launch(function).arg(&q).arg(&k).arg(&v).arg(&q_stride).arg(&k_stride).arg(&v_stride);
            let launch = launch.arg(&q_weight).arg(&k_weight).arg(&q_eps).arg(&k_eps).arg(&cos).arg(&sin).arg(&half);
            let launch = launch.arg(&slots).arg(&q_out).arg(&keys).arg(&values).arg(&heads).arg(&kv_heads).arg(&dim);
            let warps = ELEMENT_THREADS / 32;
            let (parts, shared) = ((heads + kv_heads) as usize, warps * head_dim * size_of::<f32>());
            // SAFETY: as below; each weight has a value for each dimension of a head, and a warp its own part of the shared
            // memory.
            return unsafe { launch.run([rows, parts.div_ceil(warps), 1], ELEMENT_THREADS, shared) };
        }
        let function = self.either(|f| [&f.rotate_and_write_f32, &f.rotate_and_write_bf16]);
        let launch = cuda.launch(function).arg(&q).arg(&k).arg(&v).arg(&q_stride).arg(&k_stride).arg(&v_stride);
        let launch = launch.arg(&cos).arg(&sin).arg(&half).arg(&slots).arg(&q_out).arg(&keys).arg(&values);
        let launch = launch.arg(&heads).arg(&kv_heads).arg(&dim);
        // Few rows are spread over several blocks each.
        let parts = if rows < 64 { 8 } else { 1 };
        // SAFETY: q, k and v have `rows` rows of these heads, cos and sin too, as was checked; the slots are of this cache
        // and the queries' result is large enough, as the caller says.
        unsafe { launch.run([rows, parts, 1], ELEMENT_THREADS, 0) }
    }

    fn either(&self, of: impl FnOnce(&super::module::Functions) -> [&CudaFunction; 2]) -> &CudaFunction {
        of(&self.cuda.functions)[usize::from(self.is_bf16())]
    }
}

impl KvCache for CudaKvCache {
    fn shape(&self) -> &KvShape {
        &self.shape
    }

    fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    fn copy(&mut self, from: BlockId, to: BlockId, slots: usize) -> Result<()> {
        if from == to || from.max(to) as usize >= self.num_blocks {
            bail!("block {from} cannot be copied to block {to} of {}", self.num_blocks);
        }
        let (slots, dim) = (slots.min(BLOCK_SIZE) as i32, self.shape.head_dim as i32);
        let function = self.either(|f| [&f.copy_slots_f32, &f.copy_slots_bf16]);
        for layer in 0..self.layers.len() {
            let [keys, values] = self.layer(layer)?;
            let launch = self.cuda.launch(function).arg(&keys).arg(&values).arg(&from).arg(&to).arg(&slots).arg(&dim);
            // SAFETY: both blocks are in the cache and differ, and no block has more slots.
            unsafe { launch.run([self.shape.num_kv_heads, 1, 1], ELEMENT_THREADS, 0)? };
        }
        Ok(())
    }

    fn write(&mut self, layer: usize, blocks: &[BlockId], start: usize, keys: &Tensor, values: &Tensor) -> Result<()> {
        let end = start + keys.dim(1)?;
        if end > blocks.len() * BLOCK_SIZE || blocks.iter().any(|&block| block as usize >= self.num_blocks) {
            bail!("{end} positions do not lie in the blocks {blocks:?} of {}", self.num_blocks);
        }
        let slot = |p: usize| blocks[p / BLOCK_SIZE] * BLOCK_SIZE as u32 + (p % BLOCK_SIZE) as u32;
        let mut slots: Vec<u32> = (start..end).map(slot).collect();
        // An empty upload is refused.
        slots.push(0);
        let slots = self.cuda.device.clone_htod(&slots)?;
        let device = Device::Cuda(self.cuda.device.clone());
        let rows_first = |x: &Tensor| plain(&x.to_device(&device)?.transpose(0, 1)?);
        let (keys, values) = (rows_first(keys)?, rows_first(values)?);
        if keys.dims()[1..] != [self.shape.num_kv_heads, self.shape.head_dim] || values.dims() != keys.dims() {
            bail!("keys {:?} and values {:?} do not fit {:?}", keys.dims(), values.dims(), self.shape);
        }
        // Where nothing changes no queries are read.
        let (none, before) = (keys.narrow(1, 0, 0)?, BeforeWriting::default());
        // SAFETY: there is a slot for each position, in blocks that were found in the cache.
        unsafe { self.prepare_and_write(layer, [&none, &keys, &values], &before, 0, self.cuda.address_of(&slots), 0) }
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
