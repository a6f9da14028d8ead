//! Every problem that a client can meet, provoked.

use std::{collections::BTreeSet, fmt::Write as _};

use axum::{
    body::Body,
    http::{Request, header},
};
use futures::stream;
use serde_json::{Value, json};
use softserve::http::problem::Code;

use crate::diverged;
use crate::support::{Answer, Options, Server, TASK, form, post, prompt_files, weights};

/// What was provoked, as one line each, and the codes among it.
struct Provoked {
    spec: Value,
    lines: String,
    codes: BTreeSet<String>,
}

impl Provoked {
    /// Checks what holds for every problem, and keeps its code and detail. `route` is the path in
    /// the specification, which must list the code.
    fn add(&mut self, route: &str, method: &str, answer: &Answer) {
        let problem = answer.json();
        let text = |name: &str| problem[name].as_str().unwrap_or_else(|| panic!("no {name}: {problem}")).to_owned();
        let code = text("code");
        assert_eq!(answer.header("content-type"), "application/problem+json");
        assert_eq!(text("request_id"), answer.header("x-request-id"));
        assert_eq!(text("type"), format!("urn:softserve:problem:{code}"));
        assert_eq!(problem["status"], json!(answer.status.as_u16()));
        let known = Code::ALL.iter().find(|c| c.as_str() == code).unwrap();
        assert_eq!((known.status(), known.title()), (answer.status, text("title").as_str()));
        let wait = matches!(answer.status.as_u16(), 429 | 503);
        assert_eq!(answer.headers.contains_key("retry-after"), wait, "{code}");
        if !route.is_empty() {
            let listed = &self.spec["paths"][route][method]["responses"][answer.status.as_str()];
            let examples = &listed["content"]["application/problem+json"]["examples"];
            assert!(examples.get(&code).is_some(), "{method} {route} does not list {code}");
        }
        writeln!(self.lines, "{} {code}: {}", answer.status.as_u16(), text("detail")).unwrap();
        self.codes.insert(code);
    }
}

const GENERATE: &str = "/v1/tasks/{task}/generate";
const VERSIONS: &str = "/v1/admin/tasks/{task}/versions";

#[tokio::test]
async fn every_problem_says_what_was_found_what_was_expected_and_what_to_do() {
    let server = Server::start();
    let spec = server.get("/openapi.json").await.ok();
    let mut provoked = Provoked { spec, lines: String::new(), codes: BTreeSet::new() };
    generating(&server, &mut provoked).await;
    uploading(&server, &mut provoked).await;
    versions(&server, &mut provoked).await;
    batches(&server, &mut provoked).await;
    access(&mut provoked).await;
    limits(&mut provoked).await;
    store(&mut provoked).await;
    let all: BTreeSet<String> = Code::ALL.iter().map(|c| c.as_str().to_owned()).collect();
    assert_eq!(provoked.codes, all, "each code of the table is provoked here");
    insta::assert_snapshot!(without_ids(&provoked.lines));
}

/// Versions and fingerprints say nothing here: hexadecimal words of their lengths become dots.
fn without_ids(text: &str) -> String {
    let is_id = |word: &str| {
        matches!(word.len(), 12 | 16)
            && word.bytes().all(|b| b.is_ascii_hexdigit())
            && word.bytes().any(|b| b.is_ascii_digit())
    };
    let words = text.split_inclusive(|c: char| !c.is_ascii_alphanumeric());
    let plain = words.map(|word| {
        let bare = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        if is_id(bare) { word.replace(bare, "…") } else { word.to_owned() }
    });
    plain.collect()
}

async fn generating(server: &Server, provoked: &mut Provoked) {
    for body in [
        json!({"inputt": "a"}),
        json!({"max_tokens": 4}),
        json!({"input": ""}),
        json!({"input": null}),
        json!({"input": ["a"]}),
        json!({"input": {"other": "a"}}),
        json!({"input": "a", "max_tokens": "ten"}),
        json!({"input": "a", "max_tokens": 0}),
        json!({"input": "a", "max_tokens": -1}),
        json!({"input": "a", "temperature": -1}),
        json!({"input": "a", "temperature": 3, "top_p": 0, "min_p": 2, "n": 0, "logprobs": 21, "timeout_ms": 0}),
        json!({"input": "a", "repetition_penalty": 0, "frequency_penalty": 3, "presence_penalty": -3}),
        json!({"input": "a", "stop": [""]}),
        json!({"input": "a", "stop": vec!["x"; 17]}),
        json!({"input": "the cat ".repeat(300)}),
        json!({"input": "the cat ".repeat(4000)}),
        json!({"input": "a", "version": "000000000000"}),
        json!([]),
    ] {
        provoked.add(GENERATE, "post", &server.generate(&body).await);
    }
    let path = format!("/v1/tasks/{TASK}/generate");
    for body in ["", "{", "{\"input\": \"a\"} and more", "{\n  \"input\": oops\n}", "\"\u{1}\""] {
        provoked.add(GENERATE, "post", &server.call(post(&path, "application/json", body)).await);
    }
    provoked.add(GENERATE, "post", &server.call(post(&path, "text/plain", "{}")).await);
    let (config, weights) = prompt_files("prompt7");
    let task = json!({"labels": {"good": ["good"], "bad": ["bad"]}}).to_string();
    let parts: [(&str, &[u8]); 3] =
        [("adapter_config.json", &config), ("adapter_model.safetensors", &weights), ("task.json", task.as_bytes())];
    let (content_type, body) = form(&parts);
    server.upload("labels", content_type, body).await.ok();
    let unknown = server.post("/v1/tasks/labels/classify", &json!({"input": "a", "labels": ["good", "fine"]})).await;
    provoked.add("/v1/tasks/{task}/classify", "post", &unknown);
    server.delete("/v1/admin/tasks/labels").await;
    for (route, body) in [
        ("classify", json!({"input": "a"})),
        ("classify", json!({"input": "a", "inputs": ["a"]})),
        ("score", json!({"input": "a", "continuations": []})),
        ("score", json!({"input": "a", "continuations": vec!["the cat"; 4097]})),
        ("score", json!({"input": "a", "continuations": ["the cat ".repeat(300)]})),
    ] {
        let answer = server.post(&format!("/v1/tasks/{TASK}/{route}"), &body).await;
        provoked.add(&format!("/v1/tasks/{{task}}/{route}"), "post", &answer);
    }
    provoked.add(GENERATE, "post", &server.post("/v1/tasks/topik/generate", &json!({"input": "a"})).await);
    provoked.add("/v1/tasks/{task}", "get", &server.get("/v1/tasks/%FF").await);
    provoked.add("/v1/generate", "post", &server.post("/v1/generate", &json!({"requests": []})).await);
    provoked.add("", "", &server.get("/v2/tasks").await);
    let wrong_method = server.get(&path).await;
    assert_eq!(wrong_method.header("allow"), "POST");
    provoked.add("", "", &wrong_method);
}

async fn uploading(server: &Server, provoked: &mut Provoked) {
    let (config, good) = prompt_files("prompt7");
    let files = |config: &[u8], weights: &[u8], task: &str| {
        let parts: [(&str, &[u8]); 3] =
            [("adapter_config.json", config), ("adapter_model.safetensors", weights), ("task.json", task.as_bytes())];
        form(&parts)
    };
    let lora = String::from_utf8(config.clone()).unwrap().replace("PROMPT_TUNING", "LORA");
    let octets = "application/octet-stream";
    for (content_type, body) in [
        (octets, b"hello".to_vec()),
        (octets, good[..good.len() - 10].to_vec()),
        (octets, weights(4, 17, 0.5)),
        (octets, weights(4, 32, f32::NAN)),
        ("application/zip", b"hello".to_vec()),
        ("application/json", b"{}".to_vec()),
        ("multipart/form-data", b"no boundary".to_vec()),
        form(&[("README.md", b"hello")]),
        files(lora.as_bytes(), &good, "{}"),
        files(&config, &good, "{\"colour\": \"red\"}"),
        files(&config, &good, "{\"base_model\": {\"fingerprint\": \"0123456789abcdef\"}}"),
        // Several faults at once: all are listed, the gravest gives the code.
        files(&config, &weights(9, 17, f32::INFINITY), "{\"template\": \"{{ input\"}"),
    ] {
        let content_type = content_type.to_owned();
        provoked.add(VERSIONS, "post", &server.upload("bad", &content_type, body).await);
    }
    let stuck = json!({"input": "a", "grammar": {"choice": ["a"]}, "bad_words": ["a"]});
    provoked.add(GENERATE, "post", &server.generate(&stuck).await);
    let overflows = diverged::files(3e38);
    let parts: Vec<(&str, &[u8])> = overflows.present().map(|(name, bytes)| (name, &bytes[..])).collect();
    let (content_type, body) = form(&parts);
    provoked.add(VERSIONS, "post", &server.upload("bad", content_type, body).await);
    provoked.add(VERSIONS, "post", &server.upload("Bad.Name", octets, good.clone()).await);
    let query = post("/v1/admin/tasks/bad/versions?activate=perhaps", octets, good.clone());
    provoked.add(VERSIONS, "post", &server.call(query).await);
    let broken = stream::iter(vec![Ok(good[..10].to_vec()), Err(std::io::Error::other("gone"))]);
    provoked.add(VERSIONS, "post", &server.upload("bad", octets, Body::from_stream(broken)).await);
    assert_eq!(server.get("/v1/tasks/bad").await.json()["code"], "task_not_found");
}

/// Problems that only routes with OpenAI's shape have.
async fn batches(server: &Server, provoked: &mut Provoked) {
    let empty = (
        "multipart/form-data; boundary=x",
        "--x\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n--x\r\n\
        content-disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n\r\n--x--\r\n",
    );
    let file = server.call(post("/v1/files", empty.0, empty.1)).await.ok();
    let body = json!({"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"});
    let batch = server.post("/v1/batches", &body).await.ok();
    let path = format!("/v1/batches/{}", batch["id"].as_str().unwrap());
    while server.get(&path).await.ok()["status"] != "failed" {
        tokio::task::yield_now().await;
    }
    let answers = [
        server.get("/v1/files/file-none").await,
        server.get("/v1/batches/batch_none").await,
        server.post(&format!("{path}/cancel"), &json!({})).await,
    ];
    for answer in answers {
        let error = answer.json()["error"].clone();
        let (code, message) = (error["code"].as_str().unwrap(), error["message"].as_str().unwrap());
        assert!(Code::ALL.iter().any(|known| known.as_str() == code && known.status() == answer.status), "{error}");
        provoked.codes.insert(code.to_owned());
        assert!(!message.is_empty());
    }
}

async fn versions(server: &Server, provoked: &mut Provoked) {
    let path = "/v1/admin/tasks/later/versions?activate=false";
    let stored = server.call(post(path, "application/octet-stream", prompt_files("prompt7").1)).await;
    let version = stored.ok()["version"].as_str().unwrap().to_owned();
    provoked.add("/v1/tasks/{task}", "get", &server.get("/v1/tasks/later").await);
    server.activate("later", &version, None).await.ok();
    server.upload("later", "application/octet-stream", prompt_files("prompt33").1).await.ok();
    server.activate("later", &version, None).await.ok();
    let one = "/v1/admin/tasks/{task}/versions/{version}";
    provoked.add(one, "delete", &server.delete(&format!("/v1/admin/tasks/later/versions/{version}")).await);
    provoked.add(one, "get", &server.get("/v1/admin/tasks/later/versions/000000000000").await);
    let (curve, nearest) = (format!("{one}/loss.svg"), format!("{one}/nearest"));
    let of = |version: &str, what: &str| format!("/v1/admin/tasks/later/versions/{version}/{what}");
    provoked.add(&curve, "get", &server.get(&of(&version, "loss.svg")).await);
    provoked.add(&curve, "get", &server.get(&of("000000000000", "loss.svg")).await);
    provoked.add(&nearest, "get", &server.get(&of(&version, "nearest?count=21")).await);
    provoked.add(&nearest, "get", &server.get(&of(&version, "nearest?count=many")).await);
    provoked.add(&nearest, "get", &server.get(&of("000000000000", "nearest")).await);
    let prefix = server.app.registry.publish("later".parse().unwrap(), diverged::files(0.5), false).unwrap();
    provoked.add(&nearest, "get", &server.get(&of(&prefix.version.digest.id(), "nearest")).await);
    let rollback = "/v1/admin/tasks/{task}/rollback";
    let request = Request::post("/v1/admin/tasks/prompt7/rollback").body(Body::empty()).unwrap();
    provoked.add(rollback, "post", &server.call(request).await);
    let active = "/v1/admin/tasks/{task}/active";
    provoked.add(active, "put", &server.activate("later", &version, Some("\"999\"")).await);
    provoked.add(active, "put", &server.activate("later", &version, Some("yesterday")).await);
    provoked.add("/v1/admin/tasks/{task}", "delete", &server.delete("/v1/admin/tasks/nobody").await);
}

async fn access(provoked: &mut Provoked) {
    let get = |path: &str, key: &str| {
        let request = Request::get(path).header(header::AUTHORIZATION, key);
        request.body(Body::empty()).unwrap()
    };
    let server = Options::with_keys(&["api-key-1"], &["admin-key-1"], false).start();
    provoked.add("/v1/tasks", "get", &server.get("/v1/tasks").await);
    provoked.add("/v1/tasks", "get", &server.call(get("/v1/tasks", "Basic YTpi")).await);
    let stranger = server.call(get("/v1/tasks", "Bearer wrong-key")).await;
    assert_eq!(stranger.header("www-authenticate"), "Bearer");
    assert!(!stranger.text().contains("wrong-key"));
    provoked.add("/v1/tasks", "get", &stranger);
    provoked.add("/v1/admin/tasks", "get", &server.call(get("/v1/admin/tasks", "Bearer api-key-1")).await);
    assert!(server.call(get("/v1/admin/tasks", "Bearer admin-key-1")).await.status.is_success());
    assert!(server.call(get("/v1/tasks", "Bearer admin-key-1")).await.status.is_success());
    let open = Options::with_keys(&[], &[], false).start();
    provoked.add("/v1/admin/tasks", "get", &open.get("/v1/admin/tasks").await);
    let limited =
        Options::with_key_file("[[key]]\nname = \"a\"\nkey = \"limited-key\"\nrequests_per_minute = 1").start();
    assert!(limited.call(get("/v1/tasks", "Bearer limited-key")).await.status.is_success());
    let refused = limited.call(get("/v1/tasks", "Bearer limited-key")).await;
    assert!(refused.header("retry-after").parse::<u32>().is_ok_and(|seconds| seconds > 1));
    provoked.add("/v1/tasks", "get", &refused);
}

async fn store(provoked: &mut Provoked) {
    let mut options = Options::default();
    options.limits.prompt_memory = 1;
    let server = options.start();
    std::fs::write(server.prompts.path().join(TASK).join("adapter_model.safetensors"), "damaged").unwrap();
    provoked.add(GENERATE, "post", &server.generate(&json!({"input": "a"})).await);
}

async fn limits(provoked: &mut Provoked) {
    let input = json!({"input": "a", "max_tokens": 1});
    let mut options = Options::default();
    options.engine.max_waiting = 0;
    options.limits.max_concurrent_uploads = 0;
    options.limits.max_body = 64;
    options.limits.body_idle_timeout = std::time::Duration::from_millis(1);
    let small = options.start();
    provoked.add(GENERATE, "post", &small.generate(&input).await);
    provoked.add(VERSIONS, "post", &small.upload("one", "application/octet-stream", "x").await);
    provoked.add(GENERATE, "post", &small.generate(&json!({"input": "a".repeat(100)})).await);
    let path = format!("/v1/tasks/{TASK}/generate");
    let never = Body::from_stream(stream::pending::<Result<Vec<u8>, std::io::Error>>());
    provoked.add(GENERATE, "post", &small.call(post(&path, "application/json", never)).await);

    let mut options = Options::default();
    options.limits.max_tasks = 3;
    options.limits.max_upload = 2048;
    let full = options.start();
    let octets = "application/octet-stream";
    provoked.add(VERSIONS, "post", &full.upload("fourth", octets, prompt_files("prompt7").1).await);
    provoked.add(VERSIONS, "post", &full.upload(TASK, octets, vec![0; 4096]).await);

    // A place in the batch that another request has for long.
    let mut options = Options::default();
    options.engine.max_batch = 1;
    let busy = options.start();
    let long = json!({"input": "a", "max_tokens": 480, "ignore_eos": true, "stream": true});
    let long = busy.begin(post(&path, "application/json", long.to_string())).await;
    let late = json!({"input": "the cat", "continuations": ["sat"], "timeout_ms": 1});
    let late = busy.post(&format!("/v1/tasks/{TASK}/score"), &late).await;
    provoked.add("/v1/tasks/{task}/score", "post", &late);
    drop(long);

    let server = Server::start();
    server.app.engine.drain(std::time::Instant::now());
    provoked.add(GENERATE, "post", &server.generate(&input).await);
    provoked.add("/health/ready", "get", &server.get("/health/ready").await);
    // A disk that cannot be written to: where the folder was, there is a file.
    let server = Server::start();
    std::fs::remove_dir_all(server.prompts.path()).unwrap();
    std::fs::write(server.prompts.path(), "").unwrap();
    let failed = server.upload("disk", octets, prompt_files("prompt7").1).await;
    std::fs::remove_file(server.prompts.path()).unwrap();
    assert!(!failed.text().contains(server.prompts.path().to_str().unwrap()), "{}", failed.text());
    provoked.add(VERSIONS, "post", &failed);
    let server = Server::start();
    std::fs::remove_dir_all(server.prompts.path()).unwrap();
    std::fs::write(server.prompts.path(), "").unwrap();
    let (content_type, body) = form(&[("purpose", b"batch"), ("file", b"{}\n")]);
    let failed = server.call(post("/v1/files", content_type, body)).await;
    std::fs::remove_file(server.prompts.path()).unwrap();
    // OpenAI's routes have errors of another form, with the same codes.
    let error = failed.json()["error"].clone();
    assert_eq!((failed.status.as_u16(), &error["code"]), (500, &json!("internal")), "{error}");
    writeln!(provoked.lines, "500 internal: {}", error["message"].as_str().unwrap()).unwrap();
    provoked.codes.insert("internal".to_owned());
}

#[tokio::test]
async fn each_default_of_a_task_is_checked_at_upload_as_the_same_parameter_of_a_request() {
    let server = Server::start();
    let (config, good) = prompt_files("prompt7");
    let wrong = [
        ("max_tokens", json!(0)),
        ("temperature", json!(2.5)),
        ("top_p", json!(0)),
        ("min_p", json!(-0.5)),
        ("repetition_penalty", json!(11)),
        ("frequency_penalty", json!(-3)),
        ("presence_penalty", json!(1e30)),
        ("stop", json!([""])),
        ("stop", json!(vec!["x"; 17])),
    ];
    for (name, value) in wrong {
        let asked = server.generate(&json!({"input": "a", name: value})).await;
        let asked = asked.json()["detail"].as_str().unwrap().to_owned();
        let task = json!({"defaults": {name: value}}).to_string();
        let (content_type, body) = form(&[
            ("adapter_config.json", &config),
            ("adapter_model.safetensors", &good),
            ("task.json", task.as_bytes()),
        ]);
        let answer = server.upload("bad", content_type, body).await;
        let problem = answer.json();
        assert_eq!((answer.status.as_u16(), &problem["code"]), (422, &json!("invalid_task_file")), "{task}: {problem}");
        let refused = problem["detail"].as_str().unwrap();
        assert!(asked.contains("expected") && refused.ends_with(&format!("defaults.{asked}")), "{asked} / {refused}");
    }
}
