//! How far a task's label probabilities can be trusted, and the calibration that makes them better.

use plotters::prelude::*;
use serde::Serialize;

use crate::prompt::calibration::{Calibration, TEMPERATURES};

/// The fewest examples that a calibration is learned from.
pub const LEAST_EXAMPLES: usize = 20;
/// Fewer examples than this teach a temperature alone: they say too little of each label for its prior.
pub const LEAST_FOR_PRIORS: usize = 40;

/// Bins of confidence.
const BINS: usize = 10;
/// Parts of the examples, each of which is measured with what the others taught.
const FOLDS: usize = 5;
/// Steps of the fit; it is convex, so they only have to be enough.
const STEPS: usize = 1500;
const RATE: f64 = 0.03;
const LEAST_PRIOR: f64 = 1e-6;

/// What the model says of the labels of each example.
#[derive(Debug, Clone, Default)]
pub struct LabelEvidence {
    /// The labels, in the order of the scores.
    pub labels: Vec<String>,
    /// For each example the logarithm of each label's probability before it is normalised.
    pub scores: Vec<Vec<f64>>,
    /// For each example the index of the label that is expected.
    pub expected: Vec<usize>,
}

/// How well probabilities agree with what is expected.
#[derive(Debug, Clone, Serialize)]
pub struct Reliability {
    /// The Brier score: the mean squared distance from the right answer; 0 is best, 2 worst.
    pub brier: f64,
    /// The expected calibration error (Guo et al. 2017): how far confidence and accuracy are apart, in ten bins.
    pub ece: f64,
    /// The bins that have examples, by confidence.
    pub bins: Vec<Bin>,
}

/// A calibration, and whether it is worth having.
#[derive(Debug, Clone)]
pub struct LearnedCalibration {
    pub calibration: Calibration,
    /// How many examples it was learned from.
    pub examples: usize,
    /// The probabilities of these examples without it.
    pub before: Reliability,
    /// Their probabilities with it, each measured with what the others taught (cross-validation).
    pub held_out: Reliability,
    /// Whether the Brier score with it is lower than without on examples that it was not learned from. Only then should it
    /// be used.
    pub is_better: bool,
}

/// The examples whose confidence lies in one tenth.
#[derive(Debug, Clone, Serialize)]
pub struct Bin {
    pub examples: usize,
    /// Their mean confidence.
    pub confidence: f64,
    /// The part of them that is right.
    pub accuracy: f64,
}

impl LabelEvidence {
    /// The probabilities of each example's labels.
    pub fn probabilities(&self, calibration: &Calibration) -> Vec<Vec<f64>> {
        let names = || self.labels.iter().map(String::as_str);
        self.scores.iter().map(|scores| calibration.probabilities(names().zip(scores.iter().copied()))).collect()
    }

    /// How well a calibration's probabilities agree with what is expected.
    pub fn reliability(&self, calibration: &Calibration) -> Reliability {
        Reliability::of(&self.probabilities(calibration), &self.expected)
    }

    /// The Brier score of each example.
    pub fn briers(&self, calibration: &Calibration) -> Vec<f64> {
        let examples = self.probabilities(calibration).into_iter().zip(&self.expected);
        examples.map(|(probabilities, expected)| brier(&probabilities, *expected)).collect()
    }

    /// Learns a calibration and says whether it can be trusted. `eval --calibrate` and `tune` both do this.
    pub fn learn(&self) -> LearnedCalibration {
        let (before, held_out) = (self.reliability(&Calibration::none()), self.cross_validated());
        let is_better = held_out.brier < before.brier;
        LearnedCalibration { calibration: self.fit(), examples: self.expected.len(), before, held_out, is_better }
    }

    /// The calibration under which these examples are the likeliest, drawn a little towards none at all. From fewer than
    /// [`LEAST_FOR_PRIORS`] examples it is a temperature alone.
    pub fn fit(&self) -> Calibration {
        self.fit_of(self.has_enough_for_priors())
    }

    fn has_enough_for_priors(&self) -> bool {
        self.expected.len() >= LEAST_FOR_PRIORS
    }

    fn fit_of(&self, with_priors: bool) -> Calibration {
        // Logits are `slope * score + shift`, in which the loss is convex; Adam (Kingma & Ba 2015).
        let (n, k) = (self.scores.len().max(1) as f64, self.labels.len());
        let all: Vec<Vec<f64>> = self.scores.iter().map(|scores| relative(scores)).collect();
        let mut values = vec![0.0; k + 1];
        values[k] = 1.0;
        // What the examples have in common is not certain of the next one: each counts as right to (n + 1) / (n + 2) only
        // (Laplace's rule of succession, as Platt 1999 has it), so that a few that are all right do not teach certainty.
        let doubt = if k > 1 { 1.0 / (n + 2.0) } else { 0.0 };
        let target = |is_expected: bool| if is_expected { 1.0 - doubt } else { doubt / (k as f64 - 1.0).max(1.0) };
        let (mut first, mut second) = (vec![0.0; k + 1], vec![0.0; k + 1]);
        for step in 1..=STEPS {
            let mut gradient: Vec<f64> = values[..k].iter().map(|shift| shift / n).collect();
            gradient.push((values[k] - 1.0) / n);
            for (scores, expected) in all.iter().zip(&self.expected) {
                let logits = scores.iter().zip(&values).map(|(score, shift)| values[k] * score + shift);
                let logits: Vec<f64> = logits.collect();
                let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
                for (i, (logit, score)) in logits.iter().zip(scores).enumerate() {
                    let error = (logit - max).exp() / sum - target(i == *expected);
                    gradient[i] += error / n;
                    gradient[k] += error * score / n;
                }
            }
            if !with_priors {
                gradient[..k].fill(0.0);
            }
            let bias = |beta: f64| 1.0 - beta.powi(step as i32);
            for (i, gradient) in gradient.into_iter().enumerate() {
                first[i] = 0.9 * first[i] + 0.1 * gradient;
                second[i] = 0.999 * second[i] + 0.001 * gradient * gradient;
                values[i] -= RATE * (first[i] / bias(0.9)) / ((second[i] / bias(0.999)).sqrt() + 1e-8);
            }
            values[k] = values[k].clamp(1.0 / TEMPERATURES.1, 1.0 / TEMPERATURES.0);
        }
        let slope = values[k];
        if !with_priors {
            return Calibration { temperature: rounded(1.0 / slope), priors: Default::default() };
        }
        let priors: Vec<f64> = values[..k].iter().map(|shift| (-shift / slope).exp()).collect();
        let sum: f64 = priors.iter().sum();
        let priors = priors.into_iter().map(|prior| rounded((prior / sum).clamp(LEAST_PRIOR, 1.0)));
        Calibration { temperature: rounded(1.0 / slope), priors: self.labels.iter().cloned().zip(priors).collect() }
    }

    /// What [`fit`](Self::fit) gives on examples that it did not see: each fifth is measured with the calibration that the
    /// others taught.
    pub fn cross_validated(&self) -> Reliability {
        let mut probabilities = vec![Vec::new(); self.scores.len()];
        for fold in 0..FOLDS {
            let part = |is_own: bool| (0..self.scores.len()).filter(move |i| (i % FOLDS == fold) == is_own);
            let pick = |indices: Vec<usize>| Self {
                labels: self.labels.clone(),
                scores: indices.iter().map(|&i| self.scores[i].clone()).collect(),
                expected: indices.iter().map(|&i| self.expected[i]).collect(),
            };
            let calibration = pick(part(false).collect()).fit_of(self.has_enough_for_priors());
            for (i, own) in part(true).zip(pick(part(true).collect()).probabilities(&calibration)) {
                probabilities[i] = own;
            }
        }
        Reliability::of(&probabilities, &self.expected)
    }
}

impl Reliability {
    fn of(probabilities: &[Vec<f64>], expected: &[usize]) -> Self {
        let n = expected.len().max(1) as f64;
        let mut mean_brier = 0.0;
        let mut bins = vec![(0usize, 0.0, 0.0); BINS];
        for (probabilities, expected) in probabilities.iter().zip(expected) {
            mean_brier += brier(probabilities, *expected) / n;
            let Some((best, confidence)) = likeliest(probabilities) else { continue };
            let (count, confidences, right) = &mut bins[((confidence * BINS as f64) as usize).min(BINS - 1)];
            *count += 1;
            *confidences += confidence;
            *right += f64::from(best == *expected);
        }
        let bin = |(examples, confidences, right): (usize, f64, f64)| Bin {
            examples,
            confidence: confidences / examples as f64,
            accuracy: right / examples as f64,
        };
        let bins: Vec<Bin> = bins.into_iter().filter(|bin| bin.0 > 0).map(bin).collect();
        let ece = bins.iter().map(|bin| bin.examples as f64 / n * (bin.confidence - bin.accuracy).abs()).sum();
        Self { brier: mean_brier, ece, bins }
    }

    /// A reliability diagram as SVG: accuracy by confidence, beside the line on which they agree. The error says what
    /// plotters could not do.
    pub fn plot(&self, title: &str) -> Result<String, String> {
        let mut svg = String::new();
        self.draw(&mut svg, title).map_err(|e| e.to_string())?;
        Ok(svg)
    }

    fn draw(&self, svg: &mut String, title: &str) -> Result<(), Box<dyn std::error::Error>> {
        const FONT: &str = "sans-serif";
        const BAR: RGBColor = RGBColor(20, 90, 200);
        let root = SVGBackend::with_string(svg, (560, 520)).into_drawing_area();
        root.fill(&WHITE)?;
        let caption = format!("{title}: ECE {:.3}, Brier {:.3}", self.ece, self.brier);
        let mut chart = ChartBuilder::on(&root)
            .caption(caption, (FONT, 18))
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..1.0, 0.0..1.0)?;
        let percent = |x: &f64| format!("{:.0}%", 100.0 * x);
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc("confidence")
            .y_desc("accuracy")
            .x_label_formatter(&percent)
            .y_label_formatter(&percent)
            .label_style((FONT, 14))
            .axis_desc_style((FONT, 15))
            .draw()?;
        let width = 1.0 / BINS as f64;
        chart.draw_series(self.bins.iter().map(|bin| {
            let left = (bin.confidence / width).floor().min(BINS as f64 - 1.0) * width;
            Rectangle::new([(left + 0.08 * width, 0.0), (left + 0.92 * width, bin.accuracy)], BAR.mix(0.55).filled())
        }))?;
        chart.draw_series([PathElement::new([(0.0, 0.0), (1.0, 1.0)], BLACK.mix(0.6))])?;
        chart.draw_series(self.bins.iter().map(|bin| {
            let at = (bin.confidence, (bin.accuracy + 0.03).min(0.97));
            Text::new(bin.examples.to_string(), at, (FONT, 12).into_font())
        }))?;
        root.present()?;
        Ok(())
    }
}

/// The Brier score of one example: the squared distance of its probabilities from the right answer.
fn brier(probabilities: &[f64], expected: usize) -> f64 {
    let squared = |(i, p): (usize, &f64)| (p - f64::from(i == expected)).powi(2);
    probabilities.iter().enumerate().map(squared).sum()
}

/// The index of the largest probability, the first of equals, and itself.
pub fn likeliest(probabilities: &[f64]) -> Option<(usize, f64)> {
    probabilities.iter().copied().enumerate().reduce(|best, other| if other.1 > best.1 { other } else { best })
}

/// An example's scores relative to the largest, with which its probabilities are the same. One that is far below says no
/// more than that its label is impossible.
fn relative(scores: &[f64]) -> Vec<f64> {
    const FAR: f64 = -30.0;
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY {
        return vec![0.0; scores.len()];
    }
    scores.iter().map(|score| (score - largest).max(FAR)).collect()
}

/// To five significant digits: more say nothing, and a file is to be read.
fn rounded(x: f64) -> f64 {
    format!("{x:.4e}").parse().unwrap_or(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scores of three labels that are too sure and lean to the first label, from a generator of our own.
    fn evidence(n: usize) -> LabelEvidence {
        let mut state = 7u64;
        let mut random = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        let mut all = LabelEvidence { labels: ["a", "b", "c"].map(str::to_owned).into(), ..Default::default() };
        for _ in 0..n {
            let logits: Vec<f64> = (0..3).map(|_| 3.0 * (random() - 0.5)).collect();
            let sum: f64 = logits.iter().map(|x| x.exp()).sum();
            let mut left = random() * sum;
            let drawn = logits.iter().position(|x| {
                left -= x.exp();
                left < 0.0
            });
            all.expected.push(drawn.unwrap_or(2));
            let lean = [2.0, 0.0, -1.0];
            all.scores.push(logits.iter().zip(lean).map(|(x, lean)| 3.0 * x + lean - 20.0).collect());
        }
        all
    }

    #[test]
    fn a_fit_finds_the_temperature_and_the_priors_that_were_put_in() {
        let evidence = evidence(4000);
        let found = evidence.fit();
        assert!((found.temperature - 3.0).abs() < 0.25, "{found:?}");
        let log = |label: &str| found.priors[label].ln();
        assert!((log("a") - log("b") - 2.0).abs() < 0.35 && (log("b") - log("c") - 1.0).abs() < 0.35, "{found:?}");
        let (before, after) = (evidence.reliability(&Calibration::none()), evidence.reliability(&found));
        assert!(after.ece < 0.03 && before.ece > 0.1, "{} {}", before.ece, after.ece);
        assert!(after.brier < before.brier);
        let held_out = evidence.cross_validated();
        assert!((held_out.brier - after.brier).abs() < 0.01 && held_out.ece < 0.04);
        assert!(found.faults(|label| ["a", "b", "c"].contains(&label)).is_empty());
    }

    #[test]
    fn few_examples_teach_a_temperature_alone_and_no_certainty() {
        let few = evidence(LEAST_FOR_PRIORS - 1).learn();
        assert!(few.calibration.priors.is_empty() && few.calibration.temperature > 1.5, "{few:?}");
        assert!(few.is_better && few.held_out.brier < few.before.brier && few.examples == 39, "{few:?}");
        assert_eq!(evidence(LEAST_FOR_PRIORS).fit().priors.len(), 3);
        // All right, and not sure of it: surer afterwards, but not so sure that one in a hundred could not be wrong.
        let labels = ["a", "b"].map(str::to_owned).to_vec();
        let scores = |gap: f64| (0..46).map(|i| if i % 2 == 0 { vec![0.0, -gap] } else { vec![-gap, 0.0] }).collect();
        let all_right = |gap| LabelEvidence {
            labels: labels.clone(),
            scores: scores(gap),
            expected: (0..46).map(|i| i % 2).collect(),
        };
        let unsure = all_right(1.0).learn();
        assert!(unsure.is_better && unsure.calibration.temperature < 1.0, "{unsure:?}");
        let sure = all_right(1.0).probabilities(&unsure.calibration)[0][0];
        assert!((0.8..0.985).contains(&sure), "{sure}");
        // Nothing is better than what is right already.
        let certain = all_right(20.0).learn();
        assert!(!certain.is_better && certain.calibration.temperature >= 1.0, "{certain:?}");
    }

    #[test]
    fn a_label_that_is_impossible_does_not_spoil_a_fit() {
        let mut evidence = evidence(400);
        let before = evidence.fit();
        for i in 0..4 {
            let other = (evidence.expected[i] + 1) % 3;
            evidence.scores[i][other] = f64::NEG_INFINITY;
        }
        evidence.scores[9].fill(f64::NEG_INFINITY);
        let found = evidence.fit();
        assert!((found.temperature / before.temperature).ln().abs() < 0.2, "{before:?} {found:?}");
        assert!(found.priors.iter().all(|(label, prior)| (prior / before.priors[label]).ln().abs() < 0.2), "{found:?}");
    }

    #[test]
    fn brier_and_calibration_error_of_plain_cases() {
        let sure = Reliability::of(&[vec![1.0, 0.0], vec![1.0, 0.0]], &[0, 1]);
        assert_eq!((sure.brier, sure.ece, sure.bins.len()), (1.0, 0.5, 1));
        let even = Reliability::of(&[vec![0.5, 0.5], vec![0.5, 0.5]], &[0, 1]);
        assert_eq!((even.brier, even.ece), (0.5, 0.0));
        let svg = even.plot("task").unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("ECE 0.000"));
    }
}
