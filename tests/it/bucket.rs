//! Prompts in a bucket: the real program against a real S3 server, alone and as several replicas.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    fixtures,
    process::{Process, agent, read, with_fixture},
    s3::{Fault, S3},
    support::{MODEL, TASK, copy, weights},
};

const POLL: Duration = Duration::from_millis(300);

fn start(home: &Path, s3: &S3, options: &[&str]) -> Process {
    let mut command = with_fixture(home);
    s3.reach(&mut command);
    command.arg(format!("--prompts={}", s3.prompts("prompts"))).arg(format!("--poll-interval={}ms", POLL.as_millis()));
    command.args(options);
    Process::start(command)
}

fn upload(server: &Process, task: &str, value: f32, query: &str) -> (u16, Value) {
    let path = server.at(&format!("/v1/admin/tasks/{task}/versions{query}"));
    let request = agent().post(path).header("content-type", "application/octet-stream");
    read(request.send(&weights(4, 32, value)[..]))
}

fn activate(server: &Process, task: &str, version: &str, if_match: Option<&str>) -> (u16, Value) {
    let mut request = agent().put(server.at(&format!("/v1/admin/tasks/{task}/active")));
    if let Some(tag) = if_match {
        request = request.header("if-match", tag);
    }
    read(request.send_json(json!({"version": version})))
}

fn delete(server: &Process, path: &str) -> u16 {
    agent().delete(server.at(path)).call().unwrap().status().as_u16()
}

/// A task as the admin list has it.
fn listed(server: &Process, task: &str) -> Value {
    let list = server.get("/v1/admin/tasks?limit=1000").1;
    list["tasks"].as_array().unwrap().iter().find(|entry| entry["task"] == task).cloned().unwrap_or_default()
}

/// The version that answers, or the problem's code.
fn answers(server: &Process, task: &str) -> String {
    let (status, body) = server.generate(task, json!({"input": "a", "max_tokens": 1}));
    body[if status == 200 { "version" } else { "code" }].as_str().unwrap().to_owned()
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(60), "never came to be: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn ready(server: &Process) -> Value {
    let (status, body) = server.get("/health/ready");
    assert_eq!(status, 200, "{body}");
    body["prompts"].clone()
}

#[test]
fn what_is_uploaded_lies_in_the_bucket_as_in_a_folder_and_is_there_after_a_restart() {
    let (home, s3) = (tempfile::tempdir().unwrap(), S3::start());
    // Put there by hand, as `aws s3 sync` would.
    copy(&fixtures::dir(MODEL).join("prompts").join(TASK), &s3.folder("prompts").join(TASK));
    let server = start(home.path(), &s3, &[]);
    let by_hand = answers(&server, TASK);
    let (status, first) = upload(&server, "bucket", 0.25, "");
    assert_eq!((status, &first["generation"]), (201, &json!(1)), "{first}");
    let first = first["version"].as_str().unwrap().to_owned();
    let second = upload(&server, "bucket", 0.5, "?activate=false").1["version"].as_str().unwrap().to_owned();
    assert_eq!(answers(&server, "bucket"), first);
    assert_eq!(activate(&server, "bucket", &second, None).0, 200);
    assert_eq!((answers(&server, "bucket"), upload(&server, "bucket", 0.25, "").0), (second.clone(), 200));
    for (version, value) in [(&first, 0.25), (&second, 0.5)] {
        let file = s3.folder("prompts/bucket/versions").join(version).join("adapter_model.safetensors");
        assert_eq!(std::fs::read(file).unwrap(), weights(4, 32, value));
    }
    assert_eq!(delete(&server, &format!("/v1/admin/tasks/bucket/versions/{second}")), 204);
    assert_eq!(upload(&server, "gone", 0.75, "").0, 201);
    assert_eq!((delete(&server, "/v1/admin/tasks/gone"), answers(&server, "gone")), (204, "task_not_found".to_owned()));
    let revision = ready(&server)["revision"].clone();
    drop(server);

    let again = start(home.path(), &s3, &[]);
    let found = [TASK, "bucket", "gone"].map(|task| answers(&again, task));
    assert_eq!(found, [by_hand, first.clone(), "task_not_found".to_owned()]);
    assert_eq!(ready(&again)["revision"], revision);
    // What was deleted can be uploaded again, and goes on where its generation was.
    let (status, back) = upload(&again, "gone", 0.75, "");
    assert_eq!(status, 201, "{back}");
    assert!(back["generation"].as_u64().unwrap() > 1, "{back}");
    assert_eq!(upload(&again, "bucket", 0.5, "").1["version"], json!(second));
    assert_eq!(answers(&again, "bucket"), second);
}

#[test]
fn three_replicas_converge_and_of_activations_at_the_same_time_one_wins_everywhere() {
    let (home, s3) = (tempfile::tempdir().unwrap(), S3::start());
    let replicas = [0, 1, 2].map(|_| start(home.path(), &s3, &[]));
    let versions: Vec<String> = (0..3)
        .map(|i| upload(&replicas[i], "shared", i as f32 / 8.0, "").1["version"].as_str().unwrap().to_owned())
        .collect();
    let all_answer = |version: &str| replicas.iter().all(|replica| answers(replica, "shared") == version);
    wait_until("the last upload everywhere", || all_answer(&versions[2]));
    for _ in 0..5 {
        let generation = |replica: &Process| listed(replica, "shared")["generation"].clone();
        let before = generation(&replicas[0]);
        wait_until("one generation", || replicas.iter().all(|replica| generation(replica) == before));
        let tag = format!("\"{before}\"");
        let outcomes: Vec<(usize, (u16, Value))> = std::thread::scope(|scope| {
            let change = |i: usize| {
                let (replica, version, tag) = (&replicas[i], &versions[i], &tag);
                scope.spawn(move || (i, activate(replica, "shared", version, Some(tag))))
            };
            // The version that is active would change nothing; its replica stays out of it.
            let active = answers(&replicas[0], "shared");
            let running: Vec<_> = (0..3).filter(|i| versions[*i] != active).map(change).collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let won: Vec<usize> = outcomes.iter().filter(|(_, (status, _))| *status == 200).map(|(i, _)| *i).collect();
        assert_eq!(won.len(), 1, "{outcomes:?}");
        assert!(
            outcomes.iter().all(|(i, (status, _))| *status == if *i == won[0] { 200 } else { 412 }),
            "{outcomes:?}"
        );
        wait_until("one winner everywhere", || all_answer(&versions[won[0]]));
    }
    // Without a condition each change is made, one after the other, and all end with the last one.
    std::thread::scope(|scope| {
        for (replica, version) in replicas.iter().zip(&versions) {
            scope.spawn(move || (0..4).for_each(|_| assert_eq!(activate(replica, "shared", version, None).0, 200)));
        }
    });
    wait_until("one revision", || {
        let revisions = [0, 1, 2].map(|i| ready(&replicas[i])["revision"].clone());
        revisions.iter().all(|revision| *revision == revisions[0])
    });
    let last = answers(&replicas[0], "shared");
    assert!(all_answer(&last));
    assert_eq!(delete(&replicas[1], "/v1/admin/tasks/shared"), 204);
    wait_until("deleted everywhere", || all_answer("task_not_found"));
}

#[test]
fn a_store_that_is_away_or_slow_stops_no_task_in_memory_and_is_used_again_when_it_is_back() {
    let (home, s3) = (tempfile::tempdir().unwrap(), S3::start());
    let server = start(home.path(), &s3, &["--prompt-memory=1MiB"]);
    let version = |task: &str, value: f32| {
        let (status, body) = upload(&server, task, value, "");
        assert_eq!(status, 201, "{body}");
        body["version"].as_str().unwrap().to_owned()
    };
    // More than memory holds, so that one is not in it.
    let tasks: Vec<(String, String)> =
        (0..48).map(|i| (format!("t{i}"), version(&format!("t{i}"), i as f32))).collect();
    let loaded = |task: &str| listed(&server, task)["versions"][0]["residency"]["loaded"] == json!(true);
    for fault in [Fault::Status(500), Fault::Status(403), Fault::Stopped, Fault::Silent] {
        let cold = tasks.iter().find(|(task, _)| !loaded(task)).expect("one that is not in memory");
        let (warm, warm_version) = tasks.iter().rfind(|(task, _)| loaded(task)).expect("one that is in memory");
        s3.set(Some(fault));
        let (status, refused) = upload(&server, "new", 9.0, "");
        assert_eq!((status, &refused["code"]), (503, &json!("store_unavailable")), "{fault:?}: {refused}");
        let started = Instant::now();
        assert_eq!(answers(&server, warm), *warm_version, "{fault:?}");
        assert!(started.elapsed() < Duration::from_secs(5), "{fault:?}");
        assert_eq!(answers(&server, &cold.0), "store_unavailable", "{fault:?}");
        let is_refusal = fault == Fault::Status(403);
        if !is_refusal {
            wait_until("known to be away", || ready(&server)["store_away_since"].is_string());
            assert!(server.metric("softserve_prompt_store_up") < 0.5);
        }
        s3.set(None);
        assert_eq!(answers(&server, &cold.0), cold.1, "{fault:?}");
        wait_until("back", || ready(&server)["store_away_since"].is_null());
        assert_eq!(answers(&server, "new"), "task_not_found", "{fault:?}");
    }
    s3.set(Some(Fault::Slow(Duration::from_millis(300))));
    assert_eq!(upload(&server, "slow", 7.0, "").0, 201);
    assert!(server.metric("softserve_prompt_store_up") > 0.5);
}

#[test]
fn a_damaged_object_is_named_and_the_other_tasks_are_unharmed() {
    let (home, s3) = (tempfile::tempdir().unwrap(), S3::start());
    let server = start(home.path(), &s3, &[]);
    let good = upload(&server, "good", 0.25, "").1["version"].clone();
    let bad = upload(&server, "bad", 0.5, "").1["version"].as_str().unwrap().to_owned();
    drop(server);
    let object = s3.folder("prompts/bad/versions").join(&bad).join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&object).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&object, bytes).unwrap();
    std::fs::create_dir_all(s3.folder("prompts/Not A Task")).unwrap();
    std::fs::write(s3.folder("prompts/Not A Task/x"), "x").unwrap();

    let server = start(home.path(), &s3, &[]);
    assert_eq!(json!(answers(&server, "good")), good);
    assert_eq!(answers(&server, "bad"), "task_not_found");
    assert_eq!(upload(&server, "bad", 0.5, "").1["version"], json!(bad));
    assert_eq!(answers(&server, "bad"), bad, "the same upload repairs it");
    server.signal("TERM");
    let (code, log) = server.wait();
    assert_eq!(code, Some(0));
    assert!(log.contains("s3://softserve/prompts/bad/versions/") && log.contains("changed by hand"), "{log}");
    assert!(log.contains("Not A Task"), "{log}");
}

#[test]
fn a_bucket_that_cannot_be_reached_at_the_start_is_an_error_that_names_it() {
    let (home, s3) = (tempfile::tempdir().unwrap(), S3::start());
    s3.set(Some(Fault::Stopped));
    let mut command = with_fixture(home.path());
    s3.reach(&mut command);
    command.arg(format!("--prompts={}", s3.prompts("prompts")));
    let (code, _, stderr) = crate::process::output(command);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("cannot open the prompts in s3://softserve/prompts"), "{stderr}");
    let mut command = with_fixture(home.path());
    command.arg("--prompts=s4://softserve/prompts");
    let (code, _, stderr) = crate::process::output(command);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("s3://BUCKET/PREFIX"), "{stderr}");
}
