//! Greedy answers to many inputs at once, on the kernels that serve.

use candle_core::{D, Result, Tensor};

use crate::{
    kernels::{
        kv_cache::{BLOCK_SIZE, BlockId, KvCache},
        paged::{PagedKernels, Segment},
    },
    model::Model,
    prompt::learned::{Embeddings, LearnedPrompt},
};

/// Sequences in a batch.
const BATCH: usize = 32;

/// A sequence that is being continued.
struct Running {
    index: usize,
    /// Tokens that are not in the cache yet.
    next: Vec<u32>,
    /// Positions that are.
    computed: usize,
    blocks: Vec<BlockId>,
}

/// The likeliest tokens after `[prompt][input]` of each input, up to EOS, which is left out, or to
/// `max_tokens`, or to the end of the context. An input without a token has no answer where no rows
/// stand before it. `done` is told how many inputs are answered.
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
    let n = prompt.map_or(0, LearnedPrompt::num_virtual_tokens);
    let (rows, given) = match prompt {
        Some(LearnedPrompt::Embeddings(Embeddings { rows })) => {
            let rows = rows.to_device(&info.device)?.to_dtype(info.dtype)?;
            (Some(rows.to_dtype(model.activation_dtype())?), None)
        }
        Some(LearnedPrompt::KeyValues(given)) => (None, Some(given)),
        None => (None, None),
    };
    let before = if rows.is_some() { n } else { 0 };
    let mut blocks = 0;
    let mut running: Vec<Running> = Vec::new();
    for (index, input) in inputs.iter().enumerate().filter(|(_, input)| before + input.len() > 0) {
        let positions = (n + input.len() + max_tokens).min(info.context_length);
        let own = positions.div_ceil(BLOCK_SIZE) as BlockId;
        running.push(Running {
            index,
            next: input.clone(),
            computed: n - before,
            blocks: (blocks..blocks + own).collect(),
        });
        blocks += own;
    }
    let mut cache = KvCache::new(model.kv_shape(), blocks as usize)?;
    for (sequence, given) in running.iter().zip(given.iter().cycle()) {
        for (i, layer) in given.layers.iter().enumerate() {
            cache.write(i, &sequence.blocks, 0, &layer.keys, &layer.values)?;
        }
    }
    while !running.is_empty() {
        let chosen = step(model, rows.as_ref(), before, &running, &mut cache)?;
        running = running
            .into_iter()
            .zip(chosen)
            .filter_map(|(mut sequence, token)| {
                let prefix = if sequence.computed == 0 { before } else { 0 };
                sequence.computed += prefix + sequence.next.len();
                let output = &mut outputs[sequence.index];
                if info.eos_token_ids.contains(&token) {
                    return None;
                }
                output.push(token);
                sequence.next = vec![token];
                (output.len() < max_tokens && sequence.computed < info.context_length).then_some(sequence)
            })
            .collect();
    }
    Ok(())
}

/// Computes what each sequence lacks and returns the likeliest next token of each. `rows`, of which
/// there are `n`, go before a sequence's first tokens.
fn step(model: &Model, rows: Option<&Tensor>, n: usize, running: &[Running], cache: &mut KvCache) -> Result<Vec<u32>> {
    let device = &model.info().device;
    let (mut parts, mut segments) = (Vec::new(), Vec::new());
    let (mut positions, mut last): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
    for sequence in running {
        let prefix = if sequence.computed == 0 { n } else { 0 };
        parts.extend(rows.filter(|_| prefix > 0).cloned());
        if !sequence.next.is_empty() {
            parts.push(model.embed(&Tensor::new(sequence.next.as_slice(), device)?)?);
        }
        let count = prefix + sequence.next.len();
        positions.extend((sequence.computed..sequence.computed + count).map(|p| p as u32));
        last.push(positions.len() as u32 - 1);
        segments.push(Segment { rows: count, start: sequence.computed, blocks: sequence.blocks.clone() });
    }
    let x = Tensor::cat(&parts, 0)?;
    let mut kernels = PagedKernels::new(cache, &segments);
    let hidden = model.forward(&x, &Tensor::new(positions, device)?, &mut kernels)?;
    let logits = model.logits(&hidden.index_select(&Tensor::new(last, device)?, 0)?)?;
    logits.argmax(D::Minus1)?.to_vec1()
}
