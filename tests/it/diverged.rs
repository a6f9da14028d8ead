//! Learned prompts whose values are finite and overflow in the forward pass: refused at upload, never an answer, and
//! nobody else notices.

use std::fs;

use futures::future::join_all;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;
use softserve::prompt::files::PromptFiles;

use crate::{
    fixtures,
    process::{output, softserve},
    support::{Answer, MODEL, Options, Server, TASK, form},
};

/// Keys and values for llama-tied, all of one value: at 3e38 their weighted sums are infinite.
pub fn files(value: f32) -> PromptFiles {
    let config = json!({"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "num_layers": 2,
        "num_attention_heads": 2, "token_dim": 16});
    let data: Vec<u8> = (0..3 * 64).flat_map(|_| value.to_le_bytes()).collect();
    let rows = TensorView::new(Dtype::F32, vec![3, 64], &data).unwrap();
    PromptFiles {
        adapter_config: Some(config.to_string().into()),
        weights: Some(safetensors::serialize([("prompt_embeddings", rows)], None).unwrap().into()),
        ..PromptFiles::default()
    }
}

async fn upload(server: &Server, task: &str, files: &PromptFiles) -> Answer {
    let parts: Vec<(&str, &[u8])> = files.present().map(|(name, bytes)| (name, &bytes[..])).collect();
    let (content_type, body) = form(&parts);
    server.upload(task, content_type, body).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_that_overflows_is_refused_at_upload_and_nothing_of_it_is_stored() {
    let server = Server::start();
    let answer = upload(&server, "fine", &files(0.5)).await;
    assert_eq!(answer.status, 201, "{}", answer.json());
    for task in ["new", TASK] {
        let stored = async || {
            let mut all = server.get("/v1/admin/tasks").await.json();
            // Whether its keys and values are cached by now is no matter here.
            let versions = all["tasks"]
                .as_array_mut()
                .unwrap()
                .iter_mut()
                .flat_map(|task| task["versions"].as_array_mut().unwrap());
            versions.for_each(|version| drop(version.as_object_mut().unwrap().remove("residency")));
            all
        };
        let before = stored().await;
        let answer = upload(&server, task, &files(3e38)).await;
        let problem = answer.json();
        assert_eq!((answer.status.as_u16(), problem["code"].as_str()), (422, Some("logits_not_finite")), "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains("lower learning rate"), "{problem}");
        assert_eq!(stored().await, before);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_with_such_a_prompt_fails_and_the_others_answer_as_before() {
    // Few blocks, so that those of a failed request are soon another's.
    let mut options = Options::default();
    let model = fixtures::load(MODEL, candle_core::DType::F32);
    options.engine.kv_cache_bytes = 24 * fixtures::block_bytes(&model);
    let server = options.start();
    // A folder that somebody drops in is not tried.
    server.app.registry.publish("overflows".parse().unwrap(), files(3e38), true).unwrap();
    let cases: Vec<_> = fixtures::cases(MODEL).into_iter().filter(|case| case.prompt == TASK).collect();
    for round in 0..4 {
        for (sampling, stream) in [(json!({}), false), (json!({"temperature": 0.7}), false), (json!({}), true)] {
            let mut body = json!({"input": format!("the dog {round}"), "logprobs": 2, "stream": stream});
            body.as_object_mut().unwrap().extend(sampling.as_object().unwrap().clone());
            let path = "/v1/tasks/overflows/generate";
            let good = cases.iter().map(|case| {
                let request = json!({"input": case.text, "max_tokens": case.greedy_ids.len(), "ignore_eos": true});
                let server = &server;
                async move { server.generate(&request).await.json()["output"].as_str().unwrap().to_owned() }
            });
            let (bad, good) = futures::join!(server.post(path, &body), join_all(good));
            match stream {
                false => {
                    assert_eq!(
                        (bad.status.as_u16(), &bad.json()["code"]),
                        (422, &json!("logits_not_finite")),
                        "{body}"
                    );
                }
                true => {
                    let events = bad.text();
                    assert!(events.contains("event: error") && events.contains("logits_not_finite"), "{events}");
                    assert!(!events.contains("[DONE]"), "{events}");
                }
            }
            for (case, answer) in cases.iter().zip(good) {
                assert_eq!(answer, fixtures::tokenizer(MODEL).decode(&case.greedy_ids).unwrap(), "{}", case.text);
            }
        }
    }
    let batch =
        json!({"requests": [{"task": "overflows", "input": "a"}, {"task": TASK, "input": "a", "max_tokens": 2}]});
    let answer = server.post("/v1/generate", &batch).await.json();
    assert_eq!(answer["results"][0]["code"], "logits_not_finite", "{answer}");
    assert!(answer["results"][1]["output"].is_string(), "{answer}");
}

#[test]
fn inspect_and_eval_say_it_too() {
    let home = tempfile::tempdir().unwrap();
    files(3e38).write_dir(&home.path().join("overflows")).unwrap();
    fs::write(home.path().join("data.jsonl"), "{\"input\": \"a\", \"output\": \"b\"}\n").unwrap();
    let model = fixtures::dir(MODEL);
    for arguments in [&["inspect", "overflows"][..], &["eval", "--prompt", "overflows", "--data", "data.jsonl"]] {
        let mut command = softserve(home.path());
        command.current_dir(home.path()).args(arguments).arg("--model").arg(&model);
        let (code, said, log) = output(command);
        let all = format!("{said}{log}");
        assert!(code == Some(1) && all.contains("output is not finite") && all.contains("learning rate"), "{all}");
    }
}
