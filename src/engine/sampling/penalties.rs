//! Penalties: logits of tokens that occurred are lowered; and what a request adds to logits.

use std::collections::HashMap;

use crate::engine::request::SamplingParams;

/// The tokens that occurred, and what is done to their logits.
#[derive(Debug)]
pub struct Penalties {
    repetition: f32,
    frequency: f32,
    presence: f32,
    bias: Vec<(u32, f32)>,
    /// How often each token was generated; 0 for one that only the text has. The repetition penalty is for all
    /// of them.
    occurred: HashMap<u32, u32>,
}

impl Penalties {
    /// `None` if the parameters ask for none. `text` are the vocabulary tokens of the input; virtual tokens have no id
    /// and get no penalty.
    pub fn new(params: &SamplingParams, text: impl Iterator<Item = u32>) -> Option<Self> {
        let SamplingParams {
            repetition_penalty: repetition,
            frequency_penalty: frequency,
            presence_penalty: presence,
            ..
        } = *params;
        let bias = &params.logit_bias;
        let any = repetition != 1.0 || frequency != 0.0 || presence != 0.0 || !bias.is_empty();
        any.then(|| Self {
            repetition,
            frequency,
            presence,
            bias: bias.clone(),
            occurred: text.map(|id| (id, 0)).collect(),
        })
    }

    /// Lowers the logits of the tokens that occurred, and adds the request's own.
    pub fn apply(&self, logits: &mut [f32]) {
        for (&id, &generated) in &self.occurred {
            let Some(logit) = logits.get_mut(id as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / self.repetition } else { *logit * self.repetition };
            if generated > 0 {
                *logit -= self.frequency * generated as f32 + self.presence;
            }
            // A tiny penalty divides to infinity, which nothing could be drawn from.
            *logit = logit.clamp(f32::MIN, f32::MAX);
        }
        for &(id, bias) in &self.bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
    }

    /// One more token was generated.
    pub fn generated(&mut self, id: u32) {
        *self.occurred.entry(id).or_default() += 1;
    }
}
