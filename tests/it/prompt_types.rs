//! Every PEFT type on the tiny models, against what `tests/peft/make_prompt_types.py` had PEFT
//! answer: alone, mixed, cut small, evicted, put off, shared and not.

use std::{
    io::{Cursor, Write as _},
    path::PathBuf,
    sync::Arc,
};

use candle_core::DType;
use serde_json::{Value, json};
use softserve::{
    engine::{
        Engine, EngineConfig, SubmitError,
        request::{CacheNamespace, InputToken, Request, SamplingParams},
        runner::{Part, Runner},
    },
    http::problem::Problem,
    kernels::layout::{BLOCK_SIZE, BlockId},
    prompt::{LearnedPrompt, PeftType, Version, format::Fit},
};

use crate::{
    fixtures::{self, Case, MODELS},
    support::{Answer, Options, Server, collect},
};

fn dir(model: &str) -> PathBuf {
    fixtures::dir("prompt-types").join(model)
}

/// Answers after a prompt.
fn prompted(model: &str) -> Vec<Case> {
    let mut cases = fixtures::cases(model);
    cases.retain(|case| !case.prompt.is_empty());
    cases
}

fn cases(model: &str) -> Vec<Case> {
    let cases = prompted(&format!("prompt-types/{model}"));
    let has = |prompt| cases.iter().filter(|case| case.prompt == prompt).count() >= 2;
    assert!(["prefix7", "prefix33", "cartridge40", "multitask9", "cpt6", "named"].into_iter().all(has), "{model}");
    cases
}

fn request(version: &Version, case: &Case) -> Request {
    let sampling = SamplingParams { max_tokens: LONG, ..Default::default() };
    let request = Request::new(Some(version.prompt.clone()), &case.input_ids, sampling);
    Request { namespace: Some(CacheNamespace(version.digest.0)), ..request }
}

/// So many new tokens that sequences outgrow a small cache.
const LONG: usize = 40;

/// The logits after a case's input, its positions computed `chunk` at a time.
fn logits(runner: &mut Runner, prompt: &Arc<LearnedPrompt>, case: &Case, chunk: usize) -> Vec<f32> {
    let virtual_tokens = (0..prompt.num_virtual_tokens() as u32).map(InputToken::Virtual);
    let tokens: Vec<_> = virtual_tokens.chain(case.input_ids.iter().map(|&id| InputToken::Vocab(id))).collect();
    // Not in the order of the cache.
    let blocks: Vec<BlockId> = (0..tokens.len().div_ceil(BLOCK_SIZE) as BlockId).rev().collect();
    let mut last = None;
    for (i, tokens) in tokens.chunks(chunk).enumerate() {
        let wanted = usize::from((i + 1) * chunk >= prompt.num_virtual_tokens() + case.input_ids.len());
        let part = Part { tokens, start: i * chunk, blocks: &blocks, prompt: Some(prompt), wanted, ..Part::default() };
        last = Some(runner.run(&[part]).unwrap().logits);
    }
    last.unwrap().with_rows(&[0], |rows| Ok(rows[0].to_vec())).unwrap()
}

#[test]
fn every_type_on_every_family_gives_the_logits_and_the_tokens_of_peft() {
    for name in fixtures::families() {
        let model = fixtures::load(&name, DType::F32);
        let fit = Fit::from(model.info());
        let folder = fixtures::dir(&name);
        let cases = prompted(&name);
        let versions: Vec<_> = cases.iter().map(|case| case.version(&folder.join("prompts"), &fit).unwrap()).collect();
        for peft_type in PeftType::ALL {
            assert!(versions.iter().any(|version| version.peft_type == peft_type), "{name} has no {peft_type}");
        }
        let mut runner = Runner::new(model, 8).unwrap();
        for (case, version) in cases.iter().zip(&versions) {
            let whole = logits(&mut runner, &version.prompt, case, 1000);
            case.assert_near(&whole, 1e-3, &name);
            assert!(logits(&mut runner, &version.prompt, case, 3) == whole, "{name}/{}", case.prompt);
        }
        let config = EngineConfig { kv_cache_bytes: 4 << 20, ..Default::default() };
        let (engine, _thread) = Engine::start(fixtures::load(&name, DType::F32), config).unwrap();
        for _ in 0..2 {
            let streams: Vec<_> =
                cases.iter().zip(&versions).map(|(c, v)| engine.submit(request(v, c)).unwrap()).collect();
            for (case, stream) in cases.iter().zip(streams) {
                let (ids, ..) = collect(stream);
                assert_eq!(ids[..case.greedy_ids.len()], case.greedy_ids, "{name}/{}", case.prompt);
            }
        }
    }
}

#[test]
fn the_logits_after_a_prompt_of_each_type_are_those_of_peft_however_its_positions_are_cut() {
    for name in MODELS {
        let model = fixtures::load(name, DType::F32);
        let fit = Fit::from(model.info());
        let mut runner = Runner::new(model, 8).unwrap();
        for case in cases(name) {
            let version = case.version(&dir(name), &fit).unwrap();
            let whole = logits(&mut runner, &version.prompt, &case, 1000);
            case.assert_near(&whole, 1e-3, name);
            for chunk in [5, 32] {
                let cut = logits(&mut runner, &version.prompt, &case, chunk);
                assert!(cut == whole, "{name}/{} by {chunk}", case.prompt);
            }
        }
    }
}

#[test]
fn in_bf16_the_logits_are_near_those_of_peft_and_cuts_change_no_bit() {
    for name in MODELS {
        let model = fixtures::load(name, DType::BF16);
        let fit = Fit::from(model.info());
        let mut runner = Runner::new(model, 8).unwrap();
        for case in cases(name) {
            let version = case.version(&dir(name), &fit).unwrap();
            let whole = logits(&mut runner, &version.prompt, &case, 1000);
            case.assert_near(&whole, 0.3, name);
            assert!(logits(&mut runner, &version.prompt, &case, 3) == whole, "{name}/{}", case.prompt);
        }
    }
}

#[test]
fn alone_mixed_unshared_cut_small_put_off_and_evicted_all_types_answer_as_peft_does() {
    for name in MODELS {
        let model = fixtures::load(name, DType::F32);
        let (fit, block_bytes) = (Fit::from(model.info()), fixtures::block_bytes(&model));
        let cases = cases(name);
        let versions: Vec<_> = cases.iter().map(|case| case.version(&dir(name), &fit).unwrap()).collect();
        let mut alone = Vec::new();
        let small = EngineConfig { kv_cache_bytes: 7 * block_bytes, ..Default::default() };
        let unshared = EngineConfig { prefix_sharing: false, ..Default::default() };
        let both = EngineConfig { prefix_sharing: false, max_step_tokens: 11, ..small };
        let cut = EngineConfig { max_step_tokens: 7, ..Default::default() };
        for (kind, config) in [
            ("shared", EngineConfig::default()),
            ("unshared", unshared),
            ("small", small),
            ("cut", cut),
            ("both", both),
        ] {
            let (engine, _thread) = Engine::start(fixtures::load(name, DType::F32), config).unwrap();
            if kind == "shared" {
                for (case, version) in cases.iter().zip(&versions) {
                    let (ids, ..) = collect(engine.submit(request(version, case)).unwrap());
                    assert_eq!(ids[..case.greedy_ids.len()], case.greedy_ids, "{name}/{} alone", case.prompt);
                    alone.push(ids);
                }
            }
            for turn in 0..3 {
                let streams: Vec<_> =
                    cases.iter().zip(&versions).map(|(c, v)| engine.submit(request(v, c)).unwrap()).collect();
                for (((case, version), alone), stream) in cases.iter().zip(&versions).zip(&alone).zip(streams) {
                    let (ids, _, cached) = collect(stream);
                    assert_eq!(&ids, alone, "{name}/{} {:?} {kind}, turn {turn}", case.prompt, case.text);
                    let input = version.prompt.num_virtual_tokens() + case.input_ids.len();
                    match kind {
                        "unshared" | "both" => assert_eq!(cached, 0),
                        "shared" => assert_eq!(cached, input - 1, "{name}/{}", case.prompt),
                        _ => assert!(cached < input),
                    }
                }
            }
            let stats = engine.stats();
            assert_eq!(stats.evictions > 0, kind == "small", "{kind}: {stats:?}");
            assert_eq!(stats.preemptions > 0, ["small", "both"].contains(&kind), "{kind}: {stats:?}");
            assert_eq!((stats.kv_blocks_used, stats.running), (0, 0));
        }
    }
}

#[test]
fn in_bf16_what_is_shared_and_copied_in_parts_answers_as_what_is_not() {
    let name = "qwen2";
    let fit = Fit::from(fixtures::load(name, DType::BF16).info());
    let cases = cases(name);
    let versions: Vec<_> = cases.iter().map(|case| case.version(&dir(name), &fit).unwrap()).collect();
    let answers = [true, false].map(|prefix_sharing| {
        let config = EngineConfig { prefix_sharing, ..Default::default() };
        let (engine, _thread) = Engine::start(fixtures::load(name, DType::BF16), config).unwrap();
        let mut answer = |(case, version)| collect(engine.submit(request(version, case)).unwrap());
        let mut turn = || cases.iter().zip(&versions).map(&mut answer).collect::<Vec<_>>();
        let (first, second) = (turn(), turn());
        assert_eq!(first.iter().chain(&second).any(|answer| answer.2 > 0), prefix_sharing);
        [first, second].map(|turn| turn.into_iter().map(|answer| answer.0).collect::<Vec<_>>())
    });
    let [[first, second], unshared] = answers;
    assert!(first == second && [&first, &second] == [&unshared[0], &unshared[1]]);
}

#[test]
fn warmed_keys_and_values_are_found_in_full_by_the_first_request() {
    let name = "llama-tied";
    let model = fixtures::load(name, DType::F32);
    let fit = Fit::from(model.info());
    let (engine, _thread) = Engine::start(model, EngineConfig::default()).unwrap();
    let cases = cases(name);
    let of = |prompt: &str| cases.iter().find(|case| case.prompt == prompt && case.input_ids.len() > 1).unwrap();
    let chosen = ["prefix7", "prefix33", "cartridge40"]
        .map(|prompt| (of(prompt), of(prompt).version(&dir(name), &fit).unwrap()));
    for (_, version) in &chosen {
        engine.warm_up(version.prompt.clone(), CacheNamespace(version.digest.0));
    }
    // Warming uses what is left of the steps of others.
    let other = Request::new(None, &[5, 6, 7], SamplingParams { max_tokens: 20, ..Default::default() });
    collect(engine.submit(other).unwrap());
    for (case, version) in &chosen {
        assert!(engine.is_cached(CacheNamespace(version.digest.0)), "{}", case.prompt);
        let (ids, _, cached) = collect(engine.submit(request(version, case)).unwrap());
        assert_eq!(
            (&ids[..case.greedy_ids.len()], cached),
            (&case.greedy_ids[..], version.prompt.num_virtual_tokens())
        );
    }
}

#[test]
fn keys_and_values_with_no_text_after_them_are_refused_and_rows_are_not() {
    let name = "qwen2";
    let model = fixtures::load(name, DType::F32);
    let fit = Fit::from(model.info());
    let (engine, _thread) = Engine::start(model, EngineConfig::default()).unwrap();
    for case in cases(name) {
        let version = case.version(&dir(name), &fit).unwrap();
        let request = Request::new(Some(version.prompt.clone()), &[], SamplingParams::default());
        match (version.prompt.kind(), engine.submit(request)) {
            ("key-values", Err(error @ SubmitError::NoText)) => {
                let problem = Problem::from(error);
                assert_eq!(problem.code.status(), 400);
                assert!(problem.detail.contains("give a longer input"), "{}", problem.detail);
            }
            ("embeddings", Ok(stream)) => assert!(!collect(stream).0.is_empty()),
            (kind, outcome) => panic!("{kind}: {outcome:?}"),
        }
    }
}

/// A zip of a folder of the fixtures, all that is below it, with a `task.json` if one is given.
fn zipped(model: &str, prompt: &str, task: Option<Value>) -> Vec<u8> {
    let root = dir(model).join(prompt);
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let mut add = |name: &str, content: &[u8]| {
        zip.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(content).unwrap();
    };
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            match path.is_dir() {
                true => folders.push(path),
                false => add(path.strip_prefix(&root).unwrap().to_str().unwrap(), &std::fs::read(&path).unwrap()),
            }
        }
    }
    if let Some(task) = task {
        add("task.json", task.to_string().as_bytes());
    }
    zip.finish().unwrap().into_inner()
}

async fn upload(server: &Server, task: &str, zip: Vec<u8>) -> Answer {
    server.upload(task, "application/zip", zip).await
}

#[tokio::test]
async fn every_type_is_uploaded_listed_and_answers_over_http() {
    let server = Options::default().start();
    for case in cases("llama-tied") {
        let task = format!("{}-{}", case.prompt, case.task_id.unwrap_or(0));
        let spec = case.task_id.map(|task_id| json!({"task_id": task_id}));
        let uploaded = upload(&server, &task, zipped("llama-tied", &case.prompt, spec)).await.ok();
        let (kind, peft_type) = match case.prompt.as_str() {
            "prefix7" | "prefix33" => ("key-values", "PREFIX_TUNING"),
            "cartridge40" => ("key-values", "CARTRIDGE"),
            "multitask9" => ("embeddings", "MULTITASK_PROMPT_TUNING"),
            "cpt6" => ("embeddings", "CPT"),
            _ => ("embeddings", "PROMPT_TUNING"),
        };
        let request =
            json!({"input": case.text, "max_tokens": case.greedy_ids.len(), "ignore_eos": true, "logprobs": 0});
        let answer = server.post(&format!("/v1/tasks/{task}/generate"), &request).await.ok();
        let ids: Vec<_> =
            answer["tokens"].as_array().unwrap().iter().map(|t| t["id"].as_u64().unwrap() as u32).collect();
        assert_eq!(ids, case.greedy_ids, "{task}");
        let listed = server.get(&format!("/v1/admin/tasks/{task}/versions")).await.ok();
        let shown = server.get(&format!("/v1/tasks/{task}")).await.ok();
        for meta in [&uploaded, &listed["versions"][0], &shown] {
            assert_eq!((&meta["kind"], &meta["peft_type"]), (&json!(kind), &json!(peft_type)), "{meta}");
            let digits = case.prompt.trim_start_matches(|c: char| !c.is_ascii_digit());
            assert_eq!(meta["virtual_tokens"], digits.parse().unwrap_or(8), "{meta}");
        }
        assert_eq!(listed["versions"][0]["residency"]["cache"], "resident");
    }
}

#[tokio::test]
async fn a_prompt_of_another_model_is_refused_and_nothing_is_published() {
    let server = Server::start();
    // Heads of 12 dimensions instead of 8, and a hidden size that is the same.
    let problem = upload(&server, "prefix", zipped("llama-scaled", "prefix7", None)).await;
    assert_eq!(problem.status, 422);
    let problem = problem.json();
    assert_eq!(problem["code"], "prompt_shape_mismatch");
    let detail = problem["detail"].as_str().unwrap();
    for words in ["token_dim is 24", "llama-tied has 16", "96 columns", "2 heads of 8", "tuned on this model"] {
        assert!(detail.contains(words), "{words}: {detail}");
    }
    let problem = upload(&server, "prefix", zipped("llama-tied", "multitask9", None)).await.json();
    assert_eq!(problem["code"], "invalid_task_file");
    assert!(problem["detail"].as_str().unwrap().contains("a task_id of 0 to 2"), "{problem}");
    assert_eq!(server.get("/v1/tasks/prefix").await.status, 404);
}

#[tokio::test]
async fn an_adapter_with_a_name_is_served_from_the_folder_and_from_an_upload() {
    let server = Server::start();
    crate::support::copy(&dir("llama-tied").join("named"), &server.prompts.path().join("dropped"));
    server.app.registry.rescan().unwrap();
    let uploaded = upload(&server, "uploaded", zipped("llama-tied", "named", None)).await.ok();
    let dropped = server.get("/v1/tasks/dropped").await.ok();
    assert_eq!(dropped["version"], uploaded["version"]);
    assert_eq!(dropped["virtual_tokens"], 8);
    // A second one beside it makes it unclear which is meant; what was served goes on.
    crate::support::copy(&dir("llama-tied").join("cpt6"), &server.prompts.path().join("dropped/german"));
    server.app.registry.rescan().unwrap();
    assert_eq!(server.get("/v1/tasks/dropped").await.ok()["version"], uploaded["version"]);
    server.delete("/v1/admin/tasks/dropped").await;
    assert_eq!(server.get("/v1/tasks/dropped").await.status, 404);
}
