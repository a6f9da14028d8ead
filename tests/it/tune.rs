//! The tuner against a tiny random model: gradients, reproducibility, resuming, and that the model
//! stays as it was.

use std::ops::ControlFlow;

use candle_core::{DType, Device, Tensor, Var};
use softserve::examples::TokenizedExample;
use softserve::{
    model::Model,
    prompt::learned::{Embeddings, LearnedPrompt},
    tune::{
        checkpoint::{Checkpoint, Identity},
        forward::Forward,
        loss::{self, ValidationMetrics},
        optim::AdamW,
        parameters::{Method, Parameters},
        prompt_encoder::{PromptEncoder, PromptEncoderKind},
        schedule::{Decay, Schedule},
        trainer::{Ended, Progress, Settings, State, Trainer, Validation},
        variation::Variation,
    },
};

use crate::{
    fixtures::backend_for,
    tiny_model::{BOS, EOS, FIRST_BYTE, TinyModel},
};

fn forward(dtype: DType) -> Forward {
    let (_dir, files) = TinyModel::default().temp();
    Forward::new(Model::load(&files, backend_for(dtype), dtype).unwrap())
}

fn tokens(text: &str) -> Vec<u32> {
    text.bytes().map(|b| FIRST_BYTE + u32::from(b)).collect()
}

fn example(input: &str, output: &str) -> TokenizedExample {
    let ids: Vec<u32> = [BOS].into_iter().chain(tokens(input)).collect();
    let answer = tokens(output).into_iter().chain([EOS]).collect();
    TokenizedExample::of_ids(&ids, answer)
}

fn examples() -> Vec<TokenizedExample> {
    let pairs = [
        ("red\n", "a"),
        ("green\n", "b"),
        ("blue\n", "a"),
        ("dark red\n", "b"),
        ("grey\n", "a"),
        ("white\n", "b"),
        ("black\n", "a"),
        ("light blue\n", "b"),
    ];
    pairs.map(|(input, output)| example(input, output)).into()
}

fn initial(model: &Model, n: usize) -> Vec<f32> {
    let ids: Vec<u32> = (0..n as u32).map(|i| FIRST_BYTE + 97 + i).collect();
    let rows = model.embed(&Tensor::new(ids, &Device::Cpu).unwrap()).unwrap();
    rows.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Small values that are the same in each run.
fn noise(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + i / 13) % 101) as f32 / 50.0 - 1.0).collect()
}

/// One way to learn of each kind.
fn methods() -> [Method; 4] {
    let encoder = |kind| Method::PTuning(PromptEncoder { kind, hidden_size: 12, scale: 0.5 });
    [Method::PromptTuning, encoder(PromptEncoderKind::Mlp), encoder(PromptEncoderKind::Lstm), Method::PrefixTuning]
}

fn begin(model: &Model, parameters: &Parameters) -> Vec<f32> {
    let n = parameters.virtual_tokens();
    match parameters.method() {
        Method::PromptTuning => initial(model, n),
        Method::PTuning(encoder) => encoder.values(&initial(model, n), n, 1).unwrap(),
        Method::PrefixTuning => noise(parameters.len()),
    }
}

fn settings(steps: usize) -> Settings {
    Settings {
        batch_size: 4,
        accumulate: 1,
        schedule: Schedule { peak: 0.05, warmup: 3, steps, decay: Decay::Linear },
        optimizer: AdamW::default(),
        clip: 1.0,
        seed: 5,
        variation: Variation::default(),
        eval_every: 4,
        patience: 0,
        labelled: true,
    }
}

fn run(forward: &Forward, data: &[TokenizedExample], settings: &Settings, state: &mut State) -> Ended {
    let n = state.values.len() / forward.model().info().hidden_size;
    let parameters = Parameters::new(Method::PromptTuning, n, forward.model());
    let trainer = Trainer { forward, parameters: &parameters, train: data, validation: Validation::HeldOut(data) };
    trainer.run(settings, state, &mut |_| Ok(ControlFlow::Continue(()))).unwrap()
}

#[test]
fn the_gradient_of_every_prompt_row_is_that_of_central_differences() {
    let forward = forward(DType::F64);
    let data = [example("some text\n", "yes"), example("x", "no, not at all"), example("", "ok")];
    let batch: Vec<&TokenizedExample> = data.iter().collect();
    let (n, hidden) = (5, forward.model().info().hidden_size);
    let values: Vec<f64> = initial(forward.model(), n).into_iter().map(f64::from).collect();
    let tensor = |values: &[f64]| Tensor::from_slice(values, (n, hidden), &Device::Cpu).unwrap();
    let score = |rows: &Tensor| {
        let prompt = LearnedPrompt::Embeddings(Embeddings { rows: rows.clone() });
        loss::score(&forward, Some(&prompt), &batch).unwrap().sum
    };
    let loss_of = |values: &[f64]| loss::scalar(&score(&tensor(values))).unwrap();

    let var = Var::from_tensor(&tensor(&values)).unwrap();
    let gradients = loss::gradients_of(&score(var.as_tensor()), std::slice::from_ref(&var)).unwrap();
    let gradient = gradients[0].to_vec2::<f64>().unwrap();

    let step = 1e-5;
    for (row, gradient) in gradient.iter().enumerate() {
        let numeric: Vec<f64> = (0..hidden)
            .map(|column| {
                let moved = |by: f64| {
                    let mut moved = values.clone();
                    moved[row * hidden + column] += by;
                    loss_of(&moved)
                };
                (moved(step) - moved(-step)) / (2.0 * step)
            })
            .collect();
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let size = norm(&mut numeric.iter().copied());
        let error = norm(&mut numeric.iter().zip(gradient).map(|(a, b)| a - b));
        assert!(size > 1e-3, "row {row} has no gradient to compare: {size}");
        assert!(error < 1e-5 * size, "row {row}: error {error} of {size}");
    }
}

#[test]
fn the_gradient_of_every_key_and_value_is_that_of_central_differences() {
    let forward = forward(DType::F64);
    let data = [example("some text\n", "yes"), example("x", "no, not at all"), example("", "ok")];
    let batch: Vec<&TokenizedExample> = data.iter().collect();
    let parameters = Parameters::new(Method::PrefixTuning, 3, forward.model());
    let tensors: Vec<Tensor> = parameters
        .variables(&noise(parameters.len()), &Device::Cpu)
        .unwrap()
        .iter()
        .map(|v| v.to_dtype(DType::F64).unwrap())
        .collect();
    let score =
        |tensors: &[Tensor]| loss::score(&forward, Some(&parameters.prompt(tensors).unwrap()), &batch).unwrap().sum;
    let vars: Vec<Var> = tensors.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let gradients = loss::gradients_of(&score(&inputs), &vars).unwrap();
    let step = 1e-5;
    for (i, (named, gradient)) in parameters.tensors().iter().zip(&gradients).enumerate() {
        let gradient = gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let values = tensors[i].flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let moved = |at: usize, by: f64| {
            let mut values = values.clone();
            values[at] += by;
            let mut tensors = tensors.clone();
            tensors[i] = Tensor::from_vec(values, tensors[i].shape(), &Device::Cpu).unwrap();
            loss::scalar(&score(&tensors)).unwrap()
        };
        let numeric: Vec<f64> =
            (0..values.len()).map(|at| (moved(at, step) - moved(at, -step)) / (2.0 * step)).collect();
        let size = numeric.iter().map(|x| x * x).sum::<f64>().sqrt();
        let error = numeric.iter().zip(&gradient).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        assert!(size > 1e-3, "{} has no gradient to compare: {size}", named.name);
        assert!(error < 1e-5 * size, "{}: error {error} of {size}", named.name);
    }
}

/// The loss of a batch and its gradient to each tensor, on a model in f64.
pub fn plain_gradient(
    forward: &Forward,
    parameters: &Parameters,
    values: &[f32],
    batch: &[&TokenizedExample],
) -> (f64, Vec<Tensor>) {
    let vars = parameters.variables(values, &Device::Cpu).unwrap();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let sum = loss::score(forward, Some(&parameters.prompt(&tensors).unwrap()), batch).unwrap().sum;
    let gradient = loss::gradients_of(&sum, &vars).unwrap();
    (loss::scalar(&sum).unwrap(), gradient)
}

#[test]
fn the_fast_gradient_in_f32_is_the_plain_one_in_f64() {
    let (slow, fast) = (forward(DType::F64), forward(DType::F32));
    let data = [example("some text\n", "yes"), example("x", "no, not at all"), example("", "ok")];
    let batch: Vec<&TokenizedExample> = data.iter().collect();
    for method in methods() {
        let parameters = Parameters::new(method, 5, fast.model());
        let values = begin(fast.model(), &parameters);
        let (sum, gradient) = loss::gradient(&fast, &parameters, &values, &batch).unwrap();

        let (exact, expected) = plain_gradient(&slow, &parameters, &values, &batch);
        assert!((sum - exact).abs() < 1e-4 * exact, "{sum} {exact}");
        let mut rest = gradient.as_slice();
        for (named, expected) in parameters.tensors().iter().zip(expected) {
            let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let (got, after) = rest.split_at(expected.len());
            rest = after;
            let size = expected.iter().map(|x| x * x).sum::<f32>().sqrt();
            let error = got.iter().zip(&expected).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
            assert!(size > 1e-3 && error < 2e-3 * size, "{method:?} {}: error {error} of {size}", named.name);
        }
    }
}

#[test]
fn a_batch_costs_what_its_examples_cost_alone_and_counts_exact_answers() {
    let forward = forward(DType::F32);
    let data = examples();
    let rows = Parameters::new(Method::PromptTuning, 6, forward.model())
        .prompt_of(&initial(forward.model(), 6), &Device::Cpu)
        .unwrap();
    let key_values = Parameters::new(Method::PrefixTuning, 6, forward.model());
    let key_values = key_values.prompt_of(&noise(key_values.len()), &Device::Cpu).unwrap();
    for prompt in [Some(&rows), Some(&key_values), None] {
        let all: Vec<&TokenizedExample> = data.iter().collect();
        let together = loss::score(&forward, prompt, &all).unwrap();
        let alone: f64 =
            data.iter().map(|e| loss::scalar(&loss::score(&forward, prompt, &[e]).unwrap().sum).unwrap()).sum();
        let sum = loss::scalar(&together.sum).unwrap();
        assert!((sum - alone).abs() < 1e-4 * alone, "{sum} {alone}");
        assert_eq!(together.tokens, 16);
        assert_eq!(together.exact(&all).unwrap(), 0);
    }
}

#[test]
fn eight_examples_of_a_random_model_are_learned_by_heart() {
    let forward = forward(DType::F32);
    let data = examples();
    let before = forward.model().weights_digest().unwrap();
    let mut state = State::new(initial(forward.model(), 16));
    let run_settings = Settings { batch_size: 8, eval_every: 50, ..settings(600) };
    run(&forward, &data, &run_settings, &mut state);
    let best = state.best.unwrap();
    assert!(best.validation.loss < 0.05 && best.validation.exact == 1.0, "{:?}", best.validation);
    assert!(state.losses[0] > 2.0, "there was something to learn");
    assert_eq!(forward.model().weights_digest().unwrap(), before, "the model's weights changed");
}

#[test]
fn every_way_to_learn_lowers_the_loss() {
    let forward = forward(DType::F32);
    let data = examples();
    for (method, peak) in methods().into_iter().zip([0.05, 0.01, 0.01, 0.05]) {
        let parameters = Parameters::new(method, 16, forward.model());
        let trainer = Trainer {
            forward: &forward,
            parameters: &parameters,
            train: &data,
            validation: Validation::HeldOut(&data),
        };
        let schedule = Schedule { peak, warmup: 6, steps: 120, decay: Decay::Linear };
        let settings = Settings { batch_size: 8, eval_every: 120, schedule, ..settings(120) };
        let mut state = State::new(begin(forward.model(), &parameters));
        trainer.run(&settings, &mut state, &mut |_| Ok(ControlFlow::Continue(()))).unwrap();
        let losses: Vec<f64> = state.evaluations.iter().map(|e| e.1.loss).collect();
        assert!(losses[1] < 0.5 * losses[0], "{method:?}: {losses:?}");
    }
}

#[test]
fn a_seed_gives_the_same_prompt_bit_for_bit_and_another_seed_another() {
    let forward = forward(DType::F32);
    let tuned = |seed: u64| {
        let mut state = State::new(initial(forward.model(), 4));
        run(&forward, &examples(), &Settings { seed, ..settings(8) }, &mut state);
        state
    };
    assert_eq!(tuned(1), tuned(1));
    assert_ne!(tuned(1).values, tuned(2).values);
}

#[test]
fn accumulated_batches_are_one_large_batch() {
    let forward = forward(DType::F32);
    let data = examples();
    let tuned = |batch_size: usize, accumulate: usize| {
        let mut state = State::new(initial(forward.model(), 4));
        run(&forward, &data, &Settings { batch_size, accumulate, clip: 0.0, ..settings(2) }, &mut state);
        state.losses
    };
    for (a, b) in tuned(8, 1).iter().zip(tuned(2, 4)) {
        assert!((a - b).abs() < 1e-3, "{a} {b}");
    }
}

#[test]
fn a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does() {
    let forward = forward(DType::F32);
    let data = examples();
    for method in methods() {
        let parameters = Parameters::new(method, 4, forward.model());
        resumes(&Trainer {
            forward: &forward,
            parameters: &parameters,
            train: &data,
            validation: Validation::HeldOut(&data[..3]),
        });
    }
}

fn resumes(trainer: &Trainer<'_>) {
    let variation = Variation { word_dropout: 0.2, noise: 0.1 };
    let settings = Settings { accumulate: 2, variation, ..settings(17) };
    let begin = || State::new(begin(trainer.forward.model(), trainer.parameters));
    let mut whole = begin();
    trainer.run(&settings, &mut whole, &mut |_| Ok(ControlFlow::Continue(()))).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let identity = Identity::new();
    let mut cut = begin();
    let ended = trainer
        .run(&settings, &mut cut, &mut |progress| {
            if let Progress::Evaluated { state, .. } = progress {
                Checkpoint { identity: identity.clone(), rate: 0.05, state: state.clone(), cross_validation: vec![] }
                    .write(dir.path())
                    .unwrap();
            }
            // Two steps past the last checkpoint, as a crash may come.
            Ok(match progress {
                Progress::Step { step: 10, .. } => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            })
        })
        .unwrap();
    assert_eq!(ended, Ended::Interrupted);
    let mut resumed = Checkpoint::read(dir.path(), &identity).unwrap().state;
    assert_eq!(resumed.step, 8);
    trainer.run(&settings, &mut resumed, &mut |_| Ok(ControlFlow::Continue(()))).unwrap();
    assert_eq!(resumed, whole);
}

#[test]
fn a_run_without_a_gain_ends_early_and_keeps_its_best() {
    let forward = forward(DType::F32);
    let data = examples();
    // A rate that only wanders.
    let schedule = Schedule { peak: 30.0, warmup: 0, steps: 400, decay: Decay::Constant };
    let settings = Settings { schedule, patience: 3, labelled: false, ..settings(400) };
    let mut state = State::new(initial(forward.model(), 4));
    let ended = run(&forward, &data, &settings, &mut state);
    assert_eq!(ended, Ended::Early);
    assert!(state.step < 400);
    let peak = state.evaluations.iter().map(|e| e.1.exact).fold(0.0, f64::max);
    let enough = peak - ValidationMetrics { loss: 0.0, exact: peak }.standard_error(data.len());
    let kept = state.best.unwrap().validation;
    let better = |e: &&(usize, ValidationMetrics)| e.1.exact >= enough && e.1.loss < kept.loss;
    assert_eq!(state.evaluations.iter().find(better), None, "{kept:?}");
}

#[test]
fn a_labelled_task_keeps_the_last_step_that_is_as_good_as_chance_can_tell() {
    let forward = forward(DType::F32);
    let data = examples();
    let mut state = State::new(initial(forward.model(), 4));
    assert_eq!(run(&forward, &data, &settings(80), &mut state), Ended::Finished);
    let peak = state.evaluations.iter().map(|e| e.1.exact).fold(0.0, f64::max);
    let enough = peak - ValidationMetrics { loss: 0.0, exact: peak }.standard_error(data.len());
    assert!(peak > 0.4, "too little was learned to say anything: {:?}", state.evaluations);
    let last = state.evaluations.iter().rev().find(|e| e.1.exact >= enough).unwrap();
    let best = state.best.unwrap();
    assert_eq!((best.step, best.validation), *last);
}
