//! Every example request of the README and of the specification, sent to a server of the demo.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use serde_json::{Value, json};

use crate::process::{Process, agent, read, softserve};

fn server(home: &Path) -> Process {
    let mut command = softserve(home);
    command.args(["serve", "--listen=127.0.0.1:0"]);
    Process::start(command)
}

/// The blocks of the README that call a server, each a script for a shell.
fn scripts() -> Vec<String> {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let mut blocks: Vec<Vec<&str>> = vec![Vec::new()];
    for line in readme.lines() {
        match line.strip_prefix("    ") {
            Some(code) => blocks.last_mut().unwrap().push(code),
            // An empty line may be within a block.
            None if line.is_empty() => blocks.last_mut().unwrap().push(""),
            None => blocks.push(Vec::new()),
        }
    }
    let blocks = blocks.into_iter().map(|block| block.join("\n"));
    blocks.filter(|block| block.contains("curl") && block.contains("localhost:8080")).collect()
}

#[test]
fn every_call_in_the_readme_is_answered() {
    if Command::new("curl").arg("--version").output().is_err() {
        eprintln!("skipped: there is no curl");
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let server = server(home.path());
    let mut scripts = scripts();
    // What deletes a task comes last.
    scripts.sort_by_key(|script| script.contains("DELETE"));
    let active = server.get("/v1/admin/tasks/story/versions").1["active"].as_str().unwrap().to_owned();
    assert!(scripts.len() >= 3, "{scripts:?}");
    for script in scripts {
        // Uploads name files that are not here.
        if script.contains("--data-binary") || script.contains("-F ") || script.contains("metrics") {
            continue;
        }
        let script = script.replace("localhost:8080", server.url.trim_start_matches("http://"));
        // The task of the text, and its version, as the demo has them.
        let script = script.replace("my-task", "story").replace("3f9a0c11d2e4", &active);
        let script =
            script.replace("curl -s ", "curl -sS --fail-with-body ").replace("curl -N ", "curl -sSN --fail-with-body ");
        let ran = Command::new("bash").args(["-ec", &script]).output().unwrap();
        let (out, error) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
        assert!(ran.status.success(), "{script}\n{out}\n{error}");
        assert!(!out.contains("urn:softserve:problem"), "{script}\n{out}");
    }
}

#[test]
fn every_example_request_of_the_specification_is_answered() {
    let home = tempfile::tempdir().unwrap();
    let server = server(home.path());
    let (_, spec) = server.get("/openapi.json");
    let schema = |of: &Value| match of["$ref"].as_str() {
        Some(name) => spec.pointer(name.trim_start_matches('#')).unwrap().clone(),
        None => of.clone(),
    };
    let mut asked = BTreeSet::new();
    for (path, methods) in spec["paths"].as_object().unwrap() {
        let content = &methods["post"]["requestBody"]["content"]["application/json"];
        if content.is_null() {
            continue;
        }
        let example =
            [&content["example"], &schema(&content["schema"])["example"]].into_iter().find(|e| !e.is_null()).cloned();
        let Some(mut example) = example else { panic!("{path} has no example") };
        if path == "/v1/batches" {
            // Of a file that there is.
            let form = "--x\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n--x\r\ncontent-disposition: \
                form-data; name=\"file\"; filename=\"a\"\r\n\r\n{}\r\n--x--\r\n";
            let sent = agent()
                .post(server.at("/v1/files"))
                .header("content-type", "multipart/form-data; boundary=x")
                .send(form);
            example["input_file_id"] = read(sent).1["id"].take();
        }
        // The task that the path's example names.
        let parameter = |name: &str| {
            let parameters = methods["post"]["parameters"].as_array().into_iter().flatten();
            parameters.clone().find(|p| p["name"] == name).map(|p| p["example"].as_str().unwrap().to_owned())
        };
        let task = parameter("task").unwrap_or_default();
        let (status, answer) = read(agent().post(server.at(&path.replace("{task}", &task))).send_json(&example));
        assert_eq!(status, 200, "{path} {example} {answer}");
        // A batch's results have their problems within.
        let problems = answer["results"].as_array().into_iter().flatten().filter(|result| result.get("code").is_some());
        assert_eq!(problems.count(), 0, "{path} {answer}");
        asked.insert(path.clone());
    }
    assert!(asked.len() >= 9, "{asked:?}");
    let version = server.get("/v1/admin/tasks/sentiment/versions").1["active"].clone();
    let activated = agent().put(server.at("/v1/admin/tasks/sentiment/active")).send_json(json!({"version": version}));
    assert_eq!(read(activated).0, 200);
}
