//! `/v1/files` and `/v1/batches`: across a crash, between tenants, and what is refused.

use std::{path::Path, process::Command, time::Instant};

use serde_json::{Value, json};

use crate::{
    process::{Process, agent, read, softserve},
    support::{LONG, Options, Server, post},
};

fn command(home: &Path) -> Command {
    let mut command = softserve(home);
    command.args(["serve", "--listen=127.0.0.1:0", "--files=files"]);
    command
}

fn form(content: &str) -> (&'static str, String) {
    let part = |name: &str, more: &str, value: &str| {
        format!("--line\r\ncontent-disposition: form-data; name=\"{name}\"{more}\r\n\r\n{value}\r\n")
    };
    let body = part("purpose", "", "batch") + &part("file", "; filename=\"in.jsonl\"", content) + "--line--\r\n";
    ("multipart/form-data; boundary=line", body)
}

fn requests(lines: usize) -> String {
    let line = |i: usize| {
        json!({"custom_id": i.to_string(), "method": "POST", "url": "/v1/tasks/story/generate",
            "body": {"input": format!("The old man {i}"), "max_tokens": if i % 50 == 49 { 0 } else { 16 }}})
    };
    (0..lines).map(|i| line(i).to_string() + "\n").collect()
}

fn upload(server: &Process, content: &str) -> Value {
    let (content_type, body) = form(content);
    let sent = agent().post(server.at("/v1/files")).header("content-type", content_type).send(body);
    let (status, file) = read(sent);
    assert_eq!(status, 200, "{file}");
    file
}

#[test]
fn a_batch_goes_on_after_a_crash_and_answers_each_line_once() {
    const LINES: usize = 1500;
    let home = tempfile::tempdir().unwrap();
    let server = Process::start(command(home.path()));
    let file = upload(&server, &requests(LINES));
    let body = json!({"input_file_id": file["id"], "endpoint": "/v1/tasks/story/generate", "completion_window": "24h"});
    let (status, batch) = read(agent().post(server.at("/v1/batches")).send_json(body));
    assert_eq!((status, &batch["status"]), (200, &json!("validating")), "{batch}");
    let path = format!("/v1/batches/{}", batch["id"].as_str().unwrap());
    let until = Instant::now() + LONG;
    let done = |batch: &Value| batch["request_counts"]["completed"].as_u64().unwrap();
    let mut before = 0;
    while before < 100 {
        let (_, batch) = server.get(&path);
        before = done(&batch);
        assert!(Instant::now() < until && batch["status"] != "completed", "{batch}");
    }
    server.signal("KILL");
    server.wait();

    let server = Process::start(command(home.path()));
    let until = Instant::now() + 3 * LONG;
    let ended = loop {
        let (_, batch) = server.get(&path);
        if batch["status"] == "completed" {
            break batch;
        }
        assert!(Instant::now() < until && batch["status"] != "failed", "{batch}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    assert_eq!(ended["request_counts"], json!({"total": LINES, "completed": LINES - 30, "failed": 30}));
    let content = |id: &Value| {
        let path = server.at(&format!("/v1/files/{}/content", id.as_str().unwrap()));
        let text = agent().get(path).call().unwrap().body_mut().read_to_string().unwrap();
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).collect::<Vec<_>>()
    };
    let output = content(&ended["output_file_id"]);
    let ids: Vec<usize> = output.iter().map(|line| line["custom_id"].as_str().unwrap().parse().unwrap()).collect();
    assert_eq!(ids, (0..LINES).filter(|i| i % 50 != 49).collect::<Vec<_>>());
    assert!(output.iter().all(|line| line["response"]["body"]["output"].is_string()));
    let errors = content(&ended["error_file_id"]);
    assert_eq!((errors.len(), &errors[0]["response"]["body"]["code"]), (30, &json!("invalid_request")));
    // Both files, and the input, are the caller's.
    let (_, listed) = server.get("/v1/files?limit=2");
    assert_eq!((listed["data"].as_array().unwrap().len(), &listed["has_more"]), (2, &json!(true)));
    let (_, rest) = server.get(&format!("/v1/files?after={}", listed["last_id"].as_str().unwrap()));
    assert_eq!((&rest["data"][0]["id"], &rest["has_more"]), (&file["id"], &json!(false)));
}

#[tokio::test]
async fn a_batch_can_be_cancelled_and_what_is_wrong_is_told() {
    let server = Server::start();
    let (content_type, body) = form(&requests(2).replace("story", "prompt7").replace("16", "400"));
    let file = server.call(post("/v1/files", content_type, body)).await.ok();
    let create = |change: Value| {
        let mut body =
            json!({"input_file_id": file["id"], "endpoint": "/v1/tasks/prompt7/generate", "completion_window": "24h"});
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        body
    };
    for (change, param) in [
        (json!({"endpoint": "/v1/admin/tasks"}), "endpoint"),
        (json!({"completion_window": "1h"}), "completion_window"),
    ] {
        let answer = server.post("/v1/batches", &create(change)).await;
        assert_eq!((answer.status.as_u16(), &answer.json()["error"]["param"]), (400, &json!(param)));
    }
    let batch = server.post("/v1/batches", &create(json!({}))).await.ok();
    let path = format!("/v1/batches/{}", batch["id"].as_str().unwrap());
    let cancelled = server.post(&format!("{path}/cancel"), &json!({})).await.ok();
    assert_eq!(cancelled["status"], "cancelling");
    while server.get(&path).await.ok()["status"] != "cancelled" {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    // Lines of another path.
    let batch = server.post("/v1/batches", &create(json!({"endpoint": "/v1/completions"}))).await.ok();
    let path = format!("/v1/batches/{}", batch["id"].as_str().unwrap());
    let failed = loop {
        let batch = server.get(&path).await.ok();
        if batch["status"] == "failed" {
            break batch;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    };
    assert_eq!(failed["errors"]["data"][0]["code"], "mismatched_endpoint", "{failed}");
    let (content_type, body) = form("x");
    let other = server.call(post("/v1/files", content_type, body.replace("batch", "vision"))).await;
    assert_eq!((other.status.as_u16(), &other.json()["error"]["param"]), (400, &json!("purpose")));
    let answer = server.call(post("/v1/files", "application/json", "{}")).await;
    assert_eq!(answer.status, 415, "{}", answer.text());
}

#[tokio::test]
async fn files_are_their_tenants_own_and_of_no_other_web_page() {
    let server = Options::with_keys(&["first-key-1", "second-key-2"], &[], true).start();
    let (content_type, body) = form("{}");
    let with = |key: &str, mut request: axum::http::Request<axum::body::Body>| {
        request.headers_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
        request
    };
    let file = server.call(with("first-key-1", post("/v1/files", content_type, body.clone()))).await.ok();
    let get = |path: String| axum::http::Request::get(path).body(axum::body::Body::empty()).unwrap();
    let path = format!("/v1/files/{}", file["id"].as_str().unwrap());
    assert_eq!(server.call(with("first-key-1", get(path.clone()))).await.status, 200);
    assert_eq!(server.call(with("second-key-2", get(path.clone()))).await.status, 404);
    assert_eq!(server.call(with("second-key-2", get("/v1/files".to_owned()))).await.ok()["data"], json!([]));

    let open = Server::start();
    let mut foreign = post("/v1/files", content_type, body);
    foreign.headers_mut().insert("origin", "http://elsewhere.example".parse().unwrap());
    foreign.headers_mut().insert("host", "127.0.0.1:8080".parse().unwrap());
    assert_eq!(open.call(foreign).await.status, 403);
}
