//! Each type of prompt that `softserve tune` learns, at the real program: tuned on the demo model,
//! measured, interrupted and served.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};

use crate::process::{Process, output, softserve};

/// The options of each type, with a name for its task.
pub const TYPES: [(&str, &[&str]); 4] = [
    ("rows", &["--type", "prompt", "--lr", "0.05"]),
    ("mlp", &["--type", "p-tuning", "--lr", "0.003"]),
    ("lstm", &["--type", "p-tuning", "--encoder", "lstm", "--encoder-hidden", "64", "--lr", "0.003"]),
    ("prefix", &["--type", "prefix", "--lr", "0.05"]),
];

/// The first lines of an example's data, as a file of `home`.
pub fn head(home: &Path, file: &str, lines: usize) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/sentiment").join(file);
    let to = home.join(file);
    let text = fs::read_to_string(from).unwrap();
    fs::write(&to, text.lines().take(lines).map(|l| format!("{l}\n")).collect::<String>()).unwrap();
    to
}

/// `softserve tune` of a task in `prompts`, on the demo model.
pub fn tune(home: &Path, prompts: &str, task: &str, data: &Path, options: &[&str]) -> Command {
    let mut command = softserve(home);
    command.args(["tune", "--task", task, "--prompts", prompts, "--data"]).arg(data).args(options);
    command
}

#[test]
fn each_type_is_tuned_lowers_the_loss_is_measured_and_served_beside_the_others() {
    let home = tempfile::tempdir().unwrap();
    let (train, test) = (head(home.path(), "train.jsonl", 16), head(home.path(), "test.jsonl", 4));
    let mut answers = Vec::new();
    for (task, options) in TYPES {
        let mut command = tune(home.path(), "out", task, &train, options);
        command.args(["--steps", "12", "--virtual-tokens", "9"]);
        // A run that lowers no loss fails.
        let (code, said, log) = output(command);
        assert_eq!(code, Some(0), "{task}: {log}");
        assert!(
            said.contains("after tuning") && home.path().join("out").join(task).join("loss.svg").exists(),
            "{said}"
        );
        let mut eval = softserve(home.path());
        eval.args(["eval", "--task", task, "--prompts", "out", "--show", "4", "--data"]).arg(&test);
        let (code, shown, log) = output(eval);
        assert_eq!(code, Some(0), "{task}: {log}");
        answers.push((task, shown));
    }
    let mut serve = softserve(home.path());
    serve.args(["--prompts=out", "--listen=127.0.0.1:0", "--kv-cache=64MiB"]);
    let server = Process::start(serve);
    let lines = fs::read_to_string(&test).unwrap();
    for (task, shown) in answers {
        for line in lines.lines() {
            let input: Value = serde_json::from_str(line).unwrap();
            let (status, answer) = server.generate(task, json!({"input": input["input"]}));
            assert_eq!(status, 200, "{task}: {answer}");
            let text = answer["output"].as_str().unwrap_or_else(|| panic!("{answer}")).trim().to_owned();
            let tuned = shown.lines().filter(|l| l.trim_start().starts_with("tuned prompt"));
            assert!(tuned.into_iter().any(|l| l.ends_with(&format!("{text:?}"))), "{task}: {text:?} is not in {shown}");
        }
    }
}

#[test]
fn a_run_of_each_type_that_is_interrupted_and_resumed_ends_with_the_files_of_one_that_is_not() {
    let home = tempfile::tempdir().unwrap();
    let train = head(home.path(), "train.jsonl", 16);
    for (task, options) in TYPES {
        let run = |prompts: &str| {
            let mut command = tune(home.path(), prompts, task, &train, options);
            command.args(["--steps", "15", "--virtual-tokens", "9", "--eval-every", "3"]);
            command.args(["--patience", "0", "--folds", "0"]);
            command
        };
        let (code, _, log) = output(run("whole"));
        assert_eq!(code, Some(0), "{log}");

        let mut child = run("cut").spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.starts_with("step     3") {
            line.clear();
            assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended early");
        }
        let sent = Command::new("kill").arg("-INT").arg(child.id().to_string()).status().unwrap();
        let mut rest = String::new();
        stderr.read_to_string(&mut rest).unwrap();
        assert!(sent.success() && !child.wait().unwrap().success(), "{rest}");
        assert!(rest.contains("--resume"), "{rest}");

        let mut resumed = run("cut");
        resumed.arg("--resume");
        let (code, _, log) = output(resumed);
        assert_eq!(code, Some(0), "{log}");
        for file in ["adapter_model.safetensors", "adapter_config.json", "task.json"] {
            let read = |prompts: &str| fs::read(home.path().join(prompts).join(task).join(file)).unwrap();
            assert!(read("whole") == read("cut"), "{task}: {file} differs");
        }
    }
}

#[test]
fn what_does_not_go_together_is_said_before_anything_is_trained() {
    let home = tempfile::tempdir().unwrap();
    let train = head(home.path(), "train.jsonl", 16);
    let mut rows = tune(home.path(), "out", "rows", &train, TYPES[0].1);
    rows.args(["--steps", "4"]);
    assert_eq!(output(rows).0, Some(0));
    let refused: [(&[&str], &str); 4] = [
        (&["--encoder", "lstm"], "--encoder and --encoder-hidden are for --type p-tuning"),
        (&["--type", "prefix", "--encoder-hidden", "8"], "--encoder and --encoder-hidden are for --type p-tuning"),
        (&["--type", "p-tuning", "--encoder-hidden", "0"], "--encoder-hidden is 0, expected 1 to 16384"),
        (
            &["--type", "prefix", "--init", "task:rows"],
            "consists of embeddings, but the type prefix learns key-values; start from a task of the same kind",
        ),
    ];
    for (options, said) in refused {
        let (code, _, log) = output(tune(home.path(), "out", "other", &train, options));
        assert!(code != Some(0) && log.contains(said), "{options:?}: {log}");
    }
}
