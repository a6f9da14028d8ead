//! Keys with roles, tasks, limits and an expiry: what each opens, and that nothing else is told.

use std::time::{Duration, Instant};

use axum::{
    body::Body,
    http::{Method, Request, StatusCode, header},
};
use serde_json::{Value, json};
use softserve::http::audit::AuditLog;

use crate::{
    process::{Process, softserve, with_fixture},
    support::{Answer, Options, Server, prompt_files},
};

const KEYS: &str = r#"
    [[key]]
    name = "app"
    key = "key-of-the-app"

    [[key]]
    name = "only-prompt7"
    key = "key-of-prompt7"
    roles = ["infer", "admin"]
    tasks = ["prompt7", "new-*"]

    [[key]]
    name = "prometheus"
    key = "key-of-prometheus"
    roles = ["metrics"]

    [[key]]
    name = "ci"
    key = "key-of-the-ci"
    roles = ["admin"]

    [[key]]
    name = "old"
    key = "key-that-has-expired"
    roles = ["infer", "metrics", "admin"]
    expires = "2026-01-01"

    [[key]]
    name = "slow"
    key = "key-with-limits"
    requests_per_minute = 2
"#;

fn server_with(audit: AuditLog) -> Server {
    Options { audit, ..Options::with_key_file(KEYS) }.start()
}

fn server() -> Server {
    server_with(AuditLog::default())
}

async fn call(server: &Server, method: &str, path: &str, key: Option<&str>, body: Option<&Value>) -> Answer {
    let mut request = Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, "application/json");
    if let Some(key) = key {
        request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
    }
    let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
    server.call(request.body(body).unwrap()).await
}

/// The code of a problem, in the house's shape or in OpenAI's.
fn code(answer: &Answer) -> String {
    let json = answer.json();
    let code = json.get("code").unwrap_or(&json["error"]["code"]);
    code.as_str().unwrap_or_else(|| panic!("no code in {json}")).to_owned()
}

/// Every route of the specification, with `task` in place of a task's name.
fn routes(spec: &Value, task: &str) -> Vec<(String, String)> {
    let paths = spec["paths"].as_object().unwrap();
    let of_path = |(path, item): (&String, &Value)| {
        let path = path.replace("{task}", task).replace(['{', '}'], "");
        item.as_object().unwrap().keys().map(|method| (method.to_uppercase(), path.clone())).collect::<Vec<_>>()
    };
    paths.iter().flat_map(of_path).collect()
}

#[tokio::test]
async fn every_route_is_closed_to_no_key_a_wrong_one_an_expired_one_and_one_without_the_role() {
    let server = server();
    let spec = server.get("/openapi.json").await.ok();
    let mut tried = 0;
    for (method, path) in routes(&spec, "prompt7") {
        if path.starts_with("/health/") {
            continue;
        }
        for key in [None, Some("no-such-key-at-all"), Some("key-that-has-expired")] {
            let answer = call(&server, &method, &path, key, None).await;
            assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{method} {path} {key:?}");
            assert!(["unauthorized", "invalid_api_key"].contains(&code(&answer).as_str()), "{}", answer.text());
        }
        let without_role: &[&str] = match &path[..] {
            "/metrics" => &["key-of-the-app"],
            path if path.starts_with("/v1/admin") => &["key-of-the-app", "key-of-prometheus"],
            _ => &["key-of-the-ci", "key-of-prometheus"],
        };
        for key in without_role {
            let answer = call(&server, &method, &path, Some(key), None).await;
            assert_eq!(
                (answer.status, code(&answer)),
                (StatusCode::FORBIDDEN, "forbidden".into()),
                "{method} {path} {key}"
            );
        }
        tried += 1;
    }
    assert!(tried >= 30, "{tried}");
    for (path, key) in
        [("/metrics", "key-of-prometheus"), ("/v1/admin/tasks", "key-of-the-ci"), ("/v1/tasks", "key-of-the-app")]
    {
        assert_eq!(call(&server, "GET", path, Some(key), None).await.status, StatusCode::OK, "{path}");
    }
}

#[tokio::test]
async fn a_key_for_some_tasks_learns_nothing_of_the_others() {
    let server = server();
    let spec = server.get("/openapi.json").await.ok();
    let key = Some("key-of-prompt7");
    // A task that is there and one that is not are refused in the same words.
    for (method, path) in routes(&spec, "TASK").into_iter().filter(|(_, path)| path.contains("TASK")) {
        let mut answers = Vec::new();
        for task in ["prompt33", "nosuch33", "prompt7+prompt33", "prompt7%2Bnosuch33", "prompt33@abcdef123456"] {
            let mut answer = call(&server, &method, &path.replace("TASK", task), key, None).await.json();
            answer["request_id"].take();
            assert_eq!(
                (&answer["status"], &answer["code"]),
                (&json!(403), &json!("forbidden")),
                "{method} {path} {task}"
            );
            answers.push(answer);
        }
        assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "{method} {path}: {answers:?}");
    }
    let base = server.app.model.name.clone();
    let decide = |model: &str, task: Option<&str>| {
        json!({"model": model, "instructions": "", "input": "a", "questions": [
            {"type": "choice", "id": "q", "question": "?", "choices": ["a", "b"], "task": task}]})
    };
    for task in ["prompt33", "nosuch33", "prompt7+prompt33", "prompt33@abcdef123456", &base] {
        for (path, body) in [
            ("/v1/completions", json!({"model": task, "prompt": "a"})),
            ("/v1/chat/completions", json!({"model": task, "messages": [{"role": "user", "content": "a"}]})),
            ("/tokenize", json!({"task": task, "input": "a"})),
        ] {
            let answer = call(&server, "POST", path, key, Some(&body)).await;
            assert_eq!((answer.status, code(&answer)), (StatusCode::FORBIDDEN, "forbidden".into()), "{path} {task}");
        }
        let path = format!("/v1/models/{}", task.replace('+', "%2B"));
        assert_eq!(call(&server, "GET", &path, key, None).await.status, StatusCode::FORBIDDEN, "{path}");
        let several =
            json!({"requests": [{"task": "prompt7", "input": "a", "max_tokens": 1}, {"task": task, "input": "a"}]});
        let results = call(&server, "POST", "/v1/generate", key, Some(&several)).await.ok()["results"].clone();
        assert!(results[0]["output"].is_string(), "{results}");
        assert_eq!(results[1]["code"], "forbidden", "{results}");
        assert_ne!(call(&server, "POST", "/v1/decisions", key, Some(&decide(task, None))).await.status, StatusCode::OK);
    }
    // Lists have what it may use, and errors name no other task.
    let names = |list: &Value, of: &str| list.as_array().unwrap().iter().map(|t| t[of].clone()).collect::<Vec<_>>();
    for (path, list, of) in
        [("/v1/tasks", "tasks", "task"), ("/v1/admin/tasks", "tasks", "task"), ("/v1/models", "data", "id")]
    {
        let answer = call(&server, "GET", path, key, None).await.ok();
        assert_eq!(names(&answer[list], of), ["prompt7"], "{path}");
        let all = call(
            &server,
            "GET",
            path,
            Some(if of == "id" || path == "/v1/tasks" { "key-of-the-app" } else { "key-of-the-ci" }),
            None,
        );
        assert!(names(&all.await.ok()[list], of).len() >= 3, "{path}");
    }
    for path in ["/v1/tasks/new-task", "/v1/admin/tasks/new-task/versions"] {
        let missing = call(&server, "GET", path, key, None).await;
        assert_eq!(missing.status, StatusCode::NOT_FOUND, "{path}");
        assert!(missing.text().contains("prompt7") && !missing.text().contains("prompt33"), "{}", missing.text());
    }
}

#[tokio::test]
async fn a_key_has_its_requests_a_minute_and_is_told_when_to_come_back() {
    let server = server();
    let body = json!({"model": "prompt7", "prompt": "a", "max_tokens": 1});
    for _ in 0..2 {
        call(&server, "POST", "/v1/completions", Some("key-with-limits"), Some(&body)).await.ok();
    }
    let refused = call(&server, "POST", "/v1/completions", Some("key-with-limits"), Some(&body)).await;
    assert_eq!((refused.status, code(&refused)), (StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded".into()));
    let seconds: u32 = refused.header("retry-after").parse().unwrap();
    assert!((20..=30).contains(&seconds), "{seconds}");
    let refused = call(&server, "GET", "/v1/tasks", Some("key-with-limits"), None).await;
    assert_eq!(code(&refused), "rate_limited");
    assert_eq!(call(&server, "GET", "/v1/tasks", Some("key-of-the-app"), None).await.status, StatusCode::OK);
}

#[tokio::test]
async fn every_admin_action_is_written_down_with_who_what_before_and_after() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    let server = server_with(AuditLog::open(&path).unwrap());
    let (_, weights) = prompt_files("prompt7");
    let (_, other) = prompt_files("prompt33");
    let upload = async |key: &str, body: Vec<u8>, query: &str| {
        let request = Request::post(format!("/v1/admin/tasks/new-a/versions{query}"))
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(header::AUTHORIZATION, format!("Bearer {key}"))
            .header("x-request-id", "of-the-test");
        server.call(request.body(Body::from(body)).unwrap()).await
    };
    let first = upload("key-of-the-ci", weights, "").await.ok()["version"].clone();
    let second = upload("key-of-prompt7", other, "?activate=false").await.ok()["version"].clone();
    let ci = Some("key-of-the-ci");
    let active = "/v1/admin/tasks/new-a/active";
    call(&server, Method::PUT.as_str(), active, ci, Some(&json!({"version": second}))).await.ok();
    call(&server, "PUT", active, Some("key-of-the-app"), Some(&json!({"version": first}))).await;
    call(&server, "GET", "/v1/admin/tasks", ci, None).await.ok();
    let version = format!("/v1/admin/tasks/new-a/versions/{}", first.as_str().unwrap());
    assert_eq!(call(&server, "DELETE", &version, ci, None).await.status, StatusCode::NO_CONTENT);
    assert_eq!(call(&server, "DELETE", "/v1/admin/tasks/new-a", ci, None).await.status, StatusCode::NO_CONTENT);

    let lines = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told =
        |line: &Value| ["action", "key", "status", "code", "version", "before", "after"].map(|name| line[name].clone());
    let null = Value::Null;
    let expected = [
        [json!("upload"), json!("ci"), json!(201), null.clone(), first.clone(), null.clone(), first.clone()],
        [
            json!("upload"),
            json!("only-prompt7"),
            json!(201),
            null.clone(),
            second.clone(),
            first.clone(),
            first.clone(),
        ],
        [json!("activate"), json!("ci"), json!(200), null.clone(), second.clone(), first.clone(), second.clone()],
        [json!("activate"), null.clone(), json!(403), json!("forbidden"), null.clone(), null.clone(), null.clone()],
        [json!("delete_version"), json!("ci"), json!(204), null.clone(), first, second.clone(), second.clone()],
        [json!("delete_task"), json!("ci"), json!(204), null.clone(), null.clone(), second, null.clone()],
    ];
    assert_eq!(lines.iter().map(told).collect::<Vec<_>>(), expected);
    assert!(lines.iter().all(|line| line["time"].as_str().is_some_and(|time| time.starts_with("20"))));
    assert_eq!(
        (&lines[0]["request_id"], &lines[0]["path"]),
        (&json!("of-the-test"), &json!("/v1/admin/tasks/new-a/versions"))
    );
}

/// What `softserve key` prints: the key for people, and its table.
fn new_key(home: &std::path::Path, options: &[&str]) -> (String, String) {
    let output = softserve(home).arg("key").args(options).output().unwrap();
    let [table, shown] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(output.status.success(), "{shown}");
    let key = shown.lines().map(str::trim).find(|line| line.starts_with("ss-")).unwrap().to_owned();
    assert!(
        table.starts_with("[[key]]") && !table.contains(&key),
        "the table has no more than the key's hash: {table}"
    );
    (key, table)
}

#[test]
fn a_key_that_the_program_makes_opens_the_server_and_a_running_server_reads_the_file_again() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("keys.toml");
    let (first, table) = new_key(home.path(), &["--name", "first", "--role", "infer", "--role", "admin"]);
    std::fs::write(&file, &table).unwrap();
    let mut command = with_fixture(home.path());
    command.arg("--keys").arg(&file);
    let server = Process::start(command);
    let status = |key: &str| {
        let config = ureq::Agent::config_builder().http_status_as_error(false).build();
        let request =
            ureq::Agent::from(config).get(server.at("/v1/tasks")).header("authorization", format!("Bearer {key}"));
        request.call().unwrap().status().as_u16()
    };
    assert_eq!((status(&first), status("ss-anything-else")), (200, 401));
    let options = ["--name", "second", "--task", "prompt7", "--expires", "2999-12-31", "--concurrent-requests", "4"];
    let (second, table) = new_key(home.path(), &options);
    std::fs::write(&file, &table).unwrap();
    let began = Instant::now();
    while status(&second) != 200 {
        assert!(began.elapsed() < Duration::from_secs(30), "the file is not read again");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(status(&first), 401, "a key that was taken out opens nothing");
    let refused = softserve(home.path()).args(["key", "--name", "x", "--expires", "soon"]).output().unwrap();
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("2027-01-31"));
}
