//! Uploading, activating and deleting tasks. The registry blocks on the disk, so its calls run off
//! the async threads.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{DefaultBodyLimit, FromRequest as _, Multipart, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use metrics::counter;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    App, AppState, blocking,
    extract::{Json, Query, TaskParam, VersionParam, media_type, read_body},
    problem::{Code, Problem},
    types::VersionMeta,
};
use crate::{
    engine::request::CacheRoot,
    prompt::{TaskName, format::PromptFiles},
    registry::{
        TaskEntry,
        package::{Packing, unpack},
    },
    telemetry,
};

/// The admin routes. All lie under `/v1/admin`, which [`super::access`] closes.
pub(super) fn routes() -> OpenApiRouter<AppState> {
    // Bodies are read by `read_body`, within --max-upload.
    OpenApiRouter::new()
        .routes(routes!(upload, list_versions))
        .routes(routes!(get_version, delete_version))
        .routes(routes!(list_all))
        .routes(routes!(activate))
        .routes(routes!(delete_task))
        .layer(DefaultBodyLimit::disable())
}

/// How to treat an upload.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct UploadQuery {
    /// Whether the version answers from now on; `false` only stores it.
    #[serde(default = "yes")]
    #[param(default = true)]
    pub activate: bool,
}

fn yes() -> bool {
    true
}

/// What an upload did.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"task": "sentiment", "created": true, "active": true, "generation": 1,
    "version": "3f9a0c1b2d4e", "kind": "embeddings", "peft_type": "PROMPT_TUNING", "virtual_tokens": 20,
    "template": "{{ input }}", "labels": {}, "defaults": {"max_tokens": 4}, "limits": {},
    "metrics": {"accuracy": 0.94}, "warnings": []}))]
pub struct Uploaded {
    #[schema(value_type = String, example = "sentiment")]
    pub task: TaskName,
    /// False when the very same version was there before.
    pub created: bool,
    pub active: bool,
    /// Goes up by one with each change of the active version.
    #[schema(example = 1)]
    pub generation: u64,
    #[serde(flatten)]
    pub meta: VersionMeta,
}

/// A multipart upload: the files of a PEFT directory.
#[derive(Debug, ToSchema)]
#[allow(dead_code, reason = "it is there for its schema")]
pub struct UploadForm {
    #[schema(rename = "adapter_config.json", content_media_type = "application/json")]
    #[serde(rename = "adapter_config.json")]
    adapter_config: String,
    #[serde(rename = "adapter_model.safetensors")]
    #[schema(format = Binary)]
    adapter_model: String,
    #[serde(rename = "task.json")]
    task: Option<String>,
}

/// The bytes of a file.
#[derive(Debug, ToSchema)]
#[schema(value_type = String, format = Binary)]
#[allow(dead_code, reason = "it is there for its schema")]
pub struct Binary(Vec<u8>);

/// The version that answers from now on.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"version": "3f9a0c1b2d4e"}))]
pub struct ActiveVersion {
    pub version: String,
}

/// A task with all its versions.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"task": "sentiment", "generation": 1, "active": "3f9a0c1b2d4e", "versions": [{
    "version": "3f9a0c1b2d4e", "kind": "embeddings", "peft_type": "PROMPT_TUNING", "virtual_tokens": 20,
    "template": "{{ input }}", "labels": {}, "defaults": {"max_tokens": 4}, "limits": {},
    "metrics": {"accuracy": 0.94}, "warnings": [],
    "active": true, "stored_at": 1_795_414_325, "residency": {"device": "cpu", "bytes": 10240, "cache": "resident"}}]}))]
pub struct AdminTask {
    #[schema(value_type = String, example = "sentiment")]
    pub task: TaskName,
    /// Goes up by one with each change of the active version; the ETag is made of it.
    pub generation: u64,
    /// The version that answers, if one does.
    #[schema(example = "3f9a0c1b2d4e")]
    pub active: Option<String>,
    pub versions: Vec<AdminVersion>,
}

/// Every task with all its versions.
#[derive(Debug, Serialize, ToSchema)]
pub struct AdminTaskList {
    pub tasks: Vec<AdminTask>,
}

/// One version.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"version": "3f9a0c1b2d4e", "kind": "embeddings", "peft_type": "PROMPT_TUNING", "virtual_tokens": 20,
    "template": "{{ input }}", "labels": {}, "defaults": {"max_tokens": 4}, "limits": {},
    "metrics": {"accuracy": 0.94}, "warnings": [],
    "active": true, "stored_at": 1_795_414_325, "residency": {"device": "cpu", "bytes": 10240, "cache": "resident"}}))]
pub struct AdminVersion {
    #[serde(flatten)]
    pub meta: VersionMeta,
    pub active: bool,
    /// Seconds since 1970 when it was stored.
    pub stored_at: u64,
    pub residency: Residency,
}

/// Where a version's tensors are.
#[derive(Debug, Serialize, ToSchema)]
pub struct Residency {
    /// The device that holds them.
    #[schema(example = "cpu")]
    pub device: String,
    /// How much of its memory they take.
    pub bytes: usize,
    /// Whether the keys and values of all its virtual tokens are in the cache.
    pub cache: CacheState,
}

/// Where the keys and values of a learned prompt are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CacheState {
    /// In the cache: a request computes its text only.
    Resident,
    /// Not in the cache, or not all of them: the next request computes them.
    Cold,
}

/// Upload a version
///
/// A single safetensors file, a zip or tar(.gz) of a PEFT directory, or a form with its files. All
/// of it is checked before anything is visible; what is wrong is listed in full, and the task
/// stays as it was. The same upload again is the same version.
#[utoipa::path(post, path = "/v1/admin/tasks/{task}/versions", tag = "admin",
    params(("task" = String, Path, description = "The task's name; made if it is new", example = "sentiment"), UploadQuery),
    request_body(description = "The learned prompt", content(
        (Binary = "application/octet-stream"), (Binary = "application/zip"), (Binary = "application/x-tar"),
        (Binary = "application/gzip"), (UploadForm = "multipart/form-data"))),
    responses(
        (status = 201, body = Uploaded, description = "Stored; Location names it",
            headers(("location" = String, description = "The version"))),
        (status = 200, body = Uploaded, description = "It was there already")),
    extensions(("x-problems" = json!(["invalid_request", "invalid_upload", "incomplete_body", "request_timeout",
        "registry_full", "body_too_large", "unsupported_media_type", "prompt_malformed", "prompt_shape_mismatch",
        "prompt_not_finite", "unsupported_prompt_type", "base_model_mismatch", "invalid_task_file", "overloaded"]))))]
pub(super) async fn upload(
    State(app): State<AppState>,
    TaskParam(task): TaskParam,
    Query(query): Query<UploadQuery>,
    request: Request,
) -> Result<Response, Problem> {
    let outcome = store(&app, &task, query.activate, request).await;
    let label = outcome.as_ref().map_or_else(|p| p.code.as_str(), |u| if u.created { "created" } else { "known" });
    counter!(telemetry::UPLOADS, "outcome" => label).increment(1);
    let uploaded = outcome?;
    let location = format!("/v1/admin/tasks/{}/versions/{}", uploaded.task, uploaded.meta.version);
    tracing::info!(task = %uploaded.task, version = uploaded.meta.version, created = uploaded.created,
        active = uploaded.active, "a version was uploaded");
    let status = if uploaded.created { StatusCode::CREATED } else { StatusCode::OK };
    let etag = etag(uploaded.generation);
    Ok((status, [(header::LOCATION, location)], [(header::ETAG, etag)], axum::Json(uploaded)).into_response())
}

/// List everything
///
/// Every task with its versions, what is known of them and where they are.
#[utoipa::path(get, path = "/v1/admin/tasks", tag = "admin",
    responses((status = 200, body = AdminTaskList, description = "The tasks by name")))]
pub(super) async fn list_all(State(app): State<AppState>) -> axum::Json<AdminTaskList> {
    let tasks = app.registry.tasks().into_iter().map(|entry| AdminTask::new(&app, entry)).collect();
    axum::Json(AdminTaskList { tasks })
}

/// List a task's versions
///
/// The ETag is the state of the task for `If-Match`.
#[utoipa::path(get, path = "/v1/admin/tasks/{task}/versions", tag = "admin",
    params(("task" = String, Path, description = "The task's name", example = "sentiment")),
    responses((status = 200, body = AdminTask, description = "The task with its versions",
        headers(("etag" = String, description = "The task's generation")))),
    extensions(("x-problems" = json!(["task_not_found"]))))]
pub(super) async fn list_versions(
    State(app): State<AppState>,
    TaskParam(task): TaskParam,
) -> Result<Response, Problem> {
    Ok(with_etag(&app, app.registry.task(&task)?))
}

/// Show a version
#[utoipa::path(get, path = "/v1/admin/tasks/{task}/versions/{version}", tag = "admin",
    params(("task" = String, Path, description = "The task's name", example = "sentiment"),
        ("version" = String, Path, description = "The version's id", example = "3f9a0c1b2d4e")),
    responses((status = 200, body = AdminVersion, description = "The version")),
    extensions(("x-problems" = json!(["task_not_found", "version_not_found"]))))]
pub(super) async fn get_version(
    State(app): State<AppState>,
    VersionParam { task, version }: VersionParam,
) -> Result<axum::Json<AdminVersion>, Problem> {
    // `resolve` knows how to say that there is none.
    let found = app.registry.resolve(&task, Some(&version))?;
    let entry = AdminTask::new(&app, app.registry.task(&task)?);
    let id = found.digest.id();
    let found = entry.versions.into_iter().find(|v| v.meta.version == id);
    found.map(axum::Json).ok_or_else(|| Problem::new(Code::VersionNotFound, "the version has just been deleted"))
}

/// Activate a version
///
/// Requests that run go on with the version they began with. With `If-Match`, nothing happens
/// unless the task is still in the state that the ETag names.
#[utoipa::path(put, path = "/v1/admin/tasks/{task}/active", tag = "admin",
    params(("task" = String, Path, description = "The task's name", example = "sentiment"),
        ("if-match" = Option<String>, Header, description = "The task's ETag, or *", example = "\"7\"")),
    request_body = ActiveVersion,
    responses((status = 200, body = AdminTask, description = "The task as it is now",
        headers(("etag" = String, description = "The task's generation")))),
    extensions(("x-problems" = json!(["invalid_request", "incomplete_body", "task_not_found", "version_not_found",
        "request_timeout", "precondition_failed", "body_too_large", "unsupported_media_type"]))))]
pub(super) async fn activate(
    State(app): State<AppState>,
    TaskParam(task): TaskParam,
    headers: HeaderMap,
    Json(ActiveVersion { version }): Json<ActiveVersion>,
) -> Result<Response, Problem> {
    let expected = if_match(&headers)?;
    let registry = Arc::clone(&app.registry);
    let entry = blocking(move || {
        let expected = match expected {
            Expected::Anything => None,
            Expected::OneOf(generations) => {
                // The registry compares with one: the present one if it is listed, else any.
                let now = registry.task(&task)?.generation;
                Some(if generations.contains(&now) { now } else { generations[0] })
            }
        };
        registry.activate(&task, &version, expected)
    })
    .await?;
    let active = entry.active.as_ref().map(|v| v.digest.id());
    tracing::info!(task = %entry.task, active, generation = entry.generation, "a version was activated");
    Ok(with_etag(&app, entry))
}

/// Delete a task
///
/// With all its versions. Requests that run finish on what they hold.
#[utoipa::path(delete, path = "/v1/admin/tasks/{task}", tag = "admin",
    params(("task" = String, Path, description = "The task's name", example = "sentiment")),
    responses((status = 204, description = "It is gone")),
    extensions(("x-problems" = json!(["task_not_found"]))))]
pub(super) async fn delete_task(
    State(app): State<AppState>,
    TaskParam(task): TaskParam,
) -> Result<StatusCode, Problem> {
    let registry = Arc::clone(&app.registry);
    let name = task.clone();
    blocking(move || registry.delete_task(&name)).await?;
    tracing::info!(task, "a task was deleted");
    Ok(StatusCode::NO_CONTENT)
}

/// Delete a version
///
/// The active version only if it is the last of its task.
#[utoipa::path(delete, path = "/v1/admin/tasks/{task}/versions/{version}", tag = "admin",
    params(("task" = String, Path, description = "The task's name", example = "sentiment"),
        ("version" = String, Path, description = "The version's id", example = "3f9a0c1b2d4e")),
    responses((status = 204, description = "It is gone")),
    extensions(("x-problems" = json!(["task_not_found", "version_not_found", "version_active"]))))]
pub(super) async fn delete_version(
    State(app): State<AppState>,
    VersionParam { task, version }: VersionParam,
) -> Result<StatusCode, Problem> {
    let registry = Arc::clone(&app.registry);
    let (name, id) = (task.clone(), version.clone());
    blocking(move || registry.delete_version(&name, &id)).await?;
    tracing::info!(task, version, "a version was deleted");
    Ok(StatusCode::NO_CONTENT)
}

async fn store(app: &AppState, task: &str, activate: bool, request: Request) -> Result<Uploaded, Problem> {
    let task: TaskName = task.parse()?;
    let _permit = app.uploads.try_acquire().map_err(|_| {
        let limit = app.limits.max_concurrent_uploads;
        Problem::new(Code::Overloaded, format!("{limit} uploads are under way, which is as many as may: try again"))
    })?;
    let package = Package::of(request.headers())?;
    let (parts, body) = request.into_parts();
    let head = Request::from_parts(parts.clone(), body);
    let body = read_body(head, app.limits.max_upload, app).await?;
    let limit = app.limits.max_upload;
    let files = match package {
        Package::Packed(packing) => blocking(move || unpack(packing, body, limit)).await?,
        Package::Form => form(parts, body).await?,
    };
    let registry = Arc::clone(&app.registry);
    let published = blocking(move || registry.publish(task, files, activate)).await?;
    Ok(Uploaded {
        task: published.version.task.clone(),
        created: published.created,
        active: published.active,
        generation: published.generation,
        meta: (&*published.version).into(),
    })
}

/// How an upload is packed.
enum Package {
    Packed(Packing),
    Form,
}

impl Package {
    fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let media_type = media_type(headers);
        Ok(match media_type.as_deref() {
            Some("application/octet-stream") => Self::Packed(Packing::Safetensors),
            Some("application/zip" | "application/x-zip-compressed") => Self::Packed(Packing::Zip),
            Some("application/x-tar") => Self::Packed(Packing::Tar),
            Some("application/gzip" | "application/x-gzip" | "application/x-gtar") => Self::Packed(Packing::TarGz),
            Some("multipart/form-data") => Self::Form,
            found => {
                let detail = format!(
                    "found {}, expected application/octet-stream for one safetensors file, application/zip, \
                     application/x-tar or application/gzip for a PEFT directory, or multipart/form-data for its files",
                    found.unwrap_or("no content type")
                );
                return Err(Problem::new(Code::UnsupportedMediaType, detail));
            }
        })
    }
}

/// A form's parts, by their names or else by their files' names.
async fn form(parts: Parts, body: Bytes) -> Result<PromptFiles, Problem> {
    let damaged = |e: String| Problem::new(Code::InvalidUpload, format!("the upload is not a readable form: {e}"));
    let request = Request::from_parts(parts, Body::from(body));
    let mut form = Multipart::from_request(request, &()).await.map_err(|e| damaged(e.body_text()))?;
    let mut files = PromptFiles::default();
    while let Some(part) = form.next_field().await.map_err(|e| damaged(e.body_text()))? {
        let names = [part.name(), part.file_name()].map(|n| n.unwrap_or_default().to_owned());
        let place = match names.iter().map(String::as_str).find(|n| KNOWN_FILES.contains(n)) {
            Some("adapter_config.json") => &mut files.adapter_config,
            Some("adapter_model.safetensors") => &mut files.weights,
            Some("task.json") => &mut files.task,
            _ => {
                let found: String = names[0].chars().take(80).collect();
                let detail = format!("found a part named {found:?}, expected one of: {}", KNOWN_FILES.join(", "));
                return Err(Problem::new(Code::InvalidUpload, detail));
            }
        };
        if place.is_some() {
            return Err(Problem::new(Code::InvalidUpload, format!("the part {:?} is there twice", names[0])));
        }
        *place = Some(part.bytes().await.map_err(|e| damaged(e.body_text()))?);
    }
    files.check_complete()?;
    Ok(files)
}

const KNOWN_FILES: [&str; 3] = ["adapter_config.json", "adapter_model.safetensors", "task.json"];

/// The states of a task that an `If-Match` header allows.
enum Expected {
    Anything,
    /// At least one.
    OneOf(Vec<u64>),
}

fn if_match(headers: &HeaderMap) -> Result<Expected, Problem> {
    let Some(value) = headers.get(header::IF_MATCH) else { return Ok(Expected::Anything) };
    let text = value.to_str().unwrap_or_default();
    if text.trim() == "*" {
        return Ok(Expected::Anything);
    }
    let tag = |tag: &str| tag.trim().strip_prefix('"')?.strip_suffix('"')?.parse().ok();
    text.split(',').map(tag).collect::<Option<Vec<_>>>().map(Expected::OneOf).ok_or_else(|| {
        Problem::field("if-match", format!("found {text:?}, expected * or an ETag of the task such as \"7\""))
    })
}

fn etag(generation: u64) -> String {
    format!("\"{generation}\"")
}

fn with_etag(app: &App, entry: TaskEntry) -> Response {
    let etag = etag(entry.generation);
    let mut response = axum::Json(AdminTask::new(app, entry)).into_response();
    if let Ok(value) = HeaderValue::from_str(&etag) {
        response.headers_mut().insert(header::ETAG, value);
    }
    response
}

impl AdminTask {
    fn new(app: &App, entry: TaskEntry) -> Self {
        let device = match app.model.device {
            candle_core::Device::Cpu => "cpu",
            candle_core::Device::Cuda(_) => "cuda",
            candle_core::Device::Metal(_) => "metal",
        };
        let version = |entry: crate::registry::VersionEntry| AdminVersion {
            meta: (&*entry.version).into(),
            active: entry.active,
            stored_at: entry.stored_at.duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_secs()),
            residency: Residency {
                device: device.to_owned(),
                bytes: entry.version.prompt.num_bytes(),
                cache: match app.engine.is_cached(CacheRoot(entry.version.digest.0)) {
                    true => CacheState::Resident,
                    false => CacheState::Cold,
                },
            },
        };
        Self {
            task: entry.task,
            generation: entry.generation,
            active: entry.active.map(|v| v.digest.id()),
            versions: entry.versions.into_iter().map(version).collect(),
        }
    }
}
