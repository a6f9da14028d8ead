//! Classification and scores over HTTP: the numbers are those of one forward pass a label, repeat to the last bit, and
//! choose at least as well as generating does.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use candle_core::DType;
use futures::future::join_all;
use serde_json::{Value, json};
use softserve::{
    demo,
    engine::runner::{Part, Runner},
    kernels,
    kernels::layout::BLOCK_SIZE,
    model::Model,
    packing::{Packing, PromptShape},
};

use crate::{
    fixtures, peft,
    support::{MODEL, Options, Server, TASK, form, prompt_files},
};

const LABELS: &str = "labels";

/// Labels of one to six tokens, one of which is written in two ways.
fn task_json() -> Value {
    json!({
        "labels": {"a cat": ["the cat sat on the mat"], "dog": ["dog", "a dog"], "x": ["x"], "yes": ["yes yes"]},
        "defaults": {"stop": ["\n"]},
        "calibration": {"temperature": 2.0, "priors": {"a cat": 0.1, "dog": 0.4, "x": 0.3, "yes": 0.2}}
    })
}

async fn server_with_labels(task: &Value) -> Server {
    let server = Server::start();
    let (config, weights) = prompt_files("prompt7");
    let task = task.to_string();
    let parts: [(&str, &[u8]); 3] =
        [("adapter_config.json", &config), ("adapter_model.safetensors", &weights), ("task.json", task.as_bytes())];
    let (content_type, body) = form(&parts);
    server.upload(LABELS, content_type, body).await.ok();
    server
}

async fn classify(server: &Server, body: &Value) -> Value {
    server.post(&format!("/v1/tasks/{LABELS}/classify"), body).await.ok()
}

/// The log-probability of a continuation of a text after a task's prompt, by one forward pass over all of it, in f64.
fn log_prob(server: &Server, runner: &mut Runner, task: &str, text: &str, continuation: &[u32]) -> f64 {
    let version = server.app.registry.resolve(task, None).unwrap();
    let ids = server.app.tokenizer.tokenize(text).unwrap();
    let shape = PromptShape::of(Some(&*version.prompt));
    let mut input = Packing::of(runner.model().info()).pack(shape, shape.followed_by(&ids)).unwrap();
    let wanted = input.continued_by(continuation).len();
    let blocks: Vec<u32> = (0..input.decoder.len().div_ceil(BLOCK_SIZE) as u32).collect();
    let prompt = Some(&version.prompt);
    let part = Part { tokens: &input.decoder, blocks: &blocks, prompt, wanted, ..Part::default() };
    let logits = runner.run(&[part]).unwrap().logits;
    let all: Vec<usize> = (0..logits.num_rows()).collect();
    let one = |(row, &id): (&&[f32], &u32)| {
        f64::from(row[id as usize]) - row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln()
    };
    logits.with_rows(&all, |rows| Ok(rows.iter().zip(continuation).map(one).sum())).unwrap()
}

#[tokio::test]
async fn a_labels_probability_is_that_of_its_words_and_the_end_after_them() {
    let server = server_with_labels(&task_json()).await;
    let mut runner = Runner::new(fixtures::load(MODEL, DType::F32), 16).unwrap();
    let eos = &server.app.model.eos_token_ids;
    let ids = |text: &str| server.app.tokenizer.tokenize_continuation(text).unwrap();
    let text = "the cat sat";
    let mut expected = Vec::new();
    for (label, words) in task_json()["labels"].as_object().unwrap() {
        let mut mass = 0.0;
        for word in words.as_array().unwrap() {
            let word = ids(word.as_str().unwrap());
            for end in eos.iter().map(|&id| vec![id]).chain([ids("\n")]) {
                mass += log_prob(&server, &mut runner, LABELS, text, &[word.as_slice(), &end].concat()).exp();
            }
        }
        expected.push((label.clone(), mass));
    }
    let total: f64 = expected.iter().map(|(_, mass)| mass).sum();
    let answer = classify(&server, &json!({"input": text, "calibrate": false})).await;
    assert!((answer["label_mass"].as_f64().unwrap() / total - 1.0).abs() < 1e-4, "{answer} {total}");
    let probability = |answer: &Value, label: &str| {
        let all = answer["probabilities"].as_array().unwrap();
        all.iter().find(|p| p["label"] == label).unwrap()["probability"].as_f64().unwrap()
    };
    for (label, mass) in &expected {
        assert!((probability(&answer, label) - mass / total).abs() < 1e-5, "{label}: {answer}");
    }
    let probabilities = answer["probabilities"].as_array().unwrap();
    assert_eq!(
        (&probabilities[0]["label"], &probabilities[0]["probability"]),
        (&answer["label"], &answer["confidence"])
    );
    assert!(probabilities.is_sorted_by(|a, b| a["probability"].as_f64() >= b["probability"].as_f64()));
    assert_eq!(answer["usage"]["completion_tokens"], 0);

    // Temperature and priors of task.json.
    let priors = &task_json()["calibration"]["priors"];
    let corrected = |(label, mass): &(String, f64)| (mass / priors[label].as_f64().unwrap()).sqrt();
    let all: f64 = expected.iter().map(corrected).sum();
    let calibrated = classify(&server, &json!({"input": text})).await;
    for one in &expected {
        assert!((probability(&calibrated, &one.0) - corrected(one) / all).abs() < 1e-5, "{calibrated}");
    }
    assert_eq!(calibrated["label_mass"], answer["label_mass"]);

    // Some of the labels, and an answer that is not sure enough.
    let some = json!({"input": text, "calibrate": false, "labels": ["x", "dog"], "abstain_below": 1.0});
    let some = classify(&server, &some).await;
    let (dog, x) = (expected[1].1, expected[2].1);
    assert!((probability(&some, "dog") - dog / (dog + x)).abs() < 1e-5, "{some}");
    assert_eq!((some["probabilities"].as_array().unwrap().len(), &some["abstained"]), (2, &json!(true)));
    assert_eq!(answer["abstained"], json!(false));
}

#[tokio::test]
async fn probabilities_are_those_of_pytorch() {
    let Some(python) = peft::python() else { return };
    let server = server_with_labels(&task_json()).await;
    let inputs = ["the cat sat", "a", "the dog and the cat sat on the mat", "x yes"];
    let labels = task_json()["labels"].clone();
    let mut check = Command::new(python);
    let model = fixtures::dir(MODEL);
    check.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peft/check_labels.py"));
    check.arg("--model").arg(&model).arg("--prompt").arg(model.join("prompts/prompt7"));
    let mut check = check.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let request = json!({"inputs": inputs, "labels": labels, "ends": ["\n"]});
    check.stdin.take().unwrap().write_all(request.to_string().as_bytes()).unwrap();
    let said = check.wait_with_output().unwrap();
    assert!(said.status.success());
    let expected: Vec<Value> = serde_json::from_slice(&said.stdout).unwrap();
    let found = classify(&server, &json!({"inputs": inputs, "calibrate": false})).await;
    for (found, expected) in found["results"].as_array().unwrap().iter().zip(&expected) {
        let masses = expected.as_object().unwrap();
        let total: f64 = masses.values().map(|mass| mass.as_f64().unwrap()).sum();
        assert!((found["label_mass"].as_f64().unwrap() / total - 1.0).abs() < 1e-4, "{found} {expected}");
        for one in found["probabilities"].as_array().unwrap() {
            let mass = masses[one["label"].as_str().unwrap()].as_f64().unwrap();
            assert!((one["probability"].as_f64().unwrap() - mass / total).abs() < 1e-4, "{one} {expected}");
        }
    }
}

#[tokio::test]
async fn the_same_input_gets_the_same_bits_alone_in_a_list_and_among_sixty_four_others() {
    let server = server_with_labels(&task_json()).await;
    let input = "the cat sat on the mat and";
    let bits = |answer: &Value| (answer["probabilities"].to_string(), answer["label_mass"].to_string());
    let alone = bits(&classify(&server, &json!({"input": input})).await);
    let others: Vec<String> = (0..64).map(|i| "a dog ".repeat(1 + i % 9)).collect();
    let (generate, classifies) = (format!("/v1/tasks/{TASK}/generate"), format!("/v1/tasks/{LABELS}/classify"));
    let generated = others.iter().map(|text| (&generate, json!({"input": text, "max_tokens": 8})));
    let classified = others.iter().map(String::as_str).chain([input]).map(|text| (&classifies, json!({"input": text})));
    let calls: Vec<_> = generated.chain(classified).collect();
    let all = join_all(calls.iter().map(|(path, body)| server.post(path, body))).await;
    assert_eq!(bits(&all[128].ok()), alone);

    let inputs: Vec<&str> = others.iter().map(String::as_str).chain([input]).collect();
    let list = classify(&server, &json!({"inputs": inputs})).await;
    let results = list["results"].as_array().unwrap();
    assert_eq!((results.len(), bits(&results[64])), (65, alone));
    for (result, one) in results.iter().zip(&all[64..]) {
        assert_eq!(bits(result), bits(&one.ok()));
    }
}

#[tokio::test]
async fn an_input_that_is_wrong_does_not_keep_the_others_from_their_answers() {
    let server = server_with_labels(&task_json()).await;
    let body = json!({"inputs": ["a", "the cat ".repeat(4000), {"input": "a"}, {"other": "a"}]});
    let list = classify(&server, &body).await;
    let results = list["results"].as_array().unwrap();
    assert_eq!((&results[1]["code"], &results[3]["status"]), (&json!("input_too_long"), &json!(400)));
    assert!(results[3]["detail"].as_str().unwrap().contains("other"));
    assert_eq!(results[0]["probabilities"], results[2]["probabilities"]);
}

#[tokio::test]
async fn texts_are_scored_token_by_token_and_so_is_an_input() {
    let server = server_with_labels(&task_json()).await;
    let mut runner = Runner::new(fixtures::load(MODEL, DType::F32), 16).unwrap();
    let texts = ["the mat", "a", "the mat and a dog"];
    let path = format!("/v1/tasks/{LABELS}/score");
    let answer = server.post(&path, &json!({"input": "the cat", "continuations": texts})).await;
    assert_eq!(answer.header("x-softserve-version"), answer.ok()["version"].as_str().unwrap());
    let answer = answer.ok();
    for (score, text) in answer["scores"].as_array().unwrap().iter().zip(texts) {
        let ids = server.app.tokenizer.tokenize_continuation(text).unwrap();
        let expected = log_prob(&server, &mut runner, LABELS, "the cat", &ids);
        assert!((score["logprob"].as_f64().unwrap() - expected).abs() < 1e-4, "{score} {expected}");
        let tokens = score["tokens"].as_array().unwrap();
        assert_eq!((score["text"].as_str().unwrap(), tokens.len()), (text, ids.len()));
        let sum: f64 = tokens.iter().map(|token| token["logprob"].as_f64().unwrap()).sum();
        assert!((sum - score["logprob"].as_f64().unwrap()).abs() < 1e-5);
    }
    // After the rows of a learned prompt even the first token has a log-probability.
    let own = server.post(&path, &json!({"input": "the cat sat on the mat"})).await.ok();
    let ids = server.app.tokenizer.tokenize("the cat sat on the mat").unwrap();
    let tokens = own["scores"][0]["tokens"].as_array().unwrap();
    let found: Vec<u32> = tokens.iter().map(|token| token["id"].as_u64().unwrap() as u32).collect();
    assert_eq!(found, ids);
    assert!(tokens.iter().all(|token| token["logprob"].as_f64().unwrap() < 0.0), "{own}");
    let last = tokens.last().unwrap()["logprob"].as_f64().unwrap();
    let before = server.app.tokenizer.decode(&ids[..ids.len() - 1]).unwrap();
    let expected = log_prob(&server, &mut runner, LABELS, &before, &ids[ids.len() - 1..]);
    assert!((last - expected).abs() < 1e-4, "{last} {expected}");
}

#[tokio::test]
async fn what_cannot_be_classified_or_scored_is_refused_and_says_why() {
    let server = server_with_labels(&task_json()).await;
    let refused = async |task: &str, what: &str, body: Value, code: &str, words: &str| {
        let answer = server.post(&format!("/v1/tasks/{task}/{what}"), &body).await.json();
        assert_eq!(answer["code"], code, "{body}: {answer}");
        assert!(answer["detail"].as_str().unwrap().contains(words), "{words}: {answer}");
    };
    let invalid = "invalid_request";
    refused(TASK, "classify", json!({"input": "a"}), "no_labels", "task.json").await;
    refused(LABELS, "classify", json!({}), invalid, "expected \"input\" or \"inputs\"").await;
    refused(LABELS, "classify", json!({"input": null, "inputs": null}), invalid, "it is missing").await;
    refused(LABELS, "classify", json!({"input": "a", "inputs": ["a"]}), invalid, "one of the two").await;
    refused(LABELS, "classify", json!({"inputs": []}), invalid, "found 0, expected 1 to 256").await;
    refused(LABELS, "classify", json!({"inputs": [1]}), invalid, "expected a text").await;
    refused(LABELS, "classify", json!({"input": "a", "labels": ["cow"]}), "unknown_label", "a cat, dog, x, yes").await;
    refused(LABELS, "classify", json!({"input": "a", "labels": []}), invalid, "at least one").await;
    refused(LABELS, "classify", json!({"input": "a", "abstain_below": 2}), invalid, "expected 0 to 1").await;
    refused(LABELS, "classify", json!({"input": "a", "priority": 5000}), invalid, "expected -1000 to 1000").await;
    refused(LABELS, "classify", json!({"input": "a", "temperature": 1}), invalid, "temperature").await;
    refused(LABELS, "score", json!({"input": "a", "continuations": []}), invalid, "at least one text").await;
    refused(LABELS, "score", json!({"input": "a", "continuations": ["x", ""]}), invalid, "continuations[1]").await;
    refused(LABELS, "score", json!({"input": "a", "continuations": vec!["x"; 5000]}), invalid, "at most 4096").await;
    refused(LABELS, "score", json!({"input": "a", "continuations": ["x ".repeat(600)]}), "input_too_long", "512").await;
    refused("topik", "score", json!({"input": "a"}), "task_not_found", "topik").await;
    for calibration in [json!({"temperature": 0}), json!({"priors": {"cow": 0.5}}), json!({"priors": {"x": 0}})] {
        let mut task = task_json();
        task["calibration"] = calibration;
        let (config, weights) = prompt_files("prompt7");
        let task = task.to_string();
        let parts: [(&str, &[u8]); 3] =
            [("adapter_config.json", &config), ("adapter_model.safetensors", &weights), ("task.json", task.as_bytes())];
        let (content_type, body) = form(&parts);
        assert_eq!(server.upload("bad", content_type, body).await.json()["code"], "invalid_task_file");
    }
}

#[tokio::test]
async fn on_the_demo_labels_are_chosen_at_least_as_well_as_by_generating() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let model = Model::load(&demo::model(), kernels::cpu(), DType::F32).unwrap();
    let tokenizer = softserve::tokenizer::Tokenizer::load(&demo::model()).unwrap();
    let server = Options::default().start_with(model, tokenizer, &root.join("prompts"));
    for task in ["sentiment", "topic"] {
        let lines = std::fs::read_to_string(root.join("examples/data").join(task).join("test.jsonl")).unwrap();
        let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let inputs: Vec<&Value> = lines.iter().map(|line| &line["input"]).collect();
        let expected: Vec<&str> = lines.iter().map(|line| line["label"].as_str().unwrap()).collect();
        let mut classified = Vec::new();
        for inputs in inputs.chunks(256) {
            let answer = server.post(&format!("/v1/tasks/{task}/classify"), &json!({"inputs": inputs})).await.ok();
            classified.extend(answer["results"].as_array().unwrap().iter().map(|r| r["label"].clone()));
        }
        let mut generated = Vec::new();
        for inputs in inputs.chunks(256) {
            let requests: Vec<Value> = inputs.iter().map(|input| json!({"task": task, "input": input})).collect();
            let answer = server.post("/v1/generate", &json!({"requests": requests})).await.ok();
            generated.extend(answer["results"].as_array().unwrap().iter().map(|r| r["output"].clone()));
        }
        let right = |found: &[Value]| {
            found.iter().zip(&expected).filter(|(found, expected)| found.as_str().unwrap().trim() == **expected).count()
        };
        let (classified, generated) = (right(&classified), right(&generated));
        assert!(classified >= generated, "{task}: {classified} of 300 right by classifying, {generated} by generating");
    }
}
