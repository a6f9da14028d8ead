//! The outermost layer: gives each request an id, logs and counts its answer, and writes problems
//! out with that id. Bodies and keys are never logged.

use std::{sync::Arc, time::Instant};

use axum::{
    extract::{MatchedPath, Request},
    http::{HeaderMap, HeaderName, HeaderValue, header},
    middleware::Next,
    response::Response,
};
use metrics::{counter, gauge, histogram};
use tracing::Instrument as _;

use super::{extract::RequestId, problem::Problem};
use crate::telemetry;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_REQUEST_ID: usize = 128;

/// See the module.
pub async fn observe(mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(request.headers());
    request.extensions_mut().insert(id.clone());
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let span = tracing::info_span!("request", request_id = %id.0, %method, path = request.uri().path());
    let active = Active::new();
    let mut response = next.run(request).instrument(span.clone()).await;
    drop(active);

    let _in_span = span.enter();
    let problem = response.extensions_mut().remove::<Problem>();
    if let Some(problem) = &problem {
        response = written(problem, &id, response);
    }
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert(X_REQUEST_ID, value);
    }
    let status = response.status().as_u16();
    let latency = started.elapsed();
    log(&route, status, latency.as_secs_f64() * 1e3, problem.as_ref());
    let labels = [("method", method.to_string()), ("route", route)];
    histogram!(telemetry::HTTP_SECONDS, &labels).record(latency);
    let [method, route] = labels;
    counter!(telemetry::HTTP_REQUESTS, &[method, route, ("status", status.to_string())]).increment(1);
    response
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
fn written(problem: &Problem, id: &RequestId, before: Response) -> Response {
    let mut response = problem.write(&id.0);
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
