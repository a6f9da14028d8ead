//! The program is killed while it changes prompts, again and again: every change that it acknowledged is there, every other
//! is there as a whole or not at all.
//!
//! `cargo test` kills it a few times; `SOFTSERVE_CRASH_CHANGES=200 cargo test --test it crash` goes on for that many changes.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde_json::{Value, json};

use crate::{
    process::{Process, agent, with_fixture},
    s3::S3,
    support::weights,
};

/// Acknowledged changes, over all lives of the program, and kills: at least.
const CHANGES: usize = 50;
const KILLS: usize = 4;
/// Clients that change prompts at the same time, each its own tasks.
const CLIENTS: usize = 3;
const TASKS_EACH: usize = 2;
const VALUES: u8 = 4;
/// The program lives for a random part of this after it is ready.
const LONGEST_LIFE: Duration = Duration::from_millis(250);
const SEED: u64 = 20261127;

/// A task as the client knows it: its versions, by the value that they are made of, and the active one.
#[derive(Debug, Clone, Default, PartialEq)]
struct Task {
    versions: BTreeMap<u8, String>,
    active: Option<u8>,
}

#[derive(Debug, Clone)]
enum Change {
    Upload { value: u8, activate: bool },
    Activate(u8),
    DeleteVersion(u8),
    DeleteTask,
}

/// A task, and the change of it that was sent and not answered.
#[derive(Debug, Clone, Default)]
struct Known {
    task: Task,
    pending: Option<Change>,
}

impl Task {
    /// A change that the program has to accept.
    fn possible(&self, random: &mut StdRng) -> Change {
        let stored: Vec<u8> = self.versions.keys().copied().collect();
        let inactive: Vec<u8> = stored.iter().copied().filter(|value| Some(*value) != self.active).collect();
        match (random.random_range(0..10), stored.choose(random), inactive.choose(random)) {
            (0, Some(_), _) => Change::DeleteTask,
            (1 | 2, _, Some(value)) if stored.len() > 1 => Change::DeleteVersion(*value),
            (3..=5, Some(value), _) => Change::Activate(*value),
            _ => Change::Upload { value: random.random_range(0..VALUES), activate: random.random() },
        }
    }

    fn after(&self, change: &Change, ids: &BTreeMap<u8, String>) -> Self {
        let mut after = self.clone();
        match *change {
            Change::Upload { value, activate } => {
                after.versions.insert(value, ids[&value].clone());
                if activate {
                    after.active = Some(value);
                }
            }
            Change::Activate(value) => after.active = Some(value),
            Change::DeleteVersion(value) => drop(after.versions.remove(&value)),
            Change::DeleteTask => after = Self::default(),
        }
        after
    }

    /// What a killed program may leave of a change: nothing, all, or a version that was only stored.
    fn possibly_after(&self, change: &Change, ids: &BTreeMap<u8, String>) -> Vec<Self> {
        let mut possible = vec![self.clone(), self.after(change, ids)];
        if let Change::Upload { value, .. } = *change {
            possible.push(self.after(&Change::Upload { value, activate: false }, ids));
        }
        possible
    }
}

fn path(task: &str) -> String {
    format!("/v1/admin/tasks/{task}")
}

/// Whether a change was acknowledged; `None` if the program was gone before.
fn send(server: &Process, name: &str, task: &Task, change: &Change) -> Option<u16> {
    let (agent, base) = (agent(), server.at(&path(name)));
    let answer = match *change {
        Change::Upload { value, activate } => agent
            .post(format!("{base}/versions?activate={activate}"))
            .header("content-type", "application/octet-stream")
            .send(&weights(4, 32, f32::from(value) / 8.0)[..]),
        Change::Activate(value) => {
            agent.put(format!("{base}/active")).send_json(json!({"version": task.versions[&value]}))
        }
        Change::DeleteVersion(value) => agent.delete(format!("{base}/versions/{}", task.versions[&value])).call(),
        Change::DeleteTask => agent.delete(base).call(),
    };
    let mut answer = answer.ok()?;
    let status = answer.status().as_u16();
    // The acknowledgement has to arrive as a whole.
    answer.body_mut().read_to_vec().ok()?;
    Some(status)
}

/// A task as the program has it.
fn found(server: &Process, name: &str, ids: &BTreeMap<u8, String>) -> Task {
    let (status, list) = server.get("/v1/admin/tasks");
    assert_eq!(status, 200, "{list}");
    let Some(body) = list["tasks"].as_array().unwrap().iter().find(|task| task["task"] == name) else {
        return Task::default();
    };
    assert!(body["unreadable"].as_array().is_none_or(Vec::is_empty), "{body}");
    let value = |id: &Value| *ids.iter().find(|(_, known)| id == *known).expect("a version of the test").0;
    let versions = body["versions"].as_array().unwrap().iter().map(|version| value(&version["version"]));
    let active = body["active"].as_str().map(|_| value(&body["active"]));
    if active.is_some() {
        let (status, answer) = server.generate(name, json!({"input": "a", "max_tokens": 1}));
        assert_eq!((status, &answer["version"]), (200, &body["active"]), "{answer}");
    }
    Task { versions: versions.map(|value| (value, ids[&value].clone())).collect(), active }
}

fn kill_again_and_again(start: impl Fn() -> Process) {
    let ids: BTreeMap<u8, String> = {
        let server = start();
        let id = |value: u8| {
            let upload = Change::Upload { value, activate: true };
            assert_eq!(send(&server, "ids", &Task::default(), &upload), Some(201));
            let (_, answer) = server.generate("ids", json!({"input": "a", "max_tokens": 1}));
            (value, answer["version"].as_str().unwrap().to_owned())
        };
        (0..VALUES).map(id).collect()
    };
    let wanted = std::env::var("SOFTSERVE_CRASH_CHANGES").ok().map(|n| n.parse::<usize>().expect("a number"));
    let (wanted, kills_wanted) = wanted.map_or((CHANGES, KILLS), |n| (n, n / 10));
    let names: Vec<String> = (0..CLIENTS * TASKS_EACH).map(|i| format!("t{i}")).collect();
    let known: Vec<Mutex<Known>> = names.iter().map(|_| Mutex::default()).collect();
    let (changes, mut random) = (AtomicUsize::new(0), StdRng::seed_from_u64(SEED));
    let (mut kills, mut unanswered) = (0, 0);
    loop {
        let server = start();
        for (name, known) in names.iter().zip(&known) {
            let mut known = known.lock().unwrap();
            let possible = match known.pending.take() {
                None => vec![known.task.clone()],
                Some(change) => {
                    unanswered += 1;
                    known.task.possibly_after(&change, &ids)
                }
            };
            let found = found(&server, name, &ids);
            assert!(
                possible.contains(&found),
                "{name} after {kills} kills: found {found:?}, expected one of {possible:?}"
            );
            known.task = found;
        }
        if changes.load(Relaxed) >= wanted && kills >= kills_wanted {
            break;
        }
        let life = LONGEST_LIFE.mul_f64(random.random());
        let seeds: Vec<u64> = (0..CLIENTS).map(|_| random.random()).collect();
        std::thread::scope(|scope| {
            for (client, seed) in seeds.into_iter().enumerate() {
                let (server, names, known, ids, changes) = (&server, &names, &known, &ids, &changes);
                scope.spawn(move || {
                    let mut random = StdRng::seed_from_u64(seed);
                    loop {
                        let i = client * TASKS_EACH + random.random_range(0..TASKS_EACH);
                        let mut known = known[i].lock().unwrap();
                        let change = known.task.possible(&mut random);
                        known.pending = Some(change.clone());
                        match send(server, &names[i], &known.task, &change) {
                            None => return,
                            Some(200..=299) => {}
                            Some(status) => panic!("{status} for {change:?} of {known:?}"),
                        }
                        known.task = known.task.after(&change, ids);
                        known.pending = None;
                        changes.fetch_add(1, Relaxed);
                    }
                });
            }
            std::thread::sleep(life);
            server.signal("KILL");
        });
        kills += 1;
    }
    eprintln!("{} changes acknowledged over {kills} kills, {unanswered} unanswered", changes.into_inner());
    assert!(unanswered > 0, "no kill hit a change");
}

#[test]
fn killed_while_it_changes_a_folder_it_loses_nothing_that_it_acknowledged() {
    let home = tempfile::tempdir().unwrap();
    kill_again_and_again(|| {
        let mut command = with_fixture(home.path());
        command.arg("--prompts=changed");
        Process::start(command)
    });
}

#[test]
fn killed_while_it_changes_a_bucket_it_loses_nothing_that_it_acknowledged() {
    let (home, s3) = (tempfile::tempdir().unwrap(), S3::start());
    kill_again_and_again(|| {
        let mut command = with_fixture(home.path());
        s3.reach(&mut command);
        command.arg(format!("--prompts={}", s3.prompts("changed")));
        Process::start(command)
    });
}
