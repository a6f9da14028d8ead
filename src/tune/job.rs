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
    forward::Forward,
    held_out_calibration::{self, HeldOutCalibration},
    loss::ValidationMetrics,
    output,
    plan::{HeldOut, Plan},
    sweep::{self, Sweep},
    trainer::{Ended, Progress, Settings, State, Trainer},
};
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
    let (chosen, rate, state) = match paths.resume || paths.finish {
        true => saved(plans, &paths.checkpoint)?,
        false => {
            let (chosen, rate) = choose(forward, plans, observer)?;
            (chosen, rate, None)
        }
    };
    let plan = &plans[chosen];
    let trainer = Trainer { forward, parameters: &plan.parameters, train: &plan.train, held_out: &plan.held_out };
    let mut state = state.unwrap_or_else(|| State::new(plan.initial.clone()));
    let mut settings = plan.settings;
    settings.schedule.peak = rate;
    observer.training(plan, &settings, state.step);

    let mut unsaved = None;
    let mut train = |state: &mut State| {
        trainer.run(&settings, state, &mut |progress| {
            if let Progress::Evaluated { state, .. } = progress
                && let Err(error) = save(plan, rate, state, &paths.checkpoint)
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
    let without_prompt = trainer.validate(&settings, None)?;
    let mut spec = spec(model, plan, &settings, &state, best.validation);
    let prompt = Arc::new(plan.parameters.prompt_of(&best.values, &Device::Cpu)?);
    let calibration = held_out_calibration::learn(model, tokenizer, plan, &prompt);
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
        state,
        calibration,
    })
}

/// Saves a moment of a run, and draws it: who waits can look at the picture.
fn save(plan: &Plan, rate: f64, state: &State, folder: &Path) -> Result<(), TuneError> {
    Checkpoint { identity: plan.identity.clone(), rate, state: state.clone() }.write(folder)?;
    output::write_curve(folder, plan, state)
}

/// The plan, the rate and the state of a run that was saved.
fn saved(plans: &[Plan], folder: &Path) -> Result<(usize, f64, Option<State>), TuneError> {
    let mut first = None;
    for (i, plan) in plans.iter().enumerate() {
        match Checkpoint::read(folder, &plan.identity) {
            Ok(checkpoint) => return Ok((i, checkpoint.rate, Some(checkpoint.state))),
            Err(error) => first = first.or(Some(error)),
        }
    }
    Err(first.unwrap_or_else(|| CheckpointError::Missing(folder.to_owned())).into())
}

/// The plan and the rate to run it with.
fn choose(forward: &Forward, plans: &[Plan], observer: &mut dyn Observer) -> Result<(usize, f64), TuneError> {
    if let [plan] = plans
        && plan.rates.is_empty()
    {
        return Ok((0, plan.settings.schedule.peak));
    }
    let sweep = sweep::race(forward, plans, &mut |done, of| observer.sweeping(done, of))?;
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

fn spec(model: &Model, plan: &Plan, settings: &Settings, state: &State, validation: ValidationMetrics) -> TaskSpec {
    let side = if plan.held_out_is == HeldOut::Training { "train" } else { "held_out" };
    let metrics = [
        (format!("{side}_loss"), validation.loss),
        (format!("{side}_{}", plan.metric()), validation.exact),
        ("train_examples".to_owned(), plan.train.len() as f64),
        ("steps".to_owned(), state.step as f64),
        ("learning_rate".to_owned(), settings.schedule.peak),
    ];
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
        metrics: metrics.into_iter().map(|(name, value)| (name, digits(value))).collect(),
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
