//! The registry with many tasks: how long the server takes to start, what it takes in memory, and what a request to a task costs
//! whose prompt is in memory or not.
//!
//! `cargo bench --bench registry` writes folders of 1,000, 10,000 and 100,000 tasks of the demo's prompts below the temporary
//! folder, starts the program on each, and prints a table. `-- 1000` measures only that many tasks.

#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a benchmark that cannot start has nothing to measure; its table is for people"
)]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use softserve::prompt::files::PromptFiles;

/// A file system allows so many names of one file, and less than it does.
const LINKS_PER_FILE: usize = 10_000;
/// Tasks that are asked cold, and then warm.
const ASKED: usize = 200;

fn main() {
    // cargo bench adds an option of its own.
    let counts: Vec<usize> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let counts = if counts.is_empty() { vec![1_000, 10_000, 100_000] } else { counts };
    println!("|    tasks | start, s | memory, MB | cold, ms | warm, ms | no such task, ms | after reading ahead, MB |");
    println!("|---------:|---------:|-----------:|---------:|---------:|-----------------:|------------------------:|");
    for count in counts {
        let prompts = tempfile::tempdir().expect("a temporary folder");
        write_tasks(prompts.path(), count);
        // The second start: the first has the folders read from the disk.
        drop(Server::start(prompts.path()));
        measure(prompts.path(), count);
    }
}

/// Writes tasks that differ in their task.json and share their tensors' file.
fn write_tasks(root: &Path, count: usize) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("prompts/sentiment");
    let mut files = PromptFiles::read_dir(&source).expect("the demo's prompt");
    files.curve = None;
    let shared = root.join(".shared");
    fs::create_dir_all(&shared).expect("makes a folder");
    let mut task: Value = serde_json::from_slice(files.task.as_deref().expect("task.json")).expect("JSON");
    for i in 0..count {
        task["description"] = json!(format!("task {i}"));
        files.task = Some(task.to_string().into());
        let id = files.digest().id();
        let versions = root.join(format!("task-{i:06}/versions")).join(&id);
        fs::create_dir_all(&versions).expect("makes a folder");
        for (name, bytes) in files.content() {
            let file = versions.join(name);
            if name == "task.json" {
                fs::write(file, bytes).expect("writes");
                continue;
            }
            let original = shared.join(format!("{}-{name}", i / LINKS_PER_FILE));
            if !original.exists() {
                fs::write(&original, bytes).expect("writes");
            }
            fs::hard_link(&original, file).expect("links");
        }
        let active = json!({"version": id, "generation": 1}).to_string();
        fs::write(root.join(format!("task-{i:06}/active.json")), active).expect("writes");
    }
}

fn measure(prompts: &Path, count: usize) {
    let began = Instant::now();
    let server = Server::start(prompts);
    assert_eq!(server.generate(&task(count - 1)).0, 200);
    let start = began.elapsed();
    let memory = server.memory();
    // From the end: the server reads ahead from the beginning.
    let asked: Vec<String> = (0..ASKED).map(|i| task(count - 2 - i * (count / 2 / ASKED).max(1))).collect();
    let cold = median(&asked, |task| assert_eq!(server.generate(task).0, 200));
    let warm = median(&asked, |task| assert_eq!(server.generate(task).0, 200));
    let missing = median(&asked, |_| assert_eq!(server.generate("no-such-task").0, 404));
    server.wait_until_read(count);
    println!(
        "| {count:8} | {:8.2} | {memory:10.0} | {:8.2} | {:8.2} | {:16.2} | {:23.0} |",
        start.as_secs_f64(),
        cold * 1e3,
        warm * 1e3,
        missing * 1e3,
        server.memory()
    );
}

fn task(i: usize) -> String {
    format!("task-{i:06}")
}

/// The median of the seconds that each takes.
fn median(tasks: &[String], mut ask: impl FnMut(&str)) -> f64 {
    let mut seconds: Vec<f64> = tasks
        .iter()
        .map(|task| {
            let began = Instant::now();
            ask(task);
            began.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// The program, stopped when it is dropped.
struct Server {
    child: Child,
    url: String,
    agent: ureq::Agent,
}

impl Server {
    fn start(prompts: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_softserve"))
            .args(["serve", "--listen", "127.0.0.1:0", "--kv-cache", "32MiB", "--log-level", "error", "--prompts"])
            .arg(prompts)
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts the program");
        let lines = BufReader::new(child.stdout.take().expect("its output")).lines();
        let url =
            lines.map_while(Result::ok).find_map(|line| Some(line.trim().strip_prefix("listen ")?.trim().to_owned()));
        let config = ureq::Agent::config_builder().http_status_as_error(false).build();
        Self { child, url: url.expect("it listens"), agent: config.into() }
    }

    fn generate(&self, task: &str) -> (u16, Value) {
        let body = json!({"input": "good", "max_tokens": 1});
        let sent = self.agent.post(format!("{}/v1/tasks/{task}/generate", self.url)).send_json(body);
        let mut answer = sent.expect("an answer");
        (answer.status().as_u16(), answer.body_mut().read_json().expect("JSON"))
    }

    /// Resident memory in megabytes.
    fn memory(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
        kib.unwrap_or(f64::NAN) * 1024.0 / 1e6
    }

    /// Waits until the processor's time of the server stands still: it has read all that it reads ahead.
    fn wait_until_read(&self, count: usize) {
        let ticks = || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
            let after_name = stat.rsplit(')').next().unwrap_or_default().to_owned();
            after_name.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum::<u64>()
        };
        let longest = Instant::now() + Duration::from_millis(60_000 + 5 * count as u64);
        while Instant::now() < longest {
            let before = ticks();
            std::thread::sleep(Duration::from_secs(1));
            if ticks() - before <= 2 {
                return;
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have stopped by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
