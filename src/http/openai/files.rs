//! `/v1/files`: the files that batches read and write, each its tenant's own.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{DefaultBodyLimit, FromRequest as _, Multipart, Path, Request, State},
    http::{HeaderValue, header},
    response::{IntoResponse as _, Response},
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    http::{
        App, AppState,
        access::Caller,
        blocking,
        extract::Query,
        problem::{Code, Problem},
    },
    records::Records,
};

/// The most files of all tenants.
const MAX_FILES: usize = 100_000;
/// Bytes that are read from or written to the disk at once.
const PIECE: usize = 256 << 10;
/// The longest name of a file that is kept.
const MAX_NAME: usize = 256;

/// A file, with whose it is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FileRecord {
    pub tenant: u64,
    pub file: File,
}

/// A file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[schema(as = OpenAiFile)]
pub struct File {
    #[schema(example = "file-019a1b2c3d4e7f80912233445566778a")]
    pub id: String,
    /// `file`.
    pub object: String,
    pub bytes: u64,
    /// Seconds since 1970.
    pub created_at: u64,
    /// Always null: files are kept until they are deleted.
    pub expires_at: Option<u64>,
    #[schema(example = "requests.jsonl")]
    pub filename: String,
    /// `batch` or `batch_output`.
    pub purpose: String,
    /// `processed`.
    pub status: String,
}

/// A part of a list.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = OpenAiList)]
pub struct List<T> {
    pub object: &'static str,
    pub data: Vec<T>,
    pub first_id: Option<String>,
    pub last_id: Option<String>,
    /// Whether more follow `last_id`.
    pub has_more: bool,
}

impl<T> List<T> {
    /// Of all, the newest first, those after an id, at most `limit`.
    pub fn new(mut all: Vec<T>, id: impl Fn(&T) -> String, after: Option<&str>, limit: usize) -> Self {
        // Ids begin with the time.
        all.sort_by_key(|item| std::cmp::Reverse(id(item)));
        let from =
            after.map_or(0, |after| all.iter().position(|item| id(item) == after).map_or(all.len(), |at| at + 1));
        let mut data = all.split_off(from);
        let has_more = data.len() > limit;
        data.truncate(limit);
        let (first_id, last_id) = (data.first().map(&id), data.last().map(&id));
        Self { object: "list", data, first_id, last_id, has_more }
    }
}

/// Which part of a list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// At most so many.
    #[param(minimum = 1, maximum = 10_000)]
    pub limit: Option<usize>,
    /// Those after this id.
    pub after: Option<String>,
}

impl ListQuery {
    /// How many, where that is allowed.
    pub fn limit(&self) -> Result<usize, Problem> {
        match self.limit.unwrap_or(100) {
            limit @ 1..=10_000 => Ok(limit),
            found => Err(Problem::field("limit", format!("found {found}, expected 1 to 10000"))),
        }
    }
}

/// A form with a file.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "for the specification; the form is read part by part")]
pub struct FileForm {
    /// `batch`.
    purpose: String,
    #[schema(value_type = String, format = Binary)]
    file: (),
}

/// What a deletion did.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = OpenAiDeleted)]
pub struct Deleted {
    pub id: String,
    pub object: &'static str,
    pub deleted: bool,
}

pub(super) fn routes() -> OpenApiRouter<AppState> {
    // Files are read in pieces, within --max-file.
    OpenApiRouter::new()
        .routes(routes!(upload, list))
        .routes(routes!(retrieve, delete))
        .routes(routes!(content))
        .layer(DefaultBodyLimit::disable())
}

/// Seconds since 1970.
pub fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// An id that sorts by time.
pub fn new_id(kind: &str) -> String {
    format!("{kind}{}", uuid::Uuid::now_v7().simple())
}

/// The name of a file's content in the folder.
pub fn content_name(id: &str) -> String {
    format!("{id}.data")
}

/// Makes known a file whose content is there.
pub fn register(files: &Records<FileRecord>, tenant: u64, file: File) -> std::io::Result<()> {
    files.put(&file.id.clone(), FileRecord { tenant, file })
}

/// A caller's file.
pub fn find(app: &App, caller: &Caller, id: &str) -> Result<File, Problem> {
    let found = app.files.get(id).filter(|record| record.tenant == caller.tenant);
    let shown: String = id.chars().take(80).collect();
    found
        .map(|record| record.file)
        .ok_or_else(|| Problem::new(Code::FileNotFound, format!("there is no file {shown:?}")))
}

/// Upload a file
///
/// A form with `purpose`, which is `batch`, and `file`: JSON lines, each a request for `POST /v1/batches`.
#[utoipa::path(post, path = "/v1/files", tag = "openai",
    request_body(content = FileForm, content_type = "multipart/form-data"),
    responses((status = 200, body = File, description = "The file is stored")),
    extensions(("x-problems" = json!(["invalid_request", "incomplete_body", "request_timeout", "body_too_large",
        "unsupported_media_type", "registry_full", "unavailable"]))))]
async fn upload(State(app): State<AppState>, caller: Caller, request: Request) -> Result<axum::Json<File>, Problem> {
    if app.files.len() >= MAX_FILES {
        let detail = format!("there are {MAX_FILES} files already: delete some with DELETE /v1/files/ID");
        return Err(Problem::new(Code::RegistryFull, detail));
    }
    let mut form = Multipart::from_request(request, &()).await.map_err(|error| {
        let detail = format!("expected multipart/form-data with purpose and file: {}", error.body_text());
        Problem::new(Code::UnsupportedMediaType, detail)
    })?;
    let cut = |detail: String| Problem::new(Code::IncompleteBody, format!("the form cannot be read: {detail}"));
    let idle = app.limits.body_idle_timeout;
    let stalled = |_| Problem::new(Code::RequestTimeout, format!("the body stalled: no data arrived for {idle:?}"));
    let (mut purpose, mut received) = (None, None);
    loop {
        let part = tokio::time::timeout(idle, form.next_field()).await.map_err(stalled)?;
        let Some(mut part) = part.map_err(|error| cut(error.body_text()))? else { break };
        match part.name() {
            Some("purpose") => {
                purpose = Some(part.text().await.map_err(|error| cut(error.body_text()))?);
            }
            Some("file") => {
                let name: String = part.file_name().unwrap_or("file.jsonl").chars().take(MAX_NAME).collect();
                let own = Arc::clone(&app);
                let unnamed = blocking(move || own.files.unnamed().map_err(Problem::internal)).await?;
                let (std_file, path) = unnamed.into_parts();
                let mut to = tokio::fs::File::from_std(std_file);
                let mut bytes = 0u64;
                loop {
                    let piece = tokio::select! {
                        piece = tokio::time::timeout(idle, part.chunk()) => piece.map_err(stalled)?,
                        () = app.stopped() => return Err(Problem::stopping()),
                    };
                    let Some(piece) = piece.map_err(|error| cut(error.body_text()))? else { break };
                    bytes += piece.len() as u64;
                    if bytes > app.limits.max_file {
                        let detail = format!(
                            "the file has more than {} bytes, the server's limit (--max-file)",
                            app.limits.max_file
                        );
                        return Err(Problem::new(Code::BodyTooLarge, detail));
                    }
                    to.write_all(&piece).await.map_err(Problem::internal)?;
                }
                to.sync_all().await.map_err(Problem::internal)?;
                received = Some((name, path, bytes));
            }
            // What OpenAI's clients may send, and files here do not need.
            Some(name) if name.starts_with("expires_after") => {}
            name => {
                let found: String = name.unwrap_or_default().chars().take(80).collect();
                return Err(Problem::field(&found, "expected purpose and file only"));
            }
        }
    }
    match purpose.as_deref() {
        Some("batch") => {}
        Some(found) => return Err(Problem::field("purpose", format!("found {found:?}, expected \"batch\""))),
        None => return Err(Problem::field("purpose", "found none, expected \"batch\"")),
    }
    let Some((filename, path, bytes)) = received else {
        return Err(Problem::field("file", "found none, expected a file"));
    };
    let id = new_id("file-");
    let file = File {
        id: id.clone(),
        object: "file".to_owned(),
        bytes,
        created_at: now(),
        expires_at: None,
        filename,
        purpose: "batch".to_owned(),
        status: "processed".to_owned(),
    };
    let stored = file.clone();
    let keep = move || -> std::io::Result<()> {
        path.persist(app.files.file(&content_name(&id))?)?;
        register(&app.files, caller.tenant, stored)
    };
    blocking(move || keep().map_err(Problem::internal)).await?;
    Ok(axum::Json(file))
}

/// List the files
///
/// The caller's own, the newest first.
#[utoipa::path(get, path = "/v1/files", tag = "openai", params(ListQuery),
    responses((status = 200, body = List<File>, description = "The files")),
    extensions(("x-problems" = json!(["invalid_request"]))))]
async fn list(
    State(app): State<AppState>,
    caller: Caller,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<List<File>>, Problem> {
    let own = app.files.all().into_iter().filter(|record| record.tenant == caller.tenant);
    let files = own.map(|record| record.file).collect();
    Ok(axum::Json(List::new(files, |file: &File| file.id.clone(), query.after.as_deref(), query.limit()?)))
}

/// Show a file
#[utoipa::path(get, path = "/v1/files/{file_id}", tag = "openai",
    params(("file_id" = String, Path, description = "The file's id")),
    responses((status = 200, body = File, description = "The file")),
    extensions(("x-problems" = json!(["file_not_found"]))))]
async fn retrieve(
    State(app): State<AppState>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<axum::Json<File>, Problem> {
    find(&app, &caller, &id).map(axum::Json)
}

/// Download a file
#[utoipa::path(get, path = "/v1/files/{file_id}/content", tag = "openai",
    params(("file_id" = String, Path, description = "The file's id")),
    responses((status = 200, body = String, content_type = "application/octet-stream", description = "Its content")),
    extensions(("x-problems" = json!(["file_not_found"]))))]
async fn content(State(app): State<AppState>, caller: Caller, Path(id): Path<String>) -> Result<Response, Problem> {
    let file = find(&app, &caller, &id)?;
    let path = app.files.file(&content_name(&file.id)).map_err(Problem::internal)?;
    let mut content = tokio::fs::File::open(path).await.map_err(Problem::internal)?;
    let pieces = async_stream::stream! {
        loop {
            let mut piece = bytes::BytesMut::with_capacity(PIECE);
            match content.read_buf(&mut piece).await {
                Ok(0) => break,
                Ok(_) => yield Ok(piece.freeze()),
                Err(error) => {
                    yield Err(error);
                    break;
                }
            }
        }
    };
    let mut response = Body::from_stream(pieces).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(file.bytes));
    Ok(response)
}

/// Delete a file
///
/// A batch that reads it goes on with what it has opened.
#[utoipa::path(delete, path = "/v1/files/{file_id}", tag = "openai",
    params(("file_id" = String, Path, description = "The file's id")),
    responses((status = 200, body = Deleted, description = "It is deleted")),
    extensions(("x-problems" = json!(["file_not_found"]))))]
async fn delete(
    State(app): State<AppState>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<axum::Json<Deleted>, Problem> {
    let file = find(&app, &caller, &id)?;
    let remove = move || -> std::io::Result<()> {
        app.files.remove(&file.id)?;
        std::fs::remove_file(app.files.file(&content_name(&file.id))?)
    };
    blocking(move || remove().map_err(Problem::internal)).await?;
    Ok(axum::Json(Deleted { id, object: "file", deleted: true }))
}
