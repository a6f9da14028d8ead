//! The learning rate, and the type of prompt, that suit a model and a task: published rates span 1e-4 to 0.3, and a wrong
//! one does not train at all.
//!
//! Candidates race by successive halving (Jamieson & Talwalkar 2016): each trains for a few steps, the better half goes on
//! with the best of each type, and the one with the lowest loss on examples that none was trained on wins. These are a third of all examples, more
//! than a run holds out, because few examples choose by chance.

use std::ops::ControlFlow;

use super::{
    TuneError, folds,
    forward::Forward,
    loss::ValidationMetrics,
    plan::Plan,
    schedule::{Decay, Schedule},
    trainer::{Settings, State, Trainer, Validation},
    variation::Variation,
};
use crate::tokenizer::Tokenizer;

/// Steps that each candidate trains in the first round, and then those of the second round.
pub const ROUNDS: [usize; 2] = [10, 20];
/// Steps over which the rate rises.
const WARMUP: usize = 3;
/// A larger type of prompt has to lower the loss to this part of a smaller one's.
const CLEARLY_LOWER: f64 = 0.98;

/// A type of prompt and a rate that were tried.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Trial {
    /// Which of the plans.
    pub plan: usize,
    pub rate: f64,
    /// Steps that it was trained.
    pub steps: usize,
    /// What the judging examples gave after them.
    pub validation: ValidationMetrics,
    /// The loss was not finite, or higher than at the start.
    pub diverged: bool,
}

/// Everything that was tried, and what was chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sweep {
    /// The lowest loss of any plan's initial values.
    pub start: f64,
    pub trials: Vec<Trial>,
    /// Examples that judged.
    pub judged: usize,
    /// The index of a trial; `None` where all diverged.
    pub chosen: Option<usize>,
}

impl Sweep {
    /// The chosen trial.
    pub fn winner(&self) -> Option<&Trial> {
        self.chosen.map(|i| &self.trials[i])
    }

    /// The best trial of a plan, of those that went on the longest.
    pub fn best_of(&self, plan: usize) -> Option<usize> {
        let own = |(i, trial): (usize, &Trial)| (trial.plan == plan && !trial.diverged).then_some(i);
        self.trials.iter().enumerate().filter_map(own).min_by(|&a, &b| {
            let (a, b) = (&self.trials[a], &self.trials[b]);
            b.steps.cmp(&a.steps).then(a.validation.loss.total_cmp(&b.validation.loss))
        })
    }
}

/// A candidate in the race: one state for each fold.
struct Candidate {
    trial: usize,
    states: Vec<State>,
}

/// Races all rates of all plans, which have the same examples. `observe` is told after each step how many of how many are
/// done; a break ends the race and gives `None`.
///
/// # Errors
/// A forward pass fails.
pub fn race(
    forward: &Forward,
    tokenizer: &Tokenizer,
    plans: &[Plan],
    observe: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Option<Sweep>, TuneError> {
    let Some(first) = plans.first() else { return Ok(None) };
    let folds = folds::of_race(first);
    let judged = folds.iter().map(|fold| fold.judge.len()).sum();
    let (mut initial, mut starts) = (Vec::new(), Vec::new());
    for plan in plans {
        let values = folds.iter().map(|fold| plan.initial_of(forward, tokenizer, &fold.train));
        let values = values.collect::<Result<Vec<_>, TuneError>>()?;
        let slices: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
        starts.push(folds::validate(forward, plan, &folds, &slices)?);
        initial.push(values);
    }
    let start = starts.iter().map(|start| start.loss).fold(f64::INFINITY, f64::min);
    let mut sweep = Sweep { start, trials: Vec::new(), judged, chosen: None };
    let mut candidates = Vec::new();
    for (i, plan) in plans.iter().enumerate() {
        for &rate in &plan.rates {
            let states = initial[i].iter().map(|values| State::new(values.clone())).collect();
            candidates.push(Candidate { trial: sweep.trials.len(), states });
            sweep.trials.push(Trial { plan: i, rate, steps: 0, validation: starts[i], diverged: false });
        }
    }
    let (n, half) = (candidates.len(), candidates.len().div_ceil(2));
    let of = folds.len() * (n * ROUNDS[0] + half * ROUNDS[1]);
    let mut done = 0;
    for (round, steps) in ROUNDS.into_iter().enumerate() {
        if round > 0 {
            let loss = |candidate: &Candidate| sweep.trials[candidate.trial].validation.loss;
            candidates.retain(|candidate| !sweep.trials[candidate.trial].diverged);
            candidates.sort_by(|a, b| loss(a).total_cmp(&loss(b)));
            // Some types learn slowly at first: the best of each goes on.
            let mut seen = vec![false; plans.len()];
            let is_first =
                |candidate: &Candidate| !std::mem::replace(&mut seen[sweep.trials[candidate.trial].plan], true);
            let (mut ahead, behind): (Vec<_>, Vec<_>) = candidates.into_iter().partition(is_first);
            ahead.extend(behind);
            candidates = ahead;
            candidates.truncate(half);
        }
        for candidate in &mut candidates {
            let trial = &mut sweep.trials[candidate.trial];
            let plan = &plans[trial.plan];
            trial.steps += steps;
            let schedule = Schedule { peak: trial.rate, warmup: WARMUP, steps: trial.steps, decay: Decay::Constant };
            // In so few steps what is varied hides how well a candidate learns.
            let settings = Settings { schedule, variation: Variation::default(), ..plan.settings };
            for (fold, state) in folds.iter().zip(&mut candidate.states) {
                let trainer = Trainer {
                    forward,
                    parameters: &plan.parameters,
                    train: &fold.train,
                    validation: Validation::HeldOut(&[]),
                };
                let batch_size = settings.batch_size.min(fold.train.len());
                let settings = Settings { batch_size, ..settings };
                while state.step < trial.steps && !trial.diverged {
                    let loss = trainer.step(&settings, state, schedule.at(state.step))?;
                    trial.diverged = !loss.is_finite() || state.values.iter().any(|x| !x.is_finite());
                    done += 1;
                    if observe(done, of).is_break() {
                        return Ok(None);
                    }
                }
            }
            if !trial.diverged {
                let values: Vec<&[f32]> = candidate.states.iter().map(|state| &state.values[..]).collect();
                trial.validation = folds::validate(forward, plan, &folds, &values)?;
                let loss = trial.validation.loss;
                trial.diverged = !loss.is_finite() || loss > starts[trial.plan].loss;
            }
        }
    }
    sweep.chosen = chosen(&sweep, plans.len(), first.settings.labelled);
    Ok(Some(sweep))
}

/// The best trial of the first plan, or of a later one that is clearly better: with labels, right more often by more than a
/// standard error or, if neither is, of a clearly lower loss.
fn chosen(sweep: &Sweep, plans: usize, labelled: bool) -> Option<usize> {
    let longest = (0..plans).filter_map(|plan| sweep.best_of(plan)).map(|i| sweep.trials[i].steps).max()?;
    let finalists = (0..plans).filter_map(|plan| sweep.best_of(plan)).filter(|&i| sweep.trials[i].steps == longest);
    finalists.reduce(|best, other| {
        let (a, b) = (&sweep.trials[best].validation, &sweep.trials[other].validation);
        let is_right_more_often = |x: &ValidationMetrics, y: &ValidationMetrics| {
            labelled && x.exact > y.exact + x.standard_error(sweep.judged)
        };
        let other_wins = is_right_more_often(b, a) || !is_right_more_often(a, b) && b.loss < CLEARLY_LOWER * a.loss;
        if other_wins { other } else { best }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sweep(trials: [(usize, usize, f64, f64); 3]) -> Sweep {
        let trial = |(plan, steps, loss, exact)| {
            let validation = ValidationMetrics { loss, exact };
            Trial { plan, rate: 0.1, steps, validation, diverged: false }
        };
        Sweep { start: 9.0, trials: trials.map(trial).to_vec(), judged: 22, chosen: None }
    }

    #[test]
    fn a_larger_type_wins_by_accuracy_then_by_a_clearly_lower_loss() {
        let more_often = sweep([(0, 30, 1.051, 0.227), (1, 30, 1.369, 0.364), (1, 30, 1.053, 0.364)]);
        assert_eq!(chosen(&more_often, 2, true), Some(2));
        assert_eq!(chosen(&more_often, 2, false), Some(0), "of other answers the loss alone decides");
        let by_chance = sweep([(0, 30, 1.051, 0.32), (1, 30, 1.369, 0.364), (1, 30, 1.053, 0.364)]);
        assert_eq!(chosen(&by_chance, 2, true), Some(0), "as good, and smaller");
        let lower = sweep([(0, 30, 1.051, 0.32), (1, 10, 0.2, 0.9), (1, 30, 0.9, 0.32)]);
        assert_eq!(chosen(&lower, 2, true), Some(2));
        let surer = sweep([(0, 30, 1.3, 0.9), (1, 30, 0.9, 0.3), (1, 30, 0.8, 0.3)]);
        assert_eq!(chosen(&surer, 2, true), Some(0), "a lower loss does not outweigh wrong labels");
    }
}
