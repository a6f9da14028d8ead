//! k-fold cross-validation of a run (Stone 1974), where there are too few examples to hold some out: one run for each fold, with
//! the settings of the run on all examples, judged by the examples that the fold leaves out. It says how many steps are best
//! and how good the result is on inputs that it has not seen.

use std::ops::ControlFlow;

use super::{
    TuneError,
    folds::{self, Fold},
    forward::Forward,
    loss::ValidationMetrics,
    plan::Plan,
    trainer::{Settings, State, Trainer, Validation},
};
use crate::tokenizer::Tokenizer;

/// The metrics of all folds together after so many steps: before the first step, at every evaluation, and last. The runs go on
/// side by side and end early as one run does. `observe` is told after each step how many of how many are done; a break ends
/// it and gives `None`. Without folds there are no metrics.
///
/// # Errors
/// A forward pass fails.
pub fn run(
    forward: &Forward,
    tokenizer: &Tokenizer,
    plan: &Plan,
    settings: &Settings,
    observe: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Option<Vec<(usize, ValidationMetrics)>>, TuneError> {
    let folds = folds::split(&plan.train, plan.folds, settings.seed);
    if folds.len() < 2 {
        return Ok(Some(Vec::new()));
    }
    let parameters = &plan.parameters;
    let begin = |fold: &Fold| {
        let batch_size = settings.batch_size.min(fold.train.len());
        let initial = plan.initial_of(forward, tokenizer, &fold.train)?;
        Ok((Settings { batch_size, ..*settings }, State::new(initial)))
    };
    let mut runs = folds.iter().map(begin).collect::<Result<Vec<(Settings, State)>, TuneError>>()?;
    let of = folds.len() * settings.schedule.steps;
    let all = Trainer {
        forward,
        parameters,
        train: &plan.train,
        validation: Validation::CrossValidated { evaluations: &[], examples: plan.train.len() },
    };
    // All runs together: their mean loss and their common metrics.
    let mut pooled = State::new(Vec::new());
    let judge = |runs: &[(Settings, State)]| {
        let values: Vec<&[f32]> = runs.iter().map(|(_, state)| &state.values[..]).collect();
        folds::validate(forward, plan, &folds, &values)
    };
    pooled.record(judge(&runs)?);
    while pooled.step < settings.schedule.steps {
        let rate = settings.schedule.at(pooled.step);
        let mut loss = 0.0;
        for (i, (fold, (settings, state))) in folds.iter().zip(&mut runs).enumerate() {
            let validation = Validation::HeldOut(&fold.judge);
            let trainer = Trainer { forward, parameters, train: &fold.train, validation };
            loss += trainer.step(settings, state, rate)? / folds.len() as f64;
            if observe(folds.len() * pooled.step + i + 1, of).is_break() {
                return Ok(None);
            }
        }
        pooled.step += 1;
        pooled.losses.push(loss);
        if pooled.step.is_multiple_of(settings.eval_every) || pooled.step == settings.schedule.steps {
            pooled.record(judge(&runs)?);
            if !loss.is_finite() || all.has_ended(settings, &pooled) {
                break;
            }
        }
    }
    Ok(Some(pooled.evaluations))
}
