//! Which versions of a task answer, over HTTP: splits, aliases and the way back.

use axum::{
    body::Body,
    http::{Request, StatusCode, header},
};
use serde_json::{Value, json};

use crate::support::{Answer, Server, TASK, post, prompt_files};

/// A server with a task of two versions, of which the first is active, and their ids.
async fn two_versions() -> (Server, String, String) {
    let server = Server::start();
    let mut ids = Vec::new();
    for (prompt, query) in [(TASK, ""), ("prompt33", "?activate=false")] {
        let path = format!("/v1/admin/tasks/ab/versions{query}");
        let uploaded = server.call(post(&path, "application/octet-stream", prompt_files(prompt).1)).await.ok();
        ids.push(uploaded["version"].as_str().unwrap().to_owned());
    }
    let second = ids.pop().unwrap();
    (server, ids.pop().unwrap(), second)
}

async fn put(server: &Server, path: &str, body: &Value) -> Answer {
    let request = Request::put(path).header(header::CONTENT_TYPE, "application/json");
    server.call(request.body(Body::from(body.to_string())).unwrap()).await
}

/// The version that answers a request with this split key.
async fn answering(server: &Server, key: Option<&str>) -> String {
    let mut request =
        post("/v1/tasks/ab/generate", "application/json", json!({"input": "a", "max_tokens": 1}).to_string());
    if let Some(key) = key {
        request.headers_mut().insert("x-softserve-split-key", key.parse().unwrap());
    }
    let answer = server.call(request).await;
    assert_eq!(answer.header("x-softserve-version"), answer.ok()["version"].as_str().unwrap());
    answer.header("x-softserve-version").to_owned()
}

#[tokio::test]
async fn requests_are_split_by_weight_and_a_key_stays_with_its_version() {
    let (server, first, second) = two_versions().await;
    let active = "/v1/admin/tasks/ab/active";
    let task = put(&server, active, &json!({"versions": {&first: 3, &second: 1}})).await.ok();
    assert_eq!((&task["active"], &task["generation"]), (&json!(first), &json!(2)));
    assert_eq!(task["shares"], json!({&first: 0.75, &second: 0.25}));
    let mut of_second = 0;
    for i in 0..80 {
        let key = format!("user {i}");
        let version = answering(&server, Some(&key)).await;
        assert_eq!(answering(&server, Some(&key)).await, version, "{key}");
        of_second += usize::from(version == second);
    }
    assert!((8..=34).contains(&of_second), "{of_second} of 80");
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..60 {
        seen.insert(answering(&server, None).await);
    }
    assert_eq!(seen.len(), 2, "without a key each request is drawn by itself");

    for (body, word) in [
        (json!({}), "either"),
        (json!({"version": first, "versions": {&first: 1}}), "either"),
        (json!({"versions": {}}), "found 0 versions"),
        (json!({"versions": {&first: -1}}), "above 0"),
    ] {
        let refused = put(&server, active, &body).await;
        assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{body}");
        assert!(refused.text().contains(word), "{}", refused.text());
    }
    let in_use = server.delete(&format!("/v1/admin/tasks/ab/versions/{second}")).await;
    assert_eq!((in_use.status, &in_use.json()["code"]), (StatusCode::CONFLICT, &json!("version_active")));

    let back = server.call(post("/v1/admin/tasks/ab/rollback", "application/json", "")).await;
    assert_eq!((back.header("etag"), &back.ok()["active"]), ("\"3\"", &json!(first)));
    assert!(back.json().get("shares").is_none());
    for i in 0..20 {
        assert_eq!(answering(&server, Some(&format!("user {i}"))).await, first);
    }
}

#[tokio::test]
async fn an_alias_is_a_version_wherever_a_task_is_named() {
    let (server, first, second) = two_versions().await;
    let alias = "/v1/admin/tasks/ab/aliases/latest-approved";
    let named = put(&server, alias, &json!({"version": second})).await;
    assert_eq!((named.header("etag"), &named.ok()["aliases"]), ("\"2\"", &json!({"latest-approved": second})));
    let request = json!({"model": "ab@latest-approved", "prompt": "a", "max_tokens": 1});
    assert_eq!(server.post("/v1/completions", &request).await.header("x-softserve-version"), second);
    let by_version = json!({"input": "a", "max_tokens": 1, "version": "latest-approved"});
    assert_eq!(server.post("/v1/tasks/ab/generate", &by_version).await.ok()["version"], json!(second));
    assert_eq!(answering(&server, None).await, first);
    let stale = Request::delete(alias).header(header::IF_MATCH, "\"1\"").body(Body::empty()).unwrap();
    assert_eq!(server.call(stale).await.status, StatusCode::PRECONDITION_FAILED);
    server.delete(alias).await.ok();
    assert_eq!(server.post("/v1/tasks/ab/generate", &by_version).await.status, StatusCode::NOT_FOUND);
    let refused = put(&server, "/v1/admin/tasks/ab/aliases/decade", &json!({"version": first})).await;
    assert_eq!(refused.status, StatusCode::BAD_REQUEST);
}
