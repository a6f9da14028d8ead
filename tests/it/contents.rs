//! What is in a version, over HTTP and by the engine: the curve of its tuning, and the words nearest to its virtual tokens.

use std::{
    fs,
    io::Write as _,
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Tensor};
use futures::future::join_all;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use softserve::{
    engine::{
        Engine, EngineConfig, SubmitError,
        request::{Event, Request, SamplingParams},
    },
    kernels,
    model::{
        Model,
        neighbours::{Nearest, Neighbours},
    },
    prompt::files::PromptFiles,
};

use crate::{
    diverged, fixtures,
    process::{Process, agent, output, softserve, with_fixture},
    support::{Answer, MODEL, Options, Server, TASK, collect, copy, form, prompt_files},
    tiny_model::TinyModel,
};

const CURVE: &[u8] = b"<svg xmlns=\"http://www.w3.org/2000/svg\"><path d=\"M0 0L9 9\"/></svg>";

/// The route of a version of a task.
fn at(task: &str, version: &str, what: &str) -> String {
    format!("/v1/admin/tasks/{task}/versions/{version}/{what}")
}

/// The files of the fixture's prompt, with a curve or without.
fn parts<'a>(config: &'a [u8], weights: &'a [u8], curve: Option<&'a [u8]>) -> Vec<(&'static str, &'a [u8])> {
    let files = [("adapter_config.json", config), ("adapter_model.safetensors", weights)];
    files.into_iter().chain(curve.map(|curve| ("loss.svg", curve))).collect()
}

fn zip(parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, content) in parts {
        zip.start_file(format!("prompt/{name}"), zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(content).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn tar(parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in parts {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, *content).unwrap();
    }
    tar.into_inner().unwrap()
}

fn problem(answer: &Answer) -> (u16, String) {
    (answer.status.as_u16(), answer.json()["code"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn the_curve_of_an_upload_is_kept_however_it_is_packed_and_does_not_change_the_version() {
    let server = Server::start();
    let (config, weights) = prompt_files(TASK);
    let drawn = parts(&config, &weights, Some(CURVE));
    let (content_type, body) = form(&parts(&config, &weights, None));
    let plain = server.upload("plain", content_type, body).await.ok()["version"].as_str().unwrap().to_owned();
    for (task, content_type, body) in [
        ("form", form(&drawn).0, form(&drawn).1),
        ("zip", "application/zip", zip(&drawn)),
        ("tar", "application/x-tar", tar(&drawn)),
    ] {
        let stored = server.upload(task, content_type, body).await;
        assert_eq!((stored.status.as_u16(), &stored.json()["version"]), (201, &json!(plain)), "{task}");
        let curve = server.get(&at(task, &plain, "loss.svg")).await;
        assert_eq!((curve.status.as_u16(), &curve.body[..]), (200, CURVE), "{task}");
        assert_eq!(curve.header("content-type"), "image/svg+xml");
        assert_eq!(curve.header("x-content-type-options"), "nosniff");
        let policy = "default-src 'none'; style-src 'unsafe-inline'; sandbox";
        assert_eq!(curve.header("content-security-policy"), policy);
        // Read once more, as at a start, it is the same version.
        server.app.registry.rescan().unwrap();
        let folder = server.prompts.path().join(task).join("versions").join(&plain);
        assert_eq!(PromptFiles::read_dir(&folder).unwrap().digest().id(), plain);
    }

    // The first upload had none. The next one brings it, and what is there is not replaced.
    let none = server.get(&at("plain", &plain, "loss.svg")).await;
    assert_eq!(problem(&none), (404, "not_found".to_owned()));
    assert!(none.json()["detail"].as_str().unwrap().contains("softserve tune writes one"), "{}", none.text());
    for curve in [CURVE, b"<svg/>"] {
        let (content_type, body) = form(&parts(&config, &weights, Some(curve)));
        let again = server.upload("plain", content_type, body).await;
        assert_eq!((again.status.as_u16(), &again.json()["created"]), (200, &json!(false)));
        assert_eq!(&server.get(&at("plain", &plain, "loss.svg")).await.body[..], CURVE);
    }
    for (task, version, code) in
        [("plain", "000000000000", "version_not_found"), ("nobody", &plain[..], "task_not_found")]
    {
        assert_eq!(problem(&server.get(&at(task, version, "loss.svg")).await), (404, code.to_owned()));
    }

    let large = vec![b' '; (1 << 20) + 1];
    let (content_type, body) = form(&parts(&config, &weights, Some(&large)));
    let refused = server.upload("large", content_type, body).await;
    assert_eq!(problem(&refused), (422, "prompt_malformed".to_owned()));
    let detail = "loss.svg has 1048577 bytes; the maximum is 1048576";
    assert_eq!(refused.json()["detail"], detail);
    // A curve alone is no prompt.
    let alone = server.upload("alone", "application/zip", zip(&[("loss.svg", CURVE)])).await;
    assert_eq!(problem(&alone), (400, "invalid_upload".to_owned()));
}

#[tokio::test]
async fn the_curve_of_a_plain_folder_is_shown_and_goes_with_its_prompt() {
    let server = Server::start();
    let task = server.prompts.path().join("dropped");
    copy(&fixtures::dir(MODEL).join("prompts").join(TASK), &task);
    server.app.registry.rescan().unwrap();
    let active = async || server.get("/v1/tasks/dropped").await.ok()["version"].as_str().unwrap().to_owned();
    let version = active().await;
    assert_eq!(problem(&server.get(&at("dropped", &version, "loss.svg")).await).0, 404);
    fs::write(task.join("loss.svg"), CURVE).unwrap();
    server.app.registry.rescan().unwrap();
    assert_eq!(active().await, version);
    assert_eq!(&server.get(&at("dropped", &version, "loss.svg")).await.body[..], CURVE);

    // Of another version of the same task it is not the curve.
    let (content_type, body) = form(&parts(&prompt_files("prompt33").0, &prompt_files("prompt33").1, None));
    let other = server.upload("dropped", content_type, body).await.ok()["version"].as_str().unwrap().to_owned();
    assert_eq!(problem(&server.get(&at("dropped", &other, "loss.svg")).await).0, 404);
    fs::write(task.join("notes.txt"), "mine").unwrap();
    let gone = server.delete(&format!("/v1/admin/tasks/dropped/versions/{version}")).await;
    assert_eq!(gone.status, 204);
    assert!(!task.join("loss.svg").exists() && task.join("notes.txt").exists());

    // A link that leads out is told in the log and not followed.
    let secret = tempfile::NamedTempFile::new().unwrap();
    let folder = server.prompts.path().join("dropped/versions").join(&other);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(secret.path(), folder.join("loss.svg")).unwrap();
        let answer = server.get(&at("dropped", &other, "loss.svg")).await;
        assert_eq!(problem(&answer), (503, "store_unavailable".to_owned()));
        assert!(answer.text().contains("invalid data"), "{}", answer.text());
        assert!(!answer.text().contains(server.prompts.path().to_str().unwrap()), "{}", answer.text());
    }
}

#[test]
fn push_sends_the_curve_of_a_folder() {
    let home = tempfile::tempdir().unwrap();
    let mut command = with_fixture(home.path());
    command.arg("--prompts=prompts");
    let server = Process::start(command);
    let folder = home.path().join("tuned");
    copy(&fixtures::dir(MODEL).join("prompts").join(TASK), &folder);
    fs::write(folder.join("loss.svg"), CURVE).unwrap();
    let push = |folder: &std::path::Path| {
        let mut push = softserve(home.path());
        push.arg("push").arg(folder).args(["--task", "pushed", "--url", &server.at("")]);
        output(push)
    };
    let (code, said, log) = push(&folder);
    assert!(code == Some(0) && said.contains("stored, active"), "{said} {log}");
    let version = server.get("/v1/tasks/pushed").1["version"].as_str().unwrap().to_owned();
    assert_eq!(version, server.get(&format!("/v1/tasks/{TASK}")).1["version"], "the curve does not count");
    let mut curve = agent().get(server.at(&at("pushed", &version, "loss.svg"))).call().unwrap();
    assert_eq!(curve.body_mut().read_to_vec().unwrap(), CURVE);
    // A curve alone is not sent.
    fs::create_dir(home.path().join("curve")).unwrap();
    fs::write(home.path().join("curve/loss.svg"), CURVE).unwrap();
    let (code, _, log) = push(&home.path().join("curve"));
    assert!(code == Some(1) && log.contains("holds none of adapter_config.json"), "{log}");
}

/// Rows that are the embeddings of some tokens, each times a factor, as a safetensors file.
fn words(ids: &[(u32, f32)]) -> Vec<u8> {
    let weights = fs::read(fixtures::dir(MODEL).join("model.safetensors")).unwrap();
    let weights = SafeTensors::deserialize(&weights).unwrap();
    let table = weights.tensor("model.embed_tokens.weight").unwrap();
    let mut rows = Vec::new();
    for &(id, factor) in ids {
        let row = &table.data()[id as usize * 128..][..128];
        rows.extend(row.as_chunks().0.iter().flat_map(|b| (factor * f32::from_le_bytes(*b)).to_le_bytes()));
    }
    let view = TensorView::new(Dtype::F32, vec![ids.len(), 32], &rows).unwrap();
    safetensors::serialize([("prompt_embeddings", view)], None).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_are_embeddings_of_words_have_these_as_their_nearest_while_others_are_answered() {
    let server = Server::start();
    let ids = [(40, 1.0), (270, 1.0), (5, 2.0), (40, 3.0)];
    let stored = server.upload("words", "application/octet-stream", words(&ids)).await.ok();
    let version = stored["version"].as_str().unwrap();
    let cases: Vec<_> = fixtures::cases(MODEL).into_iter().filter(|case| case.prompt == TASK).collect();
    let tokenizer = fixtures::tokenizer(MODEL);
    let others = cases.iter().map(|case| {
        let request = json!({"input": case.text, "max_tokens": case.greedy_ids.len(), "ignore_eos": true});
        let server = &server;
        async move { server.generate(&request).await.ok()["output"].clone() }
    });
    let path = at("words", version, "nearest");
    let asked = (1..=4).map(|count| {
        let (server, path) = (&server, format!("{path}?count={count}"));
        async move { server.get(&path).await.ok() }
    });
    let (others, asked) = futures::join!(join_all(others), join_all(asked));
    for (case, answer) in cases.iter().zip(others) {
        assert_eq!(answer, tokenizer.decode(&case.greedy_ids).unwrap(), "{}", case.text);
    }
    for (count, found) in (1..).zip(&asked) {
        assert_eq!((&found["task"], &found["version"]), (&json!("words"), &json!(version)));
        let tokens = found["virtual_tokens"].as_array().unwrap();
        assert_eq!(tokens.len(), ids.len());
        for (token, (id, _)) in tokens.iter().zip(ids) {
            let nearest = token["nearest"].as_array().unwrap();
            assert_eq!(nearest.len(), count);
            assert_eq!((&nearest[0]["id"], &nearest[0]["text"]), (&json!(id), &json!(tokenizer.token_text(id))));
            let similarity = |word: &Value| word["similarity"].as_f64().unwrap();
            assert!((similarity(&nearest[0]) - 1.0).abs() < 1e-5, "{token}");
            assert!(nearest.is_sorted_by(|a, b| similarity(a) >= similarity(b)), "{token}");
            assert!(nearest[1..].iter().all(|word| similarity(word) < 0.99), "{token}");
        }
        let norm = |i: usize| tokens[i]["norm"].as_f64().unwrap();
        assert!((norm(3) - 3.0 * norm(0)).abs() < 1e-4 && norm(0) > 0.0, "{found}");
    }
    // Five where nothing is said, and the beginning of a version's digest names it.
    let five = server.get(&at("words", &version[..6], "nearest")).await.ok();
    assert_eq!(five["virtual_tokens"][0]["nearest"].as_array().unwrap().len(), 5);
    assert_eq!(five["version"], version);
}

#[tokio::test]
async fn what_cannot_be_compared_is_refused_with_its_reason() {
    let server = Server::start();
    let version = server.get(&format!("/v1/tasks/{TASK}")).await.ok()["version"].as_str().unwrap().to_owned();
    for count in ["0", "21", "-1", "many", "5&counts=6"] {
        let answer = server.get(&at(TASK, &version, &format!("nearest?count={count}"))).await;
        assert_eq!(problem(&answer), (400, "invalid_request".to_owned()), "{count}");
    }
    let twenty = server.get(&at(TASK, &version, "nearest?count=20")).await.ok();
    assert_eq!(twenty["virtual_tokens"][6]["nearest"].as_array().unwrap().len(), 20);
    for (task, version, code) in
        [(TASK, "000000000000", "version_not_found"), ("nobody", &version[..], "task_not_found")]
    {
        assert_eq!(problem(&server.get(&at(task, version, "nearest")).await), (404, code.to_owned()));
    }
    let published = server.app.registry.publish("prefix".parse().unwrap(), diverged::files(0.5), true).unwrap();
    let answer = server.get(&at("prefix", &published.version.digest.id(), "nearest")).await;
    assert_eq!(problem(&answer), (422, "unsupported_prompt_type".to_owned()));
    assert!(answer.json()["detail"].as_str().unwrap().contains("PREFIX_TUNING"), "{}", answer.text());

    // As many as may wait: long comparisons that nobody ends in this time.
    let many = Tensor::ones((100_000, 32), DType::F32, &Device::Cpu).unwrap();
    let ask = || server.app.engine.nearest(Neighbours::new(&many, 300, 1).unwrap());
    let waiting: Vec<_> = std::iter::repeat_with(ask).map_while(Result::ok).collect();
    assert_eq!(waiting.len(), 8);
    let refused = server.get(&at(TASK, &version, "nearest")).await;
    assert_eq!(problem(&refused), (429, "overloaded".to_owned()));
    // Who goes makes room.
    drop(waiting);
    while server.get(&at(TASK, &version, "nearest")).await.status == 429 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    server.app.engine.drain(Instant::now());
    assert_eq!(problem(&server.get(&at(TASK, &version, "nearest")).await), (503, "unavailable".to_owned()));
    let closed = Options::with_keys(&["api-key-1"], &["admin-key-1"], false).start();
    for what in ["nearest", "loss.svg"] {
        assert_eq!(problem(&closed.get(&at(TASK, &version, what)).await), (401, "unauthorized".to_owned()));
    }
}

/// A model whose vocabulary takes five chunks, and rows that are the embeddings of three tokens.
fn large_vocabulary() -> (Model, Tensor, [u32; 3]) {
    let (_folder, files) = TinyModel { vocab_size: 20_000, context_length: 4096, ..TinyModel::default() }.temp();
    let model = Model::load(&files, kernels::cpu(), DType::F32).unwrap();
    let ids = [7, 9_000, 19_999];
    let rows = model.embed(&Tensor::new(&ids, &Device::Cpu).unwrap()).unwrap();
    (model, rows, ids)
}

#[test]
fn a_comparison_takes_one_chunk_between_two_steps_and_changes_no_answer() {
    let (model, rows, ids) = large_vocabulary();
    let (engine, thread) = Engine::start(model, EngineConfig::default()).unwrap();
    let request = || {
        let sampling = SamplingParams { max_tokens: 600, ..SamplingParams::default() };
        Request::new(None, &[5, 6, 7], sampling)
    };
    let (alone, ..) = collect(engine.submit(request()).unwrap());
    assert_eq!(alone.len(), 600);
    let mut running = engine.submit(request()).unwrap();
    let Some(Event::Token(first)) = running.blocking_next() else { panic!("no token") };
    let before = engine.stats().steps;
    let found = engine.nearest(Neighbours::new(&rows, 20_000, 2).unwrap()).unwrap();
    let Nearest { norms, nearest, vocabulary_norms } = found.blocking_recv().unwrap().unwrap();
    // A step between each two of the five chunks.
    assert!(engine.stats().steps - before >= 4, "{} steps", engine.stats().steps - before);
    assert_eq!((norms.len(), vocabulary_norms.len()), (3, 20_000));
    for (i, id) in ids.into_iter().enumerate() {
        assert_eq!(nearest[i][0].0, id);
        assert!((nearest[i][0].1 - 1.0).abs() < 1e-5 && nearest[i][1].1 < 0.99, "{:?}", nearest[i]);
        assert!((norms[i] - vocabulary_norms[id as usize]).abs() < 1e-5);
    }
    let (rest, ..) = collect(running);
    assert_eq!([&[first.id][..], &rest].concat(), alone);

    // Draining ends those that wait; nobody is left waiting.
    let many = Tensor::ones((50_000, 32), DType::F32, &Device::Cpu).unwrap();
    let ask = || engine.nearest(Neighbours::new(&many, 20_000, 1).unwrap());
    let waiting = [ask().unwrap(), ask().unwrap()];
    engine.drain(Instant::now() + Duration::from_secs(20));
    for answer in waiting {
        assert!(answer.blocking_recv().is_err());
    }
    assert!(matches!(ask(), Err(SubmitError::Closed)));
    drop(engine);
    assert!(thread.join());
}
