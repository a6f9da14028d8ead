//! Uploading, activating, deleting and looking into tasks. The registry blocks on the disk, so its calls run off
//! the async threads.

mod contents;
mod types;
mod upload;

use std::sync::Arc;

use axum::{
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use metrics::counter;
use utoipa_axum::{router::OpenApiRouter, routes};

use self::{
    types::{ActiveVersion, AdminTask, AdminTaskList, AdminVersion, Binary, UploadForm, UploadQuery, Uploaded},
    upload::store,
};
use super::{
    App, AppState, blocking,
    extract::{Json, Query, TaskParam, VersionParam},
    problem::{Code, Problem},
};
use crate::{registry::TaskEntry, telemetry};

/// The admin routes. All lie under `/v1/admin`, which [`super::access`] closes.
pub(super) fn routes() -> OpenApiRouter<AppState> {
    // Bodies are read by `read_body`, within --max-upload.
    OpenApiRouter::new()
        .routes(routes!(upload, list_versions))
        .routes(routes!(get_version, delete_version))
        .routes(routes!(contents::curve))
        .routes(routes!(contents::nearest))
        .routes(routes!(list_all))
        .routes(routes!(activate))
        .routes(routes!(delete_task))
        .layer(DefaultBodyLimit::disable())
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
        "prompt_not_finite", "logits_not_finite", "unsupported_prompt_type", "base_model_mismatch", "invalid_task_file", "overloaded", "unavailable"]))))]
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
        "request_timeout", "precondition_failed", "body_too_large", "unsupported_media_type", "unavailable"]))))]
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
