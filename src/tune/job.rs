//! A run from its plan to the files that `serve` reads: sweep, training with checkpoints, result.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::Device;

use super::{
    TuneError,
    checkpoint::{Checkpoint, CheckpointError},
    cross_validation,
    forward::Forward,
    held_out_calibration::{self, HeldOutCalibration},
    loss::ValidationMetrics,
    output,
    plan::{HeldOut, Plan},
    sweep::{self, Sweep},
    trainer::{Best, Ended, Progress, Settings, State, Trainer, Validation},
};
use crate::examples::TokenizedExample;
use crate::{
    model::Model,
    prompt::{
        Version,
        format::Fit,
        spec::{BaseModel, TaskSpec},
    },
    sampling::SamplingOptions,
    tokenizer::Tokenizer,
};

/// The folders of a run: of its result and of its state.
#[derive(Debug, Clone)]
pub struct OutputPaths {
    /// The folder of the finished prompt.
    pub output: PathBuf,
    /// The folder of the unfinished run's state.
    pub checkpoint: PathBuf,
    /// Go on from the state that is there.
    pub resume: bool,
    /// Train no more: write the best prompt of the state that is there.
    pub finish: bool,
}

/// Sees a run while it goes. A break ends it; its last checkpoint stays.
pub trait Observer {
    /// A step of the sweep is done.
    fn sweeping(&mut self, done: usize, of: usize) -> ControlFlow<()>;
    /// The sweep is over.
    fn swept(&mut self, sweep: &Sweep, plans: &[Plan]);
    /// A step of the cross-validation is done.
    fn cross_validating(&mut self, done: usize, of: usize) -> ControlFlow<()>;
    /// The run of a plan begins, or goes on from `step`.
    fn training(&mut self, plan: &Plan, settings: &Settings, step: usize);
    /// Something happened in the run.
    fn progress(&mut self, progress: Progress<'_>) -> ControlFlow<()>;
}

/// What a finished run gives.
#[derive(Debug)]
pub struct Outcome {
    /// Which of the plans was run.
    pub plan: usize,
    /// As `serve` reads it from the folder.
    pub version: Version,
    pub state: State,
    pub ended: Ended,
    /// The learning rate's peak.
    pub rate: f64,
    /// The model on its own, without a prompt.
    pub without_prompt: ValidationMetrics,
    /// The initial values.
    pub before: ValidationMetrics,
    /// The prompt that was kept, and the step it is from.
    pub after: ValidationMetrics,
    pub best_step: usize,
    /// The last steps, in which the held-out examples were trained on, too: `after` was measured before them.
    pub joint_steps: usize,
    /// The mean training loss of the first and of the last tenth of the steps, where it fell by less than half: a prompt of
    /// this type may not hold enough for the task.
    pub stalled: Option<[f64; 2]>,
    /// Of the label probabilities; `None` where the task has no labels.
    pub calibration: Option<HeldOutCalibration>,
}

/// Runs one of several plans for the same examples, which differ in what is learned: the one that a short race finds to be
/// the best. The folder of an existing prompt is not touched before the new one is complete and has been read back.
/// `tokenizer` is the one that the plans were made with.
///
/// # Errors
/// The run fails, or is interrupted: then its state is in the checkpoint's folder.
///
/// # Panics
/// If there is no plan.
pub fn run(
    forward: &Forward,
    tokenizer: &Tokenizer,
    plans: &[Plan],
    paths: &OutputPaths,
    observer: &mut dyn Observer,
) -> Result<Outcome, TuneError> {
    output::check(&paths.output)?;
    let model = forward.model();
    let begun = match paths.resume || paths.finish {
        true => saved(plans, &paths.checkpoint)?,
        false => begin(forward, tokenizer, plans, observer)?,
    };
    let Begun { chosen, rate, mut state, cross_validation } = begun;
    let plan = &plans[chosen];
    let validation = match cross_validation.is_empty() {
        true => Validation::HeldOut(&plan.held_out),
        false => Validation::CrossValidated { evaluations: &cross_validation, examples: plan.train.len() },
    };
    let trainer = Trainer { forward, parameters: &plan.parameters, train: &plan.train, validation };
    let settings = settings(plan, rate);
    observer.training(plan, &settings, state.step);

    let mut unsaved = None;
    let mut train = |state: &mut State| {
        let until = settings.schedule.steps - plan.joint_steps;
        trainer.run_until(until, &settings, state, &mut |progress| {
            if let Progress::Evaluated { state, .. } = progress
                && let Err(error) = save(plan, rate, state, &cross_validation, &paths.checkpoint)
            {
                unsaved = Some(error);
                return Ok(ControlFlow::Break(()));
            }
            Ok(observer.progress(progress))
        })
    };
    let ended = if paths.finish { Ended::Interrupted } else { train(&mut state)? };
    if let Some(error) = unsaved {
        return Err(error);
    }
    if ended == Ended::Interrupted && !paths.finish {
        return Err(TuneError::Interrupted { checkpoint: paths.checkpoint.clone() });
    }
    let before = state.evaluations.first().map(|e| e.1).ok_or(TuneError::Diverged { rate, step: state.step })?;
    let best = match state.best.clone() {
        // A prompt that is no better than its initial values is not a result.
        Some(best) if best.step > 0 && best.validation.better_than(&before) => best,
        _ if ended == Ended::Diverged => return Err(TuneError::Diverged { rate, step: state.step }),
        _ => return Err(TuneError::NoGain { rate, loss: before.loss }),
    };
    // Calibration needs a prompt that has not seen the held-out examples.
    let prompt = Arc::new(plan.parameters.prompt_of(&best.values, &Device::Cpu)?);
    let calibration = held_out_calibration::learn(model, tokenizer, plan, &prompt);
    let joint = join(&trainer, plan, &settings, &mut state, (ended, best.step), &paths.checkpoint, observer)?;
    let best = match joint {
        0 => best,
        _ => Best { step: state.step, values: state.values.clone(), validation: best.validation },
    };
    state.best = Some(best.clone());
    let without_prompt = trainer.evaluate(&settings, None, &plan.held_out)?;
    let mut metrics = vec![(side(plan), best.validation)];
    if plan.folds > 0 {
        metrics.push(("train", trainer.evaluate(&settings, Some(&best.values), &plan.train)?));
    }
    let mut spec = spec(model, plan, &settings, &state, &metrics);
    let prompt = Arc::new(plan.parameters.prompt_of(&best.values, &Device::Cpu)?);
    spec.calibration = calibration.as_ref().and_then(HeldOutCalibration::stored).cloned();
    let files = output::serialise(&plan.parameters, &prompt, &spec, model)?;
    let version = output::write(&paths.output, &plan.task, &files, &fit(model))?;
    output::write_curve(&paths.output, plan, &state)?;
    output::remove_checkpoint(&paths.checkpoint);
    Ok(Outcome {
        plan: chosen,
        version,
        ended,
        rate,
        without_prompt,
        before,
        after: best.validation,
        best_step: best.step,
        joint_steps: joint,
        stalled: stalled(&state.losses),
        state,
        calibration,
    })
}

/// Has the held-out examples join the others for the last steps, if the run went on to its end and its last prompt was kept: they
/// have said what they had to say. Returns how many steps that were.
fn join(
    trainer: &Trainer<'_>,
    plan: &Plan,
    settings: &Settings,
    state: &mut State,
    (ended, kept): (Ended, usize),
    checkpoint: &Path,
    observer: &mut dyn Observer,
) -> Result<usize, TuneError> {
    let is_the_end = matches!(ended, Ended::Finished | Ended::Early);
    if plan.joint_steps == 0 || !is_the_end || kept != state.step {
        return Ok(0);
    }
    let all: Vec<TokenizedExample> = plan.train.iter().chain(&plan.held_out).cloned().collect();
    let trainer = Trainer { train: &all, ..*trainer };
    let rate = settings.schedule.at(state.step);
    let mut observe = |progress: Progress<'_>| Ok(observer.progress(progress));
    match trainer.run_unevaluated(plan.joint_steps, rate, settings, state, &mut observe)? {
        Ended::Diverged => Err(TuneError::Diverged { rate, step: state.step }),
        Ended::Interrupted => Err(TuneError::Interrupted { checkpoint: checkpoint.to_owned() }),
        Ended::Finished | Ended::Early => Ok(plan.joint_steps),
    }
}

/// The mean loss of the first and of the last tenth of the steps, if it fell by less than half.
fn stalled(losses: &[f64]) -> Option<[f64; 2]> {
    let tenth = losses.len() / 10;
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / tenth as f64;
    let ends = (tenth > 0).then(|| [mean(&losses[..tenth]), mean(&losses[losses.len() - tenth..])]);
    ends.filter(|[first, last]| last > &(first / 2.0))
}

/// Saves a moment of a run, and draws it: who waits can look at the picture.
fn save(
    plan: &Plan,
    rate: f64,
    state: &State,
    cross_validation: &[(usize, ValidationMetrics)],
    folder: &Path,
) -> Result<(), TuneError> {
    let cross_validation = cross_validation.to_vec();
    Checkpoint { identity: plan.identity.clone(), rate, state: state.clone(), cross_validation }.write(folder)?;
    output::write_curve(folder, plan, state)
}

/// A run that can go on.
struct Begun {
    /// Which of the plans.
    chosen: usize,
    rate: f64,
    state: State,
    /// What cross-validation found, if there was one.
    cross_validation: Vec<(usize, ValidationMetrics)>,
}

/// A new run: of the best plan and rate, cross-validated where nothing is held out.
fn begin(
    forward: &Forward,
    tokenizer: &Tokenizer,
    plans: &[Plan],
    observer: &mut dyn Observer,
) -> Result<Begun, TuneError> {
    let (chosen, rate) = choose(forward, tokenizer, plans, observer)?;
    let plan = &plans[chosen];
    let cross_validation = match plan.folds {
        0 => Vec::new(),
        _ => {
            let mut observe = |done, of| observer.cross_validating(done, of);
            let found = cross_validation::run(forward, tokenizer, plan, &settings(plan, rate), &mut observe)?;
            found.ok_or(TuneError::InterruptedCrossValidation)?
        }
    };
    Ok(Begun { chosen, rate, state: State::new(plan.initial.clone()), cross_validation })
}

/// A plan's settings with the rate that was given or found.
fn settings(plan: &Plan, rate: f64) -> Settings {
    let mut settings = plan.settings;
    settings.schedule.peak = rate;
    settings
}

/// A run that was saved.
fn saved(plans: &[Plan], folder: &Path) -> Result<Begun, TuneError> {
    let mut first = None;
    for (i, plan) in plans.iter().enumerate() {
        match Checkpoint::read(folder, &plan.identity) {
            Ok(Checkpoint { rate, state, cross_validation, .. }) => {
                return Ok(Begun { chosen: i, rate, state, cross_validation });
            }
            Err(error) => first = first.or(Some(error)),
        }
    }
    Err(first.unwrap_or_else(|| CheckpointError::Missing(folder.to_owned())).into())
}

/// The plan and the rate to run it with.
fn choose(
    forward: &Forward,
    tokenizer: &Tokenizer,
    plans: &[Plan],
    observer: &mut dyn Observer,
) -> Result<(usize, f64), TuneError> {
    if let [plan] = plans
        && plan.rates.is_empty()
    {
        return Ok((0, plan.settings.schedule.peak));
    }
    let sweep = sweep::race(forward, tokenizer, plans, &mut |done, of| observer.sweeping(done, of))?;
    let sweep = sweep.ok_or(TuneError::InterruptedSweep)?;
    observer.swept(&sweep, plans);
    let tried = || plans.iter().flat_map(|plan| plan.rates.iter().copied()).collect();
    match sweep.winner() {
        Some(winner) => Ok((winner.plan, winner.rate)),
        None => Err(TuneError::NoRate { start: sweep.start, tried: tried() }),
    }
}

/// What a prompt of this model must fit.
pub fn fit(model: &Model) -> Fit {
    model.info().into()
}

/// Whose metrics chose the prompt, as `task.json` says it.
fn side(plan: &Plan) -> &'static str {
    match plan.held_out_is {
        HeldOut::Training if plan.folds > 0 => "cross_validated",
        HeldOut::Training => "train",
        HeldOut::File | HeldOut::Split => "held_out",
    }
}

fn spec(
    model: &Model,
    plan: &Plan,
    settings: &Settings,
    state: &State,
    validations: &[(&str, ValidationMetrics)],
) -> TaskSpec {
    let named = |(side, validation): &(&str, ValidationMetrics)| {
        [(format!("{side}_loss"), validation.loss), (format!("{side}_{}", plan.metric()), validation.exact)]
    };
    let run = [
        ("train_examples".to_owned(), plan.train.len() as f64),
        ("steps".to_owned(), state.step as f64),
        ("learning_rate".to_owned(), settings.schedule.peak),
    ];
    let metrics = validations.iter().flat_map(named).chain(run);
    let labels = plan.labels.iter().flat_map(|l| l.iter()).map(|(l, words)| (l.to_owned(), words.to_vec())).collect();
    TaskSpec {
        description: plan.description.clone(),
        truncate: plan.truncate.clone(),
        template: Some(plan.template.source().to_owned()),
        labels,
        defaults: SamplingOptions { max_tokens: Some(plan.max_tokens), ..SamplingOptions::default() },
        base_model: Some(BaseModel {
            name: Some(model.info().name.clone()),
            fingerprint: Some(model.info().fingerprint.clone()),
        }),
        metrics: metrics.map(|(name, value)| (name, digits(value))).collect(),
        ..TaskSpec::default()
    }
}

/// To four significant digits, for people.
fn digits(x: f64) -> f64 {
    format!("{x:.3e}").parse().unwrap_or(x)
}

/// Where the state of an unfinished run is kept by default: beside the finished prompt, hidden, so
/// that a server which watches the folder never sees half a task.
pub fn default_checkpoint(output: &Path) -> PathBuf {
    let name = output.file_name().map_or_else(|| "prompt".into(), |n| n.to_string_lossy());
    output.with_file_name(format!(".tune-{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_whose_training_loss_hardly_falls_has_stalled() {
        let falls_to = |end: f64| (0..200).map(|i| 4.0 + (end - 4.0) * f64::from(i) / 199.0).collect::<Vec<_>>();
        let [first, last] = stalled(&falls_to(3.0)).expect("stalled");
        assert!(first > 3.9 && last < 3.1, "{first} {last}");
        assert_eq!(stalled(&falls_to(0.5)), None);
        assert_eq!(stalled(&[4.0; 9]), None, "too few steps to tell");
    }
}
