//! `softserve convert` on files that hold more than a prompt's rows: networks that compute them, keys and values of
//! every layer, lists, and what goes before a decoder (`tests/peft/make_networks.py`).

use std::{fs, path::Path};

use safetensors::SafeTensors;
use serde_json::{Value, json};
use softserve::convert::{npy, tensor::RawTensor};

use crate::{
    convert::{convert, foreign},
    process::{Process, output, softserve, with_fixture},
};

fn file(name: &str) -> std::path::PathBuf {
    foreign().join("computed").join(name)
}

/// The rows that PEFT has, in f32.
fn expected(name: &str) -> RawTensor {
    npy::read("", fs::read(file(name)).unwrap().into(), u64::MAX).unwrap()
}

/// The configuration and the rows of a converted folder.
fn converted(folder: &Path) -> (Value, Vec<usize>, Vec<f32>) {
    let config = serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
    let bytes = fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor("prompt_embeddings").unwrap();
    let values = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    (config, view.shape().to_vec(), values)
}

/// Every file that converts: what PEFT has for it, how far the rows may be from that, and the configuration.
fn cases() -> Vec<(&'static str, &'static [&'static str], &'static str, f32, Value)> {
    let rows = json!({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "token_dim": 32});
    let prefix = |layers: Value| json!({"peft_type": "PREFIX_TUNING", "num_layers": layers, "prefix_projection": false, "task_type": "CAUSAL_LM"});
    let cartridge = |frozen: usize| {
        json!({"peft_type": "CARTRIDGE", "num_layers": 2, "num_attention_heads": 2, "token_dim": 16,
               "num_frozen_tokens": frozen})
    };
    vec![
        ("mlp.pt", &[], "mlp.npy", 1e-6, rows.clone()),
        ("mlp-trainer.pt", &[], "mlp.npy", 1e-6, rows.clone()),
        ("mlp.safetensors", &[], "mlp.npy", 1e-6, rows.clone()),
        ("lstm.pt", &[], "lstm.npy", 1e-6, rows.clone()),
        ("projection.pt", &[], "prefix.npy", 1e-6, prefix(json!(2))),
        ("projection-v2.safetensors", &[], "prefix.npy", 1e-6, prefix(json!(2))),
        ("table.pt", &[], "prefix.npy", 0.0, prefix(Value::Null)),
        ("cartridge.pt", &[], "prefix.npy", 0.0, cartridge(2)),
        ("cartridge-all.pt", &[], "prefix.npy", 0.0, cartridge(0)),
        ("titan.safetensors", &[], "prefix.npy", 0.0, cartridge(0)),
        ("list.pt", &[], "rows.npy", 0.0, rows.clone()),
        ("tuple.pt", &[], "rows.npy", 0.0, rows.clone()),
        ("rows.pkl", &[], "rows.npy", 0.0, rows.clone()),
        ("mkultra.json", &[], "rows.npy", 0.0, rows.clone()),
        ("alone", &[], "rows.npy", 0.0, rows.clone()),
        ("tgis/encoder.pt", &[], "rows.npy", 0.0, json!({"peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM"})),
        // A user who names the network's input means the prompt that is computed from it.
        ("mlp.pt", &["--tensor", "embedding.weight"], "mlp.npy", 1e-6, rows),
    ]
}

#[test]
fn a_prompt_that_is_computed_or_laid_out_otherwise_becomes_what_peft_has() {
    let home = tempfile::tempdir().unwrap();
    let mut served = Vec::new();
    for (i, (name, arguments, wanted, tolerance, config)) in cases().into_iter().enumerate() {
        let out = format!("prompts/task-{i}");
        let arguments = [arguments, &["--out", out.as_str()]].concat();
        let (code, said, log) = convert(home.path(), &file(name), &arguments);
        assert_eq!(code, Some(0), "{name}: {log}");
        assert!(log.is_empty() && said.contains("prompt_embeddings"), "{name}: {said} {log}");
        let (found, shape, values) = converted(&home.path().join(&out));
        for (key, value) in config.as_object().unwrap() {
            assert_eq!(&found[key], value, "{name}: {key}");
        }
        let wanted = expected(wanted);
        assert_eq!((shape, found["num_virtual_tokens"].as_u64()), (wanted.shape.clone(), Some(5)), "{name}");
        let error = values.iter().zip(wanted.values()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error <= tolerance, "{name}: {error}");
        if found["task_type"] == "CAUSAL_LM" {
            served.push(format!("task-{i}"));
        }
    }
    // The server takes them all as they are.
    let mut command = with_fixture(home.path());
    command.arg("--prompts=prompts");
    let server = Process::start(command);
    for task in served {
        let (status, answer) = server.generate(&task, json!({"input": "one two", "max_tokens": 3}));
        assert_eq!(status, 200, "{task}: {answer}");
    }
}

#[test]
fn what_is_not_understood_is_refused_by_name_and_nothing_is_written() {
    let home = tempfile::tempdir().unwrap();
    let refused: [(&str, &[&str], &[&str]); 8] = [
        ("unknown.pt", &[], &["embedding.weight F32 [5, 32]", "mlp_head.6.weight", "not one that is known"]),
        ("unknown.pt", &["--tensor", "embedding.weight"], &["mlp_head.6.weight", "not one that is known"]),
        ("residual.pt", &[], &["more than one tensor", "mlp.module.0.weight", "--tensor"]),
        ("cartridge-broken.pt", &[], &["cartridge", "keys and values of each"]),
        ("tgis/decoder.pt", &[], &["decoder's input", "encoder.pt"]),
        ("tgis/decoder.pt", &["--task-type", "SEQ_2_SEQ_LM"], &["decoder's input", "encoder.pt"]),
        ("tgis", &[], &["more than one of", "decoder.pt"]),
        ("cartridge.pt", &["--tensor", "rows"], &["there is no tensor \"rows\"", "trainable_keys.0"]),
    ];
    for (name, arguments, words) in refused {
        let arguments = [arguments, &["--out", "out"]].concat();
        let (code, said, log) = convert(home.path(), &file(name), &arguments);
        assert_eq!((code, said.as_str()), (Some(1), ""), "{name}");
        assert!(words.iter().all(|word| log.contains(word)), "{name}: {log}");
        assert!(log.lines().count() == 1 && !home.path().join("out").exists(), "{name}: {log}");
    }
}

#[test]
fn a_tensor_that_the_user_names_is_taken_and_the_others_are_said() {
    let home = tempfile::tempdir().unwrap();
    let (code, said, log) = convert(home.path(), &file("residual.pt"), &["--tensor", "prompt", "--out", "out"]);
    assert_eq!(code, Some(0), "{log}");
    assert!(said.contains("not used: mlp.module.0.weight, mlp.module.2.weight, mlp.module.3.weight"), "{said}");
    let (code, said, log) = convert(home.path(), &file("tgis/encoder.pt"), &["--out", "encoder"]);
    assert_eq!(code, Some(0), "{log}");
    assert!(said.contains("decoder.pt beside it"), "{said}");
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 2);
}

#[test]
fn inspect_reads_the_same_files_and_does_not_judge_what_they_do_not_say() {
    let home = tempfile::tempdir().unwrap();
    let inspect = |path: &Path, arguments: &[&str]| {
        let mut command = softserve(home.path());
        command.arg("inspect").arg(path).args(arguments);
        output(command)
    };
    for (name, _, _, _, config) in cases() {
        let (code, said, log) = inspect(&file(name), &[]);
        assert_eq!(code, Some(0), "{name}: {log}");
        assert!(said.contains(config["peft_type"].as_str().unwrap()), "{name}: {said}");
    }
    // An array says nothing of the kind of model: it fits a T5 of its width as well as a Llama.
    let t5 = home.path().join("config.json");
    let config = json!({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 32, "d_kv": 8,
        "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 320, "decoder_start_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 0, "relative_attention_num_buckets": 8, "feed_forward_proj": "relu"});
    fs::write(&t5, config.to_string()).unwrap();
    for name in ["rows.npy", "tgis/encoder.pt"] {
        let (code, said, log) = inspect(&file(name), &["--random-weights", t5.to_str().unwrap()]);
        assert!(code == Some(0) && said.contains("would accept it"), "{name}: {said} {log}");
    }
    let broken = home.path().join("broken");
    fs::create_dir(&broken).unwrap();
    fs::write(broken.join("adapter_model.safetensors"), [8; 300]).unwrap();
    let peft =
        json!({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5, "token_dim": 192});
    fs::write(broken.join("adapter_config.json"), peft.to_string()).unwrap();
    let (code, said, _) = inspect(&broken, &["--json"]);
    let report: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((code, report["faults"].as_array().unwrap().len()), (Some(1), 1), "{said}");
}
