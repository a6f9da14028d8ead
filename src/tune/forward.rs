//! A batch through the forward that serves: laid out for a decoder, or for an encoder and the decoder
//! after it.

use std::{collections::HashMap, ops::Range};

use candle_core::{DType, Device, Result, Tensor, bail};

use super::data::TokenizedExample;
use crate::{
    kernels::{Kernels, cross::EncodedBatch, dense::DenseKernels, fused::FusedKernels, past::PastKeyValues},
    model::Model,
    prompt::learned::{KeyValues, LearnedPrompt},
};

/// The final hidden states of the rows that predict the answers' tokens, `[answer tokens, hidden]`:
/// for a decoder of `[prompt][input][answer]`; for an encoder-decoder of `[start][answer]`, after the
/// encoder's `[prompt][input]` or a prompt of key-values. `prompt` is in any float type; with none, the
/// model answers on its own.
pub fn answer_states(model: &Model, prompt: Option<&LearnedPrompt>, batch: &[&TokenizedExample]) -> Result<Tensor> {
    let Some(encoder) = &model.info().encoder else {
        let texts: Vec<_> = batch.iter().map(|e| (e.input_ids.as_slice(), e.answer.as_slice())).collect();
        return decode(model, prompt, &texts, None);
    };
    let inputs: Vec<&[u32]> = batch.iter().map(|e| e.input_ids.as_slice()).collect();
    let start = [encoder.start_token];
    let texts: Vec<_> = batch.iter().map(|e| (start.as_slice(), e.answer.as_slice())).collect();
    match prompt {
        Some(LearnedPrompt::Embeddings(embeddings)) => {
            decode(model, None, &texts, Some(run_encoder(model, Some(&embeddings.rows), &inputs)?))
        }
        Some(LearnedPrompt::KeyValues(_)) | None => {
            decode(model, prompt, &texts, Some(run_encoder(model, None, &inputs)?))
        }
    }
}

/// What the encoder makes of `[rows][input]` of each input, for the decoder. Equal inputs are computed
/// once.
///
/// # Errors
/// The model has no encoder, or an input is empty and there are no rows.
pub fn run_encoder(model: &Model, rows: Option<&Tensor>, inputs: &[&[u32]]) -> Result<EncodedBatch> {
    let device = &model.info().device;
    let n = rows.map_or(Ok(0), |rows| rows.dim(0))?;
    let rows = rows.map(|rows| rows.to_device(device)?.to_dtype(model.activation_dtype())).transpose()?;
    let (mut parts, mut lengths, mut end) = (Vec::new(), Vec::new(), 0);
    let mut places: HashMap<&[u32], Range<usize>> = HashMap::new();
    for &input in inputs {
        let length = n + input.len();
        if length == 0 {
            bail!("an example has neither virtual tokens nor an input");
        }
        if places.contains_key(input) {
            continue;
        }
        parts.extend(rows.clone());
        if !input.is_empty() {
            parts.push(model.embed(&Tensor::new(input, device)?)?);
        }
        places.insert(input, end..end + length);
        lengths.push(length);
        end += length;
    }
    let x = Tensor::cat(&parts, 0)?;
    let mut kernels: Box<dyn Kernels> = match FusedKernels::fit(device, x.dtype()) {
        true => Box::new(FusedKernels::with_prefix(0, &lengths)),
        false => Box::new(DenseKernels::new(&lengths, device)?),
    };
    let hidden = model.run_encoder(&x, kernels.as_mut())?;
    let inputs = inputs.iter().map(|input| places[input].clone()).collect();
    Ok(EncodedBatch { layers: model.cross_key_values(&hidden)?, inputs })
}

/// The decoder over `[prompt][input][answer]` of each text, an input and an answer: the rows that predict the
/// answers. The prompt's rows are computed once for the whole batch.
fn decode(
    model: &Model,
    prompt: Option<&LearnedPrompt>,
    texts: &[(&[u32], &[u32])],
    encoded: Option<EncodedBatch>,
) -> Result<Tensor> {
    let device = &model.info().device;
    let n = prompt.map_or(0, LearnedPrompt::num_virtual_tokens);
    let given = matches!(prompt, Some(LearnedPrompt::KeyValues(_)));
    let mut ids: Vec<u32> = Vec::new();
    let mut positions: Vec<u32> = (0..n as u32).collect();
    let mut lengths = Vec::with_capacity(texts.len());
    let mut answer_rows: Vec<u32> = Vec::new();
    for (input, answer) in texts {
        if n + input.len() == 0 {
            bail!("an example has neither virtual tokens nor an input");
        }
        if given && input.is_empty() {
            bail!("an example has no input, and key-values need a text to continue; its template should add one");
        }
        let start = n + ids.len();
        ids.extend(*input);
        // The last answer token is predicted and never read.
        ids.extend(&answer[..answer.len() - 1]);
        let length = n + ids.len() - start;
        positions.extend((n..n + length).map(|p| p as u32));
        lengths.push(length);
        // The row before an answer token predicts it: for an empty input the prompt's last row.
        let before = |j: usize| match input.len() + j {
            0 => n - 1,
            k => start + k - 1,
        };
        answer_rows.extend((0..answer.len()).map(|j| before(j) as u32));
    }
    if lengths.contains(&0) {
        bail!("an example has no input and an answer of one token; its template should add a text");
    }
    let mut x = model.embed(&Tensor::new(ids, device)?)?;
    let rows = match prompt {
        Some(LearnedPrompt::Embeddings(embeddings)) => Some(embeddings.rows.to_dtype(x.dtype())?),
        // The rows only take the places: attention reads what is given instead.
        Some(LearnedPrompt::KeyValues(_)) => Some(Tensor::zeros((n, x.dim(1)?), x.dtype(), device)?),
        None => None,
    };
    if let Some(rows) = rows {
        x = Tensor::cat(&[&rows, &x], 0)?;
    }
    let mut kernels = kernels(prompt, &lengths, encoded, device, x.dtype())?;
    model.forward(&x, &Tensor::new(positions, device)?, &Tensor::new(answer_rows, device)?, kernels.as_mut())
}

/// The tuning kernels for `[prompt][text]` of these lengths of text.
fn kernels(
    prompt: Option<&LearnedPrompt>,
    lengths: &[usize],
    encoded: Option<EncodedBatch>,
    device: &Device,
    dtype: DType,
) -> Result<Box<dyn Kernels>> {
    let n = prompt.map_or(0, LearnedPrompt::num_virtual_tokens);
    let given = match prompt {
        Some(LearnedPrompt::KeyValues(prompt)) => Some(given(prompt)?),
        _ => None,
    };
    Ok(match FusedKernels::fit(device, dtype) {
        true => Box::new(FusedKernels::with_prefix(n, lengths).with_past(given).with_encoded(encoded)),
        false => Box::new(DenseKernels::with_prefix(n, lengths, device)?.with_past(given).with_encoded(encoded)),
    })
}

fn given(prompt: &KeyValues) -> Result<PastKeyValues> {
    let layers = prompt.layers.iter().map(|l| Ok((l.keys.transpose(0, 1)?, l.values.transpose(0, 1)?)));
    Ok(PastKeyValues { layers: layers.collect::<Result<_>>()? })
}
