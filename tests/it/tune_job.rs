//! Whole tuning runs on a tiny random model: files in, a served prompt out.

use std::{collections::BTreeMap, fs, ops::ControlFlow, path::Path, sync::Arc};

use candle_core::{DType, Device};
use softserve::examples::TokenizedExample;
use softserve::{
    kernels,
    model::Model,
    packing::PromptShape,
    prompt::{LearnedPrompt, format::Fit},
    tokenizer::Tokenizer,
    tune::{
        TuneError,
        checkpoint::CheckpointError,
        forward::Forward,
        inference::Inference,
        init::Init,
        job::{self, Observer, Outcome, OutputPaths},
        options::{Length, Options, PromptType},
        parameters,
        plan::{HeldOut, Plan},
        prompt_encoder::PromptEncoderKind,
        sweep::{self, Sweep},
        trainer::{Progress, Settings},
    },
};

use crate::tiny_model::TinyModel;

/// Ends a run at a step; sees nothing else.
pub struct StopAt(pub usize);

impl Observer for StopAt {
    fn sweeping(&mut self, _: usize, _: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn cross_validating(&mut self, _: usize, _: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn swept(&mut self, _: &Sweep, _: &[Plan]) {}
    fn training(&mut self, _: &Plan, _: &Settings, _: usize) {}
    fn progress(&mut self, progress: Progress<'_>) -> ControlFlow<()> {
        match progress {
            Progress::Step { step, .. } if step == self.0 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }
}

pub const NEVER: StopAt = StopAt(usize::MAX);

pub struct TestRun {
    dir: tempfile::TempDir,
    pub forward: Forward,
    pub tokenizer: Tokenizer,
}

impl TestRun {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (_model_dir, files) = TinyModel::default().temp();
        let forward = Forward::new(Model::load(&files, kernels::cpu(), DType::F32).unwrap());
        let tokenizer = Tokenizer::load(&files).unwrap();
        let lines = ["red", "dark", "sky", "lawn", "tar", "snow", "sand", "coal"];
        let jsonl: String = lines
            .iter()
            .enumerate()
            .map(|(i, input)| format!("{{\"input\": \"{input}\", \"label\": \"{}\"}}\n", ["a", "b"][i % 2]))
            .collect();
        fs::write(dir.path().join("train.jsonl"), jsonl).unwrap();
        Self { dir, forward, tokenizer }
    }

    pub fn options(&self) -> Options {
        Options {
            virtual_tokens: Some(8),
            rate: Some(0.1),
            length: Length::Steps(24),
            eval_every: Some(6),
            patience: 0,
            folds: 0,
            batch_size: 4,
            ..Options::new("colour".parse().unwrap(), self.dir.path().join("train.jsonl"))
        }
    }

    pub fn paths(&self, name: &str) -> OutputPaths {
        let output = self.dir.path().join(name).join("colour");
        OutputPaths { checkpoint: job::default_checkpoint(&output), output, resume: false, finish: false }
    }

    pub fn tune(&self, options: &Options, paths: &OutputPaths, mut observer: StopAt) -> Result<Outcome, TuneError> {
        let plan = Plan::new(&self.forward, &self.tokenizer, options)?;
        job::run(&self.forward, &self.tokenizer, std::slice::from_ref(&plan), paths, &mut observer)
    }

    /// The matrix that is saved, row by row.
    fn flat(&self, prompt: &LearnedPrompt) -> Vec<f32> {
        let matrix = parameters::matrix(prompt, &Fit::from(self.forward.model().info())).unwrap();
        matrix.flatten_all().unwrap().to_vec1().unwrap()
    }
}

/// The greedy answers of an engine.
pub fn answers(
    forward: &Forward,
    prompt: Option<&Arc<LearnedPrompt>>,
    inputs: &[Vec<u32>],
    max_new: usize,
) -> Vec<Vec<u32>> {
    let longest = inputs.iter().map(Vec::len).max().unwrap();
    let inference = Inference::start(forward.model(), prompt, longest, max_new).unwrap();
    let inputs: Vec<_> = inputs.iter().map(|ids| PromptShape::None.followed_by(ids)).collect();
    inference.greedy(&inputs, max_new, None, &mut |_| {}).unwrap()
}

/// The types beside plain rows.
const TYPES: [PromptType; 3] = [
    PromptType::PTuning { encoder: PromptEncoderKind::Mlp, hidden_size: Some(24) },
    PromptType::PTuning { encoder: PromptEncoderKind::Lstm, hidden_size: Some(12) },
    PromptType::Prefix,
];

pub fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

#[test]
fn a_run_writes_a_prompt_that_serve_reads_and_leaves_the_model_as_it_was() {
    let run = TestRun::new();
    let before = run.forward.model().weights_digest().unwrap();
    let paths = run.paths("out");
    let options = Options { rate: None, length: Length::Steps(150), ..run.options() };
    let outcome = run.tune(&options, &paths, NEVER).unwrap();
    assert_eq!(run.forward.model().weights_digest().unwrap(), before);
    assert!(outcome.after.better_than(&outcome.before));

    let written = files(&paths.output);
    let names: Vec<&str> = written.keys().map(String::as_str).collect();
    assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors", "loss.svg", "task.json"]);
    assert!(String::from_utf8_lossy(&written["loss.svg"]).contains("</svg>"));
    assert!(!paths.checkpoint.exists(), "the state of a finished run is of no use");
    let best = outcome.state.best.unwrap();
    assert_eq!(run.flat(&outcome.version.prompt), best.values);
    let spec = &outcome.version.spec;
    assert_eq!(spec.template.as_deref(), Some("{{ input }}\n"));
    assert_eq!(spec.labels.keys().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(
        spec.base_model.as_ref().unwrap().fingerprint.as_deref(),
        Some(run.forward.model().info().fingerprint.as_str())
    );
    assert!(spec.metrics.contains_key("train_accuracy"), "{:?}", spec.metrics);
}

#[test]
fn greedy_answers_on_the_serving_kernels_are_those_that_tuning_counts_as_exact() {
    let run = TestRun::new();
    let options = Options { length: Length::Steps(120), ..run.options() };
    let plan = Plan::new(&run.forward, &run.tokenizer, &options).unwrap();
    assert_eq!(plan.held_out_is, HeldOut::Training);
    let outcome =
        job::run(&run.forward, &run.tokenizer, std::slice::from_ref(&plan), &run.paths("out"), &mut { NEVER }).unwrap();
    let inputs: Vec<_> = plan.train.iter().map(|example| example.input.clone()).collect();
    let mut answered = 0;
    let longest = inputs.iter().map(Vec::len).max().unwrap();
    let inference = Inference::start(run.forward.model(), Some(&outcome.version.prompt), longest, 5).unwrap();
    let outputs = inference.greedy(&inputs, 5, None, &mut |done| answered = done).unwrap();
    assert_eq!(answered, 8);
    let right = outputs.iter().zip(&plan.train).filter(|(o, e)| o[..] == e.answer[..e.answer.len() - 1]).count();
    assert_eq!(right as f64 / 8.0, outcome.after.exact);
    assert!(right >= 5, "too little was learned to say anything: {right}");
}

#[test]
fn each_type_is_written_as_peft_writes_it_read_back_and_answers_as_it_was_measured() {
    let run = TestRun::new();
    for (i, prompt_type) in TYPES.into_iter().enumerate() {
        let paths = run.paths(&format!("out-{i}"));
        let init = prompt_type.default_init();
        let options = Options { prompt_type, init, rate: None, length: Length::Steps(150), ..run.options() };
        let plan = Plan::new(&run.forward, &run.tokenizer, &options).unwrap();
        let outcome =
            job::run(&run.forward, &run.tokenizer, std::slice::from_ref(&plan), &paths, &mut { NEVER }).unwrap();
        assert!(outcome.after.loss < 0.7 * outcome.before.loss, "{prompt_type:?}: {outcome:?}");
        let best = outcome.state.best.as_ref().unwrap();
        let made = plan.parameters.prompt_of(&best.values, &Device::Cpu).unwrap();
        assert_eq!(run.flat(&outcome.version.prompt), run.flat(&made));

        let config: serde_json::Value = serde_json::from_slice(&files(&paths.output)["adapter_config.json"]).unwrap();
        let (peft_type, token_dim, heads, own) = match prompt_type {
            PromptType::Prefix => ("PREFIX_TUNING", 16, 2, "prefix_projection"),
            _ => ("P_TUNING", 32, 4, "encoder_reparameterization_type"),
        };
        assert_eq!(config["peft_type"], peft_type);
        assert_eq!(config["token_dim"], token_dim);
        assert_eq!(config["num_attention_heads"], heads);
        assert!(config.get(own).is_some(), "{config}");

        let inputs: Vec<Vec<u32>> = plan.train.iter().map(TokenizedExample::text_ids).collect();
        let outputs = answers(&run.forward, Some(&outcome.version.prompt), &inputs, 5);
        let right = outputs.iter().zip(&plan.train).filter(|(o, e)| o[..] == e.answer[..e.answer.len() - 1]).count();
        assert_eq!(right as f64 / 8.0, outcome.after.exact, "{prompt_type:?}");
        assert!(right >= 5, "{prompt_type:?}: too little was learned to say anything: {right}");
    }
}

#[test]
fn an_interrupted_run_of_each_type_goes_on_to_the_same_files_and_not_to_those_of_another() {
    let run = TestRun::new();
    for (i, prompt_type) in TYPES.into_iter().enumerate() {
        let rate = if prompt_type == PromptType::Prefix { 0.1 } else { 0.003 };
        let options = Options { prompt_type, init: prompt_type.default_init(), rate: Some(rate), ..run.options() };
        let whole = run.paths(&format!("whole-{i}"));
        run.tune(&options, &whole, NEVER).unwrap();
        let mut cut = run.paths(&format!("cut-{i}"));
        assert!(matches!(run.tune(&options, &cut, StopAt(14)), Err(TuneError::Interrupted { .. })));
        cut.resume = true;
        let other = Options { prompt_type: PromptType::Prompt, ..options.clone() };
        let refused = run.tune(&other, &cut, NEVER).expect_err("refused").to_string();
        assert!(refused.contains("type is prompt, was "), "{refused}");
        run.tune(&options, &cut, NEVER).unwrap();
        assert_eq!(files(&cut.output), files(&whole.output));
    }
}

#[test]
fn a_prompt_begins_as_another_of_its_kind_whichever_way_it_is_learned() {
    let run = TestRun::new();
    let tuned = |prompt_type: PromptType, name: &str| {
        let rate = if matches!(prompt_type, PromptType::PTuning { .. }) { 0.003 } else { 0.1 };
        let options = Options { prompt_type, init: prompt_type.default_init(), rate: Some(rate), ..run.options() };
        run.tune(&options, &run.paths(name), NEVER).unwrap().version.prompt.as_ref().clone()
    };
    let (rows, prefix) = (tuned(PromptType::Prompt, "rows"), tuned(PromptType::Prefix, "prefix"));
    let begun = |prompt_type: PromptType, from: &LearnedPrompt| {
        let options = Options { prompt_type, init: Init::Prompt(from.clone()), ..run.options() };
        let plan = Plan::new(&run.forward, &run.tokenizer, &options)?;
        Ok::<_, TuneError>(run.flat(&plan.parameters.prompt_of(&plan.initial, &Device::Cpu).unwrap()))
    };
    for (prompt_type, from) in [(PromptType::Prompt, &rows), (TYPES[0], &rows), (TYPES[1], &rows), (TYPES[2], &prefix)]
    {
        let began = begun(prompt_type, from).unwrap();
        let error = began.iter().zip(run.flat(from)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error < 5e-3, "{prompt_type:?} begins {error} away");
    }
    for (prompt_type, from, said) in [
        (PromptType::Prefix, &rows, "consists of embeddings, but the type prefix learns key-values"),
        (TYPES[0], &prefix, "consists of key-values, but the type p-tuning learns embeddings"),
    ] {
        let refused = begun(prompt_type, from).expect_err("refused").to_string();
        assert!(refused.contains(said), "{refused}");
    }
}

#[test]
fn a_prefix_of_words_begins_as_the_words_themselves_in_front_of_the_input() {
    let run = TestRun::new();
    let words = run.tokenizer.tokenize("a text of words").unwrap();
    let options = Options {
        prompt_type: PromptType::Prefix,
        virtual_tokens: Some(words.len()),
        init: Init::Text("a text of words".to_owned()),
        ..run.options()
    };
    let plan = Plan::new(&run.forward, &run.tokenizer, &options).unwrap();
    let prefix = Arc::new(plan.parameters.prompt_of(&plan.initial, &Device::Cpu).unwrap());
    let inputs: Vec<Vec<u32>> = plan.train.iter().map(TokenizedExample::text_ids).collect();
    let behind = answers(&run.forward, Some(&prefix), &inputs, 8);
    let whole: Vec<Vec<u32>> = inputs.iter().map(|input| [words.as_slice(), input].concat()).collect();
    assert_eq!(behind, answers(&run.forward, None, &whole, 8));
    assert!(behind.iter().any(|answer| !answer.is_empty()));
}

#[test]
fn an_interrupted_run_goes_on_to_the_very_files_of_an_uninterrupted_one() {
    let run = TestRun::new();
    let whole = run.paths("whole");
    run.tune(&run.options(), &whole, NEVER).unwrap();
    let mut cut = run.paths("cut");
    let interrupted = run.tune(&run.options(), &cut, StopAt(14));
    assert!(matches!(interrupted, Err(TuneError::Interrupted { .. })));
    assert!(!cut.output.exists() && cut.checkpoint.exists());

    cut.resume = true;
    let other = Options { seed: 3, batch_size: 8, ..run.options() };
    match run.tune(&other, &cut, NEVER) {
        Err(TuneError::Checkpoint(CheckpointError::OtherRun { differences, .. })) => {
            assert_eq!(differences, ["batch size is 8, was 4", "seed is 3, was 0"]);
        }
        other => panic!("expected a refusal, found {other:?}"),
    }
    run.tune(&run.options(), &cut, NEVER).unwrap();
    assert_eq!(files(&cut.output), files(&whole.output));
}

#[test]
fn a_run_that_fails_leaves_an_existing_prompt_as_it_was() {
    let run = TestRun::new();
    let paths = run.paths("out");
    run.tune(&run.options(), &paths, NEVER).unwrap();
    let before = files(&paths.output);

    assert!(run.tune(&Options { seed: 1, ..run.options() }, &paths, StopAt(7)).is_err());
    fs::write(run.dir.path().join("bad.jsonl"), "{}\n").unwrap();
    let bad = Options { data: run.dir.path().join("bad.jsonl"), ..run.options() };
    assert!(matches!(run.tune(&bad, &paths, NEVER), Err(TuneError::Data(_))));
    assert_eq!(files(&paths.output), before);
}

#[test]
fn a_prompt_that_the_context_has_no_room_for_is_refused_before_anything_is_trained() {
    let run = TestRun::new();
    let refused =
        |options: Options| Plan::new(&run.forward, &run.tokenizer, &options).expect_err("refused").to_string();
    let message = refused(Options { virtual_tokens: Some(0), ..run.options() });
    assert!(message.contains("the number of virtual tokens is 0, expected 1 to 254"), "{message}");
    let message = refused(Options { virtual_tokens: Some(255), ..run.options() });
    assert!(message.contains("255"), "{message}");
    let message = refused(Options { virtual_tokens: Some(249), ..run.options() });
    assert!(message.contains("line 2:") && message.contains("the context has room for 7"), "{message}");
    let message = refused(Options { batch_size: 0, ..run.options() });
    assert!(message.contains("the batch size is 0, expected 1 or more"), "{message}");
    let message = refused(Options { template: Some("{{ inputs".to_owned()), ..run.options() });
    assert!(message.contains("the template: "), "{message}");
}

#[test]
fn a_folder_that_a_server_manages_is_not_written_to() {
    let run = TestRun::new();
    let paths = run.paths("out");
    fs::create_dir_all(paths.output.join("versions")).unwrap();
    let refused = run.tune(&run.options(), &paths, NEVER).expect_err("refused");
    assert!(matches!(refused, TuneError::Managed { .. }), "{refused}");
}

#[test]
fn a_race_leaves_out_rates_that_diverge_and_lets_the_better_half_go_on() {
    let run = TestRun::new();
    let plan = Plan::new(&run.forward, &run.tokenizer, &Options { rate: None, ..run.options() }).unwrap();
    let raced = |rates: &[f64]| {
        let plan = Plan { rates: rates.to_vec(), ..plan.clone() };
        let (mut last, mut all) = (0, 0);
        let sweep = sweep::race(&run.forward, &run.tokenizer, &[plan], &mut |done, of| {
            (last, all) = (done, of);
            ControlFlow::Continue(())
        });
        assert!(last <= all && last > 0, "{last} of {all}");
        sweep.unwrap().unwrap()
    };
    let sweep = raced(&[1e-9, 0.05, 1e300]);
    assert_eq!(sweep.winner().unwrap().rate, 0.05);
    assert!(sweep.trials[2].diverged && sweep.trials[2].steps == sweep::ROUNDS[0]);
    assert_eq!(sweep.winner().unwrap().steps, sweep::ROUNDS[0] + sweep::ROUNDS[1]);
    assert_eq!(sweep.judged, 8, "each example judges once where there are few");
    assert_eq!(raced(&[1e-9, 0.05, 1e300]), sweep, "the same race twice");
    assert_eq!(raced(&[1e300]).chosen, None);
}

#[test]
fn types_race_and_the_one_that_wins_is_written_and_resumed() {
    let run = TestRun::new();
    let of = |prompt_type: PromptType| {
        let init = prompt_type.default_init();
        Options { rate: None, prompt_type, init, races: true, ..run.options() }
    };
    let both = [of(PromptType::Prompt), of(PromptType::Prefix)];
    let plans = Plan::alternatives(&run.forward, &run.tokenizer, &both).unwrap();
    assert_eq!(plans.iter().map(|plan| plan.rates.len()).collect::<Vec<_>>(), [3, 3]);
    let mut sweep = None;
    let whole = run.paths("whole");
    let outcome = job::run(&run.forward, &run.tokenizer, &plans, &whole, &mut Watch(&mut sweep)).unwrap();
    let sweep = sweep.unwrap();
    let winner = sweep.winner().unwrap();
    assert_eq!((outcome.plan, outcome.rate), (winner.plan, winner.rate));
    assert_eq!(sweep.trials.len(), 6);
    let kind = outcome.version.prompt.kind();
    assert_eq!(kind, if outcome.plan == 0 { "embeddings" } else { "key-values" });

    let cut = run.paths("cut");
    let stopped = job::run(&run.forward, &run.tokenizer, &plans, &cut, &mut StopAt(14));
    assert!(matches!(stopped, Err(TuneError::Interrupted { .. })));
    assert!(cut.checkpoint.join("loss.svg").is_file(), "a run can be looked at");
    let resumed = OutputPaths { resume: true, ..cut.clone() };
    job::run(&run.forward, &run.tokenizer, &plans, &resumed, &mut { NEVER }).unwrap();
    assert_eq!(files(&cut.output), files(&whole.output));

    // A template that places virtual tokens leaves rows alone to learn.
    let template = Some("{{ soft() }}{{ input }}".to_owned());
    let placed = both.map(|options| Options { template: template.clone(), ..options });
    let plans = Plan::alternatives(&run.forward, &run.tokenizer, &placed).unwrap();
    assert_eq!(plans.len(), 1);
    let refused = Plan::alternatives(&run.forward, &run.tokenizer, &placed[1..]).expect_err("refused");
    assert!(matches!(refused, TuneError::Place(_)), "{refused}");
}

/// Keeps what a race found.
struct Watch<'a>(&'a mut Option<Sweep>);

impl Observer for Watch<'_> {
    fn sweeping(&mut self, _: usize, _: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn cross_validating(&mut self, _: usize, _: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn swept(&mut self, sweep: &Sweep, _: &[Plan]) {
        *self.0 = Some(sweep.clone());
    }
    fn training(&mut self, _: &Plan, _: &Settings, _: usize) {}
    fn progress(&mut self, _: Progress<'_>) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

#[test]
fn a_run_that_is_finished_before_its_end_writes_the_best_prompt_so_far() {
    let run = TestRun::new();
    let paths = OutputPaths { finish: true, ..run.paths("out") };
    let nothing = run.tune(&run.options(), &paths, NEVER).expect_err("refused");
    assert!(matches!(nothing, TuneError::Checkpoint(CheckpointError::Missing(_))), "{nothing}");
    let stopped = run.tune(&run.options(), &run.paths("out"), StopAt(14));
    assert!(matches!(stopped, Err(TuneError::Interrupted { .. })));
    let outcome = run.tune(&run.options(), &paths, NEVER).unwrap();
    assert_eq!((outcome.state.step, outcome.state.evaluations.len()), (12, 3));
    assert_eq!(run.flat(&outcome.version.prompt), outcome.state.best.unwrap().values);
    assert!(paths.output.join("loss.svg").is_file() && !paths.checkpoint.exists());
}
