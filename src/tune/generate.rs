//! Greedy answers to many inputs at once, on the kernels that serve.

use candle_core::{D, Result, Tensor};

use crate::{
    kernels::{
        KvCache,
        cross::CrossKeyValues,
        layout::{BLOCK_SIZE, BatchLayout, BlockId, Segment},
    },
    model::Model,
    prompt::learned::{Embeddings, LearnedPrompt},
};

/// Sequences in a batch.
const BATCH: usize = 32;

/// A sequence that is being continued.
struct Running {
    index: usize,
    /// The embeddings `[rows, hidden]` of positions that are not in the cache yet.
    next: Tensor,
    /// Positions that are.
    computed: usize,
    blocks: Vec<BlockId>,
    /// What the encoder made of its input, if the model has an encoder.
    encoded: Option<CrossKeyValues>,
}

/// The likeliest tokens after `[prompt][input]` of each input, or those that a decoder writes where an
/// encoder reads it, up to EOS, which is left out, or to `max_tokens`, or to the end of the context. An
/// input without a token has no answer where no rows stand before it. `done` is told how many inputs
/// are answered.
pub fn greedy(
    model: &Model,
    prompt: Option<&LearnedPrompt>,
    inputs: &[Vec<u32>],
    max_tokens: usize,
    done: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<u32>>> {
    let mut outputs = vec![Vec::new(); inputs.len()];
    for start in (0..inputs.len()).step_by(BATCH) {
        let end = inputs.len().min(start + BATCH);
        batch(model, prompt, &inputs[start..end], max_tokens, &mut outputs[start..end])?;
        done(end);
    }
    Ok(outputs)
}

fn batch(
    model: &Model,
    prompt: Option<&LearnedPrompt>,
    inputs: &[Vec<u32>],
    max_tokens: usize,
    outputs: &mut [Vec<u32>],
) -> Result<()> {
    let info = model.info();
    let embed = |ids: &[u32]| model.embed(&Tensor::new(ids, &info.device)?);
    let (rows, given) = match prompt {
        Some(LearnedPrompt::Embeddings(Embeddings { rows })) => {
            let rows = rows.to_device(&info.device)?.to_dtype(info.dtype)?;
            (Some(rows.to_dtype(model.activation_dtype())?), None)
        }
        Some(LearnedPrompt::KeyValues(given)) => (None, Some(given)),
        None => (None, None),
    };
    let asked: Vec<usize> = (0..inputs.len()).filter(|&i| rows.is_some() || !inputs[i].is_empty()).collect();
    let opening = |&i: &usize| {
        let text = if inputs[i].is_empty() { None } else { Some(embed(&inputs[i])?) };
        Tensor::cat(&rows.iter().chain(&text).collect::<Vec<_>>(), 0)
    };
    let mut openings = asked.iter().map(opening).collect::<Result<Vec<_>>>()?;
    let mut encoded = Vec::new();
    if let Some(encoder) = &info.encoder {
        encoded = run_encoder(model, &openings)?;
        openings = vec![embed(&[encoder.start_token])?; asked.len()];
    }
    let mut encoded = encoded.into_iter();
    // Of a prompt of key-values, which are written into the cache below.
    let computed = given.and(prompt).map_or(0, LearnedPrompt::num_virtual_tokens);
    let mut blocks = 0;
    let mut running: Vec<Running> = Vec::new();
    for (index, next) in asked.into_iter().zip(openings) {
        let positions = (computed + next.dim(0)? + max_tokens).min(info.context_length);
        let own = positions.div_ceil(BLOCK_SIZE) as BlockId;
        running.push(Running {
            index,
            next,
            computed,
            blocks: (blocks..blocks + own).collect(),
            encoded: encoded.next(),
        });
        blocks += own;
    }
    let mut cache = model.backend().kv_cache(model.kv_shape(), blocks as usize)?;
    for (sequence, given) in running.iter().zip(given.iter().cycle()) {
        for (i, layer) in given.layers.iter().enumerate() {
            cache.write(i, &sequence.blocks, 0, &layer.keys, &layer.values)?;
        }
    }
    while !running.is_empty() {
        let chosen = step(model, &running, &mut *cache)?;
        let mut going_on = Vec::with_capacity(running.len());
        for (mut sequence, token) in running.into_iter().zip(chosen) {
            sequence.computed += sequence.next.dim(0)?;
            let output = &mut outputs[sequence.index];
            if info.eos_token_ids.contains(&token) {
                continue;
            }
            output.push(token);
            if output.len() < max_tokens && sequence.computed < info.context_length {
                sequence.next = embed(&[token])?;
                going_on.push(sequence);
            }
        }
        running = going_on;
    }
    Ok(())
}

/// What the encoder makes of inputs, embeddings `[rows, hidden]` each.
fn run_encoder(model: &Model, inputs: &[Tensor]) -> Result<Vec<CrossKeyValues>> {
    if inputs.is_empty() {
        return Ok(Vec::new());
    }
    let segment = |input: &Tensor| Ok(Segment { rows: input.dim(0)?, start: 0, blocks: Vec::new() });
    let segments = inputs.iter().map(segment).collect::<Result<_>>()?;
    let batch = BatchLayout { segments, ..Default::default() };
    // Nothing of an encoder's rows is kept.
    let mut cache = model.backend().kv_cache(model.kv_shape(), 0)?;
    let mut kernels = model.backend().serving(&mut *cache, &batch, &[])?;
    let hidden = model.run_encoder(&Tensor::cat(inputs, 0)?, kernels.as_mut())?;
    let layers = model.cross_key_values(&hidden, kernels.as_mut())?;
    batch.rows().map(|rows| CrossKeyValues::of_rows(&layers, rows.start, rows.len())).collect()
}

/// Computes what each sequence lacks and returns the likeliest next token of each.
fn step(model: &Model, running: &[Running], cache: &mut dyn KvCache) -> Result<Vec<u32>> {
    let mut batch = BatchLayout::default();
    for sequence in running {
        let (rows, start) = (sequence.next.dim(0)?, sequence.computed);
        batch.segments.push(Segment { rows, start, blocks: sequence.blocks.clone() });
    }
    batch.wanted = batch.rows().map(|rows| rows.end as u32 - 1).collect();
    let x = Tensor::cat(&running.iter().map(|sequence| &sequence.next).collect::<Vec<_>>(), 0)?;
    let encoded: Vec<&CrossKeyValues> = running.iter().filter_map(|sequence| sequence.encoded.as_ref()).collect();
    let mut kernels = model.backend().serving(cache, &batch, &encoded)?;
    let hidden = model.forward(&x, &batch, kernels.as_mut())?;
    let logits = model.logits(&hidden, kernels.as_mut())?;
    logits.argmax(D::Minus1)?.to_vec1()
}
