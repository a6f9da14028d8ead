//! A step to packed tensors to logits. The only place where a learned prompt meets the model: its
//! rows go where token embeddings go, its keys and values straight into the cache.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, bail};

use super::{cache::BlockCopy, request::InputToken};
use crate::{
    kernels::{
        Backend, KvCache, Largest,
        cross::CrossKeyValues,
        host::with_values,
        layout::{BatchLayout, BlockId, Segment, TokenTree},
    },
    model::Model,
    packing::{
        embed::{EmbeddingSource, embed},
        leading_virtual_tokens,
    },
    prompt::{LearnedPrompt, learned::KeyValues},
};

/// The model, which others may share, and its key-value cache.
#[derive(Debug)]
pub struct Runner {
    model: Arc<Model>,
    cache: Box<dyn KvCache>,
}

/// Positions of one sequence to compute.
#[derive(Debug, Clone, Copy, Default)]
pub struct Part<'a> {
    pub tokens: &'a [InputToken],
    /// How many rows of the sequence come before them.
    pub start: usize,
    pub blocks: &'a [BlockId],
    /// The tree that the sequence ends with, if it does.
    pub tree: Option<&'a Arc<TokenTree>>,
    pub prompt: Option<&'a Arc<LearnedPrompt>>,
    /// What the encoder made of the sequence's input, if the model has an encoder.
    pub encoded: Option<&'a CrossKeyValues>,
    /// How many of the last ones have logits that are wanted.
    pub wanted: usize,
    /// Of which ids the log-probabilities are wanted, for each of these rows, in place of all logits; empty where the
    /// logits are wanted.
    pub scored: &'a [Vec<u32>],
}

/// What a forward pass gives.
#[derive(Debug)]
pub struct Output {
    /// The logits of the rows of all parts that are not scored, in order.
    pub logits: Logits,
    /// The log-probabilities that the rows of the others are scored with, in order; all NaN of a row whose logits are not
    /// finite.
    pub scores: Vec<Vec<f32>>,
}

/// What the next tokens are chosen from: rows `[vocab]` of f32 on the model's device.
#[derive(Debug, Default)]
pub struct Logits(Option<Tensor>);

impl Logits {
    /// How many rows there are.
    pub fn num_rows(&self) -> usize {
        self.0.as_ref().map_or(0, |logits| logits.dims()[0])
    }

    /// The largest value of each row, if `backend` finds it on the device.
    ///
    /// # Errors
    /// The device fails.
    pub fn largest(&self, backend: &dyn Backend) -> Result<Option<Vec<Largest>>> {
        self.0.as_ref().map_or(Ok(None), |logits| backend.largest(logits))
    }

    /// Calls `f` with some rows, in the order of `rows`, on the host.
    ///
    /// # Errors
    /// There is no such row, or `f` fails.
    pub fn with_rows<R>(&self, rows: &[usize], f: impl FnOnce(&[&[f32]]) -> Result<R>) -> Result<R> {
        let Some(logits) = self.0.as_ref().filter(|_| !rows.is_empty()) else { return f(&[]) };
        let all = self.num_rows();
        if rows.iter().any(|&row| row >= all) {
            bail!("rows {rows:?} of {all} rows of logits were asked for");
        }
        // Of a device with memory of its own, only what is asked for is copied.
        let (copied, taken): (_, Vec<usize>) = match logits.device().is_cpu() || rows.len() == all {
            true => (logits.to_device(&Device::Cpu)?, rows.to_vec()),
            false => {
                let index = Tensor::new(rows.iter().map(|&row| row as u32).collect::<Vec<_>>(), logits.device())?;
                (logits.index_select(&index, 0)?.to_device(&Device::Cpu)?, (0..rows.len()).collect())
            }
        };
        let vocab = copied.dim(1)?;
        with_values(&copied, |values| f(&taken.iter().map(|row| &values[row * vocab..][..vocab]).collect::<Vec<_>>()))
    }
}

impl Runner {
    /// A runner with `num_blocks` blocks of cache.
    ///
    /// # Errors
    /// The system does not give the memory.
    pub fn new(model: impl Into<Arc<Model>>, num_blocks: usize) -> Result<Self> {
        let model = model.into();
        let cache = model.backend().kv_cache(model.kv_shape(), num_blocks)?;
        Ok(Self { model, cache })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Copies beginnings of blocks, in order.
    pub fn copy(&mut self, copies: &[BlockCopy]) -> Result<()> {
        copies.iter().try_for_each(|copy| self.cache.copy(copy.from, copy.to, copy.slots))
    }

    /// Computes all parts in one forward pass; what a prompt of keys and values says of its positions
    /// is only copied. Returns what is wanted of them.
    pub fn run(&mut self, parts: &[Part]) -> Result<Output> {
        let mut computed = Vec::with_capacity(parts.len());
        for &part in parts {
            computed.extend(self.place(part)?);
        }
        if computed.is_empty() {
            return Ok(Output { logits: Logits(None), scores: Vec::new() });
        }
        self.forward(&computed)
    }

    /// Computes all inputs of the encoder in one forward pass, each in one part: a prompt's rows and a
    /// text. Returns what the decoder finds in each, in order.
    pub fn run_encoder(&mut self, inputs: &[Part]) -> Result<Vec<CrossKeyValues>> {
        if inputs.is_empty() {
            return Ok(Vec::new());
        }
        let x = self.embed(inputs)?;
        let segment = |input: &Part| Segment::new(input.tokens.len(), 0, Vec::new());
        let batch = BatchLayout { segments: inputs.iter().map(segment).collect(), ..Default::default() };
        let mut kernels = self.model.backend().serving(&mut *self.cache, &batch, &[])?;
        let hidden = self.model.run_encoder(&x, kernels.as_mut())?;
        let layers = self.model.cross_key_values(&hidden, kernels.as_mut())?;
        batch.rows().map(|rows| CrossKeyValues::of_rows(&layers, rows.start, rows.len())).collect()
    }

    /// Writes the keys and values that a part's prompt has for its positions. Returns what is left
    /// to compute.
    fn place<'a>(&mut self, part: Part<'a>) -> Result<Option<Part<'a>>> {
        let Some(LearnedPrompt::KeyValues(prompt)) = part.prompt.map(Arc::as_ref) else { return Ok(Some(part)) };
        let len = leading_virtual_tokens(part.tokens);
        if len > 0 {
            self.write(prompt, part.start, len, part.blocks)?;
        }
        let rest = Part { tokens: &part.tokens[len..], start: part.start + len, ..part };
        match rest.tokens {
            [] if part.wanted > 0 => bail!("there is no text to continue after a prompt of keys and values"),
            [] => Ok(None),
            _ => Ok(Some(rest)),
        }
    }

    /// Puts `len` positions of a prompt from `start` on into the cache.
    fn write(&mut self, prompt: &KeyValues, start: usize, len: usize, blocks: &[BlockId]) -> Result<()> {
        let layers = self.cache.shape().num_layers;
        if prompt.layers.len() != layers {
            bail!("a prompt has keys and values of {} layers, the model has {layers}", prompt.layers.len())
        }
        for (i, layer) in prompt.layers.iter().enumerate() {
            let (keys, values) = (layer.keys.narrow(1, start, len)?, layer.values.narrow(1, start, len)?);
            self.cache.write(i, blocks, start, &keys, &values)?;
        }
        Ok(())
    }

    fn forward(&mut self, parts: &[Part]) -> Result<Output> {
        let x = self.embed(parts)?;
        let segment =
            |p: &Part| Segment { tree: p.tree.cloned(), ..Segment::new(p.tokens.len(), p.start, p.blocks.to_vec()) };
        let mut batch = BatchLayout { segments: parts.iter().map(segment).collect(), ..Default::default() };
        let wanted =
            |(rows, p): (std::ops::Range<usize>, &Part)| rows.end.saturating_sub(p.wanted) as u32..rows.end as u32;
        // First the rows whose logits are wanted, then those that are scored.
        let of = |scored: bool| {
            let those = batch.rows().zip(parts).filter(move |(_, p)| p.scored.is_empty() != scored);
            those.flat_map(wanted).collect::<Vec<u32>>()
        };
        let (mut rows, scored) = (of(false), of(true));
        let (num_logits, num_scored) = (rows.len(), scored.len());
        rows.extend(scored);
        batch.wanted = rows;
        if batch.wanted.is_empty() {
            // Keys and values are all that is wanted; a pass gives at least one row.
            batch.wanted.push(0);
        }
        let encoded: Vec<&CrossKeyValues> = parts.iter().filter_map(|p| p.encoded).collect();
        let mut kernels = self.model.backend().serving(&mut *self.cache, &batch, &encoded)?;
        let hidden = self.model.forward(&x, &batch, kernels.as_mut())?;
        let logits = match num_logits {
            0 => None,
            rows => Some(self.model.logits(&hidden.narrow(0, 0, rows)?, kernels.as_mut())?),
        };
        let scores = match num_scored {
            0 => Vec::new(),
            rows => {
                let ids: Vec<Vec<u32>> = parts.iter().flat_map(|p| p.scored).cloned().collect();
                self.model.score(&hidden.narrow(0, num_logits, rows)?, &ids, kernels.as_mut())?
            }
        };
        Ok(Output { logits: Logits(logits), scores })
    }

    /// The packed embeddings of all parts, `[t, hidden]`.
    fn embed<'a>(&self, parts: &[Part<'a>]) -> Result<Tensor> {
        let source = |part: &Part<'a>| {
            let prompt_rows = match part.prompt.map(Arc::as_ref) {
                Some(LearnedPrompt::Embeddings(prompt)) => Some(&prompt.rows),
                Some(LearnedPrompt::KeyValues(_)) | None => None,
            };
            EmbeddingSource { tokens: part.tokens, prompt_rows }
        };
        embed(&self.model, &parts.iter().map(source).collect::<Vec<_>>())
    }
}
