//! The engine against PEFT's greedy answers: alone, mixed, squeezed, cancelled and drained.

use std::time::{Duration, Instant};

use candle_core::DType;
use softserve::engine::{
    Engine, EngineConfig, EngineThread, SubmitError,
    request::{Event, FinishReason, Goal, Request, SamplingParams},
};

use crate::{fixtures, support::collect};

fn start(model: &str, config: EngineConfig) -> (Engine, EngineThread) {
    Engine::start(fixtures::load(model, DType::F32), config).unwrap()
}

fn request(model: &str, case: &fixtures::Case) -> Request {
    let sampling = SamplingParams { max_tokens: case.greedy_ids.len(), logprobs: Some(5), ..Default::default() };
    Request::new(Some(fixtures::prompt(model, &case.prompt)), &case.input_ids, sampling)
}

fn long_request(max_tokens: usize) -> Request {
    Request::new(None, &[5, 6, 7], SamplingParams { max_tokens, ..Default::default() })
}

/// How a request's tokens are chosen.
fn sampling(request: &mut Request) -> &mut SamplingParams {
    match &mut request.goal {
        Goal::Generate(sampling) => sampling,
        Goal::Score(_) => panic!("the request asks for scores"),
    }
}

#[test]
fn every_answer_is_that_of_peft_alone_and_in_a_mixed_batch() {
    for model in fixtures::MODELS {
        let (engine, _thread) = start(model, EngineConfig::default());
        let cases = fixtures::cases(model);
        for case in &cases {
            let (ids, reason, _) = collect(engine.submit(request(model, case)).unwrap());
            assert_eq!((ids, reason), (case.greedy_ids.clone(), FinishReason::Length), "{model}/{}", case.prompt);
        }
        let streams: Vec<_> = cases.iter().map(|case| engine.submit(request(model, case)).unwrap()).collect();
        for (case, stream) in cases.iter().zip(streams) {
            assert_eq!(collect(stream).0, case.greedy_ids, "{model}/{} mixed", case.prompt);
        }
    }
}

#[test]
fn requests_that_are_handed_over_together_share_a_step_and_each_is_refused_by_itself() {
    let (engine, _thread) = start("llama-scaled", EngineConfig { max_waiting: 40, ..EngineConfig::default() });
    let score = |id| Request::score(None, &[5, 6, id], vec![vec![7, 8], vec![9]]);
    let before = engine.stats().steps;
    let streams =
        engine.submit_all((10..20).map(score).chain([Request::new(None, &[], SamplingParams::default())]).collect());
    assert!(matches!(streams.last(), Some(Err(SubmitError::Empty))));
    for stream in streams.into_iter().take(10) {
        assert!(matches!(stream.unwrap().blocking_next(), Some(Event::Scored { .. })));
    }
    assert_eq!(engine.stats().steps - before, 1);
    let streams = engine.submit_all((0..100).map(|_| long_request(4)).collect());
    let taken = streams.iter().filter(|stream| stream.is_ok()).count();
    assert!((1..=40).contains(&taken), "{taken}");
    assert!(streams.iter().all(|stream| matches!(stream, Ok(_) | Err(SubmitError::Full { .. }))));
    assert!(engine.submit_all(Vec::new()).is_empty());
}

#[test]
fn answers_stay_the_same_in_small_chunks_and_when_sequences_are_preempted() {
    let model = "llama-scaled";
    let block_bytes = fixtures::block_bytes(&fixtures::load(model, DType::F32));
    let cases = fixtures::cases(model);
    // Far enough for every sequence to need one more block than its input.
    let longer = |case| {
        let mut request = request(model, case);
        sampling(&mut request).max_tokens = 40;
        request
    };
    let (engine, _thread) = start(model, EngineConfig::default());
    let alone: Vec<_> = cases.iter().map(|case| collect(engine.submit(longer(case)).unwrap()).0).collect();
    for (max_step_tokens, blocks) in [(5, 256), (64, 6)] {
        let config = EngineConfig { max_step_tokens, kv_cache_bytes: blocks * block_bytes, ..Default::default() };
        let (engine, _thread) = start(model, config);
        let submit = |(i, case)| (i, engine.submit(longer(case)).unwrap());
        let streams: Vec<_> = cases.iter().enumerate().cycle().take(36).map(submit).collect();
        for (i, stream) in streams {
            let (ids, ..) = collect(stream);
            assert_eq!(ids, alone[i], "{}", cases[i].prompt);
            assert!(ids.starts_with(&cases[i].greedy_ids));
        }
        let stats = engine.stats();
        assert_eq!(stats.preemptions > 0, blocks == 6, "{stats:?}");
        assert_eq!((stats.kv_blocks_used, stats.running), (0, 0));
    }
}

#[test]
fn a_full_queue_refuses_and_a_reader_that_leaves_frees_its_place_at_once() {
    let config = EngineConfig { max_waiting: 2, max_batch: 1, ..Default::default() };
    let (engine, _thread) = start("qwen2", config);
    let mut running = engine.submit(long_request(400)).unwrap();
    assert!(matches!(running.blocking_next(), Some(Event::Token(_))));
    let waiting = [engine.submit(long_request(400)).unwrap(), engine.submit(long_request(400)).unwrap()];
    assert_eq!(engine.submit(long_request(1)).unwrap_err(), SubmitError::Full { limit: 2 });
    drop(waiting);
    drop(running);
    let deadline = Instant::now() + Duration::from_secs(20);
    let stream = loop {
        match engine.submit(long_request(3)) {
            Ok(stream) => break stream,
            Err(SubmitError::Full { .. }) if Instant::now() < deadline => std::thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(collect(stream).0.len(), 3);
    assert_eq!(engine.stats().waiting, 0);
}

#[test]
fn a_request_ends_at_its_deadline_at_a_stop_token_and_at_the_contexts_end() {
    let (engine, _thread) = start("qwen2", EngineConfig::default());
    let mut late = long_request(10);
    late.deadline = Some(Instant::now());
    let (ids, reason, _) = collect(engine.submit(late).unwrap());
    assert_eq!((ids, reason), (vec![], FinishReason::Timeout));

    let (ids, ..) = collect(engine.submit(long_request(8)).unwrap());
    let stop_at = ids.iter().position(|id| *id == ids[5]).unwrap();
    let mut stopped = long_request(8);
    sampling(&mut stopped).stop_tokens = vec![ids[5]];
    let (stopped, reason, _) = collect(engine.submit(stopped).unwrap());
    assert_eq!((&stopped[..], reason), (&ids[..stop_at], FinishReason::Stop));

    let (ids, reason, _) = collect(engine.submit(long_request(100_000)).unwrap());
    assert_eq!((ids.len(), reason), (512 - 3, FinishReason::Length));
    let full = Request::new(None, &[5; 512], SamplingParams::default());
    assert_eq!(engine.submit(full).unwrap_err(), SubmitError::TooLong { found: 512, limit: 512 });
    let empty = Request::new(None, &[], SamplingParams::default());
    assert_eq!(engine.submit(empty).unwrap_err(), SubmitError::Empty);
}

#[test]
fn a_drain_finishes_what_runs_and_its_deadline_cuts_the_rest() {
    let (engine, thread) = start("qwen2", EngineConfig::default());
    let stream = engine.submit(long_request(50)).unwrap();
    engine.drain(Instant::now() + Duration::from_secs(60));
    assert_eq!(engine.submit(long_request(1)).unwrap_err(), SubmitError::Closed);
    assert_eq!(collect(stream).0.len(), 50);
    assert!(thread.join());
    assert!(!engine.stats().ready);

    let (engine, thread) = start("qwen2", EngineConfig::default());
    let stream = engine.submit(long_request(500)).unwrap();
    engine.drain(Instant::now());
    assert_eq!(collect(stream).1, FinishReason::Cancelled);
    assert!(thread.join());
}

#[test]
fn an_idle_engine_stops_when_it_is_drained_or_dropped() {
    let (engine, thread) = start("qwen2", EngineConfig::default());
    engine.drain(Instant::now() + Duration::from_secs(60));
    assert!(thread.join());
    let (engine, thread) = start("qwen2", EngineConfig::default());
    drop(engine);
    assert!(thread.join());
}

#[test]
fn a_seeded_draw_is_the_same_whatever_runs_beside_it() {
    let (engine, _thread) = start("llama-tied", EngineConfig::default());
    let sampled = |seed| {
        let mut request = long_request(30);
        let params = sampling(&mut request);
        (params.temperature, params.top_p, params.seed) = (1.0, 0.9, seed);
        request
    };
    let (alone, ..) = collect(engine.submit(sampled(7)).unwrap());
    let streams: Vec<_> = (0..12).map(|seed| engine.submit(sampled(seed)).unwrap()).collect();
    let together: Vec<_> = streams.into_iter().map(|s| collect(s).0).collect();
    assert_eq!(together[7], alone);
    assert_ne!(together[6], alone);
}
