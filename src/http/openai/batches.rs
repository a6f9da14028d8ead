//! `/v1/batches`: a file of requests answered in the background, after all that somebody waits for.

mod work;

use std::{collections::BTreeMap, sync::Arc};

use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    files::{self, List, ListQuery, new_id, now},
    request::read,
};
use crate::{
    config::TaskPatterns,
    http::{
        App, AppState,
        access::Caller,
        blocking,
        extract::{Json, Query},
        problem::{Code, Problem},
    },
};
pub use work::{Work, resume};

/// A batch, with whose it is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BatchRecord {
    pub tenant: u64,
    pub batch: Batch,
    /// The ids that its files have, or will have.
    pub output_id: String,
    pub error_id: String,
    /// Patterns of the tasks that its lines may use.
    #[serde(default = "every_task")]
    pub tasks: Vec<String>,
}

fn every_task() -> Vec<String> {
    TaskPatterns::all().patterns().to_vec()
}

/// How far a batch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = OpenAiBatchStatus)]
pub enum Status {
    Validating,
    Failed,
    InProgress,
    Finalizing,
    Completed,
    Expired,
    Cancelling,
    Cancelled,
}

impl Status {
    /// Whether nothing happens to the batch any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Failed | Self::Completed | Self::Expired | Self::Cancelled)
    }
}

/// A batch. Times are seconds since 1970.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[schema(as = OpenAiBatch)]
pub struct Batch {
    #[schema(example = "batch_019a1b2c3d4e7f80912233445566778a")]
    pub id: String,
    /// `batch`.
    pub object: String,
    /// The path of every request.
    pub endpoint: String,
    /// What is wrong with the file of a failed batch.
    pub errors: Option<BatchErrors>,
    pub input_file_id: String,
    pub completion_window: String,
    pub status: Status,
    /// The answers, once the batch has ended.
    pub output_file_id: Option<String>,
    /// The requests that were refused, once the batch has ended; null if there is none.
    pub error_file_id: Option<String>,
    pub created_at: u64,
    pub in_progress_at: Option<u64>,
    pub expires_at: Option<u64>,
    pub finalizing_at: Option<u64>,
    pub completed_at: Option<u64>,
    pub failed_at: Option<u64>,
    pub expired_at: Option<u64>,
    pub cancelling_at: Option<u64>,
    pub cancelled_at: Option<u64>,
    pub request_counts: RequestCounts,
    pub metadata: Option<BTreeMap<String, String>>,
}

/// What came of the requests so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = OpenAiRequestCounts)]
pub struct RequestCounts {
    pub total: u64,
    pub completed: u64,
    pub failed: u64,
}

/// What is wrong with a batch's file.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[schema(as = OpenAiBatchErrors)]
pub struct BatchErrors {
    pub object: String,
    /// The first 100.
    pub data: Vec<BatchError>,
}

/// What is wrong with a line of a batch's file.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[schema(as = OpenAiBatchError)]
pub struct BatchError {
    pub code: String,
    /// Counted from 1; null where the file as a whole is wrong.
    pub line: Option<u64>,
    pub message: String,
    pub param: Option<String>,
}

/// A request of `POST /v1/batches`.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = OpenAiBatchRequest, example = json!({"input_file_id": "file-019a1b2c3d4e7f80912233445566778a",
    "endpoint": "/v1/completions", "completion_window": "24h"}))]
pub struct BatchRequest {
    /// A file of JSON lines, each with `custom_id`, `method`, `url` and `body`.
    pub input_file_id: String,
    /// The path of every request: `/v1/completions`, `/v1/chat/completions`, `/v1/decisions`, `/v1/systemone`, or
    /// `/v1/tasks/TASK/generate`, `classify` or `score`.
    pub endpoint: String,
    /// `24h`: what is not done by then expires.
    pub completion_window: String,
    /// Up to 16 texts of your own.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Read and not used: files are kept until they are deleted.
    #[serde(default, rename = "output_expires_after")]
    pub _output_expires_after: Option<serde_json::Value>,
}

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(create, list)).routes(routes!(retrieve)).routes(routes!(cancel))
}

/// Whether lines may have this path.
fn is_endpoint(path: &str) -> bool {
    const PATHS: [&str; 4] = ["/v1/completions", "/v1/chat/completions", "/v1/decisions", "/v1/systemone"];
    let of_task = path.strip_prefix("/v1/tasks/").and_then(|rest| rest.split_once('/'));
    let asks = |(task, verb): (&str, &str)| {
        task.parse::<crate::prompt::TaskName>().is_ok() && ["generate", "classify", "score"].contains(&verb)
    };
    PATHS.contains(&path) || of_task.is_some_and(asks)
}

/// Create a batch
///
/// OpenAI's batches. The requests are answered in the background, after all others, and each by itself: one that is refused is
/// in the error file. A batch goes on where it was when the server restarts.
#[utoipa::path(post, path = "/v1/batches", tag = "openai", request_body = BatchRequest,
    responses((status = 200, body = Batch, description = "It has begun")),
    extensions(("x-problems" = json!(["invalid_request", "incomplete_body", "request_timeout", "body_too_large",
        "unsupported_media_type", "file_not_found", "registry_full", "unavailable"]))))]
async fn create(
    State(app): State<AppState>,
    caller: Caller,
    Json(body): Json<serde_json::Map<String, serde_json::Value>>,
) -> Result<axum::Json<Batch>, Problem> {
    /// The most batches that are known, of all tenants.
    const MAX_BATCHES: usize = 100_000;
    let request: BatchRequest = read(body)?;
    let input = files::find(&app, &caller, &request.input_file_id)?;
    if !is_endpoint(&request.endpoint) {
        let detail =
            format!("found {:?}, expected a path that asks a model, such as \"/v1/completions\"", request.endpoint);
        return Err(Problem::field("endpoint", detail));
    }
    if request.completion_window != "24h" {
        let detail = format!("found {:?}, expected \"24h\"", request.completion_window);
        return Err(Problem::field("completion_window", detail));
    }
    if request.metadata.as_ref().is_some_and(|metadata| metadata.len() > 16) {
        return Err(Problem::field("metadata", "found more than 16 texts"));
    }
    if app.batches.records.len() >= MAX_BATCHES {
        return Err(Problem::new(Code::RegistryFull, format!("there are {MAX_BATCHES} batches already")));
    }
    let created_at = now();
    let batch = Batch {
        id: new_id("batch_"),
        object: "batch".to_owned(),
        endpoint: request.endpoint,
        errors: None,
        input_file_id: input.id,
        completion_window: request.completion_window,
        status: Status::Validating,
        output_file_id: None,
        error_file_id: None,
        created_at,
        in_progress_at: None,
        expires_at: Some(created_at + 24 * 3600),
        finalizing_at: None,
        completed_at: None,
        failed_at: None,
        expired_at: None,
        cancelling_at: None,
        cancelled_at: None,
        request_counts: RequestCounts::default(),
        metadata: request.metadata,
    };
    let record = BatchRecord {
        tenant: caller.tenant,
        tasks: caller.tasks.patterns().to_vec(),
        batch: batch.clone(),
        output_id: new_id("file-"),
        error_id: new_id("file-"),
    };
    let (own, id) = (Arc::clone(&app), batch.id.clone());
    blocking(move || own.batches.records.put(&id, record).map_err(Problem::internal)).await?;
    work::start(&app, &batch.id);
    Ok(axum::Json(batch))
}

fn find(app: &App, caller: &Caller, id: &str) -> Result<BatchRecord, Problem> {
    let found = app.batches.records.get(id).filter(|record| record.tenant == caller.tenant);
    let shown: String = id.chars().take(80).collect();
    let mut found = found.ok_or_else(|| Problem::new(Code::BatchNotFound, format!("there is no batch {shown:?}")))?;
    if let Some(counts) = app.batches.counts(id) {
        found.batch.request_counts = counts;
    }
    Ok(found)
}

/// List the batches
///
/// The caller's own, the newest first.
#[utoipa::path(get, path = "/v1/batches", tag = "openai", params(ListQuery),
    responses((status = 200, body = List<Batch>, description = "The batches")),
    extensions(("x-problems" = json!(["invalid_request"]))))]
async fn list(
    State(app): State<AppState>,
    caller: Caller,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<List<Batch>>, Problem> {
    let own = app.batches.records.all().into_iter().filter(|record| record.tenant == caller.tenant);
    let batches = own.map(|record| record.batch).collect();
    Ok(axum::Json(List::new(batches, |batch: &Batch| batch.id.clone(), query.after.as_deref(), query.limit()?)))
}

/// Show a batch
#[utoipa::path(get, path = "/v1/batches/{batch_id}", tag = "openai",
    params(("batch_id" = String, Path, description = "The batch's id")),
    responses((status = 200, body = Batch, description = "The batch")),
    extensions(("x-problems" = json!(["batch_not_found"]))))]
async fn retrieve(
    State(app): State<AppState>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<axum::Json<Batch>, Problem> {
    Ok(axum::Json(find(&app, &caller, &id)?.batch))
}

/// Cancel a batch
///
/// What is answered by then is in its files.
#[utoipa::path(post, path = "/v1/batches/{batch_id}/cancel", tag = "openai",
    params(("batch_id" = String, Path, description = "The batch's id")),
    responses((status = 200, body = Batch, description = "It ends soon")),
    extensions(("x-problems" = json!(["batch_not_found", "batch_ended"]))))]
async fn cancel(
    State(app): State<AppState>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<axum::Json<Batch>, Problem> {
    let BatchRecord { batch, .. } = find(&app, &caller, &id)?;
    if batch.status.is_final() {
        let detail = format!("the batch {id:?} has ended already: its status is {:?}", batch.status);
        return Err(Problem::new(Code::BatchEnded, detail));
    }
    let own = Arc::clone(&app);
    let changed = blocking(move || own.batches.cancel(&id).map_err(Problem::internal)).await?;
    Ok(axum::Json(changed.unwrap_or(batch)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_ask_a_model() {
        for path in ["/v1/completions", "/v1/tasks/topic/classify", "/v1/tasks/a-b/generate"] {
            assert!(is_endpoint(path), "{path}");
        }
        for path in ["/v1/admin/tasks", "/v1/tasks/../generate", "/v1/tasks/topic", "/v1/files", "/v1/batches", ""] {
            assert!(!is_endpoint(path), "{path}");
        }
    }
}
