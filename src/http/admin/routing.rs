//! Which versions of a task answer: activate, split, roll back, aliases.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderMap, header},
    response::Response,
};

use super::{
    types::{ActiveVersions, AdminTask, AliasedVersion},
    with_change, with_etag,
};
use crate::{
    http::{
        AppState,
        access::Caller,
        audit::Change,
        blocking,
        extract::{AliasParam, Json, TaskParam},
        problem::Problem,
    },
    registry::{Activated, Activation, Registry, RegistryError},
};

/// Activate a version
///
/// Or several, each with its share of the requests that name no version. Requests with equal `x-softserve-split-key` headers get
/// the same one. Requests that run go on with the version they began with. With `If-Match`, nothing happens unless the task is
/// still in the state that the ETag names.
#[utoipa::path(put, path = "/v1/admin/tasks/{task}/active", tag = "admin",
    params(("task" = String, Path, description = "The task's name", example = "sentiment"),
        ("if-match" = Option<String>, Header, description = "The task's ETag, or *", example = "\"7\"")),
    request_body = ActiveVersions,
    responses((status = 200, body = AdminTask, description = "The task as it is now",
        headers(("etag" = String, description = "The task's generation")))),
    extensions(("x-problems" = json!(["invalid_request", "incomplete_body", "task_not_found", "version_not_found",
        "request_timeout", "precondition_failed", "body_too_large", "unsupported_media_type", "unavailable"]))))]
pub(in crate::http) async fn activate(
    State(app): State<AppState>,
    caller: Caller,
    TaskParam(task): TaskParam,
    headers: HeaderMap,
    Json(ActiveVersions { version, versions }): Json<ActiveVersions>,
) -> Result<Response, Problem> {
    let activation = match (version, versions) {
        (Some(version), None) => Activation::One(version),
        (None, Some(versions)) => Activation::Split(versions.into_iter().collect()),
        _ => return Err(Problem::field("version", "expected either \"version\" or \"versions\"")),
    };
    change(app, caller, task, &headers, move |registry, task, expected| registry.activate(task, &activation, expected))
        .await
}

/// Roll back
///
/// Makes the version active again that was active before the present one, and ends a split. Once more goes one further back.
#[utoipa::path(post, path = "/v1/admin/tasks/{task}/rollback", tag = "admin",
    params(("task" = String, Path, description = "The task's name", example = "sentiment"),
        ("if-match" = Option<String>, Header, description = "The task's ETag, or *", example = "\"7\"")),
    responses((status = 200, body = AdminTask, description = "The task as it is now",
        headers(("etag" = String, description = "The task's generation")))),
    extensions(("x-problems" = json!(["task_not_found", "no_previous_version", "precondition_failed"]))))]
pub(in crate::http) async fn roll_back(
    State(app): State<AppState>,
    caller: Caller,
    TaskParam(task): TaskParam,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    change(app, caller, task, &headers, |registry, task, expected| registry.roll_back(task, expected)).await
}

/// Name a version
///
/// `task@alias` is this version from now on. An alias survives an activation, and a version that has one cannot be deleted.
#[utoipa::path(put, path = "/v1/admin/tasks/{task}/aliases/{alias}", tag = "admin",
    params(("task" = String, Path, description = "The task's name", example = "sentiment"),
        ("alias" = String, Path, description = "The alias", example = "latest-approved"),
        ("if-match" = Option<String>, Header, description = "The task's ETag, or *", example = "\"7\"")),
    request_body = AliasedVersion,
    responses((status = 200, body = AdminTask, description = "The task as it is now",
        headers(("etag" = String, description = "The task's generation")))),
    extensions(("x-problems" = json!(["invalid_request", "incomplete_body", "task_not_found", "version_not_found",
        "no_active_version", "request_timeout", "precondition_failed", "body_too_large", "unsupported_media_type",
        "unavailable"]))))]
pub(in crate::http) async fn set_alias(
    State(app): State<AppState>,
    caller: Caller,
    AliasParam { task, alias }: AliasParam,
    headers: HeaderMap,
    Json(AliasedVersion { version }): Json<AliasedVersion>,
) -> Result<Response, Problem> {
    let set =
        move |registry: &Registry, task: &str, expected| registry.set_alias(task, &alias, Some(&version), expected);
    change(app, caller, task, &headers, set).await
}

/// Delete an alias
#[utoipa::path(delete, path = "/v1/admin/tasks/{task}/aliases/{alias}", tag = "admin",
    params(("task" = String, Path, description = "The task's name", example = "sentiment"),
        ("alias" = String, Path, description = "The alias", example = "latest-approved"),
        ("if-match" = Option<String>, Header, description = "The task's ETag, or *", example = "\"7\"")),
    responses((status = 200, body = AdminTask, description = "The task as it is now",
        headers(("etag" = String, description = "The task's generation")))),
    extensions(("x-problems" = json!(["invalid_request", "task_not_found", "version_not_found", "no_active_version",
        "precondition_failed"]))))]
pub(in crate::http) async fn delete_alias(
    State(app): State<AppState>,
    caller: Caller,
    AliasParam { task, alias }: AliasParam,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let delete = move |registry: &Registry, task: &str, expected| registry.set_alias(task, &alias, None, expected);
    change(app, caller, task, &headers, delete).await
}

/// Has the registry make a change, if the task is in a state that `If-Match` allows.
async fn change(
    app: AppState,
    caller: Caller,
    task: String,
    headers: &HeaderMap,
    change: impl FnOnce(&Registry, &str, Option<u64>) -> Result<Activated, RegistryError> + Send + 'static,
) -> Result<Response, Problem> {
    let allowed = if_match(headers)?;
    let registry = Arc::clone(&app.registry);
    let changed = move || {
        let expected = match allowed {
            Expected::Anything => None,
            Expected::OneOf(generations) => {
                // The registry compares with one: the present one if it is listed, else any.
                let now = registry.generation(&task)?;
                Some(if generations.contains(&now) { now } else { generations[0] })
            }
        };
        change(&registry, &task, expected)
    };
    let Activated { task: entry, before } = blocking(move || changed().map_err(|error| caller.problem(error))).await?;
    tracing::info!(task = %entry.task, active = entry.active, generation = entry.generation, "which versions answer was changed");
    let change = Change { version: entry.active.clone(), before, after: entry.active.clone() };
    Ok(with_change(change, with_etag(&app, entry)))
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
