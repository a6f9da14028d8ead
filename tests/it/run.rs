//! `softserve run`: a file of requests, answered without a server, and gone on with after it was cut off.

use std::{fs, path::Path, process::Command, time::Instant};

use serde_json::{Value, json};

use crate::{
    process::{output, softserve},
    support::LONG,
};

fn command(home: &Path) -> Command {
    let mut command = softserve(home);
    command.args(["run", "--input=in.jsonl", "--output=out.jsonl"]);
    command
}

/// Of each answer what does not differ from run to run.
fn answers(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    let one = |line: &str| {
        let mut answer: Value = serde_json::from_str(line).unwrap();
        answer["id"].take();
        if answer["response"].is_object() {
            answer["response"]["request_id"].take();
            for field in ["id", "created", "usage", "request_id", "error"] {
                answer["response"]["body"][field].take();
            }
        }
        answer
    };
    text.lines().map(one).collect()
}

fn write_requests(home: &Path, lines: usize) {
    let line = |i: usize| match i % 5 {
        0 => json!({"task": "sentiment", "input": format!("The food was cold {i} times.")}),
        1 => json!({"custom_id": i.to_string(), "method": "POST", "url": "/v1/completions",
            "body": {"model": "topic", "prompt": format!("The match {i} was lost.")}}),
        2 => {
            json!({"custom_id": i.to_string(), "url": "/v1/tasks/sentiment/classify", "body": {"input": format!("A fine evening {i}.")}})
        }
        3 => json!({"custom_id": i.to_string(), "url": "/v1/chat/completions",
            "body": {"model": "sentiment", "messages": [{"role": "user", "content": format!("bad {i}")}]}}),
        _ if i % 10 == 4 => json!({"custom_id": i.to_string(), "url": "/v1/admin/tasks", "body": {}}),
        _ => {
            json!({"task": "story", "input": format!("The old man {i}"), "max_tokens": 8, "custom_id": format!("s{i}")})
        }
    };
    // A line that is no request, and an empty one.
    let lines: Vec<String> = (0..lines).map(|i| line(i).to_string()).collect();
    fs::write(home.join("in.jsonl"), format!("{}\nnot JSON\n\n", lines.join("\n"))).unwrap();
}

#[test]
fn a_run_that_is_killed_goes_on_and_has_the_answers_of_one_that_was_not() {
    const LINES: usize = 600;
    let home = tempfile::tempdir().unwrap();
    write_requests(home.path(), LINES);
    let out = home.path().join("out.jsonl");
    let (code, said, log) = output(command(home.path()));
    assert_eq!(code, Some(0), "{log}");
    assert!(said.starts_with(&format!("{} lines in ", LINES + 1)) && said.contains("61 failed"), "{said}");
    let whole = answers(&out);
    assert_eq!(whole.len(), LINES + 1);
    assert_eq!(whole[0]["response"]["body"]["output"], "negative");
    assert_eq!(whole[4]["response"]["status_code"], 404, "{}", whole[4]);
    assert_eq!((&whole[LINES]["response"], &whole[LINES]["error"]["code"]), (&json!(null), &json!("invalid_line")));
    assert_eq!(whole[9]["custom_id"], "s9");

    fs::remove_file(&out).unwrap();
    let mut child = command(home.path()).spawn().unwrap();
    let until = Instant::now() + LONG;
    while fs::read_to_string(&out).unwrap_or_default().lines().count() < 40 {
        assert!(Instant::now() < until && child.try_wait().unwrap().is_none(), "it ended before it was killed");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let cut = fs::read(&out).unwrap();
    assert!(cut.iter().filter(|byte| **byte == b'\n').count() < LINES, "it was killed too late to see anything");
    // As if the last answer had not been written whole.
    fs::write(&out, &cut[..cut.len() - 10]).unwrap();
    let (code, _, log) = output(command(home.path()));
    assert!(code == Some(0) && log.contains("going on after"), "{log}");
    assert_eq!(answers(&out), whole);
    let (code, said, _) = output(command(home.path()));
    assert!(code == Some(0) && said.contains("has all"), "{said}");

    write_requests(home.path(), LINES + 5);
    let other = fs::read_to_string(home.path().join("in.jsonl")).unwrap().replace("\"1\"", "\"other\"");
    fs::write(home.path().join("in.jsonl"), other).unwrap();
    let (code, _, log) = output(command(home.path()));
    assert!(code == Some(1) && log.contains("line 2 of out.jsonl answers the request \"1\""), "{log}");
}
