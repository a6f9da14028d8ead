//! What `softserve eval` reports, at the real program: confidence intervals, examples in the context, confusions.

use std::{fs, path::Path};

use serde_json::{Value, json};

use crate::process::{output, softserve};

/// `softserve eval` with the demo's model and prompts; data files are under `examples/data`.
fn eval(home: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = softserve(home);
    command.arg("eval").arg("--prompts").arg(root.join("prompts")).args(arguments);
    output(command)
}

/// The first lines of an example's data, as a file of `home`.
fn head(home: &Path, task: &str, file: &str, lines: usize) -> String {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data").join(task).join(file);
    let name = format!("{task}-{lines}-{file}");
    let text = fs::read_to_string(from).unwrap();
    fs::write(home.join(&name), text.lines().take(lines).map(|l| format!("{l}\n")).collect::<String>()).unwrap();
    name
}

fn report(home: &Path, arguments: &[&str]) -> Value {
    let (code, report, log) = eval(home, &[arguments, &["--json"]].concat());
    assert_eq!(code, Some(0), "{log}");
    serde_json::from_str(&report).unwrap()
}

#[test]
fn every_score_but_the_ece_has_an_interval_around_it() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let (topic, translation) = (head(home, "topic", "dev.jsonl", 40), head(home, "translation", "dev.jsonl", 20));
    let labelled = ["accuracy", "brier", "choice_accuracy", "macro_f1"];
    let texts = ["bleu", "chrf", "exact_match", "token_f1"];
    for (task, data, names) in [("topic", &topic, labelled), ("translation", &translation, texts)] {
        let report = report(home, &["--task", task, "--data", data]);
        assert_eq!(report, self::report(home, &["--task", task, "--data", data]), "the bootstrap has one seed");
        for column in report["columns"].as_array().unwrap() {
            let intervals = column["intervals"].as_object().unwrap();
            assert_eq!(intervals.keys().collect::<Vec<_>>(), names);
            for (name, interval) in intervals {
                let [value, low, high] =
                    [&column["metrics"][name], &interval[0], &interval[1]].map(|v| v.as_f64().unwrap());
                assert!(low <= value && value <= high, "{task} {name}: {value} {interval}");
            }
        }
    }
    // The table shows the same.
    let tuned = &report(home, &["--task", "topic", "--data", &topic])["columns"][0];
    let percent = |value: &Value| format!("{:.1}", 100.0 * value.as_f64().unwrap());
    let interval = &tuned["intervals"]["accuracy"];
    let cell =
        format!("{}% ({}–{})", percent(&tuned["metrics"]["accuracy"]), percent(&interval[0]), percent(&interval[1]));
    let (code, shown, log) = eval(home, &["--task", "topic", "--data", &topic]);
    assert_eq!(code, Some(0), "{log}");
    let accuracy = shown.lines().find(|line| line.trim_start().starts_with("accuracy")).unwrap();
    assert!(accuracy.contains(&cell), "{cell}: {shown}");
    assert!(shown.contains("expected (rows) and answered (columns) with the tuned prompt"), "{shown}");
}

#[test]
fn examples_in_the_context_are_a_column_of_their_own() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let (data, train) = (head(home, "sentiment", "dev.jsonl", 20), head(home, "sentiment", "train.jsonl", 100));
    let arguments = ["--task", "sentiment", "--data", &data, "--examples", &train];
    let found = report(home, &arguments);
    let columns = found["columns"].as_array().unwrap();
    let names: Vec<&str> = columns.iter().map(|column| column["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["tuned", "no_prompt", "instruction", "in_context"]);
    assert_eq!(columns[3]["shots"], json!({"examples": 8, "fewest": 8, "inputs_with_fewer": 0}));
    assert!(columns[3]["metrics"]["choice_accuracy"].is_number() && columns[0].get("shots").is_none());
    // As many of each label, and the same ones again.
    let lines: Vec<u64> =
        found["in_context"]["lines"].as_array().unwrap().iter().map(|l| l.as_u64().unwrap()).collect();
    let text = fs::read_to_string(home.join(&train)).unwrap();
    let label = |line: &u64| -> Value {
        serde_json::from_str::<Value>(text.lines().nth(*line as usize - 1).unwrap()).unwrap()["label"].take()
    };
    assert_eq!(lines.iter().filter(|line| label(line) == "positive").count(), 4, "{lines:?}");
    assert_eq!(found, report(home, &arguments));
    let other = report(home, &[&arguments[..], &["--seed", "1", "--shots", "2"]].concat());
    assert_eq!(other["in_context"]["lines"].as_array().unwrap().len(), 2);
    assert_ne!(other["in_context"]["lines"], json!(lines[..2]));
    // Without --examples there is neither.
    let without = report(home, &arguments[..4]);
    assert_eq!(without["columns"], json!(columns[..3]));
    assert!(without.get("in_context").is_none());
    let (_, shown, _) = eval(home, &arguments);
    assert!(shown.contains("in context: 8 examples of ") && shown.contains(" in context\n"), "{shown}");
}

#[test]
fn examples_that_have_no_room_are_left_out_and_an_input_is_never_its_own_example() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let (data, train) = (head(home, "translation", "dev.jsonl", 4), head(home, "translation", "train.jsonl", 300));
    let arguments = ["--task", "translation", "--data", &data, "--examples", &train, "--shots", "300"];
    let many = report(home, &arguments);
    let used = &many["columns"][3]["shots"];
    assert_eq!((&used["examples"], &used["inputs_with_fewer"]), (&json!(300), &json!(4)));
    assert!((2..200).contains(&used["fewest"].as_u64().unwrap()), "{used}");
    let (_, shown, _) = eval(home, &arguments);
    assert!(shown.contains("the context had room for fewer before 4 of the inputs, for "), "{shown}");

    let text = fs::read_to_string(home.join(&train)).unwrap() + &fs::read_to_string(home.join(&data)).unwrap();
    fs::write(home.join("both.jsonl"), text).unwrap();
    let both = report(home, &["--task", "translation", "--data", &data, "--examples", "both.jsonl"]);
    assert_eq!(both["in_context"]["excluded"], 4);
    assert!(both["in_context"]["lines"].as_array().unwrap().iter().all(|line| line.as_u64().unwrap() <= 300));
    let refused = [
        (&["--examples", data.as_str()][..], "so none can stand before the others"),
        (&["--examples", "none.jsonl"], "cannot read the data none.jsonl"),
        (&["--examples", train.as_str(), "--shots", "0"], "--shots is 0, expected 1 or more"),
        (&["--shots", "4"], "--examples"),
    ];
    for (more, said) in refused {
        let (code, _, log) = eval(home, &[&arguments[..4], more].concat());
        assert!(code != Some(0) && log.contains(said), "{more:?}: {log}");
    }
}
