//! From a row of logits to a token: penalties, a token mask, then a draw by temperature, top-k, top-p and min-p, or the
//! largest; and log-probabilities. Nothing sorts the vocabulary.

mod bans;
mod error;
pub mod log_probs;
pub mod mask;
mod penalties;
mod scratch;
mod select;
#[cfg(test)]
mod tests;

use rand::{SeedableRng as _, rngs::StdRng};

use super::request::{GeneratedToken, SamplingParams};
use crate::kernels::{Largest, rows::RowKernels};
use bans::Bans;
pub use error::NoToken;
use mask::TokenMask;
use penalties::Penalties;
pub use scratch::Scratch;

/// Below this a temperature is greedy: its reciprocal would overflow, and the likeliest token has all of the weight.
pub const GREEDY_BELOW: f32 = 1e-5;

/// Chooses the tokens of one sequence.
pub struct Sampler {
    params: SamplingParams,
    /// Seeded by the request; one or more uniform numbers a token, by inverting the distribution. `None` when greedy.
    rng: Option<StdRng>,
    penalties: Option<Penalties>,
    mask: Option<Box<dyn TokenMask>>,
    bans: Option<Bans>,
}

impl std::fmt::Debug for Sampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sampler").field("params", &self.params).finish_non_exhaustive()
    }
}

impl Sampler {
    /// `text` are the vocabulary tokens of the input; virtual tokens have no id and are not seen by penalties.
    pub fn new(params: SamplingParams, text: impl Iterator<Item = u32>) -> Self {
        let rng = (params.temperature >= GREEDY_BELOW).then(|| StdRng::seed_from_u64(params.seed));
        let penalties = Penalties::new(&params, text);
        let bans = Bans::new(&params);
        Self { rng, penalties, mask: None, bans, params }
    }

    /// With a mask of the tokens that may come next, if there is one.
    pub fn with_mask(self, mask: Option<Box<dyn TokenMask>>) -> Self {
        Self { mask, ..self }
    }

    /// The next token for `logits` `[vocab]`.
    ///
    /// # Errors
    /// The logits are not finite, or the mask allows no token.
    pub fn next(
        &mut self,
        logits: &[f32],
        rows: &dyn RowKernels,
        scratch: &mut Scratch,
    ) -> Result<GeneratedToken, NoToken> {
        if !rows.is_usable(logits) {
            return Err(NoToken::NotFinite);
        }
        let id = match self.adjusts() {
            false => self.choose(logits, rows, scratch)?,
            true => {
                let mut adjusted = std::mem::take(&mut scratch.adjusted);
                let id = self.adjust(logits, &mut adjusted).and_then(|()| self.choose(&adjusted, rows, scratch));
                scratch.adjusted = adjusted;
                id?
            }
        };
        if let Some(penalties) = &mut self.penalties {
            penalties.generated(id);
        }
        if let Some(bans) = &mut self.bans {
            bans.generated(id);
        }
        if let Some(mask) = &mut self.mask {
            mask.accept(id);
        }
        let (logprob, top) = match self.params.logprobs {
            Some(n) => log_probs::of_chosen(logits, id, n, &self.params.logprob_tokens, rows, scratch),
            None => (None, Vec::new()),
        };
        Ok(GeneratedToken { id, logprob, top })
    }

    /// Whether the mask allows no further token: the answer ends.
    pub fn is_complete(&self) -> bool {
        self.mask.as_ref().is_some_and(|mask| mask.is_complete())
    }

    /// Whether it takes the largest logit as it is, and tells of no other token.
    pub fn is_greedy(&self) -> bool {
        let tells_of_others = self.params.logprobs.is_some_and(|top| top > 0 || !self.params.logprob_tokens.is_empty());
        self.rng.is_none() && !self.adjusts() && !tells_of_others
    }

    /// The next token where [`is_greedy`](Self::is_greedy) holds, from the largest logit.
    ///
    /// # Errors
    /// The logits are not finite.
    pub fn take_largest(&mut self, largest: Largest) -> Result<GeneratedToken, NoToken> {
        if largest.log_probability.is_nan() {
            return Err(NoToken::NotFinite);
        }
        let logprob = self.params.logprobs.map(|_| largest.log_probability);
        Ok(GeneratedToken { id: largest.index, logprob, top: Vec::new() })
    }

    /// Whether a token is chosen by other logits than the model's.
    fn adjusts(&self) -> bool {
        self.penalties.is_some() || self.mask.is_some() || self.bans.is_some()
    }

    /// The logits after penalties, what is forbidden and the mask.
    fn adjust(&mut self, logits: &[f32], adjusted: &mut Vec<f32>) -> Result<(), NoToken> {
        adjusted.clear();
        adjusted.extend_from_slice(logits);
        if let Some(penalties) = &self.penalties {
            penalties.apply(adjusted);
        }
        if let Some(bans) = &self.bans {
            bans.apply(adjusted);
        }
        if let Some(mask) = &mut self.mask {
            mask.apply(adjusted)?;
        }
        Ok(())
    }

    fn choose(&mut self, logits: &[f32], rows: &dyn RowKernels, scratch: &mut Scratch) -> Result<u32, NoToken> {
        let none = if self.mask.is_some() || self.bans.is_some() { NoToken::Masked } else { NoToken::NotFinite };
        match &mut self.rng {
            Some(rng) => select::draw(&self.params, logits, rows, scratch, rng).ok_or(none),
            None => {
                let id = rows.argmax(logits);
                let is_chosen = logits.get(id).is_some_and(|x| *x > f32::NEG_INFINITY);
                is_chosen.then_some(id as u32).ok_or(none)
            }
        }
    }
}
