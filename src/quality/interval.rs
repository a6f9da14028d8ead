//! Confidence intervals of scores: how far another sample of as many examples may be from this one.

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

/// The ends of an interval, the lower first.
pub type Interval = [f64; 2];

/// The 0.975 quantile of the normal distribution: 95 % lie within so many standard deviations.
const Z: f64 = 1.959_963_984_540_054;

/// The seed of a bootstrap's samples.
const SEED: u64 = 0;

/// Samples of a bootstrap.
const RESAMPLES: usize = 1000;

/// Wilson's score interval (1927) at 95 % of the part `right` of `n`, 0 to 1. It is right for few examples, and for
/// shares of nearly none or all, where a standard error is not.
pub fn wilson(right: usize, n: usize) -> Interval {
    if n == 0 {
        return [0.0, 1.0];
    }
    let (share, n) = (right as f64 / n as f64, n as f64);
    let unit = 1.0 + Z * Z / n;
    let centre = (share + Z * Z / (2.0 * n)) / unit;
    let half = Z / unit * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    // The ends of none and of all are exact.
    let low = if right == 0 { 0.0 } else { centre - half };
    let high = if share == 1.0 { 1.0 } else { centre + half };
    [low, high]
}

/// The percentile bootstrap interval (Efron 1979) at 95 % of a score of `n` examples: `score` is given samples of their
/// indices, drawn with replacement.
pub fn bootstrap(n: usize, mut score: impl FnMut(&[usize]) -> f64) -> Interval {
    // The same examples always have the same interval.
    let mut random = StdRng::seed_from_u64(SEED);
    let mut sample = vec![0; n];
    let mut scores: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            sample.iter_mut().for_each(|i| *i = random.random_range(0..n));
            score(&sample)
        })
        .collect();
    scores.sort_by(f64::total_cmp);
    [quantile(&scores, 0.025), quantile(&scores, 0.975)]
}

/// A quantile of sorted values, between two of them as far as it lies between their ranks.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let place = part * sorted.len().saturating_sub(1) as f64;
    let at = |rank: f64| sorted.get(rank as usize).copied().unwrap_or_default();
    at(place.floor()) + (at(place.ceil()) - at(place.floor())) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quality::mean;

    #[test]
    fn wilsons_interval_has_the_known_ends() {
        // Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3.
        let known =
            [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)];
        for (right, n, low, high) in known {
            let found = wilson(right, n);
            assert!((found[0] - low).abs() < 6e-5 && (found[1] - high).abs() < 6e-5, "{right} of {n}: {found:?}");
            let others = wilson(n - right, n);
            assert!((others[0] + high - 1.0).abs() < 6e-5 && (others[1] + low - 1.0).abs() < 6e-5, "{others:?}");
        }
        assert_eq!(wilson(0, 0), [0.0, 1.0]);
    }

    #[test]
    fn a_bootstrap_of_a_mean_is_as_wide_as_its_standard_error_says_and_always_the_same() {
        let values: Vec<f64> = (0..400).map(|i| f64::from(i % 20)).collect();
        let run = || bootstrap(values.len(), |sample| mean(sample.iter().map(|&i| values[i])));
        let [low, high] = run();
        // The standard deviation of 0…19 is 5.766, so the half width is 1.96 * 5.766 / 20.
        assert!((low - (9.5 - 0.565)).abs() < 0.06 && (high - (9.5 + 0.565)).abs() < 0.06, "{low} {high}");
        assert_eq!(run(), [low, high]);
        assert_eq!(bootstrap(3, |_| 0.7), [0.7, 0.7]);
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.75), 3.0);
    }
}
