//! The server that a benchmark starts for itself: this very program as `serve`, in a process of its
//! own, so that what is measured is what users run.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum as _;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::BenchArgs;
use crate::bench::load::{Arrival, Load};

/// Stops with its owner.
#[derive(Debug)]
pub struct ServerInside {
    child: Child,
    /// Kept open, so that the server has somewhere to print to.
    _stdout: BufReader<ChildStdout>,
    /// Its learned prompts; goes with it.
    _prompts: TempDir,
    arguments: Vec<String>,
    url: String,
    /// What it says of its model.
    model: String,
}

/// `serve`'s own default.
const MAX_WAITING: usize = 256;
/// The most that `serve` takes.
const MOST_WAITING: usize = 1_000_000;

impl ServerInside {
    /// Starts it and waits until it listens.
    pub fn start(args: &BenchArgs, loads: &[Load]) -> Result<Self> {
        let prompts = tempfile::tempdir().context("cannot make a folder for the prompts")?;
        let arguments = arguments(args, loads);
        let program = std::env::current_exe().context("cannot find this program to start it as a server")?;
        let mut child = Command::new(program)
            .arg("serve")
            .args(&arguments)
            .args(["--listen=127.0.0.1:0", "--log-format=text"])
            .arg("--prompts")
            .arg(prompts.path())
            // What was given to us and is not passed on must not reach it either.
            .env_remove("SOFTSERVE_CONFIG")
            .env_remove("SOFTSERVE_MODEL")
            .env_remove("SOFTSERVE_RANDOM_WEIGHTS")
            // Keys are for servers that others can reach; with them we would need one of each kind.
            .env_remove("SOFTSERVE_API_KEY")
            .env_remove("SOFTSERVE_API_KEY_FILE")
            .env_remove("SOFTSERVE_ADMIN_KEY")
            .env_remove("SOFTSERVE_ADMIN_KEY_FILE")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a server")?;
        let stdout = child.stdout.take().context("the server has no output")?;
        let mut server = Self {
            child,
            _stdout: BufReader::new(stdout),
            _prompts: prompts,
            arguments,
            url: String::new(),
            model: String::new(),
        };
        server.wait_until_it_listens()?;
        Ok(server)
    }

    fn wait_until_it_listens(&mut self) -> Result<()> {
        let mut line = String::new();
        while self._stdout.read_line(&mut line).context("cannot read what the server prints")? > 0 {
            match line.trim().split_once(' ') {
                Some(("model", model)) => model.trim().clone_into(&mut self.model),
                Some(("listen", url)) => {
                    url.trim().clone_into(&mut self.url);
                    return Ok(());
                }
                _ => {}
            }
            line.clear();
        }
        bail!("the server did not start; its error is above")
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// For the report.
    pub fn describe(&self) -> Value {
        json!({"model": self.model, "arguments": self.arguments})
    }

    /// Bytes that it holds now and held at most, where the system tells.
    pub fn memory(&self) -> Option<Value> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let bytes = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib * 1024)
        };
        Some(json!({"resident_bytes": bytes("VmRSS:")?, "peak_bytes": bytes("VmHWM:")?}))
    }
}

impl Drop for ServerInside {
    fn drop(&mut self) {
        // It holds nothing that has to be kept, and may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn arguments(args: &BenchArgs, loads: &[Load]) -> Vec<String> {
    let mut out = args.serve.clone();
    let given = |option: &str| args.serve.iter().any(|a| a.split('=').next() == Some(option));
    let mut add = |option: &str, value: Option<String>| {
        if let Some(value) = value.filter(|_| !given(option)) {
            out.push(format!("{option}={value}"));
        }
    };
    let model = &args.model;
    add("--model", model.model.clone());
    add("--random-weights", model.random_weights.clone());
    add("--context", model.context.map(|n| n.to_string()));
    add("--device", model.device.map(String::from));
    add("--backend", model.backend.and_then(|b| b.to_possible_value()).map(|b| b.get_name().to_owned()));
    add("--dtype", model.dtype.and_then(|d| d.to_possible_value()).map(|d| d.get_name().to_owned()));
    add("--threads", model.threads.map(|n| n.to_string()));
    add("--kv-cache", args.kv_cache.map(|size| size.0.to_string()));
    // Random weights repeat themselves, and guesses of what is repeated would flatter.
    add("--draft-tokens", Some("0".to_owned()));
    add("--log-level", Some("warn".to_owned()));
    // All the clients of a closed loop may wait, also if all ask one task.
    let clients = loads.iter().map(|load| match load.arrival {
        Arrival::Concurrency(n) => n,
        Arrival::Rate(_) => 0,
    });
    add("--max-waiting", Some((2 * clients.sum::<usize>()).clamp(MAX_WAITING, MOST_WAITING).to_string()));
    let tasks = args.prompt_lengths(loads).len();
    add("--max-tasks", (tasks > 10_000).then(|| tasks.to_string()));
    out
}
