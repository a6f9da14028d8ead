//! `truncate` of a `task.json`: inputs that are too long are shortened in one field.

use serde_json::{Value, json};

use crate::support::{Server, form, prompt_files};

#[tokio::test]
async fn an_input_that_is_too_long_is_shortened_in_the_field_that_its_task_names() {
    let server = Server::start();
    let (config, weights) = prompt_files("prompt7");
    let upload = async |task: &str, spec: Value| {
        let spec = spec.to_string();
        let parts: [(&str, &[u8]); 3] =
            [("adapter_config.json", &config), ("adapter_model.safetensors", &weights), ("task.json", spec.as_bytes())];
        let (content_type, body) = form(&parts);
        server.upload(task, content_type, body).await
    };
    let template = "Read: {{ text }} Q: {{ question }}";
    let limits = json!({"max_input_tokens": 40});
    for (task, side) in [("right", Some("right")), ("left", Some("left")), ("never", None)] {
        let truncate = side.map(|side| json!({"field": "text", "side": side}));
        upload(task, json!({"template": template, "limits": limits, "truncate": truncate})).await.ok();
    }
    let long: String = (0..200).map(|i| format!("word{i} ")).collect();
    let tokens = async |task: &str, text: &str| {
        let body = json!({"task": task, "input": {"text": text, "question": "why"}});
        server.post("/tokenize", &body).await.ok()["tokens"].as_array().unwrap().clone()
    };
    let text_of = async |ids: &[Value]| {
        server.post("/detokenize", &json!({"tokens": ids})).await.ok()["text"].as_str().unwrap().to_owned()
    };
    for (task, kept) in [("right", "word0 word1"), ("left", "word199")] {
        let ids = tokens(task, &long).await;
        assert!((36..=40).contains(&ids.len()), "{task}: {}", ids.len());
        let text = text_of(&ids).await;
        assert!(text.contains("Read: ") && text.ends_with("Q: why") && text.contains(kept), "{text}");
        let path = format!("/v1/tasks/{task}/generate");
        let body = json!({"input": {"text": long, "question": "why"}, "max_tokens": 1});
        assert_eq!(server.post(&path, &body).await.ok()["usage"]["prompt_tokens"], ids.len());
        // What fits is left as it is.
        assert_eq!(text_of(&tokens(task, "word0").await).await, text_of(&tokens("never", "word0").await).await);
        // Only the field is cut.
        let body = json!({"input": {"text": "a", "question": long}});
        assert_eq!(server.post(&path, &body).await.json()["code"], "input_too_long");
    }
    let body = json!({"input": {"text": long, "question": "why"}});
    assert_eq!(server.post("/v1/tasks/never/generate", &body).await.json()["code"], "input_too_long");
    let wrong = upload("wrong", json!({"template": template, "truncate": {"field": "txt"}})).await;
    assert!(wrong.status == 422 && wrong.text().contains("truncate.field"), "{}", wrong.text());
}
