//! The audit log: every admin action that changes something, or was refused, as a line of JSON. Who, what, from where, before and
//! after.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use axum::{
    extract::{MatchedPath, Request},
    http::{HeaderName, Method},
    response::Response,
};
use serde::Serialize;

use super::problem::Problem;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// The longest text that a client may put into a line.
const MAX_TEXT: usize = 200;

/// Where a connection comes from.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub SocketAddr);

/// What an admin action changed: an extension of its response.
#[derive(Debug, Clone, Default)]
pub struct Change {
    /// The version that the action was about.
    pub version: Option<String>,
    /// The active version before.
    pub before: Option<String>,
    /// The active version after.
    pub after: Option<String>,
}

/// The file that lines are appended to, if there is one.
#[derive(Debug, Default)]
pub struct AuditLog(Option<Arc<Mutex<File>>>);

/// An action that is under way.
#[derive(Debug)]
pub struct Action {
    action: &'static str,
    path: String,
    from: Option<String>,
    forwarded_for: Option<String>,
    request_id: Option<String>,
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    action: &'static str,
    path: &'a str,
    /// The name of the key; null without one.
    key: Option<&'a str>,
    from: Option<&'a str>,
    forwarded_for: Option<&'a str>,
    status: u16,
    /// Why it was refused.
    code: Option<&'static str>,
    version: Option<&'a str>,
    before: Option<&'a str>,
    after: Option<&'a str>,
    request_id: Option<&'a str>,
}

impl AuditLog {
    /// Appends to a file, which is made if it is not there.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self(Some(Arc::new(Mutex::new(file)))))
    }

    /// An action, if the request is one.
    pub fn begin(&self, request: &Request, request_id: Option<String>) -> Option<Action> {
        self.0.as_ref()?;
        let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
        let action = match (request.method(), route.rsplit('/').next().unwrap_or_default()) {
            (&Method::GET | &Method::HEAD | &Method::OPTIONS, _) => return None,
            (&Method::POST, "versions") => "upload",
            (&Method::PUT, "active") => "activate",
            (&Method::POST, "rollback") => "roll_back",
            (&Method::PUT, "{alias}") => "set_alias",
            (&Method::DELETE, "{alias}") => "delete_alias",
            (&Method::DELETE, "{task}") => "delete_task",
            (&Method::DELETE, "{version}") => "delete_version",
            _ => "other",
        };
        let cut = |text: &str| text.chars().take(MAX_TEXT).collect::<String>();
        Some(Action {
            action,
            path: cut(request.uri().path()),
            from: request.extensions().get::<Peer>().map(|peer| peer.0.to_string()),
            forwarded_for: request.headers().get(X_FORWARDED_FOR).and_then(|v| v.to_str().ok()).map(cut),
            request_id,
        })
    }

    /// Appends a line. That it could not be written is logged: the action has happened.
    pub async fn append(&self, line: Vec<u8>) {
        let Some(file) = self.0.clone() else { return };
        let write = move || {
            let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
            file.write_all(&line)?;
            file.sync_data()
        };
        if let Err(error) = tokio::task::spawn_blocking(write).await.map_err(io::Error::other).flatten() {
            tracing::error!(%error, "cannot write to the audit log");
        }
    }
}

impl Action {
    /// The line that says what came of the action.
    pub fn line(self, key: Option<&str>, response: &Response) -> Vec<u8> {
        let change = response.extensions().get::<Change>().cloned().unwrap_or_default();
        let line = Line {
            time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            action: self.action,
            path: &self.path,
            key,
            from: self.from.as_deref(),
            forwarded_for: self.forwarded_for.as_deref(),
            status: response.status().as_u16(),
            code: response.extensions().get::<Problem>().map(|problem| problem.code.as_str()),
            version: change.version.as_deref(),
            before: change.before.as_deref(),
            after: change.after.as_deref(),
            request_id: self.request_id.as_deref(),
        };
        let mut bytes = serde_json::to_vec(&line).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }
}
