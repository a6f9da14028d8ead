//! A server without a socket, and what tests send to it and read from it, or from its engine.

use std::{path::Path, sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{HeaderMap, Request, StatusCode, header},
};
use bytes::Bytes;
use candle_core::DType;
use serde_json::{Value, json};
use softserve::{
    config::{Access, KeySources, Limits, ServeArgs},
    engine::{
        Engine, EngineConfig, EventStream,
        request::{Event, FinishReason},
    },
    http::{App, AppState, Settings, audit::AuditLog, router},
    model::{ChatFiles, Model},
    prompt::format::Fit,
    registry::{Registry, RegistryConfig},
    tokenizer::Tokenizer,
};
use tower::ServiceExt as _;

use crate::fixtures;

/// The fixture model that the servers of these tests run: random, so it says nothing sensible,
/// but the same each time. Its context is 512 positions.
pub const MODEL: &str = "llama-tied";

/// A task that is there from the start; its prompt takes 7 positions.
pub const TASK: &str = "prompt7";

/// A server with the fixture's prompts as its tasks.
pub struct Server {
    pub app: AppState,
    pub prompts: tempfile::TempDir,
    router: Router,
}

/// What differs from a server with default options on a loopback address.
pub struct Options {
    /// The fixture model, with its prompts.
    pub model: &'static str,
    pub engine: EngineConfig,
    pub limits: Limits,
    pub access: Access,
    pub audit: AuditLog,
    /// How conversations become texts, in place of what the fixture says.
    pub chat: Option<ChatFiles>,
}

impl Default for Options {
    fn default() -> Self {
        let config = ServeArgs::default().check().unwrap();
        let engine = EngineConfig { kv_cache_bytes: 8 << 20, ..EngineConfig::default() };
        Self {
            model: MODEL,
            engine,
            limits: config.limits,
            access: config.access,
            audit: AuditLog::default(),
            chat: None,
        }
    }
}

impl Options {
    pub fn with_keys(api: &[&str], admin: &[&str], loopback: bool) -> Self {
        let keys = |keys: &[&str]| keys.iter().map(|k| (*k).to_owned()).collect::<Vec<_>>();
        let sources = KeySources { api_keys: keys(api), admin_keys: keys(admin), ..KeySources::default() };
        Self { access: Access::open(sources, loopback).unwrap(), ..Self::default() }
    }

    /// With a file of keys of this content.
    pub fn with_key_file(text: &str) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let sources = KeySources { keys: Some(file.path().to_owned()), ..KeySources::default() };
        Self { access: Access::open(sources, true).unwrap(), ..Self::default() }
    }

    pub fn start(self) -> Server {
        let (model, tokenizer) = (fixtures::load(self.model, DType::F32), fixtures::tokenizer(self.model));
        let prompts = fixtures::dir(self.model).join("prompts");
        self.start_with(model, tokenizer, &prompts)
    }

    /// A server with another model, and the prompts of a folder.
    pub fn start_with(self, model: Model, tokenizer: Tokenizer, prompts_of: &Path) -> Server {
        let prompts = tempfile::tempdir().unwrap();
        copy(prompts_of, prompts.path());
        let mut info = model.info().clone();
        if let Some(chat) = self.chat {
            info.chat = chat;
        }
        let (engine, _thread) = Engine::start(model, self.engine).unwrap();
        let fit = Fit::from(&info);
        let registry = Registry::open(RegistryConfig {
            root: prompts.path().to_owned().into(),
            poll_interval: Duration::from_secs(5),
            keep: None,
            fit,
            max_tasks: self.limits.max_tasks,
            max_versions_per_task: self.limits.max_versions,
            max_loaded_bytes: self.limits.prompt_memory,
        })
        .unwrap();
        let files = prompts.path().join(".files");
        let settings = Settings { limits: self.limits, access: self.access, audit: self.audit, files };
        let app = App::new(engine, registry, tokenizer, info, settings).unwrap();
        Server { router: router(Arc::clone(&app)), app, prompts }
    }
}

impl Server {
    pub fn start() -> Self {
        Options::default().start()
    }

    pub async fn call(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (head, body) = response.into_parts();
        let body = to_bytes(body, 64 << 20).await.unwrap();
        Answer { status: head.status, headers: head.headers, body }
    }

    /// The response as it begins, its body not read.
    pub async fn begin(&self, request: Request<Body>) -> axum::response::Response {
        self.router.clone().oneshot(request).await.unwrap()
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.call(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.call(Request::delete(path).body(Body::empty()).unwrap()).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.call(post(path, "application/json", body.to_string())).await
    }

    pub async fn generate(&self, body: &Value) -> Answer {
        self.post(&format!("/v1/tasks/{TASK}/generate"), body).await
    }

    pub async fn upload(&self, task: &str, content_type: &str, body: impl Into<Body>) -> Answer {
        self.call(post(&format!("/v1/admin/tasks/{task}/versions"), content_type, body)).await
    }

    pub async fn activate(&self, task: &str, version: &str, if_match: Option<&str>) -> Answer {
        let mut request = Request::put(format!("/v1/admin/tasks/{task}/active"))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Body::from(json!({"version": version}).to_string()))
            .unwrap();
        if let Some(tag) = if_match {
            request.headers_mut().insert(header::IF_MATCH, tag.parse().unwrap());
        }
        self.call(request).await
    }
}

/// All tokens of a stream, why it ended, and how many positions of its input were found in the cache.
pub fn collect(mut stream: EventStream) -> (Vec<u32>, FinishReason, usize) {
    let mut ids = Vec::new();
    loop {
        match stream.blocking_next().expect("an event before the end") {
            Event::Token(token) => ids.push(token.id),
            Event::Finished { reason, cached_tokens } => {
                // Told with the first token.
                assert!(ids.is_empty() || stream.cached_tokens() == cached_tokens);
                return (ids, reason, cached_tokens);
            }
            Event::Scored { .. } | Event::NotFinite | Event::NoTokenAllowed(_) | Event::Failed => {
                panic!("the request failed")
            }
        }
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    /// The JSON of an answer that is none of the problems.
    pub fn ok(&self) -> Value {
        assert!(self.status.is_success(), "{}: {}", self.status, self.text());
        self.json()
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no header {name}")).to_str().unwrap()
    }

    /// The `data:` lines of a streamed answer.
    pub fn events(&self) -> Vec<&str> {
        assert_eq!(self.header("content-type"), "text/event-stream");
        self.text().lines().filter_map(|line| line.strip_prefix("data: ")).collect()
    }
}

pub fn post(path: &str, content_type: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path).header(header::CONTENT_TYPE, content_type).body(body.into()).unwrap()
}

/// The content type and body of a form.
pub fn form(parts: &[(&str, &[u8])]) -> (&'static str, Vec<u8>) {
    let mut body = Vec::new();
    for (name, content) in parts {
        body.extend(format!("--edge\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n").into_bytes());
        body.extend(*content);
        body.extend(b"\r\n");
    }
    body.extend(b"--edge--\r\n");
    ("multipart/form-data; boundary=edge", body)
}

/// The files of one of the fixture's prompts: configuration and weights.
pub fn prompt_files(name: &str) -> (Vec<u8>, Vec<u8>) {
    let folder = fixtures::dir(MODEL).join("prompts").join(name);
    let read = |file| std::fs::read(folder.join(file)).unwrap();
    (read("adapter_config.json"), read("adapter_model.safetensors"))
}

/// A safetensors file with `prompt_embeddings` of this shape, every value the same.
pub fn weights(rows: usize, columns: usize, value: f32) -> Vec<u8> {
    let data: Vec<u8> = std::iter::repeat_n(value.to_le_bytes(), rows * columns).flatten().collect();
    let tensor = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![rows, columns], &data).unwrap();
    safetensors::serialize([("prompt_embeddings", tensor)], None).unwrap()
}

pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// A time that no test takes unless it hangs.
pub const LONG: Duration = Duration::from_secs(60);
