//! The loop: batches, gradients, updates, evaluations, early stopping. Everything that a run
//! depends on is in [`Settings`] and [`State`], so a run can stop and go on bit for bit.

use std::ops::ControlFlow;

use candle_core::Result;

use super::{
    forward::Forward,
    loss::{self, ValidationMetrics},
    optim::{self, AdamW, Moments},
    order,
    parameters::Parameters,
    schedule::Schedule,
    variation::{self, Variation},
};
use crate::examples::TokenizedExample;

/// What decides a run, beside the data and the initial values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Examples in a forward pass.
    pub batch_size: usize,
    /// Forward passes whose gradients make one update.
    pub accumulate: usize,
    pub schedule: Schedule,
    pub optimizer: AdamW,
    /// The largest norm of a gradient; 0 is no limit.
    pub clip: f64,
    /// Of the order of the examples and of what is varied.
    pub seed: u64,
    pub variation: Variation,
    /// Steps between evaluations.
    pub eval_every: usize,
    /// Evaluations without a clear gain after which the run may stop; 0 is never.
    pub patience: usize,
    /// The answers are labels, so that the part of exact ones is the accuracy.
    pub labelled: bool,
}

/// A moment of a run: what has to be kept to go on from it.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// Updates done.
    pub step: usize,
    /// What is learned, as its [`Parameters`] lay it out.
    pub values: Vec<f32>,
    pub moments: Moments,
    /// The best prompt so far.
    pub best: Option<Best>,
    /// Evaluations since the last clear gain: what patience (early stopping) counts.
    pub evaluations_without_gain: usize,
    /// What the last clear gain reached.
    pub last_gain: Option<ValidationMetrics>,
    /// The training loss of each step.
    pub losses: Vec<f64>,
    /// Each evaluation, by the number of updates before it.
    pub evaluations: Vec<(usize, ValidationMetrics)>,
}

/// The values of a prompt and what it reached.
#[derive(Debug, Clone, PartialEq)]
pub struct Best {
    pub step: usize,
    pub values: Vec<f32>,
    pub validation: ValidationMetrics,
}

impl State {
    /// Before the first step.
    pub fn new(values: Vec<f32>) -> Self {
        let moments = Moments::zeros(values.len());
        Self {
            step: 0,
            values,
            moments,
            best: None,
            evaluations_without_gain: 0,
            last_gain: None,
            losses: vec![],
            evaluations: vec![],
        }
    }

    /// Adds an evaluation of this moment.
    pub(super) fn record(&mut self, validation: ValidationMetrics) {
        if self.last_gain.is_none_or(|gain| validation.clearly_better_than(&gain)) {
            (self.evaluations_without_gain, self.last_gain) = (0, Some(validation));
        } else {
            self.evaluations_without_gain += 1;
        }
        self.evaluations.push((self.step, validation));
    }
}

/// What a run tells while it goes.
#[derive(Debug, Clone, Copy)]
pub enum Progress<'a> {
    /// An update was made.
    Step { step: usize, of: usize, loss: f64, rate: f64 },
    /// The prompt was evaluated; `state` is a moment to go on from.
    Evaluated { state: &'a State, validation: ValidationMetrics, best: bool },
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// All steps are done.
    Finished,
    /// The last evaluations brought no gain.
    Early,
    /// The loss was not a number.
    Diverged,
    /// The observer said so.
    Interrupted,
}

/// A model and the examples that a prompt is tuned on.
#[derive(Debug, Clone, Copy)]
pub struct Trainer<'a> {
    pub forward: &'a Forward,
    pub parameters: &'a Parameters,
    pub train: &'a [TokenizedExample],
    pub validation: Validation<'a>,
}

/// What tells how good a prompt is while it is learned.
#[derive(Debug, Clone, Copy)]
pub enum Validation<'a> {
    /// Examples that are not trained on.
    HeldOut(&'a [TokenizedExample]),
    /// What runs on folds of so many examples gave after so many steps: the examples themselves are trained on.
    CrossValidated { evaluations: &'a [(usize, ValidationMetrics)], examples: usize },
}

impl Validation<'_> {
    /// The number of examples that judge.
    fn examples(&self) -> usize {
        match self {
            Self::HeldOut(examples) => examples.len(),
            Self::CrossValidated { examples, .. } => *examples,
        }
    }
}

impl Trainer<'_> {
    /// Runs from `state` to the end of the schedule, or until patience, divergence or the observer
    /// ends it. An evaluation comes before the first step, every `eval_every` steps, and last.
    pub fn run(
        &self,
        settings: &Settings,
        state: &mut State,
        observe: &mut dyn FnMut(Progress<'_>) -> Result<ControlFlow<()>>,
    ) -> Result<Ended> {
        self.run_until(settings.schedule.steps, settings, state, observe)
    }

    /// As [`run`](Self::run), to step `until` of the schedule.
    pub fn run_until(
        &self,
        until: usize,
        settings: &Settings,
        state: &mut State,
        observe: &mut dyn FnMut(Progress<'_>) -> Result<ControlFlow<()>>,
    ) -> Result<Ended> {
        if state.evaluations.is_empty() && self.record(settings, state, observe)?.is_break() {
            return Ok(Ended::Interrupted);
        }
        // A run that is resumed may have been at its end.
        let is_evaluated = state.evaluations.last().is_some_and(|(step, _)| *step == state.step);
        if state.step > 0 && state.step < until && is_evaluated && self.has_ended(settings, state) {
            return Ok(Ended::Early);
        }
        while state.step < until {
            let rate = settings.schedule.at(state.step);
            if let Some(ended) = self.observed_step(settings, state, rate, observe)? {
                return Ok(ended);
            }
            if state.step.is_multiple_of(settings.eval_every) || state.step == until {
                if self.record(settings, state, observe)?.is_break() {
                    return Ok(Ended::Interrupted);
                }
                if self.has_ended(settings, state) {
                    return Ok(Ended::Early);
                }
            }
        }
        Ok(Ended::Finished)
    }

    /// So many further steps without an evaluation, in which the rate falls in a straight line from `rate` to zero.
    pub fn run_unevaluated(
        &self,
        steps: usize,
        rate: f64,
        settings: &Settings,
        state: &mut State,
        observe: &mut dyn FnMut(Progress<'_>) -> Result<ControlFlow<()>>,
    ) -> Result<Ended> {
        for step in 0..steps {
            let rate = rate * (1.0 - step as f64 / steps as f64);
            if let Some(ended) = self.observed_step(settings, state, rate, observe)? {
                return Ok(ended);
            }
        }
        Ok(Ended::Finished)
    }

    /// One update, after which the run may have ended.
    fn observed_step(
        &self,
        settings: &Settings,
        state: &mut State,
        rate: f64,
        observe: &mut dyn FnMut(Progress<'_>) -> Result<ControlFlow<()>>,
    ) -> Result<Option<Ended>> {
        let loss = self.step(settings, state, rate)?;
        if !loss.is_finite() || state.values.iter().any(|x| !x.is_finite()) {
            return Ok(Some(Ended::Diverged));
        }
        let of = settings.schedule.steps;
        let flow = observe(Progress::Step { step: state.step, of, loss, rate })?;
        Ok(flow.is_break().then_some(Ended::Interrupted))
    }

    /// One update; returns the mean loss of the batch before it.
    pub fn step(&self, settings: &Settings, state: &mut State, rate: f64) -> Result<f64> {
        let batches: Vec<Vec<&TokenizedExample>> = (0..settings.accumulate)
            .map(|i| {
                let index = state.step * settings.accumulate + i;
                let chosen = order::batch(self.train.len(), settings.batch_size, index, settings.seed);
                chosen.into_iter().map(|j| &self.train[j]).collect()
            })
            .collect();
        // Each answer token weighs the same, in whichever forward pass it is.
        let tokens: usize = batches.iter().flatten().map(|e| e.answer.len()).sum();
        let mut total = 0.0;
        let mut gradient = vec![0f32; state.values.len()];
        let variation = settings.variation;
        let template = if variation.word_dropout > 0.0 { variation::template_tokens(self.train) } else { vec![] };
        for (i, batch) in batches.iter().enumerate() {
            let mut rng = Variation::rng(settings.seed, state.step * settings.accumulate + i);
            let varied = variation.examples(batch, &template, &mut rng);
            let values = variation.values(&state.values, self.parameters.tensors(), &mut rng);
            let batch: Vec<&TokenizedExample> = varied.iter().collect();
            let (sum, part) = loss::gradient(self.forward, self.parameters, &values, &batch)?;
            total += sum;
            gradient.iter_mut().zip(part).for_each(|(g, p)| *g += p);
        }
        gradient.iter_mut().for_each(|g| *g /= tokens as f32);
        if settings.clip > 0.0 {
            optim::clip(&mut gradient, settings.clip);
        }
        state.step += 1;
        settings.optimizer.update(&mut state.values, &gradient, &mut state.moments, state.step, rate);
        let mean = total / tokens as f64;
        state.losses.push(mean);
        Ok(mean)
    }

    /// What the prompt that values make, or the model on its own, gives for examples.
    ///
    /// # Errors
    /// A forward pass fails.
    pub fn evaluate(
        &self,
        settings: &Settings,
        values: Option<&[f32]>,
        examples: &[TokenizedExample],
    ) -> Result<ValidationMetrics> {
        let examples: Vec<&TokenizedExample> = examples.iter().collect();
        let prompt = match values {
            Some(values) => Some(self.parameters.prompt_of(values, &self.forward.model().info().device)?),
            None => None,
        };
        loss::evaluate(self.forward, prompt.as_ref(), &examples, settings.batch_size)
    }

    /// How good the prompt of a state is; `None` after the last step that cross-validation evaluated.
    fn validate(&self, settings: &Settings, state: &State) -> Result<Option<ValidationMetrics>> {
        match self.validation {
            Validation::HeldOut(examples) => self.evaluate(settings, Some(&state.values), examples).map(Some),
            Validation::CrossValidated { evaluations, .. } => {
                Ok(evaluations.iter().find(|(step, _)| *step == state.step).map(|(_, validation)| *validation))
            }
        }
    }

    /// Whether this evaluation's prompt replaces the one that was kept so far.
    ///
    /// A few held-out examples often are right by chance, and choosing the step where most were takes the luckiest, not the
    /// best. So a labelled task keeps the later step, at a lower learning rate, unless an earlier one was right more often
    /// by more than a standard error. The loss says little there: it rises with confidence while the choice of labels still gets
    /// better. Of other answers, which are seldom exact, the lower loss decides in the same bounds.
    fn keeps(&self, settings: &Settings, state: &State, validation: &ValidationMetrics) -> bool {
        let Some(best) = &state.best else { return true };
        if !validation.loss.is_finite() {
            return false;
        }
        let peak = peak(state, validation);
        let enough = peak.exact - peak.standard_error(self.validation.examples());
        if validation.exact < enough {
            return false;
        }
        let is_later_better = settings.labelled && enough > 0.0;
        is_later_better || best.validation.exact < enough || validation.loss < best.validation.loss
    }

    /// Whether more steps promise nothing: there was no gain for long, and the held-out examples say with some certainty that it
    /// was better before, or the training examples have nothing left to teach.
    pub(super) fn has_ended(&self, settings: &Settings, state: &State) -> bool {
        const LEARNT: f64 = 0.01;
        if let Validation::CrossValidated { evaluations: [.., (last, _)], .. } = self.validation {
            return state.step >= *last && state.step < settings.schedule.steps;
        }
        if settings.patience == 0 || state.evaluations_without_gain < settings.patience {
            return false;
        }
        let Some((_, last)) = state.evaluations.last() else { return false };
        let peak = peak(state, last);
        let error = peak.standard_error(self.validation.examples());
        if !settings.labelled || peak.exact <= error {
            return true;
        }
        let round = self.train.len().div_ceil(settings.batch_size * settings.accumulate).min(state.losses.len());
        let learnt = state.losses[state.losses.len() - round..].iter().all(|loss| *loss < LEARNT);
        learnt || last.exact < peak.exact - 2.0 * error
    }

    /// Records how good the prompt is, and keeps it if it is the best; without an evaluation of this step nothing is done.
    fn record(
        &self,
        settings: &Settings,
        state: &mut State,
        observe: &mut dyn FnMut(Progress<'_>) -> Result<ControlFlow<()>>,
    ) -> Result<ControlFlow<()>> {
        let Some(validation) = self.validate(settings, state)? else { return Ok(ControlFlow::Continue(())) };
        let best = self.keeps(settings, state, &validation);
        if best {
            state.best = Some(Best { step: state.step, values: state.values.clone(), validation });
        }
        state.record(validation);
        observe(Progress::Evaluated { state, validation, best })
    }
}

/// The evaluation with the most exact answers so far, `last` among them.
fn peak(state: &State, last: &ValidationMetrics) -> ValidationMetrics {
    let all = state.evaluations.iter().map(|(_, validation)| *validation);
    all.fold(*last, |peak, other| if other.exact > peak.exact { other } else { peak })
}
