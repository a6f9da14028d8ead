//! Calibration of label probabilities: a temperature and, for each label, a prior, both learned on held-out examples.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The widest range of a temperature.
pub const TEMPERATURES: (f64, f64) = (0.01, 100.0);

/// What label probabilities are corrected by: a label's score is lowered by the logarithm of its prior (Zhao et al. 2021,
/// contextual calibration) and divided by the temperature (Guo et al. 2017) before the softmax.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"temperature": 1.4, "priors": {"negative": 0.6, "positive": 0.4}}))]
pub struct Calibration {
    /// More than 1 makes probabilities more alike, less than 1 less alike.
    #[serde(default = "one")]
    #[schema(minimum = 0.01, maximum = 100)]
    pub temperature: f64,
    /// How likely the model finds each label whatever the input; a label that is not named has the mean of the others.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub priors: BTreeMap<String, f64>,
}

fn one() -> f64 {
    1.0
}

impl Calibration {
    /// No correction.
    pub fn none() -> Self {
        Self { temperature: 1.0, priors: BTreeMap::new() }
    }

    /// What is out of range, or names a label that is none of `labels`; each with its field's name.
    pub fn faults<'a>(&self, labels: impl Fn(&str) -> bool + 'a) -> Vec<String> {
        let mut faults = Vec::new();
        let (least, most) = TEMPERATURES;
        if !(least..=most).contains(&self.temperature) {
            faults.push(format!("calibration.temperature: found {}, expected {least} to {most}", self.temperature));
        }
        for (label, prior) in &self.priors {
            if !labels(label) {
                faults.push(format!("calibration.priors: found {label:?}, which is not one of the task's labels"));
            }
            if !(*prior > 0.0 && *prior <= 1.0) {
                faults.push(format!("calibration.priors.{label}: found {prior}, expected more than 0 and at most 1"));
            }
        }
        faults
    }

    /// The probabilities of labels by the logarithms of what each has before they are normalised; they sum to 1.
    pub fn probabilities<'a>(&self, scores: impl Iterator<Item = (&'a str, f64)>) -> Vec<f64> {
        let logs: Vec<f64> = self.priors.values().map(|prior| prior.ln()).collect();
        let mean = if logs.is_empty() { 0.0 } else { logs.iter().sum::<f64>() / logs.len() as f64 };
        let corrected = |(label, score): (&str, f64)| {
            let prior = self.priors.get(label).map_or(mean, |prior| prior.ln());
            (score - prior) / self.temperature
        };
        softmax(scores.map(corrected).collect())
    }
}

/// The logarithm of the sum of exponentials, negative infinity of nothing.
pub fn log_sum_exp(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let max = values.clone().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY { max } else { max + values.map(|x| (x - max).exp()).sum::<f64>().ln() }
}

/// Exponentials over their sum; all alike where every value is negative infinity.
fn softmax(values: Vec<f64>) -> Vec<f64> {
    let sum = log_sum_exp(values.iter().copied());
    if sum == f64::NEG_INFINITY {
        return vec![1.0 / values.len().max(1) as f64; values.len()];
    }
    values.into_iter().map(|x| (x - sum).exp()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(temperature: f64, priors: &[(&str, f64)]) -> Calibration {
        Calibration { temperature, priors: priors.iter().map(|(l, p)| ((*l).to_owned(), *p)).collect() }
    }

    #[test]
    fn probabilities_sum_to_one_and_follow_temperature_and_priors() {
        let scores = [("a", -1.0), ("b", -2.0)];
        let run = |calibration: Calibration| calibration.probabilities(scores.into_iter());
        let plain = run(Calibration::none());
        assert!((plain[0] / plain[1] - 1f64.exp()).abs() < 1e-12 && (plain[0] + plain[1] - 1.0).abs() < 1e-12);
        let flat = run(of(2.0, &[]));
        assert!((flat[0] / flat[1] - 0.5f64.exp()).abs() < 1e-12);
        let prior = run(of(1.0, &[("a", 0.8), ("b", 0.2)]));
        assert!((prior[0] / prior[1] - 1f64.exp() / 4.0).abs() < 1e-12);
        // The mean of the others is neutral.
        assert_eq!(run(of(1.0, &[("a", 0.5)])), plain);
        let impossible = Calibration::none().probabilities([("a", f64::NEG_INFINITY); 2].into_iter());
        assert_eq!(impossible, [0.5, 0.5]);
    }

    #[test]
    fn what_is_out_of_range_or_no_label_is_named() {
        let faults = of(0.0, &[("a", 0.0), ("c", 0.5)]).faults(|label| label != "c");
        for words in ["temperature: found 0", "priors.a: found 0", "found \"c\", which is not"] {
            assert!(faults.iter().any(|fault| fault.contains(words)), "{words}: {faults:?}");
        }
        assert!(of(1.5, &[("a", 1.0)]).faults(|_| true).is_empty());
    }
}
