//! Uploading, activating, deleting and looking into tasks. The registry blocks on the disk, so its calls run off
//! the async threads.

mod contents;
mod gate;
mod routing;
mod types;
mod upload;

use std::sync::Arc;

use axum::{
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use metrics::counter;
use utoipa_axum::{router::OpenApiRouter, routes};

use self::{
    types::{AdminTask, AdminTaskList, AdminVersion, Binary, UploadForm, UploadQuery, Uploaded},
    upload::store,
};
use super::{
    App, AppState,
    access::Caller,
    audit::Change,
    blocking,
    extract::{NameRange, Query, TaskParam, VersionParam},
    problem::Problem,
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
        .routes(routes!(routing::activate))
        .routes(routes!(routing::roll_back))
        .routes(routes!(routing::set_alias, routing::delete_alias))
        .routes(routes!(delete_task))
        .layer(DefaultBodyLimit::disable())
}

/// Upload a version
///
/// A single safetensors file, a zip or tar(.gz) of a PEFT directory, or a form with its files. All
/// of it is checked before anything is visible; what is wrong is listed in full, and the task
/// stays as it was. The same upload again is the same version.
///
/// With `gate` the version is compared with the active one first, on the examples that the upload carries as `eval.jsonl`
/// (one JSON object a line, with `input` and `label` or `output`): a version that scores worse is stored and not activated, and
/// the answer says by how much.
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
        "prompt_not_finite", "logits_not_finite", "unsupported_prompt_type", "base_model_mismatch", "invalid_task_file", "input_too_long", "no_labels",
        "overloaded", "unavailable", "timeout"]))))]
pub(super) async fn upload(
    State(app): State<AppState>,
    caller: Caller,
    TaskParam(task): TaskParam,
    Query(query): Query<UploadQuery>,
    request: Request,
) -> Result<Response, Problem> {
    let outcome = store(&app, &caller, &task, &query, request).await;
    let label = outcome.as_ref().map_or_else(|p| p.code.as_str(), |(u, _)| if u.created { "created" } else { "known" });
    counter!(telemetry::UPLOADS, "outcome" => label).increment(1);
    let (uploaded, change) = outcome?;
    let location = format!("/v1/admin/tasks/{}/versions/{}", uploaded.task, uploaded.meta.version);
    tracing::info!(task = %uploaded.task, version = uploaded.meta.version, created = uploaded.created,
        active = uploaded.active, "a version was uploaded");
    let status = if uploaded.created { StatusCode::CREATED } else { StatusCode::OK };
    let etag = etag(uploaded.generation);
    let response =
        (status, [(header::LOCATION, location)], [(header::ETAG, etag)], axum::Json(uploaded)).into_response();
    Ok(with_change(change, response))
}

/// List everything
///
/// Every task with its versions, what is known of them and where they are.
#[utoipa::path(get, path = "/v1/admin/tasks", tag = "admin",
    params(NameRange),
    responses((status = 200, body = AdminTaskList, description = "The tasks by name")),
    extensions(("x-problems" = json!(["invalid_request"]))))]
pub(super) async fn list_all(
    State(app): State<AppState>,
    caller: Caller,
    Query(range): Query<NameRange>,
) -> Result<axum::Json<AdminTaskList>, Problem> {
    let limit = range.limit()?;
    let registry = Arc::clone(&app.registry);
    let listed = move || registry.tasks_page(range.after.as_deref(), limit, |task| caller.sees(task));
    let page = blocking(move || Ok::<_, Problem>(listed())).await?;
    let tasks = page.items.into_iter().map(|entry| AdminTask::new(&app, entry)).collect();
    Ok(axum::Json(AdminTaskList { tasks, next: page.next }))
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
    caller: Caller,
    TaskParam(task): TaskParam,
) -> Result<Response, Problem> {
    let registry = Arc::clone(&app.registry);
    let entry = blocking(move || registry.task(&task).map_err(|error| caller.problem(error))).await?;
    Ok(with_etag(&app, entry))
}

/// Show a version
#[utoipa::path(get, path = "/v1/admin/tasks/{task}/versions/{version}", tag = "admin",
    params(("task" = String, Path, description = "The task's name", example = "sentiment"),
        ("version" = String, Path, description = "The version's id", example = "3f9a0c1b2d4e")),
    responses((status = 200, body = AdminVersion, description = "The version")),
    extensions(("x-problems" = json!(["task_not_found", "version_not_found"]))))]
pub(super) async fn get_version(
    State(app): State<AppState>,
    caller: Caller,
    VersionParam { task, version }: VersionParam,
) -> Result<axum::Json<AdminVersion>, Problem> {
    let registry = Arc::clone(&app.registry);
    let found = move || registry.version(&task, &version).map_err(|error| caller.problem(error));
    let entry = blocking(found).await?;
    Ok(axum::Json(AdminVersion::new(&app, entry)))
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
    caller: Caller,
    TaskParam(task): TaskParam,
) -> Result<Response, Problem> {
    let registry = Arc::clone(&app.registry);
    let name = task.clone();
    let before = blocking(move || registry.delete_task(&name).map_err(|error| caller.problem(error))).await?;
    tracing::info!(task, "a task was deleted");
    Ok(with_change(Change { before, ..Change::default() }, StatusCode::NO_CONTENT.into_response()))
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
    caller: Caller,
    VersionParam { task, version }: VersionParam,
) -> Result<Response, Problem> {
    let registry = Arc::clone(&app.registry);
    let name = task.clone();
    let delete = move || registry.delete_version(&name, &version).map_err(|error| caller.problem(error));
    let (version, active) = blocking(delete).await?;
    tracing::info!(task, version, "a version was deleted");
    let change = Change { version: Some(version), before: active.clone(), after: active };
    Ok(with_change(change, StatusCode::NO_CONTENT.into_response()))
}

fn etag(generation: u64) -> String {
    format!("\"{generation}\"")
}

/// A response with what the audit log says of it.
fn with_change(change: Change, mut response: Response) -> Response {
    response.extensions_mut().insert(change);
    response
}

fn with_etag(app: &App, entry: TaskEntry) -> Response {
    let etag = etag(entry.generation);
    let mut response = axum::Json(AdminTask::new(app, entry)).into_response();
    if let Ok(value) = HeaderValue::from_str(&etag) {
        response.headers_mut().insert(header::ETAG, value);
    }
    response
}
