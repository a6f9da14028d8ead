//! Structured output over HTTP: JSON schemas, regular expressions, choices and Lark grammars, mixed with free answers.

use serde_json::{Value, json};

use crate::{
    process::{Process, agent, read, softserve},
    support::{Server, TASK, form, prompt_files},
};

/// JSON of this schema is at most 200 tokens long, however a model writes it.
fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "mood": {"enum": ["glad", "sad", "neither"]},
            "score": {"type": "integer", "minimum": 0, "maximum": 100},
            "words": {"type": "array", "items": {"type": "string", "maxLength": 8, "pattern": "^[a-z]+$"}, "maxItems": 3},
            "sure": {"$ref": "#/$defs/yes_or_no"}
        },
        "required": ["mood", "score", "words", "sure"],
        "additionalProperties": false,
        "$defs": {"yes_or_no": {"type": "boolean"}}
    })
}

/// Whether a text is JSON that is valid by [`schema`].
fn is_valid(text: &str) -> bool {
    let Ok(Value::Object(value)) = serde_json::from_str::<Value>(text) else { return false };
    let word = |word: &Value| {
        word.as_str().is_some_and(|word| (1..=8).contains(&word.len()) && word.bytes().all(|b| b.is_ascii_lowercase()))
    };
    value.len() == 4
        && ["glad", "sad", "neither"].iter().any(|mood| value["mood"] == *mood)
        && value["score"].as_u64().is_some_and(|score| score <= 100)
        && value["words"].as_array().is_some_and(|words| words.len() <= 3 && words.iter().all(word))
        && value["sure"].is_boolean()
}

#[test]
fn a_thousand_answers_of_the_demo_are_valid_by_their_schema_and_the_free_ones_among_them_do_not_change() {
    let home = tempfile::tempdir().unwrap();
    let mut command = softserve(home.path());
    command.args(["serve", "--listen=127.0.0.1:0"]);
    let server = Process::start(command);
    let ask = |requests: &[Value]| -> Vec<Value> {
        let (status, answer) = read(agent().post(server.at("/v1/generate")).send_json(json!({"requests": requests})));
        assert_eq!(status, 200, "{answer}");
        answer["results"].as_array().unwrap().clone()
    };
    let free =
        |i: usize| json!({"task": "story", "input": "The old man", "max_tokens": 12, "temperature": 0.8, "seed": i});
    let alone: Vec<Value> = (0..5).map(|i| ask(&[free(i)])[0]["output"].clone()).collect();
    let temperatures = [0.0, 0.7, 1.0, 1.5];
    let tasks = ["sentiment", "topic", "story"];
    for part in 0..5 {
        let mut requests = vec![];
        for i in 0..200 {
            requests.push(json!({"task": tasks[i % 3], "input": "A fine evening.", "max_tokens": 200,
                "temperature": temperatures[i % 4], "seed": part * 200 + i, "grammar": {"json_schema": schema()}}));
            if i % 40 == 0 {
                requests.push(free(i / 40));
            }
        }
        let answers = ask(&requests);
        let mut seen_free = 0;
        for (request, answer) in requests.iter().zip(&answers) {
            let output = answer["output"].as_str().unwrap_or_else(|| panic!("{answer}"));
            if request.get("grammar").is_some() {
                assert!(is_valid(output) && answer["finish_reason"] == "stop", "{request} {answer}");
            } else {
                assert_eq!(output, alone[seen_free]);
                seen_free += 1;
            }
        }
        assert_eq!(seen_free, 5);
    }
}

async fn upload(server: &Server, task: &str, spec: &Value) -> crate::support::Answer {
    let (config, weights) = prompt_files("prompt7");
    let spec = spec.to_string();
    let parts: [(&str, &[u8]); 3] =
        [("adapter_config.json", &config), ("adapter_model.safetensors", &weights), ("task.json", spec.as_bytes())];
    let (content_type, body) = form(&parts);
    server.upload(task, content_type, body).await
}

#[tokio::test]
async fn openais_response_format_and_the_tasks_own_grammar_are_obeyed() {
    let server = Server::start();
    let format = json!({"type": "json_schema", "json_schema": {"name": "mood", "strict": true, "schema": schema()}});
    let messages = json!([{"role": "user", "content": "a cat"}]);
    let chat = json!({"model": TASK, "messages": messages, "response_format": format, "max_tokens": 300, "temperature": 1,
        "seed": 3});
    let answer = server.post("/v1/chat/completions", &chat).await.ok();
    let whole = answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    assert!(is_valid(&whole) && answer["choices"][0]["finish_reason"] == "stop", "{answer}");
    // In pieces it is the same.
    let mut streamed = chat.clone();
    streamed["stream"] = json!(true);
    let answer = server.post("/v1/chat/completions", &streamed).await;
    let pieces = answer.events().into_iter().filter_map(|event| serde_json::from_str::<Value>(event).ok());
    let text: String =
        pieces.filter_map(|piece| Some(piece["choices"][0]["delta"]["content"].as_str()?.to_owned())).collect();
    assert_eq!(text, whole);
    let object = json!({"model": TASK, "prompt": "a cat", "response_format": {"type": "json_object"}, "max_tokens": 3});
    let answer = server.post("/v1/completions", &object).await.ok();
    assert!(answer["choices"][0]["text"].as_str().unwrap().starts_with('{'), "{answer}");

    upload(&server, "digits", &json!({"grammar": {"regex": "[0-9]{3}"}, "defaults": {"temperature": 1}})).await.ok();
    let ask = async |more: Value| {
        let mut body = json!({"input": "the cat"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/tasks/digits/generate", &body).await
    };
    for seed in 0..8 {
        let output = ask(json!({"seed": seed})).await.ok()["output"].clone();
        assert!(output.as_str().unwrap().len() == 3 && output.as_str().unwrap().parse::<u16>().is_ok(), "{output}");
    }
    let other = ask(json!({"grammar": {"choice": ["yes", "no"]}})).await.ok()["output"].clone();
    assert!(other == "yes" || other == "no", "{other}");
    let lark = ask(json!({"grammar": {"lark": "start: \"<\" /[ab]/ \">\""}})).await.ok()["output"].clone();
    assert!(lark == "<a>" || lark == "<b>", "{lark}");
    for (more, says) in [
        (json!({"grammar": {"regex": "("}}), "grammar: "),
        (json!({"grammar": {"xml": "("}}), "json_schema"),
        (json!({"ignore_eos": true}), "ignore_eos"),
    ] {
        let answer = ask(more).await;
        assert!(answer.status == 400 && answer.text().contains(says), "{}", answer.text());
    }
    let twice =
        json!({"model": TASK, "prompt": "a", "response_format": {"type": "json_object"}, "grammar": {"regex": "a"}});
    let answer = server.post("/v1/completions", &twice).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["param"]), (400, &json!("grammar")));
    let refused = upload(&server, "wrong", &json!({"grammar": {"regex": "("}})).await;
    assert!(refused.status == 422 && refused.text().contains("grammar: "), "{}", refused.text());
}

#[tokio::test]
async fn words_are_forbidden_ends_come_late_and_given_tokens_are_told_of() {
    let server = Server::start();
    let ask = async |more: Value| {
        let mut body = json!({"input": "the cat sat", "max_tokens": 6, "logprobs": 0});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.generate(&body).await.ok()
    };
    let free = ask(json!({"ignore_eos": true})).await;
    let first = free["tokens"][0].clone();
    let bad = ask(json!({"bad_words": [first["text"]], "ignore_eos": true})).await;
    assert!(bad["tokens"].as_array().unwrap().iter().all(|token| token["id"] != first["id"]), "{bad}");

    let id = first["id"].as_u64().unwrap();
    let told = ask(json!({"logprob_token_ids": [id, 5], "ignore_eos": true})).await;
    let top = told["tokens"][0]["top_logprobs"].as_array().unwrap().clone();
    assert_eq!((top.len(), &top[0]["id"], &top[0]["logprob"]), (2, &first["id"], &first["logprob"]));
    assert_eq!(top[1]["id"], 5);

    // The end of text is the likeliest token: a bias makes it so.
    let eos = server.app.model.eos_token_ids[0].to_string();
    let body = |min: usize| json!({"model": TASK, "prompt": "the cat", "max_tokens": 6, "min_tokens": min, "logit_bias": {&eos: 100}});
    for min in [0, 3] {
        let answer = server.post("/v1/completions", &body(min)).await.ok();
        assert_eq!(
            (&answer["usage"]["completion_tokens"], &answer["choices"][0]["finish_reason"]),
            (&json!(min), &json!("stop"))
        );
    }
    for (more, field) in [
        (json!({"bad_words": [" "]}), "bad_words[0]"),
        (json!({"bad_words": vec!["a"; 129]}), "bad_words"),
        (json!({"logprob_token_ids": [9_999_999]}), "logprob_token_ids[0]"),
    ] {
        let mut body = json!({"input": "a"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = server.generate(&body).await;
        assert_eq!((answer.status.as_u16(), &answer.json()["errors"][0]["field"]), (400, &json!(field)));
    }
}
