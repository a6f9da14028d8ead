//! What strangers bring and the program has to know: links of a user's own, stand-ins for files, other compressions,
//! JSON as other programs write it, data of other forms, a reader that goes away.

use std::{fs, path::Path, process::Stdio};

use serde_json::json;

use crate::{
    fixtures,
    process::{Process, agent, output, read, softserve, with_fixture},
    support::{MODEL, Server, TASK, copy, form, prompt_files},
};

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 3128\n";

/// What Hugging Face's `snapshot_download` leaves: a folder of links into another one.
#[cfg(unix)]
fn hub_cache(home: &Path) -> std::path::PathBuf {
    let cache = home.join("models--org--prompt");
    let (blobs, snapshot) = (cache.join("blobs"), cache.join("snapshots/abc"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    let (config, weights) = prompt_files("prompt7");
    for (i, (name, bytes)) in
        [("adapter_config.json", config), ("adapter_model.safetensors", weights)].iter().enumerate()
    {
        fs::write(blobs.join(i.to_string()), bytes).unwrap();
        std::os::unix::fs::symlink(Path::new("../../blobs").join(i.to_string()), snapshot.join(name)).unwrap();
    }
    snapshot
}

#[cfg(unix)]
#[test]
fn a_users_links_are_followed_by_the_command_line_and_not_by_the_server() {
    let home = tempfile::tempdir().unwrap();
    let snapshot = hub_cache(home.path());
    for path in [snapshot.clone(), snapshot.join("adapter_model.safetensors")] {
        let mut command = softserve(home.path());
        command.arg("inspect").arg(&path).arg("--model").arg(fixtures::dir(MODEL));
        let (code, said, log) = output(command);
        assert!(code == Some(0) && said.contains("would accept it"), "{said} {log}");
    }
    // In the server's own folder a link may be anybody's.
    fs::create_dir(home.path().join("prompts")).unwrap();
    std::os::unix::fs::symlink(&snapshot, home.path().join("prompts/whole")).unwrap();
    let task = home.path().join("prompts/linked");
    fs::create_dir(&task).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::os::unix::fs::symlink(snapshot.join(name), task.join(name)).unwrap();
    }
    let mut command = with_fixture(home.path());
    command.arg("--prompts=prompts");
    let server = Process::start(command);
    let (status, problem) = server.generate("linked", json!({"input": "a"}));
    assert_eq!((status, problem["code"].as_str()), (404, Some("task_not_found")), "{problem}");
    let mut push = softserve(home.path());
    push.arg("push").arg(&snapshot).args(["--task", "pushed", "--url", &server.at("")]);
    let (code, said, log) = output(push);
    assert!(code == Some(0) && said.contains("stored, active"), "{said} {log}");
    assert_eq!(server.generate("pushed", json!({"input": "a", "max_tokens": 1})).0, 200);
}

#[test]
fn a_stand_in_for_a_file_is_told_wherever_weights_are_read() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let (config, _) = prompt_files("prompt7");
    fs::create_dir(at("adapter")).unwrap();
    fs::write(at("adapter/adapter_config.json"), &config).unwrap();
    for (stand_in, words) in [
        (POINTER, "git lfs pull"),
        ("<!doctype html><title>Sign in</title>", "web page"),
        ("Entry not found", "\"Entry not found\""),
    ] {
        for name in ["prompt.npy", "prompt.pt", "adapter/adapter_model.safetensors", "model.gguf"] {
            fs::write(at(name), stand_in).unwrap();
        }
        let _ = fs::remove_dir_all(at("model"));
        copy(&fixtures::dir(MODEL), &at("model"));
        let folder = |file: &str| {
            let folder = at(&format!("with-{file}"));
            let _ = fs::remove_dir_all(&folder);
            copy(&fixtures::dir(MODEL), &folder);
            fs::write(folder.join(file), stand_in).unwrap();
            folder
        };
        let (weights, shape) = (folder("model.safetensors"), folder("config.json"));
        let prompts = fixtures::dir(MODEL).join("prompts").join(TASK);
        let inspect = |model: &Path| vec!["inspect".into(), prompts.clone(), "--model".into(), model.to_owned()];
        let commands: [Vec<std::path::PathBuf>; 7] = [
            vec!["inspect".into(), at("adapter")],
            vec!["inspect".into(), at("prompt.npy")],
            vec!["convert".into(), at("prompt.npy"), "--out".into(), at("out")],
            vec!["convert".into(), at("prompt.pt"), "--out".into(), at("out")],
            inspect(&at("model.gguf")),
            inspect(&weights),
            inspect(&shape),
        ];
        for arguments in commands {
            let mut command = softserve(home.path());
            command.args(&arguments);
            let (code, said, log) = output(command);
            let all = format!("{said}{log}");
            assert!(code == Some(1) && all.contains(words), "{arguments:?}: {all}");
            assert!(!all.contains("header"), "{arguments:?}: {all}");
        }
    }
}

#[tokio::test]
async fn an_upload_that_is_something_else_is_named() {
    let server = Server::start();
    let bzip2 = b"BZh91AY&SY\xa1\xb2\xc3\xd4 and so on".to_vec();
    let noise = vec![0xfe; 2048];
    for (content_type, body, words) in [
        ("application/x-tar", bzip2.clone(), "bzip2"),
        ("application/gzip", b"\xfd7zXZ\x00\x00\x04".to_vec(), "xz"),
        ("application/zip", POINTER.into(), "git lfs pull"),
        ("application/octet-stream", POINTER.into(), "git lfs pull"),
        ("application/octet-stream", bzip2, "bzip2"),
        ("application/x-tar", noise, "not a readable tar archive"),
    ] {
        let answer = server.upload("new", content_type, body).await;
        let problem = answer.json();
        assert!(answer.status.is_client_error(), "{problem}");
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(words) && detail.is_ascii() && detail.len() < 300, "{detail}");
    }
    let (config, weights) = prompt_files("prompt7");
    let mark = [b"\xef\xbb\xbf", &config[..]].concat();
    for (config, task, words) in
        [(&mark, "{}", "byte order mark"), (&config, "{\"description\": \"\\ud83d\"}", "\\ud83d")]
    {
        let parts: [(&str, &[u8]); 3] =
            [("adapter_config.json", config), ("adapter_model.safetensors", &weights), ("task.json", task.as_bytes())];
        let (content_type, body) = form(&parts);
        let problem = server.upload("new", content_type, body).await.json();
        assert!(problem["detail"].as_str().unwrap().contains(words), "{problem}");
    }
    let nulls = json!({"labels": null, "defaults": null, "limits": null, "scale_by_sqrt_hidden": null, "metrics": null,
        "description": null, "template": null, "task_id": null, "base_model": null});
    let nulls = nulls.to_string();
    let (content_type, body) = form(&[
        ("adapter_config.json", &config),
        ("adapter_model.safetensors", &weights),
        ("task.json", nulls.as_bytes()),
    ]);
    assert_eq!(server.upload("nulls", content_type, body).await.status, 201);
}

#[tokio::test]
async fn requests_as_other_programs_write_them() {
    let server = Server::start();
    let nulls = [
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "logprobs",
        "n",
        "stream",
        "ignore_eos",
        "version",
        "priority",
        "timeout_ms",
    ];
    let mut request = json!({"input": "the dog"});
    request.as_object_mut().unwrap().extend(nulls.map(|name| (name.to_owned(), json!(null))));
    let answer = server.generate(&request).await.ok();
    assert_eq!(answer["output"], server.generate(&json!({"input": "the dog"})).await.ok()["output"]);
    let path = format!("/v1/tasks/{TASK}/generate");
    let send = |body: Vec<u8>| server.call(crate::support::post(&path, "application/json", body));
    assert!(send(b"\xef\xbb\xbf{\"input\": \"the dog\"}".to_vec()).await.status.is_success());
    let problem = send(br#"{"input": "cut \ud83d"}"#.to_vec()).await.json();
    assert!(problem["detail"].as_str().unwrap().contains("lone surrogate"), "{problem}");
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let home = tempfile::tempdir().unwrap();
    let mut command = with_fixture(home.path());
    command.arg("--prompts=prompts");
    let server = Process::start(command);
    let folder = fixtures::dir(MODEL).join("prompts").join(TASK);
    let url = server.at("");
    let push = vec!["push", folder.to_str().unwrap(), "--task", "x", "--url", &url];
    for arguments in [push, vec!["health", "--url", &url], vec!["openapi"], vec!["inspect", folder.to_str().unwrap()]] {
        let mut command = softserve(home.path());
        command.args(&arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // Nobody reads: the first write fails.
        drop(child.stdout.take());
        let done = child.wait_with_output().unwrap();
        let log = String::from_utf8_lossy(&done.stderr);
        assert!(!log.contains("panic"), "{arguments:?}: {log}");
    }
    let (status, _) = read(agent().get(server.at("/v1/tasks/x")).call());
    assert_eq!(status, 200, "it was uploaded all the same");
}

#[test]
fn tune_and_eval_read_data_as_other_programs_write_it() {
    let home = tempfile::tempdir().unwrap();
    let words = ["good", "bad"];
    let rows: Vec<(String, usize)> = (0..12).map(|i| (format!("it is {} {i}", words[i % 2]), i % 2)).collect();
    let array: Vec<_> = rows.iter().map(|(text, label)| json!({"input": text, "label": label})).collect();
    let csv = rows.iter().map(|(text, label)| format!("\"{text}\",{label}\n")).collect::<String>();
    let lines = rows.iter().map(|(text, label)| format!("{}\n", json!({"prompt": text, "completion": words[*label]})));
    fs::write(home.path().join("array.json"), serde_json::to_string_pretty(&array).unwrap()).unwrap();
    fs::write(home.path().join("table.csv"), format!("input,label\n{csv}")).unwrap();
    fs::write(home.path().join("lines.jsonl"), lines.collect::<String>()).unwrap();
    fs::write(home.path().join("one.csv"), "input,label\na,x\nb, x\n").unwrap();
    for data in ["array.json", "table.csv", "lines.jsonl", "one.csv"] {
        let run = |arguments: &[&str]| {
            let mut command = softserve(home.path());
            command.args(arguments).args(["--data", data, "--prompts", "out", "--task", "t", "--model"]);
            output({
                command.arg(fixtures::dir(MODEL));
                command
            })
        };
        let (code, _, log) = run(&["tune", "--steps", "2", "--virtual-tokens", "2", "--lr", "0.01"]);
        assert_eq!(code, Some(0), "{data}: {log}");
        assert_eq!(log.contains("every example has the same label"), data == "one.csv", "{data}: {log}");
        let (code, said, log) = run(&["eval"]);
        assert!(code == Some(0) && said.contains("examples"), "{data}: {log}");
        assert_eq!(log.contains("every example has the same label"), data == "one.csv", "{data}: {log}");
        fs::remove_dir_all(home.path().join("out")).unwrap();
    }
}

#[tokio::test]
async fn special_tokens_in_an_input_are_text_where_the_task_says_so() {
    let tokenizer = fixtures::tokenizer(MODEL);
    let special = tokenizer.token_text(fixtures::load(MODEL, candle_core::DType::F32).info().eos_token_ids[0]);
    let count = |ids: &[u32]| ids.iter().filter(|id| tokenizer.is_special(**id)).count();
    let own = count(&tokenizer.tokenize("the dog").unwrap());
    let with = format!("the {special} dog {special}");
    assert_eq!(count(&tokenizer.tokenize(&with).unwrap()), own + 2);
    // Of a template's text and an escaped input, the template's alone are special.
    let rendered = format!("{special}{}{special}", tokenizer.escape(&with));
    let ids = tokenizer.tokenize_escaped(&rendered).unwrap();
    assert_eq!(count(&ids), own + 2);
    assert_eq!(tokenizer.decode(&ids).unwrap().trim(), with.trim());
    // What has no special token is tokenized as ever.
    for text in ["the dog ran", "", "1 \u{e9}t\u{e9}"] {
        let (escaped, plain) = (tokenizer.tokenize_escaped(&tokenizer.escape(text)), tokenizer.tokenize(text));
        assert_eq!(escaped.unwrap(), plain.unwrap());
    }
    let server = Server::start();
    let (config, weights) = prompt_files("prompt7");
    let used = async |task: &str, spec: serde_json::Value, input: &str| {
        let spec = spec.to_string();
        let (content_type, body) = form(&[
            ("adapter_config.json", &config),
            ("adapter_model.safetensors", &weights),
            ("task.json", spec.as_bytes()),
        ]);
        assert_eq!(server.upload(task, content_type, body).await.status, 201);
        let path = format!("/v1/tasks/{task}/generate");
        let answer = server.post(&path, &json!({"input": input, "max_tokens": 1})).await.ok();
        answer["usage"]["prompt_tokens"].as_u64().unwrap() as usize
    };
    let template = format!("{{{{ input }}}}{special}");
    let as_special = used("special", json!({"template": template}), &with).await;
    let as_text = used("text", json!({"template": template, "special_tokens": "text"}), &with).await;
    assert_eq!(as_special, tokenizer.tokenize(&format!("{with}{special}")).unwrap().len());
    assert!(as_text > as_special, "{as_text} {as_special}");
    let refused = json!({"special_tokens": "maybe"}).to_string();
    let (content_type, body) = form(&[
        ("adapter_config.json", &config),
        ("adapter_model.safetensors", &weights),
        ("task.json", refused.as_bytes()),
    ]);
    let problem = server.upload("maybe", content_type, body).await.json();
    assert!(problem["detail"].as_str().unwrap().contains("special_tokens"), "{problem}");
}

#[test]
fn a_context_is_as_long_as_asked_where_positions_have_no_bound() {
    let home = tempfile::tempdir().unwrap();
    let bloom = json!({"model_type": "bloom", "architectures": ["BloomForCausalLM"], "vocab_size": 320, "hidden_size": 32,
        "n_layer": 2, "n_head": 4, "seq_length": 7, "eos_token_id": 2, "bos_token_id": 1});
    fs::write(home.path().join("bloom.json"), bloom.to_string()).unwrap();
    let start = |arguments: &[&str]| {
        let mut command = softserve(home.path());
        command.arg("serve").args(["--listen=127.0.0.1:0", "--prompts=prompts"]).args(arguments);
        Process::start(command)
    };
    let server = start(&["--random-weights=bloom.json"]);
    let mut push = softserve(home.path());
    fs::create_dir(home.path().join("prompt")).unwrap();
    let (config, weights) = prompt_files("prompt7");
    fs::write(home.path().join("prompt/adapter_config.json"), config).unwrap();
    fs::write(home.path().join("prompt/adapter_model.safetensors"), weights).unwrap();
    push.args(["push", "prompt", "--task", "t", "--url", &server.at("")]);
    assert_eq!(output(push).0, Some(0));
    let long = |words: usize| json!({"input": vec!["w9"; words].join(" "), "max_tokens": 4, "ignore_eos": true});
    // Training's seq_length is no bound.
    assert_eq!(server.generate("t", long(12)).0, 200);
    assert_eq!(server.generate("t", long(2041)).1["code"], "input_too_long");
    drop(server);
    for (model, context, words) in [("bloom.json", "3000", 2040), ("bloom.json", "40", 12)] {
        let server = start(&[&format!("--random-weights={model}"), "--context", context]);
        assert_eq!(server.generate("t", long(words)).0, 200, "{context}");
        assert_eq!(server.generate("t", long(context.parse().unwrap())).1["code"], "input_too_long");
    }
    // A table of positions ends.
    let mut serve = softserve(home.path());
    serve.args(["serve", "--listen=127.0.0.1:0", "--context=4000", "--model"]).arg(fixtures::dir("families/gpt2"));
    let (code, _, log) = output(serve);
    assert!(code == Some(1) && log.contains("4000") && log.contains("its positions end there"), "{log}");
}
