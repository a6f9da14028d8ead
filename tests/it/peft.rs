//! PEFT itself, where Python has it: what `softserve tune` wrote loads there and answers the same.
//! Without it these tests say so and pass; `demo.rs` holds the same against answers kept from PEFT.

use std::{path::Path, process::Command};

use crate::process::{output, softserve};

/// A Python with PEFT: `SOFTSERVE_TEST_PYTHON`, or `python3`.
fn python() -> Option<String> {
    let python = std::env::var("SOFTSERVE_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let found = Command::new(&python).args(["-c", "import peft, torch, transformers, jinja2"]).output();
    match found {
        Ok(found) if found.status.success() => Some(python),
        _ => {
            eprintln!(
                "skipped: {python} has no peft; set SOFTSERVE_TEST_PYTHON to one that has (tests/peft/requirements.txt)"
            );
            None
        }
    }
}

#[test]
fn a_prompt_tuned_here_loads_in_peft_and_answers_the_same_there() {
    let Some(python) = python() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let home = tempfile::tempdir().unwrap();
    let data = root.join("examples/data/sentiment");
    let head = |file: &str, n: usize| {
        let text = std::fs::read_to_string(data.join(file)).unwrap();
        let to = home.path().join(file);
        std::fs::write(&to, text.lines().take(n).map(|l| format!("{l}\n")).collect::<String>()).unwrap();
        to
    };
    let (train, test) = (head("train.jsonl", 16), head("test.jsonl", 24));
    let mut tune = softserve(home.path());
    tune.args(["tune", "--task", "mood", "--lr", "0.05", "--steps", "12", "--virtual-tokens", "9", "--prompts", "out"]);
    let (code, _, log) = output({
        tune.arg("--data").arg(train);
        tune
    });
    assert_eq!(code, Some(0), "{log}");
    let mut eval = softserve(home.path());
    eval.args(["eval", "--prompt", "out/mood", "--show", "1000", "--data"]).arg(&test);
    let (code, shown, log) = output(eval);
    assert_eq!(code, Some(0), "{log}");
    std::fs::write(home.path().join("shown.txt"), shown).unwrap();
    let check = Command::new(python)
        .arg(root.join("tests/peft/check_tuned.py"))
        .arg("--model")
        .arg(root.join("models/demo"))
        .args(["--prompt", "out/mood", "--shown", "shown.txt", "--data"])
        .arg(test)
        .current_dir(home.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&[check.stdout, check.stderr].concat()).into_owned();
    assert!(check.status.success() && said.contains("24 of 24 answers are PEFT's"), "{said}");
}
