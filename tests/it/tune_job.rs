//! Whole tuning runs on a tiny random model: files in, a served prompt out.

use std::{collections::BTreeMap, fs, ops::ControlFlow, path::Path};

use candle_core::{DType, Device};
use softserve::{
    model::Model,
    prompt::LearnedPrompt,
    text::Text,
    tune::{
        TuneError,
        checkpoint::CheckpointError,
        generate,
        job::{self, Observer, Outcome, Places},
        plan::{HeldOut, Length, Options, Plan},
        sweep::Sweep,
        trainer::{Progress, Settings},
    },
};

use crate::tiny_model::TinyModel;

/// Ends a run at a step; sees nothing else.
struct StopAt(usize);

impl Observer for StopAt {
    fn sweeping(&mut self, _: usize, _: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn swept(&mut self, _: &Sweep) {}
    fn training(&mut self, _: &Settings, _: usize) {}
    fn progress(&mut self, progress: Progress<'_>) -> ControlFlow<()> {
        match progress {
            Progress::Step { step, .. } if step == self.0 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }
}

const NEVER: StopAt = StopAt(usize::MAX);

struct Room {
    dir: tempfile::TempDir,
    model: Model,
    text: Text,
}

impl Room {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (_model_dir, files) = TinyModel::default().temp();
        let model = Model::load(&files, &Device::Cpu, DType::F32).unwrap();
        let text = Text::load(&files).unwrap();
        let lines = ["red", "dark", "sky", "lawn", "tar", "snow", "sand", "coal"];
        let jsonl: String = lines
            .iter()
            .enumerate()
            .map(|(i, input)| format!("{{\"input\": \"{input}\", \"label\": \"{}\"}}\n", ["a", "b"][i % 2]))
            .collect();
        fs::write(dir.path().join("train.jsonl"), jsonl).unwrap();
        Self { dir, model, text }
    }

    fn options(&self) -> Options {
        Options {
            virtual_tokens: Some(8),
            rate: Some(0.1),
            length: Length::Steps(24),
            eval_every: Some(6),
            patience: 0,
            batch_size: 4,
            ..Options::new("colour".parse().unwrap(), self.dir.path().join("train.jsonl"))
        }
    }

    fn places(&self, name: &str) -> Places {
        let output = self.dir.path().join(name).join("colour");
        Places { checkpoint: job::default_checkpoint(&output), output, resume: false }
    }

    fn tune(&self, options: &Options, places: &Places, mut observer: StopAt) -> Result<Outcome, TuneError> {
        let plan = Plan::new(&self.model, &self.text, options)?;
        job::run(&self.model, &plan, places, &mut observer)
    }
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

#[test]
fn a_run_writes_a_prompt_that_serve_reads_and_leaves_the_model_as_it_was() {
    let room = Room::new();
    let before = room.model.weights_digest().unwrap();
    let places = room.places("out");
    let options = Options { rate: None, length: Length::Steps(150), ..room.options() };
    let outcome = room.tune(&options, &places, NEVER).unwrap();
    assert_eq!(room.model.weights_digest().unwrap(), before);
    assert!(outcome.after.better_than(&outcome.before));

    let written = files(&places.output);
    let names: Vec<&str> = written.keys().map(String::as_str).collect();
    assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors", "loss.svg", "task.json"]);
    assert!(String::from_utf8_lossy(&written["loss.svg"]).contains("</svg>"));
    assert!(!places.checkpoint.exists(), "the state of a finished run is of no use");
    let best = outcome.state.best.unwrap();
    assert_eq!(job::rows_of(&outcome.version).unwrap(), best.prompt);
    let spec = &outcome.version.spec;
    assert_eq!(spec.template.as_deref(), Some("{{ input }}\n"));
    assert_eq!(spec.labels.keys().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(spec.base_model.as_ref().unwrap().fingerprint.as_deref(), Some(room.model.info().fingerprint.as_str()));
    assert!(spec.metrics.contains_key("train_accuracy"), "{:?}", spec.metrics);
}

#[test]
fn greedy_answers_on_the_serving_kernels_are_those_that_tuning_counts_as_exact() {
    let room = Room::new();
    let options = Options { length: Length::Steps(120), ..room.options() };
    let plan = Plan::new(&room.model, &room.text, &options).unwrap();
    assert_eq!(plan.held_out_is, HeldOut::Training);
    let outcome = job::run(&room.model, &plan, &room.places("out"), &mut { NEVER }).unwrap();
    let LearnedPrompt::Embeddings(prompt) = outcome.version.prompt.as_ref() else { panic!("not embeddings") };
    let inputs: Vec<Vec<u32>> = plan.train.iter().map(|e| e.prompt.clone()).collect();
    let mut answered = 0;
    let outputs = generate::greedy(&room.model, Some(&prompt.rows), &inputs, 5, &mut |done| answered = done).unwrap();
    assert_eq!(answered, 8);
    let right = outputs.iter().zip(&plan.train).filter(|(o, e)| o[..] == e.answer[..e.answer.len() - 1]).count();
    assert_eq!(right as f64 / 8.0, outcome.after.exact);
    assert!(right >= 5, "too little was learned to say anything: {right}");
}

#[test]
fn an_interrupted_run_goes_on_to_the_very_files_of_an_uninterrupted_one() {
    let room = Room::new();
    let whole = room.places("whole");
    room.tune(&room.options(), &whole, NEVER).unwrap();
    let mut cut = room.places("cut");
    let interrupted = room.tune(&room.options(), &cut, StopAt(14));
    assert!(matches!(interrupted, Err(TuneError::Interrupted { .. })));
    assert!(!cut.output.exists() && cut.checkpoint.exists());

    cut.resume = true;
    let other = Options { seed: 3, batch_size: 8, ..room.options() };
    match room.tune(&other, &cut, NEVER) {
        Err(TuneError::Checkpoint(CheckpointError::OtherRun { differences, .. })) => {
            assert_eq!(differences, ["batch size is 8, was 4", "seed is 3, was 0"]);
        }
        other => panic!("expected a refusal, found {other:?}"),
    }
    room.tune(&room.options(), &cut, NEVER).unwrap();
    assert_eq!(files(&cut.output), files(&whole.output));
}

#[test]
fn a_run_that_fails_leaves_an_existing_prompt_as_it_was() {
    let room = Room::new();
    let places = room.places("out");
    room.tune(&room.options(), &places, NEVER).unwrap();
    let before = files(&places.output);

    assert!(room.tune(&Options { seed: 1, ..room.options() }, &places, StopAt(7)).is_err());
    fs::write(room.dir.path().join("bad.jsonl"), "{}\n").unwrap();
    let bad = Options { data: room.dir.path().join("bad.jsonl"), ..room.options() };
    assert!(matches!(room.tune(&bad, &places, NEVER), Err(TuneError::Data(_))));
    assert_eq!(files(&places.output), before);
}

#[test]
fn a_prompt_that_the_context_has_no_room_for_is_refused_before_anything_is_trained() {
    let room = Room::new();
    let refused = |options: Options| Plan::new(&room.model, &room.text, &options).expect_err("refused").to_string();
    let message = refused(Options { virtual_tokens: Some(0), ..room.options() });
    assert!(message.contains("--virtual-tokens is 0, expected 1 to 254"), "{message}");
    let message = refused(Options { virtual_tokens: Some(255), ..room.options() });
    assert!(message.contains("255"), "{message}");
    let message = refused(Options { virtual_tokens: Some(249), ..room.options() });
    assert!(message.contains("line 2:") && message.contains("the context has 7"), "{message}");
    let message = refused(Options { batch_size: 0, ..room.options() });
    assert!(message.contains("--batch-size is 0, expected 1 or more"), "{message}");
    let message = refused(Options { template: Some("{{ inputs".to_owned()), ..room.options() });
    assert!(message.contains("--template"), "{message}");
}

#[test]
fn a_folder_that_a_server_manages_is_not_written_to() {
    let room = Room::new();
    let places = room.places("out");
    fs::create_dir_all(places.output.join("versions")).unwrap();
    let refused = room.tune(&room.options(), &places, NEVER).expect_err("refused");
    assert!(matches!(refused, TuneError::Managed { .. }), "{refused}");
}
