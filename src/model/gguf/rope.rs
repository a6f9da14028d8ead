//! From the factors by which a GGUF file divides the rotary frequencies back to the parameters that
//! Hugging Face computes them from.

use std::f64::consts::TAU;

use serde_json::{Value, json};

/// How far off the factors may be, which were computed in f32.
const ROUNDING: f64 = 1e-5;

/// `llama3` scaling of a `config.json` that gives these factors, one for each pair of dimensions.
///
/// A frequency `f` is divided by 1 where `f` is high and by `factor` where it is low. Between, `1 /
/// divisor` goes from `1 / factor` to 1 linearly in `f`; that line is all there is to know. Of the three
/// parameters that describe it, `low_freq_factor` is free and taken as 1, as Llama 3.1 has it.
pub fn llama3(factors: &[f32], theta: f64) -> Result<Value, String> {
    let wrong = || "the factors in rope_freqs.weight are not those of Llama 3.1's scaling".to_owned();
    let factor = factors.iter().copied().fold(1f32, f32::max);
    if !(factor.is_finite() && factors.iter().all(|f| *f >= 1.0)) {
        return Err(wrong());
    }
    if factor == 1.0 {
        return Ok(json!({"rope_type": "default", "rope_theta": theta}));
    }
    let factor = f64::from(factor);
    // How much of a frequency is kept, from 0 (divided by the factor) to 1, at 1 / wavelength.
    let kept: Vec<(f64, f64)> = factors
        .iter()
        .enumerate()
        .map(|(i, f)| {
            let wavelength = TAU * theta.powf(2.0 * i as f64 / (2 * factors.len()) as f64);
            (wavelength.recip(), ((1.0 / f64::from(*f)) - 1.0 / factor) / (1.0 - 1.0 / factor))
        })
        .collect();
    let (whole, none) = (|s: f64| s >= 1.0 - ROUNDING, |s: f64| s <= ROUNDING);
    let last_whole = kept.iter().rev().find(|(_, s)| whole(*s));
    let first_none = kept.iter().find(|(_, s)| none(*s));
    let middle: Vec<_> = kept.iter().filter(|(_, s)| !whole(*s) && !none(*s)).collect();
    let steepness = |((x1, s1), (x0, s0)): &((f64, f64), (f64, f64))| (s1 - s0) / (x1 - x0);
    // Two points of the line; where there are fewer, any line does that is steep enough for both ends.
    let points = match (middle.as_slice(), last_whole, first_none) {
        ([a, .., b], ..) => Some((**a, **b)),
        ([a], whole, none) => {
            let ends = [whole.map(|whole| (*whole, **a)), none.map(|none| (**a, *none))];
            ends.into_iter().flatten().max_by(|a, b| steepness(a).total_cmp(&steepness(b)))
        }
        ([], Some(whole), Some(none)) => Some((*whole, *none)),
        _ => None,
    };
    let Some(points @ (_, (x0, s0))) = points else { return Err(wrong()) };
    // kept = slope / wavelength + start = (original / wavelength - 1) / (high - 1)
    let slope = steepness(&points);
    let start = s0 - slope * x0;
    let high = 1.0 - 1.0 / start;
    let original = slope * (high - 1.0);
    let fits = |(high, original): &(f64, f64)| {
        let computed = |x: f64| ((original * x - 1.0) / (high - 1.0)).clamp(0.0, 1.0);
        let same = |(x, s): &(f64, f64)| (computed(*x) - s).abs() < 4.0 * ROUNDING;
        *high > 1.0 && high.is_finite() && *original > 0.0 && kept.iter().all(same)
    };
    let candidates = [(whole_number(high), whole_number(original)), (high, original)];
    let (high, original) = candidates.into_iter().find(fits).ok_or_else(wrong)?;
    Ok(json!({"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
              "high_freq_factor": high, "original_max_position_embeddings": original}))
}

/// The whole number that a value was before it was computed with in f32.
fn whole_number(x: f64) -> f64 {
    if (x / x.round() - 1.0).abs() < 1e-3 { x.round() } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As llama.cpp's converter writes them.
    fn factors(theta: f64, dim: usize, factor: f64, low: f64, high: f64, original: f64) -> Vec<f32> {
        let of = |i: usize| {
            let wavelength = TAU * theta.powf(2.0 * i as f64 / dim as f64);
            let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
        };
        (0..dim / 2).map(of).collect()
    }

    #[test]
    fn the_parameters_of_llama_3_come_back() {
        for (theta, dim, factor) in [(500_000.0, 128, 8.0), (500_000.0, 64, 32.0)] {
            let found = llama3(&factors(theta, dim, factor, 1.0, 4.0, 8192.0), theta).unwrap();
            assert_eq!(found["factor"], factor);
            assert_eq!(found["high_freq_factor"], 4.0);
            assert_eq!(found["original_max_position_embeddings"], 8192.0);
        }
        assert_eq!(llama3(&[1.0; 8], 1e4).unwrap()["rope_type"], "default");
    }

    #[test]
    fn other_parameters_come_back_as_some_that_give_the_same_factors() {
        for (theta, dim, factor, low, high, original) in [
            (10_000.0, 16, 4.0, 1.0, 4.0, 64.0),
            (10_000.0, 8, 8.0, 1.0, 2.0, 100.0),
            (10_000.0, 64, 8.0, 2.0, 8.0, 512.0),
            (500_000.0, 32, 16.0, 1.0, 1.5, 2048.0),
            (10_000.0, 4, 2.0, 1.0, 1.2, 32.0),
        ] {
            let given = factors(theta, dim, factor, low, high, original);
            let found = llama3(&given, theta).unwrap();
            let number = |key: &str| found[key].as_f64().unwrap();
            let again = factors(
                theta,
                dim,
                number("factor"),
                number("low_freq_factor"),
                number("high_freq_factor"),
                number("original_max_position_embeddings"),
            );
            for (a, b) in given.iter().zip(&again) {
                assert!((a / b - 1.0).abs() < 1e-4, "{given:?} {again:?}");
            }
        }
    }

    #[test]
    fn factors_of_another_kind_are_refused() {
        for factors in [&[1.0, 2.0, 1.5, 3.0][..], &[0.5, 1.0], &[f32::NAN, 2.0], &[f32::INFINITY, 1.0], &[2.0, 2.0]] {
            assert!(llama3(factors, 1e4).is_err(), "{factors:?}");
        }
    }
}
