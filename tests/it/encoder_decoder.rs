//! T5 and mT5 with every type of prompt against what `tests/peft/make_encoder_decoder.py` had PEFT
//! answer: alone, mixed, in small steps, put off; and what becomes of the encoder's output.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Tensor};
use serde_json::json;
use softserve::{
    engine::{
        Engine, EngineConfig, EngineStats, SubmitError,
        request::{CacheNamespace, Event, FinishReason, Goal, InputToken, Request, SamplingParams},
        runner::{Part, Runner},
    },
    kernels::{
        self,
        cross::{CrossKeyValues, EncodedBatch},
        layout::{BLOCK_SIZE, BatchLayout, BlockId},
    },
    model::{Model, ModelFiles, random::RandomModel},
    prompt::{
        LearnedPrompt, Version,
        format::{self, Fit, PromptFiles},
    },
};

use crate::{
    fixtures::{self, Case},
    passes::{values, with_encoded},
    process::{Process, agent, softserve},
    support::{LONG, Options, collect, copy, post},
};

const MODELS: [&str; 3] = ["encoder-decoder/t5", "encoder-decoder/flan-t5", "encoder-decoder/mt5"];

fn cases(name: &str) -> Vec<Case> {
    let cases = fixtures::cases(name);
    for prompt in ["prompt7", "prompt33-one", "ptuning5", "multitask5", "prefix6", "prefix35", "cartridge4"] {
        assert!(cases.iter().any(|case| case.prompt == prompt), "{name} has no {prompt}");
    }
    cases
}

fn version(name: &str, fit: &Fit, case: &Case) -> Option<Version> {
    case.version(&fixtures::dir(name).join("prompts"), fit)
}

/// So many new tokens that sequences outgrow a small cache.
const MANY: usize = 40;

fn request(version: Option<&Version>, case: &Case) -> Request {
    let sampling = SamplingParams { max_tokens: MANY, ..Default::default() };
    let request = Request::new(version.map(|v| v.prompt.clone()), &case.input_ids, sampling);
    Request { namespace: Some(version.map_or(CacheNamespace::TEXT, |v| CacheNamespace(v.digest.0))), ..request }
}

fn of_encoder(prompt: Option<&Arc<LearnedPrompt>>, case: &Case) -> Vec<InputToken> {
    let n = match prompt.map(Arc::as_ref) {
        Some(LearnedPrompt::Embeddings(prompt)) => prompt.rows.dims()[0],
        _ => 0,
    };
    let text = case.input_ids.iter().map(|&id| InputToken::Vocab(id));
    (0..n as u32).map(InputToken::Virtual).chain(text).collect()
}

/// The outputs of the encoder for several inputs in one step.
fn encode(runner: &mut Runner, inputs: &[(&Case, Option<&Arc<LearnedPrompt>>)]) -> Vec<CrossKeyValues> {
    let tokens: Vec<_> = inputs.iter().map(|(case, prompt)| of_encoder(*prompt, case)).collect();
    let part = |(tokens, (_, prompt)): (_, &(_, Option<_>))| {
        let tokens: &Vec<_> = tokens;
        Part { tokens, prompt: *prompt, ..Part::default() }
    };
    let parts: Vec<Part> = tokens.iter().zip(inputs).map(part).collect();
    runner.run_encoder(&parts).unwrap()
}

/// The logits after the decoder's start, its positions computed `chunk` at a time.
fn logits(
    runner: &mut Runner,
    prompt: Option<&Arc<LearnedPrompt>>,
    encoded: &CrossKeyValues,
    chunk: usize,
) -> Vec<f32> {
    let n = match prompt.map(Arc::as_ref) {
        Some(prompt @ LearnedPrompt::KeyValues(_)) => prompt.num_virtual_tokens(),
        _ => 0,
    };
    let tokens: Vec<_> = (0..n as u32).map(InputToken::Virtual).chain([InputToken::Vocab(0)]).collect();
    let blocks: Vec<BlockId> = (0..tokens.len().div_ceil(BLOCK_SIZE) as BlockId).rev().collect();
    let mut last = None;
    for (i, part) in tokens.chunks(chunk).enumerate() {
        let wanted = usize::from((i + 1) * chunk >= tokens.len());
        let encoded = Some(encoded);
        let part =
            Part { tokens: part, start: i * chunk, blocks: &blocks, tree: None, prompt, encoded, wanted, scored: &[] };
        last = Some(runner.run(&[part]).unwrap().logits);
    }
    last.unwrap().with_rows(&[0], |rows| Ok(rows[0].to_vec())).unwrap()
}

/// The same by the plain kernels, for a prompt of rows or none.
fn plain_logits(model: &Model, prompt: Option<&Arc<LearnedPrompt>>, case: &Case) -> Vec<f32> {
    decoded(model, prompt, case, &[0], &[0])
}

/// The logits after these `rows` of what the decoder reads, one behind the other, by the plain kernels.
pub fn decoded(
    model: &Model,
    prompt: Option<&Arc<LearnedPrompt>>,
    case: &Case,
    tokens: &[u32],
    rows: &[u32],
) -> Vec<f32> {
    let embed = |ids: &[u32]| model.embed(&Tensor::new(ids, &Device::Cpu).unwrap()).unwrap();
    let text = embed(&case.input_ids);
    let x = match prompt.map(Arc::as_ref) {
        Some(LearnedPrompt::Embeddings(prompt)) => Tensor::cat(&[&prompt.rows, &text], 0).unwrap(),
        _ => text,
    };
    let length = x.dims()[0];
    let mut kernels = model.backend().tuning().kernels(&BatchLayout::of_lengths(0, &[length]), None, None).unwrap();
    let hidden = model.run_encoder(&x, kernels.as_mut()).unwrap();
    let layers = model.cross_key_values(&hidden, kernels.as_mut()).unwrap();
    let encoded = EncodedBatch { layers, inputs: std::iter::once(0..length).collect() };
    values(&with_encoded(model, &embed(tokens), &[tokens.len()], rows, Some(encoded)))
}

#[test]
fn rows_that_are_asked_for_are_those_of_the_whole_pass_in_every_bit() {
    for name in MODELS {
        let model = fixtures::load(name, DType::F32);
        let case = &cases(name)[0];
        let whole = decoded(&model, None, case, &[0, 7, 9], &[0, 1, 2]);
        let vocab = model.info().vocab_size;
        assert!(decoded(&model, None, case, &[0, 7, 9], &[2, 0]) == [&whole[2 * vocab..], &whole[..vocab]].concat());
    }
}

#[test]
fn logits_are_those_of_peft_by_the_plain_kernels_and_by_those_that_serve() {
    for name in MODELS {
        let model = fixtures::load(name, DType::F32);
        let fit = Fit::from(model.info());
        let cases = cases(name);
        let versions: Vec<_> = cases.iter().map(|case| version(name, &fit, case)).collect();
        let prompts: Vec<_> = versions.iter().map(|v| v.as_ref().map(|v| &v.prompt)).collect();
        for (case, prompt) in cases.iter().zip(&prompts) {
            if prompt.is_none_or(|prompt| prompt.kind() == "embeddings") {
                case.assert_near(&plain_logits(&model, *prompt, case), 1e-3, name);
            }
        }
        let mut runner = Runner::new(model, 8).unwrap();
        let inputs: Vec<_> = cases.iter().zip(prompts.iter().copied()).collect();
        let together = encode(&mut runner, &inputs);
        for ((case, prompt), encoded) in inputs.iter().zip(&together) {
            let served = logits(&mut runner, *prompt, encoded, 1000);
            case.assert_near(&served, 1e-3, name);
            let alone = encode(&mut runner, &[(case, *prompt)]).pop().unwrap();
            assert!(logits(&mut runner, *prompt, &alone, 1000) == served, "{name} {:?} alone", case.prompt);
            assert!(logits(&mut runner, *prompt, &alone, 5) == served, "{name} {:?} in parts", case.prompt);
        }
    }
}

#[test]
fn in_bf16_neighbours_and_cuts_change_no_bit() {
    for name in MODELS {
        let model = fixtures::load(name, DType::BF16);
        let fit = Fit::from(model.info());
        let mut runner = Runner::new(model, 8).unwrap();
        let cases = cases(name);
        let versions: Vec<_> = cases.iter().map(|case| version(name, &fit, case)).collect();
        let inputs: Vec<_> = cases.iter().zip(versions.iter().map(|v| v.as_ref().map(|v| &v.prompt))).collect();
        let together = encode(&mut runner, &inputs);
        for ((case, prompt), encoded) in inputs.iter().zip(&together) {
            let served = logits(&mut runner, *prompt, encoded, 1000);
            let alone = encode(&mut runner, &[(case, *prompt)]).pop().unwrap();
            assert!(logits(&mut runner, *prompt, &alone, 5) == served, "{name} {:?}", case.prompt);
        }
    }
}

#[test]
fn alone_mixed_in_small_steps_and_put_off_all_types_answer_as_peft_does() {
    for name in MODELS {
        let model = fixtures::load(name, DType::F32);
        let (fit, block_bytes) = (Fit::from(model.info()), fixtures::block_bytes(&model));
        let cases = cases(name);
        let versions: Vec<_> = cases.iter().map(|case| version(name, &fit, case)).collect();
        let longest = cases.iter().map(|case| case.input_ids.len()).max().unwrap() + 40;
        // Half for the encoder's output: of the longest input and little more.
        let kv_cache_bytes = 2 * longest.div_ceil(BLOCK_SIZE) * block_bytes;
        // Without guesses, so that all run long enough to get into each other's way.
        let small = EngineConfig { kv_cache_bytes, draft_tokens: Some(0), ..Default::default() };
        let tiny_steps = EngineConfig { max_step_tokens: 5, ..Default::default() };
        let both = EngineConfig { max_step_tokens: 5, ..small };
        let mut alone = Vec::new();
        for (kind, config) in
            [("usual", EngineConfig::default()), ("small", small), ("cut", tiny_steps), ("both", both)]
        {
            let (engine, _thread) = Engine::start(fixtures::load(name, DType::F32), config).unwrap();
            if kind == "usual" {
                for (case, version) in cases.iter().zip(&versions) {
                    let (ids, reason, cached) = collect(engine.submit(request(version.as_ref(), case)).unwrap());
                    assert_eq!(ids[..case.greedy_ids.len()], case.greedy_ids, "{name} {:?} alone", case.prompt);
                    assert_eq!((ids.len(), reason), (MANY, FinishReason::Length));
                    assert_eq!(cached, 0, "nothing of one input is of use to another");
                    alone.push(ids);
                }
            }
            let submit =
                |(case, version): (&Case, &Option<Version>)| engine.submit(request(version.as_ref(), case)).unwrap();
            let streams: Vec<_> = cases.iter().zip(&versions).chain(cases.iter().zip(&versions)).map(submit).collect();
            for (stream, (case, alone)) in streams.into_iter().zip(cases.iter().zip(&alone).cycle()) {
                assert_eq!(&collect(stream).0, alone, "{name} {:?} {:?} {kind}", case.prompt, case.text);
            }
            let stats = engine.stats();
            assert_eq!((stats.kv_blocks_used, stats.running, stats.encoded_positions), (0, 0, 0), "{kind}");
            assert!(kind != "small" || stats.preemptions > 0, "{name} {kind}: {stats:?}");
        }
    }
}

/// Waits until the engine's numbers are so: they are told after the tokens of a step.
fn comes_to(engine: &Engine, so: impl Fn(EngineStats) -> bool) -> bool {
    let until = Instant::now() + LONG;
    while Instant::now() < until {
        if so(engine.stats()) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

/// Waits until nothing of any sequence is held.
fn is_released(engine: &Engine) -> bool {
    comes_to(engine, |stats| (stats.running, stats.encoded_positions, stats.kv_blocks_used) == (0, 0, 0))
}

#[test]
fn the_encoders_output_is_counted_while_its_sequence_runs_and_freed_by_cancel_deadline_and_stop() {
    let (engine, _thread) = Engine::start(fixtures::load(MODELS[1], DType::F32), EngineConfig::default()).unwrap();
    let long = |ids: &[u32]| Request::new(None, ids, SamplingParams { max_tokens: 100_000, ..Default::default() });
    let mut streams: Vec<_> = (0..3).map(|i| engine.submit(long(&[40 + i; 50])).unwrap()).collect();
    for stream in &mut streams {
        assert!(matches!(stream.blocking_next(), Some(Event::Token(_))));
    }
    assert!(comes_to(&engine, |stats| stats.encoded_positions == 150), "{:?}", engine.stats());
    drop(streams);
    assert!(is_released(&engine), "{:?}", engine.stats());

    let late = Request { deadline: Some(Instant::now() + Duration::from_millis(20)), ..long(&[50; 60]) };
    assert_eq!(collect(engine.submit(late).unwrap()).1, FinishReason::Timeout);
    assert!(is_released(&engine));

    // The decoder's own positions end with its context.
    let (ids, reason, _) = collect(engine.submit(long(&[50; 60])).unwrap());
    assert_eq!((ids.len(), reason), (engine.max_sequence() - 1, FinishReason::Length));
    assert!(is_released(&engine));
}

#[test]
fn choices_of_one_input_share_what_the_encoder_made_of_it_and_answer_as_they_do_alone() {
    let name = MODELS[0];
    let fit = Fit::from(fixtures::load(name, DType::F32).info());
    let cases = cases(name);
    let case = cases.iter().find(|case| case.prompt == "prompt7").unwrap();
    let version = version(name, &fit, case).unwrap();
    let positions = 7 + case.input_ids.len();
    let choice = |seed: u64, max_tokens: usize| {
        let request = request(Some(&version), case);
        let sampling = SamplingParams { max_tokens, temperature: 1.0, seed, ..Default::default() };
        Request { goal: Goal::Generate(sampling), ..request }
    };
    let mut answers = Vec::new();
    for prefix_sharing in [true, false] {
        let config = EngineConfig { prefix_sharing, ..Default::default() };
        let (engine, _thread) = Engine::start(fixtures::load(name, DType::F32), config).unwrap();
        let alone: Vec<_> = (0..4).map(|seed| collect(engine.submit(choice(seed, MANY)).unwrap()).0).collect();
        assert!(alone[0] != alone[1]);
        let before = engine.stats().prompt_tokens;
        // One goes on for longer than the others are looked at.
        let mut long = engine.submit(choice(9, 2000)).unwrap();
        assert!(matches!(long.blocking_next(), Some(Event::Token(_))));
        let streams: Vec<_> = (0..4).map(|seed| engine.submit(choice(seed, MANY)).unwrap()).collect();
        let together: Vec<_> = streams.into_iter().map(|stream| collect(stream).0).collect();
        assert_eq!(together, alone);
        // The start token of each, and what was encoded.
        let encoded = if prefix_sharing { positions } else { 5 * positions };
        assert_eq!(engine.stats().prompt_tokens - before, (5 + encoded) as u64);
        // With none left to share it with, it is still there for the long one.
        assert!(comes_to(&engine, |stats| (stats.running, stats.encoded_positions) == (1, positions)));
        drop(long);
        assert!(is_released(&engine));
        answers.push(alone);
    }
    assert_eq!(answers[0], answers[1]);
}

#[test]
fn an_input_that_is_too_long_or_empty_is_refused_before_it_runs() {
    let (engine, _thread) = Engine::start(fixtures::load(MODELS[0], DType::F32), EngineConfig::default()).unwrap();
    let of = |ids: &[u32]| Request::new(None, ids, SamplingParams { max_tokens: 2, ..Default::default() });
    assert_eq!(engine.submit(of(&[])).unwrap_err(), SubmitError::Empty);
    let error = engine.submit(of(&[5; 2049])).unwrap_err();
    assert_eq!(error, SubmitError::EncoderTooLong { found: 2049, limit: 2048 });
    assert_eq!(collect(engine.submit(of(&[5; 2048])).unwrap()).0.len(), 2);
}

/// The faults of a prompt with some keys of its configuration changed.
fn faults(name: &str, prompt: &str, changes: serde_json::Value) -> String {
    let folder = fixtures::dir(name).join("prompts").join(prompt);
    let fit = Fit::from(fixtures::load(name, DType::F32).info());
    faults_of(&folder, changes, &fit)
}

fn faults_of(folder: &Path, changes: serde_json::Value, fit: &Fit) -> String {
    let mut files = PromptFiles::read_dir(folder).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(files.adapter_config.as_ref().unwrap()).unwrap();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    files.adapter_config = Some(config.to_string().into());
    format::read("task".parse().unwrap(), &files, fit).map(|_| ()).map_err(|e| e.to_string()).unwrap_err()
}

#[test]
fn a_prompt_for_another_kind_of_model_or_with_other_rows_is_refused_with_what_to_do() {
    let name = MODELS[0];
    for (prompt, changes, words) in [
        ("prompt7", json!({"task_type": "CAUSAL_LM"}), "has an encoder"),
        ("prompt7", json!({"task_type": "CAUSAL_LM"}), "expected SEQ_2_SEQ_LM or null"),
        ("prompt7", json!({"num_transformer_submodules": 1}), "14 rows"),
        ("prompt7", json!({"num_virtual_tokens": 5}), "14 rows, expected 10 for num_virtual_tokens 5"),
        ("prompt33-one", json!({"num_transformer_submodules": 2}), "33 rows"),
        ("prompt7", json!({"num_transformer_submodules": 3}), "1 or 2"),
        ("prefix6", json!({"num_transformer_submodules": 1}), "has 2"),
        ("prefix6", json!({"num_layers": 3}), "num_layers is 3"),
    ] {
        let found = faults(name, prompt, changes);
        assert!(found.contains(words), "{prompt}: {words}: {found}");
    }
    // And the reverse.
    let llama = Fit::from(fixtures::load("llama-tied", DType::F32).info());
    let folder = fixtures::dir(name).join("prompts/prompt7");
    let found = faults_of(&folder, json!({}), &llama);
    assert!(found.contains("this one is decoder-only"), "{found}");
}

#[test]
fn rows_past_those_of_the_encoder_are_dead_weight_also_where_no_key_says_so() {
    let name = MODELS[0];
    let fit = Fit::from(fixtures::load(name, DType::F32).info());
    let mut files = PromptFiles::read_dir(&fixtures::dir(name).join("prompts/prompt7")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(files.adapter_config.as_ref().unwrap()).unwrap();
    config["num_transformer_submodules"] = json!(null);
    files.adapter_config = Some(config.to_string().into());
    let version = format::read("task".parse().unwrap(), &files, &fit).unwrap();
    assert_eq!(version.prompt.num_virtual_tokens(), 7);
}

#[tokio::test]
async fn a_task_of_an_encoder_decoder_model_answers_over_http_with_the_encoders_tokens_counted() {
    for name in MODELS {
        let server = Options { model: name, ..Options::default() }.start();
        for case in cases(name).iter().filter(|case| !case.prompt.is_empty() && case.task_id.is_none()) {
            let task = &case.prompt;
            let shown = server.get(&format!("/v1/tasks/{task}")).await.ok();
            let n: u64 =
                task.trim_start_matches(|c: char| !c.is_ascii_digit()).trim_end_matches("-one").parse().unwrap();
            let prefix = task.starts_with("prefix") || task.starts_with("cartridge");
            assert_eq!(shown["virtual_tokens"], n, "{shown}");
            assert_eq!(shown["limits"]["max_input_tokens"], if prefix { 2048 } else { 2048 - n }, "{shown}");
            assert_eq!(shown["limits"]["max_tokens"], if prefix { 2047 - n } else { 2047 }, "{shown}");
            let body =
                json!({"input": case.text, "max_tokens": case.greedy_ids.len(), "ignore_eos": true, "logprobs": 0});
            let answer = server.post(&format!("/v1/tasks/{task}/generate"), &body).await.ok();
            let tokens = answer["tokens"].as_array().unwrap();
            let ids: Vec<_> = tokens.iter().map(|t| t["id"].as_u64().unwrap() as u32).collect();
            assert_eq!(ids, case.greedy_ids, "{name} {task}");
            let usage = &answer["usage"];
            assert_eq!(usage["prompt_tokens"], case.input_ids.len(), "{usage}");
            assert_eq!(usage["virtual_tokens"], n, "{usage}");
        }
        let body = json!({"input": "the cat ".repeat(3000)}).to_string();
        let problem = server.call(post("/v1/tasks/prompt7/generate", "application/json", body)).await;
        assert_eq!(problem.status, 400, "{}", problem.text());
        assert_eq!(problem.json()["code"], "input_too_long");
        assert!(problem.text().contains("the encoder takes at most 2041"), "{}", problem.text());
    }
}

#[test]
fn the_positions_that_the_encoder_holds_and_their_limit_are_in_the_metrics() {
    let home = tempfile::tempdir().unwrap();
    copy(&fixtures::dir(MODELS[0]).join("prompts"), &home.path().join("prompts"));
    let mut command = softserve(home.path());
    command.arg("--model").arg(fixtures::dir(MODELS[0])).args(["--listen=127.0.0.1:0", "--kv-cache=8MiB"]);
    command.arg("--prompts=prompts");
    let server = Process::start(command);
    let limit = (4 << 20) / fixtures::load(MODELS[0], DType::F32).cross_bytes();
    assert_eq!(server.metric("softserve_engine_encoder_positions"), limit as f64);
    let used = || server.metric("softserve_engine_encoder_positions_used");
    let comes_to = |expected: usize| {
        let until = Instant::now() + LONG;
        while used() != expected as f64 {
            assert!(Instant::now() < until, "{} are used, expected {expected}", used());
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    comes_to(0);
    let text = "the cat sat on the mat";
    let positions = 7 + fixtures::tokenizer(MODELS[0]).tokenize(text).unwrap().len();
    // Those of all choices, once.
    let body = json!({"input": text, "max_tokens": 2000, "ignore_eos": true, "stream": true, "n": 4});
    let mut answer = agent().post(server.at("/v1/tasks/prompt7/generate")).send_json(body).unwrap();
    let mut lines = BufReader::new(answer.body_mut().as_reader()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("data: "));
    comes_to(positions);
    drop(lines);
    drop(answer);
    comes_to(0);
}

#[test]
fn a_random_model_of_an_encoder_decoder_shape_loads_and_runs() {
    for name in MODELS {
        let config = fixtures::dir(name).join("config.json");
        let files = ModelFiles::random(RandomModel::open(config.to_str().unwrap()).unwrap());
        let model = Model::load(&files, kernels::cpu(), DType::F32).unwrap();
        assert_eq!(model.cross_bytes(), fixtures::load(name, DType::F32).cross_bytes());
        let (engine, _thread) = Engine::start(model, EngineConfig::default()).unwrap();
        let sampling = SamplingParams { max_tokens: 3, ..Default::default() };
        assert_eq!(collect(engine.submit(Request::new(None, &[5, 6], sampling)).unwrap()).0.len(), 3);
    }
}
