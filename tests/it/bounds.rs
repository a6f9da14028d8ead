//! The engine at its bounds: a full queue, one place, little time, much to keep.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use candle_core::DType;
use serde_json::json;
use softserve::engine::{
    Engine, EngineConfig,
    request::{CacheNamespace, Event, FinishReason, Request, SamplingParams, Tenant},
};

use crate::{
    fixtures,
    support::{Options, TASK, collect},
};

fn request(max_tokens: usize) -> Request {
    Request::new(None, &[5, 6, 7], SamplingParams { max_tokens, ..Default::default() })
}

#[test]
fn a_deadline_ends_a_request_that_still_waits_and_frees_its_place() {
    let config = EngineConfig { max_batch: 1, max_waiting: 1, ..Default::default() };
    let (engine, _thread) = Engine::start(fixtures::load("qwen2", DType::F32), config).unwrap();
    let mut running = engine.submit(request(480)).unwrap();
    assert!(matches!(running.blocking_next(), Some(Event::Token(_))));
    let mut waiting = request(480);
    waiting.deadline = Some(Instant::now() + Duration::from_millis(1));
    let (ids, reason, _) = collect(engine.submit(waiting).unwrap());
    assert_eq!((ids, reason), (vec![], FinishReason::Timeout));
    // Its place is there for another soon after, and the running one was not disturbed.
    let begun = Instant::now();
    let next = loop {
        match engine.submit(request(2)) {
            Ok(next) => break next,
            Err(full) => assert!(begun.elapsed() < Duration::from_secs(60), "{full:?}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert_eq!(collect(running).0.len(), 479);
    assert_eq!(collect(next).0.len(), 2);
}

#[test]
fn the_prompts_of_many_tasks_stay_in_the_cache_beside_a_batch_of_one() {
    let model = "qwen2";
    let config = EngineConfig { max_batch: 1, ..Default::default() };
    let (engine, _thread) = Engine::start(fixtures::load(model, DType::F32), config).unwrap();
    let prompt = fixtures::prompt(model, "prompt33");
    let roots: Vec<_> = (0..100).map(|n| CacheNamespace([n + 1; 32])).collect();
    for &root in &roots {
        engine.warm_up(Arc::clone(&prompt), root);
    }
    // Sent after them, it is done when they are, or they are after it.
    collect(engine.submit(request(480)).unwrap());
    let begun = Instant::now();
    while engine.stats().cached_prompts < roots.len() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", engine.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
    // The longest sequence there is takes none of them away.
    collect(engine.submit(request(480)).unwrap());
    assert!(roots.iter().all(|&root| engine.is_cached(root)));
}

#[test]
fn accounts_that_never_end_do_not_keep_one_of_a_lower_priority_number_waiting() {
    let config = EngineConfig { max_batch: 2, ..Default::default() };
    let (engine, _thread) = Engine::start(fixtures::load("qwen2", DType::F32), config).unwrap();
    let of = |key, priority, max_tokens| Request {
        tenant: Tenant { owner: 0, key, weight: 1.0 },
        priority,
        ..request(max_tokens)
    };
    let low: Vec<_> = (0..40).map(|i| engine.submit(of(i % 2, i32::MAX, 400)).unwrap()).collect();
    let (ids, ..) = collect(engine.submit(of(7, i32::MIN, 20)).unwrap());
    assert_eq!(ids.len(), 20);
    assert!(engine.stats().waiting > 30);
    drop(low);
}

#[tokio::test]
async fn a_batch_is_answered_whole_although_fewer_may_wait_at_once() {
    let mut options = Options::default();
    options.engine.max_waiting = 16;
    options.engine.max_batch = 2;
    let server = options.start();
    let inputs: Vec<String> =
        (0..=255u8).map(|i| format!("{} {}", char::from(b'a' + i % 16), char::from(b'a' + i / 16))).collect();
    let item = |input: &String| json!({"task": TASK, "input": input, "max_tokens": 3, "ignore_eos": true});
    let requests: Vec<_> = inputs.iter().map(item).collect();
    let answer = server.post("/v1/generate", &json!({"requests": requests})).await.ok();
    let results = answer["results"].as_array().unwrap();
    assert_eq!(results.len(), inputs.len());
    for (input, result) in inputs.iter().zip(results).step_by(17) {
        let alone = server.generate(&json!({"input": input, "max_tokens": 3, "ignore_eos": true})).await.ok();
        assert_eq!(result["output"], alone["output"], "{input}: {result}");
    }
    assert!(results.iter().all(|result| result["usage"]["completion_tokens"] == 3), "{answer}");
}

#[tokio::test]
async fn a_request_for_more_answers_than_may_wait_is_refused_as_a_whole() {
    let mut options = Options::default();
    options.engine.max_waiting = 2;
    options.engine.max_batch = 1;
    let server = options.start();
    let several = json!({"input": "a", "max_tokens": 400, "ignore_eos": true, "n": 16});
    let refused = server.generate(&several).await.json();
    assert_eq!((&refused["code"], &refused["status"]), (&json!("overloaded"), &json!(429)), "{refused}");
    // Those that had been taken are given up.
    let begun = Instant::now();
    loop {
        let stats = server.app.engine.stats();
        if (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0) {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{stats:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    server.generate(&json!({"input": "a", "max_tokens": 2})).await.ok();
}
