//! What the sub-commands that talk to a running server share.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

/// Which server, and as whom.
#[derive(Debug, Clone, Args)]
pub struct ServerArgs {
    /// The server's address.
    #[arg(long, env = "SOFTSERVE_URL", default_value = "http://127.0.0.1:8080", value_name = "URL")]
    pub url: String,
}

/// What the server answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Value,
}

impl ServerArgs {
    /// The address of a path on the server.
    pub fn at(&self, path: &str) -> String {
        format!("{}{path}", self.url.trim_end_matches('/'))
    }

    /// An agent that hands back every status instead of failing on some.
    pub fn agent(&self, timeout: Duration) -> ureq::Agent {
        ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(timeout)).build().into()
    }

    /// Reads an answer; `sent` is what the request's sending gave.
    pub fn answer(&self, sent: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Answer> {
        let mut response = sent.with_context(|| format!("cannot reach a server at {}; is it running?", self.url))?;
        let status = response.status().as_u16();
        let text = response.body_mut().read_to_string().context("the answer was cut off")?;
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        Ok(Answer { status, body })
    }
}

impl Answer {
    /// The body, or the problem that the server described as an error.
    pub fn success(self) -> Result<Value> {
        if (200..300).contains(&self.status) {
            return Ok(self.body);
        }
        let field = |name: &str| self.body.get(name).and_then(Value::as_str);
        match (field("title"), field("detail")) {
            (Some(title), Some(detail)) => bail!("{title} ({}): {detail}", self.status),
            _ => bail!("the server answered {}: {}", self.status, self.body),
        }
    }
}
