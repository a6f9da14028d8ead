//! The outermost layer: gives each request an id, logs and counts its answer, and writes problems
//! out with that id. Bodies and keys are never logged.

use std::{pin::Pin, sync::Arc, task, time::Instant};

use axum::{
    body::{Body, HttpBody},
    extract::{MatchedPath, Request},
    http::{HeaderMap, HeaderName, HeaderValue, header},
    middleware::Next,
    response::Response,
};
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use metrics::{counter, gauge, histogram};
use tracing::Instrument as _;

use super::{extract::RequestId, openai::error, problem::Problem};
use crate::telemetry;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_REQUEST_ID: usize = 128;

/// See the module.
pub async fn observe(mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(request.headers());
    request.extensions_mut().insert(id.clone());
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let span = tracing::info_span!("request", request_id = %id.0, %method, path);
    let active = Active::new();
    let mut response = next.run(request).instrument(span.clone()).await;

    let in_span = span.enter();
    let problem = response.extensions_mut().remove::<Problem>();
    if let Some(problem) = &problem {
        response = written(problem, &path, &id, response);
    }
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert(X_REQUEST_ID, value);
    }
    drop(in_span);
    let status = response.status().as_u16();
    let answered = Answered { started, span, method: method.to_string(), route, status, problem, _active: active };
    let is_stream = response.headers().get(header::CONTENT_TYPE).is_some_and(|v| v.as_bytes() == EVENT_STREAM);
    // A stream is answered when its last event is sent, or when the client goes away.
    if is_stream { response.map(|body| Body::new(Streamed { body, _answered: answered })) } else { response }
}

const EVENT_STREAM: &[u8] = b"text/event-stream";

/// An answer, which is logged and counted when this is dropped.
struct Answered {
    started: Instant,
    span: tracing::Span,
    method: String,
    route: String,
    status: u16,
    problem: Option<Problem>,
    _active: Active,
}

impl Drop for Answered {
    fn drop(&mut self) {
        let _in_span = self.span.enter();
        let latency = self.started.elapsed();
        log(&self.route, self.status, latency.as_secs_f64() * 1e3, self.problem.as_ref());
        let labels = [("method", std::mem::take(&mut self.method)), ("route", std::mem::take(&mut self.route))];
        histogram!(telemetry::HTTP_SECONDS, &labels).record(latency);
        let [method, route] = labels;
        counter!(telemetry::HTTP_REQUESTS, &[method, route, ("status", self.status.to_string())]).increment(1);
    }
}

/// The body of a stream with the answer that it is of.
struct Streamed {
    body: Body,
    _answered: Answered,
}

impl HttpBody for Streamed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
    ) -> task::Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The client's own id if it is short and plain, else a new one.
fn request_id(headers: &HeaderMap) -> RequestId {
    let plain = |id: &&str| {
        (1..=MAX_REQUEST_ID).contains(&id.len())
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':'))
    };
    let given = headers.get(X_REQUEST_ID).and_then(|v| v.to_str().ok()).filter(plain);
    RequestId(given.map_or_else(|| Arc::from(uuid::Uuid::now_v7().to_string()), Arc::from))
}

/// The problem's answer, with the Allow header of the one it takes the place of.
fn written(problem: &Problem, path: &str, id: &RequestId, before: Response) -> Response {
    let mut response = match error::is_of(path) {
        true => error::write(problem, &id.0),
        false => problem.write(&id.0),
    };
    if let Some(allow) = before.headers().get(header::ALLOW) {
        response.headers_mut().insert(header::ALLOW, allow.clone());
    }
    response
}

fn log(route: &str, status: u16, latency_ms: f64, problem: Option<&Problem>) {
    let code = problem.map(|p| p.code.as_str());
    let cause = problem.and_then(|p| p.cause.as_deref());
    match (status, route) {
        (500.., "/health/ready") => tracing::info!(status, latency_ms, code, cause, "answered"),
        (500.., _) => tracing::error!(status, latency_ms, code, cause, "answered"),
        (_, "/health/live" | "/health/ready" | "/metrics") => tracing::debug!(status, latency_ms, "answered"),
        _ => tracing::info!(status, latency_ms, code, cause, "answered"),
    }
}

/// Counts a request as active until dropped, also when the client goes away first.
struct Active;

impl Active {
    fn new() -> Self {
        gauge!(telemetry::HTTP_ACTIVE).increment(1.0);
        Self
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        gauge!(telemetry::HTTP_ACTIVE).decrement(1.0);
    }
}
