//! The real program: options, start, stop and restart.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    fixtures,
    support::{LONG, MODEL, TASK, copy, prompt_files},
};

/// A server in a process of its own, on a free port, with the fixture's model and prompts.
pub struct Process {
    child: Child,
    pub url: String,
    /// What it printed for the person who started it.
    pub summary: String,
    /// Reads its log as it comes, so that a full pipe does not hold it up.
    log: Option<JoinHandle<String>>,
}

/// The program with nothing inherited that could change what it does.
pub fn softserve(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_softserve"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SOFTSERVE_")) {
        command.env_remove(name);
    }
    command.env("XDG_DATA_HOME", home).env("HOME", home).current_dir(home);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub fn with_fixture(home: &Path) -> Command {
    let prompts = home.join("prompts");
    if !prompts.exists() {
        copy(&fixtures::dir(MODEL).join("prompts"), &prompts);
    }
    let mut command = softserve(home);
    command.arg("--model").arg(fixtures::dir(MODEL)).arg("--listen=127.0.0.1:0").arg("--kv-cache=8MiB");
    command
}

impl Process {
    /// Starts it and waits until it listens.
    pub fn start(mut command: Command) -> Self {
        let child = command.spawn().unwrap();
        let mut process = Self { child, url: String::new(), summary: String::new(), log: None };
        let mut stderr = process.child.stderr.take().unwrap();
        process.log = Some(std::thread::spawn(move || {
            let mut log = String::new();
            stderr.read_to_string(&mut log).unwrap();
            log
        }));
        let stdout = BufReader::new(process.child.stdout.take().unwrap());
        for line in stdout.lines().map(Result::unwrap) {
            if let Some(url) = line.trim().strip_prefix("listen ") {
                url.trim().clone_into(&mut process.url);
                return process;
            }
            process.summary += &(line + "\n");
        }
        panic!("it did not start: {}", process.wait().1);
    }

    pub fn at(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    pub fn get(&self, path: &str) -> (u16, Value) {
        read(agent().get(self.at(path)).call())
    }

    /// A number of `/metrics`, by its whole name.
    pub fn metric(&self, name: &str) -> f64 {
        let metrics = agent().get(self.at("/metrics")).call().unwrap().body_mut().read_to_string().unwrap();
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {metrics}")).parse().unwrap()
    }

    pub fn generate(&self, task: &str, body: Value) -> (u16, Value) {
        read(agent().post(self.at(&format!("/v1/tasks/{task}/generate"))).send_json(body))
    }

    /// The memory it holds, in bytes, where the system tells.
    pub fn resident_bytes(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib * 1024)
    }

    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status().unwrap();
        assert!(status.success());
    }

    /// Waits for its end: exit code and log.
    pub fn wait(mut self) -> (Option<i32>, String) {
        let log = self.log.take().unwrap().join().unwrap();
        (self.child.wait().unwrap().code(), log)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn agent() -> ureq::Agent {
    let timeout = Some(Duration::from_secs(60));
    ureq::Agent::config_builder().http_status_as_error(false).timeout_global(timeout).build().into()
}

pub fn read(sent: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> (u16, Value) {
    let mut answer = sent.unwrap();
    (answer.status().as_u16(), answer.body_mut().read_json().unwrap())
}

pub fn output(mut command: Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn a_stream_is_active_and_is_timed_until_its_end() {
    let home = tempfile::tempdir().unwrap();
    let mut command = with_fixture(home.path());
    command.arg("--prompts=prompts");
    let process = Process::start(command);
    let request = json!({"input": "a", "max_tokens": 480, "ignore_eos": true, "stream": true, "n": 16});
    let path = process.at(&format!("/v1/tasks/{TASK}/generate"));
    let mut answer = agent().post(path).send_json(request).unwrap();
    // The request for the metrics is active, too.
    assert_eq!(process.metric("softserve_http_requests_active"), 2.0);
    let of_route = "{method=\"POST\",route=\"/v1/tasks/{task}/generate\"}";
    let counted = || agent().get(process.at("/metrics")).call().unwrap().body_mut().read_to_string().unwrap();
    assert!(!counted().contains(&format!("softserve_http_request_duration_seconds_count{of_route}")));
    assert!(answer.body_mut().read_to_string().unwrap().ends_with("[DONE]\n\n"));
    let until = Instant::now() + LONG;
    while !counted().contains(&format!("softserve_http_request_duration_seconds_count{of_route} 1")) {
        assert!(Instant::now() < until, "{}", counted());
    }
    assert_eq!(process.metric("softserve_http_requests_active"), 1.0);
}

#[test]
fn a_signal_lets_a_running_stream_finish_and_ends_with_code_0() {
    for signal in ["TERM", "INT"] {
        let home = tempfile::tempdir().unwrap();
        let mut command = with_fixture(home.path());
        command.arg("--prompts=prompts");
        let process = Process::start(command);
        let request = json!({"input": "a", "max_tokens": 480, "ignore_eos": true, "stream": true, "n": 4});
        let path = process.at(&format!("/v1/tasks/{TASK}/generate"));
        let mut answer = agent().post(path).send_json(request).unwrap();
        let mut lines = BufReader::new(answer.body_mut().as_reader()).lines().map(Result::unwrap);
        assert!(lines.next().unwrap().starts_with("data: "));
        process.signal(signal);
        let events: Vec<_> = lines.filter_map(|line| line.strip_prefix("data: ").map(str::to_owned)).collect();
        assert_eq!(events.last().unwrap(), "[DONE]");
        let last: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
        assert_eq!((&last["finish_reason"], &last["usage"]["completion_tokens"]), (&json!("length"), &json!(1920)));
        let (code, log) = process.wait();
        assert_eq!(code, Some(0), "{log}");
        assert!(log.contains("stopped"), "{log}");
    }
}

#[test]
fn what_the_drain_time_does_not_allow_is_cancelled_and_said_so() {
    let home = tempfile::tempdir().unwrap();
    let mut command = with_fixture(home.path());
    command.args(["--prompts=prompts", "--drain-timeout=1ms"]);
    let process = Process::start(command);
    let request = json!({"input": "a", "max_tokens": 480, "ignore_eos": true, "stream": true, "n": 16});
    let path = process.at(&format!("/v1/tasks/{TASK}/generate"));
    let mut answer = agent().post(path).send_json(request).unwrap();
    let mut lines = BufReader::new(answer.body_mut().as_reader()).lines().map(Result::unwrap);
    lines.next();
    process.signal("TERM");
    let rest: Vec<_> = lines.collect();
    let ends: Vec<_> = rest.iter().filter(|line| line.contains("\"finish_reason\"")).collect();
    assert_eq!(ends.len(), 16);
    assert!(ends.iter().all(|end| end.contains("cancelled") || end.contains("length")), "{ends:?}");
    assert_eq!(process.wait().0, Some(0));
}

/// Opens a connection and sends a request whose last `missing` bytes do not come.
fn connect(address: &str, body: &str, missing: usize) -> std::net::TcpStream {
    let mut open = std::net::TcpStream::connect(address).unwrap();
    let head = format!(
        "POST /v1/tasks/{TASK}/generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    let sent = [head.as_bytes(), body.as_bytes()].concat();
    std::io::Write::write_all(&mut open, &sent[..sent.len() - missing]).unwrap();
    open
}

#[test]
fn a_request_that_has_not_arrived_does_not_keep_the_server_from_stopping() {
    let home = tempfile::tempdir().unwrap();
    let mut command = with_fixture(home.path());
    // Were one of them waited for, this test would take an hour.
    command.args(["--prompts=prompts", "--drain-timeout=1h"]);
    let process = Process::start(command);
    let address = process.url.trim_start_matches("http://").to_owned();
    let body = json!({"input": "the dog"}).to_string();
    // In the body, before it, in the head, and a connection without a request.
    let mut open: Vec<_> =
        [5, body.len(), body.len() + 20].map(|missing| connect(&address, &body, missing)).into_iter().collect();
    open.push(std::net::TcpStream::connect(&address).unwrap());
    // Answered on a connection that came later: the others have been accepted.
    assert_eq!(process.get("/health/ready").0, 200);
    process.signal("TERM");
    let mut answer = String::new();
    open[0].read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("the server is stopping"), "{answer}");
    let (code, log) = process.wait();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("still open"), "{log}");
}

#[test]
fn a_second_signal_stops_at_once() {
    let home = tempfile::tempdir().unwrap();
    let mut command = with_fixture(home.path());
    command.args(["--prompts=prompts", "--drain-timeout=1h"]);
    let process = Process::start(command);
    // A client that does not read its answer keeps its connection open for as long as the server lets it.
    let address = process.url.trim_start_matches("http://").to_owned();
    let address = address.as_str();
    let request = json!({"input": "a", "max_tokens": 480, "ignore_eos": true, "stream": true, "n": 16, "logprobs": 20});
    let mut open = connect(address, &request.to_string(), 0);
    let mut answer = [0; 12];
    open.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    process.signal("TERM");
    // The first has been heard when nobody accepts connections any more.
    while std::net::TcpStream::connect(address).is_ok() {}
    process.signal("TERM");
    let (code, log) = process.wait();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("at once"), "{log}");
}

#[test]
fn an_uploaded_task_is_there_after_a_restart() {
    let home = tempfile::tempdir().unwrap();
    let start = || {
        let mut command = with_fixture(home.path());
        command.arg("--prompts=prompts");
        Process::start(command)
    };
    let first = start();
    let upload = agent()
        .post(first.at("/v1/admin/tasks/kept/versions"))
        .header("content-type", "application/octet-stream")
        .send(&prompt_files("prompt33").1[..]);
    let (status, uploaded) = read(upload);
    assert_eq!(status, 201, "{uploaded}");
    let request = json!({"input": "the cat", "max_tokens": 8});
    let before = first.generate("kept", request.clone()).1;
    // Not even a chance to clean up.
    first.signal("KILL");
    assert_eq!(first.wait().0, None);
    let second = start();
    assert!(second.summary.contains("kept"), "{}", second.summary);
    let after = second.generate("kept", request).1;
    assert_eq!((&after["output"], &after["version"]), (&before["output"], &uploaded["version"]));
}

#[test]
fn a_flag_goes_before_the_environment_and_that_before_the_file() {
    let home = tempfile::tempdir().unwrap();
    let config = home.path().join("softserve.toml");
    std::fs::write(&config, "prompts = \"from-file\"\nlog_level = \"debug\"\n").unwrap();
    let prompts = |arguments: &[&str], variables: &[(&str, &str)]| {
        let mut command = with_fixture(home.path());
        command.arg("--config").arg(&config).args(arguments).envs(variables.iter().copied());
        let process = Process::start(command);
        let line = process.summary.lines().find(|line| line.trim().starts_with("prompts")).unwrap();
        line.rsplit(' ').next().unwrap().to_owned()
    };
    let variable = [("SOFTSERVE_PROMPTS", "from-env")];
    assert_eq!(prompts(&[], &[]), "from-file");
    assert_eq!(prompts(&[], &variable), "from-env");
    assert_eq!(prompts(&["--prompts=from-flag"], &variable), "from-flag");
}

#[test]
fn what_cannot_work_ends_with_one_line_that_says_why() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("typo.toml"), "max_batches = 3\n").unwrap();
    let busy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let busy = busy.local_addr().unwrap().to_string();
    for (arguments, code, words) in [
        (vec!["--listen", &busy], 1, vec!["cannot listen", &busy, "--listen"]),
        (vec!["--model", "no/such/folder"], 1, vec!["no/such/folder"]),
        (vec!["--listen", "8080"], 2, vec!["--listen", "8080", "127.0.0.1:8080"]),
        (vec!["--max-batch", "0"], 2, vec!["--max-batch", "expected 1 to 1000000"]),
        (vec!["--config", "typo.toml"], 2, vec!["typo.toml", "max_batches", "max_batch"]),
        (vec!["--config", "none.toml"], 2, vec!["none.toml"]),
        (vec!["--api-key", "short"], 2, vec!["--api-key", "5 bytes"]),
        (vec!["--keep-for", "1h"], 2, vec!["--keep-for", "--keep-versions"]),
        (vec!["--prompts", "s4://bucket/x"], 2, vec!["--prompts", "s3://BUCKET/PREFIX"]),
        (vec!["--device", "cuda"], 1, vec!["--device", "cpu"]),
        (vec!["--log-level", "a=b=c"], 1, vec!["--log-level"]),
        (vec!["--random-weights", "gpt-9"], 1, vec!["gpt-9", "config.json", "smollm2-135m"]),
        (vec!["--random-weights", "a.json", "--model", "b"], 2, vec!["--random-weights", "--model", "leave one out"]),
    ] {
        let mut command = softserve(home.path());
        command.arg("serve").args(&arguments);
        if !arguments.contains(&"--listen") {
            command.arg("--listen=127.0.0.1:0");
        }
        let (found, stdout, stderr) = output(command);
        assert_eq!(found, Some(code), "{arguments:?}: {stderr}");
        let errors: Vec<_> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!((errors.len(), stdout.as_str()), (1, ""), "{arguments:?}: {stderr}");
        assert!(words.iter().all(|word| errors[0].contains(word)), "{arguments:?}: {stderr}");
        assert!(!stderr.contains("panic"), "{stderr}");
    }
    let mut command = softserve(home.path());
    command.args(["--dtype", "f64"]);
    let (code, _, stderr) = output(command);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("bf16"), "{stderr}");
}

#[test]
fn help_says_what_every_option_does_and_shows_no_key() {
    let home = tempfile::tempdir().unwrap();
    let help = |arguments: &[&str]| {
        let mut command = softserve(home.path());
        command.args(arguments).env("SOFTSERVE_ADMIN_KEY", "hidden-key-1");
        let (code, stdout, stderr) = output(command);
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{arguments:?}");
        assert!(!stdout.contains("hidden-key-1"));
        stdout
    };
    assert!(help(&["--version"]).starts_with("softserve "));
    let top = help(&["--help"]);
    for command in ["serve", "convert", "inspect", "push", "health", "openapi"] {
        assert!(top.lines().any(|line| line.trim_start().starts_with(command)), "{top}");
        help(&[command, "--help"]);
    }
    let serve = help(&["serve", "--help"]);
    for option in ["--model", "--prompts", "--listen", "--admin-key", "SOFTSERVE_LISTEN", "127.0.0.1:8080"] {
        assert!(serve.contains(option), "{option}: {serve}");
    }
}

#[test]
fn the_specification_is_printed_as_it_is_served() {
    let home = tempfile::tempdir().unwrap();
    let mut command = softserve(home.path());
    // Variables meant for `serve` do not disturb other commands.
    command.arg("openapi").env("SOFTSERVE_LISTEN", "127.0.0.1:0");
    let (code, stdout, stderr) = output(command);
    assert_eq!(code, Some(0), "{stderr}");
    let printed: Value = serde_json::from_str(&stdout).unwrap();
    let mut command = with_fixture(home.path());
    command.arg("--prompts=prompts");
    let served = Process::start(command).get("/openapi.json").1;
    assert_eq!(printed, served);
}

#[test]
fn a_reader_that_has_read_enough_is_no_error() {
    let home = tempfile::tempdir().unwrap();
    let mut child = softserve(home.path()).arg("openapi").spawn().unwrap();
    drop(child.stdout.take());
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    assert_eq!((status.code(), String::from_utf8_lossy(&stderr).as_ref()), (Some(0), ""));
}

#[test]
fn an_address_that_others_can_reach_needs_an_admin_key_which_is_never_logged() {
    let home = tempfile::tempdir().unwrap();
    let start = |key: Option<&str>| {
        let mut command = softserve(home.path());
        command.arg("--model").arg(fixtures::dir(MODEL)).args(["--listen=0.0.0.0:0", "--prompts=prompts"]);
        command.args(["--log-level=trace", "--log-format=text"]);
        command.envs(key.map(|key| ("SOFTSERVE_ADMIN_KEY", key)));
        let mut process = Process::start(command);
        process.url = process.url.replace("0.0.0.0", "127.0.0.1");
        process
    };
    let open = start(None);
    assert_eq!(open.get("/v1/admin/tasks").1["code"], "forbidden");
    assert_eq!(open.get("/v1/tasks").0, 200);
    let keyed = start(Some("open-sesame-1"));
    let ask = |key: &str| {
        read(agent().get(keyed.at("/v1/admin/tasks")).header("authorization", format!("Bearer {key}")).call()).0
    };
    assert_eq!((ask("open-sesame-1"), ask("open-sesame-2")), (200, 401));
    keyed.signal("TERM");
    let (code, log) = keyed.wait();
    assert_eq!(code, Some(0));
    assert!(log.contains("/v1/admin/tasks") && !log.contains("sesame"), "{log}");
}

#[test]
fn a_json_log_is_json_on_every_line() {
    let home = tempfile::tempdir().unwrap();
    let mut command = with_fixture(home.path());
    command.args(["--prompts=prompts", "--log-format=json"]);
    let mut child = command.spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap())
        .lines()
        .map(|line| -> Value { serde_json::from_str(&line.unwrap()).unwrap() });
    let listening = log.find(|line| line["message"] == "listening").unwrap();
    let url = listening["url"].as_str().unwrap().to_owned();
    let (status, problem) = read(agent().get(format!("{url}/v1/tasks/nobody")).call());
    let answered = log.find(|line| line["message"] == "answered").unwrap();
    assert_eq!((status, &answered["status"], &answered["code"]), (404, &json!(404), &json!("task_not_found")));
    assert_eq!(answered["span"]["request_id"], problem["request_id"]);
    child.kill().unwrap();
    child.wait().unwrap();
}
