//! Lines of JSON, each a request of any route that asks something: answered together, and told in their order.
//!
//! A line is a request in the form of OpenAI's batches, `{"custom_id": …, "url": "/v1/completions", "body": {…}}`, or an item of
//! `POST /v1/generate`, `{"task": …, "input": …}`. It passes the same handlers as a request over HTTP.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{Request, header},
};
use futures::{Stream, StreamExt as _};
use serde::Serialize;
use serde_json::{Map, Value, value::RawValue};
use tower::ServiceExt as _;

use super::{AppState, access::Caller};
use crate::prompt::TaskName;

/// How long a line waits before it asks again where the queue was full.
const PAUSE: Duration = Duration::from_millis(50);

/// Answers lines on behalf of a caller. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Lines {
    router: Router,
    app: AppState,
    caller: Caller,
    /// The one path that lines may have, where there is such a rule.
    only: Option<Arc<str>>,
}

/// A line's answer, as it is written to the output.
#[derive(Debug, Serialize)]
pub struct LineAnswer {
    pub id: String,
    /// The line's own, if it has one that can be read.
    pub custom_id: Option<String>,
    /// What the route answered; `None` for a line that is no request.
    pub response: Option<LineResponse>,
    /// Why the line is no request.
    pub error: Option<LineError>,
}

/// What a route answered to a line.
#[derive(Debug, Serialize)]
pub struct LineResponse {
    pub status_code: u16,
    pub request_id: String,
    pub body: Box<RawValue>,
}

/// What is wrong with a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LineError {
    pub code: &'static str,
    pub message: String,
}

impl LineAnswer {
    /// Whether the route answered as it was asked to.
    pub fn is_success(&self) -> bool {
        self.response.as_ref().is_some_and(|response| response.status_code < 400)
    }

    /// The answer to a line that was not asked.
    pub fn failed(custom_id: Option<String>, error: LineError) -> Self {
        Self { id: new_id(), custom_id, response: None, error: Some(error) }
    }
}

fn new_id() -> String {
    format!("batch_req_{}", uuid::Uuid::now_v7().simple())
}

/// A line that is a request.
#[derive(Debug, PartialEq)]
pub struct Line {
    pub custom_id: Option<String>,
    pub url: String,
    pub body: Map<String, Value>,
}

impl Line {
    /// Reads a line.
    ///
    /// # Errors
    /// It is no request; with its `custom_id` where that can be read.
    pub fn parse(text: &str) -> Result<Self, (Option<String>, LineError)> {
        let error = |id: Option<String>, message: String| (id, LineError { code: "invalid_line", message });
        let value: Value = serde_json::from_str(text).map_err(|e| error(None, format!("the line is not JSON: {e}")))?;
        let Value::Object(mut line) = value else { return Err(error(None, "expected an object".to_owned())) };
        let custom_id = match line.remove("custom_id") {
            None | Some(Value::Null) => None,
            Some(Value::String(id)) => Some(id),
            Some(_) => return Err(error(None, "custom_id: expected a text".to_owned())),
        };
        let fail = |message: &str| error(custom_id.clone(), message.to_owned());
        if !line.contains_key("url") {
            let Some(Value::String(task)) = line.remove("task") else {
                return Err(fail("expected \"url\" and \"body\", or \"task\" and \"input\""));
            };
            let task: TaskName = task.parse().map_err(|e| error(custom_id.clone(), format!("task: {e}")))?;
            return Ok(Self { custom_id, url: format!("/v1/tasks/{task}/generate"), body: line });
        }
        if line.remove("method").is_some_and(|method| method != "POST") {
            return Err(fail("method: expected \"POST\""));
        }
        let Some(Value::String(url)) = line.remove("url") else { return Err(fail("url: expected a text")) };
        let Some(Value::Object(body)) = line.remove("body") else { return Err(fail("body: expected an object")) };
        match line.keys().next() {
            Some(unknown) => Err(fail(&format!("{unknown}: expected custom_id, method, url and body only"))),
            None => Ok(Self { custom_id, url, body }),
        }
    }
}

impl Lines {
    /// Lines of this caller.
    pub fn new(app: AppState, caller: Caller) -> Self {
        Self { router: super::asking(Arc::clone(&app)), app, caller: Caller { is_batch: true, ..caller }, only: None }
    }

    /// Lines that may only have this path.
    pub fn only(self, path: &str) -> Self {
        Self { only: Some(path.into()), ..self }
    }

    /// The answers to lines, in their order, `at_once` lines at a time.
    pub fn answers<E: Send + 'static>(
        self,
        lines: impl Stream<Item = Result<String, E>>,
        at_once: usize,
    ) -> impl Stream<Item = Result<LineAnswer, E>> {
        let lines = lines.map(move |line| {
            let own = self.clone();
            // Each in a task of its own, so that the threads share what is done outside of the engine.
            let answer = tokio::spawn(async move {
                match line {
                    Ok(line) => Ok(own.answer(&line).await),
                    Err(error) => Err(error),
                }
            });
            async move {
                answer.await.unwrap_or_else(|error| {
                    let error = LineError { code: "internal", message: error.to_string() };
                    Ok(LineAnswer::failed(None, error))
                })
            }
        });
        lines.buffered(at_once)
    }

    /// The answer to one line. Waits for room in the queue for as long as it takes, unless the server stops.
    pub async fn answer(&self, text: &str) -> LineAnswer {
        let Line { custom_id, url, body } = match Line::parse(text) {
            Ok(line) => line,
            Err((custom_id, error)) => return LineAnswer::failed(custom_id, error),
        };
        let fail = |message: String| LineError { code: "invalid_line", message };
        if let Some(only) = self.only.as_deref().filter(|only| *only != url) {
            return LineAnswer::failed(custom_id, fail(format!("url: found {url:?}, expected {only:?}")));
        }
        if body.get("stream").is_some_and(|stream| stream == true) {
            return LineAnswer::failed(custom_id, fail("stream: found true; a line has no stream".to_owned()));
        }
        let body = Value::Object(body).to_string();
        loop {
            let request = Request::post(url.as_str())
                .header(header::CONTENT_TYPE, "application/json")
                .extension(self.caller.clone())
                .body(Body::from(body.clone()));
            let request = match request {
                Ok(request) => request,
                Err(error) => return LineAnswer::failed(custom_id, fail(format!("url: found {url:?}: {error}"))),
            };
            let response = match self.router.clone().oneshot(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            };
            let (parts, body) = response.into_parts();
            if parts.status.as_u16() == 429 && !*self.app.stopping().borrow() {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            let request_id = parts.headers.get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default();
            let text = to_bytes(body, usize::MAX).await.unwrap_or_default();
            let body = String::from_utf8_lossy(&text).into_owned();
            let body = RawValue::from_string(body).unwrap_or_else(|_| RawValue::NULL.to_owned());
            let status_code = parts.status.as_u16();
            let response = Some(LineResponse { status_code, request_id: request_id.to_owned(), body });
            return LineAnswer { id: new_id(), custom_id, response, error: None };
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_line_is_a_request_of_openais_form_or_a_task_with_its_input() {
        let line = |value: Value| Line::parse(&value.to_string());
        let long = json!({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m"}});
        let expected = Line {
            custom_id: Some("a".to_owned()),
            url: "/v1/completions".to_owned(),
            body: Map::from_iter([("model".to_owned(), json!("m"))]),
        };
        assert_eq!(line(long), Ok(expected));
        let short = line(json!({"task": "topic", "input": "x"})).expect("a task");
        assert_eq!((short.url.as_str(), short.body.len()), ("/v1/tasks/topic/generate", 1));
        for (value, says, id) in [
            (json!([1]), "object", None),
            (json!({"custom_id": 1}), "custom_id", None),
            (json!({"custom_id": "a"}), "\"url\"", Some("a")),
            (json!({"task": "a/../b", "input": "x"}), "task: ", None),
            (json!({"url": "/x", "body": [], "custom_id": "b"}), "body", Some("b")),
            (json!({"url": "/x", "body": {}, "method": "GET"}), "method", None),
            (json!({"url": "/x", "body": {}, "extra": 1}), "extra", None),
        ] {
            let (found, error) = line(value.clone()).expect_err("no request");
            assert!(error.message.contains(says), "{value}: {}", error.message);
            assert_eq!(found.as_deref(), id, "{value}");
        }
        assert!(Line::parse("{").is_err_and(|(_, error)| error.message.contains("not JSON")));
    }
}
