//! A batch through the forward that serves: laid out for a decoder, or for an encoder and the decoder
//! after it.

use std::{collections::HashMap, fmt, ops::Range, sync::Arc};

use candle_core::{Result, Tensor, bail};

use super::data::TokenizedExample;
use crate::{
    kernels::{
        Kernels, Tuning,
        cross::EncodedBatch,
        layout::{BatchLayout, Segment},
        past::PastKeyValues,
    },
    model::Model,
    prompt::learned::{KeyValues, LearnedPrompt},
};

/// The frozen model as a tuning job runs it. What the backend derives from the weights for gradients is kept as long
/// as this is.
#[derive(Debug, Clone)]
pub struct Forward<'a> {
    model: &'a Model,
    tuning: Arc<dyn Tuning>,
}

/// What a forward pass over a batch gives.
pub struct AnswerStates {
    /// The final hidden states of the rows that predict the answers' tokens, `[answer tokens, hidden]`.
    pub hidden: Tensor,
    /// The kernels of the pass, for the output matrix.
    pub kernels: Box<dyn Kernels>,
}

impl fmt::Debug for AnswerStates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AnswerStates").field("hidden", &self.hidden).finish_non_exhaustive()
    }
}

impl<'a> Forward<'a> {
    pub fn new(model: &'a Model) -> Self {
        Self { model, tuning: model.backend().tuning() }
    }

    /// The model.
    pub fn model(&self) -> &'a Model {
        self.model
    }

    /// One forward pass over the examples: for a decoder over `[prompt][input][answer]`; for an encoder-decoder over
    /// `[start][answer]`, after the encoder's `[prompt][input]` or a prompt of key-values. `prompt` is in any float type;
    /// with none, the model answers on its own.
    ///
    /// # Errors
    /// An example has nothing to continue, or a kernel fails.
    pub fn answer_states(&self, prompt: Option<&LearnedPrompt>, batch: &[&TokenizedExample]) -> Result<AnswerStates> {
        let Some(encoder) = &self.model.info().encoder else {
            let texts: Vec<_> = batch.iter().map(|e| (e.input_ids.as_slice(), e.answer.as_slice())).collect();
            return self.decode(prompt, &texts, None);
        };
        let inputs: Vec<&[u32]> = batch.iter().map(|e| e.input_ids.as_slice()).collect();
        let start = [encoder.start_token];
        let texts: Vec<_> = batch.iter().map(|e| (start.as_slice(), e.answer.as_slice())).collect();
        match prompt {
            Some(LearnedPrompt::Embeddings(embeddings)) => {
                self.decode(None, &texts, Some(self.run_encoder(Some(&embeddings.rows), &inputs)?))
            }
            Some(LearnedPrompt::KeyValues(_)) | None => {
                self.decode(prompt, &texts, Some(self.run_encoder(None, &inputs)?))
            }
        }
    }

    /// Kernels for a batch that no learned prompt and no encoder has a part in.
    ///
    /// # Errors
    /// The batch does not fit.
    pub fn kernels(&self, batch: &BatchLayout, encoded: Option<EncodedBatch>) -> Result<Box<dyn Kernels>> {
        self.tuning.kernels(batch, None, encoded)
    }

    /// What the encoder makes of `[rows][input]` of each input, for the decoder. Equal inputs are computed
    /// once.
    ///
    /// # Errors
    /// The model has no encoder, or an input is empty and there are no rows.
    pub fn run_encoder(&self, rows: Option<&Tensor>, inputs: &[&[u32]]) -> Result<EncodedBatch> {
        let model = self.model;
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
        let mut kernels = self.kernels(&BatchLayout::of_lengths(0, &lengths), None)?;
        let hidden = model.run_encoder(&x, kernels.as_mut())?;
        let inputs = inputs.iter().map(|input| places[input].clone()).collect();
        Ok(EncodedBatch { layers: model.cross_key_values(&hidden, kernels.as_mut())?, inputs })
    }

    /// The decoder over `[prompt][input][answer]` of each text, an input and an answer: the rows that predict the
    /// answers. The prompt's rows are computed once for the whole batch.
    fn decode(
        &self,
        prompt: Option<&LearnedPrompt>,
        texts: &[(&[u32], &[u32])],
        encoded: Option<EncodedBatch>,
    ) -> Result<AnswerStates> {
        let model = self.model;
        let device = &model.info().device;
        let n = prompt.map_or(0, LearnedPrompt::num_virtual_tokens);
        let past = match prompt {
            Some(LearnedPrompt::KeyValues(prompt)) => Some(past_key_values(prompt)?),
            _ => None,
        };
        let mut ids: Vec<u32> = Vec::new();
        let mut batch = BatchLayout { shared: n, ..Default::default() };
        for (input, answer) in texts {
            if n + input.len() == 0 {
                bail!("an example has neither virtual tokens nor an input");
            }
            if past.is_some() && input.is_empty() {
                bail!("an example has no input, and key-values need a text to continue; its template should add one");
            }
            let start = n + ids.len();
            ids.extend(*input);
            // The last answer token is predicted and never read.
            ids.extend(&answer[..answer.len() - 1]);
            let length = n + ids.len() - start;
            batch.segments.push(Segment { rows: length, start: n, blocks: Vec::new() });
            // The row before an answer token predicts it: for an empty input the prompt's last row.
            let before = |j: usize| match input.len() + j {
                0 => n - 1,
                k => start + k - 1,
            };
            batch.wanted.extend((0..answer.len()).map(|j| before(j) as u32));
        }
        if batch.segments.iter().any(|segment| segment.rows == 0) {
            bail!("an example has no input and an answer of one token; its template should add a text");
        }
        let mut x = model.embed(&Tensor::new(ids, device)?)?;
        let rows = match prompt {
            Some(LearnedPrompt::Embeddings(embeddings)) => Some(embeddings.rows.to_dtype(x.dtype())?),
            // The rows only take the places: attention reads the past key values instead.
            Some(LearnedPrompt::KeyValues(_)) => Some(Tensor::zeros((n, x.dim(1)?), x.dtype(), device)?),
            None => None,
        };
        if let Some(rows) = rows {
            x = Tensor::cat(&[&rows, &x], 0)?;
        }
        let mut kernels = self.tuning.kernels(&batch, past, encoded)?;
        let hidden = model.forward(&x, &batch, kernels.as_mut())?;
        Ok(AnswerStates { hidden, kernels })
    }
}

/// A prompt's keys and values as the tuning kernels take them.
fn past_key_values(prompt: &KeyValues) -> Result<PastKeyValues> {
    let layers = prompt.layers.iter().map(|l| Ok((l.keys.transpose(0, 1)?, l.values.transpose(0, 1)?)));
    Ok(PastKeyValues { layers: layers.collect::<Result<_>>()? })
}
