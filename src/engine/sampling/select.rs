//! The draw: temperature, top-k, top-p and min-p without sorting the vocabulary.
//!
//! With top-k the k largest logits are selected by the maxima of chunks, and only they get weights. Without it every
//! token gets one, min-p as a threshold, and top-p is met by rejection: a token is drawn from all, and stands if those
//! that rank before it have less than p of the weight; if not, another is drawn from those that rank before it. What
//! stands has exactly the distribution of the nucleus, after few rounds (the method of FlashInfer's sorting-free
//! sampling, Ye et al. 2025).

use rand::{Rng, rngs::StdRng};

use super::scratch::Scratch;
use crate::{
    engine::request::SamplingParams,
    kernels::rows::{CHUNK, RowKernels, WeightParams, ranks_before},
};

/// Draws a token by temperature, min-p, top-k and top-p, in vLLM's order: top-p counts what the others keep. `None` if no
/// logit is finite.
pub fn draw(
    params: &SamplingParams,
    logits: &[f32],
    rows: &dyn RowKernels,
    scratch: &mut Scratch,
    rng: &mut StdRng,
) -> Option<u32> {
    rows.chunk_maxima(logits, &mut scratch.maxima);
    let max = scratch.maxima.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        return None;
    }
    let least = if params.min_p > 0.0 { max + params.temperature * params.min_p.ln() } else { f32::NEG_INFINITY };
    if (1..logits.len()).contains(&params.top_k) {
        return Some(draw_of_few(params, &largest(logits, params.top_k, scratch), max, least, rng));
    }
    let weights = WeightParams { max, inverse_temperature: params.temperature.recip(), least };
    rows.weights(logits, weights, &mut scratch.weights, &mut scratch.sums);
    let total = total(&scratch.sums);
    let (mut pivot, mut tie) = (-1.0, 0);
    loop {
        let id = find(&scratch.weights, &scratch.sums, rng, |weight, i| ranks_before(weight, i, pivot, tie));
        if params.top_p >= 1.0 {
            return Some(id as u32);
        }
        (pivot, tie) = (scratch.weights[id], id);
        rows.sums_before(&scratch.weights, pivot, tie, &mut scratch.sums);
        let before = self::total(&scratch.sums);
        if before <= 0.0 || before < f64::from(params.top_p) * total {
            return Some(id as u32);
        }
    }
}

/// Draws one of the largest logits, which are in order.
fn draw_of_few(params: &SamplingParams, largest: &[(u32, f32)], max: f32, least: f32, rng: &mut StdRng) -> u32 {
    let weight = |x: f32| (f64::from(x - max) / f64::from(params.temperature)).exp();
    let kept = largest.iter().take_while(|(_, x)| *x >= least);
    let weights: Vec<f64> = kept.map(|(_, x)| weight(*x)).collect();
    let total: f64 = weights.iter().sum();
    let (mut sum, mut count) = (0.0, 0);
    for weight in &weights {
        if count > 0 && sum >= f64::from(params.top_p) * total {
            break;
        }
        sum += weight;
        count += 1;
    }
    let mut target = rng.random::<f64>() * sum;
    for ((id, _), weight) in largest.iter().zip(&weights[..count]) {
        target -= weight;
        if target < 0.0 {
            return *id;
        }
    }
    // The sum's last bit.
    largest[count.saturating_sub(1)].0
}

/// The index that a uniform number falls on, of the weights that `counts`; `sums` has their sum in each chunk.
fn find(weights: &[f32], sums: &[f32], rng: &mut StdRng, counts: impl Fn(f32, usize) -> bool) -> usize {
    let mut target = rng.random::<f64>() * total(sums);
    let mut last = 0;
    for (i, &sum) in sums.iter().enumerate() {
        if sum <= 0.0 {
            continue;
        }
        last = i;
        if target < f64::from(sum) {
            break;
        }
        target -= f64::from(sum);
    }
    let start = last * CHUNK;
    let mut found = start;
    for (i, &weight) in weights.iter().enumerate().skip(start).take(CHUNK) {
        if weight > 0.0 && counts(weight, i) {
            found = i;
            target -= f64::from(weight);
            if target < 0.0 {
                break;
            }
        }
    }
    found
}

fn total(sums: &[f32]) -> f64 {
    sums.iter().map(|&sum| f64::from(sum)).sum()
}

/// The `n` largest logits with their ids, largest first, of equals the lower id. `scratch.maxima` are those of the
/// row's chunks.
pub fn largest(logits: &[f32], n: usize, scratch: &Scratch) -> Vec<(u32, f32)> {
    let n = n.min(logits.len());
    if n == 0 {
        return Vec::new();
    }
    // At least n values are as large as the n-th largest maximum.
    let mut maxima = scratch.maxima.clone();
    let threshold = match n < maxima.len() {
        true => *maxima.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a)).1,
        false => f32::NEG_INFINITY,
    };
    let mut found = Vec::new();
    for (i, chunk) in logits.chunks(CHUNK).enumerate() {
        if scratch.maxima[i] >= threshold {
            let ids = (i * CHUNK) as u32..;
            found.extend(ids.zip(chunk.iter().copied()).filter(|(_, x)| *x >= threshold));
        }
    }
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if n < found.len() {
        found.select_nth_unstable_by(n - 1, order);
        found.truncate(n);
    }
    found.sort_unstable_by(order);
    found
}
