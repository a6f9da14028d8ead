//! `softserve convert` on files that the real writers made (`tests/peft/make_foreign.py`).

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use safetensors::SafeTensors;
use serde_json::{Value, json};
use softserve::prompt::files::PromptFiles;

use crate::{
    fixtures,
    process::{Process, output, softserve, with_fixture},
    support::{MODEL, TASK, copy},
};

pub fn foreign() -> PathBuf {
    fixtures::dir("foreign")
}

/// Runs `softserve convert` in `home`: exit code, what it said, what it complained of.
pub fn convert(home: &Path, input: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = softserve(home);
    command.arg("convert").arg(input).args(arguments);
    output(command)
}

/// Number format and bytes of the rows in a converted folder.
fn rows(folder: &Path) -> (String, Vec<u8>) {
    let bytes = fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor("prompt_embeddings").unwrap();
    assert_eq!((view.shape(), file.names().len()), (&[7, 32][..], 1));
    (format!("{:?}", view.dtype()), view.data().to_vec())
}

fn original() -> PathBuf {
    fixtures::dir(MODEL).join("prompts").join(TASK)
}

/// Every file under a folder, with its bytes.
fn snapshot(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            found.insert(entry.clone(), Vec::new());
            found.extend(snapshot(&entry));
        } else {
            found.insert(entry.clone(), fs::read(entry).unwrap());
        }
    }
    found
}

/// Files that keep every bit of the rows, with what else must be said.
const EXACT: [(&str, &[&str]); 19] = [
    ("soft_prompt.safetensors", &[]),
    ("two.safetensors", &["--tensor", "front"]),
    ("c.npy", &[]),
    ("fortran.npy", &[]),
    ("big-endian.npy", &[]),
    ("one-batch.npy", &[]),
    ("version2.npy", &[]),
    ("version3.npy", &[]),
    ("arrays.npz", &[]),
    ("kobold.zip", &[]),
    ("tgis", &[]),
    ("tgis/decoder.pt", &[]),
    ("legacy.pt", &[]),
    ("transposed.pt", &[]),
    ("parameter.pt", &[]),
    ("state_dict.pt", &[]),
    ("slice.pt", &[]),
    ("tasks.nemo", &["--tensor", "cats"]),
    ("peft-bin", &[]),
];

#[test]
fn every_format_gives_the_rows_that_peft_has_and_the_answers_too() {
    let home = tempfile::tempdir().unwrap();
    let expected = rows(&original());
    let mut tasks = Vec::new();
    for (i, (file, arguments)) in EXACT.into_iter().enumerate() {
        let out = format!("prompts/task-{i}");
        let arguments = [arguments, &["--out", out.as_str()]].concat();
        let (code, said, log) = convert(home.path(), &foreign().join(file), &arguments);
        assert_eq!(code, Some(0), "{file}: {log}");
        for words in ["[7, 32]", "norms", "softserve push", &out] {
            assert!(said.contains(words), "{file}: {said}");
        }
        assert_eq!(rows(&home.path().join(&out)), expected, "{file}");
        tasks.push((file, format!("task-{i}")));
    }
    let mut command = with_fixture(home.path());
    command.arg("--prompts=prompts");
    let server = Process::start(command);
    let tokenizer = fixtures::tokenizer(MODEL);
    let cases: Vec<_> = fixtures::cases(MODEL).into_iter().filter(|case| case.prompt == TASK).collect();
    assert!(cases.len() > 1);
    for (file, task) in tasks {
        for case in &cases {
            let request = json!({"input": case.text, "max_tokens": case.greedy_ids.len(), "ignore_eos": true});
            let (status, answer) = server.generate(&task, request);
            assert_eq!(status, 200, "{file}: {answer}");
            assert_eq!(answer["output"], tokenizer.decode(&case.greedy_ids).unwrap(), "{file}");
        }
    }
}

#[test]
fn a_pickle_of_pefts_becomes_the_very_version_that_peft_writes_as_safetensors() {
    let home = tempfile::tempdir().unwrap();
    for (i, input) in ["peft-bin", "peft-bin/adapter_model.bin"].into_iter().enumerate() {
        let out = format!("out-{i}");
        let (code, _, log) = convert(home.path(), &foreign().join(input), &["--out", &out]);
        assert_eq!(code, Some(0), "{log}");
        let converted = PromptFiles::read_dir(&home.path().join(out)).unwrap();
        assert_eq!(converted.digest(), PromptFiles::read_dir(&original()).unwrap().digest());
    }
}

#[test]
fn values_stay_in_their_number_format() {
    let home = tempfile::tempdir().unwrap();
    let (_, exact) = rows(&original());
    let exact: Vec<f32> = exact.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    for (file, format, bound) in [
        ("f64.npy", "F64", 0.0),
        ("f16.npy", "F16", 1e-3),
        ("bf16.npy", "BF16", 8e-3),
        ("embedding.safetensors", "F16", 1e-3),
    ] {
        let out = format!("out/{file}");
        let (code, said, log) = convert(home.path(), &foreign().join(file), &["--out", &out]);
        assert_eq!(code, Some(0), "{file}: {log}");
        assert!(said.contains(&format!("{format} [7, 32]")), "{said}");
        let (found, bytes) = rows(&home.path().join(out));
        assert_eq!(found, format);
        let values: Vec<f32> = match format {
            "F64" => bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
            "F16" => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
            _ => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        };
        assert_eq!(values.len(), exact.len());
        for (value, exact) in values.iter().zip(&exact) {
            assert!((value - exact).abs() <= bound * exact.abs(), "{file}: {value} for {exact}");
        }
    }
}

#[test]
fn what_the_file_and_the_options_say_is_in_the_result() {
    let home = tempfile::tempdir().unwrap();
    let read = |file: &str| -> Value { serde_json::from_slice(&fs::read(home.path().join(file)).unwrap()).unwrap() };
    let kobold = foreign().join("kobold.zip");
    let arguments = ["--out", "out/cats", "--base-model", "org/tiny", "--task-type", "SEQ_2_SEQ_LM"];
    let (code, said, log) = convert(home.path(), &kobold, &arguments);
    assert_eq!(code, Some(0), "{log}");
    assert!(said.contains("--task cats") && !said.contains("task_type"), "{said}");
    let config = read("out/cats/adapter_config.json");
    assert_eq!(config["base_model_name_or_path"], "org/tiny");
    assert_eq!((&config["peft_type"], &config["task_type"]), (&json!("PROMPT_TUNING"), &json!("SEQ_2_SEQ_LM")));
    assert_eq!((&config["num_virtual_tokens"], &config["token_dim"]), (&json!(7), &json!(32)));
    assert_eq!(read("out/cats/task.json"), json!({"description": "Cats (by a tester): Stories of cats."}));

    let (code, said, log) = convert(home.path(), &foreign().join("tasks.nemo"), &["--out", "dogs", "--tensor", "dogs"]);
    assert_eq!(code, Some(0), "{log}");
    assert!(said.contains("{text} is about:{label}"), "{said}");
}

#[test]
fn what_cannot_be_converted_ends_with_one_line_that_says_why_and_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    fs::write(at("mine.txt"), "hello").unwrap();
    fs::write(at("empty"), "").unwrap();
    let steps = b"\x93NUMPY\x01\x00\x44\x00{'descr': '<i8', 'fortran_order': False, 'shape': (3,), }          \n";
    fs::write(at("steps.npy"), [&steps[..], &[0; 24]].concat()).unwrap();
    fs::write(at("mkultra.json"), r#"{"metadata": {}, "tensor": "gASV"}"#).unwrap();
    fs::create_dir(at("full")).unwrap();
    fs::write(at("full/precious.txt"), "keep").unwrap();
    let whole = fs::read(foreign().join("tgis/decoder.pt")).unwrap();
    fs::write(at("cut.pt"), &whole[..whole.len() / 2]).unwrap();
    copy(&original(), &at("peft"));
    let before = snapshot(home.path());
    let fixture = |name: &str| foreign().join(name);
    let out: &[&str] = &["--out", "out"];
    for (input, arguments, words) in [
        (fixture("hostile/command.pt"), out, &["posix.system", "safetensors.torch.save_file"][..]),
        (fixture("hostile/command-legacy.pt"), out, &["posix.system"]),
        (fixture("hostile/command-bare.pkl"), out, &["posix.system"]),
        (fixture("hostile/object.npy"), out, &["Python objects"]),
        (fixture("hostile/expanded.pt"), out, &["[100000, 100000]", "too large"]),
        (fixture("hostile/sparse.pt"), out, &["torch._utils._rebuild_sparse_tensor"]),
        (fixture("hostile/integers.pt"), out, &["no matrix of floats", "prompt I64 [2, 32]"]),
        (at("steps.npy"), out, &["no matrix of floats", "I64 [3]"]),
        (fixture("hostile/nan.npy"), out, &["row 3, column 5"]),
        (fixture("hostile/huge-shape.npy"), out, &["1099511627776", "has 64"]),
        (fixture("hostile/bomb.zip"), out, &["more than 1073741824 bytes"]),
        (fixture("hostile/shared.pt"), out, &["no tensor"]),
        (fixture("two.safetensors"), out, &["--tensor", "back F32 [7, 32], front F32 [7, 32]"]),
        (fixture("two.safetensors"), &["--out", "out", "--tensor", "side"], &["\"side\"", "front"]),
        (fixture("two.safetensors"), &["--out", "out", "--tensor", "steps"], &["steps I64 [1]"]),
        (fixture("tasks.nemo"), out, &["--tensor", "cats", "dogs"]),
        (fixture("middle.nemo"), out, &["in front of the text"]),
        (fixture("peft-bin"), &["--out", "out", "--tensor", "x"], &["leave out --tensor"]),
        (fixture("c.npy"), &["--out", "full"], &["full exists and is not empty"]),
        (fixture("c.npy"), &["--out", "mine.txt"], &["mine.txt exists"]),
        (at("peft"), out, &["needs no conversion", "softserve push"]),
        (at("full"), out, &["none of adapter_model.bin"]),
        (at("mine.txt"), out, &["the text \"hello\""]),
        (at("empty"), out, &["it is empty"]),
        (at("mkultra.json"), out, &["mkultra"]),
        (at("cut.pt"), out, &["zip archive cannot be read"]),
        (at("nothing"), out, &["cannot read", "nothing"]),
    ] {
        let (code, said, log) = convert(home.path(), &input, arguments);
        assert_eq!((code, said.as_str()), (Some(1), ""), "{}: {log}", input.display());
        assert!(log.starts_with("error: ") && log.lines().count() == 1, "{log}");
        assert!(words.iter().all(|word| log.contains(word)), "{words:?}: {log}");
        assert!(snapshot(home.path()) == before, "{} left something", input.display());
    }
}

#[test]
fn an_empty_folder_and_folders_that_are_not_there_yet_are_fine() {
    let home = tempfile::tempdir().unwrap();
    fs::create_dir(home.path().join("empty")).unwrap();
    for out in ["empty", "a/b/c"] {
        let (code, _, log) = convert(home.path(), &foreign().join("c.npy"), &["--out", out]);
        assert_eq!(code, Some(0), "{log}");
        let files: Vec<_> = snapshot(&home.path().join(out)).into_keys().collect();
        assert_eq!(files.len(), 2, "{files:?}");
    }
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 2, "no staging folder is left");
}
