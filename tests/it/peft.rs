//! PEFT itself, where Python has it: what `softserve tune` wrote loads there and answers the same.
//! Where there is no PEFT these tests say so and pass, and `demo.rs` holds the same against answers kept from PEFT.
//! Where `SOFTSERVE_TEST_PYTHON` names a Python, or `python3` has PEFT, they run or fail.

use std::{path::Path, process::Command};

use crate::{
    fixtures,
    process::{output, softserve},
    tune_encoder_decoder,
    tune_types::{TYPES, head, tune},
};

/// A Python with PEFT: `SOFTSERVE_TEST_PYTHON`, or `python3`; none if there is none.
pub fn python() -> Option<String> {
    let named = std::env::var("SOFTSERVE_TEST_PYTHON").ok();
    let python = usable(named.as_deref(), can_import).unwrap_or_else(|reason| panic!("{reason}"));
    if python.is_none() {
        eprintln!("skipped: python3 has no peft; set SOFTSERVE_TEST_PYTHON to one that has it ({REQUIREMENTS})");
    }
    python
}

const REQUIREMENTS: &str = "tests/peft/requirements.txt";

/// The Python to ask: the one that is `named` must have all that the checks need, and so must `python3` if it
/// has PEFT.
fn usable(
    named: Option<&str>,
    can_import: impl Fn(&str, &str) -> Result<(), String>,
) -> Result<Option<String>, String> {
    let python = named.unwrap_or("python3");
    if named.is_none() && can_import(python, "peft").is_err() {
        return Ok(None);
    }
    can_import(python, "peft, torch, transformers, jinja2")
        .map(|()| Some(python.to_owned()))
        .map_err(|e| format!("{python} cannot run the checks against PEFT; see {REQUIREMENTS}: {e}"))
}

fn can_import(python: &str, modules: &str) -> Result<(), String> {
    let ran = Command::new(python).args(["-c", &format!("import {modules}")]).output().map_err(|e| e.to_string())?;
    if ran.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&ran.stderr).into_owned()) }
}

#[test]
fn only_where_nobody_named_a_python_and_python3_has_no_peft_are_the_checks_skipped() {
    let all = |_: &str, _: &str| Ok(());
    let peft_only = |_: &str, modules: &str| if modules == "peft" { Ok(()) } else { Err("no torch".to_owned()) };
    let none = |_: &str, _: &str| Err("no peft".to_owned());
    assert_eq!(usable(None, none), Ok(None));
    assert_eq!(usable(None, all), Ok(Some("python3".to_owned())));
    assert_eq!(usable(Some("here/python"), all), Ok(Some("here/python".to_owned())));
    assert!(usable(None, peft_only).unwrap_err().contains("no torch"));
    assert!(usable(Some("here/python"), none).unwrap_err().contains("here/python"));
}

/// Holds the answers that `eval` shows, and the loss that `tune` wrote, against those of PEFT with the same
/// folder.
fn is_the_same_in_peft(python: &str, home: &Path, model: &Path, task: &str, [train, test]: [&Path; 2]) {
    let mut eval = softserve(home);
    eval.args(["eval", "--task", task, "--prompts", "out", "--show", "1000", "--data"]).arg(test);
    eval.arg("--model").arg(model);
    let (code, shown, log) = output(eval);
    assert_eq!(code, Some(0), "{task}: {log}");
    std::fs::write(home.join("shown.txt"), shown).unwrap();
    let check = Command::new(python)
        .arg(root().join("tests/peft/check_tuned.py"))
        .arg("--model")
        .arg(model)
        .arg("--prompt")
        .arg(Path::new("out").join(task))
        .args(["--shown", "shown.txt", "--data"])
        .arg(test)
        .arg("--train")
        .arg(train)
        .current_dir(home)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&[check.stdout, check.stderr].concat()).into_owned();
    let answers = std::fs::read_to_string(test).unwrap().lines().count();
    let expected = format!("{answers} of {answers} answers are PEFT's");
    assert!(check.status.success() && said.contains(&expected), "{task} on {}: {said}", model.display());
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn a_prompt_of_each_type_that_is_tuned_here_loads_in_peft_and_answers_the_same_there() {
    let Some(python) = python() else { return };
    let home = tempfile::tempdir().unwrap();
    let (train, test) = (head(home.path(), "train.jsonl", 16), head(home.path(), "test.jsonl", 24));
    for (task, options) in TYPES {
        let mut command = tune(home.path(), "out", task, &train, options);
        command.args(["--steps", "12", "--virtual-tokens", "9"]);
        let (code, _, log) = output(command);
        assert_eq!(code, Some(0), "{task}: {log}");
        is_the_same_in_peft(&python, home.path(), &root().join("models/demo"), task, [&train, &test]);
    }
}

#[test]
fn a_prompt_of_each_type_for_an_encoder_decoder_loads_in_peft_and_answers_the_same_there() {
    let Some(python) = python() else { return };
    for name in tune_encoder_decoder::MODELS {
        let home = tempfile::tempdir().unwrap();
        let data = tune_encoder_decoder::data(home.path(), "output");
        for (task, options) in TYPES {
            let (code, _, log) = output(tune_encoder_decoder::tune_on(home.path(), name, task, &data, options));
            assert_eq!(code, Some(0), "{name} {task}: {log}");
            is_the_same_in_peft(&python, home.path(), &fixtures::dir(name), task, [&data, &data]);
        }
    }
}

#[test]
fn rows_and_keys_and_values_that_are_tuned_for_each_family_answer_the_same_in_peft() {
    let Some(python) = python() else { return };
    // Of the one with a vision tower only the text's weights are kept.
    for name in fixtures::families().into_iter().filter(|name| !name.ends_with("vision")) {
        let home = tempfile::tempdir().unwrap();
        let data = tune_encoder_decoder::data(home.path(), "output");
        for (task, options) in [TYPES[0], TYPES[3]] {
            let (code, _, log) = output(tune_encoder_decoder::tune_on(home.path(), &name, task, &data, options));
            assert_eq!(code, Some(0), "{name} {task}: {log}");
            is_the_same_in_peft(&python, home.path(), &fixtures::dir(&name), task, [&data, &data]);
        }
    }
}
