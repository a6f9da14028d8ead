//! Scores of continuations: the log-probabilities of one forward pass for each, alone, mixed and when blocks run out.

use std::sync::Arc;

use candle_core::DType;
use softserve::{
    engine::{
        Engine, EngineConfig, EventStream, SubmitError,
        request::{CacheNamespace, Event, Request, SamplingParams},
        runner::{Part, Runner},
    },
    kernels::layout::BLOCK_SIZE,
    packing::{Packing, PromptShape},
    prompt::{Version, format::Fit},
};

use crate::{
    fixtures::{self, Case},
    support::collect,
};

const ENCODER_DECODERS: [&str; 3] = ["encoder-decoder/t5", "encoder-decoder/flan-t5", "encoder-decoder/mt5"];

/// Continuations of 1 to 6 tokens, many of which begin alike, and one twice.
fn continuations(seed: u32) -> Vec<Vec<u32>> {
    let token = |i: u32, j: u32| 5 + (seed * 31 + i / (1 + j % 3) * 17 + j * 7) % 40;
    let mut all: Vec<Vec<u32>> = (0..14).map(|i| (0..1 + i % 6).map(|j| token(i, j)).collect()).collect();
    all.push(all[5].clone());
    all
}

/// The log-probabilities of a continuation by one forward pass over the input and all of it.
fn expected(runner: &mut Runner, case: &Case, version: Option<&Version>, continuation: &[u32]) -> Vec<f64> {
    let prompt = version.map(|version| &version.prompt);
    let shape = PromptShape::of(prompt.map(|prompt| &**prompt));
    let packing = Packing::of(runner.model().info());
    let mut input = packing.pack(shape, shape.followed_by(&case.input_ids)).unwrap();
    let wanted = input.continued_by(continuation).len();
    let encoded = input.encoder.as_ref().map(|tokens| {
        let part = Part { tokens, prompt, ..Part::default() };
        runner.run_encoder(&[part]).unwrap().remove(0)
    });
    let blocks: Vec<u32> = (0..input.decoder.len().div_ceil(BLOCK_SIZE) as u32).collect();
    let part =
        Part { tokens: &input.decoder, blocks: &blocks, prompt, encoded: encoded.as_ref(), wanted, ..Part::default() };
    let log_prob = |(row, &id): (&[f32], &u32)| {
        let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        f64::from(row[id as usize]) - max - row.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln()
    };
    let logits = runner.run(&[part]).unwrap().logits;
    let all: Vec<usize> = (0..logits.num_rows()).collect();
    logits.with_rows(&all, |rows| Ok(rows.iter().copied().zip(continuation).map(log_prob).collect())).unwrap()
}

fn scores(mut stream: EventStream) -> Vec<Vec<f32>> {
    match stream.blocking_next() {
        Some(Event::Scored { log_probs, .. }) => {
            assert!(stream.blocking_next().is_none());
            log_probs
        }
        other => panic!("no scores: {other:?}"),
    }
}

fn with_version(request: Request, version: Option<&Version>) -> Request {
    match version {
        Some(version) => Request { namespace: Some(CacheNamespace(version.digest.0)), ..request },
        None => request,
    }
}

fn prompt(version: Option<&Version>) -> Option<Arc<softserve::prompt::LearnedPrompt>> {
    version.map(|version| Arc::clone(&version.prompt))
}

#[test]
fn scores_are_those_of_one_forward_pass_a_continuation_alone_mixed_and_when_blocks_run_out() {
    let mut names = fixtures::families();
    names.extend(ENCODER_DECODERS.map(str::to_owned));
    for name in names {
        let model = fixtures::load(&name, DType::F32);
        let (fit, block_bytes) = (Fit::from(model.info()), fixtures::block_bytes(&model));
        let is_encoder_decoder = model.info().encoder.is_some();
        let model = Arc::new(model);
        let mut runner = Runner::new(Arc::clone(&model), 32).unwrap();
        let with_version = |request, version: &Option<Version>| with_version(request, version.as_ref());
        let cases: Vec<(Case, Option<Version>)> = fixtures::cases(&name)
            .into_iter()
            .map(|case| {
                let version = case.version(&fixtures::dir(&name).join("prompts"), &fit);
                (case, version)
            })
            .collect();
        let submit = |engine: &Engine, i: usize| {
            let (case, version) = &cases[i];
            let request = Request::score(prompt(version.as_ref()), &case.input_ids, continuations(i as u32));
            engine.submit(with_version(request, version)).unwrap()
        };
        let config = EngineConfig { kv_cache_bytes: 16 << 20, ..Default::default() };
        let (engine, _thread) = Engine::start(Arc::clone(&model), config).unwrap();
        let alone: Vec<_> = (0..cases.len()).map(|i| scores(submit(&engine, i))).collect();
        for (i, (case, version)) in cases.iter().enumerate() {
            for (continuation, found) in continuations(i as u32).iter().zip(&alone[i]) {
                let expected = expected(&mut runner, case, version.as_ref(), continuation);
                assert_eq!(found.len(), expected.len());
                for (a, b) in found.iter().zip(&expected) {
                    // The sums of attention run in another order in a tree of tokens.
                    assert!((f64::from(*a) - b).abs() < 1e-5 * b.abs().max(1.0), "{name}/{}: {a} and {b}", case.prompt);
                }
            }
        }
        // Nothing shared, small steps, and a cache of few blocks, beside requests for new tokens.
        let few = if is_encoder_decoder { 8 << 20 } else { 9 * block_bytes };
        for (kv_cache_bytes, max_step_tokens, prefix_sharing) in
            [(16 << 20, 2048, true), (16 << 20, 7, true), (few, 64, true), (16 << 20, 64, false)]
        {
            let config = EngineConfig { kv_cache_bytes, max_step_tokens, prefix_sharing, ..Default::default() };
            let (engine, _thread) = Engine::start(Arc::clone(&model), config).unwrap();
            let streams: Vec<_> = (0..cases.len())
                .map(|i| {
                    let (case, version) = &cases[i];
                    let sampling = SamplingParams { max_tokens: case.greedy_ids.len(), ..Default::default() };
                    let generate = Request::new(prompt(version.as_ref()), &case.input_ids, sampling);
                    (submit(&engine, i), engine.submit(with_version(generate, version)).unwrap())
                })
                .collect();
            for (i, (scored, generated)) in streams.into_iter().enumerate() {
                let what = format!("{name}/{} {max_step_tokens} {prefix_sharing}", cases[i].0.prompt);
                assert!(scores(scored) == alone[i], "{what}: other bits than alone");
                assert_eq!(collect(generated).0, cases[i].0.greedy_ids, "{what}");
            }
            assert_eq!(engine.stats().kv_blocks_used, 0, "{name}: blocks are left");
        }
    }
}

#[test]
fn an_input_is_computed_once_and_common_beginnings_too() {
    let (engine, _thread) = Engine::start(fixtures::load("llama-tied", DType::F32), EngineConfig::default()).unwrap();
    let input: Vec<u32> = (3..43).collect();
    let continuations = vec![vec![9, 8, 7], vec![9, 8, 6], vec![9, 5], vec![4], vec![9, 8, 7]];
    let before = engine.stats().prompt_tokens;
    let found = scores(engine.submit(Request::score(None, &input, continuations)).unwrap());
    assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 2, 1, 3]);
    assert_eq!(found[0], found[4]);
    // The input, and the tokens 9 and 8 that others follow.
    assert_eq!(engine.stats().prompt_tokens - before, 40 + 2);
}

#[test]
fn what_cannot_be_scored_is_refused_and_a_reader_who_leaves_ends_every_branch() {
    let (engine, _thread) = Engine::start(fixtures::load("llama-tied", DType::F32), EngineConfig::default()).unwrap();
    let submit = |input: &[u32], continuations| engine.submit(Request::score(None, input, continuations)).map(drop);
    assert_eq!(submit(&[3, 4], vec![]), Err(SubmitError::Empty));
    assert_eq!(submit(&[3, 4], vec![vec![5], vec![]]), Err(SubmitError::Empty));
    assert!(matches!(submit(&[3; 500], vec![vec![5; 30]]), Err(SubmitError::TooLong { .. })));
    assert!(matches!(submit(&[3], vec![vec![5]; 5000]), Err(SubmitError::TooManyContinuations { .. })));
    let many: Vec<Vec<u32>> = (0..300u32).map(|i| vec![5 + i % 90, 5 + i / 90, 7, 8 + i % 50, 9]).collect();
    for _ in 0..3 {
        drop(engine.submit(Request::score(None, &[3; 200], many.clone())).unwrap());
    }
    let late = Request { deadline: Some(std::time::Instant::now()), ..Request::score(None, &[3; 300], many.clone()) };
    let mut late = engine.submit(late).unwrap();
    assert!(matches!(late.blocking_next(), Some(Event::Finished { .. })));
    assert!(late.blocking_next().is_none(), "one end");
    let whole = scores(engine.submit(Request::score(None, &[3; 200], many)).unwrap());
    assert!(whole.iter().flatten().all(|x| x.is_finite()));
    while engine.stats().running > 0 {
        std::thread::yield_now();
    }
    assert_eq!((engine.stats().kv_blocks_used, engine.stats().waiting), (0, 0));
}

#[test]
fn log_probabilities_of_a_vocabulary_sum_to_one() {
    let model = fixtures::load("llama-tied", DType::F32);
    let vocab = model.info().vocab_size as u32;
    let (engine, _thread) = Engine::start(model, EngineConfig::default()).unwrap();
    let all = (0..vocab).map(|id| vec![id]).collect();
    let found = scores(engine.submit(Request::score(None, &[3, 4, 5], all)).unwrap());
    let sum: f64 = found.iter().map(|tokens| f64::from(tokens[0]).exp()).sum();
    assert!((sum - 1.0).abs() < 1e-5, "{sum}");
}
