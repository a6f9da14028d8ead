//! Serving kernels for a GPU, over the blocks of a [`CudaKvCache`]. Activations are f32; where the weights are bf16, what
//! a product reads is rounded to bf16 by the kernel that makes it.

use candle_core::{DType, Device, Result, Tensor, TensorId, bail};
use cudarc::driver::CudaFunction;
use half::bf16;

use super::{
    choose,
    kv_cache::{BeforeWriting, CudaKvCache},
    module::{Cuda, plain, threads_for},
    products::{self, FEW_ROWS},
    rows::{self, Normed},
    scores::{BiasTables, ScoresParam},
    step::{StepIndices, TILE_QUERIES},
};
use crate::kernels::{
    Activation, AttentionParams, Kernels, KvCache as _, capped,
    cross::CrossKeyValues,
    layout::{BLOCK_SIZE, BatchLayout, RowIndices, Segment},
    norm::{Norm, NormKind, QkNorms},
    reference::attend,
    weight::Linear,
};

/// Warps of a block of `attend_rows`; see `cu/attention.cu`.
const ROW_WARPS: usize = 8;

/// Rows whose logits are on the device at a time when continuations are scored.
const SCORED_ROWS: usize = 256;

/// Heads that share a tile of queries: a kv head's group, if as many fit a tile evenly.
fn pack(group: usize) -> usize {
    if TILE_QUERIES.is_multiple_of(group) { group } else { 1 }
}

/// The kernels of one step.
#[derive(Debug)]
pub struct CudaServing<'a> {
    cuda: &'a Cuda,
    tables: &'a BiasTables,
    cache: &'a mut CudaKvCache,
    batch: &'a BatchLayout,
    encoded: &'a [&'a CrossKeyValues],
    /// Of a causal step, with the heads of a group that they were made for.
    indices: Option<(usize, StepIndices)>,
    /// The last norm's result in bf16, by the f32 tensor that it is a copy of.
    rounded: Option<(TensorId, Tensor)>,
}

impl<'a> CudaServing<'a> {
    pub fn new(
        cuda: &'a Cuda,
        tables: &'a BiasTables,
        cache: &'a mut CudaKvCache,
        batch: &'a BatchLayout,
        encoded: &'a [&'a CrossKeyValues],
    ) -> Self {
        Self { cuda, tables, cache, batch, encoded, indices: None, rounded: None }
    }

    fn check(&self, q: &Tensor) -> Result<()> {
        match (q.dim(0)?, self.batch.num_rows()) {
            (found, expected) if found != expected => bail!("{found} rows were given for a batch of {expected}"),
            _ => Ok(()),
        }
    }

    /// A norm's result in bf16, if `x` is that result.
    fn rounded(&self, x: &Tensor) -> Option<&Tensor> {
        self.rounded.as_ref().filter(|(id, _)| *id == x.id()).map(|(_, rounded)| rounded)
    }

    /// Keeps a norm's copy in bf16 for the products that read the result.
    fn keep(&mut self, normed: Normed) -> Tensor {
        let Normed { values, rounded } = normed;
        self.rounded = rounded.map(|rounded| (values.id(), rounded));
        values
    }

    /// Uploads the step's indices, for groups of so many heads, unless they are there.
    fn upload_indices(&mut self, group: usize) -> Result<()> {
        if self.indices.as_ref().is_none_or(|(of, _)| *of != group) {
            let dim = self.cache.shape().head_dim;
            let is_small = Self::tile_bytes(dim) <= self.cuda.shared_bytes;
            let tiled = self.cache.is_bf16() && self.tiles(dim).is_some() && is_small;
            let pack = tiled.then(|| pack(group));
            let indices = StepIndices::new(self.cuda, self.batch, self.cache.num_blocks(), pack)?;
            self.indices = Some((group, indices));
        }
        Ok(())
    }

    /// The kernel that computes tiles of queries of heads of this size, if there is one.
    fn tiles(&self, dim: usize) -> Option<&CudaFunction> {
        let f = &self.cuda.functions;
        match dim {
            16 => Some(&f.attend_tiles_1),
            32 => Some(&f.attend_tiles_2),
            64 => Some(&f.attend_tiles_4),
            80 => Some(&f.attend_tiles_5),
            96 => Some(&f.attend_tiles_6),
            128 => Some(&f.attend_tiles_8),
            256 => Some(&f.attend_tiles_16),
            _ => None,
        }
    }

    /// Bytes of shared memory of `attend_tiles`; see `cu/prefill.cu`.
    fn tile_bytes(dim: usize) -> usize {
        let floats = TILE_QUERIES * (dim + 8) + 4 * 16 * 40;
        let halves = (TILE_QUERIES + 2 * BLOCK_SIZE) * (dim + 8) + 4 * 16 * 48;
        4 * floats + 2 * halves
    }

    /// Attention of one sequence after another among their own rows (an encoder's).
    fn unmasked(&self, q: &Tensor, k: &Tensor, v: &Tensor, params: &AttentionParams) -> Result<Tensor> {
        let (q, k, v) = (plain(q)?, plain(k)?, plain(v)?);
        let of = |x: &Tensor, rows: &std::ops::Range<usize>| x.narrow(0, rows.start, rows.len());
        let out = self
            .batch
            .segments
            .iter()
            .zip(self.batch.rows())
            .map(|(segment, rows)| attend(&of(&q, &rows)?, &of(&k, &rows)?, &of(&v, &rows)?, segment, params));
        Tensor::cat(&out.collect::<Result<Vec<_>>>()?, 0)
    }

    /// Rows one by one; see the kernel `attend_rows`.
    fn attend_rows(
        &self,
        indices: &StepIndices,
        q: u64,
        [keys, values]: [u64; 2],
        out: u64,
        [heads, kv_heads, dim]: [usize; 3],
        scores: &ScoresParam,
    ) -> Result<()> {
        let (cuda, f) = (self.cuda, &self.cuda.functions);
        let group = heads / kv_heads;
        let queries = if group > 1 { 4 } else { 1 };
        let by_vectors = match (self.cache.is_bf16(), dim, queries) {
            (true, 64, 1) => Some(&f.attend_vectors_64_1),
            (true, 64, _) => Some(&f.attend_vectors_64_4),
            (true, 128, 1) => Some(&f.attend_vectors_128_1),
            (true, 128, _) => Some(&f.attend_vectors_128_4),
            (true, 256, 1) => Some(&f.attend_vectors_256_1),
            (true, 256, _) => Some(&f.attend_vectors_256_4),
            _ => None,
        };
        let function = by_vectors.unwrap_or(match (self.cache.is_bf16(), dim.div_ceil(64), queries) {
            (true, 1, 1) => &f.attend_rows_bf16_1_1,
            (true, 2, 1) => &f.attend_rows_bf16_2_1,
            (true, _, 1) => &f.attend_rows_bf16_4_1,
            (true, 1, _) => &f.attend_rows_bf16_1_4,
            (true, 2, _) => &f.attend_rows_bf16_2_4,
            (true, ..) => &f.attend_rows_bf16_4_4,
            (false, 1, 1) => &f.attend_rows_f32_1_1,
            (false, 2, 1) => &f.attend_rows_f32_2_1,
            (false, _, 1) => &f.attend_rows_f32_4_1,
            (false, 1, _) => &f.attend_rows_f32_1_4,
            (false, 2, _) => &f.attend_rows_f32_2_4,
            (false, ..) => &f.attend_rows_f32_4_4,
        });
        // Queries or scores, maxima and sums, and results of each warp.
        let own = if by_vectors.is_some() { ROW_WARPS * queries * 32 } else { queries * dim.next_multiple_of(8) };
        let shared = size_of::<f32>() * (own + ROW_WARPS * queries * (2 + dim));
        let splits = indices.splits;
        let num_partial = if splits > 1 { indices.num_rows * heads * splits } else { 0 };
        let partial = cuda.uninitialised::<f32>(num_partial * 2)?;
        let partial_out = cuda.uninitialised::<f32>(num_partial * dim)?;
        let (partial, partial_out) = (cuda.address_of(&partial), cuda.address_of(&partial_out));
        let (rows, places) = (indices.rows(), indices.places());
        let (of_rows, tables) = (indices.tables_of_rows(), indices.tables());
        let (num_heads, num_kv_heads, width) = (heads as i32, kv_heads as i32, dim as i32);
        let launch = cuda.launch(function).arg(&q).arg(&keys).arg(&values).arg(&rows).arg(&places).arg(&of_rows);
        let launch = launch.arg(&tables).arg(&out).arg(&partial).arg(&partial_out);
        let launch = launch.arg(&num_heads).arg(&num_kv_heads).arg(&width).arg(scores);
        let parts = group.div_ceil(queries);
        // SAFETY: the indices were checked against the cache and are those of q's rows; the partial results are as large
        // as the grid and the heads ask for; the shared memory is what the kernel lays out.
        unsafe { launch.run([indices.num_rows, kv_heads * parts, splits], ROW_WARPS * 32, shared)? };
        if splits > 1 {
            let function = if self.cache.is_bf16() { &f.join_splits_bf16 } else { &f.join_splits_f32 };
            let (splits, window) = (splits as i32, scores.window);
            let launch = cuda.launch(function).arg(&partial).arg(&partial_out).arg(&rows).arg(&places).arg(&of_rows);
            let launch = launch.arg(&tables).arg(&out).arg(&splits).arg(&width).arg(&window);
            // SAFETY: the same rows, heads and splits as before.
            unsafe { launch.run([indices.num_rows, heads, 1], threads_for(dim), 0)? };
        }
        Ok(())
    }

    /// Causal attention of rows whose queries and keys are prepared as `before` says, and an encoder's.
    fn attend(
        &mut self,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        dim: usize,
        before: &BeforeWriting<'_>,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        self.check(q)?;
        let t = q.dims()[0];
        let shape = *self.cache.shape();
        let heads_of = |x: &Tensor| x.elem_count() / (t * dim).max(1);
        let (heads, kv_heads) = (heads_of(q), heads_of(k));
        if !params.causal {
            let split = |x: &Tensor, heads: usize| plain(x)?.reshape((t, heads, dim));
            let (mut q, mut k, v) = (split(q, heads)?, split(k, kv_heads)?, split(v, kv_heads)?);
            if let Some((cos, sin)) = before.rotation {
                (q, k) = (self.rope(&q, cos, sin)?, self.rope(&k, cos, sin)?);
            }
            return self.unmasked(&q, &k, &v, params);
        }
        if kv_heads != shape.num_kv_heads || dim != shape.head_dim || heads % kv_heads.max(1) != 0 {
            bail!("attention was given {:?} and {:?} for a step of {t} rows and {shape:?}", q.dims(), k.dims());
        }
        let (cuda, group) = (self.cuda, heads / kv_heads);
        self.upload_indices(group)?;
        let Some((_, indices)) = &self.indices else { bail!("a step without indices") };
        let in_order = |x: &Tensor| x.dtype() == DType::F32 && x.narrow(0, 0, 1).is_ok_and(|row| row.is_contiguous());
        let rows = |x: &Tensor| if t > 0 && in_order(x) { Ok(x.clone()) } else { plain(x) };
        let (q, k, v) = (rows(q)?, rows(k)?, rows(v)?);
        // Unless they change, queries are read where they are, if they lie in order.
        let queries = match before.changes_queries() {
            true => cuda.tensor(cuda.uninitialised::<f32>(t * heads * dim)?, t * heads * dim),
            false => plain(&q)?,
        };
        let of_queries = cuda.address::<f32>(&queries)?;
        // SAFETY: the slots were made for this batch and checked against this cache, and there is room for all queries.
        unsafe {
            self.cache.prepare_and_write(layer, [&q, &k, &v], before, heads, indices.slots(), of_queries)?;
        };
        let (scores, _kept) = ScoresParam::new(cuda, self.tables, params, heads)?;
        let (q, cache) = (of_queries, self.cache.layer(layer)?);
        let run = |out: u64| -> Result<()> {
            if indices.num_rows > 0 {
                self.attend_rows(indices, q, cache, out, [heads, kv_heads, dim], &scores)?;
            }
            if let Some(function) = self.tiles(dim).filter(|_| indices.num_tiles > 0) {
                let ([keys, values], tiles, tables) = (cache, indices.tiles(), indices.tables());
                let (pack, num_heads, num_kv_heads) = (pack(group) as i32, heads as i32, kv_heads as i32);
                let launch = cuda.launch(function).arg(&q).arg(&keys).arg(&values).arg(&tiles).arg(&tables).arg(&out);
                let launch = launch.arg(&num_heads).arg(&num_kv_heads).arg(&pack).arg(&scores);
                let grid = [indices.num_tiles, heads / pack as usize, 1];
                // SAFETY: the tiles were made for this batch and checked against this cache, which is in bf16; the shared
                // memory is what the kernel lays out.
                unsafe { launch.run(grid, 128, Self::tile_bytes(dim))? };
            }
            Ok(())
        };
        if self.cache.is_bf16() {
            let out = cuda.uninitialised::<bf16>(t * heads * dim)?;
            run(cuda.address_of(&out))?;
            Ok(cuda.tensor(out, (t, heads * dim)))
        } else {
            let out = cuda.uninitialised::<f32>(t * heads * dim)?;
            run(cuda.address_of(&out))?;
            Ok(cuda.tensor(out, (t, heads * dim)))
        }
    }
}

impl Kernels for CudaServing<'_> {
    fn linear(&mut self, x: &Tensor, layers: &[&Linear], residual: Option<&Tensor>) -> Result<Vec<Tensor>> {
        products::linear(self.cuda, x, self.rounded(x), layers, residual)
    }

    fn gated_linear(&mut self, activation: Activation, gate: &Linear, up: &Linear, x: &Tensor) -> Result<Tensor> {
        products::gated_linear(self.cuda, activation, gate, up, x, self.rounded(x))
    }

    fn score(&mut self, x: &Tensor, head: &Linear, softcap: Option<f64>, ids: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        let mut all = Vec::with_capacity(ids.len());
        for (i, ids) in ids.chunks(SCORED_ROWS).enumerate() {
            let x = x.narrow(0, i * SCORED_ROWS, ids.len())?;
            let Some(logits) = self.linear(&x, &[head], None)?.pop() else { bail!("a layer gave no result") };
            all.extend(choose::log_probabilities(self.cuda, &capped(&logits, softcap)?, ids)?);
        }
        Ok(all)
    }

    fn row_indices(&mut self, _batch: &BatchLayout, heads: usize, _device: &Device) -> Result<RowIndices> {
        let kv_heads = self.cache.shape().num_kv_heads;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            bail!("{heads} heads of queries do not share {kv_heads} of keys");
        }
        self.upload_indices(heads / kv_heads)?;
        match &self.indices {
            Some((_, indices)) => indices.of_rows(),
            None => bail!("a step without indices"),
        }
    }

    fn pick(&mut self, x: &Tensor, rows: &Tensor) -> Result<Tensor> {
        rows::pick(self.cuda, x, rows)
    }

    fn rms_norm(&mut self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        self.norm(x, &Norm { weight: weight.clone(), kind: NormKind::Rms, eps })
    }

    fn layer_norm(&mut self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        self.norm(x, &Norm { weight: weight.clone(), kind: NormKind::Layer(bias.cloned()), eps })
    }

    fn norm(&mut self, x: &Tensor, norm: &Norm) -> Result<Tensor> {
        let normed = rows::norm(self.cuda, x, norm, self.cache.is_bf16())?;
        Ok(self.keep(normed))
    }

    fn adds_in_norm(&self, rows: usize) -> bool {
        // Our own products add a residual as they go; cuBLAS needs a copy of it first.
        rows > FEW_ROWS || !self.cache.is_bf16()
    }

    fn add_norm(
        &mut self,
        x: &Tensor,
        after: Option<&Norm>,
        residual: &Tensor,
        of_sum: &Norm,
    ) -> Result<(Tensor, Tensor)> {
        let apart = after.filter(|after| !rows::norms_before_it_adds(after, of_sum));
        let (x, after) = match apart {
            Some(apart) => (self.norm(x, apart)?, None),
            None => (x.clone(), after),
        };
        let (sum, normed) = rows::add_norm(self.cuda, &x, after, residual, of_sum, self.cache.is_bf16())?;
        Ok((sum, self.keep(normed)))
    }

    fn rope(&mut self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        rows::rope(self.cuda, x, cos, sin)
    }

    fn activate(&mut self, activation: Activation, x: &Tensor) -> Result<Tensor> {
        rows::activate(self.cuda, activation, x)
    }

    fn attention(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        let (_, _, head_dim) = q.dims3()?;
        self.rotary_attention(layer, [q, k, v], head_dim, None, params)
    }

    fn rotary_attention(
        &mut self,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        dim: usize,
        rotation: Option<(&Tensor, &Tensor)>,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        self.attend(layer, [q, k, v], dim, &BeforeWriting { norms: None, rotation }, params)
    }

    fn normed_rotary_attention(
        &mut self,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        dim: usize,
        norms: &QkNorms,
        rotation: Option<(&Tensor, &Tensor)>,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        let is_rms = |norm: &Norm| matches!(norm.kind, NormKind::Rms);
        if norms.by_head && is_rms(&norms.queries) && is_rms(&norms.keys) && params.causal {
            return self.attend(layer, [q, k, v], dim, &BeforeWriting { norms: Some(norms), rotation }, params);
        }
        let (q, k) = self.norm_queries_and_keys([q, k], dim, norms)?;
        self.rotary_attention(layer, [&q, &k, v], dim, rotation, params)
    }

    fn cross_attention(&mut self, layer: usize, q: &Tensor, params: &AttentionParams) -> Result<Tensor> {
        self.check(q)?;
        if self.encoded.len() != self.batch.segments.len() {
            bail!("{} sequences attend to {} encoder inputs", self.batch.segments.len(), self.encoded.len());
        }
        let q = plain(q)?;
        let one = |((segment, rows), encoded): ((&Segment, std::ops::Range<usize>), &&CrossKeyValues)| {
            let (keys, values) = encoded.layer(layer)?;
            attend(&q.narrow(0, rows.start, rows.len())?, &plain(keys)?, &plain(values)?, segment, params)
        };
        let segments = self.batch.segments.iter().zip(self.batch.rows());
        let out = segments.zip(self.encoded).map(one).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&out, 0)
    }
}
