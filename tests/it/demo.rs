//! The demonstration that ships: five prompts on the embedded model.

use std::{collections::BTreeMap, path::Path, str::FromStr as _, sync::Arc};

use candle_core::DType;
use serde::Deserialize;
use softserve::{
    demo,
    engine::{
        Engine, EngineConfig, EngineThread, EventStream,
        request::{Event, Goal, Request, SamplingParams},
    },
    input::InputEncoder,
    kernels,
    model::Model,
    prompt::{
        TaskName, Version,
        format::{self, Fit, PromptFiles},
        template::Input,
    },
    tokenizer::Tokenizer,
};

const TASKS: [&str; 5] = ["question-answering", "sentiment", "story", "topic", "translation"];

struct Demo {
    engine: Engine,
    _thread: EngineThread,
    tokenizer: Tokenizer,
    eos: Vec<u32>,
    versions: BTreeMap<String, Arc<Version>>,
}

impl Demo {
    fn start() -> Self {
        let model = Model::load(&demo::model(), kernels::cpu(), DType::F32).unwrap();
        let info = model.info().clone();
        let fit = Fit::from(&info);
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("prompts");
        let version = |task: &str| {
            let files = PromptFiles::read_dir(&folder.join(task)).unwrap();
            let version = format::read(TaskName::from_str(task).unwrap(), &files, &fit).unwrap();
            assert_eq!(version.warnings, Vec::<String>::new());
            (task.to_owned(), Arc::new(version))
        };
        let versions = TASKS.into_iter().map(version).collect();
        let tokenizer = Tokenizer::load(&demo::model()).unwrap();
        let (engine, thread) = Engine::start(model, EngineConfig::default()).unwrap();
        Self { engine, _thread: thread, tokenizer, eos: info.eos_token_ids, versions }
    }

    fn submit(&self, task: &str, input: &str) -> EventStream {
        let version = &self.versions[task];
        let tokens =
            InputEncoder::of(version, &self.tokenizer).encode(&Input::Text(input.to_owned()), usize::MAX).unwrap();
        let sampling = SamplingParams {
            max_tokens: version.spec.defaults.max_tokens.unwrap(),
            stop_tokens: self.eos.clone(),
            ..Default::default()
        };
        self.engine.submit(Request::of(Some(version.prompt.clone()), tokens, Goal::Generate(sampling))).unwrap()
    }

    fn answer(&self, mut stream: EventStream) -> (Vec<u32>, String) {
        let mut ids = Vec::new();
        while let Some(event) = stream.blocking_next() {
            match event {
                Event::Token(token) => ids.push(token.id),
                Event::Finished { .. } => return (ids.clone(), self.tokenizer.decode(&ids).unwrap()),
                Event::Scored { .. } | Event::NotFinite | Event::NoTokenAllowed(_) | Event::Failed => break,
            }
        }
        panic!("no answer");
    }

    /// The answers to all of these, together in the batch.
    fn answers<'a>(&self, asked: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<(Vec<u32>, String)> {
        let streams: Vec<_> = asked.map(|(task, input)| self.submit(task, input)).collect();
        streams.into_iter().map(|s| self.answer(s)).collect()
    }
}

/// One answer kept from PEFT, by `tests/peft/demo_answers.py`.
#[derive(Deserialize)]
struct Kept {
    task: String,
    input: String,
    ids: Vec<u32>,
    output: String,
}

#[test]
fn what_softserve_tuned_answers_as_it_does_in_peft_alone_and_mixed() {
    let demo = Demo::start();
    let kept = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/demo.json")).unwrap();
    let kept: Vec<Kept> = serde_json::from_slice(&kept).unwrap();
    assert!(
        TASKS.iter().all(|task| kept.iter().any(|k| k.task == *task)),
        "make it anew with tests/peft/demo_answers.py"
    );
    let mixed = demo.answers(kept.iter().map(|k| (k.task.as_str(), k.input.as_str())));
    for (k, mixed) in kept.iter().zip(mixed) {
        let alone = demo.answer(demo.submit(&k.task, &k.input));
        assert_eq!(alone, (k.ids.clone(), k.output.clone()), "{}: {:?}", k.task, k.input);
        assert_eq!(mixed, alone, "{} mixed: {:?}", k.task, k.input);
    }
}

#[test]
fn one_input_gets_five_different_answers() {
    let demo = Demo::start();
    let input = "The soup in Rome was delicious. What was delicious?";
    let answers = demo.answers(TASKS.iter().map(|task| (*task, input)));
    let texts: std::collections::BTreeSet<_> = answers.iter().map(|(_, text)| text).collect();
    assert_eq!(texts.len(), TASKS.len(), "{texts:?}");
    let of = |task: &str| &answers[TASKS.iter().position(|t| *t == task).unwrap()].1;
    assert_eq!((of("sentiment").as_str(), of("topic").as_str()), ("positive", "food"));
    assert!(of("question-answering").contains("soup"), "{texts:?}");
}

/// The README's table has the figures; the bounds leave room for another processor's rounding.
#[test]
fn the_demos_accuracy_on_held_out_data_is_near_the_readmes() {
    #[derive(Deserialize)]
    struct Line {
        input: String,
        #[serde(alias = "label")]
        output: String,
    }
    let demo = Demo::start();
    for (task, least) in [("topic", 0.95), ("sentiment", 0.95), ("translation", 0.85), ("question-answering", 0.95)] {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data").join(task).join("test.jsonl");
        let lines = std::fs::read_to_string(file).unwrap();
        let lines: Vec<Line> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let mut right = 0;
        for group in lines.chunks(100) {
            let answers = demo.answers(group.iter().map(|l| (task, l.input.as_str())));
            right +=
                group.iter().zip(answers).filter(|(line, (_, answer))| line.output.trim() == answer.trim()).count();
        }
        let share = right as f64 / lines.len() as f64;
        assert!(share >= least, "{task}: {right} of {} right, expected {least}", lines.len());
    }
}
