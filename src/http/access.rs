//! Who may call what. One layer around every path, closed by default: a path that is not listed here needs a key with the role
//! to infer, one under `/v1/admin` an admin key, and a path that names a task a key that may use it. Handlers learn from here
//! whose request it is.

use std::sync::Arc;

use axum::{
    extract::{FromRequestParts, Request, State},
    http::{HeaderMap, HeaderName, header, request::Parts},
    middleware::Next,
    response::{IntoResponse as _, Response},
};

use super::{
    App, AppState,
    audit::Action,
    extract::RequestId,
    problem::{Code, Problem},
    quota::{self, Quota},
};
use crate::{
    config::{Access, Key, TaskPatterns, is_loopback_host},
    prompt::TaskName,
    registry::{Draw, RegistryError, named_tasks},
};

/// Open to everyone: nothing here shows or changes a task.
pub(super) const OPEN: [&str; 5] = ["/health/live", "/health/ready", "/openapi.json", "/docs", "/"];
const METRICS: &str = "/metrics";
const ADMIN: &str = "/v1/admin";
const FILES: &str = "/v1/files";
/// Names whom or what a request is for, so that all its requests get the same version of a split.
const SPLIT_KEY: HeaderName = HeaderName::from_static("x-softserve-split-key");
/// Paths whose next part is a task's name.
const OF_A_TASK: [&str; 2] = ["/v1/tasks/", "/v1/admin/tasks/"];

/// Who sent a request.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The tenant of its key, or 0 of all who need no key.
    pub tenant: u64,
    /// Whether it is a line of a batch, which nobody waits for: it goes after all others and may take the most time, unless it
    /// says otherwise itself.
    pub is_batch: bool,
    /// The tasks that it may use.
    pub tasks: TaskPatterns,
    /// What its key is called.
    pub name: Option<Arc<str>>,
    /// Where the requests of a task are split between versions: requests of one key get the same version.
    pub split_key: Option<Arc<str>>,
    /// What its key has used, if it has limits.
    pub(super) quota: Option<Arc<Quota>>,
}

impl Caller {
    /// The one tenant of all who need no key.
    pub fn anyone() -> Self {
        Self { tenant: 0, is_batch: false, tasks: TaskPatterns::all(), name: None, split_key: None, quota: None }
    }

    /// For whom the lines of a batch are asked.
    pub fn of_batch(tenant: u64, tasks: TaskPatterns) -> Self {
        Self { tenant, is_batch: true, tasks, ..Self::anyone() }
    }

    fn of(key: &Key, quota: Option<Arc<Quota>>) -> Self {
        let name = Some(key.name.as_str().into());
        Self { tenant: key.tenant, tasks: key.tasks.clone(), name, quota, ..Self::anyone() }
    }

    /// Checks that the caller may use all tasks that a name means, be there such tasks or not.
    ///
    /// # Errors
    /// Its key is for other tasks.
    pub fn check_task(&self, name: &str) -> Result<(), Problem> {
        if self.tasks.is_all() || named_tasks(name).all(|task| self.tasks.allow(task)) {
            return Ok(());
        }
        let detail = format!(
            "the key may not use the task that the request names; it may use: {}",
            self.tasks.patterns().join(", ")
        );
        Err(Problem::new(Code::Forbidden, detail))
    }

    /// What decides which version of a split its request gets.
    pub fn draw(&self) -> Draw<'_> {
        self.split_key.as_deref().map_or(Draw::Random, Draw::Key)
    }

    /// Whether a list has a task for this caller.
    pub fn sees(&self, task: &TaskName) -> bool {
        self.tasks.is_all() || self.tasks.allow(task.as_str())
    }

    /// The registry's error without the names that the caller does not see.
    pub fn problem(&self, error: RegistryError) -> Problem {
        match error {
            RegistryError::TaskNotFound { task, mut known } => {
                known.retain(|task| self.sees(task));
                RegistryError::TaskNotFound { task, known }.into()
            }
            error => error.into(),
        }
    }

    /// Counts tokens of an input or an answer toward the limits of the key.
    pub fn count_tokens(&self, tokens: usize) {
        if let Some(quota) = &self.quota {
            quota.count_tokens(tokens);
        }
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let caller = parts.extensions.get::<Self>().cloned();
        caller.ok_or_else(|| Problem::internal("the access layer is missing"))
    }
}

/// Lets a request through, with its [`Caller`], or answers with a problem.
pub async fn check(State(app): State<AppState>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let action = if is_admin(path) { begin(&app, &request) } else { None };
    let admitted = allow(&app.access, path, request.headers()).and_then(|key| admit(&app, path, key));
    let (response, caller) = match admitted {
        Ok((caller, slot)) => {
            let split_key = request.headers().get(SPLIT_KEY).and_then(|value| value.to_str().ok()).map(Arc::from);
            let caller = Caller { split_key, ..caller };
            request.extensions_mut().insert(caller.clone());
            let response = next.run(request).await;
            let response = match slot {
                Some(slot) => quota::holding(slot, response),
                None => response,
            };
            (response, Some(caller))
        }
        Err(problem) => (problem.into_response(), None),
    };
    if let Some(action) = action {
        let line = action.line(caller.as_ref().and_then(|caller| caller.name.as_deref()), &response);
        app.audit.append(line).await;
    }
    response
}

/// The action that an admin request is, for the audit log.
fn begin(app: &App, request: &Request) -> Option<Action> {
    let id = request.extensions().get::<RequestId>().map(|id| id.0.to_string());
    app.audit.begin(request, id)
}

/// The caller of an allowed request, which counts toward the limits of its key where it asks the model.
fn admit(app: &App, path: &str, key: Option<Arc<Key>>) -> Result<(Caller, Option<quota::Slot>), Problem> {
    let Some(key) = key else { return Ok((Caller::anyone(), None)) };
    let quota = app.quotas.of(&key);
    let slot = quota.as_ref().filter(|_| !is_admin(path) && path != METRICS).map(|quota| quota.admit()).transpose()?;
    Ok((Caller::of(&key, quota), slot))
}

fn is_admin(path: &str) -> bool {
    path.strip_prefix(ADMIN).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The key by which a request is allowed; `None` where it needs none.
fn allow(access: &Access, path: &str, headers: &HeaderMap) -> Result<Option<Arc<Key>>, Problem> {
    if OPEN.contains(&path) || path.starts_with("/docs/") || path.starts_with("/page/") {
        return Ok(None);
    }
    let key = match path {
        path if is_admin(path) => admin(access, headers)?,
        METRICS => of_role(access, headers, "metrics", |key| key.roles.metrics || key.roles.admin)?,
        _ => {
            // A browser sends a form with a file for any page that it shows, without asking first.
            if access.infer_is_open() && path.starts_with(FILES) {
                same_origin(headers)?;
            }
            of_role(access, headers, "infer", |key| key.roles.infer)?
        }
    };
    if let (Some(key), Some(task)) = (&key, task_of(path)) {
        Caller::of(key, None).check_task(&task)?;
    }
    Ok(key)
}

/// The task that a path names.
fn task_of(path: &str) -> Option<String> {
    let rest = OF_A_TASK.iter().find_map(|prefix| path.strip_prefix(prefix))?;
    let task = rest.split('/').next().unwrap_or_default();
    Some(percent_encoding::percent_decode_str(task).decode_utf8_lossy().into_owned())
}

fn of_role(
    access: &Access,
    headers: &HeaderMap,
    role: &str,
    has_role: impl Fn(&Key) -> bool,
) -> Result<Option<Arc<Key>>, Problem> {
    if access.infer_is_open() {
        return Ok(None);
    }
    let key = shown(access, headers)?;
    if has_role(&key) {
        return Ok(Some(key));
    }
    let detail = format!("found a key for {}, expected one with the role {role}", key.roles);
    Err(Problem::new(Code::Forbidden, detail))
}

fn admin(access: &Access, headers: &HeaderMap) -> Result<Option<Arc<Key>>, Problem> {
    if access.admin_is_open() {
        return same_site(headers).map(|()| None);
    }
    if !access.has_admin_keys() {
        let detail = "the admin routes are closed: start the server with --admin-key (or SOFTSERVE_ADMIN_KEY) to open \
                      them to callers that send this key";
        return Err(Problem::new(Code::Forbidden, detail));
    }
    let key = shown(access, headers)?;
    match key.roles.admin {
        true => Ok(Some(key)),
        false => Err(Problem::new(Code::Forbidden, "found an API key, expected an admin key")),
    }
}

/// The key that a request shows.
fn shown(access: &Access, headers: &HeaderMap) -> Result<Arc<Key>, Problem> {
    let key = access.find(bearer(headers)?);
    let key = key.ok_or_else(|| Problem::new(Code::Unauthorized, "the key is not known to this server"))?;
    match key.has_expired() {
        true => Err(Problem::new(Code::Unauthorized, "the key has expired: ask whoever runs the server for a new one")),
        false => Ok(key),
    }
}

/// Without keys, the loopback address is all that guards the admin routes. A web page that the
/// user looks at could reach it: by a form from another origin, or by a name that it lets point
/// here. Both are told by the headers that a browser sends.
fn same_site(headers: &HeaderMap) -> Result<(), Problem> {
    let text = |name| headers.get(name).and_then(|v: &axum::http::HeaderValue| v.to_str().ok());
    let host = text(header::HOST);
    let foreign_host = host.is_some_and(|host| !is_loopback_host(host));
    let foreign_origin = headers.contains_key(header::ORIGIN)
        && text(header::ORIGIN).and_then(|origin| origin.split_once("://")).map(|(_, at)| at) != host;
    if foreign_host || foreign_origin {
        let detail = "the admin routes are open to this machine only, and the request comes from a web page or uses \
                      another host name; use http://127.0.0.1, or set --admin-key";
        return Err(Problem::new(Code::Forbidden, detail));
    }
    Ok(())
}

/// Refuses what a web page of another origin had the browser send.
fn same_origin(headers: &HeaderMap) -> Result<(), Problem> {
    let text = |name| headers.get(name).and_then(|v: &axum::http::HeaderValue| v.to_str().ok());
    let origin = text(header::ORIGIN).map(|origin| origin.split_once("://").map(|(_, at)| at));
    match origin {
        Some(origin) if origin != text(header::HOST) => {
            let detail =
                "the request comes from a web page of another origin; call the server from a program, or set --api-key";
            Err(Problem::new(Code::Forbidden, detail))
        }
        _ => Ok(()),
    }
}

fn bearer(headers: &HeaderMap) -> Result<&str, Problem> {
    let expected = "expected the header 'authorization: Bearer KEY'";
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        return Err(Problem::new(Code::Unauthorized, format!("found no key, {expected}")));
    };
    value
        .to_str()
        .ok()
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, key)| key.trim())
        .ok_or_else(|| {
            Problem::new(Code::Unauthorized, format!("found an authorization header of another scheme, {expected}"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::KeySources;

    fn access(api: &[&str], admin: &[&str], loopback: bool) -> Access {
        let keys = |keys: &[&str]| keys.iter().map(|k| (*k).to_owned()).collect::<Vec<_>>();
        let sources = KeySources { api_keys: keys(api), admin_keys: keys(admin), ..KeySources::default() };
        Access::open(sources, loopback).unwrap()
    }

    fn code(access: &Access, path: &str, headers: &[(header::HeaderName, &str)]) -> Option<&'static str> {
        let headers = headers.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect();
        allow(access, path, &headers).err().map(|p| p.code.as_str())
    }

    const TASKS: &str = "/v1/tasks";
    const ADMIN_TASKS: &str = "/v1/admin/tasks";

    #[test]
    fn without_keys_everything_is_open_on_loopback_and_admin_is_closed_elsewhere() {
        let (near, far) = (access(&[], &[], true), access(&[], &[], false));
        assert_eq!((code(&near, TASKS, &[]), code(&near, ADMIN_TASKS, &[])), (None, None));
        assert_eq!((code(&far, TASKS, &[]), code(&far, ADMIN_TASKS, &[])), (None, Some("forbidden")));
    }

    #[test]
    fn an_api_key_opens_all_but_the_admin_routes_and_an_admin_key_opens_all() {
        let both = access(&["api-key-1"], &["admin-key-1"], true);
        let with = |path, key| code(&both, path, &[(header::AUTHORIZATION, key)]);
        assert_eq!(
            (code(&both, TASKS, &[]), code(&both, ADMIN_TASKS, &[])),
            (Some("unauthorized"), Some("unauthorized"))
        );
        assert_eq!((with(TASKS, "Bearer api-key-1"), with(ADMIN_TASKS, "bearer api-key-1")), (None, Some("forbidden")));
        assert_eq!((with(TASKS, "Bearer admin-key-1"), with(ADMIN_TASKS, "Bearer admin-key-1")), (None, None));
        assert_eq!(
            (with(TASKS, "Bearer wrong-key"), with(ADMIN_TASKS, "Bearer wrong-key")),
            (Some("unauthorized"), Some("unauthorized"))
        );
        assert_eq!(with(TASKS, "Basic YTpi"), Some("unauthorized"));
    }

    #[test]
    fn a_key_that_is_typed_as_both_closes_what_an_api_key_closes() {
        let both = access(&["one-long-key"], &["one-long-key"], true);
        assert_eq!(
            (code(&both, TASKS, &[]), code(&both, "/metrics", &[])),
            (Some("unauthorized"), Some("unauthorized"))
        );
        for path in [TASKS, ADMIN_TASKS, "/metrics"] {
            assert_eq!(code(&both, path, &[(header::AUTHORIZATION, "Bearer one-long-key")]), None, "{path}");
        }
    }

    #[test]
    fn a_task_is_found_in_its_path_however_it_is_written() {
        assert_eq!(task_of("/v1/tasks/a%2Bb/generate").as_deref(), Some("a+b"));
        assert_eq!(task_of("/v1/admin/tasks/a").as_deref(), Some("a"));
        assert_eq!((task_of("/v1/tasks"), task_of("/v1/admin/tasks")), (None, None));
    }

    #[test]
    fn an_api_key_alone_closes_the_admin_routes_also_on_loopback() {
        let api = access(&["api-key-1"], &[], true);
        assert_eq!(code(&api, ADMIN_TASKS, &[(header::AUTHORIZATION, "Bearer api-key-1")]), Some("forbidden"));
    }

    #[test]
    fn paths_that_are_not_listed_need_a_key_and_health_never_does() {
        let both = access(&["api-key-1"], &["admin-key-1"], false);
        for path in
            ["/anything", "/metrics", "/v1/models", "/v1/files", "/v1/administrator", "/docsx", "/health", "/pages"]
        {
            assert_eq!(code(&both, path, &[]), Some("unauthorized"), "{path}");
        }
        for path in ["/health/live", "/health/ready", "/openapi.json", "/docs", "/docs/index.html", "/", "/page/app.js"]
        {
            assert_eq!(code(&both, path, &[]), None, "{path}");
        }
    }

    #[test]
    fn a_web_page_cannot_reach_the_open_admin_routes() {
        let near = access(&[], &[], true);
        let with = |host, origin| code(&near, ADMIN_TASKS, &[(header::HOST, host), (header::ORIGIN, origin)]);
        assert_eq!(with("127.0.0.1:8080", "http://127.0.0.1:8080"), None);
        assert_eq!(with("127.0.0.1:8080", "https://evil.example"), Some("forbidden"));
        assert_eq!(with("127.0.0.1:8080", "null"), Some("forbidden"));
        assert_eq!(with("evil.example:8080", "http://evil.example:8080"), Some("forbidden"));
        assert_eq!(code(&near, ADMIN_TASKS, &[(header::HOST, "localhost:8080")]), None);
    }
}
