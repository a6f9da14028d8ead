//! The learning rate over a run: a linear warm-up, then a decay to zero.

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Decay {
    /// A straight line to zero.
    #[default]
    Linear,
    /// Half a cosine to zero (Loshchilov & Hutter 2017).
    Cosine,
    /// Not at all.
    Constant,
}

/// The learning rate of each step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    pub peak: f64,
    /// Steps of warm-up.
    pub warmup: usize,
    /// Steps in all.
    pub steps: usize,
    pub decay: Decay,
}

impl Schedule {
    /// The learning rate of step `step`, counted from 0. Never zero before the end.
    pub fn at(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / (self.warmup + 1) as f64;
        }
        let after = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let done = ((step - self.warmup) as f64 / after).min(1.0);
        self.peak
            * match self.decay {
                Decay::Linear => 1.0 - done,
                Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
                Decay::Constant => 1.0,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_to_its_peak_and_falls_towards_zero() {
        for decay in [Decay::Linear, Decay::Cosine] {
            let schedule = Schedule { peak: 2.0, warmup: 10, steps: 100, decay };
            let rates: Vec<f64> = (0..100).map(|i| schedule.at(i)).collect();
            assert!(rates[..11].is_sorted_by(|a, b| a < b) && rates[0] > 0.0);
            assert_eq!(rates[10], 2.0);
            assert!(rates[10..].is_sorted_by(|a, b| a > b));
            assert!(rates[99] > 0.0 && rates[99] < 0.05);
            assert!((rates[55] - 1.0).abs() < 1e-9, "half way down at half way");
        }
        let constant = Schedule { peak: 2.0, warmup: 0, steps: 10, decay: Decay::Constant };
        assert_eq!(constant.at(0), constant.at(9));
    }
}
