//! What is chosen from a row of logits: against exact probabilities, and the same with any kernels.

use rayon::prelude::*;

use super::*;
use crate::kernels::{self, rows::PortableRows};

fn choose(params: SamplingParams, text: &[u32], logits: &[f32], times: usize) -> Vec<u32> {
    let mut sampler = Sampler::new(params, text.iter().copied());
    (0..times).map(|_| sampler.next(logits, &PortableRows, &mut Scratch::default()).unwrap().id).collect()
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
fn a_bias_is_added_to_its_tokens_logits_and_not_to_their_log_probabilities() {
    let bias = |bias: &[(u32, f32)]| SamplingParams { logit_bias: bias.to_vec(), ..Default::default() };
    assert_eq!(choose(bias(&[(3, 10.0)]), &[], &LOGITS, 2), [3, 3]);
    assert_eq!(choose(bias(&[(1, -100.0), (2, -100.0), (99, 100.0)]), &[], &LOGITS, 1), [4]);
    let next =
        |params| Sampler::new(params, [].into_iter()).next(&LOGITS, &PortableRows, &mut Scratch::default()).unwrap();
    let plain = next(SamplingParams { logprobs: Some(1), ..Default::default() });
    let biased = next(SamplingParams { logprobs: Some(1), ..bias(&[(1, 5.0)]) });
    assert_eq!((plain.id, plain.logprob), (biased.id, biased.logprob));
}

#[test]
fn logprobs_are_the_models_own_and_sorted() {
    let params = SamplingParams { logprobs: Some(2), repetition_penalty: 9.0, ..Default::default() };
    let token = Sampler::new(params, [1u32].into_iter()).next(&LOGITS, &PortableRows, &mut Scratch::default()).unwrap();
    let sum: f32 = LOGITS.iter().map(|x| x.exp()).sum();
    assert_eq!(token.id, 2);
    assert!((token.logprob.unwrap() - (1.9 - sum.ln())).abs() < 1e-6);
    assert_eq!(token.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2]);
    assert!((token.top[0].1 - (2.0 - sum.ln())).abs() < 1e-6);
}

/// The exact probabilities of a row of logits by these parameters, straight from their definitions.
fn exact(params: &SamplingParams, logits: &[f32]) -> Vec<f64> {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let mut p: Vec<f64> =
        logits.iter().map(|&x| ((f64::from(x) - max) / f64::from(params.temperature)).exp()).collect();
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*b].total_cmp(&p[*a]).then(a.cmp(b)));
    let largest = p[order[0]];
    p.iter_mut().filter(|p| **p < f64::from(params.min_p) * largest).for_each(|p| *p = 0.0);
    if params.top_k > 0 {
        order.iter().skip(params.top_k).for_each(|&i| p[i] = 0.0);
    }
    let total: f64 = p.iter().sum();
    let mut before = 0.0;
    for &i in &order {
        let own = p[i];
        if before > 0.0 && before >= f64::from(params.top_p) * total {
            p[i] = 0.0;
        }
        before += own;
    }
    let total: f64 = p.iter().sum();
    p.iter().map(|p| p / total).collect()
}

/// Logits of a peaked distribution, of a flat one, and of one with many equals.
fn distributions() -> [Vec<f32>; 3] {
    let noise = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 1009.0;
    [
        (0..700).map(|i| 9.0 * noise(i).powi(8) + if i % 300 == 5 { 6.0 } else { 0.0 }).collect(),
        (0..300).map(|i| 0.5 * noise(i)).collect(),
        (0..300).map(|i| (i % 5) as f32 * 0.7).collect(),
    ]
}

#[test]
fn two_hundred_thousand_draws_have_the_exact_distribution_of_every_setting() {
    const DRAWS: usize = 200_000;
    let at = SamplingParams { temperature: 0.7, seed: 11, ..Default::default() };
    let settings = [
        at.clone(),
        SamplingParams { top_p: 0.95, ..at.clone() },
        SamplingParams { top_p: 0.3, ..at.clone() },
        SamplingParams { top_k: 40, ..at.clone() },
        SamplingParams { min_p: 0.05, ..at.clone() },
        SamplingParams { top_k: 40, top_p: 0.8, min_p: 0.02, ..at.clone() },
        SamplingParams { min_p: 0.1, top_p: 0.9, temperature: 1.3, ..at.clone() },
    ];
    let backend = kernels::cpu();
    for logits in distributions() {
        settings.par_iter().for_each(|params| {
            let mut scratch = Scratch::default();
            let expected = exact(params, &logits);
            let mut counts = vec![0usize; logits.len()];
            let mut sampler = Sampler::new(params.clone(), std::iter::empty());
            for _ in 0..DRAWS {
                counts[sampler.next(&logits, backend.row_kernels(), &mut scratch).unwrap().id as usize] += 1;
            }
            let mut distance = 0.0;
            for (id, (&count, &p)) in counts.iter().zip(&expected).enumerate() {
                assert!(p > 0.0 || count == 0, "token {id} is excluded by {params:?} and was drawn");
                distance += 0.5 * (count as f64 / DRAWS as f64 - p).abs();
            }
            // What as many draws from the exact distribution would differ by, on average, and a fifth more.
            let of_chance: f64 = expected.iter().map(|p| 0.5 * (0.64 * p * (1.0 - p) / DRAWS as f64).sqrt()).sum();
            // With few tokens chance itself varies.
            let tokens = expected.iter().filter(|p| **p > 0.0).count() as f64;
            assert!(
                distance < (1.15 + 2.0 / tokens.sqrt()) * of_chance + 1e-4,
                "{distance} of {of_chance} for {params:?}"
            );
        });
    }
}

#[test]
fn the_tokens_of_a_seed_do_not_depend_on_what_a_thread_computed_before() {
    let backend = kernels::cpu();
    let logits = distributions();
    let params = SamplingParams { temperature: 0.9, top_p: 0.9, seed: 5, ..Default::default() };
    let alone = choose(params.clone(), &[], &logits[0], 0).len();
    assert_eq!(alone, 0);
    let run = |scratch: &mut Scratch| -> Vec<u32> {
        let mut sampler = Sampler::new(params.clone(), std::iter::empty());
        (0..50).map(|_| sampler.next(&logits[0], backend.row_kernels(), scratch).unwrap().id).collect()
    };
    let mut used = Scratch::default();
    let mut other = Sampler::new(SamplingParams { seed: 9, ..params.clone() }, std::iter::empty());
    for logits in &logits {
        other.next(logits, backend.row_kernels(), &mut used).unwrap();
    }
    assert_eq!(run(&mut used), run(&mut Scratch::default()));
}

/// Allows ids in turn, each once.
#[derive(Debug)]
struct Turns(Vec<u32>);

impl mask::TokenConstraint for Turns {
    fn start(&self) -> Box<dyn TokenMask> {
        Box::new(Turns(self.0.clone()))
    }
}

impl TokenMask for Turns {
    fn apply(&mut self, logits: &mut [f32]) -> Result<(), mask::MaskError> {
        for (id, x) in logits.iter_mut().enumerate() {
            if self.0.first() != Some(&(id as u32)) {
                *x = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn accept(&mut self, id: u32) {
        assert_eq!(self.0.remove(0), id);
    }
}

#[test]
fn a_mask_allows_what_it_says_and_an_answer_that_nothing_may_continue_is_an_error() {
    use mask::TokenConstraint as _;
    for temperature in [0.0, 1.0] {
        let params = SamplingParams { temperature, logprobs: Some(1), ..Default::default() };
        let mut sampler = Sampler::new(params, std::iter::empty()).with_mask(Some(Turns(vec![3, 0, 4]).start()));
        let mut next = || sampler.next(&LOGITS, &PortableRows, &mut Scratch::default());
        for expected in [3, 0, 4] {
            let token = next().unwrap();
            // The log-probabilities are the model's own.
            assert_eq!((token.id, token.top[0].0), (expected, 1));
        }
        assert_eq!(next().unwrap_err(), NoToken::Masked);
    }
}

#[test]
fn the_end_does_not_come_too_early_and_forbidden_runs_do_not_come_at_all() {
    // The likeliest is 1, then 3 and so on.
    let params = SamplingParams { stop_tokens: vec![1], min_tokens: 2, ..Default::default() };
    let mut order: Vec<u32> = (0..LOGITS.len() as u32).collect();
    order.sort_by(|a, b| LOGITS[*b as usize].total_cmp(&LOGITS[*a as usize]));
    assert_eq!(order[0], 1);
    assert_eq!(choose(params, &[], &LOGITS, 3), [order[1], order[1], 1]);
    let run = |runs: &[&[u32]], n| {
        let bad_tokens = runs.iter().map(|run| run.to_vec()).collect();
        choose(SamplingParams { bad_tokens, ..Default::default() }, &[], &LOGITS, n)
    };
    assert_eq!(run(&[&[1, 1]], 4), [1, order[1], 1, order[1]]);
    assert_eq!(run(&[&[1], &[]], 2), [order[1], order[1]]);
    let all: Vec<Vec<u32>> = order.iter().map(|id| vec![*id]).collect();
    let mut none = Sampler::new(SamplingParams { bad_tokens: all, ..Default::default() }, std::iter::empty());
    assert_eq!(none.next(&LOGITS, &PortableRows, &mut Scratch::default()).unwrap_err(), NoToken::Masked);
}

#[test]
fn log_probabilities_of_given_tokens_are_reported_once() {
    let params = SamplingParams { logprobs: Some(1), logprob_tokens: vec![0, 1, 99], ..Default::default() };
    let mut sampler = Sampler::new(params, std::iter::empty());
    let token = sampler.next(&LOGITS, &PortableRows, &mut Scratch::default()).unwrap();
    assert_eq!(token.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 0]);
    let difference = token.top[0].1 - token.top[1].1;
    assert!((difference - (LOGITS[1] - LOGITS[0])).abs() < 1e-6);
}

#[test]
fn logits_that_are_no_numbers_are_an_error_and_a_tiny_temperature_is_greedy() {
    let rows = [vec![f32::NAN; 4], vec![f32::INFINITY, 0.0], vec![f32::NEG_INFINITY; 3], vec![1.0, f32::NAN, 2.0]];
    for (logits, temperature) in rows.iter().flat_map(|row| [(row, 0.0), (row, 1.0)]) {
        let mut sampler = Sampler::new(SamplingParams { temperature, ..Default::default() }, std::iter::empty());
        let next = sampler.next(logits, &PortableRows, &mut Scratch::default());
        assert_eq!(next.unwrap_err(), NoToken::NotFinite, "{logits:?}");
    }
    let never = [1.0, f32::NEG_INFINITY, 2.0];
    let drawn = choose(SamplingParams { temperature: 5.0, ..Default::default() }, &[], &never, 200);
    assert!(drawn.iter().all(|id| *id != 1), "a token that the model never writes is not drawn");
    let tiny = SamplingParams { temperature: 1.0, repetition_penalty: 1e-38, ..Default::default() };
    assert_eq!(choose(tiny, &[2], &[1.0, 2.0, 3.0], 2), [2, 2], "a penalty that divides to infinity");
    for temperature in [1e-45, 3e-38, 9e-6] {
        assert_eq!(choose(SamplingParams { temperature, ..Default::default() }, &[], &LOGITS, 2), [1, 1]);
    }
}
