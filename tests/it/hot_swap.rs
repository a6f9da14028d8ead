//! Prompts are uploaded, replaced and deleted under load, over real HTTP against the real program.

use std::{
    collections::HashMap,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::process::{Process, agent, read, with_fixture};

const CLIENTS: usize = 200;
const TASKS: usize = 5;
const VERSIONS: usize = 6;
const CHANGES: usize = 50;
/// Ten changes a second.
const PAUSE: Duration = Duration::from_millis(100);

const TEXT: &str = "the dog ran after the ball";

/// One safetensors file, the same each time: rows of a length and values of their own.
fn prompt(version: usize) -> Vec<u8> {
    let (rows, columns) = (4 + version, 32);
    let mut steps = Steps(version as u64);
    let values = (0..rows * columns).map(|_| (steps.below(2001) as f32 - 1000.0) / 1000.0);
    let data: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
    let tensor = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![rows, columns], &data).unwrap();
    safetensors::serialize([("prompt_embeddings", tensor)], None).unwrap()
}

fn upload(server: &Process, task: usize, version: usize) -> (u16, Value) {
    let path = server.at(&format!("/v1/admin/tasks/swap-{task}/versions"));
    let request = agent().post(path).header("content-type", "application/octet-stream");
    read(request.send(&prompt(version)[..]))
}

fn delete(server: &Process, task: usize) -> u16 {
    let path = server.at(&format!("/v1/admin/tasks/swap-{task}"));
    agent().delete(path).call().unwrap().status().as_u16()
}

fn ask(server: &Process, task: usize) -> (u16, Value) {
    server.generate(&format!("swap-{task}"), json!({"input": TEXT, "max_tokens": 12, "ignore_eos": true}))
}

/// A small seeded generator: the test prints the seed's one value and needs no more.
struct Steps(u64);

impl Steps {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }
}

#[test]
fn under_200_clients_every_answer_is_that_of_the_version_it_names() {
    let home = tempfile::tempdir().unwrap();
    let mut command = with_fixture(home.path());
    command.arg("--prompts=swapped").arg("--max-waiting=512");
    let server = Process::start(command);

    // Each version alone, before anything else runs.
    let mut right: HashMap<String, Value> = HashMap::new();
    for version in 0..VERSIONS {
        let (status, uploaded) = upload(&server, 0, version);
        assert_eq!(status, 201, "{uploaded}");
        let (status, answer) = ask(&server, 0);
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["version"], uploaded["version"]);
        right.insert(answer["version"].as_str().unwrap().to_owned(), answer["output"].clone());
    }
    let different: std::collections::HashSet<_> = right.values().map(Value::to_string).collect();
    assert_eq!((right.len(), different.len()), (VERSIONS, VERSIONS), "{right:?}");
    for task in 1..TASKS {
        assert_eq!(upload(&server, task, task).0, 201);
    }

    let stop = AtomicBool::new(false);
    let (answered, absent, refused) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let seen = Mutex::new(std::collections::HashSet::new());
    let wrong: Mutex<Vec<String>> = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (server, right, stop) = (&server, &right, &stop);
            let (answered, absent, refused, seen, wrong) = (&answered, &absent, &refused, &seen, &wrong);
            scope.spawn(move || {
                let mut turn = client;
                while !stop.load(Relaxed) {
                    turn += 1;
                    let (status, answer) = ask(server, turn % TASKS);
                    match status {
                        200 => {
                            let version = answer["version"].as_str().unwrap_or_default().to_owned();
                            if right.get(&version) != Some(&answer["output"]) {
                                wrong.lock().unwrap().push(format!("not the answer of {version}: {answer}"));
                            }
                            answered.fetch_add(1, Relaxed);
                            seen.lock().unwrap().insert(version);
                        }
                        404 if answer["code"] == "task_not_found" => {
                            absent.fetch_add(1, Relaxed);
                        }
                        429 if answer["code"] == "overloaded" => {
                            refused.fetch_add(1, Relaxed);
                            std::thread::sleep(PAUSE);
                        }
                        _ => wrong.lock().unwrap().push(format!("{status}: {answer}")),
                    }
                }
            });
        }
        let mut steps = Steps(20261123);
        let mut next = Instant::now();
        for change in 0..CHANGES {
            let (task, version) = (steps.below(TASKS), steps.below(VERSIONS));
            // Mostly replaced; one in five deleted and, at the next turn, there again.
            let status = if change % 5 == 4 { delete(&server, task) } else { upload(&server, task, version).0 };
            if ![200, 201, 204, 404].contains(&status) {
                wrong.lock().unwrap().push(format!("change {change} was answered {status}"));
            }
            next += PAUSE;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        stop.store(true, Relaxed);
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} wrong, such as {:?}", wrong.len(), &wrong[..wrong.len().min(3)]);
    let seen = seen.into_inner().unwrap();
    assert!(answered.into_inner() > CLIENTS, "too few answers to say anything");
    assert!(absent.into_inner() > 0, "no request met a deleted task");
    assert!(seen.len() >= VERSIONS - 1, "only {} versions answered", seen.len());
    // Nothing is left behind.
    let (status, _) = ask(&server, 0);
    assert!([200, 404].contains(&status));
    server.signal("TERM");
    let (code, log) = server.wait();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("panic"), "{log}");
}
