//! PEFT itself, where Python has it: what `softserve tune` wrote loads there and answers the same.
//! Without it these tests say so and pass; `demo.rs` holds the same against answers kept from PEFT.

use std::{path::Path, process::Command};

use crate::{
    fixtures,
    process::{output, softserve},
    tune_encoder_decoder,
    tune_types::{TYPES, head, tune},
};

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
