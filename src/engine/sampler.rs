//! Logits to a token: penalties, filters and a draw, seeded per sequence.

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use std::{borrow::Cow, collections::HashMap};

use super::request::{GeneratedToken, SamplingParams};
use crate::kernels::cpu::{Isa, rows::argmax};

/// Chooses the tokens of one sequence.
pub struct Sampler {
    params: SamplingParams,
    /// `None` when greedy.
    draw: Option<LogitsProcessor>,
    /// Every token of the text and every new one: what the repetition penalty sees.
    seen: HashMap<u32, Seen>,
}

/// How often a token occurred.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    generated: u32,
}

impl std::fmt::Debug for Sampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sampler").field("params", &self.params).finish_non_exhaustive()
    }
}

impl Sampler {
    /// `text` are the vocabulary tokens of the input; virtual tokens have no id and are not seen.
    pub fn new(params: SamplingParams, text: impl Iterator<Item = u32>) -> Self {
        let temperature = f64::from(params.temperature);
        let draw = (temperature > 0.0).then(|| {
            let p = f64::from(params.top_p);
            let sampling = if p < 1.0 { Sampling::TopP { p, temperature } } else { Sampling::All { temperature } };
            LogitsProcessor::from_sampling(params.seed, sampling)
        });
        let seen = text.map(|id| (id, Seen::default())).collect();
        Self { params, draw, seen }
    }

    /// The next token for `logits` `[vocab]`.
    pub fn next(&mut self, logits: &[f32]) -> candle_core::Result<GeneratedToken> {
        let penalised = self.penalised(logits);
        let id = match &mut self.draw {
            None => argmax(Isa::best(), &penalised) as u32,
            Some(draw) => {
                let (min_p, top_k) = (self.params.min_p, self.params.top_k);
                let logits = Tensor::new(&*penalised, &Device::Cpu)?;
                draw.sample_f(&logits, |probabilities| filter(probabilities, min_p, top_k))?
            }
        };
        self.seen.entry(id).or_default().generated += 1;
        let (logprob, top) = match self.params.logprobs {
            Some(n) => {
                let log_sum = log_sum_exp(logits);
                let top = likeliest(logits, n).map(|(id, x)| (id, x - log_sum)).collect();
                (logits.get(id as usize).map(|x| x - log_sum), top)
            }
            None => (None, Vec::new()),
        };
        Ok(GeneratedToken { id, logprob, top })
    }

    fn penalised<'a>(&self, logits: &'a [f32]) -> Cow<'a, [f32]> {
        let SamplingParams { repetition_penalty, frequency_penalty, presence_penalty, .. } = self.params;
        if repetition_penalty == 1.0 && frequency_penalty == 0.0 && presence_penalty == 0.0 {
            return Cow::Borrowed(logits);
        }
        let mut logits = logits.to_vec();
        for (&id, seen) in &self.seen {
            let Some(logit) = logits.get_mut(id as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
            if seen.generated > 0 {
                *logit -= frequency_penalty * seen.generated as f32 + presence_penalty;
            }
        }
        Cow::Owned(logits)
    }
}

/// Zeroes what `min_p` and then `top_k` exclude and makes the rest sum to one, before the draw's
/// own top-p: vLLM's order.
fn filter(probabilities: &mut [f32], min_p: f32, top_k: usize) {
    let mut least = min_p * probabilities.iter().copied().fold(0.0, f32::max);
    if (1..probabilities.len()).contains(&top_k) {
        let mut sorted = probabilities.to_vec();
        let (_, kth, _) = sorted.select_nth_unstable_by(top_k - 1, |a, b| b.total_cmp(a));
        least = least.max(*kth);
    }
    if least > 0.0 {
        probabilities.iter_mut().filter(|p| **p < least).for_each(|p| *p = 0.0);
        let sum: f32 = probabilities.iter().sum();
        probabilities.iter_mut().for_each(|p| *p /= sum);
    }
}

fn log_sum_exp(logits: &[f32]) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    max + logits.iter().map(|x| f64::from(x - max).exp()).sum::<f64>().ln() as f32
}

/// The `n` largest logits with their ids, largest first.
fn likeliest(logits: &[f32], n: usize) -> impl Iterator<Item = (u32, f32)> + '_ {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let n = n.min(ids.len());
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if n > 0 && n < ids.len() {
        ids.select_nth_unstable_by(n - 1, order);
    }
    ids.truncate(n);
    ids.sort_unstable_by(order);
    ids.into_iter().map(|id| (id, logits[id as usize]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(params: SamplingParams, text: &[u32], logits: &[f32], times: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(params, text.iter().copied());
        (0..times).map(|_| sampler.next(logits).unwrap().id).collect()
    }

    const LOGITS: [f32; 5] = [0.0, 2.0, 1.9, -1.0, 1.0];

    #[test]
    fn greedy_takes_the_largest_logit_and_the_first_of_equals() {
        assert_eq!(choose(SamplingParams::default(), &[], &LOGITS, 3), [1, 1, 1]);
        assert_eq!(choose(SamplingParams::default(), &[], &[1.0, 3.0, 3.0], 1), [1]);
    }

    #[test]
    fn a_seed_repeats_and_other_seeds_differ() {
        let at = |seed| choose(SamplingParams { temperature: 1.0, seed, ..Default::default() }, &[], &LOGITS, 50);
        assert_eq!(at(1), at(1));
        assert_ne!(at(1), at(2));
    }

    #[test]
    fn draws_follow_the_distribution_at_a_temperature() {
        let n = 20_000;
        let drawn = choose(SamplingParams { temperature: 0.5, seed: 3, ..Default::default() }, &[], &LOGITS, n);
        let weight = |x: f32| f64::from(x / 0.5).exp();
        let sum: f64 = LOGITS.iter().map(|&x| weight(x)).sum();
        for (id, &x) in LOGITS.iter().enumerate() {
            let share = drawn.iter().filter(|&&d| d == id as u32).count() as f64 / n as f64;
            assert!((share - weight(x) / sum).abs() < 0.015, "token {id}: {share}");
        }
    }

    #[test]
    fn top_k_min_p_and_top_p_keep_only_what_they_say() {
        let kept = |params: SamplingParams| {
            let mut ids = choose(SamplingParams { temperature: 2.0, ..params }, &[], &LOGITS, 400);
            ids.sort_unstable();
            ids.dedup();
            ids
        };
        assert_eq!(kept(SamplingParams { top_k: 2, ..Default::default() }), [1, 2]);
        assert_eq!(kept(SamplingParams { min_p: 0.5, ..Default::default() }), [1, 2, 4]);
        assert_eq!(kept(SamplingParams { top_p: 0.4, ..Default::default() }), [1, 2]);
        // Half of what top_k keeps, not half of everything.
        assert_eq!(kept(SamplingParams { top_k: 2, top_p: 0.5, ..Default::default() }), [1]);
        assert_eq!(kept(SamplingParams::default()), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn penalties_see_the_text_and_the_new_tokens() {
        let repetition = SamplingParams { repetition_penalty: 1.5, ..Default::default() };
        assert_eq!(choose(repetition, &[1], &LOGITS, 1), [2]);
        // Frequency and presence count new tokens only.
        let frequency = SamplingParams { frequency_penalty: 0.6, ..Default::default() };
        assert_eq!(choose(frequency, &[1], &LOGITS, 4), [1, 2, 1, 2]);
        let presence = SamplingParams { presence_penalty: 1.5, ..Default::default() };
        assert_eq!(choose(presence, &[], &LOGITS, 4), [1, 2, 4, 1]);
    }

    #[test]
    fn logprobs_are_the_models_own_and_sorted() {
        let params = SamplingParams { logprobs: Some(2), repetition_penalty: 9.0, ..Default::default() };
        let token = Sampler::new(params, [1u32].into_iter()).next(&LOGITS).unwrap();
        let sum: f32 = LOGITS.iter().map(|x| x.exp()).sum();
        assert_eq!(token.id, 2);
        assert!((token.logprob.unwrap() - (1.9 - sum.ln())).abs() < 1e-6);
        assert_eq!(token.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2]);
        assert!((token.top[0].1 - (2.0 - sum.ln())).abs() < 1e-6);
    }
}
