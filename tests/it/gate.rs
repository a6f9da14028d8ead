//! An upload that carries examples is compared with the active version before it answers.

use serde_json::{Value, json};

use crate::{
    process::{Process, agent, output, read, softserve, with_fixture},
    support::{Answer, Server, form, post, weights},
};

const INPUTS: [&str; 12] = [
    "the cat",
    "a dog",
    "the dog ran",
    "once upon a time",
    "0123",
    "a b c",
    "the end",
    "hello",
    "red and blue",
    "x",
    "the ball",
    "it was dark",
];

fn config(rows: usize) -> Vec<u8> {
    json!({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": rows, "token_dim": 32,
        "num_transformer_submodules": 1})
    .to_string()
    .into()
}

async fn send(server: &Server, path: &str, content_type: &str, body: Vec<u8>) -> Answer {
    server.call(post(&format!("/v1/admin/tasks/{path}"), content_type, body)).await
}

/// A labelled task's version whose rows all have one value.
async fn upload(server: &Server, task: &str, value: f32, eval: Option<&str>, query: &str) -> Answer {
    let spec = json!({"labels": {"cat": [" cat"], "dog": [" dog"]}, "defaults": {"max_tokens": 2}}).to_string();
    let (config, weights) = (config(4), weights(4, 32, value));
    let mut parts: Vec<(&str, &[u8])> =
        vec![("adapter_config.json", &config), ("adapter_model.safetensors", &weights), ("task.json", spec.as_bytes())];
    if let Some(eval) = eval {
        parts.push(("eval.jsonl", eval.as_bytes()));
    }
    let (content_type, body) = form(&parts);
    send(server, &format!("{task}{query}"), content_type, body).await
}

/// What a version says of each input.
async fn labels(server: &Server, task: &str, version: &Value) -> Vec<String> {
    let body = json!({"inputs": INPUTS, "version": version});
    let answer = server.post(&format!("/v1/tasks/{task}/classify"), &body).await.ok();
    let results = answer["results"].as_array().unwrap();
    results.iter().map(|result| result["label"].as_str().unwrap().to_owned()).collect()
}

fn lines(field: &str, answers: &[String]) -> String {
    let line = |(input, answer): (&&str, &String)| json!({"input": input, field: answer}).to_string() + "\n";
    INPUTS.iter().zip(answers).map(line).collect()
}

#[tokio::test]
async fn what_scores_worse_than_the_active_version_is_stored_and_not_activated() {
    let server = Server::start();
    let first = upload(&server, "pets", 0.5, None, "/versions").await.ok()["version"].clone();
    let of_first = labels(&server, "pets", &first).await;
    // Among several values, one that answers otherwise.
    let mut other = None;
    for value in [-0.5, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0] {
        let stored = upload(&server, "pets", value, None, "/versions?activate=false").await.ok();
        let answers = labels(&server, "pets", &stored["version"]).await;
        if answers != of_first {
            other = Some((value, stored["version"].clone(), answers));
            break;
        }
    }
    let (value, second, of_second) = other.expect("a value with other answers");
    let alike = of_first.iter().zip(&of_second).filter(|(a, b)| a == b).count() as f64 / INPUTS.len() as f64;

    for (metric, active_score) in [("accuracy", 1.0), ("macro_f1", 1.0)] {
        let query = format!("/versions?gate={metric}");
        let refused = upload(&server, "pets", value, Some(&lines("label", &of_first)), &query).await.ok();
        let gate = &refused["gate"];
        assert_eq!((&refused["active"], &gate["passed"]), (&json!(false), &json!(false)), "{refused}");
        assert_eq!((&gate["active_version"], gate["active_score"].as_f64()), (&first, Some(active_score)), "{gate}");
        assert!(gate["difference"].as_f64().unwrap() < 0.0 && gate["worse"].as_f64().unwrap() > 0.3, "{gate}");
        if metric == "accuracy" {
            assert!((gate["score"].as_f64().unwrap() - alike).abs() < 1e-9, "{gate} {alike}");
        }
    }
    let active = server.get("/v1/tasks/pets").await.ok()["version"].clone();
    assert_eq!(active, first);
    let passed =
        upload(&server, "pets", value, Some(&lines("label", &of_second)), "/versions?gate=accuracy").await.ok();
    assert_eq!((&passed["active"], &passed["gate"]["score"]), (&json!(true), &json!(1.0)), "{passed}");
    assert_eq!(server.get("/v1/tasks/pets").await.ok()["version"], second);
    // Where nothing is active, anything passes, and is scored all the same.
    let query = "/versions?gate=brier";
    let new = upload(&server, "new", value, Some(&lines("label", &of_second)), query).await.ok();
    assert_eq!((&new["active"], &new["gate"]["active_version"]), (&json!(true), &Value::Null), "{new}");
    assert!(new["gate"]["score"].as_f64().unwrap() > 0.0);
}

#[tokio::test]
async fn answers_in_words_are_compared_as_the_task_generates_them() {
    let server = Server::start();
    upload(&server, "words", 0.5, None, "/versions").await.ok();
    let mut outputs = Vec::new();
    for input in INPUTS {
        let answer = server.post("/v1/tasks/words/generate", &json!({"input": input, "temperature": 0})).await.ok();
        outputs.push(answer["output"].as_str().unwrap().to_owned());
    }
    // An empty output cannot be an example's.
    let outputs: Vec<String> =
        outputs.into_iter().map(|o| if o.trim().is_empty() { "?".to_owned() } else { o }).collect();
    let known = outputs.iter().filter(|output| *output != "?").count() as f64 / INPUTS.len() as f64;
    let server = Server::start();
    let config = config(4);
    let weights = weights(4, 32, 0.5);
    let eval = lines("output", &outputs);
    let spec = json!({"defaults": {"max_tokens": 2}}).to_string();
    let parts: [(&str, &[u8]); 4] = [
        ("adapter_config.json", &config),
        ("adapter_model.safetensors", &weights),
        ("task.json", spec.as_bytes()),
        ("eval.jsonl", eval.as_bytes()),
    ];
    let (content_type, body) = form(&parts);
    let answer = send(&server, "words/versions?gate=exact_match", content_type, body.clone()).await.ok();
    assert!((answer["gate"]["score"].as_f64().unwrap() - known).abs() < 1e-9, "{answer}");
    let refused = send(&server, "words/versions?gate=accuracy", content_type, body).await;
    assert_eq!((refused.status.as_u16(), &refused.json()["code"]), (400, &json!("no_labels")), "{}", refused.text());
}

#[tokio::test]
async fn a_gate_without_usable_examples_is_refused_and_nothing_is_stored() {
    let server = Server::start();
    for (eval, query, words) in [
        (None, "?gate=accuracy", "has no eval.jsonl"),
        (Some(""), "?gate=accuracy", "has no examples"),
        (Some("{\"input\": \"a\", \"label\": \"bird\"}\n"), "?gate=accuracy", "bird"),
        (Some("{\"input\": \"a\", \"output\": \"x\"}\n"), "?gate=brier", "line 1"),
        (Some("not json\n"), "?gate=exact_match", "line 1"),
        (Some("{\"input\": \"a\", \"label\": \"cat\"}\n"), "?gate=f1", "accuracy"),
    ] {
        let answer = upload(&server, "never", 0.5, eval, &format!("/versions{query}")).await;
        assert!(
            answer.status.is_client_error() && answer.text().contains(words),
            "{eval:?} {query}: {}",
            answer.text()
        );
    }
    assert_eq!(server.get("/v1/tasks/never").await.status.as_u16(), 404);
}

#[test]
fn push_compares_a_folder_with_the_active_version_and_fails_if_it_is_worse() {
    let home = tempfile::tempdir().unwrap();
    let mut command = with_fixture(home.path());
    command.arg("--prompts=gated");
    let server = Process::start(command);
    let push = |value: f32, options: &[&str]| {
        let folder = home.path().join("pushed");
        std::fs::create_dir_all(&folder).unwrap();
        let spec = json!({"labels": {"cat": [" cat"], "dog": [" dog"]}}).to_string();
        std::fs::write(folder.join("adapter_config.json"), config(4)).unwrap();
        std::fs::write(folder.join("adapter_model.safetensors"), weights(4, 32, value)).unwrap();
        std::fs::write(folder.join("task.json"), spec).unwrap();
        let mut command = softserve(home.path());
        command.arg("push").arg(&folder).args(["--task", "pets", "--url", &server.at("")]).args(options);
        output(command)
    };
    let answers = |version: Value| -> Vec<String> {
        let body = json!({"inputs": INPUTS, "version": version});
        let (status, answer) = read(agent().post(server.at("/v1/tasks/pets/classify")).send_json(body));
        assert_eq!(status, 200, "{answer}");
        answer["results"].as_array().unwrap().iter().map(|one| one["label"].as_str().unwrap().to_owned()).collect()
    };
    let (code, _, log) = push(0.5, &[]);
    assert_eq!(code, Some(0), "{log}");
    let right = answers(Value::Null);
    let active = server.get("/v1/tasks/pets").1["version"].clone();
    let of_version = format!("softserve_version_answer_seconds_count{{task=\"pets\",version={active}}}");
    assert!((server.metric(&of_version) - INPUTS.len() as f64).abs() < 0.5, "a time for each answer of this version");
    std::fs::write(home.path().join("eval.jsonl"), lines("label", &right)).unwrap();
    let other = [-0.5, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0].into_iter().find(|value| {
        let (_, said, _) = push(*value, &["--no-activate"]);
        let version = said.split_whitespace().nth(3).unwrap().trim_end_matches(':').to_owned();
        answers(json!(version)) != right
    });
    let gate = ["--gate", "accuracy", "--eval", "eval.jsonl"];
    let (code, said, log) = push(other.expect("a value with other answers"), &gate);
    assert_eq!(code, Some(1), "{said}{log}");
    assert!(log.contains("the gate kept version") && log.contains("the active version"), "{log}");
    assert_eq!(server.get("/v1/tasks/pets").1["version"], active);
    let (code, said, log) = push(0.5, &gate);
    assert_eq!(code, Some(0), "{log}");
    assert!(said.contains("accuracy 1.0000 on 12 examples"), "{said}");
}
