//! How long texts are, and how often each task is asked.

use std::{fmt, str::FromStr};

use rand::{
    Rng,
    distr::{Distribution as _, weighted::WeightedIndex},
};
use rand_distr::{LogNormal, Normal};

/// A number of tokens: `32`, `16-64` (uniform), `normal:MEAN:DEVIATION`, `lognormal:MEAN:DEVIATION`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Lengths {
    Uniform {
        least: usize,
        most: usize,
    },
    Normal(Normal<f64>),
    /// Mean and deviation are those of the lengths, not of their logarithms.
    LogNormal {
        of: LogNormal<f64>,
        mean: f64,
        deviation: f64,
    },
}

/// The longest length that is drawn or may be asked for.
pub const MAX_LENGTH: usize = 1 << 20;

impl Lengths {
    /// Always the same.
    pub const fn fixed(length: usize) -> Self {
        Self::Uniform { least: length, most: length }
    }

    /// A length of 1 or more.
    pub fn sample(&self, random: &mut impl Rng) -> usize {
        let rounded = |x: f64| x.round().clamp(1.0, MAX_LENGTH as f64) as usize;
        match self {
            Self::Uniform { least, most } => random.random_range(*least..=*most),
            Self::Normal(normal) => rounded(normal.sample(random)),
            Self::LogNormal { of, .. } => rounded(of.sample(random)),
        }
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = match text.split(':').collect::<Vec<_>>()[..] {
            ["normal", mean, deviation] => moments(mean, deviation)
                .and_then(|(mean, deviation)| Normal::new(mean, deviation).ok())
                .map(Self::Normal),
            ["lognormal", mean, deviation] => moments(mean, deviation).and_then(|(mean, deviation)| {
                let of = LogNormal::from_mean_cv(mean, deviation / mean).ok()?;
                Some(Self::LogNormal { of, mean, deviation })
            }),
            [range] => uniform(range),
            _ => None,
        };
        parsed.ok_or_else(|| {
            format!(
                "found {text:?}, expected a number of tokens from 1 to {MAX_LENGTH} as in 32, 16-64, normal:40:10 \
                 or lognormal:40:20"
            )
        })
    }
}

fn moments(mean: &str, deviation: &str) -> Option<(f64, f64)> {
    let (mean, deviation): (f64, f64) = (mean.parse().ok()?, deviation.parse().ok()?);
    ((1.0..=MAX_LENGTH as f64).contains(&mean) && (0.0..=MAX_LENGTH as f64).contains(&deviation))
        .then_some((mean, deviation))
}

fn uniform(range: &str) -> Option<Lengths> {
    let (least, most) = range.split_once('-').unwrap_or((range, range));
    let (least, most) = (least.trim().parse().ok()?, most.trim().parse().ok()?);
    (1 <= least && least <= most && most <= MAX_LENGTH).then_some(Lengths::Uniform { least, most })
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uniform { least, most } if least == most => write!(f, "{least}"),
            Self::Uniform { least, most } => write!(f, "{least}-{most}"),
            Self::Normal(normal) => write!(f, "normal:{}:{}", normal.mean(), normal.std_dev()),
            Self::LogNormal { mean, deviation, .. } => write!(f, "lognormal:{mean}:{deviation}"),
        }
    }
}

/// How requests spread over tasks: `uniform`, or `zipf` with an exponent (`zipf:1.2`; 1 if left
/// out), where the task of rank r is asked in proportion to 1 / r^exponent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mix {
    Uniform,
    Zipf(f64),
}

impl Mix {
    /// Draws from the numbers below `tasks`; `None` if there are none.
    pub fn over(self, tasks: usize) -> Option<WeightedIndex<f64>> {
        let exponent = match self {
            Self::Uniform => 0.0,
            Self::Zipf(exponent) => exponent,
        };
        WeightedIndex::new((1..=tasks).map(|rank| (rank as f64).powf(-exponent))).ok()
    }
}

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let exponent = |s: &str| s.parse().ok().filter(|s| (0.0..=10.0).contains(s));
        match text.split_once(':') {
            None if text == "uniform" => Some(Self::Uniform),
            None if text == "zipf" => Some(Self::Zipf(1.0)),
            Some(("zipf", s)) => exponent(s).map(Self::Zipf),
            _ => None,
        }
        .ok_or_else(|| format!("found {text:?}, expected uniform, zipf, or zipf:S with S from 0 to 10"))
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uniform => write!(f, "uniform"),
            Self::Zipf(exponent) => write!(f, "zipf:{exponent}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    fn draws(lengths: &str) -> Vec<f64> {
        let lengths: Lengths = lengths.parse().unwrap();
        let mut random = StdRng::seed_from_u64(1);
        (0..20_000).map(|_| lengths.sample(&mut random) as f64).collect()
    }

    fn moments_of(values: &[f64]) -> (f64, f64) {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / values.len() as f64;
        (mean, variance.sqrt())
    }

    #[test]
    fn lengths_have_the_moments_they_are_named_by() {
        for (lengths, mean, deviation) in [
            ("32", 32.0, 0.0),
            ("16-64", 40.0, 14.1),
            ("normal:40:10", 40.0, 10.0),
            ("lognormal:40:20", 40.0, 20.0),
            ("normal:40:0", 40.0, 0.0),
        ] {
            let (found_mean, found_deviation) = moments_of(&draws(lengths));
            assert!((found_mean - mean).abs() < 0.5, "{lengths}: mean {found_mean}");
            assert!((found_deviation - deviation).abs() < 0.6, "{lengths}: deviation {found_deviation}");
        }
        let drawn = draws("16-64");
        assert!(drawn.contains(&16.0) && drawn.contains(&64.0));
        assert!(drawn.iter().all(|x| (16.0..=64.0).contains(x)));
        assert!(draws("normal:2:50").iter().all(|x| *x >= 1.0));
    }

    #[test]
    fn lengths_and_mixes_are_shown_as_they_are_typed() {
        for text in ["32", "16-64", "normal:40:10", "lognormal:40:20"] {
            assert_eq!(text.parse::<Lengths>().unwrap().to_string(), text);
        }
        for text in ["uniform", "zipf:1.2"] {
            assert_eq!(text.parse::<Mix>().unwrap().to_string(), text);
        }
        assert_eq!("zipf".parse::<Mix>(), Ok(Mix::Zipf(1.0)));
        for text in ["", "0", "64-16", "normal:40", "normal:x:1", "lognormal:0:1", "zipf", "99999999", "normal:5:-1"] {
            assert!(text.parse::<Lengths>().is_err(), "{text}");
        }
        for text in ["", "zipf:", "zipf:-1", "zipf:NaN", "even"] {
            assert!(text.parse::<Mix>().is_err(), "{text}");
        }
    }

    #[test]
    fn under_zipf_the_second_task_is_asked_half_as_often_as_the_first() {
        let mut random = StdRng::seed_from_u64(2);
        let mut count = |mix: Mix| {
            let tasks = mix.over(10).unwrap();
            let mut counts = [0f64; 10];
            (0..50_000).for_each(|_| counts[tasks.sample(&mut random)] += 1.0);
            counts
        };
        let zipf = count(Mix::Zipf(1.0));
        assert!((zipf[0] / zipf[1] - 2.0).abs() < 0.1 && (zipf[0] / zipf[9] - 10.0).abs() < 1.5, "{zipf:?}");
        let uniform = count(Mix::Uniform);
        assert!(uniform.iter().all(|n| (n / 5000.0 - 1.0).abs() < 0.1), "{uniform:?}");
        assert!(Mix::Uniform.over(0).is_none());
    }
}
