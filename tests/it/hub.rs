//! `--model ORG/NAME` against a hub of the test's own, which serves a fixture as the real one does.

use std::path::PathBuf;

use axum::{
    Router,
    extract::Path,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::get,
};

use crate::{
    fixtures,
    process::{Process, output, softserve},
};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// One file, whole or a range of it, with the headers the hub's clients need.
async fn resolve(
    Path((_org, name, _revision, file)): Path<(String, String, String, String)>,
    headers: HeaderMap,
) -> Response {
    let Ok(bytes) = std::fs::read(fixtures::dir(&name).join(&file)) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let range = headers.get("range").and_then(|r| r.to_str().ok()?.strip_prefix("bytes=")?.split_once('-'));
    let (start, end) = match range {
        Some((start, "")) => (start.parse().unwrap(), bytes.len() - 1),
        Some((start, end)) => (start.parse().unwrap(), end.parse().unwrap()),
        None => (0, bytes.len() - 1),
    };
    let content_range = format!("bytes {start}-{end}/{}", bytes.len());
    let etag = format!("\"{}\"", file.replace('.', ""));
    let headers = [("etag", etag), ("x-repo-commit", COMMIT.into()), ("content-range", content_range)];
    (StatusCode::PARTIAL_CONTENT, headers, bytes[start..=end].to_vec()).into_response()
}

async fn info(Path((_org, name, _revision)): Path<(String, String, String)>) -> Response {
    let files = std::fs::read_dir(fixtures::dir(&name)).map_or_else(|_| Vec::new(), |d| d.flatten().collect());
    let siblings: Vec<_> =
        files.iter().map(|f| serde_json::json!({ "rfilename": f.file_name().to_string_lossy() })).collect();
    axum::Json(serde_json::json!({ "siblings": siblings, "sha": COMMIT })).into_response()
}

/// Starts a server on a model of the hub's, in a process since the hub's client reads its settings
/// from the environment. What it printed, and whether it came to listen.
fn serve(endpoint: &str, home: &std::path::Path, id: &str) -> (bool, String) {
    let mut command = softserve(home);
    command.args(["--listen", "127.0.0.1:0", "--model", id]).env("HF_ENDPOINT", endpoint).env("HF_HOME", home);
    if id.contains("absent") {
        let (code, _, error) = output(command);
        return (code == Some(0), error);
    }
    let process = Process::start(command);
    let (status, _) = process.get("/health/ready");
    (status == 200, process.summary.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_fetched_by_its_id_once_and_found_in_the_cache_without_a_network() {
    let app = Router::new()
        .route("/{org}/{name}/resolve/{revision}/{file}", get(resolve))
        .route("/api/models/{org}/{name}/revision/{revision}", get(info));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(async move { axum::serve(listener, app).await });
    let home: PathBuf = tempfile::tempdir().unwrap().keep();

    let run = |id: &'static str| {
        let (endpoint, home) = (endpoint.clone(), home.clone());
        tokio::task::spawn_blocking(move || serve(&endpoint, &home, id))
    };
    // The one with shards, and one of a single file.
    for id in ["test/llama-scaled", "test/qwen2"] {
        let (ok, output) = run(id).await.unwrap();
        assert!(ok && output.contains(id), "{output}");
    }
    let (ok, output) = run("test/absent").await.unwrap();
    assert!(!ok && output.contains("test/absent") && output.contains("config.json"), "{output}");
    server.abort();
    let _ = server.await;
    let (ok, output) = run("test/llama-scaled").await.unwrap();
    assert!(ok, "{output}");
    std::fs::remove_dir_all(home).unwrap();
}
