//! A server whose prompts do not all fit into the memory that they may take.

use std::time::Duration;

use axum::http::StatusCode;
use futures::future::join_all;
use serde_json::{Value, json};

use crate::support::{Options, Server, TASK};

const TASKS: [&str; 3] = [TASK, "prompt33", "ptuning5"];

/// With room for no prompt at all.
fn without_room() -> Options {
    let mut options = Options::default();
    options.limits.prompt_memory = 1;
    options
}

/// The answer to the i-th request, without what differs from call to call.
async fn ask(server: &Server, i: usize) -> Value {
    let body = json!({"input": format!("input {i}"), "max_tokens": 4, "logprobs": 0});
    let mut answer = server.post(&format!("/v1/tasks/{}/generate", TASKS[i % TASKS.len()]), &body).await.ok();
    answer["id"].take();
    answer["usage"]["cached_tokens"].take();
    answer
}

#[tokio::test]
async fn prompts_that_are_read_for_each_request_answer_as_those_that_stay_in_memory() {
    let (warm, cold) = (Server::start(), without_room().start());
    let expected = join_all((0..12).map(|i| ask(&warm, i))).await;
    let found = join_all((0..12).map(|i| ask(&cold, i))).await;
    assert_eq!(found, expected);
    let stats = cold.app.registry.residency();
    assert_eq!((stats.versions, stats.bytes), (0, 0));
    // Requests that need the same prompt at the same time share one reading of it.
    assert!(stats.loads >= TASKS.len() as u64, "{stats:?}");
    assert_eq!(warm.app.registry.residency().loads, 0);

    let loaded = async |server: &Server| {
        let tasks = server.get("/v1/admin/tasks").await.ok();
        let of_task = |task: &Value| task["versions"][0]["residency"]["loaded"].as_bool().unwrap();
        tasks["tasks"].as_array().unwrap().iter().filter(|task| of_task(task)).count()
    };
    assert_eq!((loaded(&warm).await, loaded(&cold).await), (3, 0));
}

#[tokio::test]
async fn who_would_wait_too_long_for_a_prompt_is_told_to_come_back() {
    let mut options = without_room();
    options.limits.max_concurrent_loads = 0;
    options.limits.max_load_wait = Duration::from_millis(20);
    let server = options.start();
    let body = json!({"input": "a"});
    let refused = join_all((0..20).map(|_| server.post("/v1/tasks/prompt33/generate", &body))).await;
    for answer in refused {
        assert_eq!((answer.status, &answer.json()["code"]), (StatusCode::TOO_MANY_REQUESTS, &json!("overloaded")));
        assert!(answer.text().contains("--prompt-memory") && answer.header("retry-after") == "1");
    }
}

#[tokio::test]
async fn lists_come_a_page_at_a_time() {
    let server = Server::start();
    for (path, list, of) in
        [("/v1/tasks", "tasks", "task"), ("/v1/admin/tasks", "tasks", "task"), ("/v1/models", "data", "id")]
    {
        let first = server.get(&format!("{path}?limit=2")).await.ok();
        let names = |page: &Value| {
            page[list].as_array().unwrap().iter().map(|item| item[of].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let (mut found, next) = (names(&first), first.get("next").cloned());
        if path == "/v1/models" {
            assert_eq!(first["has_more"], true);
            assert_eq!(found.pop(), Some(server.app.model.name.clone()), "the base model ends the first page");
        } else {
            assert_eq!(next, Some(json!("prompt7")), "{path}");
        }
        assert_eq!(found, ["prompt33", "prompt7"], "{path}");
        let second = server.get(&format!("{path}?limit=2&after=prompt7")).await.ok();
        assert_eq!(names(&second), ["ptuning5"], "{path}");
        assert!(second.get("next").is_none() && second.get("has_more").is_none_or(|more| more == false), "{path}");
        for query in ["limit=0", "limit=10001", "limit=a", "before=x"] {
            assert_eq!(server.get(&format!("{path}?{query}")).await.status, StatusCode::BAD_REQUEST, "{path}?{query}");
        }
    }
}
