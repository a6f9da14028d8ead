//! Extractors that answer with the house's problems: bodies within bounds, JSON with a path to
//! what is wrong, tasks by name.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{FromRequest, FromRequestParts, Path, Request},
    http::{HeaderMap, header, request::Parts},
};
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use serde::{Deserialize, de::DeserializeOwned};
use utoipa::IntoParams;

use super::{
    AppState,
    access::Caller,
    problem::{Code, Problem, ProblemError},
};
use crate::{content, prompt::Version};

/// A JSON body of at most `--max-body` bytes.
#[derive(Debug)]
pub struct Json<T>(pub T);

/// A task's name from the path, as typed.
#[derive(Debug)]
pub struct TaskParam(pub String);

/// The most tasks of one page of a list.
const MAX_PAGE: usize = 10_000;

/// Which part of a list by name to answer.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct NameRange {
    /// Only tasks after this name
    #[param(example = "sentiment")]
    pub after: Option<String>,
    /// The most tasks to list
    #[param(default = 1000, minimum = 1, maximum = 10000)]
    pub limit: Option<usize>,
}

impl NameRange {
    /// The most tasks to list.
    ///
    /// # Errors
    /// It is none, or more than one answer may have.
    pub fn limit(&self) -> Result<usize, Problem> {
        match self.limit.unwrap_or(1000) {
            limit if (1..=MAX_PAGE).contains(&limit) => Ok(limit),
            limit => Err(Problem::field("limit", format!("found {limit}, expected 1 to {MAX_PAGE}"))),
        }
    }
}

/// A task's name and an alias from the path, as typed.
#[derive(Debug)]
pub struct AliasParam {
    pub task: String,
    pub alias: String,
}

/// A task's name and a version's id from the path, as typed.
#[derive(Debug)]
pub struct VersionParam {
    pub task: String,
    pub version: String,
}

/// A task's name from the path, resolved to its active version.
#[derive(Debug)]
pub struct ResolvedTask(pub Arc<Version>);

/// A query string; unknown keys are errors where `T` says so.
#[derive(Debug)]
pub struct Query<T>(pub T);

/// The id that the log, the answer's header and its problems share.
#[derive(Debug, Clone)]
pub struct RequestId(pub Arc<str>);

impl<T: DeserializeOwned> FromRequest<AppState> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &AppState) -> Result<Self, Problem> {
        let found = media_type(request.headers());
        let is_json = found.as_deref().is_some_and(|m| m == "application/json" || m.ends_with("+json"));
        if !is_json {
            let found = found.unwrap_or_else(|| "no content type".to_owned());
            let detail = format!("found {found}, expected the header 'content-type: application/json'");
            return Err(Problem::new(Code::UnsupportedMediaType, detail));
        }
        let body = read_body(request, app.limits.max_body, app).await?;
        parse_json(&body).map(Self)
    }
}

/// Parses JSON; the problem names the line of a syntax error, or the field that is wrong.
pub fn parse_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    let body = content::without_byte_order_mark(body);
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|e| json_problem(&e, body))?;
    deserializer.end().map_err(|e| Problem::new(Code::InvalidRequest, format!("the body is not JSON: {e}")))?;
    Ok(value)
}

/// Turns parsed JSON into a type, with the same problems.
pub fn from_value<T: DeserializeOwned>(value: serde_json::Value) -> Result<T, Problem> {
    serde_path_to_error::deserialize(value).map_err(|e| json_problem(&e, b""))
}

fn json_problem(error: &serde_path_to_error::Error<serde_json::Error>, body: &[u8]) -> Problem {
    let inner = error.inner();
    if matches!(inner.classify(), serde_json::error::Category::Syntax | serde_json::error::Category::Eof) {
        return Problem::new(
            Code::InvalidRequest,
            format!("the body is not JSON: {}", content::json_fault(body, inner)),
        );
    }
    let path = error.path().to_string();
    let message = inner.to_string();
    let message = message.split(" at line ").next().unwrap_or_default().replace('`', "\"");
    let message = match message.rsplit_once("expected ") {
        Some((found, "usize" | "u64" | "u32")) => format!("{found}expected a whole number from 0"),
        Some((found, "f32" | "f64")) => format!("{found}expected a number"),
        Some((_, expected)) if expected.starts_with("struct ") => {
            "expected an object, with its fields by name".to_owned()
        }
        _ => message,
    };
    match path.as_str() {
        "." | "?" => Problem::fields(vec![ProblemError { code: Code::InvalidRequest, field: None, detail: message }]),
        path => Problem::field(path, message),
    }
}

/// The media type without its parameters, in lower case.
pub fn media_type(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}

/// Reads a body of at most `limit` bytes. One that is declared longer is not read at all.
pub async fn read_body(request: Request, limit: u64, app: &AppState) -> Result<Bytes, Problem> {
    let too_large = |found: String| {
        let detail = format!("found {found} bytes, expected at most {limit}");
        Problem::new(Code::BodyTooLarge, detail)
    };
    let declared = request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if let Some(declared) = declared.filter(|&n| n > limit) {
        return Err(too_large(declared.to_string()));
    }
    let mut body = BytesMut::new();
    let mut pieces = Body::into_data_stream(request.into_body());
    loop {
        let idle = app.limits.body_idle_timeout;
        let piece = tokio::select! {
            // What has arrived is read, also when the server stops.
            biased;
            piece = pieces.next() => piece,
            () = app.stopped() => return Err(Problem::stopping()),
            () = tokio::time::sleep(idle) => {
                let detail = format!("the body stalled: no data arrived for {idle:?} after {} bytes", body.len());
                return Err(Problem::new(Code::RequestTimeout, detail));
            }
        };
        match piece {
            None => return Ok(body.freeze()),
            Some(Ok(piece)) if (body.len() + piece.len()) as u64 > limit => {
                return Err(too_large("more".to_owned()));
            }
            Some(Ok(piece)) => body.extend_from_slice(&piece),
            Some(Err(error)) => {
                let of = declared.map_or_else(String::new, |n| format!(" of {n}"));
                let detail = format!("the body ended after {}{of} bytes: send it again", body.len());
                return Err(Problem { cause: Some(error.to_string()), ..Problem::new(Code::IncompleteBody, detail) });
            }
        }
    }
}

type Params = std::collections::HashMap<String, String>;

async fn params(parts: &mut Parts) -> Result<Params, Problem> {
    let Path(params) = Path::<Params>::from_request_parts(parts, &())
        .await
        .map_err(|e| Problem::new(Code::InvalidRequest, format!("the path: {}", e.body_text())))?;
    Ok(params)
}

fn take(params: &mut Params, name: &str) -> Result<String, Problem> {
    params.remove(name).ok_or_else(|| Problem::internal(format!("the route has no parameter {name}")))
}

impl FromRequestParts<AppState> for TaskParam {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &AppState) -> Result<Self, Problem> {
        take(&mut params(parts).await?, "task").map(Self)
    }
}

impl FromRequestParts<AppState> for VersionParam {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &AppState) -> Result<Self, Problem> {
        let mut params = params(parts).await?;
        Ok(Self { task: take(&mut params, "task")?, version: take(&mut params, "version")? })
    }
}

impl FromRequestParts<AppState> for AliasParam {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &AppState) -> Result<Self, Problem> {
        let mut params = params(parts).await?;
        Ok(Self { task: take(&mut params, "task")?, alias: take(&mut params, "alias")? })
    }
}

impl FromRequestParts<AppState> for ResolvedTask {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &AppState) -> Result<Self, Problem> {
        let TaskParam(task) = TaskParam::from_request_parts(parts, app).await?;
        let caller = Caller::from_request_parts(parts, app).await?;
        Ok(Self(app.version(&caller, &task, None).await?))
    }
}

impl<T: DeserializeOwned> FromRequestParts<AppState> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &AppState) -> Result<Self, Problem> {
        axum::extract::Query::<T>::try_from_uri(&parts.uri).map(|query| Self(query.0)).map_err(|e| {
            Problem::new(Code::InvalidRequest, format!("the query string: {}", query_fault(&e.body_text())))
        })
    }
}

/// What is wrong, without axum's own words before it.
fn query_fault(text: &str) -> &str {
    text.strip_prefix("Failed to deserialize query string: ").unwrap_or(text)
}

impl<S: Sync> FromRequestParts<S> for RequestId {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let id = parts.extensions.get::<Self>().cloned();
        id.ok_or_else(|| Problem::internal("the request-id layer is missing"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::types::GenerateRequest;

    fn detail(body: &str) -> String {
        parse_json::<GenerateRequest>(body.as_bytes()).expect_err("refused").detail
    }

    #[test]
    fn a_syntax_error_names_line_and_column() {
        assert!(detail("{\n  \"input\": oops}").contains("line 2 column 12"), "{}", detail("{\n  \"input\": oops}"));
        assert!(detail("").contains("not JSON"));
        assert!(detail("{\"input\": \"a\"} x").contains("trailing characters"));
    }

    #[test]
    fn an_unknown_field_is_named_beside_the_known_ones() {
        let detail = detail("{\"input\": \"a\", \"temprature\": 1}");
        assert!(detail.contains("\"temprature\"") && detail.contains("\"temperature\""), "{detail}");
    }

    #[test]
    fn a_wrong_type_names_the_field_and_both_types() {
        let text = detail("{\"input\": \"a\", \"max_tokens\": \"ten\"}");
        assert!(
            text.starts_with("max_tokens: ") && text.contains("string \"ten\"") && text.contains("whole number"),
            "{text}"
        );
        let text = detail("{\"input\": {\"a\": 1}}");
        assert!(text.starts_with("input.a: "), "{text}");
        let text = detail("{\"max_tokens\": 1}");
        assert!(text.contains("missing field \"input\""), "{text}");
    }
}
