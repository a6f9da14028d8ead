//! Everything at once, for a while: random arrivals, clients that leave, deadlines, uploads, replacements and deletes, and
//! a cache that holds two long sequences. Every greedy answer is the one that its version gives alone, nothing
//! is left in the cache, and memory does not grow.
//!
//! `cargo test` runs a few hundred requests; `SOFTSERVE_SOAK_SECONDS=600 cargo test --test it soak` goes on for that long.

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};

use crate::{
    process::{Process, agent, read, softserve},
    support::LONG,
    tiny_model::TinyModel,
};

const REQUESTS: usize = 400;
const CLIENTS: usize = 12;
const TASKS: usize = 4;
/// Virtual tokens of each version: less than a block, whole blocks, and some over.
const VERSIONS: [usize; 6] = [5, 20, 32, 45, 64, 70];
/// Some begin as others do.
const INPUTS: [&str; 6] = [
    "a",
    "the dog ran after the ball",
    "the dog ran after the ball and did not come back",
    "the dog ran after the ball and did not come back before it was dark",
    "once upon a time there was a very small house at the end of the road",
    "0123456789",
];
const MOST_TOKENS: usize = 48;
const SEED: u64 = 20261123;
/// How much the second half may add to memory.
const MAX_GROWTH: u64 = 8 << 20;

/// By version and input, the tokens that it gives alone.
type Reference = HashMap<(String, usize), Vec<u64>>;

struct Soak {
    server: Process,
    hidden_size: usize,
    reference: Reference,
    /// Requests that may still be sent, or until when they may.
    left: AtomicUsize,
    until: Option<Instant>,
    over: AtomicBool,
    answered: AtomicUsize,
    left_early: AtomicUsize,
    timed_out: AtomicUsize,
    absent: AtomicUsize,
    wrong: Mutex<Vec<String>>,
}

fn seconds() -> Option<u64> {
    let text = std::env::var("SOFTSERVE_SOAK_SECONDS").ok()?;
    Some(text.parse().expect("SOFTSERVE_SOAK_SECONDS is a number of seconds"))
}

impl Soak {
    fn prompt(&self, version: usize) -> Vec<u8> {
        let (rows, columns) = (VERSIONS[version], self.hidden_size);
        let mut random = StdRng::seed_from_u64(version as u64);
        let data: Vec<u8> = (0..rows * columns).flat_map(|_| random.random_range(-1f32..1.0).to_le_bytes()).collect();
        let tensor = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![rows, columns], &data).unwrap();
        safetensors::serialize([("prompt_embeddings", tensor)], None).unwrap()
    }

    fn upload(&self, task: &str, version: usize) -> (u16, Value) {
        let path = self.server.at(&format!("/v1/admin/tasks/{task}/versions"));
        read(agent().post(path).header("content-type", "application/octet-stream").send(&self.prompt(version)[..]))
    }

    fn body(input: usize, max_tokens: usize) -> Value {
        json!({"input": INPUTS[input], "max_tokens": max_tokens, "ignore_eos": true, "logprobs": 0})
    }

    /// Asks every version everything, one request at a time.
    fn ask_alone(&mut self) {
        for version in 0..VERSIONS.len() {
            let (status, uploaded) = self.upload("alone", version);
            assert_eq!(status, 201, "{uploaded}");
            for input in 0..INPUTS.len() {
                let (status, answer) = self.server.generate("alone", Self::body(input, MOST_TOKENS));
                assert_eq!((status, &answer["version"]), (200, &uploaded["version"]), "{answer}");
                let ids = ids(&answer);
                assert_eq!(ids.len(), MOST_TOKENS);
                self.reference.insert((answer["version"].as_str().unwrap().to_owned(), input), ids);
            }
        }
        let different: std::collections::HashSet<_> = self.reference.values().collect();
        assert!(different.len() > self.reference.len() / 2, "the answers do not tell versions and inputs apart");
    }

    /// Whether another request may be sent.
    fn go_on(&self) -> bool {
        match self.until {
            Some(until) => Instant::now() < until,
            None => self.left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok(),
        }
    }

    fn client(&self, number: usize) {
        let mut random = StdRng::seed_from_u64(SEED + number as u64);
        while self.go_on() {
            // Arrivals at random: now and then all at once.
            std::thread::sleep(Duration::from_micros(random.random_range(0..20_000)));
            let task = format!("soak-{}", random.random_range(0..TASKS));
            let (input, tokens) = (random.random_range(0..INPUTS.len()), random.random_range(1..=MOST_TOKENS));
            let mut body = Self::body(input, tokens);
            match random.random_range(0..10) {
                0 | 1 => self.leave_early(&task, input, body, random.random_range(0..tokens)),
                2 | 3 => self.stream(&task, input, body),
                4 => {
                    body["timeout_ms"] = json!(random.random_range(1..60));
                    self.ask(&task, input, tokens, body);
                }
                _ => self.ask(&task, input, tokens, body),
            }
        }
    }

    fn ask(&self, task: &str, input: usize, tokens: usize, body: Value) {
        let timed = body.get("timeout_ms").is_some();
        let (status, answer) = self.server.generate(task, body);
        if status != 200 {
            return self.refused(status, &answer);
        }
        let found = ids(&answer);
        if answer["finish_reason"] == "timeout" && timed {
            self.timed_out.fetch_add(1, Relaxed);
        } else if found.len() != tokens {
            self.note(format!("{tokens} tokens were asked for: {answer}"));
        }
        self.compare(&answer["version"], input, &found);
    }

    fn stream(&self, task: &str, input: usize, mut body: Value) {
        body["stream"] = json!(true);
        let path = self.server.at(&format!("/v1/tasks/{task}/generate"));
        let mut answer = agent().post(path).send_json(&body).unwrap();
        if answer.status() != 200 {
            return self.refused(answer.status().as_u16(), &answer.body_mut().read_json().unwrap());
        }
        let (mut found, mut version, mut finish) = (Vec::new(), Value::Null, Value::Null);
        for line in BufReader::new(answer.body_mut().as_reader()).lines().map(Result::unwrap) {
            let Some(event) = line.strip_prefix("data: ").filter(|event| *event != "[DONE]") else { continue };
            let event: Value = serde_json::from_str(event).unwrap();
            found.extend(ids(&event));
            version = event["version"].clone();
            finish = event["finish_reason"].clone();
        }
        if finish != "length" || json!(found.len()) != body["max_tokens"] {
            self.note(format!("a stream of {} tokens ended with {finish}, asked: {body}", found.len()));
        }
        self.compare(&version, input, &found);
    }

    fn leave_early(&self, task: &str, input: usize, mut body: Value, after: usize) {
        body["stream"] = json!(true);
        let path = self.server.at(&format!("/v1/tasks/{task}/generate"));
        let mut answer = agent().post(path).send_json(&body).unwrap();
        if answer.status() != 200 {
            return self.refused(answer.status().as_u16(), &answer.body_mut().read_json().unwrap());
        }
        let lines = BufReader::new(answer.body_mut().as_reader()).lines().map(Result::unwrap);
        let mut found = Vec::new();
        let mut version = Value::Null;
        for line in lines.filter(|line| line.starts_with("data: {")).take(after) {
            let event: Value = serde_json::from_str(&line["data: ".len()..]).unwrap();
            found.extend(ids(&event));
            version = event["version"].clone();
        }
        drop(answer);
        if after > 0 {
            self.compare(&version, input, &found);
        }
        self.left_early.fetch_add(1, Relaxed);
    }

    fn compare(&self, version: &Value, input: usize, found: &[u64]) {
        self.answered.fetch_add(1, Relaxed);
        let right = self.reference.get(&(version.as_str().unwrap_or_default().to_owned(), input));
        if !right.is_some_and(|right| right.starts_with(found)) {
            self.note(format!("version {version}, input {input}: found {found:?}, alone {right:?}"));
        }
    }

    fn refused(&self, status: u16, problem: &Value) {
        match (status, problem["code"].as_str()) {
            (404, Some("task_not_found")) => _ = self.absent.fetch_add(1, Relaxed),
            (429, Some("overloaded")) => {}
            _ => self.note(format!("{status}: {problem}")),
        }
    }

    fn note(&self, what: String) {
        self.wrong.lock().unwrap().push(what);
    }

    /// Uploads, replaces and deletes until all is over.
    fn change(&self) {
        let mut random = StdRng::seed_from_u64(SEED - 1);
        while !self.over.load(Relaxed) {
            let task = format!("soak-{}", random.random_range(0..TASKS));
            let status = match random.random_range(0..8) {
                0 => {
                    let path = self.server.at(&format!("/v1/admin/tasks/{task}"));
                    agent().delete(path).call().unwrap().status().as_u16()
                }
                _ => self.upload(&task, random.random_range(0..VERSIONS.len())).0,
            };
            if ![200, 201, 204, 404].contains(&status) {
                self.note(format!("a change of {task} was answered {status}"));
            }
            std::thread::sleep(Duration::from_millis(random.random_range(5..60)));
        }
    }

    /// Bytes that the server holds, from time to time.
    fn watch_memory(&self) -> Vec<u64> {
        let mut out = Vec::new();
        while !self.over.load(Relaxed) {
            out.extend(self.server.resident_bytes());
            std::thread::sleep(Duration::from_millis(200));
        }
        out
    }

    /// The engine's own count, once nobody asks any more.
    fn wait_until_the_cache_is_free(&self) {
        let begun = Instant::now();
        loop {
            let names = ["waiting_requests", "running_requests", "kv_blocks_used"];
            let counts = names.map(|name| self.server.metric(&format!("softserve_engine_{name}")));
            if counts == [0.0; 3] {
                return;
            }
            assert!(begun.elapsed() < LONG, "{names:?} are {counts:?} with no request left");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn ids(answer: &Value) -> Vec<u64> {
    answer["tokens"].as_array().into_iter().flatten().map(|token| token["id"].as_u64().unwrap()).collect()
}

fn median(values: &[u64]) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2]
}

#[test]
fn under_everything_at_once_every_answer_is_right_and_nothing_is_left_behind() {
    // 2 KiB a position, so that the least cache there is has 16 blocks.
    let model = TinyModel {
        hidden_size: 64,
        intermediate_size: 96,
        num_layers: 4,
        num_heads: 4,
        num_kv_heads: 4,
        ..TinyModel::default()
    };
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("model");
    std::fs::create_dir(&folder).unwrap();
    model.write(&folder);
    let mut command = softserve(home.path());
    command.arg("--model").arg(&folder).args(["--listen=127.0.0.1:0", "--prompts=prompts", "--kv-cache=1MiB"]);
    command.args(["--max-batch=6", "--log-level=warn"]);
    let mut soak = Soak {
        server: Process::start(command),
        hidden_size: model.hidden_size,
        reference: HashMap::new(),
        left: AtomicUsize::new(REQUESTS),
        until: None,
        over: AtomicBool::new(false),
        answered: AtomicUsize::new(0),
        left_early: AtomicUsize::new(0),
        timed_out: AtomicUsize::new(0),
        absent: AtomicUsize::new(0),
        wrong: Mutex::default(),
    };
    soak.ask_alone();
    for task in 0..TASKS {
        assert_eq!(soak.upload(&format!("soak-{task}"), task).0, 201);
    }
    let long = seconds();
    soak.until = long.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let memory = std::thread::scope(|scope| {
        let memory = scope.spawn(|| soak.watch_memory());
        scope.spawn(|| soak.change());
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let soak = &soak;
                scope.spawn(move || soak.client(number))
            })
            .collect();
        let ended: Vec<_> = clients.into_iter().map(|client| client.join()).collect();
        soak.over.store(true, Relaxed);
        assert!(ended.iter().all(Result::is_ok), "a client failed");
        memory.join().unwrap()
    });

    let wrong = soak.wrong.lock().unwrap();
    assert!(wrong.is_empty(), "{} wrong with seed {SEED}, such as {:#?}", wrong.len(), &wrong[..wrong.len().min(3)]);
    drop(wrong);
    let counts = [&soak.answered, &soak.left_early, &soak.timed_out, &soak.absent].map(|count| count.load(Relaxed));
    assert!(counts[0] > REQUESTS / 3 && counts[1..].iter().all(|n| *n > 0), "too little was seen: {counts:?}");
    soak.wait_until_the_cache_is_free();
    let mib = |index: usize| memory.get(index).map_or(0, |bytes| bytes >> 20);
    eprintln!(
        "answered, left early, timed out, absent: {counts:?}; MiB: {} {}",
        mib(memory.len() / 2),
        mib(memory.len().saturating_sub(1))
    );
    if long.is_some_and(|seconds| seconds >= 30) && !memory.is_empty() {
        let quarter = memory.len() / 4;
        let (second, last) = (median(&memory[quarter..2 * quarter]), median(&memory[3 * quarter..]));
        assert!(last < second + MAX_GROWTH, "memory grew from {second} to {last} bytes: {memory:?}");
    }
    soak.server.signal("TERM");
    let (code, log) = soak.server.wait();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("panic") && !log.contains("ERROR"), "{log}");
}
