//! The forward passes of a tuning run, all through one struct that lives as long as the run: a batch laid
//! out for a decoder, or for an encoder and the decoder after it, on kernels with gradients.

use std::{collections::HashMap, ops::Range, sync::Arc};

use candle_core::{Result, Tensor};

use crate::examples::TokenizedExample;
use crate::{
    kernels::{
        Kernels, Tuning,
        cross::EncodedBatch,
        layout::{BatchLayout, Segment},
        past::PastKeyValues,
        recording::Recording,
    },
    model::Model,
    packing::{
        InputToken, PackedInput, Packing, PromptShape,
        embed::{EmbeddingSource, embed},
    },
    prompt::learned::{KeyValues, LearnedPrompt},
};

/// Forward passes of a model with gradients. What a run keeps beside the model for its gradients belongs
/// here and goes with it; the model may be shared with whoever serves it.
#[derive(Debug, Clone)]
pub struct Forward {
    model: Arc<Model>,
    /// Transposed copies of the weights, where the backend needs some.
    tuning: Arc<dyn Tuning>,
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
        Self { tuning: model.backend().tuning(), model, packing }
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
    /// (teacher forcing), and the kernels of the pass. `prompt` is in any float type; with none, the model answers
    /// to the texts alone.
    ///
    /// # Errors
    /// An example has nothing to read before its answer.
    pub fn answer_logits(
        &self,
        prompt: Option<&LearnedPrompt>,
        batch: &[&TokenizedExample],
    ) -> Result<(Tensor, Box<dyn Kernels>)> {
        let shape = PromptShape::of(prompt);
        let pack = |example: &&TokenizedExample| {
            let tokens = shape.applied_to(&example.input);
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
        let (hidden, mut kernels) = self.decode(prompt, &packed, encoded)?;
        Ok((self.model.logits(&hidden, kernels.as_mut())?, kernels))
    }

    /// The keys and values `[n, kv_heads, head_dim]` of each layer of the decoder for a text of `n` tokens,
    /// after an encoder that has read `encoder_ids`, if the model has one.
    pub fn key_values(&self, ids: &[u32], encoder_ids: &[u32]) -> Result<Vec<(Tensor, Tensor)>> {
        let device = &self.model.info().device;
        let encoded = match &self.model.info().encoder {
            None => None,
            Some(_) => Some(self.run_encoder(None, &[&PromptShape::None.followed_by(encoder_ids)])?),
        };
        // What is wanted is recorded on the way to the last row.
        let batch = BatchLayout { wanted: vec![ids.len() as u32 - 1], ..BatchLayout::of_lengths(0, &[ids.len()]) };
        let mut kernels = Recording::new(self.tuning.kernels(&batch, None, encoded)?);
        let x = self.model.embed(&Tensor::new(ids, device)?)?;
        self.model.forward(&x, &batch, &mut kernels)?;
        Ok(kernels.into_layers())
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
        let mut kernels = self.tuning.kernels(&BatchLayout::of_lengths(0, &lengths), None, None)?;
        let hidden = self.model.run_encoder(&x, kernels.as_mut())?;
        let inputs = inputs.iter().map(|input| rows_of[input].clone()).collect();
        Ok(EncodedBatch { layers: self.model.cross_key_values(&hidden, kernels.as_mut())?, inputs })
    }

    /// The decoder over a batch: the final hidden states of the rows that predict the answers, `[answer
    /// tokens, hidden]`. What all examples begin with, up to the last of the learned prompt's rows in it, is computed once
    /// for the whole batch.
    fn decode(
        &self,
        prompt: Option<&LearnedPrompt>,
        batch: &[PackedExample],
        encoded: Option<EncodedBatch>,
    ) -> Result<(Tensor, Box<dyn Kernels>)> {
        let device = &self.model.info().device;
        let n = shared_beginning(batch);
        let mut tokens = batch.first().map_or_else(Vec::new, |example| example.input.decoder[..n].to_vec());
        let mut layout = BatchLayout { shared: n, ..Default::default() };
        for PackedExample { input, predicting } in batch {
            let text = &input.decoder[n..];
            // Position n of this example is this row of the batch.
            let first = tokens.len();
            tokens.extend(text);
            layout.segments.push(Segment::new(text.len(), n, Vec::new()));
            let row = |position: usize| if position < n { position } else { first + position - n };
            layout.wanted.extend(predicting.clone().map(|position| row(position) as u32));
        }
        let reads_prompt = tokens.iter().any(|token| token.vocab().is_none());
        let (past, prompt_rows) = match prompt.filter(|_| reads_prompt) {
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
        let mut kernels = self.tuning.kernels(&layout, past, encoded)?;
        Ok((self.model.forward(&x, &layout, kernels.as_mut())?, kernels))
    }
}

/// How many positions all examples begin with, up to the last virtual token among them. At least one position of each
/// example is its own.
fn shared_beginning(batch: &[PackedExample]) -> usize {
    let Some((first, others)) = batch.split_first() else { return 0 };
    let first = &first.input.decoder;
    let common = |other: &PackedExample| first.iter().zip(&other.input.decoder).take_while(|(a, b)| a == b).count();
    let shared = others.iter().map(common).min().unwrap_or(first.len());
    let shortest = batch.iter().map(|example| example.input.decoder.len()).min().unwrap_or(0);
    let prompt = first[..shared].iter().rposition(|token| token.vocab().is_none()).map_or(0, |last| last + 1);
    prompt.min(shortest.saturating_sub(1))
}

fn past_key_values(prompt: &KeyValues) -> Result<PastKeyValues> {
    let layers = prompt.layers.iter().map(|l| Ok((l.keys.transpose(0, 1)?, l.values.transpose(0, 1)?)));
    Ok(PastKeyValues { layers: layers.collect::<Result<_>>()? })
}
