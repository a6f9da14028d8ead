//! Who may call what. One layer around every path, closed by default: a path that is not listed
//! here needs a key, one under `/v1/admin` an admin key. Handlers learn from here whose request it is.

use axum::{
    extract::{FromRequestParts, Request, State},
    http::{HeaderMap, header, request::Parts},
    middleware::Next,
    response::{IntoResponse as _, Response},
};

use super::{
    AppState,
    problem::{Code, Problem},
};
use crate::config::{Access, is_loopback_host};

/// Open to everyone: nothing here shows or changes a task.
pub(super) const OPEN: [&str; 6] = ["/health/live", "/health/ready", "/metrics", "/openapi.json", "/docs", "/"];
const ADMIN: &str = "/v1/admin";
const FILES: &str = "/v1/files";

/// Who sent a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The tenant of its key, or that of [`Caller::ANYONE`].
    pub tenant: u64,
    /// Whether it is a line of a batch, which nobody waits for: it goes after all others and may take the most time, unless it
    /// says otherwise itself.
    pub is_batch: bool,
}

impl Caller {
    /// The one tenant of all who need no key.
    pub const ANYONE: Self = Self::of(0);

    /// A caller who waits for the answer.
    const fn of(tenant: u64) -> Self {
        Self { tenant, is_batch: false }
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let caller = parts.extensions.get::<Self>().copied();
        caller.ok_or_else(|| Problem::internal("the access layer is missing"))
    }
}

/// Lets a request through, with its [`Caller`], or answers with a problem.
pub async fn check(State(app): State<AppState>, mut request: Request, next: Next) -> Response {
    match allow(&app.access, request.uri().path(), request.headers()) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(problem) => problem.into_response(),
    }
}

fn allow(access: &Access, path: &str, headers: &HeaderMap) -> Result<Caller, Problem> {
    if OPEN.contains(&path) || path.starts_with("/docs/") || path.starts_with("/page/") {
        return Ok(Caller::ANYONE);
    }
    if path.starts_with(ADMIN) { admin(access, headers) } else { caller(access, path, headers) }
}

fn caller(access: &Access, path: &str, headers: &HeaderMap) -> Result<Caller, Problem> {
    if access.api_keys.is_empty() {
        // A browser sends a form with a file for any page that it shows, without asking first.
        if path.starts_with(FILES) {
            same_origin(headers)?;
        }
        return Ok(Caller::ANYONE);
    }
    let key = bearer(headers)?;
    let (api, admin) = (access.api_keys.tenant(key), access.admin_keys.tenant(key));
    api.or(admin).map(Caller::of).ok_or_else(unknown_key)
}

fn admin(access: &Access, headers: &HeaderMap) -> Result<Caller, Problem> {
    if access.admin_is_open() {
        return same_site(headers).map(|()| Caller::ANYONE);
    }
    if access.admin_keys.is_empty() {
        let detail = "the admin routes are closed: start the server with --admin-key (or SOFTSERVE_ADMIN_KEY) to open \
                      them to callers that send this key";
        return Err(Problem::new(Code::Forbidden, detail));
    }
    let key = bearer(headers)?;
    match (access.admin_keys.tenant(key), access.api_keys.contains(key)) {
        (Some(tenant), _) => Ok(Caller::of(tenant)),
        (None, true) => Err(Problem::new(Code::Forbidden, "found an API key, expected an admin key")),
        (None, false) => Err(unknown_key()),
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

fn unknown_key() -> Problem {
    Problem::new(Code::Unauthorized, "the key is not known to this server")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Keys;

    fn access(api: &[&str], admin: &[&str], loopback: bool) -> Access {
        let keys = |keys: &[&str]| Keys::read(&keys.iter().map(|k| (*k).to_owned()).collect::<Vec<_>>(), None).unwrap();
        Access { api_keys: keys(api), admin_keys: keys(admin), loopback }
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
    fn an_api_key_alone_closes_the_admin_routes_also_on_loopback() {
        let api = access(&["api-key-1"], &[], true);
        assert_eq!(code(&api, ADMIN_TASKS, &[(header::AUTHORIZATION, "Bearer api-key-1")]), Some("forbidden"));
    }

    #[test]
    fn paths_that_are_not_listed_need_a_key_and_health_never_does() {
        let both = access(&["api-key-1"], &["admin-key-1"], false);
        for path in ["/anything", "/v1/models", "/v1/files", "/v1/administrator", "/docsx", "/health", "/pages"] {
            assert_eq!(code(&both, path, &[]), Some("unauthorized"), "{path}");
        }
        for path in [
            "/health/live",
            "/health/ready",
            "/metrics",
            "/openapi.json",
            "/docs",
            "/docs/index.html",
            "/",
            "/page/app.js",
        ] {
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
