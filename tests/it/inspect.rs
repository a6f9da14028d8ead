//! `softserve inspect` as a person and as a script see it.

use std::{fs, path::Path};

use candle_core::Device;
use serde_json::Value;

use crate::{
    convert::foreign,
    fixtures,
    process::{output, softserve},
    support::{MODEL, TASK, copy},
};

fn inspect(home: &Path, path: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = softserve(home);
    command.arg("inspect").arg(path).args(arguments);
    output(command)
}

fn inspect_json(home: &Path, path: &Path, arguments: &[&str]) -> (Option<i32>, Value) {
    let (code, said, log) = inspect(home, path, &[arguments, &["--json"]].concat());
    (code, serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}{log}")))
}

fn model() -> String {
    fixtures::dir(MODEL).display().to_string()
}

#[test]
fn a_prompt_of_the_demo_is_shown_beside_the_demos_vocabulary() {
    let home = tempfile::tempdir().unwrap();
    let sentiment = Path::new(env!("CARGO_MANIFEST_DIR")).join("prompts/sentiment");
    let (code, said, log) = inspect(home.path(), &sentiment, &[]);
    assert_eq!((code, log.as_str()), (Some(0), ""), "{said}");
    for words in [
        "PROMPT_TUNING for CAUSAL_LM, PEFT 0.21.2",
        "prompt_embeddings F32 [32, 192]",
        "fingerprint 1d37db9562c04a69",
        "Whether a text is positive or negative",
        "negative, positive",
        "vocabulary's",
        "nearest tokens",
        "softserve-demo (fingerprint 1d37db9562c04a69) would accept it",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert!(said.lines().any(|line| line.trim_start().starts_with("31 ")), "{said}");
}

#[test]
fn a_row_that_is_a_tokens_embedding_has_that_token_as_its_nearest() {
    let home = tempfile::tempdir().unwrap();
    // The embeddings of three tokens of the fixture, the last one twice as long.
    let weights = fs::read(fixtures::dir(MODEL).join("model.safetensors")).unwrap();
    let weights = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let table = weights.tensor("model.embed_tokens.weight").unwrap();
    let ids = [40_u32, 270, 5];
    let mut rows = Vec::new();
    for (id, factor) in ids.into_iter().zip([1.0_f32, 1.0, 2.0]) {
        let row = &table.data()[id as usize * 128..(id as usize + 1) * 128];
        rows.extend(row.as_chunks().0.iter().flat_map(|b| (factor * f32::from_le_bytes(*b)).to_le_bytes()));
    }
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![3, 32], &rows).unwrap();
    let path = home.path().join("words.safetensors");
    fs::write(&path, safetensors::serialize([("prompt_embeddings", view)], None).unwrap()).unwrap();
    let (code, report) = inspect_json(home.path(), &path, &["--model", &model(), "--nearest", "2"]);
    assert_eq!(code, Some(0), "{report}");
    let tokens = report["virtual_tokens"].as_array().unwrap();
    let tokenizer = fixtures::tokenizer(MODEL);
    for (token, id) in tokens.iter().zip(ids) {
        let nearest = token["nearest"].as_array().unwrap();
        assert_eq!(nearest.len(), 2);
        assert_eq!(
            (&nearest[0]["id"], nearest[0]["text"].as_str()),
            (&id.into(), Some(tokenizer.token_text(id).as_str()))
        );
        assert!((nearest[0]["similarity"].as_f64().unwrap() - 1.0).abs() < 1e-5);
        assert!(nearest[1]["similarity"].as_f64().unwrap() < 0.99);
    }
    let norms: Vec<f64> = tokens.iter().map(|token| token["norm"].as_f64().unwrap()).collect();
    let (p5, p95) = (&report["model"]["vocabulary"]["p5"], &report["model"]["vocabulary"]["p95"]);
    assert!(norms[2] > p95.as_f64().unwrap() && p5.as_f64() < p95.as_f64(), "{norms:?} {p5} {p95}");
    assert_eq!(tokens[2]["percentile"], 100.0);
}

#[test]
fn a_model_that_would_not_take_it_says_every_reason_and_the_code_is_1() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("bad");
    copy(&fixtures::dir(MODEL).join("prompts").join(TASK), &folder);
    let config = fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    fs::write(
        folder.join("adapter_config.json"),
        config.replace("\"num_virtual_tokens\": 7", "\"num_virtual_tokens\": 9"),
    )
    .unwrap();
    fs::write(
        folder.join("task.json"),
        r#"{"base_model": {"name": "other", "fingerprint": "ffff"}, "defaults": {"top_p": 7}}"#,
    )
    .unwrap();
    let (code, said, log) = inspect(home.path(), &folder, &["--model", &model()]);
    assert_eq!(code, Some(1));
    for words in
        ["would refuse it", "num_virtual_tokens 9", "base_model.fingerprint is \"ffff\"", "defaults.top_p: found 7"]
    {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.contains("3 faults"), "{log}");
    let (code, report) = inspect_json(home.path(), &folder, &["--model", &model()]);
    assert_eq!((code, &report["model"]["takes"]), (Some(1), &false.into()));
    assert_eq!(report["model"]["faults"].as_array().unwrap().len(), 3);

    // Without a model, only what is wrong for every model counts.
    let (code, report) = inspect_json(home.path(), &folder, &[]);
    assert_eq!((code, &report["model"]), (Some(1), &Value::Null));
    assert_eq!(report["faults"].as_array().unwrap().len(), 2, "{report}");

    // A model of another size.
    let prompt = fixtures::dir(MODEL).join("prompts").join(TASK);
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo").display().to_string();
    let (code, said, _) = inspect(home.path(), &prompt, &["--model", &demo]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("hidden size of 192") && said.contains("token     norm\n"), "{said}");
}

#[test]
fn every_form_of_a_prompt_is_read() {
    let home = tempfile::tempdir().unwrap();
    let prompt = fixtures::dir(MODEL).join("prompts").join(TASK);
    // A task's folder of a server, and a packed PEFT directory.
    let task = home.path().join("managed");
    copy(&prompt, &task.join("versions/0123456789ab"));
    fs::write(task.join("active.json"), r#"{"version": "0123456789ab"}"#).unwrap();
    let packed = home.path().join("packed.tar");
    let mut tar = tar::Builder::new(fs::File::create(&packed).unwrap());
    tar.append_dir_all(".", &prompt).unwrap();
    tar.into_inner().unwrap();
    let exact = fixtures::files(MODEL).config().unwrap().hidden_size;
    assert_eq!(exact, 32);
    let (_, expected) = inspect_json(home.path(), &prompt, &["--model", &model()]);
    let forms = [
        "c.npy",
        "kobold.zip",
        "tgis",
        "legacy.pt",
        "peft-bin",
        "peft-bin/adapter_model.bin",
        "soft_prompt.safetensors",
    ];
    let forms = forms.into_iter().map(|name| foreign().join(name));
    let (code, report) = inspect_json(home.path(), &foreign().join("tasks.nemo"), &["--tensor", "cats"]);
    assert_eq!((code, &report["norms"]), (Some(0), &expected["norms"]));
    for path in forms.chain([task, packed, prompt.join("adapter_model.safetensors")]) {
        let (code, report) = inspect_json(home.path(), &path, &["--model", &model()]);
        assert_eq!(code, Some(0), "{}: {report}", path.display());
        assert_eq!(report["virtual_tokens"], expected["virtual_tokens"], "{}", path.display());
        assert_eq!(report["model"]["vocabulary"], expected["model"]["vocabulary"]);
    }
}

#[test]
fn what_is_no_prompt_is_refused_in_one_line() {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("mine.txt"), "hello").unwrap();
    fs::create_dir(home.path().join("empty")).unwrap();
    for (path, words) in [
        (foreign().join("hostile/command.pt"), "posix.system"),
        (foreign().join("two.safetensors"), "--tensor"),
        (home.path().join("mine.txt"), "the text \"hello\""),
        (home.path().join("empty"), "is not a PEFT directory"),
        (home.path().join("nothing"), "cannot read"),
    ] {
        let (code, said, log) = inspect(home.path(), &path, &[]);
        assert_eq!((code, said.as_str()), (Some(1), ""), "{}", path.display());
        assert!(log.lines().count() == 1 && log.contains(words), "{log}");
    }
}

#[test]
fn keys_and_values_are_shown_by_layer() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("prefix");
    fs::create_dir(&folder).unwrap();
    // 2 layers of width 4: keys of layer 0 are ones, its values twos, and so on.
    let row: Vec<u8> = (0..16).flat_map(|i| ((i / 4 + 1) as f32).to_le_bytes()).collect();
    let rows = row.repeat(3);
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![3, 16], &rows).unwrap();
    fs::write(
        folder.join("adapter_model.safetensors"),
        safetensors::serialize([("prompt_embeddings", view)], None).unwrap(),
    )
    .unwrap();
    fs::write(
        folder.join("adapter_config.json"),
        r#"{"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_layers": 2, "num_attention_heads": 2,
            "token_dim": 4, "num_virtual_tokens": 3, "num_transformer_submodules": 1}"#,
    )
    .unwrap();
    let (code, report) = inspect_json(home.path(), &folder, &[]);
    assert_eq!(code, Some(0), "{report}");
    let norm = |layer: usize, what: &str| report["layers"][layer][what]["mean"].as_f64().unwrap();
    let norms = [norm(0, "keys"), norm(0, "values"), norm(1, "keys"), norm(1, "values")];
    assert_eq!(norms, [2.0, 4.0, 6.0, 8.0]);
    assert_eq!(report["num_virtual_tokens"], 3);
    let (_, said, _) = inspect(home.path(), &folder, &[]);
    assert!(said.contains("norms of keys") && said.contains("6.000 (6.000, 6.000)"), "{said}");
}

#[test]
fn of_a_prompt_for_an_encoder_and_a_decoder_the_encoders_rows_are_counted_and_the_others_called_dead_weight() {
    let home = tempfile::tempdir().unwrap();
    let model = fixtures::dir("encoder-decoder/t5");
    let named = ["--model", model.to_str().unwrap()];
    for (prompt, n, is_doubled) in
        [("prompt7", 7, true), ("ptuning5", 5, true), ("multitask5", 5, true), ("prompt33-one", 33, false)]
    {
        let folder = home.path().join(prompt);
        copy(&model.join("prompts").join(prompt), &folder);
        if prompt == "multitask5" {
            fs::write(folder.join("task.json"), r#"{"task_id": 1}"#).unwrap();
        }
        for arguments in [&[][..], &named] {
            let (code, report) = inspect_json(home.path(), &folder, arguments);
            assert_eq!((code, &report["num_virtual_tokens"]), (Some(0), &n.into()), "{report}");
            assert_eq!(report["virtual_tokens"].as_array().unwrap().len(), n);
            let (_, said, _) = inspect(home.path(), &folder, arguments);
            assert!(said.contains(&format!("virtual tokens  {n}\n")), "{said}");
            let words = format!("the other {n} rows are not used");
            assert_eq!(said.contains(&words), is_doubled, "{prompt}: {said}");
        }
        // Its own norms only.
        let weights = candle_core::safetensors::load(folder.join("adapter_model.safetensors"), &Device::Cpu).unwrap();
        let rows = weights["prompt_embeddings"].narrow(0, 0, n).unwrap().to_vec2::<f32>().unwrap();
        let norms = rows.iter().map(|row| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt());
        let (_, report) = inspect_json(home.path(), &folder, &[]);
        let largest = report["norms"]["max"].as_f64().unwrap();
        assert!((norms.fold(0.0, f64::max) - largest).abs() < 1e-6, "{prompt}: {report}");
    }
    // Where the type of task is not said, the two parts of the model are.
    let folder = home.path().join("prompt7");
    let config = fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    fs::write(folder.join("adapter_config.json"), config.replace("\"SEQ_2_SEQ_LM\"", "null")).unwrap();
    let (code, report) = inspect_json(home.path(), &folder, &[]);
    assert_eq!((code, &report["num_virtual_tokens"]), (Some(0), &7.into()), "{report}");
}

#[test]
fn the_layers_of_a_prefix_for_an_encoder_decoder_model_have_the_rows_that_peft_gives_them() {
    let home = tempfile::tempdir().unwrap();
    let folder = fixtures::dir("encoder-decoder/t5").join("prompts/prefix6");
    let (code, report) = inspect_json(home.path(), &folder, &[]);
    assert_eq!((code, &report["num_virtual_tokens"]), (Some(0), &6.into()), "{report}");
    // Of 2 layers, row 4 of twice 4 rows is row 0 again.
    let layers = report["layers"].as_array().unwrap();
    assert_eq!((layers.len(), &layers[0]), (2, &layers[1]));
    assert_ne!(layers[0]["keys"], layers[0]["values"]);
}
