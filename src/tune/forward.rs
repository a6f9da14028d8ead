//! The forward passes of a tuning run, all through one struct that lives as long as the run: a batch laid
//! out for a decoder, or for an encoder and the decoder after it, on kernels with gradients.

use std::{collections::HashMap, ops::Range, sync::Arc};

use candle_core::{DType, Device, Result, Tensor, bail};

use super::data::TokenizedExample;
use crate::{
    kernels::{Kernels, cross::EncodedBatch, dense::DenseKernels, fused::FusedKernels, past::PastKeyValues},
    model::Model,
    packing::{
        InputToken, PackedInput, Packing, PromptShape,
        embed::{EmbeddingSource, embed},
        leading_virtual_tokens,
    },
    prompt::learned::{KeyValues, LearnedPrompt},
};

/// Forward passes of a model with gradients. What a run keeps beside the model for its gradients belongs
/// here and goes with it; the model may be shared with whoever serves it.
#[derive(Debug, Clone)]
pub struct Forward {
    model: Arc<Model>,
    packing: Packing,
}

/// An example's positions, and the decoder's rows that predict its answer.
struct PackedExample {
    input: PackedInput,
    predicting: Range<usize>,
}

impl Forward {
    /// Forward passes of this model.
    pub fn new(model: impl Into<Arc<Model>>) -> Self {
        let model = model.into();
        let packing = Packing::of(model.info());
        Self { model, packing }
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// How the model reads an input.
    pub fn packing(&self) -> Packing {
        self.packing
    }

    /// The logits that predict the answers' tokens, `[answer tokens, vocab]`, with the answers given
    /// (teacher forcing). `prompt` is in any float type; with none, the model answers on its own.
    ///
    /// # Errors
    /// An example has nothing to read before its answer.
    pub fn answer_logits(&self, prompt: Option<&LearnedPrompt>, batch: &[&TokenizedExample]) -> Result<Tensor> {
        let shape = PromptShape::of(prompt);
        let pack = |example: &&TokenizedExample| {
            let tokens = shape.followed_by(&example.input_ids);
            let mut input = self.packing.pack(shape, tokens).map_err(candle_core::Error::wrap)?;
            let predicting = input.continued_by(&example.answer);
            Ok(PackedExample { input, predicting })
        };
        let packed = batch.iter().map(pack).collect::<Result<Vec<_>>>()?;
        let inputs: Vec<&[InputToken]> = packed.iter().filter_map(|example| example.input.encoder.as_deref()).collect();
        let rows = match prompt {
            Some(LearnedPrompt::Embeddings(embeddings)) => Some(&embeddings.rows),
            Some(LearnedPrompt::KeyValues(_)) | None => None,
        };
        let encoded = if inputs.is_empty() { None } else { Some(self.run_encoder(rows, &inputs)?) };
        self.model.logits(&self.decode(prompt, &packed, encoded)?)
    }

    /// The keys and values `[n, kv_heads, head_dim]` of each layer of the decoder for a text of `n` tokens,
    /// after an encoder that has read `encoder_ids`, if the model has one.
    pub fn key_values(&self, ids: &[u32], encoder_ids: &[u32]) -> Result<Vec<(Tensor, Tensor)>> {
        let device = &self.model.info().device;
        let encoded = match &self.model.info().encoder {
            None => None,
            Some(_) => Some(self.run_encoder(None, &[&PromptShape::None.followed_by(encoder_ids)])?),
        };
        let positions: Vec<u32> = (0..ids.len() as u32).collect();
        let mut kernels = DenseKernels::new(&[ids.len()], device)?.with_encoded(encoded).recording();
        let x = self.model.embed(&Tensor::new(ids, device)?)?;
        // What is wanted is recorded on the way to the last row.
        let last = Tensor::new(&[ids.len() as u32 - 1], device)?;
        self.model.forward(&x, &Tensor::new(positions, device)?, &last, &mut kernels)?;
        Ok(kernels.into_recorded())
    }

    /// What the encoder makes of each input, for the decoder; `prompt_rows` stand for virtual tokens. Equal
    /// inputs are computed once.
    fn run_encoder(&self, prompt_rows: Option<&Tensor>, inputs: &[&[InputToken]]) -> Result<EncodedBatch> {
        let device = &self.model.info().device;
        // Converted once for all inputs.
        let dtype = self.model.activation_dtype();
        let prompt_rows = prompt_rows.map(|rows| rows.to_device(device)?.to_dtype(dtype)).transpose()?;
        let (mut sources, mut lengths, mut end) = (Vec::new(), Vec::new(), 0);
        let mut rows_of: HashMap<&[InputToken], Range<usize>> = HashMap::new();
        for &tokens in inputs {
            if rows_of.contains_key(tokens) {
                continue;
            }
            sources.push(EmbeddingSource { tokens, prompt_rows: prompt_rows.as_ref() });
            rows_of.insert(tokens, end..end + tokens.len());
            lengths.push(tokens.len());
            end += tokens.len();
        }
        let x = embed(&self.model, &sources)?;
        let mut kernels: Box<dyn Kernels> = match FusedKernels::fit(device, x.dtype()) {
            true => Box::new(FusedKernels::with_prefix(0, &lengths)),
            false => Box::new(DenseKernels::new(&lengths, device)?),
        };
        let hidden = self.model.run_encoder(&x, kernels.as_mut())?;
        let inputs = inputs.iter().map(|input| rows_of[input].clone()).collect();
        Ok(EncodedBatch { layers: self.model.cross_key_values(&hidden)?, inputs })
    }

    /// The decoder over a batch: the final hidden states of the rows that predict the answers, `[answer
    /// tokens, hidden]`. The learned prompt's rows, if the decoder reads it, are computed once for the whole
    /// batch.
    fn decode(
        &self,
        prompt: Option<&LearnedPrompt>,
        batch: &[PackedExample],
        encoded: Option<EncodedBatch>,
    ) -> Result<Tensor> {
        let device = &self.model.info().device;
        let n = batch.first().map_or(0, |example| leading_virtual_tokens(&example.input.decoder));
        let mut tokens: Vec<InputToken> = (0..n as u32).map(InputToken::Virtual).collect();
        let mut positions: Vec<u32> = (0..n as u32).collect();
        let mut lengths = Vec::with_capacity(batch.len());
        let mut answer_rows: Vec<u32> = Vec::new();
        for PackedExample { input, predicting } in batch {
            let text = &input.decoder[n..];
            if text.is_empty() {
                bail!("an example has no input and an answer of one token; its template should add a text");
            }
            // Position n of this example is this row of the batch.
            let first = tokens.len();
            tokens.extend(text);
            positions.extend((n..n + text.len()).map(|position| position as u32));
            lengths.push(text.len());
            let row = |position: usize| if position < n { position } else { first + position - n };
            answer_rows.extend(predicting.clone().map(|position| row(position) as u32));
        }
        let (past, prompt_rows) = match prompt.filter(|_| n > 0) {
            Some(LearnedPrompt::Embeddings(embeddings)) => (None, Some(embeddings.rows.clone())),
            // Attention reads the past key values; what the rows in their positions hold does not matter.
            Some(LearnedPrompt::KeyValues(prompt)) => {
                let rows = Tensor::zeros((n, self.model.info().hidden_size), self.model.activation_dtype(), device)?;
                (Some(past_key_values(prompt)?), Some(rows))
            }
            None => (None, None),
        };
        let source = EmbeddingSource { tokens: &tokens, prompt_rows: prompt_rows.as_ref() };
        let x = embed(&self.model, &[source])?;
        let mut kernels = kernels(n, &lengths, past, encoded, device, x.dtype())?;
        let (positions, rows) = (Tensor::new(positions, device)?, Tensor::new(answer_rows, device)?);
        self.model.forward(&x, &positions, &rows, kernels.as_mut())
    }
}

/// The tuning kernels for texts of these lengths after `n` virtual tokens that they share.
fn kernels(
    n: usize,
    lengths: &[usize],
    past: Option<PastKeyValues>,
    encoded: Option<EncodedBatch>,
    device: &Device,
    dtype: DType,
) -> Result<Box<dyn Kernels>> {
    Ok(match FusedKernels::fit(device, dtype) {
        true => Box::new(FusedKernels::with_prefix(n, lengths).with_past(past).with_encoded(encoded)),
        false => Box::new(DenseKernels::with_prefix(n, lengths, device)?.with_past(past).with_encoded(encoded)),
    })
}

fn past_key_values(prompt: &KeyValues) -> Result<PastKeyValues> {
    let layers = prompt.layers.iter().map(|l| Ok((l.keys.transpose(0, 1)?, l.values.transpose(0, 1)?)));
    Ok(PastKeyValues { layers: layers.collect::<Result<_>>()? })
}
