//! What a tuning run shows: its progress on standard error, a bar on a terminal and lines elsewhere,
//! and its result. Ctrl-C is heard here too.

use std::{
    io::{IsTerminal, Write},
    ops::ControlFlow,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::tune::{
    calibrate::{LEAST_EXAMPLES, LearnedCalibration},
    held_out_calibration::HeldOutCalibration,
    job::{Observer, Outcome, OutputPaths},
    loss::ValidationMetrics,
    parameters::Method,
    plan::{HeldOut, Plan},
    sweep::{Sweep, Trial},
    trainer::{Ended, Progress, Settings},
};

/// The progress on standard error: a bar on a terminal, lines elsewhere.
pub(super) struct Screen {
    bar: ProgressBar,
    terminal: bool,
    metric: String,
    /// Whose metrics are shown.
    judges: &'static str,
    interrupted: Arc<AtomicBool>,
    validation: Option<ValidationMetrics>,
}

impl Screen {
    pub(super) fn new(plan: &Plan) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            None,
            if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() },
        );
        let template = "{prefix:>8} {wide_bar:.cyan/dim} {pos}/{len}  {msg}  {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self {
            bar,
            terminal,
            metric: plan.metric().replace('_', " "),
            judges: judges(plan),
            interrupted: interrupts(),
            validation: None,
        }
    }

    pub(super) fn say(&self, line: &str) {
        match self.terminal {
            true => self.bar.suspend(|| {
                let _ = writeln!(std::io::stderr(), "{line}");
            }),
            false => {
                let _ = writeln!(std::io::stderr(), "{line}");
            }
        }
    }

    /// Takes the bar away.
    pub(super) fn close(&self) {
        self.bar.finish_and_clear();
    }

    fn flow(&self) -> ControlFlow<()> {
        if self.interrupted.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

impl Observer for Screen {
    fn sweeping(&mut self, done: usize, of: usize) -> ControlFlow<()> {
        self.bar.set_prefix("sweep");
        self.bar.set_length(of as u64);
        self.bar.set_position(done as u64);
        self.flow()
    }

    fn swept(&mut self, sweep: &Sweep, plans: &[Plan]) {
        self.say(&format!(
            "learning rates tried, judged by {} examples (loss at the start: {:.3}):",
            sweep.judged, sweep.start
        ));
        for (i, trial) in sweep.trials.iter().enumerate() {
            let verdict = match (trial.diverged, sweep.chosen == Some(i)) {
                (true, _) => "diverged",
                (false, true) => "chosen",
                (false, false) => "",
            };
            let line = format!(
                "  {:<8} {:>9}  {:>2} steps  loss {:.3}  {} {:>5.1}%  {verdict}",
                plans[trial.plan].parameters.method().name(),
                trial.rate,
                trial.steps,
                trial.validation.loss,
                self.metric,
                100.0 * trial.validation.exact
            );
            self.say(line.trim_end());
        }
        if let (Some(winner), true) = (sweep.winner(), plans.len() > 1) {
            self.say(&why(sweep, winner, plans, &self.metric));
        }
    }

    fn cross_validating(&mut self, done: usize, of: usize) -> ControlFlow<()> {
        self.bar.set_prefix("validate");
        self.bar.set_length(of as u64);
        self.bar.set_position(done as u64);
        self.flow()
    }

    fn training(&mut self, _: &Plan, settings: &Settings, step: usize) {
        self.bar.reset();
        self.bar.set_prefix("tune");
        self.bar.set_length(settings.schedule.steps as u64);
        self.bar.set_position(step as u64);
        if step > 0 {
            self.say(&format!("continuing from step {step}"));
        }
    }

    fn progress(&mut self, progress: Progress<'_>) -> ControlFlow<()> {
        match progress {
            Progress::Step { step, loss, rate, .. } => {
                let validation = self.validation.map_or(String::new(), |h| {
                    format!("  {} {:.3}  {} {:.0}%", self.judges, h.loss, self.metric, 100.0 * h.exact)
                });
                self.bar.set_message(format!("loss {loss:.3}{validation}  lr {rate:.2e}"));
                self.bar.set_position(step as u64);
            }
            Progress::Evaluated { state, validation, best } => {
                self.validation = Some(validation);
                if !self.terminal {
                    let train = state.losses.last().map_or(String::new(), |l| format!("  loss {l:.3}"));
                    let best = if best { "  best" } else { "" };
                    self.say(&format!(
                        "step {:>5}{train}  {} loss {:.3}  {} {:>5.1}%{best}",
                        state.step,
                        self.judges,
                        validation.loss,
                        self.metric,
                        100.0 * validation.exact
                    ));
                }
            }
        }
        self.flow()
    }
}

/// Whose metrics choose the prompt, in an adjective.
fn judges(plan: &Plan) -> &'static str {
    match plan.held_out_is {
        HeldOut::Training if plan.folds > 0 => "cross-validated",
        HeldOut::Training => "training",
        HeldOut::File | HeldOut::Split => "held-out",
    }
}

/// Why a type of prompt was chosen, in a sentence.
fn why(sweep: &Sweep, winner: &Trial, plans: &[Plan], metric: &str) -> String {
    let title = |plan: usize| plans[plan].parameters.method().title();
    let reached = |trial: &Trial| {
        let Trial { validation, steps, .. } = trial;
        format!("loss {:.3} and {metric} {:.1}% after {steps} steps", validation.loss, 100.0 * validation.exact)
    };
    let others = (0..plans.len()).filter(|&plan| plan != winner.plan).map(|plan| match sweep.best_of(plan) {
        Some(best) => format!("{} of {}", reached(&sweep.trials[best]), title(plan)),
        None => format!("{}, which diverged", title(plan)),
    });
    let others = others.collect::<Vec<_>>().join(" and ");
    format!("{} is chosen: {}, against {others}", title(winner.plan), reached(winner))
}

/// The losses before and after, and where the prompt is.
pub(super) fn write_result(
    out: &mut dyn Write,
    plan: &Plan,
    outcome: &Outcome,
    paths: &OutputPaths,
    started: Instant,
) -> std::io::Result<()> {
    let metric = plan.metric().replace('_', " ");
    let row = |name: &str, validation: ValidationMetrics| {
        format!("  {name:<22} {:>8.3} {:>11.1}%", validation.loss, 100.0 * validation.exact)
    };
    let ended = match outcome.ended {
        Ended::Early => ", stopped early",
        Ended::Diverged => ", stopped where the loss diverged",
        Ended::Interrupted => ", finished before its end",
        Ended::Finished => "",
    };
    writeln!(out, "\n  {:<22} {:>8} {:>12}", "", "loss", metric)?;
    writeln!(out, "{}", row("without a prompt", outcome.without_prompt))?;
    writeln!(out, "{}", row("before tuning", outcome.before))?;
    writeln!(out, "{}", row("after tuning", outcome.after))?;
    if outcome.joint_steps > 0 {
        writeln!(
            out,
            "\nafter tuning: measured before the last {} steps, in which the held-out examples were trained on, too",
            outcome.joint_steps
        )?;
    }
    if plan.folds > 0 {
        writeln!(
            out,
            "\nbefore and after tuning: {}-fold cross-validation, each example judged by a prompt that was not tuned on it",
            plan.folds
        )?;
    }
    if let Some(calibration) = &outcome.calibration {
        writeln!(out, "\n{}", calibration_line(calibration))?;
    }
    let has_rows = matches!(plan.parameters.method(), Method::PromptTuning | Method::PTuning(_));
    if let (Some([first, last]), true) = (outcome.stalled, has_rows) {
        writeln!(
            out,
            "\nthe training loss fell only from {first:.3} to {last:.3}: embeddings may not hold enough for this task; try \
             --type prefix, or more --steps"
        )?;
    }
    writeln!(
        out,
        "\nkept step {} of {}{ended}; learning rate {}; {:.0} s\nwrote {} (version {}) and {}\n\nserve it:  softserve serve --prompts {}",
        outcome.best_step,
        outcome.state.step,
        outcome.rate,
        started.elapsed().as_secs_f64(),
        paths.output.display(),
        outcome.version.digest,
        paths.output.join(crate::prompt::files::CURVE).display(),
        paths.output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).display(),
    )
}

/// What came of the calibration of the label probabilities, in one line.
fn calibration_line(calibration: &HeldOutCalibration) -> String {
    match calibration {
        HeldOutCalibration::TooFew { found } => format!(
            "label probabilities are not calibrated: that takes {LEAST_EXAMPLES} held-out examples that are not trained \
             on, and there are {found}; give --eval-data"
        ),
        HeldOutCalibration::Failed(error) => {
            format!("label probabilities are not calibrated: the held-out examples could not be scored: {error}")
        }
        HeldOutCalibration::Learned(LearnedCalibration { calibration, examples, before, held_out, is_better }) => {
            let scores = format!(
                "Brier score {:.4} before, {:.4} after; ECE {:.4} before, {:.4} after (5-fold cross-validation on {examples} \
                 held-out examples)",
                before.brier, held_out.brier, before.ece, held_out.ece
            );
            match (is_better, calibration.priors.len()) {
                (false, _) => {
                    format!("no calibration is stored, since label probabilities are no better with one: {scores}")
                }
                (true, 0) => format!("calibration stored: temperature {}; {scores}", calibration.temperature),
                (true, n) => {
                    format!(
                        "calibration stored: temperature {}, priors of {n} labels; {scores}",
                        calibration.temperature
                    )
                }
            }
        }
    }
}

/// Set by the first Ctrl-C; the second ends the process at once.
fn interrupts() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    std::thread::spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        while runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
            if set.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        }
    });
    flag
}
