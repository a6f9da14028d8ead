//! OpenAI's API: with OpenAI's own package where Python has it, and what that does not look at.

use std::process::Command;

use candle_core::DType;
use serde_json::{Value, json};
use softserve::{
    engine::runner::{Part, Runner},
    model::ChatFiles,
    packing::InputToken,
};

use crate::{
    fixtures,
    process::{Process, softserve},
    support::{MODEL, Options, Server, TASK, form, prompt_files},
};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]";

/// A Python with OpenAI's package; `None`, said aloud, where there is none.
pub fn python() -> Option<String> {
    let python = std::env::var("SOFTSERVE_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let found = Command::new(&python).args(["-c", "import openai"]).output();
    if found.is_ok_and(|ran| ran.status.success()) {
        return Some(python);
    }
    eprintln!("skipped: {python} has no openai; see tests/peft/requirements.txt");
    None
}

/// A server of the demo in a process of its own, and the script run against it.
pub fn run_client(script: &str) {
    let Some(python) = python() else { return };
    let home = tempfile::tempdir().unwrap();
    let mut command = softserve(home.path());
    command.args(["serve", "--listen=127.0.0.1:0"]);
    let server = Process::start(command);
    let script = format!("{}/tests/openai/{script}", env!("CARGO_MANIFEST_DIR"));
    let ran = Command::new(python).arg(script).arg(server.at("/v1")).output().unwrap();
    let (out, log) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success(), "{out}\n{log}");
}

#[test]
fn openais_python_package_gets_what_it_documents() {
    run_client("client.py");
}

async fn upload(server: &Server, task: &str, spec: &Value) {
    let (config, weights) = prompt_files("prompt7");
    let spec = spec.to_string();
    let parts: [(&str, &[u8]); 3] =
        [("adapter_config.json", &config), ("adapter_model.safetensors", &weights), ("task.json", spec.as_bytes())];
    let (content_type, body) = form(&parts);
    server.upload(task, content_type, body).await.ok();
}

#[tokio::test]
async fn the_base_models_name_answers_without_a_learned_prompt() {
    let server = Server::start();
    let base = server.app.model.name.clone();
    let text = "the cat sat";
    let ids = server.app.tokenizer.tokenize(text).unwrap();
    let mut runner = Runner::new(fixtures::load(MODEL, DType::F32), 16).unwrap();
    let mut tokens = ids.clone();
    for _ in 0..3 {
        let input: Vec<InputToken> = tokens.iter().map(|&id| InputToken::Vocab(id)).collect();
        let logits =
            runner.run(&[Part { tokens: &input, blocks: &[0, 1], wanted: 1, ..Part::default() }]).unwrap().logits;
        let likeliest =
            |rows: &[&[f32]]| (0..rows[0].len()).max_by(|&a, &b| rows[0][a].total_cmp(&rows[0][b])).unwrap();
        tokens.push(logits.with_rows(&[0], |rows| Ok(likeliest(rows))).unwrap() as u32);
    }
    let expected = server.app.tokenizer.decode(&tokens[ids.len()..]).unwrap();
    for prompt in [json!(text), json!(ids)] {
        let body = json!({"model": base, "prompt": prompt, "max_tokens": 3, "ignore_eos": true});
        let answer = server.post(COMPLETIONS, &body).await;
        assert_eq!(answer.header("x-softserve-version"), answer.ok()["system_fingerprint"]);
        let usage = &answer.ok()["usage"];
        assert_eq!((&usage["prompt_tokens"], &usage["virtual_tokens"]), (&json!(ids.len()), &json!(0)));
        assert_eq!(answer.ok()["choices"][0]["text"], json!(expected));
    }
    let task = json!({"model": TASK, "prompt": text, "max_tokens": 3, "ignore_eos": true});
    let answer = server.post(COMPLETIONS, &task).await.ok();
    let generated = server.generate(&json!({"input": text, "max_tokens": 3, "ignore_eos": true})).await.ok();
    assert_eq!(answer["choices"][0]["text"], generated["output"]);
    assert_eq!(answer["usage"]["virtual_tokens"], 7);
}

#[tokio::test]
async fn a_conversation_is_rendered_by_the_chat_template_with_one_bos() {
    let chat = ChatFiles {
        template: Some(TEMPLATE.to_owned()),
        bos_token: fixtures::tokenizer(MODEL).token_text(1),
        ..ChatFiles::default()
    };
    let server = Options { chat: Some(chat), ..Options::default() }.start();
    let base = server.app.model.name.clone();
    let bos = server.app.model.chat.bos_token.clone();
    let messages = json!([{"role": "developer", "content": "short"}, {"role": "user", "content": "a cat"},
        {"role": "assistant", "content": "sat"}, {"role": "user", "content": [{"type": "text", "text": "why"}]}]);
    let text = format!("{bos}[system] short\n[user] a cat\n[assistant] sat\n[user] why\n[assistant]");
    let ids = server.app.tokenizer.tokenize_conversation(&text).unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 1);
    let rest = json!({"max_tokens": 5, "ignore_eos": true});
    let with = |mut body: Value| {
        body.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        body
    };
    let plain = server.post(COMPLETIONS, &with(json!({"model": base, "prompt": ids}))).await.ok();
    let answer = server.post(CHAT, &with(json!({"model": base, "messages": messages}))).await.ok();
    assert_eq!(answer["choices"][0]["message"]["content"], plain["choices"][0]["text"]);
    assert_eq!(answer["usage"]["prompt_tokens"], json!(ids.len()));

    // A task's own template goes before the model's, and its learned prompt before the conversation.
    upload(&server, "talker", &json!({"chat_template": TEMPLATE})).await;
    let plain = server.post(COMPLETIONS, &with(json!({"model": "talker", "prompt": ids}))).await.ok();
    let answer = server.post(CHAT, &with(json!({"model": "talker", "messages": messages}))).await.ok();
    assert_eq!(answer["choices"][0]["message"]["content"], plain["choices"][0]["text"]);
    assert_eq!(answer["usage"]["virtual_tokens"], 7);
    // A task without one takes a single message, as its template's input.
    let answer = server.post(CHAT, &json!({"model": TASK, "messages": messages})).await;
    let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(answer.status == 400 && message.contains("chat_template") && message.contains("system, user"), "{message}");
}

#[tokio::test]
async fn errors_have_openais_shape_on_its_paths_only() {
    let server = Options::with_keys(&["api-key-12345"], &[], true).start();
    let answer = server.get("/v1/models").await;
    assert_eq!((answer.status.as_u16(), answer.json()["error"]["code"].clone()), (401, json!("invalid_api_key")));
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(answer.json()["error"]["request_id"], answer.header("x-request-id"));
    assert_eq!(server.get("/v1/tasks").await.header("content-type"), "application/problem+json");

    let server = Server::start();
    let error = |answer: crate::support::Answer| answer.json()["error"].clone();
    let unknown = error(server.post(COMPLETIONS, &json!({"model": TASK, "prompt": "a", "temprature": 1})).await);
    assert_eq!((&unknown["type"], &unknown["code"]), (&json!("invalid_request_error"), &json!("invalid_request")));
    assert!(unknown["message"].as_str().unwrap().contains("temprature"), "{unknown}");
    for (body, param) in [
        (json!({"model": TASK, "prompt": [999_999]}), "prompt"),
        (json!({"model": TASK, "prompt": []}), "prompt"),
        (json!({"model": TASK, "prompt": "a", "logit_bias": {"x": 1}}), "logit_bias.x"),
        (json!({"model": TASK, "prompt": "a", "logit_bias": {"3": 101}}), "logit_bias.3"),
        (json!({"model": TASK, "prompt": "a", "logprobs": 21}), "logprobs"),
        (json!({"model": TASK, "prompt": "a", "n": 17}), "n"),
        (json!({"model": TASK, "prompt": "a", "suffix": "b"}), "suffix"),
        (json!({"model": TASK, "prompt": "a", "echo": true, "logprobs": 1, "stream": true}), "echo"),
    ] {
        let found = error(server.post(COMPLETIONS, &body).await);
        assert_eq!(found["param"], param, "{body} {found}");
    }
    for (messages, param) in [
        (json!([]), "messages"),
        (json!([{"role": "tool", "content": "a"}]), "messages[0].role"),
        (json!([{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]), "messages[0].content[0]"),
    ] {
        let found = error(server.post(CHAT, &json!({"model": TASK, "messages": messages})).await);
        assert_eq!(found["param"], param, "{messages} {found}");
    }
    let base = &server.app.model.name;
    let found = error(server.post(CHAT, &json!({"model": base, "messages": [{"role": "user", "content": "a"}]})).await);
    assert!(found["message"].as_str().unwrap().contains("no chat template"), "{found}");
    let found = error(server.get("/v1/models/nothing").await);
    assert_eq!((&found["code"], &found["param"]), (&json!("model_not_found"), &json!("model")));
}

#[tokio::test]
async fn an_echoed_prompt_has_the_log_probabilities_that_score_gives() {
    let server = Server::start();
    for model in [TASK.to_owned(), server.app.model.name.clone()] {
        let body = json!({"model": model, "prompt": ["the cat sat", "a dog"], "echo": true, "logprobs": 1, "max_tokens": 2,
            "ignore_eos": true});
        let answer = server.post(COMPLETIONS, &body).await.ok();
        let logprobs = &answer["choices"][0]["logprobs"];
        let ids = server.app.tokenizer.tokenize("the cat sat").unwrap();
        let own = logprobs["token_logprobs"].as_array().unwrap();
        assert_eq!(own.len(), ids.len() + 2);
        // Virtual tokens come before the first one.
        assert_eq!(own[0].is_null(), model != TASK);
        assert!(own[1..].iter().all(|x| x.as_f64().unwrap() < 0.0) && logprobs["top_logprobs"][0].is_null());
        assert_eq!(logprobs["tokens"].as_array().unwrap().len(), logprobs["text_offset"].as_array().unwrap().len());
        if model == TASK {
            let scored = server.post(&format!("/v1/tasks/{TASK}/score"), &json!({"input": "the cat sat"})).await.ok();
            let scored = scored["tokens"].as_array().or(scored["scores"][0]["tokens"].as_array()).unwrap().clone();
            let expected: Vec<&Value> = scored.iter().map(|token| &token["logprob"]).collect();
            assert_eq!(own[..ids.len()].iter().collect::<Vec<_>>(), expected);
        }
    }
}

#[tokio::test]
async fn a_stream_has_a_role_first_and_the_usage_last() {
    let server = Server::start();
    let body = json!({"model": TASK, "messages": [{"role": "user", "content": "a cat"}], "stream": true, "max_tokens": 4,
        "ignore_eos": true, "n": 2, "stream_options": {"include_usage": true}, "logprobs": true, "top_logprobs": 1});
    let answer = server.post(CHAT, &body).await;
    let events = answer.events();
    assert_eq!(events.last(), Some(&"[DONE]"));
    let chunks: Vec<Value> = events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let (usage, chunks) = chunks.split_last().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(8)));
    for index in 0..2 {
        let own: Vec<&Value> =
            chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == index).collect();
        assert_eq!(own[0]["delta"]["role"], "assistant");
        assert!(own[1..].iter().all(|choice| choice["delta"].get("role").is_none()));
        assert_eq!(own.last().unwrap()["finish_reason"], "length");
        let tokens = own.iter().filter_map(|choice| choice["logprobs"]["content"].as_array()).flatten();
        assert_eq!(tokens.count(), 4);
    }
    assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk.get("usage").is_none()));
}

#[test]
fn openais_and_typesafes_python_packages_get_decisions() {
    run_client("decisions.py");
}

/// A question about some labels of a task.
fn question(task: &str, labels: [&str; 2]) -> Value {
    json!({"type": "choice", "task": task, "choices": [{"value": labels[0]}, {"value": labels[1]}]})
}

#[tokio::test]
async fn questions_of_many_tasks_are_answered_in_one_call_with_the_bits_that_each_has_alone() {
    let server = Server::start();
    for (task, words) in [("moods", ["the cat", "a dog"]), ("places", ["on the mat", "x"])] {
        upload(&server, task, &json!({"labels": {"a": [words[0]], "b": [words[1]]}, "true_label": "b"})).await;
    }
    let ask = async |questions: Value| {
        let body = json!({"model": "moods", "input": "the cat sat", "questions": questions});
        server.post("/v1/decisions", &body).await.ok()["answers"].clone()
    };
    let questions: Vec<Value> = (0..64)
        .map(|i| {
            question(if i % 2 == 0 { "moods" } else { "places" }, if i % 3 == 0 { ["b", "a"] } else { ["a", "b"] })
        })
        .collect();
    let all = ask(json!(questions)).await;
    for i in [0, 1, 2, 3, 62, 63] {
        assert_eq!(ask(json!([questions[i]])).await[0], all[i], "question {i}");
    }
    let classified = server.post("/v1/tasks/moods/classify", &json!({"input": "the cat sat"})).await.ok();
    let predicate = ask(json!([{"type": "predicate", "name": "is_b"}])).await[0].clone();
    let of_b = classified["probabilities"].as_array().unwrap().iter().find(|p| p["label"] == "b").unwrap();
    assert_eq!((&predicate["probability"], &predicate["name"]), (&of_b["probability"], &json!("is_b")));
    let wrong = json!({"model": "moods", "input": "a", "questions": [question("moods", ["a", "c"])]});
    let error = server.post("/v1/decisions", &wrong).await;
    assert_eq!((error.status.as_u16(), error.json()["error"]["code"].clone()), (400, json!("unknown_label")));
}

#[tokio::test]
async fn a_template_with_a_field_for_instructions_gets_them() {
    let server = Server::start();
    let spec = json!({"template": "{{ instructions }}: {{ input }}", "labels": {"a": ["the cat"], "b": ["dog"]}});
    upload(&server, "asked", &spec).await;
    let ask = async |instructions: &str| {
        let mut asked = question("asked", ["a", "b"]);
        asked["instructions"] = json!(instructions);
        let body = json!({"model": "asked", "input": "the cat sat", "questions": [asked]});
        server.post("/v1/decisions", &body).await.ok()["answers"][0]["confidence"].clone()
    };
    let fields = json!({"input": {"instructions": "which", "input": "the cat sat"}});
    let classified = server.post("/v1/tasks/asked/classify", &fields).await.ok();
    assert_eq!(ask("which").await, classified["confidence"]);
    assert_ne!(ask("another").await, classified["confidence"]);
}

#[tokio::test]
async fn a_true_label_is_one_of_two_labels() {
    let server = Server::start();
    let (config, weights) = prompt_files("prompt7");
    for labels in [json!({"a": ["x"], "b": ["y"], "c": ["z"]}), json!({"b": ["x"], "c": ["y"]})] {
        let spec = json!({"labels": labels, "true_label": "a"}).to_string();
        let parts: [(&str, &[u8]); 3] =
            [("adapter_config.json", &config), ("adapter_model.safetensors", &weights), ("task.json", spec.as_bytes())];
        let (content_type, body) = form(&parts);
        let answer = server.upload("wrong", content_type, body).await;
        assert!(answer.status == 422 && answer.text().contains("true_label"), "{}", answer.text());
    }
}
