//! One request and its streamed answer, timed. Light, since it often shares its processors with the
//! server: plain HTTP/1.1, connections that stay open, and only the last event is parsed.

use std::{
    borrow::Cow,
    cell::RefCell,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, StatusCode, Uri, body::Incoming, client::conn::http1::SendRequest, header, http::HeaderValue};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;

use super::{plan::Ask, sse::Events};

/// Longer than any server lets a request take.
const PATIENCE: Duration = Duration::from_secs(900);
/// Bytes of a problem that are read.
const MAX_PROBLEM: usize = 64 * 1024;

/// Sends requests to one server. For one thread.
#[derive(Debug)]
pub struct Client {
    /// What to connect to, `host:port`.
    address: String,
    host: HeaderValue,
    /// What comes before every path.
    prefix: String,
    authorization: Option<HeaderValue>,
    idle: RefCell<Vec<SendRequest<Full<Bytes>>>>,
    first_problem: RefCell<Option<String>>,
}

/// Why a server cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("found the address {0:?}, expected one such as http://127.0.0.1:8080")]
    Address(String),
    #[error("found the address {0:?}: only plain http can be measured; leave out what encrypts before the server")]
    Encrypted(String),
    #[error("the key has characters that no header can have")]
    Key,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// From when the request was due to its first token.
    pub first_token: Option<Duration>,
    /// Between one piece of text and the next.
    pub gaps: Vec<Duration>,
    /// From when the request was due to the end of its answer.
    pub total: Duration,
    /// What was counted, or a code: the server's own, or one of ours.
    pub outcome: Result<Usage, Cow<'static, str>>,
}

/// Positions counted by the server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct Usage {
    pub virtual_tokens: usize,
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    pub completion_tokens: usize,
}

impl Client {
    /// `key` is sent with every request.
    pub fn new(url: &str, key: Option<&str>) -> Result<Self, ClientError> {
        let bad = || ClientError::Address(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| bad())?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => return Err(ClientError::Encrypted(url.to_owned())),
            _ => return Err(bad()),
        }
        let (host, port) = (uri.host().ok_or_else(bad)?, uri.port_u16().unwrap_or(80));
        let authorization = key.map(|key| {
            let mut value = HeaderValue::from_str(&format!("Bearer {key}")).map_err(|_| ClientError::Key)?;
            value.set_sensitive(true);
            Ok(value)
        });
        Ok(Self {
            address: format!("{host}:{port}"),
            host: HeaderValue::from_str(&format!("{host}:{port}")).map_err(|_| bad())?,
            prefix: uri.path().trim_end_matches('/').to_owned(),
            authorization: authorization.transpose()?,
            idle: RefCell::default(),
            first_problem: RefCell::default(),
        })
    }

    /// Sends a request that was due at `due` and reads its answer to the end.
    pub async fn ask(&self, ask: Ask, due: Instant) -> Sample {
        let mut sample =
            Sample { first_token: None, gaps: Vec::new(), total: Duration::ZERO, outcome: Ok(Usage::default()) };
        let outcome = tokio::time::timeout(PATIENCE, self.answer(ask, due, &mut sample)).await;
        sample.outcome = outcome.unwrap_or(Err("no_answer".into()));
        sample.total = due.elapsed();
        sample
    }

    async fn answer(&self, ask: Ask, due: Instant, sample: &mut Sample) -> Result<Usage, Cow<'static, str>> {
        let mut sender = self.connection().await.map_err(|_| "no_connection")?;
        let request = self.request(ask).map_err(|_| "bad_request_line")?;
        let response = sender.send_request(request).await.map_err(|_| "connection_lost")?;
        let status = response.status();
        let read = match status {
            StatusCode::OK => read_stream(response.into_body(), due, sample).await,
            _ => Err(self.problem(status, response.into_body()).await),
        };
        // Whole answers leave the connection fit for the next request.
        if sender.ready().await.is_ok() {
            self.idle.borrow_mut().push(sender);
        }
        read
    }

    /// What the server said of the first request that it refused.
    pub fn first_problem(&self) -> Option<String> {
        self.first_problem.borrow().clone()
    }

    /// The code of a problem; its status where the body has none.
    async fn problem(&self, status: StatusCode, body: Incoming) -> Cow<'static, str> {
        let body = http_body_util::Limited::new(body, MAX_PROBLEM).collect().await;
        let problem = body.ok().and_then(|body| Problem::read(&body.to_bytes()));
        let Some(Problem { code, detail }) = problem else { return format!("status_{}", status.as_u16()).into() };
        if let Some(detail) = detail {
            self.first_problem.borrow_mut().get_or_insert(detail);
        }
        code.into()
    }

    fn request(&self, ask: Ask) -> hyper::http::Result<Request<Full<Bytes>>> {
        let mut request = Request::post(format!("{}{}", self.prefix, ask.path))
            .header(header::HOST, self.host.clone())
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(value) = &self.authorization {
            request = request.header(header::AUTHORIZATION, value.clone());
        }
        request.body(Full::new(ask.body))
    }

    /// One that is open already, or a new one.
    async fn connection(&self) -> Result<SendRequest<Full<Bytes>>, ConnectError> {
        loop {
            let idle = self.idle.borrow_mut().pop();
            match idle {
                Some(sender) if sender.is_ready() => return Ok(sender),
                Some(_) => {}
                None => break,
            }
        }
        let stream = TcpStream::connect(&self.address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // Its errors are the sender's as well.
        tokio::spawn(async { connection.await.ok() });
        Ok(sender)
    }
}

#[derive(Debug, thiserror::Error)]
enum ConnectError {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Http(#[from] hyper::Error),
}

/// Reads events as they come. What is timed is their arrival; only the last is parsed.
async fn read_stream(mut body: Incoming, due: Instant, sample: &mut Sample) -> Result<Usage, Cow<'static, str>> {
    #[derive(Deserialize)]
    struct Last {
        finish_reason: String,
        usage: Usage,
    }
    let mut events = Events::default();
    let mut last: Option<Vec<u8>> = None;
    let mut failed: Option<Vec<u8>> = None;
    let mut before: Option<Instant> = None;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| "connection_lost")?;
        let Some(bytes) = frame.data_ref() else { continue };
        let now = Instant::now();
        events.push(bytes, |name, data| {
            if name == b"error" {
                failed = Some(data.to_vec());
            } else if contains(data, b"\"finish_reason\":") {
                last = Some(data.to_vec());
            } else if data != b"[DONE]" {
                match before.replace(now) {
                    None => sample.first_token = Some(now - due),
                    Some(before) => sample.gaps.push(now - before),
                }
            }
        });
    }
    if let Some(failed) = failed {
        return Err(Problem::read(&failed).map_or("error_event".into(), |problem| problem.code.into()));
    }
    let last: Last = last.and_then(|data| serde_json::from_slice(&data).ok()).ok_or("no_last_event")?;
    match last.finish_reason.as_str() {
        "length" | "stop" => {
            // An answer whose only text came with its end.
            sample.first_token.get_or_insert_with(|| due.elapsed());
            Ok(last.usage)
        }
        other => Err(other.to_owned().into()),
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// What is read of an `application/problem+json`.
#[derive(Deserialize)]
struct Problem {
    code: String,
    detail: Option<String>,
}

impl Problem {
    fn read(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_plain_http_with_or_without_a_path() {
        let client = Client::new("http://localhost:8080/softserve/", None).unwrap();
        assert_eq!((client.address.as_str(), client.prefix.as_str()), ("localhost:8080", "/softserve"));
        assert_eq!(Client::new("http://[::1]", None).unwrap().address, "[::1]:80");
        for (url, words) in [("https://a.example", "plain http"), ("localhost:8080", "expected"), ("", "expected")] {
            let error = Client::new(url, None).unwrap_err().to_string();
            assert!(error.contains(words), "{url}: {error}");
        }
        assert!(Client::new("http://a", Some("line\nbreak")).is_err());
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_an_error_with_a_code() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        let ask = Ask { path: "/".to_owned(), body: Bytes::new() };
        let sample = Client::new(&url, None).unwrap().ask(ask, Instant::now()).await;
        assert_eq!(sample.outcome, Err("no_connection".into()));
    }
}
