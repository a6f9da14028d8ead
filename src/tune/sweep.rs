//! The learning rate that suits a model and a task, found by short runs: published values span
//! 1e-4 to 0.3, and a wrong one does not train at all.

use std::ops::ControlFlow;

use candle_core::Result;

use super::{
    loss::ValidationMetrics,
    parameters::Method,
    schedule::{Decay, Schedule},
    trainer::{Ended, Settings, State, Trainer},
};

/// The rates tried, in units of how large what is learned is: what Adam may move a value in a step,
/// compared to the values.
pub fn relative_rates(method: Method) -> [f64; 5] {
    match method {
        Method::PromptTuning => [0.03, 0.1, 0.3, 1.0, 3.0],
        Method::PTuning(_) => [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
        Method::PrefixTuning => [0.003, 0.01, 0.03, 0.1, 0.3],
    }
}

/// Steps of each short run.
pub const STEPS: usize = 30;

/// A rate that was tried.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Trial {
    pub rate: f64,
    /// What the held-out examples gave after the short run.
    pub validation: ValidationMetrics,
    /// The loss was not finite, or higher than at the start.
    pub diverged: bool,
}

/// Every rate tried, and the chosen one.
#[derive(Debug, Clone, PartialEq)]
pub struct Sweep {
    pub start: ValidationMetrics,
    pub trials: Vec<Trial>,
    /// `None` where every rate diverged.
    pub chosen: Option<f64>,
}

/// Tries each rate from the same initial values, with the same batches, and chooses by the loss on
/// the held-out examples. `observe` is told after each step how many of how many are done; a break
/// ends the sweep and gives `None`.
pub fn sweep(
    trainer: &Trainer<'_>,
    settings: &Settings,
    initial: &[f32],
    rates: &[f64],
    steps: usize,
    observe: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Option<Sweep>> {
    let start = trainer.validate(settings, Some(initial))?;
    let mut trials: Vec<Trial> = Vec::new();
    for (i, &peak) in rates.iter().enumerate() {
        let schedule = Schedule { peak, warmup: steps / 10, steps, decay: Decay::Linear };
        let short = Settings { schedule, eval_every: usize::MAX, patience: 0, ..*settings };
        let mut state = State::new(initial.to_vec());
        // The start was evaluated once for all.
        state.evaluations.push((0, start));
        let ended = trainer.run(&short, &mut state, &mut |progress| {
            Ok(match progress {
                super::trainer::Progress::Step { step, .. } => observe(i * steps + step, rates.len() * steps),
                super::trainer::Progress::Evaluated { .. } => ControlFlow::Continue(()),
            })
        })?;
        if ended == Ended::Interrupted {
            return Ok(None);
        }
        let validation = state.evaluations.last().map_or(start, |e| e.1);
        let diverged = ended == Ended::Diverged || !validation.loss.is_finite() || validation.loss > start.loss;
        trials.push(Trial { rate: peak, validation, diverged });
    }
    let best = trials.iter().filter(|t| !t.diverged).min_by(|a, b| a.validation.loss.total_cmp(&b.validation.loss));
    let chosen = best.map(|t| t.rate);
    Ok(Some(Sweep { start, trials, chosen }))
}
