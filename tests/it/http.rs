//! The router without a socket: answers, streams, uploads and who may call.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    http::{Request, StatusCode, header},
};
use candle_core::DType;
use futures::stream;
use serde_json::{Value, json};

use crate::{
    fixtures,
    support::{Answer, LONG, MODEL, Options, Server, TASK, form, post, prompt_files, weights},
};

fn outputs(answer: &Value) -> Vec<&str> {
    answer["choices"].as_array().unwrap().iter().map(|c| c["output"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn an_answer_has_the_parts_that_the_contract_names() {
    let server = Server::start();
    let answer = server.generate(&json!({"input": "the cat", "max_tokens": 4})).await.ok();
    assert_eq!((&answer["task"], &answer["finish_reason"]), (&json!(TASK), &json!("length")));
    assert_eq!(answer["version"].as_str().unwrap().len(), 12);
    assert!(!answer["id"].as_str().unwrap().is_empty() && answer["output"].is_string());
    let usage = &answer["usage"];
    assert_eq!((&usage["virtual_tokens"], &usage["completion_tokens"]), (&json!(7), &json!(4)));
    assert!(usage["prompt_tokens"].as_u64().unwrap() > 0 && usage["cached_tokens"].is_u64());
    assert!(answer.get("tokens").is_none() && answer.get("choices").is_none());
}

#[tokio::test]
async fn logprobs_are_given_for_each_token_and_as_many_of_the_likeliest_as_asked() {
    let server = Server::start();
    for top in [0, 3] {
        let answer = server.generate(&json!({"input": "a", "max_tokens": 3, "logprobs": top})).await.ok();
        let tokens = answer["tokens"].as_array().unwrap();
        assert_eq!(tokens.len(), 3);
        for token in tokens {
            let likeliest = token["top_logprobs"].as_array().unwrap();
            assert_eq!(likeliest.len(), top);
            assert!(token["logprob"].as_f64().unwrap() <= 0.0 && token["text"].is_string());
            // Greedy: the chosen token is the likeliest.
            assert!(likeliest.first().is_none_or(|first| first["id"] == token["id"]));
        }
    }
}

#[tokio::test]
async fn a_stream_says_what_the_whole_answer_says() {
    let server = Server::start();
    let request = json!({"input": "the cat sat", "max_tokens": 24});
    let whole = server.generate(&request).await.ok();
    let mut streamed = request;
    streamed["stream"] = json!(true);
    let answer = server.generate(&streamed).await;
    let events = answer.events();
    let (done, events) = events.split_last().unwrap();
    assert_eq!(*done, "[DONE]");
    let events: Vec<Value> = events.iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let output: String = events.iter().map(|e| e["output"].as_str().unwrap()).collect();
    assert_eq!(json!(output), whole["output"]);
    let (last, before) = events.split_last().unwrap();
    assert_eq!((&last["finish_reason"], &last["usage"]["completion_tokens"]), (&whole["finish_reason"], &json!(24)));
    assert!(before.iter().all(|e| e.get("finish_reason").is_none() && e.get("usage").is_none()));
}

#[tokio::test]
async fn a_stop_text_ends_the_answer_and_is_not_part_of_it() {
    let server = Server::start();
    let whole = server.generate(&json!({"input": "the cat", "max_tokens": 16})).await.ok();
    let whole = whole["output"].as_str().unwrap();
    let stop = whole.chars().nth(whole.chars().count() / 2).unwrap().to_string();
    let before = whole.split(&stop).next().unwrap();
    for stop in [json!([stop]), json!(stop)] {
        let answer = server.generate(&json!({"input": "the cat", "max_tokens": 16, "stop": stop})).await.ok();
        assert_eq!((&answer["output"], &answer["finish_reason"]), (&json!(before), &json!("stop")));
    }
}

#[tokio::test]
async fn answer_i_of_several_is_drawn_with_seed_plus_i() {
    let server = Server::start();
    let request = |seed: u64, n: usize| json!({"input": "a", "temperature": 1, "seed": seed, "n": n, "max_tokens": 12});
    let several = server.generate(&request(5, 3)).await.ok();
    let mut alone = Vec::new();
    for seed in 5..8 {
        alone.push(server.generate(&request(seed, 1)).await.ok()["output"].as_str().unwrap().to_owned());
    }
    assert_eq!(outputs(&several), alone);
    assert_eq!(several["output"], json!(alone[0]));
    assert_ne!(alone[0], alone[1]);
    assert_eq!(several["usage"]["completion_tokens"], json!(36));
}

#[tokio::test]
async fn several_streamed_answers_are_told_apart_by_their_index() {
    let server = Server::start();
    let request = json!({"input": "a", "temperature": 1, "seed": 5, "n": 2, "max_tokens": 8});
    let whole = server.generate(&request).await.ok();
    let mut streamed = request;
    streamed["stream"] = json!(true);
    let answer = server.generate(&streamed).await;
    let mut texts = vec![String::new(); 2];
    let mut ends = 0;
    for event in answer.events().iter().filter(|e| **e != "[DONE]") {
        let event: Value = serde_json::from_str(event).unwrap();
        texts[event["index"].as_u64().unwrap() as usize] += event["output"].as_str().unwrap();
        ends += usize::from(event.get("finish_reason").is_some());
        assert_eq!(event.get("usage").is_some(), ends == 2);
    }
    assert_eq!(texts, outputs(&whole));
}

#[tokio::test]
async fn a_batch_answers_in_order_as_each_request_would_be_alone() {
    let server = Server::start();
    let item = |task: &str, input: &str| json!({"task": task, "input": input, "max_tokens": 6});
    let bad = json!({"task": TASK, "input": "a", "max_token": 6});
    let requests = json!([item("prompt7", "a b"), item("nobody", "a"), item("prompt33", "a b"), bad]);
    let answer = server.post("/v1/generate", &json!({"requests": requests})).await.ok();
    let results = answer["results"].as_array().unwrap();
    for (i, task) in [(0, "prompt7"), (2, "prompt33")] {
        let alone = server.post(&format!("/v1/tasks/{task}/generate"), &json!({"input": "a b", "max_tokens": 6})).await;
        assert_eq!((&results[i]["output"], &results[i]["task"]), (&alone.ok()["output"], &json!(task)));
    }
    assert_eq!((&results[1]["code"], &results[1]["status"]), (&json!("task_not_found"), &json!(404)));
    assert_eq!(
        (&results[3]["code"], &results[3]["errors"][0]["field"]),
        (&json!("invalid_request"), &json!("max_token"))
    );
    assert_eq!(results.len(), 4);
}

#[tokio::test]
async fn max_tokens_is_cut_to_what_the_context_leaves() {
    let server = Server::start();
    let answer = server.generate(&json!({"input": "the cat", "max_tokens": 100_000, "ignore_eos": true})).await.ok();
    let usage = &answer["usage"];
    let count = |name: &str| usage[name].as_u64().unwrap();
    assert_eq!(count("virtual_tokens") + count("prompt_tokens") + count("completion_tokens"), 512);
    assert_eq!(answer["finish_reason"], "length");
}

#[tokio::test]
async fn a_request_whose_time_is_over_answers_with_what_there_is() {
    let server = Server::start();
    let request = json!({"input": "a", "max_tokens": 100_000, "ignore_eos": true, "timeout_ms": 1});
    let answer = server.generate(&request).await.ok();
    assert_eq!(answer["finish_reason"], "timeout");
    assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() < 500);
}

#[tokio::test]
async fn a_priority_is_a_number_from_minus_1000_to_1000() {
    let server = Server::start();
    for priority in [-1000, 0, 1000] {
        server.generate(&json!({"input": "a", "max_tokens": 1, "priority": priority})).await.ok();
    }
    let answer = server.generate(&json!({"input": "a", "priority": -1001})).await;
    assert_eq!(answer.json()["errors"][0]["field"], "priority");
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_client_that_goes_away_stops_its_generation() {
    use futures::StreamExt as _;

    let server = Server::start();
    let request = json!({"input": "a", "max_tokens": 500, "ignore_eos": true, "stream": true, "n": 8}).to_string();
    let path = format!("/v1/tasks/{TASK}/generate");
    let mut body = server.begin(post(&path, "application/json", request)).await.into_body().into_data_stream();
    body.next().await.unwrap().unwrap();
    drop(body);
    server.generate(&json!({"input": "a", "max_tokens": 2})).await.ok();
    let stats = server.app.engine.stats();
    assert_eq!(stats.running, 0);
    assert!(stats.generated_tokens < 8 * 500, "{stats:?}");
}

#[tokio::test]
async fn a_declared_gigabyte_is_refused_without_reading_it() {
    let server = Server::start();
    let read = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&read);
    let body = Body::from_stream(stream::once(async move {
        seen.store(true, Relaxed);
        Ok::<_, std::io::Error>(vec![b' '; 1024])
    }));
    let mut request = post("/v1/generate", "application/json", body);
    request.headers_mut().insert(header::CONTENT_LENGTH, (1u64 << 30).into());
    let answer = server.call(request).await;
    assert_eq!((answer.status, &answer.json()["code"]), (StatusCode::PAYLOAD_TOO_LARGE, &json!("body_too_large")));
    assert!(!read.load(Relaxed));
}

#[tokio::test]
async fn an_endless_body_is_refused_at_the_limit() {
    let server = Server::start();
    let sent = Arc::new(AtomicUsize::new(0));
    for (path, content_type, limit) in [
        ("/v1/generate", "application/json", 1 << 20),
        ("/v1/admin/tasks/x/versions", "application/octet-stream", 64 << 20),
    ] {
        sent.store(0, Relaxed);
        let count = Arc::clone(&sent);
        let endless = stream::repeat_with(move || {
            count.fetch_add(1 << 16, Relaxed);
            Ok::<_, std::io::Error>(vec![b' '; 1 << 16])
        });
        let answer = server.call(post(path, content_type, Body::from_stream(endless))).await;
        assert_eq!((answer.status, &answer.json()["code"]), (StatusCode::PAYLOAD_TOO_LARGE, &json!("body_too_large")));
        assert!(sent.load(Relaxed) <= limit + (1 << 17), "{}", sent.load(Relaxed));
    }
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_nothing_behind() {
    let server = Server::start();
    let (_, weights) = prompt_files("prompt7");
    let pieces = vec![Ok(weights[..100].to_vec()), Err(std::io::Error::other("the connection broke"))];
    let answer = server.upload("broken", "application/octet-stream", Body::from_stream(stream::iter(pieces))).await;
    assert_eq!((answer.status, &answer.json()["code"]), (StatusCode::BAD_REQUEST, &json!("incomplete_body")));
    assert_eq!(server.get("/v1/tasks/broken").await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn the_same_files_are_the_same_version_however_they_are_packed() {
    let server = Server::start();
    let (config, weights) = prompt_files("prompt33");
    let files = [("adapter_config.json", &config[..]), ("adapter_model.safetensors", &weights[..])];
    let (content_type, body) = form(&files);
    let first = server.upload("packed", content_type, body).await;
    assert_eq!(first.status, StatusCode::CREATED);
    let version = first.ok()["version"].as_str().unwrap().to_owned();
    assert_eq!(first.header("location"), format!("/v1/admin/tasks/packed/versions/{version}"));
    let location = server.get(first.header("location")).await.ok();
    assert_eq!((&location["version"], &location["virtual_tokens"]), (&json!(version), &json!(33)));

    let mut tar = tar::Builder::new(Vec::new());
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, content) in files {
        let mut entry = tar::Header::new_gnu();
        entry.set_size(content.len() as u64);
        entry.set_cksum();
        tar.append_data(&mut entry, name, content).unwrap();
        zip.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
        std::io::Write::write_all(&mut zip, content).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut gzip, &tar).unwrap();
    for (content_type, body) in [
        ("application/zip; charset=binary", zip.finish().unwrap().into_inner()),
        ("application/x-tar", tar),
        ("application/gzip", gzip.finish().unwrap()),
    ] {
        let again = server.upload("packed", content_type, body).await;
        assert_eq!((again.status, &again.ok()["version"]), (StatusCode::OK, &json!(version)), "{content_type}");
    }
}

#[tokio::test]
async fn versions_are_stored_activated_and_deleted_under_their_etag() {
    let server = Server::start();
    let version = |answer: &Answer| answer.ok()["version"].as_str().unwrap().to_owned();
    let one = version(&server.upload("swap", "application/octet-stream", prompt_files("prompt7").1).await);
    let path = "/v1/admin/tasks/swap/versions?activate=false";
    let stored = server.call(post(path, "application/octet-stream", prompt_files("prompt33").1)).await;
    assert_eq!(stored.ok()["active"], json!(false));
    let two = version(&stored);
    assert_eq!(server.get("/v1/tasks/swap").await.ok()["version"], json!(one));

    let before = server.get("/v1/admin/tasks/swap/versions").await;
    let tag = before.header("etag").to_owned();
    let activated = server.activate("swap", &two, Some(&tag)).await;
    assert_eq!(activated.ok()["active"], json!(two));
    assert_ne!(activated.header("etag"), tag);
    assert_eq!(server.activate("swap", &one, Some(&tag)).await.status, StatusCode::PRECONDITION_FAILED);
    assert_eq!(server.get("/v1/tasks/swap").await.ok()["version"], json!(two));
    assert_eq!(server.activate("swap", &one, Some("*")).await.status, StatusCode::OK);

    // A version that is not active can still be asked for by name.
    let named = json!({"input": "a", "max_tokens": 1, "version": two});
    assert_eq!(server.post("/v1/tasks/swap/generate", &named).await.ok()["version"], json!(two));
    assert_eq!(server.delete(&format!("/v1/admin/tasks/swap/versions/{two}")).await.status, StatusCode::NO_CONTENT);
    assert_eq!(server.delete("/v1/admin/tasks/swap").await.status, StatusCode::NO_CONTENT);
    assert_eq!(server.get("/v1/tasks/swap").await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn the_lists_show_every_task_and_version() {
    let server = Server::start();
    server.generate(&json!({"input": "a", "max_tokens": 1})).await.ok();
    let tasks = server.get("/v1/tasks").await.ok();
    let names: Vec<_> = tasks["tasks"].as_array().unwrap().iter().map(|t| t["task"].as_str().unwrap()).collect();
    assert_eq!(names, ["prompt33", "prompt7", "ptuning5"]);
    let one = server.get(&format!("/v1/tasks/{TASK}")).await.ok();
    assert_eq!(one, tasks["tasks"][1]);
    assert_eq!((&one["fields"], &one["virtual_tokens"]), (&json!(["input"]), &json!(7)));
    assert_eq!(one["limits"], json!({"max_input_tokens": 504, "max_tokens": 505}));
    let all = server.get("/v1/admin/tasks").await.ok();
    assert_eq!(
        all["tasks"][1]["versions"][0]["residency"],
        json!({"loaded": true, "device": "cpu", "bytes": 896, "cache": "resident"})
    );
}

#[tokio::test]
async fn every_admin_route_is_closed_to_strangers() {
    let server = Options::with_keys(&[], &[], false).start();
    let spec = server.get("/openapi.json").await.ok();
    let mut tried = 0;
    for (path, methods) in spec["paths"].as_object().unwrap().iter().filter(|(path, _)| path.starts_with("/v1/admin")) {
        for method in methods.as_object().unwrap().keys() {
            let request = Request::builder().method(method.to_uppercase().as_str()).uri(path.replace(['{', '}'], ""));
            let answer = server.call(request.body(Body::empty()).unwrap()).await;
            assert_eq!((answer.status, &answer.json()["code"]), (StatusCode::FORBIDDEN, &json!("forbidden")), "{path}");
            tried += 1;
        }
    }
    assert!(tried >= 7, "{tried}");
    assert_eq!(server.get("/v1/admin/anything").await.status, StatusCode::FORBIDDEN);
    assert_eq!(server.get("/v1/tasks").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_short_plain_request_id_is_kept_and_any_other_replaced() {
    let server = Server::start();
    let ask = async |id: &str| {
        let request = Request::get("/nowhere").header("x-request-id", id).body(Body::empty()).unwrap();
        let answer = server.call(request).await;
        assert_eq!(answer.json()["request_id"], answer.header("x-request-id"));
        answer.header("x-request-id").to_owned()
    };
    assert_eq!(ask("my-id_1.2:3").await, "my-id_1.2:3");
    for odd in ["", "a b", "<script>", &"x".repeat(129)] {
        let id = ask(odd).await;
        assert_ne!(id, odd);
        assert_eq!(id.len(), 36);
    }
}

#[tokio::test]
async fn readiness_drops_when_the_server_stops_and_liveness_does_not() {
    let server = Server::start();
    let ready = server.get("/health/ready").await.ok();
    assert_eq!((&ready["status"], &ready["prompts"]["store_away_since"]), (&json!("ready"), &Value::Null));
    assert_eq!(ready["prompts"]["revision"].as_str().unwrap().len(), 16);
    server.app.stop();
    let answer = server.get("/health/ready").await;
    assert_eq!((answer.status, answer.header("retry-after")), (StatusCode::SERVICE_UNAVAILABLE, "5"));
    assert_eq!(server.get("/health/live").await.ok(), json!({"status": "live"}));
}

#[tokio::test]
async fn metrics_count_requests_by_route_and_never_by_path() {
    softserve::telemetry::metrics();
    let server = Server::start();
    server.get("/v1/tasks/who-is-this").await;
    let metrics = server.get("/metrics").await;
    let text = metrics.text();
    assert!(
        text.contains("softserve_http_requests_total{method=\"GET\",route=\"/v1/tasks/{task}\",status=\"404\"}"),
        "{text}"
    );
    assert!(text.contains("softserve_engine_kv_blocks ") && text.contains("softserve_ready 1"), "{text}");
    // Routers read these two as they are.
    assert!(text.contains("softserve_engine_kv_block_positions 32\n"), "{text}");
    assert!(text.contains("# TYPE softserve_engine_kv_usage_ratio gauge\n"), "{text}");
    for name in ["cached_tokens_total", "kv_blocks_cached", "kv_evictions_total", "preemptions_total", "cached_prompts"]
    {
        assert!(text.contains(&format!("softserve_engine_{name} ")), "{name}: {text}");
    }
    assert!(!text.contains("who-is-this"), "{text}");
}

#[tokio::test]
async fn the_bytes_of_learned_prompts_in_the_cache_are_measured() {
    softserve::telemetry::metrics();
    let model = fixtures::load(MODEL, DType::F32);
    let block_bytes = model.backend().block_bytes(&model.kv_shape());
    let no_prompts = tempfile::tempdir().unwrap();
    let server = Options::default().start_with(model, fixtures::tokenizer(MODEL), no_prompts.path());
    assert_eq!(server.app.engine.stats().cached_prompt_bytes, 0);
    let (config, weights) = prompt_files("prompt33");
    let parts: [(&str, &[u8]); 2] = [("adapter_config.json", &config), ("adapter_model.safetensors", &weights)];
    let (content_type, body) = form(&parts);
    server.upload("resident", content_type, body).await.ok();
    server.post("/v1/tasks/resident/generate", &json!({"input": "the cat", "max_tokens": 2})).await.ok();
    let begun = Instant::now();
    while server.app.engine.stats().cached_prompts == 0 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", server.app.engine.stats());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    // 33 positions are in two blocks.
    assert_eq!(server.app.engine.stats().cached_prompt_bytes, 2 * block_bytes);
    // Other tests' servers measure into the same process.
    let line = format!("softserve_engine_cached_prompt_bytes {}\n", 2 * block_bytes);
    while !server.get("/metrics").await.text().contains(&line) {
        assert!(begun.elapsed() < Duration::from_secs(60), "{line}");
    }
}

#[tokio::test]
async fn tokens_and_times_are_measured_by_task_and_a_stream_until_its_end() {
    softserve::telemetry::metrics();
    let server = Server::start();
    let (config, weights) = prompt_files("prompt7");
    let parts: [(&str, &[u8]); 2] = [("adapter_config.json", &config), ("adapter_model.safetensors", &weights)];
    let (content_type, body) = form(&parts);
    server.upload("measured", content_type, body).await.ok();
    // A number of a metric of the task, or of the streams' route.
    let number = async |name: &str, labels: &str| {
        let metrics = server.get("/metrics").await;
        let found = metrics.text().lines().find_map(|line| line.strip_prefix(&format!("{name}{{{labels}}} ")));
        found.map_or(0.0, |found| found.parse::<f64>().unwrap())
    };
    let of_task = "task=\"measured\"";
    let request = json!({"input": "the cat", "max_tokens": 5, "ignore_eos": true});
    let answer = server.post("/v1/tasks/measured/generate", &request).await.ok();
    assert_eq!(number("softserve_request_output_tokens_sum", of_task).await, 5.0);
    let inputs = answer["usage"]["prompt_tokens"].as_f64().unwrap();
    assert_eq!(number("softserve_request_input_tokens_sum", of_task).await, inputs);
    assert_eq!(number("softserve_time_to_first_token_seconds_count", of_task).await, 1.0);
    assert_eq!(number("softserve_inter_token_seconds_count", of_task).await, 4.0);
    assert!(number("softserve_request_input_tokens_bucket", &format!("{of_task},le=\"64\"")).await > 0.0);

    let streamed = json!({"input": "the cat", "max_tokens": 480, "ignore_eos": true, "stream": true});
    let path = "/v1/tasks/measured/generate";
    let response = server.begin(post(path, "application/json", streamed.to_string())).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(number("softserve_request_output_tokens_count", of_task).await, 1.0, "it is not at its end");
    let body = axum::body::to_bytes(response.into_body(), 64 << 20).await.unwrap();
    assert!(body.ends_with(b"[DONE]\n\n"));
    assert_eq!(number("softserve_request_output_tokens_count", of_task).await, 2.0);
}

#[tokio::test]
async fn texts_are_tokenized_as_a_task_gives_them_to_the_model_and_back() {
    let server = Server::start();
    let tokenize = async |body: Value| server.post("/tokenize", &body).await;
    let detokenize = async |tokens: &Value| server.post("/detokenize", &json!({"tokens": tokens})).await;
    let (config, weights) = prompt_files("prompt7");
    let task = json!({"template": "Question: {{ text }} Answer:"}).to_string();
    let parts: [(&str, &[u8]); 3] =
        [("adapter_config.json", &config), ("adapter_model.safetensors", &weights), ("task.json", task.as_bytes())];
    let (content_type, body) = form(&parts);
    server.upload("ask", content_type, body).await.ok();
    let asked = tokenize(json!({"task": "ask", "input": {"text": "the cat"}})).await.ok();
    assert_eq!(
        (&asked["virtual_tokens"], &asked["count"]),
        (&json!(7), &json!(asked["tokens"].as_array().unwrap().len()))
    );
    assert!(detokenize(&asked["tokens"]).await.ok()["text"].as_str().unwrap().contains("Question: the cat Answer:"));
    // What a generate request counts.
    let answer = server.post("/v1/tasks/ask/generate", &json!({"input": "the cat", "max_tokens": 1})).await.ok();
    assert_eq!(answer["usage"]["prompt_tokens"], asked["count"]);

    let eos = server.app.tokenizer.token_text(server.app.model.eos_token_ids[0]);
    let text = format!("the cat{eos} sat");
    let (with, plain) = (json!({"input": text}), json!({"input": text, "special_tokens": false}));
    let (with, plain) = (tokenize(with).await.ok(), tokenize(plain).await.ok());
    let is_special = |id: &Value| server.app.tokenizer.is_special(id.as_u64().unwrap() as u32);
    assert!(with["tokens"].as_array().unwrap().iter().any(is_special));
    assert!(!plain["tokens"].as_array().unwrap().iter().any(is_special), "{plain}");
    assert_eq!(detokenize(&plain["tokens"]).await.ok()["text"], json!(text));
    assert_eq!(plain["texts"].as_array().unwrap().len(), plain["count"].as_u64().unwrap() as usize);

    for (body, words) in [
        (json!({}), "it is missing"),
        (json!({"input": {"text": "a"}}), "an object without a task"),
        (json!({"input": "a", "version": "000000000000"}), "found without a task"),
        (json!({"input": "a", "task": "ask", "special_tokens": true}), "found beside"),
        (json!({"input": "a", "task": "nobody"}), "there is no task"),
        (json!({"input": {"other": "a"}, "task": "ask"}), "other"),
    ] {
        let answer = tokenize(body.clone()).await.json();
        assert!(answer["detail"].as_str().unwrap().contains(words), "{body}: {answer}");
    }
    for (tokens, words) in
        [(json!([1, 999_999]), "tokens[1]: found 999999"), (json!([-1]), "tokens[0]"), (json!("a"), "tokens")]
    {
        let answer = detokenize(&tokens).await.json();
        assert!(answer["detail"].as_str().unwrap().contains(words), "{tokens}: {answer}");
    }
    let closed = Options::with_keys(&["a secret key"], &[], true).start();
    for path in ["/tokenize", "/detokenize"] {
        assert_eq!(closed.post(path, &json!({})).await.status, StatusCode::UNAUTHORIZED, "{path}");
    }
}

#[tokio::test]
async fn a_slow_body_ends_by_itself() {
    let mut options = Options::default();
    options.limits.body_idle_timeout = std::time::Duration::from_millis(5);
    let server = options.start();
    let never = Body::from_stream(stream::pending::<Result<Vec<u8>, std::io::Error>>());
    let answer =
        tokio::time::timeout(LONG, server.call(post("/v1/generate", "application/json", never))).await.unwrap();
    assert_eq!((answer.status, &answer.json()["code"]), (StatusCode::REQUEST_TIMEOUT, &json!("request_timeout")));
}

#[tokio::test]
async fn the_documentation_needs_nothing_from_elsewhere() {
    let server = Server::start();
    assert_eq!(server.get("/docs").await.header("location"), "/docs/");
    let page = server.get("/docs/").await;
    assert!(page.text().contains("swagger-ui") && !page.text().contains("://"), "{}", page.text());
    for file in ["swagger-ui-bundle.js", "swagger-ui.css", "swagger-initializer.js"] {
        assert_eq!(server.get(&format!("/docs/{file}")).await.status, StatusCode::OK, "{file}");
    }
}

#[tokio::test]
async fn a_prompt_of_another_width_is_refused_and_the_task_stays_as_it_was() {
    let server = Server::start();
    let before = server.get(&format!("/v1/tasks/{TASK}")).await.ok();
    let answer = server.upload(TASK, "application/octet-stream", weights(4, 17, 0.5)).await;
    assert_eq!(answer.json()["code"], "prompt_shape_mismatch");
    assert_eq!(server.get(&format!("/v1/tasks/{TASK}")).await.ok(), before);
}
