//! The backends against each other: every family and every type of prompt, served in chunks and in one batch, and
//! tuned, in f32 and in bf16.

use std::{collections::HashMap, sync::Arc};

use candle_core::DType;
use serde_json::json;
use softserve::examples::TokenizedExample;
use softserve::{
    engine::{
        Engine, EngineConfig,
        request::{CacheNamespace, Event, Request, SamplingParams},
    },
    kernels::{self, Backend},
    model::Model,
    prompt::{Version, format::Fit},
    tune::{
        forward::Forward,
        loss,
        parameters::{Method, Parameters},
    },
};

use crate::{
    fixtures::{self, Case},
    process::{self, Process, softserve, with_fixture},
};

const ENCODER_DECODERS: [&str; 3] = ["encoder-decoder/t5", "encoder-decoder/flan-t5", "encoder-decoder/mt5"];

/// The likeliest first tokens after each case with their log-probabilities, and the tokens: all cases in one batch,
/// their inputs in chunks of at most seven positions.
fn served(model: Model, cases: &[(Case, Option<Version>)]) -> Vec<(HashMap<u32, f32>, Vec<u32>)> {
    let config = EngineConfig { max_step_tokens: 7, kv_cache_bytes: 8 << 20, ..Default::default() };
    let (engine, _thread) = Engine::start(model, config).unwrap();
    let submit = |(case, version): &(Case, Option<Version>)| {
        let max_tokens = case.greedy_ids.len();
        let sampling = SamplingParams { max_tokens, logprobs: Some(20), ..Default::default() };
        let prompt = version.as_ref().map(|version| Arc::clone(&version.prompt));
        let namespace = version.as_ref().map(|version| CacheNamespace(version.digest.0));
        engine.submit(Request { namespace, ..Request::new(prompt, &case.input_ids, sampling) }).unwrap()
    };
    let streams: Vec<_> = cases.iter().map(submit).collect();
    let answer = |mut stream: softserve::engine::EventStream| {
        let (mut first, mut ids) = (None, Vec::new());
        while let Some(event) = stream.blocking_next() {
            match event {
                Event::Token(token) => {
                    first.get_or_insert(token.top.into_iter().collect());
                    ids.push(token.id);
                }
                Event::Finished { .. } => break,
                Event::Scored { .. } | Event::NotFinite | Event::NoTokenAllowed(_) | Event::Failed => {
                    panic!("a forward pass failed")
                }
            }
        }
        (first.expect("a token"), ids)
    };
    streams.into_iter().map(answer).collect()
}

#[test]
fn every_family_and_every_type_of_prompt_answers_on_every_backend_as_on_the_cpu() {
    let mut names = fixtures::families();
    names.extend(ENCODER_DECODERS.map(str::to_owned));
    for name in names {
        for (dtype, tolerance) in [(DType::F32, 1e-3), (DType::BF16, 0.3)] {
            let load = |backend: Arc<dyn Backend>| fixtures::load_on(&name, dtype, backend);
            let fit = Fit::from(load(kernels::reference()).info());
            let prompts = fixtures::dir(&name).join("prompts");
            let with_version = |case: Case| {
                let version = case.version(&prompts, &fit);
                (case, version)
            };
            let cases: Vec<_> = fixtures::cases(&name).into_iter().map(with_version).collect();
            let cpu = served(load(kernels::cpu()), &cases);
            for backend in fixtures::backends_beside_the_cpus() {
                let on = backend.name();
                let other = served(load(backend), &cases);
                for (((case, _), cpu), other) in cases.iter().zip(&cpu).zip(&other) {
                    let what = format!("{name}/{} {dtype:?} on {on}", case.prompt);
                    if dtype == DType::F32 {
                        assert_eq!((&cpu.1, &other.1), (&case.greedy_ids, &case.greedy_ids), "{what}");
                    }
                    let both: Vec<_> = cpu.0.iter().filter_map(|(id, a)| Some((id, *a, *other.0.get(id)?))).collect();
                    assert!(both.len() >= 10, "{what}: {} of the likeliest 20 are the same", both.len());
                    for (id, a, b) in both {
                        assert!((a - b).abs() < tolerance, "{what}: token {id} has {a} and {b}");
                    }
                }
            }
        }
    }
}

#[test]
fn gradients_in_bf16_are_those_of_the_reference() {
    let example = TokenizedExample::of_ids(&(40..66).collect::<Vec<_>>(), vec![70, 2]);
    let mut names = fixtures::families();
    names.extend(ENCODER_DECODERS.map(str::to_owned));
    for name in names {
        let load = |backend: Arc<dyn Backend>| Forward::new(fixtures::load_on(&name, DType::BF16, backend));
        let reference = load(kernels::reference());
        let others = [kernels::cpu()].into_iter().chain(fixtures::gpu()).map(|backend| (backend.name(), load(backend)));
        for (on, other) in others {
            for method in [Method::PromptTuning, Method::PrefixTuning] {
                let parameters = Parameters::new(method, 2, reference.model());
                let values: Vec<f32> = (0..parameters.len()).map(|i| (i as f32 * 0.7).sin() * 0.5).collect();
                let of = |forward: &Forward| loss::gradient(forward, &parameters, &values, &[&example]).unwrap();
                let ((loss_a, a), (loss_b, b)) = (of(&other), of(&reference));
                let what = format!("{name} {method:?} on {on}");
                assert!((loss_a - loss_b).abs() < 0.05 * loss_b.abs(), "{what}: {loss_a} and {loss_b}");
                let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
                let size = norm(&mut b.iter().copied());
                let error = norm(&mut a.iter().zip(&b).map(|(a, b)| a - b));
                assert!(size > 0.0 && error < 0.15 * size, "{what}: error {error} of {size}");
            }
        }
    }
}

#[test]
fn the_program_serves_on_the_reference_backend_and_says_so() {
    let home = tempfile::tempdir().unwrap();
    let mut answers = ["auto", "reference"].map(|backend| {
        let mut command = with_fixture(home.path());
        command.arg("--prompts").arg(home.path().join("prompts")).env("SOFTSERVE_BACKEND", backend);
        let server = Process::start(command);
        let (status, answer) = server.generate("prompt7", json!({"input": "the dog ran", "max_tokens": 8}));
        assert_eq!(status, 200, "{answer}");
        server.signal("TERM");
        let (_, log) = server.wait();
        assert!(log.contains(if backend == "auto" { "cpu (" } else { "reference (" }), "{log}");
        answer["output"].clone()
    });
    let output = answers[0].take();
    assert_eq!(output, answers[1]);
    let (code, _, error) = output_of(home.path(), &["serve", "--backend", "gpu"]);
    assert!(code == Some(2) && error.contains("reference"), "{error}");
}

fn output_of(home: &std::path::Path, args: &[&str]) -> (Option<i32>, String, String) {
    let mut command = softserve(home);
    command.args(args);
    process::output(command)
}
