//! The tuner on tiny T5 and mT5 models: gradients, batches, what a prefix begins as, whole runs, and
//! the real program with its answers over HTTP.

use std::{fs, ops::ControlFlow, path::Path, process::Command};

use candle_core::{DType, Device, Tensor, Var};
use serde_json::{Value, json};
use softserve::examples::TokenizedExample;
use softserve::{
    kernels,
    model::Model,
    prompt::{LearnedPrompt, format::Fit},
    tune::{
        TuneError,
        forward::Forward,
        init::{Init, Source},
        job::{self, OutputPaths},
        loss,
        options::{Length, Options, PromptType},
        parameters::{Method, Parameters, matrix},
        plan::Plan,
        prompt_encoder::{PromptEncoder, PromptEncoderKind},
        schedule::{Decay, Schedule},
        trainer::{Settings, State, Trainer, Validation},
        variation::Variation,
    },
};

use crate::{
    fixtures,
    process::{Process, output, softserve},
    tune::plain_gradient,
    tune_job::{NEVER, StopAt, answers},
    tune_types::{TYPES, tune},
};

/// A plain MLP, layers that share keys and values; a gated one, more layers in the encoder; heads that are
/// wider than the hidden size.
pub const MODELS: [&str; 3] = ["encoder-decoder/t5", "encoder-decoder/flan-t5", "encoder-decoder/mt5"];

const END: u32 = 1;

/// Small values that are the same in each run.
fn noise(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + i / 13) % 101) as f32 / 100.0 - 0.5).collect()
}

fn example(input: &[u32], answer: &[u32]) -> TokenizedExample {
    TokenizedExample::of_ids(&[input, &[END]].concat(), [answer, &[END]].concat())
}

/// Inputs of several lengths, two of them equal.
fn examples() -> Vec<TokenizedExample> {
    vec![
        example(&[20, 31, 42, 53], &[60, 61]),
        example(&[70], &[80]),
        example(&[20, 31, 42, 53], &[81]),
        example(&[90, 91, 92, 93, 94, 95, 96, 97, 98, 99], &[62, 63, 64, 65]),
    ]
}

fn methods(hidden_size: usize) -> [Method; 4] {
    let encoder = |kind| Method::PTuning(PromptEncoder { kind, hidden_size, scale: 0.5 });
    [Method::PromptTuning, encoder(PromptEncoderKind::Mlp), encoder(PromptEncoderKind::Lstm), Method::PrefixTuning]
}

fn begin(parameters: &Parameters, width: usize) -> Vec<f32> {
    let n = parameters.virtual_tokens();
    match parameters.method() {
        Method::PTuning(encoder) => encoder.values(&noise(n * width), n, 1).unwrap(),
        Method::PromptTuning | Method::PrefixTuning => noise(parameters.len()),
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn the_gradient_of_all_that_is_learned_is_that_of_central_differences() {
    let data = examples();
    let batch: Vec<&TokenizedExample> = data.iter().collect();
    for name in MODELS {
        let forward = Forward::new(fixtures::load(name, DType::F64));
        let model = forward.model();
        for method in methods(2) {
            let parameters = Parameters::new(method, 3, model);
            let values = noise(parameters.len());
            let wide = |v: &Var| v.to_dtype(DType::F64).unwrap();
            let tensors: Vec<Tensor> = parameters.variables(&values, &Device::Cpu).unwrap().iter().map(wide).collect();
            let score = |tensors: &[Tensor]| {
                loss::score(&forward, Some(&parameters.prompt(tensors).unwrap()), &batch).unwrap().sum
            };
            let vars: Vec<Var> = tensors.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
            let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
            let gradients = loss::gradients_of(&score(&inputs), &vars).unwrap();
            for (i, (named, gradient)) in parameters.tensors().iter().zip(&gradients).enumerate() {
                let gradient = gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                let values = tensors[i].flatten_all().unwrap().to_vec1::<f64>().unwrap();
                // A few of many: the network's own gradients are checked beside it.
                let sampled: Vec<usize> = (0..values.len()).step_by(1 + values.len() / 24).collect();
                let moved = |at: usize, by: f64| {
                    let mut values = values.clone();
                    values[at] += by;
                    let mut tensors = tensors.clone();
                    tensors[i] = Tensor::from_vec(values, tensors[i].shape(), &Device::Cpu).unwrap();
                    loss::scalar(&score(&tensors)).unwrap()
                };
                let step = 1e-6;
                let numeric: Vec<f64> =
                    sampled.iter().map(|&at| (moved(at, step) - moved(at, -step)) / (2.0 * step)).collect();
                let size = norm(numeric.iter().copied());
                let error = norm(numeric.iter().zip(&sampled).map(|(a, &at)| a - gradient[at]));
                assert!(error < 1e-5 * size + 1e-8, "{name} {method:?} {}: error {error} of {size}", named.name);
                let learned = !matches!(method, Method::PTuning(_));
                assert!(!learned || size > 1e-3, "{name} {method:?} {}: there is no gradient", named.name);
            }
        }
    }
}

#[test]
fn the_fast_gradient_in_f32_is_the_plain_one_in_f64() {
    let data = examples();
    let batch: Vec<&TokenizedExample> = data.iter().collect();
    for name in MODELS {
        let [slow, fast] = [DType::F64, DType::F32].map(|dtype| Forward::new(fixtures::load(name, dtype)));
        for method in methods(12) {
            let parameters = Parameters::new(method, 5, fast.model());
            let values = begin(&parameters, fast.model().info().hidden_size);
            let (sum, gradient) = loss::gradient(&fast, &parameters, &values, &batch).unwrap();

            let (exact, expected) = plain_gradient(&slow, &parameters, &values, &batch);
            assert!((sum - exact).abs() < 1e-4 * exact, "{name} {method:?}: {sum} {exact}");
            let expected: Vec<f32> =
                expected.iter().flat_map(|g| g.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect();
            let size = norm(expected.iter().map(|&x| f64::from(x)));
            let error = norm(gradient.iter().zip(&expected).map(|(a, b)| f64::from(a - b)));
            assert!(size > 1e-3 && error < 2e-3 * size, "{name} {method:?}: error {error} of {size}");
        }
    }
}

#[test]
fn a_batch_costs_what_its_examples_cost_alone() {
    let data = examples();
    for name in MODELS {
        let forward = Forward::new(fixtures::load(name, DType::F32));
        let model = forward.model();
        let prompt_of = |method| {
            let parameters = Parameters::new(method, 6, model);
            parameters.prompt_of(&noise(parameters.len()), &Device::Cpu).unwrap()
        };
        let (rows, key_values) = (prompt_of(Method::PromptTuning), prompt_of(Method::PrefixTuning));
        for prompt in [Some(&rows), Some(&key_values), None] {
            let all: Vec<&TokenizedExample> = data.iter().collect();
            let together = loss::score(&forward, prompt, &all).unwrap();
            let alone: Vec<f64> =
                data.iter().map(|e| loss::scalar(&loss::score(&forward, prompt, &[e]).unwrap().sum).unwrap()).collect();
            let sum = loss::scalar(&together.sum).unwrap();
            let expected: f64 = alone.iter().sum();
            assert!((sum - expected).abs() < 1e-4 * expected, "{name}: {sum} {expected}");
            for (likelihood, alone) in together.log_likelihoods(&all).unwrap().iter().zip(&alone) {
                assert!((likelihood + alone).abs() < 1e-3, "{name}: {likelihood} {alone}");
            }
            assert_eq!(together.tokens, 12);
        }
    }
}

#[test]
fn a_prefix_of_words_begins_as_what_the_decoder_has_after_it_wrote_them() {
    // Of this model each layer of the decoder has keys and values of its own.
    let name = MODELS[1];
    let (forward, tokenizer) = (Forward::new(fixtures::load(name, DType::F32)), fixtures::tokenizer(name));
    let model = forward.model();
    let words = tokenizer.tokenize_continuation("the dog ran").unwrap();
    let parameters = Parameters::new(Method::PrefixTuning, 1 + words.len(), model);
    let names: Vec<&str> = parameters.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["layers.0.key", "layers.0.value", "layers.2.key", "layers.2.value"]);
    let source = Source { forward: &forward, tokenizer: &tokenizer, examples: &[], seed: 0 };
    let initial = source.values(&Init::Text("the dog ran".to_owned()), &parameters).unwrap();
    let prefix = parameters.prompt_of(&initial, &Device::Cpu).unwrap();

    let loss_of = |prompt: Option<&LearnedPrompt>, answer: &[u32]| {
        let example = TokenizedExample::of_ids(&tokenizer.tokenize("the dog ran").unwrap(), answer.to_vec());
        loss::scalar(&loss::score(&forward, prompt, &[&example]).unwrap().sum).unwrap()
    };
    let written = [words.as_slice(), &[0]].concat();
    let after = loss_of(None, &[written.as_slice(), &[60, 61, END]].concat()) - loss_of(None, &written);
    let found = loss_of(Some(&prefix), &[60, 61, END]);
    assert!((found - after).abs() < 1e-3 && after > 1.0, "{found} {after}");
}

#[test]
fn a_prefix_is_saved_with_the_layers_that_peft_reads_and_zeros_for_the_others() {
    for (name, used) in [(MODELS[0], [true, false].as_slice()), (MODELS[1], &[true, false, true])] {
        let forward = Forward::new(fixtures::load(name, DType::F32));
        let model = forward.model();
        let parameters = Parameters::new(Method::PrefixTuning, 2, model);
        let prompt = parameters.prompt_of(&noise(parameters.len()), &Device::Cpu).unwrap();
        let saved = matrix(&prompt, &Fit::from(model.info())).unwrap();
        assert_eq!(saved.dims(), [2, used.len() * 2 * 32]);
        for (layer, used) in used.iter().enumerate() {
            let part = saved.narrow(1, layer * 64, 64).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(part.iter().any(|&x| x != 0.0), *used, "{name} {layer}");
        }
    }
}

/// Lines that the fixtures' tokenizer knows the words of.
const LINES: [(&str, &str); 8] = [
    ("the cat sat", "cat"),
    ("the dog ran", "dog"),
    ("the ball and the dog", "dog"),
    ("on the mat the cat", "cat"),
    ("many prompts, one cat", "cat"),
    ("the frozen dog", "dog"),
    ("the cat and the ball", "cat"),
    ("the dog after the ball", "dog"),
];

/// The lines as a data file of `folder`, the answers under `key`.
pub fn data(folder: &Path, key: &str) -> std::path::PathBuf {
    let path = folder.join(format!("{key}.jsonl"));
    let lines = LINES.map(|(input, answer)| format!("{}\n", json!({"input": input, key: answer})));
    fs::write(&path, lines.concat()).unwrap();
    path
}

/// What is learned, and a rate for it.
const RUNS: [(PromptType, f64); 4] = [
    (PromptType::Prompt, 0.1),
    (PromptType::PTuning { encoder: PromptEncoderKind::Mlp, hidden_size: Some(24) }, 0.01),
    (PromptType::PTuning { encoder: PromptEncoderKind::Lstm, hidden_size: Some(12) }, 0.01),
    (PromptType::Prefix, 0.1),
];

#[test]
fn every_way_to_learn_lowers_the_loss_and_leaves_the_model_as_it_was() {
    let data = examples();
    for name in MODELS {
        let forward = Forward::new(fixtures::load(name, DType::F32));
        let model = forward.model();
        let before = model.weights_digest().unwrap();
        for (method, peak) in methods(24).into_iter().zip([0.1, 0.02, 0.02, 0.1]) {
            let parameters = Parameters::new(method, 8, model);
            let trainer = Trainer {
                forward: &forward,
                parameters: &parameters,
                train: &data,
                validation: Validation::HeldOut(&data),
            };
            let settings = Settings {
                batch_size: 4,
                accumulate: 1,
                schedule: Schedule { peak, warmup: 6, steps: 120, decay: Decay::Linear },
                optimizer: Default::default(),
                clip: 1.0,
                seed: 5,
                variation: Variation::default(),
                eval_every: 120,
                patience: 0,
                labelled: true,
            };
            let mut state = State::new(begin(&parameters, model.info().hidden_size));
            trainer.run(&settings, &mut state, &mut |_| Ok(ControlFlow::Continue(()))).unwrap();
            let losses: Vec<f64> = state.evaluations.iter().map(|e| e.1.loss).collect();
            // The logits of a random T5 1.0 are small, so there is less to gain.
            assert!(losses[1] < 0.95 * losses[0], "{name} {method:?}: {losses:?}");
        }
        assert_eq!(model.weights_digest().unwrap(), before);
    }
}

#[test]
fn a_run_of_each_type_is_resumed_bit_for_bit_and_answers_as_it_was_measured() {
    let folder = tempfile::tempdir().unwrap();
    for name in &MODELS[..2] {
        let (forward, tokenizer) = (Forward::new(fixtures::load(name, DType::F32)), fixtures::tokenizer(name));
        let model = forward.model();
        for (i, (prompt_type, rate)) in RUNS.into_iter().enumerate() {
            let options = Options {
                prompt_type,
                init: prompt_type.default_init(),
                virtual_tokens: Some(8),
                rate: Some(rate),
                length: Length::Steps(80),
                eval_every: Some(20),
                patience: 0,
                folds: 0,
                batch_size: 4,
                ..Options::new("animal".parse().unwrap(), data(folder.path(), "label"))
            };
            let plan = Plan::new(&forward, &tokenizer, &options).unwrap();
            let paths = |kind: &str| {
                let output = folder.path().join(format!("{}-{i}-{kind}", model.info().name)).join("animal");
                OutputPaths { checkpoint: job::default_checkpoint(&output), output, resume: false, finish: false }
            };
            let outcome =
                job::run(&forward, &tokenizer, std::slice::from_ref(&plan), &paths("whole"), &mut { NEVER }).unwrap();
            assert_eq!(outcome.version.spec.template.as_deref(), Some("{{ input }}"));
            let inputs: Vec<Vec<u32>> = plan.train.iter().map(TokenizedExample::text_ids).collect();
            assert!(inputs.iter().all(|ids| ids.last() == Some(&END)), "an input ends as one that is served");
            let outputs = answers(&forward, Some(&outcome.version.prompt), &inputs, 5);
            let right =
                outputs.iter().zip(&plan.train).filter(|(o, e)| o[..] == e.answer[..e.answer.len() - 1]).count();
            assert_eq!(right as f64 / 8.0, outcome.after.exact, "{name} {prompt_type:?}");

            let mut cut = paths("cut");
            let stopped = job::run(&forward, &tokenizer, std::slice::from_ref(&plan), &cut, &mut StopAt(47));
            assert!(matches!(stopped, Err(TuneError::Interrupted { .. })));
            cut.resume = true;
            job::run(&forward, &tokenizer, std::slice::from_ref(&plan), &cut, &mut { NEVER }).unwrap();
            for file in ["adapter_config.json", "adapter_model.safetensors", "task.json"] {
                let read = |paths: &OutputPaths| fs::read(paths.output.join(file)).unwrap();
                assert!(read(&cut) == read(&paths("whole")), "{name} {prompt_type:?}: {file} differs");
            }
        }
    }
}

#[test]
fn what_a_model_has_no_room_or_form_for_is_refused_before_anything_is_trained() {
    let folder = tempfile::tempdir().unwrap();
    let (forward, text) = (Forward::new(fixtures::load(MODELS[0], DType::F32)), fixtures::tokenizer(MODELS[0]));
    let options = |virtual_tokens, prompt_type| Options {
        virtual_tokens: Some(virtual_tokens),
        prompt_type,
        ..Options::new("animal".parse().unwrap(), data(folder.path(), "output"))
    };
    let refused = |options| Plan::new(&forward, &text, &options).expect_err("refused").to_string();
    let message = refused(options(2046, PromptType::Prompt));
    assert!(message.contains("the encoder has room for 2 beside"), "{message}");
    let message = refused(options(2046, PromptType::Prefix));
    assert!(message.contains("the decoder has room for 1 beside"), "{message}");

    let deeper = folder.path().join("deeper");
    fs::create_dir(&deeper).unwrap();
    let config = fs::read_to_string(fixtures::dir(MODELS[0]).join("config.json")).unwrap();
    let config = config.replace("\"num_decoder_layers\": 2", "\"num_decoder_layers\": 3");
    fs::write(deeper.join("config.json"), config).unwrap();
    let files = softserve::model::ModelFiles::random(
        softserve::model::random::RandomModel::open(deeper.join("config.json").to_str().unwrap()).unwrap(),
    );
    let forward = Forward::new(Model::load(&files, kernels::cpu(), DType::F32).unwrap());
    let refused = Plan::new(&forward, &text, &options(4, PromptType::Prefix)).expect_err("refused").to_string();
    assert!(refused.contains("its decoder has 3: a prefix cannot be tuned for this model"), "{refused}");
}

/// `softserve tune` of a task under `out`, on one of the models.
pub fn tune_on(home: &Path, name: &str, task: &str, data: &Path, options: &[&str]) -> Command {
    let mut command = tune(home, "out", task, data, options);
    command.args(["--steps", "120", "--virtual-tokens", "9", "--folds", "0", "--model"]).arg(fixtures::dir(name));
    command
}

#[test]
fn each_type_is_tuned_by_the_program_measured_and_served_with_the_same_answers() {
    for (name, key) in MODELS.into_iter().zip(["output", "label", "output"]) {
        let home = tempfile::tempdir().unwrap();
        let data = data(home.path(), key);
        let mut answers = Vec::new();
        for (task, options) in TYPES {
            // A run that lowers no loss fails.
            let (code, said, log) = output(tune_on(home.path(), name, task, &data, options));
            assert_eq!(code, Some(0), "{name} {task}: {log}");
            assert!(said.contains("after tuning"), "{said}");
            let mut eval = softserve(home.path());
            eval.args(["eval", "--task", task, "--prompts", "out", "--show", "8", "--data"]).arg(&data);
            eval.arg("--model").arg(fixtures::dir(name));
            let (code, shown, log) = output(eval);
            assert_eq!(code, Some(0), "{name} {task}: {log}");
            assert!(key != "label" || shown.contains("choice accuracy"), "{shown}");
            answers.push((task, shown));
        }
        let mut serve = softserve(home.path());
        serve.args(["--prompts=out", "--listen=127.0.0.1:0", "--kv-cache=64MiB", "--model"]).arg(fixtures::dir(name));
        let server = Process::start(serve);
        let mut words = 0;
        for (task, shown) in answers {
            let tuned: Vec<&str> = shown.lines().filter(|l| l.trim_start().starts_with("tuned prompt ")).collect();
            let tuned = &tuned[tuned.len() - LINES.len()..];
            words += tuned.iter().filter(|line| !line.ends_with("\"\"")).count();
            for ((input, _), tuned) in LINES.iter().zip(tuned) {
                let (status, answer): (_, Value) = server.generate(task, json!({"input": input}));
                assert_eq!(status, 200, "{name} {task}: {answer}");
                let text = answer["output"].as_str().unwrap_or_else(|| panic!("{answer}")).trim().to_owned();
                assert!(tuned.ends_with(&format!("{text:?}")), "{name} {task} {input:?}: {text:?} is not {tuned}");
            }
        }
        assert!(words >= LINES.len(), "{name}: too few answers have a word to say anything");
    }
}
