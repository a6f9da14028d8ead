//! Which examples a run is judged by, and whether it learns from them: cross-validation, and held-out examples that join at the end.

use std::{fmt::Write as _, fs, ops::ControlFlow, slice};

use softserve::examples::TokenizedExample;
use softserve::tune::{
    TuneError, folds,
    init::Init,
    job::{self, Observer},
    options::{Options, PromptType},
    plan::{HeldOut, Plan, Warning},
    schedule::Schedule,
    sweep::Sweep,
    trainer::{Ended, Progress, Settings, State, Trainer, Validation},
};

use crate::tune_job::{NEVER, StopAt, TestRun, files};

/// Counts the steps of a cross-validation, and ends it at one.
struct Count {
    last: (usize, usize),
    end: usize,
}

impl Observer for Count {
    fn sweeping(&mut self, _: usize, _: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn swept(&mut self, _: &Sweep, _: &[Plan]) {}
    fn cross_validating(&mut self, done: usize, of: usize) -> ControlFlow<()> {
        self.last = (done, of);
        if done == self.end { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
    fn training(&mut self, _: &Plan, _: &Settings, _: usize) {}
    fn progress(&mut self, _: Progress<'_>) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

#[test]
fn its_metrics_are_those_of_a_run_for_each_fold_together() {
    let run = TestRun::new();
    let options = Options { folds: 3, ..run.options() };
    let plan = Plan::new(&run.forward, &run.tokenizer, &options).unwrap();
    assert_eq!((plan.held_out_is, plan.folds, plan.warnings.len()), (HeldOut::Training, 3, 0));
    let mut count = Count { last: (0, 0), end: usize::MAX };
    let paths = run.paths("out");
    let outcome = job::run(&run.forward, &run.tokenizer, slice::from_ref(&plan), &paths, &mut count).unwrap();
    assert_eq!(count.last, (3 * 24, 3 * 24));

    let (mut loss, mut exact) = (0.0, 0.0);
    let parameters = &plan.parameters;
    for fold in folds::split(&plan.train, 3, plan.settings.seed) {
        assert_eq!(fold.train.len() + fold.judge.len(), 8);
        let validation = Validation::HeldOut(&fold.judge);
        let trainer = Trainer { forward: &run.forward, parameters, train: &fold.train, validation };
        let mut state = State::new(plan.initial.clone());
        let schedule = Schedule { peak: outcome.rate, ..plan.settings.schedule };
        let settings = Settings { schedule, ..plan.settings };
        let ended = trainer.run(&settings, &mut state, &mut |_| Ok(ControlFlow::Continue(()))).unwrap();
        assert_eq!(ended, Ended::Finished);
        let last = state.evaluations.last().unwrap().1;
        loss += last.loss * fold.judge.len() as f64 / 8.0;
        exact += last.exact * fold.judge.len() as f64 / 8.0;
    }
    let (step, last) = *outcome.state.evaluations.last().unwrap();
    assert_eq!(step, 24);
    assert!((last.loss - loss).abs() < 1e-9 && (last.exact - exact).abs() < 1e-9, "{last:?}, {loss} and {exact}");

    let metrics = &outcome.version.spec.metrics;
    for name in ["cross_validated_loss", "cross_validated_accuracy", "train_loss", "train_accuracy"] {
        assert!(metrics.contains_key(name), "{name} in {metrics:?}");
    }
    assert!(metrics["train_loss"] < metrics["cross_validated_loss"], "labels of chance are only learnt by heart");
}

#[test]
fn an_interrupted_run_goes_on_with_what_was_found_and_an_interrupted_validation_leaves_nothing() {
    let run = TestRun::new();
    let options = Options { folds: 3, ..run.options() };
    let plan = Plan::new(&run.forward, &run.tokenizer, &options).unwrap();
    let whole = run.paths("whole");
    run.tune(&options, &whole, NEVER).unwrap();
    let mut cut = run.paths("cut");
    let mut stop = Count { last: (0, 0), end: 30 };
    let stopped = job::run(&run.forward, &run.tokenizer, slice::from_ref(&plan), &cut, &mut stop);
    assert!(matches!(stopped, Err(TuneError::InterruptedCrossValidation)));
    assert!(!cut.output.exists() && !cut.checkpoint.exists());
    assert!(matches!(run.tune(&options, &cut, StopAt(14)), Err(TuneError::Interrupted { .. })));
    cut.resume = true;
    let mut none = Count { last: (0, 0), end: 1 };
    job::run(&run.forward, &run.tokenizer, slice::from_ref(&plan), &cut, &mut none).unwrap();
    assert_eq!(none.last, (0, 0), "it is not repeated");
    assert_eq!(files(&cut.output), files(&whole.output));
}

#[test]
fn a_fold_begins_without_the_examples_that_judge_it() {
    let run = TestRun::new();
    let options = Options { prompt_type: PromptType::Prefix, init: Init::Examples, folds: 3, ..run.options() };
    let plan = Plan::new(&run.forward, &run.tokenizer, &options).unwrap();
    let of = |examples: &[TokenizedExample]| plan.initial_of(&run.forward, &run.tokenizer, examples).unwrap();
    assert_eq!(of(&plan.train), plan.initial);
    for fold in folds::split(&plan.train, 3, 0) {
        let alone = of(&fold.train);
        assert_eq!(of(&fold.train), alone);
        let mut others = fold.train.clone();
        others.reverse();
        others.extend(fold.judge);
        assert_ne!(alone, of(&others));
    }
    let words = Plan::new(&run.forward, &run.tokenizer, &Options { init: Init::Vocab, ..options }).unwrap();
    assert_eq!(words.initial_of(&run.forward, &run.tokenizer, &words.train[..2]).unwrap(), words.initial);
}

#[test]
fn it_can_be_turned_off_and_the_number_of_folds_has_a_range() {
    let run = TestRun::new();
    let plan = Plan::new(&run.forward, &run.tokenizer, &run.options()).unwrap();
    assert_eq!(plan.folds, 0);
    assert!(matches!(plan.warnings[..], [Warning::NothingHeldOut { examples: 8 }]));
    let many = Plan::new(&run.forward, &run.tokenizer, &Options { folds: 20, ..run.options() }).unwrap();
    assert_eq!(many.folds, 8, "no more than there are inputs");
    let refused = Plan::new(&run.forward, &run.tokenizer, &Options { folds: 1, ..run.options() }).expect_err("refused");
    assert_eq!(refused.to_string(), "the number of folds is 1, expected 2 to 100, or 0 for no cross-validation");
}

#[test]
fn held_out_examples_join_the_others_for_the_last_fifth_of_the_steps() {
    let run = TestRun::new();
    let data = run.options().data.with_file_name("many.jsonl");
    let mut lines = String::new();
    for i in 0..48 {
        let (word, label) = if i % 2 == 0 { ("red", "a") } else { ("dark", "b") };
        writeln!(lines, "{{\"input\": \"{word} {i}\", \"label\": \"{label}\"}}").unwrap();
    }
    fs::write(&data, lines).unwrap();
    let options = Options { data, ..run.options() };
    let apart = Options { keep_held_out: true, ..options.clone() };
    let plan = Plan::new(&run.forward, &run.tokenizer, &options).unwrap();
    assert_eq!((plan.held_out_is, plan.held_out.len(), plan.joint_steps), (HeldOut::Split, 8, 4));

    let joint = run.tune(&options, &run.paths("joint"), NEVER).unwrap();
    assert_eq!((joint.joint_steps, joint.best_step, joint.state.step), (4, 24, 24));
    let last = joint.state.evaluations.last().unwrap();
    assert_eq!((last.0, last.1), (20, joint.after), "it is measured before they join");

    let settings = Settings { schedule: Schedule { peak: 0.1, ..plan.settings.schedule }, ..plan.settings };
    let validation = Validation::HeldOut(&plan.held_out);
    let trainer = Trainer { forward: &run.forward, parameters: &plan.parameters, train: &plan.train, validation };
    let mut state = State::new(plan.initial.clone());
    let go_on = &mut |_: Progress<'_>| Ok(ControlFlow::Continue(()));
    trainer.run_until(20, &settings, &mut state, go_on).unwrap();
    assert_eq!(state.losses, joint.state.losses[..20]);
    let all: Vec<_> = plan.train.iter().chain(&plan.held_out).cloned().collect();
    let trainer = Trainer { train: &all, ..trainer };
    trainer.run_unevaluated(4, settings.schedule.at(20), &settings, &mut state, go_on).unwrap();
    assert_eq!(state.values, joint.state.values);

    let kept = run.tune(&apart, &run.paths("apart"), NEVER).unwrap();
    assert_eq!((kept.joint_steps, kept.state.losses[..20] == joint.state.losses[..20]), (0, true));
    assert_ne!(kept.state.values, joint.state.values);
    let file = Options { eval_data: Some(run.options().data), ..options };
    assert_eq!(Plan::new(&run.forward, &run.tokenizer, &file).unwrap().joint_steps, 0, "a file of its own stays apart");
}
