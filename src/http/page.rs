//! The page at `/`: plain files inside the program, under a strict content security policy.

use axum::{
    Router,
    extract::Path,
    http::{HeaderMap, HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
    routing::get,
};

use super::problem::{Code, Problem};

/// The page's own files, and nothing inline; the API is asked on the same origin only. A picture that the API gives is shown
/// as a blob, since only a request of the page itself carries the key.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; \
                      form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

const HTML: &str = include_str!("page/index.html");

/// The files by name.
const FILES: [(&str, &str); 10] = [
    ("page.css", include_str!("page/page.css")),
    ("app.js", include_str!("page/app.js")),
    ("api.js", include_str!("page/api.js")),
    ("dom.js", include_str!("page/dom.js")),
    ("tasks.js", include_str!("page/tasks.js")),
    ("contents.js", include_str!("page/contents.js")),
    ("try.js", include_str!("page/try.js")),
    ("measure.js", include_str!("page/measure.js")),
    ("upload.js", include_str!("page/upload.js")),
    ("server.js", include_str!("page/server.js")),
];

/// `/` and `/page/…`. They are no part of the API, so the specification does not have them.
pub fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new().route("/", get(html)).route("/page/{file}", get(file))
}

async fn html() -> Response {
    written("text/html; charset=utf-8", HTML)
}

async fn file(Path(name): Path<String>) -> Result<Response, Problem> {
    let found = FILES.iter().find(|(known, _)| *known == name);
    let shown: String = name.chars().take(80).collect();
    let (name, content) =
        found.ok_or_else(|| Problem::new(Code::NotFound, format!("there is no path /page/{shown}")))?;
    let kind = if name.ends_with(".css") { "text/css; charset=utf-8" } else { "text/javascript; charset=utf-8" };
    Ok(written(kind, content))
}

fn written(kind: &'static str, content: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // Another version of the program has other files under the same names.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    let headers: HeaderMap =
        headers.into_iter().map(|(name, value): (HeaderName, _)| (name, HeaderValue::from_static(value))).collect();
    (headers, content).into_response()
}
