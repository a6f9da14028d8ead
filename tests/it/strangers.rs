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
