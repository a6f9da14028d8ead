//! `task+task@version`: several prompts of keys and values in one request, as if they were one.

use std::{fs, path::Path};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use crate::{
    fixtures,
    support::{Server, form, prompt_files},
};

/// A prefix's rows `[virtual tokens, layers * 2 * kv heads * head dim]`: how many, and their f32 bytes.
fn rows(folder: &Path) -> (Value, usize, Vec<u8>) {
    let config = serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
    let weights = fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&weights).unwrap();
    let rows = tensors.tensor("prompt_embeddings").unwrap();
    let data = match rows.dtype() {
        Dtype::F32 => rows.data().to_vec(),
        // The upper half of an f32's bits.
        Dtype::BF16 => rows.data().chunks(2).flat_map(|bits| [0, 0, bits[0], bits[1]]).collect(),
        other => panic!("{other:?}"),
    };
    (config, rows.shape()[0], data)
}

async fn upload(server: &Server, task: &str, config: &Value, n: usize, data: &[u8]) -> String {
    let mut config = config.clone();
    config["num_virtual_tokens"] = json!(n);
    let columns = data.len() / 4 / n;
    let view = TensorView::new(Dtype::F32, vec![n, columns], data).unwrap();
    let weights = safetensors::serialize([("prompt_embeddings", view)], None).unwrap();
    let config = config.to_string();
    let parts: [(&str, &[u8]); 2] =
        [("adapter_config.json", config.as_bytes()), ("adapter_model.safetensors", &weights)];
    let (content_type, body) = form(&parts);
    server.upload(task, content_type, body).await.ok()["version"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn prompts_of_keys_and_values_are_combined_as_if_they_were_one() {
    let server = Server::start();
    let prompts = fixtures::dir("prompt-types").join("llama-tied");
    let (config, first, first_rows) = rows(&prompts.join("prefix7"));
    let (_, second, second_rows) = rows(&prompts.join("prefix33"));
    upload(&server, "manual", &config, first, &first_rows).await;
    let version = upload(&server, "pricing", &config, second, &second_rows).await;
    upload(&server, "both", &config, first + second, &[&first_rows[..], &second_rows].concat()).await;
    upload(&server, "other-way", &config, first + second, &[&second_rows[..], &first_rows].concat()).await;
    let ask = async |task: &str| {
        let body = json!({"input": "the cat sat", "max_tokens": 8, "logprobs": 2, "ignore_eos": true});
        let answer = server.post(&format!("/v1/tasks/{task}/generate"), &body).await.ok();
        assert_eq!(answer["usage"]["virtual_tokens"], first + second);
        answer["tokens"].clone()
    };
    let both = ask("both").await;
    assert_ne!(both, ask("other-way").await);
    assert_eq!(ask("manual+pricing").await, both);
    assert_eq!(ask(&format!("manual+pricing@{}", &version[..8])).await, both);
    assert_eq!(ask("pricing+manual").await, ask("other-way").await);
    // Asked again it is found in the cache, and the same.
    assert_eq!(ask("manual+pricing").await, both);
    let body = json!({"model": format!("manual+pricing@{version}"), "prompt": "the cat sat", "max_tokens": 8, "ignore_eos": true});
    let text = server.post("/v1/completions", &body).await.ok()["choices"][0]["text"].clone();
    let mut tokens = both.as_array().unwrap().iter().map(|token| token["text"].as_str().unwrap());
    assert!(
        tokens.clone().count() == 8 && text.as_str().unwrap().ends_with(tokens.next_back().unwrap().trim()),
        "{text}"
    );

    // Rows of embeddings have positions of their own, which another prompt before them would move.
    let (config, weights) = prompt_files("prompt7");
    let (content_type, body) = form(&[("adapter_config.json", &config), ("adapter_model.safetensors", &weights)]);
    server.upload("rows", content_type, body).await.ok();
    for (task, says) in [
        ("manual+rows", "consists of embeddings"),
        ("manual+nothing", "there is no task"),
        ("manual+", "there is no task"),
        ("manual+manual+manual+manual+manual+manual+manual+manual+manual", "at most 8"),
        ("manual@000000000000", "has no version"),
    ] {
        let answer = server.post(&format!("/v1/tasks/{task}/generate"), &json!({"input": "a"})).await;
        assert!(answer.status.is_client_error() && answer.text().contains(says), "{task}: {}", answer.text());
    }
    let twice = json!({"input": "a", "version": version});
    let answer = server.post("/v1/tasks/manual+pricing/generate", &twice).await;
    assert!(answer.status == 400 && answer.text().contains("names another"), "{}", answer.text());
}
