//! Keys and values that are shared: the same answers as without, found when they should be, and
//! never found when they should not.

use candle_core::DType;
use serde_json::{Value, json};
use softserve::{
    engine::{
        Engine, EngineConfig, EngineThread,
        request::{CacheNamespace, Request, SamplingParams, Tenant},
    },
    prompt::Version,
};

use crate::{
    fixtures::{self, Case},
    support::{Options, Server, TASK, collect, form, post, prompt_files, weights},
};

fn start(model: &str, config: EngineConfig) -> (Engine, EngineThread) {
    Engine::start(fixtures::load(model, DType::F32), config).unwrap()
}

/// A root for each prompt, as its digest is.
fn root(prompt: &str) -> CacheNamespace {
    let mut root = [1; 32];
    root[..prompt.len()].copy_from_slice(prompt.as_bytes());
    CacheNamespace(root)
}

fn request(model: &str, case: &Case) -> Request {
    let sampling = SamplingParams { max_tokens: case.greedy_ids.len(), ..Default::default() };
    let request = Request::new(Some(fixtures::prompt(model, &case.prompt)), &case.input_ids, sampling);
    Request { namespace: Some(root(&case.prompt)), ..request }
}

/// How long a prompt of the fixtures is.
fn rows(prompt: &str) -> usize {
    prompt.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().unwrap()
}

#[test]
fn cold_repeated_unshared_and_evicted_all_answer_as_peft_does() {
    for model in fixtures::MODELS {
        let block_bytes = fixtures::block_bytes(&fixtures::load(model, DType::F32));
        let small = EngineConfig { kv_cache_bytes: 6 * block_bytes, ..Default::default() };
        let unshared = EngineConfig { prefix_sharing: false, ..Default::default() };
        let chunked = EngineConfig { max_step_tokens: 7, ..Default::default() };
        for (name, config) in
            [("shared", EngineConfig::default()), ("unshared", unshared), ("small", small), ("chunked", chunked)]
        {
            let (engine, _thread) = start(model, config);
            let cases = fixtures::cases(model);
            for turn in 0..3 {
                let streams: Vec<_> = cases.iter().map(|case| engine.submit(request(model, case)).unwrap()).collect();
                for (case, stream) in cases.iter().zip(streams) {
                    let (ids, _, cached) = collect(stream);
                    assert_eq!(ids, case.greedy_ids, "{model}/{} {name}, turn {turn}", case.prompt);
                    let input = rows(&case.prompt) + case.input_ids.len();
                    match name {
                        "unshared" => assert_eq!(cached, 0),
                        "shared" if turn > 0 => assert_eq!(cached, input - 1, "{model}/{}", case.prompt),
                        _ => assert!(cached < input),
                    }
                }
            }
            let stats = engine.stats();
            assert_eq!(stats.evictions > 0, name == "small", "{name}: {stats:?}");
            assert_eq!(stats.cached_tokens > 0, name != "unshared", "{name}: {stats:?}");
            assert_eq!((stats.kv_blocks_used, stats.running), (0, 0));
        }
    }
}

#[test]
fn a_warmed_prompt_is_found_in_full_by_its_first_request() {
    let model = "llama-tied";
    let (engine, _thread) = start(model, EngineConfig::default());
    let cases = fixtures::cases(model);
    for case in &cases {
        engine.warm_up(fixtures::prompt(model, &case.prompt), root(&case.prompt));
    }
    // Warming uses what is left of the steps of others.
    let other = Request::new(None, &[5, 6, 7], SamplingParams { max_tokens: 20, ..Default::default() });
    collect(engine.submit(other).unwrap());
    for case in cases.iter().filter(|case| case.input_ids.len() == 3) {
        assert!(engine.is_cached(root(&case.prompt)), "{}", case.prompt);
        let (ids, _, cached) = collect(engine.submit(request(model, case)).unwrap());
        assert_eq!((ids, cached), (case.greedy_ids.clone(), rows(&case.prompt)));
    }
    assert_eq!(engine.stats().cached_prompts, 3);
}

#[test]
fn the_same_words_after_another_prompt_are_not_found() {
    let model = "qwen2";
    let (engine, _thread) = start(model, EngineConfig::default());
    let cases = fixtures::cases(model);
    let case = cases.iter().max_by_key(|case| case.input_ids.len()).unwrap();
    let answer = |namespace| collect(engine.submit(Request { namespace, ..request(model, case) }).unwrap());
    let input = rows(&case.prompt) + case.input_ids.len();
    let found = [Some(root("one")), Some(root("one")), Some(root("two")), None, Some(root("two"))].map(answer);
    assert_eq!(found.each_ref().map(|f| f.2), [0, input - 1, 0, 0, input - 1]);
    assert!(found.iter().all(|f| f.0 == case.greedy_ids));
}

#[test]
fn a_light_account_is_answered_while_a_busy_one_fills_queue_and_batch() {
    let config = EngineConfig { max_batch: 8, max_waiting: 64, ..Default::default() };
    let (engine, _thread) = start("llama-tied", config);
    let of = |key: u64, max_tokens| Request {
        tenant: Tenant { owner: 0, key, weight: 1.0 },
        ..Request::new(None, &[5, 6, key as u32], SamplingParams { max_tokens, ..Default::default() })
    };
    let mut busy = Vec::new();
    let refused = loop {
        match engine.submit(of(1, 400)) {
            Ok(stream) => busy.push(stream),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, softserve::engine::SubmitError::Full { limit: 56 }), "{refused}");
    let (ids, ..) = collect(engine.submit(of(2, 20)).unwrap());
    assert_eq!(ids.len(), 20);
    // The busy one had its 8 places first, and 64 requests of 400 tokens: it is far from done.
    let stats = engine.stats();
    assert!(stats.running >= 7 && stats.waiting >= 40, "{stats:?}");
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["cached_tokens"].as_u64().unwrap()
}

fn input_tokens(answer: &Value) -> u64 {
    answer["usage"]["virtual_tokens"].as_u64().unwrap() + answer["usage"]["prompt_tokens"].as_u64().unwrap()
}

#[tokio::test]
async fn usage_says_what_was_found_also_when_a_stop_text_ends_the_answer() {
    let server = Server::start();
    let request = json!({"input": "the cat sat on the mat", "max_tokens": 12, "ignore_eos": true});
    let first = server.generate(&request).await.ok();
    let second = server.generate(&request).await.ok();
    assert_eq!(second["output"], first["output"]);
    assert_eq!(cached(&second), input_tokens(&second) - 1);
    let stop: String = first["output"].as_str().unwrap().chars().skip(4).take(3).collect();
    let mut stopped = request.clone();
    stopped["stop"] = json!([stop]);
    for stream in [false, true] {
        stopped["stream"] = json!(stream);
        let answer = server.generate(&stopped).await;
        let answer = match stream {
            true => serde_json::from_str(answer.events().iter().rev().nth(1).unwrap()).unwrap(),
            false => answer.ok(),
        };
        assert_eq!(answer["finish_reason"], "stop", "{answer}");
        assert_eq!(cached(&answer), input_tokens(&second) - 1);
    }
}

#[tokio::test]
async fn a_replaced_version_never_meets_the_blocks_of_the_old_one() {
    let mut options = Options::default();
    options.engine.prefix_sharing = false;
    let (shared, unshared) = (Server::start(), options.start());
    let request = json!({"input": "the dog ran after the ball", "max_tokens": 12, "ignore_eos": true});
    let mut outputs = std::collections::HashSet::new();
    for value in [0.5f32, -0.25, 1.0] {
        let mut answers = Vec::new();
        for server in [&shared, &unshared] {
            server.upload(TASK, "application/octet-stream", weights(40, 32, value)).await.ok();
            server.generate(&request).await.ok();
            answers.push(server.generate(&request).await.ok());
        }
        assert_eq!(answers[0]["output"], answers[1]["output"]);
        assert_eq!((cached(&answers[0]), cached(&answers[1])), (input_tokens(&answers[0]) - 1, 0));
        outputs.insert(answers[0]["output"].to_string());
    }
    assert_eq!(outputs.len(), 3, "the prompts make no difference");
}

#[tokio::test]
async fn the_same_content_under_two_tasks_is_computed_once() {
    let server = Server::start();
    let (config, tensors) = prompt_files("prompt33");
    let files = [("adapter_config.json", &config[..]), ("adapter_model.safetensors", &tensors[..])];
    let request = json!({"input": "the same words", "max_tokens": 4, "ignore_eos": true});
    for (task, found) in [("one", false), ("two", true)] {
        let (content_type, body) = form(&files);
        server.upload(task, content_type, body).await.ok();
        let answer = server.post(&format!("/v1/tasks/{task}/generate"), &request).await.ok();
        assert_eq!(cached(&answer) == input_tokens(&answer) - 1, found, "{answer}");
    }
}

/// What a caller with this key is told was found in the cache for this input.
async fn found_by(server: &Server, task: &str, key: Option<&str>, input: &str) -> (u64, Value) {
    let body = json!({"input": input, "max_tokens": 3, "ignore_eos": true}).to_string();
    let mut request = post(&format!("/v1/tasks/{task}/generate"), "application/json", body);
    if let Some(key) = key {
        request.headers_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    }
    let answer = server.call(request).await.ok();
    (cached(&answer), answer)
}

#[tokio::test]
async fn what_another_key_sent_is_never_found_and_the_fixed_beginning_is() {
    let keys = ["first-key", "second-key", "tenant=acme third-key", "tenant=acme fourth-key"];
    let server = Options::with_keys(&keys, &["admin-key-1"], true).start();
    let (config, tensors) = prompt_files("prompt33");
    let fixed = "the cat sat on the mat and the dog ran after the ball. ".repeat(3);
    let task = json!({"template": format!("{fixed}{{{{ input }}}}")}).to_string();
    let (content_type, body) = form(&[
        ("adapter_config.json", &config[..]),
        ("adapter_model.safetensors", &tensors[..]),
        ("task.json", task.as_bytes()),
    ]);
    let mut upload = post("/v1/admin/tasks/fixed/versions", content_type, body);
    upload.headers_mut().insert("authorization", "Bearer admin-key-1".parse().unwrap());
    server.call(upload).await.ok();
    let input = "a secret that is long enough for more than one block, so that whole blocks of it are in the cache too";
    // Alike in its beginning, which would tell how much of a guess is right.
    let guess = "a secret that is long enough for more than one block, so that";
    for task in [TASK, "fixed"] {
        let (_, first) = found_by(&server, task, Some("first-key"), input).await;
        let all = input_tokens(&first) - 1;
        assert_eq!(found_by(&server, task, Some("first-key"), input).await.0, all, "{task}");
        let virtual_tokens = first["usage"]["virtual_tokens"].as_u64().unwrap();
        let tokenizer = fixtures::tokenizer(crate::support::MODEL);
        let fixed = if task == TASK { 0 } else { tokenizer.tokenize(&fixed).unwrap().len() as u64 };
        for (key, input) in [("second-key", guess), ("second-key", input), ("admin-key-1", input)] {
            let (found, _) = found_by(&server, task, Some(key), input).await;
            let public = virtual_tokens + fixed;
            match (key, input == guess) {
                // Its own guess has the same beginning.
                ("second-key", false) => assert!(found > public && found < all, "{task}: {found}"),
                _ => assert!(found <= public && found + 3 >= public, "{task}, {key}: {found} of {public}"),
            }
        }
        assert_eq!(found_by(&server, task, Some("second-key"), input).await.0, all, "{task}");
        found_by(&server, task, Some("third-key"), input).await;
        assert_eq!(found_by(&server, task, Some("fourth-key"), input).await.0, all, "{task}");
    }
}

#[tokio::test]
async fn without_keys_all_callers_are_one_tenant() {
    let server = Server::start();
    let (_, first) = found_by(&server, TASK, None, "some words").await;
    assert_eq!(found_by(&server, TASK, Some("any-key"), "some words").await.0, input_tokens(&first) - 1);
}

#[tokio::test]
async fn residency_tells_where_the_keys_and_values_of_a_version_are() {
    let mut options = Options::default();
    options.engine.prefix_sharing = false;
    for (server, cache) in [(Server::start(), "resident"), (options.start(), "cold")] {
        server.generate(&json!({"input": "a", "max_tokens": 1})).await.ok();
        let task = server.get(&format!("/v1/admin/tasks/{TASK}/versions")).await.ok();
        assert_eq!(task["versions"][0]["residency"]["cache"], cache);
    }
}

#[tokio::test]
async fn a_published_version_is_warmed_before_anyone_asks_for_it() {
    let server = Server::start();
    let version = server.upload("new", "application/octet-stream", weights(40, 32, 0.5)).await.ok();
    let version: std::sync::Arc<Version> = server.app.registry.resolve("new", version["version"].as_str()).unwrap();
    // The steps of another task's request have room for it.
    server.generate(&json!({"input": "a", "max_tokens": 30, "ignore_eos": true})).await.ok();
    assert!(server.app.engine.is_cached(CacheNamespace(version.digest.0)));
    let answer = server.post("/v1/tasks/new/generate", &json!({"input": "a", "max_tokens": 1})).await.ok();
    assert_eq!(cached(&answer), 40);
}
