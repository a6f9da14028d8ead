//! The tuner against a tiny random model: gradients, reproducibility, resuming, and that the model
//! stays as it was.

use std::ops::ControlFlow;

use candle_core::{DType, Device, Tensor, Var};
use softserve::{
    model::Model,
    tune::{
        checkpoint::{Checkpoint, Identity},
        data::Encoded,
        loss,
        optim::AdamW,
        schedule::{Decay, Schedule},
        sweep,
        trainer::{Ended, Progress, Settings, State, Trainer},
    },
};

use crate::tiny_model::{BOS, EOS, FIRST_BYTE, TinyModel};

fn model(dtype: DType) -> Model {
    let (_dir, files) = TinyModel::default().temp();
    Model::load(&files, &Device::Cpu, dtype).unwrap()
}

fn tokens(text: &str) -> Vec<u32> {
    text.bytes().map(|b| FIRST_BYTE + u32::from(b)).collect()
}

fn example(input: &str, output: &str) -> Encoded {
    let prompt = [BOS].into_iter().chain(tokens(input)).collect();
    let answer = tokens(output).into_iter().chain([EOS]).collect();
    Encoded { prompt, answer }
}

fn examples() -> Vec<Encoded> {
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

fn settings(steps: usize) -> Settings {
    Settings {
        batch_size: 4,
        accumulate: 1,
        schedule: Schedule { peak: 0.05, warmup: 3, steps, decay: Decay::Linear },
        optimizer: AdamW::default(),
        clip: 1.0,
        seed: 5,
        eval_every: 4,
        patience: 0,
    }
}

fn run(model: &Model, data: &[Encoded], settings: &Settings, state: &mut State) -> Ended {
    let trainer = Trainer { model, train: data, held_out: data };
    trainer.run(settings, state, &mut |_| Ok(ControlFlow::Continue(()))).unwrap()
}

#[test]
fn the_gradient_of_every_prompt_row_is_that_of_central_differences() {
    let model = model(DType::F64);
    let data = [example("some text\n", "yes"), example("x", "no, not at all"), example("", "ok")];
    let batch: Vec<&Encoded> = data.iter().collect();
    let (n, hidden) = (5, model.info().hidden_size);
    let values: Vec<f64> = initial(&model, n).into_iter().map(f64::from).collect();
    let prompt = |values: &[f64]| Tensor::from_slice(values, (n, hidden), &Device::Cpu).unwrap();
    let loss_of =
        |values: &[f64]| loss::scalar(&loss::score(&model, Some(&prompt(values)), &batch).unwrap().sum).unwrap();

    let var = Var::from_tensor(&prompt(&values)).unwrap();
    let scored = loss::score(&model, Some(var.as_tensor()), &batch).unwrap();
    let gradient = loss::gradient_of(&scored.sum, &var).unwrap().to_vec2::<f64>().unwrap();

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
fn the_fast_gradient_in_f32_is_the_plain_one_in_f64() {
    let (slow, fast) = (model(DType::F64), model(DType::F32));
    let data = [example("some text\n", "yes"), example("x", "no, not at all"), example("", "ok")];
    let batch: Vec<&Encoded> = data.iter().collect();
    let values = initial(&fast, 5);
    let (sum, gradient) = loss::gradient(&fast, &values, &batch).unwrap();

    let var = Var::from_tensor(&Tensor::from_slice(&values, (5, 32), &Device::Cpu).unwrap()).unwrap();
    let exact = loss::score(&slow, Some(var.as_tensor()), &batch).unwrap().sum;
    let expected = loss::gradient_of(&exact, &var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let exact = loss::scalar(&exact).unwrap();
    assert!((sum - exact).abs() < 1e-4 * exact, "{sum} {exact}");
    for (row, (got, expected)) in gradient.chunks(32).zip(expected.chunks(32)).enumerate() {
        let size = expected.iter().map(|x| x * x).sum::<f32>().sqrt();
        let error = got.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
        assert!(size > 1e-3 && error < 1e-3 * size, "row {row}: error {error} of {size}");
    }
}

#[test]
fn a_batch_costs_what_its_examples_cost_alone_and_counts_exact_answers() {
    let model = model(DType::F32);
    let data = examples();
    let prompt = Tensor::from_vec(initial(&model, 6), (6, 32), &Device::Cpu).unwrap();
    for prompt in [Some(&prompt), None] {
        let all: Vec<&Encoded> = data.iter().collect();
        let together = loss::score(&model, prompt, &all).unwrap();
        let alone: f64 =
            data.iter().map(|e| loss::scalar(&loss::score(&model, prompt, &[e]).unwrap().sum).unwrap()).sum();
        let sum = loss::scalar(&together.sum).unwrap();
        assert!((sum - alone).abs() < 1e-4 * alone, "{sum} {alone}");
        assert_eq!(together.tokens, 16);
        assert_eq!(together.exact(&all).unwrap(), 0);
    }
}

#[test]
fn eight_examples_of_a_random_model_are_learned_by_heart() {
    let model = model(DType::F32);
    let data = examples();
    let before = model.weights_digest().unwrap();
    let mut state = State::new(initial(&model, 16));
    let run_settings = Settings { batch_size: 8, eval_every: 50, ..settings(600) };
    run(&model, &data, &run_settings, &mut state);
    let best = state.best.unwrap();
    assert!(best.held.loss < 0.05 && best.held.exact == 1.0, "{:?}", best.held);
    assert!(state.losses[0] > 2.0, "there was something to learn");
    assert_eq!(model.weights_digest().unwrap(), before, "the model's weights changed");
}

#[test]
fn a_seed_gives_the_same_prompt_bit_for_bit_and_another_seed_another() {
    let model = model(DType::F32);
    let tuned = |seed: u64| {
        let mut state = State::new(initial(&model, 4));
        run(&model, &examples(), &Settings { seed, ..settings(8) }, &mut state);
        state
    };
    assert_eq!(tuned(1), tuned(1));
    assert_ne!(tuned(1).prompt, tuned(2).prompt);
}

#[test]
fn accumulated_batches_are_one_large_batch() {
    let model = model(DType::F32);
    let data = examples();
    let tuned = |batch_size: usize, accumulate: usize| {
        let mut state = State::new(initial(&model, 4));
        run(&model, &data, &Settings { batch_size, accumulate, clip: 0.0, ..settings(2) }, &mut state);
        state.losses
    };
    for (a, b) in tuned(8, 1).iter().zip(tuned(2, 4)) {
        assert!((a - b).abs() < 1e-3, "{a} {b}");
    }
}

#[test]
fn a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does() {
    let model = model(DType::F32);
    let data = examples();
    let settings = Settings { accumulate: 2, ..settings(17) };
    let trainer = Trainer { model: &model, train: &data, held_out: &data[..3] };
    let mut whole = State::new(initial(&model, 4));
    trainer.run(&settings, &mut whole, &mut |_| Ok(ControlFlow::Continue(()))).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let identity = Identity::new();
    let mut cut = State::new(initial(&model, 4));
    let ended = trainer
        .run(&settings, &mut cut, &mut |progress| {
            if let Progress::Evaluated { state, .. } = progress {
                Checkpoint { identity: identity.clone(), rate: 0.05, state: state.clone() }.write(dir.path()).unwrap();
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
    let model = model(DType::F32);
    let data = examples();
    // A rate that only wanders.
    let schedule = Schedule { peak: 30.0, warmup: 0, steps: 400, decay: Decay::Constant };
    let settings = Settings { schedule, patience: 3, ..settings(400) };
    let mut state = State::new(initial(&model, 4));
    let ended = run(&model, &data, &settings, &mut state);
    assert_eq!(ended, Ended::Early);
    assert!(state.step < 400);
    let least = state.evaluations.iter().map(|e| e.1).reduce(|a, b| if b.better_than(&a) { b } else { a }).unwrap();
    assert_eq!(state.best.unwrap().held, least);
}

#[test]
fn the_sweep_leaves_out_rates_that_diverge() {
    let model = model(DType::F32);
    let data = examples();
    let trainer = Trainer { model: &model, train: &data, held_out: &data };
    let initial = initial(&model, 4);
    let rates = [1e-9, 0.05, 1e300];
    let mut steps = 0;
    let found = sweep::sweep(&trainer, &settings(0), &initial, &rates, 10, &mut |done, of| {
        assert_eq!(of, 30);
        steps = done;
        ControlFlow::Continue(())
    });
    let found = found.unwrap().unwrap();
    assert_eq!(found.chosen, Some(0.05));
    assert!(found.trials[2].diverged);
    let all_diverge =
        sweep::sweep(&trainer, &settings(0), &initial, &[1e300], 10, &mut |_, _| ControlFlow::Continue(()));
    assert_eq!(all_diverge.unwrap().unwrap().chosen, None);
}
