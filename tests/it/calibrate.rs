//! Calibrated label probabilities: what `softserve eval` measures, the calibration that it and `softserve tune` learn, and a
//! server that uses it.

use std::{fs, path::Path};

use candle_core::DType;
use serde_json::{Value, json};
use softserve::{demo, kernels, model::Model, prompt::TaskName, tokenizer::Tokenizer};

use crate::{
    process::{output, softserve},
    support::{Options, copy},
    tune_types::{head, tune},
};

/// A home with the demo's prompts, and what `softserve eval` answers there.
fn eval(home: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    if !home.join("out").exists() {
        copy(&root.join("prompts"), &home.join("out"));
        copy(&root.join("examples/data"), &home.join("data"));
    }
    let mut command = softserve(home);
    command.arg("eval").args(arguments);
    output(command)
}

fn task_json(home: &Path, task: &str) -> Value {
    serde_json::from_slice(&fs::read(home.join("out").join(task).join("task.json")).unwrap()).unwrap()
}

#[tokio::test]
async fn a_calibration_is_learned_written_and_served() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let data = ["--prompt", "out/topic", "--data", "data/topic/dev.jsonl", "--json"];
    let (code, plain, log) = eval(home, &data);
    assert_eq!(code, Some(0), "{log}");
    let before = task_json(home, "topic");
    let (code, report, log) = eval(home, &[&data[..], &["--calibrate", "--plot", "reliability.svg"]].concat());
    assert_eq!(code, Some(0), "{log}");
    let (plain, report): (Value, Value) =
        (serde_json::from_str(&plain).unwrap(), serde_json::from_str(&report).unwrap());
    assert_eq!(plain["columns"], report["columns"]);
    let tuned = &report["columns"][0];
    let found = |value: &Value| value.as_f64().unwrap();
    assert_eq!(tuned["metrics"]["brier"], tuned["reliability"]["brier"]);
    assert!(
        (0.0..0.5).contains(&found(&tuned["metrics"]["brier"])) && found(&tuned["metrics"]["ece"]) < 0.2,
        "{tuned}"
    );
    let bins = tuned["reliability"]["bins"].as_array().unwrap();
    let counted: u64 = bins.iter().map(|bin| bin["examples"].as_u64().unwrap()).sum();
    assert_eq!(counted, report["examples"].as_u64().unwrap());
    assert_eq!(report["calibration"]["without"]["brier"], tuned["metrics"]["brier"]);
    let svg = fs::read_to_string(home.join("reliability.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("Brier"));

    // Only the calibration is new.
    let mut after = task_json(home, "topic");
    let calibration = after.as_object_mut().unwrap().remove("calibration").unwrap();
    assert_eq!(after, before);
    assert_eq!(calibration["temperature"], report["calibration"]["temperature"]);
    assert_eq!(calibration["priors"].as_object().unwrap().len(), before["labels"].as_object().unwrap().len());

    let model = Model::load(&demo::model(), kernels::cpu(), DType::F32).unwrap();
    let server = Options::default().start_with(model, Tokenizer::load(&demo::model()).unwrap(), &home.join("out"));
    let version = server.app.registry.resolve("topic".parse::<TaskName>().unwrap().as_str(), None).unwrap();
    assert!(version.spec.calibration.is_some());
    let classify = async |calibrate: bool| {
        let body = json!({"input": "The soup in Rome was delicious.", "calibrate": calibrate});
        server.post("/v1/tasks/topic/classify", &body).await.ok()
    };
    let (calibrated, raw) = (classify(true).await, classify(false).await);
    assert_eq!((&calibrated["label"], &raw["label"]), (&json!("food"), &json!("food")));
    assert_ne!(calibrated["confidence"], raw["confidence"]);
    assert_eq!(calibrated["label_mass"], raw["label_mass"]);
    let (_, shown, _) = eval(home, &data[..4]);
    assert!(shown.contains("Brier score") && shown.contains("ECE"), "{shown}");
}

#[test]
fn what_cannot_be_calibrated_is_refused_and_changes_nothing() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let (code, _, log) = eval(home, &["--prompt", "out/story", "--data", "data/story/dev.jsonl", "--calibrate"]);
    assert!(code != Some(0) && log.contains("needs a task with labels"), "{log}");
    let (code, _, log) = eval(home, &["--prompt", "out/story", "--data", "data/story/dev.jsonl", "--plot", "a.svg"]);
    assert!(code != Some(0) && log.contains("has no labels") && !home.join("a.svg").exists(), "{log}");
    let few: String = fs::read_to_string(home.join("data/topic/dev.jsonl"))
        .unwrap()
        .lines()
        .take(5)
        .fold(String::new(), |all, line| all + line + "\n");
    fs::write(home.join("few.jsonl"), few).unwrap();
    let before = task_json(home, "topic");
    let (code, _, log) = eval(home, &["--prompt", "out/topic", "--data", "few.jsonl", "--calibrate"]);
    assert!(code != Some(0) && log.contains("at least 20 examples"), "{log}");
    assert_eq!(task_json(home, "topic"), before);
    let (code, _, log) = eval(home, &["--task", "topic", "--data", "few.jsonl", "--calibrate"]);
    assert!(code != Some(0) && log.contains("--calibrate") && log.contains("cannot be used"), "{log}");
}

#[tokio::test]
async fn tune_stores_the_calibration_that_eval_would_learn_on_its_held_out_examples() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let (train, dev) = (head(home, "train.jsonl", 32), head(home, "dev.jsonl", 60));
    let mut command = tune(home, "out", "mood", &train, &["--lr", "0.05", "--steps", "16", "--virtual-tokens", "9"]);
    command.arg("--eval-data").arg(&dev);
    let (code, said, log) = output(command);
    assert_eq!(code, Some(0), "{log}");
    let task: Value = serde_json::from_slice(&fs::read(home.join("out/mood/task.json")).unwrap()).unwrap();
    let stored = &task["calibration"];
    let line = said.lines().find(|line| line.contains("calibration")).unwrap();
    assert!(line.starts_with(&format!("calibration stored: temperature {}", stored["temperature"])), "{said}");
    assert!(line.contains("Brier score ") && line.contains("on 60 held-out examples"), "{line}");

    let mut command = softserve(home);
    command.args(["eval", "--prompt", "out/mood", "--calibrate", "--json", "--data"]).arg(&dev);
    let (code, report, log) = output(command);
    assert_eq!(code, Some(0), "{log}");
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["calibration"]["temperature"], stored["temperature"]);
    assert_eq!(report["calibration"]["priors"], stored["priors"]);

    let model = Model::load(&demo::model(), kernels::cpu(), DType::F32).unwrap();
    let server = Options::default().start_with(model, Tokenizer::load(&demo::model()).unwrap(), &home.join("out"));
    let classify = async |calibrate: bool| {
        let body = json!({"input": "The soup in Rome was delicious.", "calibrate": calibrate});
        server.post("/v1/tasks/mood/classify", &body).await.ok()
    };
    let (calibrated, raw) = (classify(true).await, classify(false).await);
    assert_ne!(calibrated["confidence"], raw["confidence"]);
}

#[test]
fn tune_stores_no_calibration_where_too_little_is_held_out() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let train = head(home, "train.jsonl", 32);
    // Nothing is held out; what is, is too little; and all of it is trained on as well.
    for (options, found) in [(vec![], 0), (vec!["dev.jsonl"], 12), (vec!["train.jsonl"], 0)] {
        let mut command = tune(home, "out", "mood", &train, &["--lr", "0.05", "--steps", "8", "--virtual-tokens", "9"]);
        for name in options {
            let held_out = if name == "dev.jsonl" { head(home, name, 12) } else { train.clone() };
            command.arg("--eval-data").arg(held_out);
        }
        let (code, said, log) = output(command);
        assert_eq!(code, Some(0), "{log}");
        let expected = format!("that takes 20 held-out examples that are not trained on, and there are {found}");
        assert!(said.contains(&expected), "{said}");
        assert!(task_json(home, "mood").get("calibration").is_none());
    }
}

#[test]
fn an_evaluation_shortens_inputs_and_obeys_the_grammar_as_a_server_does() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let long = json!({"input": "soup ".repeat(5000), "label": "food"}).to_string();
    let short = json!({"input": "The match was lost.", "label": "sport"}).to_string();
    fs::write(home.join("long.jsonl"), format!("{long}\n{short}\n")).unwrap();
    let arguments = ["--prompt", "out/topic", "--data", "long.jsonl", "--json", "--max-tokens", "16"];
    let (code, _, log) = eval(home, &arguments);
    assert!(code != Some(0) && log.contains("line 1") && log.contains("shorten it"), "{log}");
    let mut spec = task_json(home, "topic");
    spec["truncate"] = json!({"field": "input"});
    spec["grammar"] = json!({"choice": ["travel"]});
    fs::write(home.join("out/topic/task.json"), spec.to_string()).unwrap();
    let (code, report, log) = eval(home, &arguments);
    assert_eq!(code, Some(0), "{log}");
    let report: Value = serde_json::from_str(&report).unwrap();
    let columns = report["columns"].as_array().unwrap();
    assert_eq!(columns[0]["confusion"], json!({"food": {"travel": 1}, "sport": {"travel": 1}}), "{report}");
    // Beside the long input there is no room for a word that is spelled in many tokens, as without a prompt it may be.
    assert!(columns.iter().all(|column| column["confusion"]["sport"] == json!({"travel": 1})), "{report}");
}
