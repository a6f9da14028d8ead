//! GGUF files against what transformers, PEFT and the tokenizers they come from answer
//! (`tests/peft/make_gguf.py`), and what is said of damaged ones.

use std::{
    fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;
use serde::Deserialize;
use softserve::{
    kernels::{self, BackendKind, QuantisedProducts, layout::BatchLayout},
    model::{Model, ModelFiles, gguf},
    tokenizer::Tokenizer,
};

use crate::{
    fixtures,
    passes::{by_tuning, values},
    process::{Process, output, softserve},
};

const MODELS: [&str; 4] = ["llama-f16", "qwen2-q8_0", "llama-q4_0", "llama-k"];
const TOKENIZERS: [&str; 7] =
    ["llama-f16", "qwen2-q8_0", "llama-q4_0", "llama-k", "tokens-gpt-2", "tokens-olmo", "tokens-bloom"];

#[derive(Deserialize)]
struct Expected {
    cases: Vec<Case>,
    /// Rows of a learned prompt.
    prompt: Option<Vec<Vec<f32>>>,
    page: Vec<Line>,
}

#[derive(Deserialize)]
struct Case {
    /// Whether the learned prompt comes before it.
    tuned: bool,
    text: String,
    input_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    top: Vec<(u32, f32)>,
}

#[derive(Deserialize)]
struct Line {
    text: String,
    ids: Vec<u32>,
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/gguf").join(format!("{name}.gguf"))
}

fn files(name: &str) -> ModelFiles {
    ModelFiles::open(&path(name)).unwrap()
}

fn expected(name: &str) -> Expected {
    serde_json::from_slice(&fs::read(path(name).with_extension("json")).unwrap()).unwrap()
}

fn load(name: &str, dtype: DType) -> Model {
    Model::load(&files(name), fixtures::backend_for(dtype), dtype).unwrap()
}

/// The logits after a prompt's rows and some tokens.
fn logits(model: &Model, prompt: Option<&Tensor>, ids: &[u32]) -> Vec<f32> {
    let words = model.embed(&Tensor::new(ids, &Device::Cpu).unwrap()).unwrap();
    let x = prompt.map_or_else(|| words.clone(), |rows| Tensor::cat(&[rows, &words], 0).unwrap());
    let n = x.dims()[0];
    values(&by_tuning(model, &x, &[n], &[n as u32 - 1]))
}

fn best(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32
}

#[test]
fn a_gguf_file_answers_as_the_same_weights_do_in_transformers_and_peft() {
    for name in MODELS {
        check(name, &load(name, DType::F32));
    }
}

fn check(name: &str, model: &Model) {
    let Expected { cases, prompt, .. } = expected(name);
    assert!(!cases.is_empty());
    for case in cases {
        let prompt =
            prompt.as_ref().filter(|_| case.tuned).map(|rows| Tensor::new(rows.clone(), &Device::Cpu).unwrap());
        let mut ids = case.input_ids.clone();
        for (i, greedy) in case.greedy_ids.iter().enumerate() {
            let logits = logits(model, prompt.as_ref(), &ids);
            if i == 0 {
                for (id, expected) in &case.top {
                    let got = logits[*id as usize];
                    assert!((got - expected).abs() < 1e-3, "{name} {:?}: {id} {got} {expected}", case.text);
                }
            }
            assert_eq!(best(&logits), *greedy, "{name} {:?}, token {i}", case.text);
            ids.push(*greedy);
        }
    }
}

#[test]
fn every_family_that_gguf_has_answers_as_in_transformers() {
    for family in ["qwen3", "gemma", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "gpt2", "gptneox", "bloom"] {
        let name = format!("family-{family}");
        check(&name, &load(&name, DType::F32));
    }
}

#[test]
fn the_tokenizer_of_a_file_is_the_one_it_was_made_from() {
    for name in TOKENIZERS {
        let tokenizer = Tokenizer::load(&files(name)).unwrap();
        for line in expected(name).page {
            assert_eq!(tokenizer.tokenize(&line.text).unwrap(), line.ids, "{name}: {:?}", line.text);
            // Normalization and unknown characters aside, what was encoded comes back.
            let same = tokenizer.decode(&line.ids).unwrap();
            let whole = !["<s>", "e\u{301}"].iter().any(|s| line.text.contains(s));
            assert!(!whole || same == line.text, "{name}: {:?} {same:?}", line.text);
        }
    }
}

#[test]
fn the_weights_keep_the_size_they_have_in_the_file_and_the_gradient_is_that_of_their_values() {
    for name in MODELS {
        let exact = gradient(&load(name, DType::F64), DType::F64);
        let largest = exact.iter().fold(0f64, |m, x| m.max(x.abs()));
        // Activations of 8 bits make other gradients, near those of the values.
        for (quantised, within) in [(QuantisedProducts::Exact, 1e-3), (QuantisedProducts::Integers, 0.1)] {
            let backend = kernels::open(BackendKind::Own, &Device::Cpu, quantised).unwrap();
            let model = Model::load(&files(name), backend, DType::F32).unwrap();
            let ours = gradient(&model, DType::F32);
            assert_eq!(ours.len(), exact.len());
            for (a, b) in ours.iter().zip(&exact) {
                assert!((a - b).abs() < within * largest, "{name} {quantised:?}: {a} {b} of {largest}");
            }
        }
    }
}

/// Of a loss to nine rows of inputs, the same for every model of a width.
fn gradient(model: &Model, dtype: DType) -> Vec<f64> {
    let width = model.info().hidden_size;
    let rows: Vec<f32> = (0..9 * width).map(|i| 0.4 * (i as f32 * 1.7 + (i / width) as f32).sin()).collect();
    let x = Tensor::from_vec(rows, (9, width), &Device::Cpu).unwrap();
    let x = Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap();
    let logits = by_tuning(model, x.as_tensor(), &[9], &BatchLayout::of_lengths(0, &[9]).wanted);
    let grads = logits.sqr().unwrap().mean_all().unwrap().backward().unwrap();
    let grad = grads.get(x.as_tensor()).expect("a gradient to the input").to_dtype(DType::F64).unwrap();
    grad.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn a_file_is_served_by_its_path_or_by_its_folder() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("folder");
    fs::create_dir(&folder).unwrap();
    fs::copy(path("qwen2-q8_0"), folder.join("tiny-Q8_0.gguf")).unwrap();
    let in_folder = ModelFiles::open(&folder).unwrap();
    assert_eq!(in_folder.name(), "tiny-Q8_0");
    assert_eq!(in_folder.fingerprint().unwrap(), files("qwen2-q8_0").fingerprint().unwrap());
    assert_ne!(in_folder.fingerprint().unwrap(), files("llama-q4_0").fingerprint().unwrap());
    let info = load("qwen2-q8_0", DType::F32).info().clone();
    assert_eq!(info.eos_token_ids, [2]);
    assert!(info.chat.template.unwrap().contains("messages"));

    let mut serve = softserve(home.path());
    serve.args(["serve", "--listen=127.0.0.1:0", "--kv-cache=8MiB", "--prompts=none", "--model"]).arg(&folder);
    let server = Process::start(serve);
    assert!(server.summary.contains("tiny-Q8_0"), "{}", server.summary);
    drop(server);

    fs::copy(path("llama-q4_0"), folder.join("other.gguf")).unwrap();
    let error = ModelFiles::open(&folder).unwrap_err().to_string();
    assert!(error.contains("other.gguf, tiny-Q8_0.gguf"), "{error}");
    let mut missing = softserve(home.path());
    missing.args(["serve", "--model", "models/none.gguf"]);
    let (code, _, log) = output(missing);
    assert!(code != Some(0) && log.contains("models/none.gguf"), "{log}");
}

#[test]
fn quantised_weights_are_multiplied_as_integers_unless_f32_is_asked_for() {
    let home = tempfile::tempdir().unwrap();
    let mut logprobs = Vec::new();
    for dtype in ["f32", "auto", "auto"] {
        let mut serve = softserve(home.path());
        serve.args(["serve", "--listen=127.0.0.1:0", "--kv-cache=8MiB", "--prompts=none", "--dtype", dtype, "--model"]);
        serve.arg(path("llama-k"));
        let server = Process::start(serve);
        let body = serde_json::json!({"model": "llama-k", "prompt": "the cat sat on the mat and the dog ran", "echo": true,
            "logprobs": 0, "max_tokens": 1});
        let answer = ureq::post(format!("{}/v1/completions", server.url)).send_json(&body).unwrap();
        let answer: serde_json::Value = answer.into_body().read_json().unwrap();
        let found = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().clone();
        logprobs.push(found.iter().filter_map(serde_json::Value::as_f64).collect::<Vec<f64>>());
    }
    let [exact, integers, again] = &logprobs[..] else { panic!("three runs") };
    assert!(exact.len() > 8 && exact.len() == integers.len());
    assert_eq!(integers, again);
    let far = exact.iter().zip(integers).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    // Activations of 8 bits are near and not the same.
    assert!(far > 1e-6 && far < 0.2, "{far}: {exact:?} {integers:?}");
}

/// The parts of a model in a folder of their own, the first one first.
fn parts_in(folder: &Path) -> Vec<PathBuf> {
    let from = path("qwen2-q8_0").with_file_name("parts");
    let mut parts: Vec<_> = fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()).collect();
    parts.sort();
    let copied = |part: PathBuf| {
        let to = folder.join(part.file_name().unwrap());
        fs::copy(part, &to).unwrap();
        to
    };
    parts.into_iter().map(copied).collect()
}

#[test]
fn a_model_in_parts_is_the_model_that_one_file_holds() {
    let home = tempfile::tempdir().unwrap();
    let parts = parts_in(home.path());
    assert!(parts.len() > 2);
    let whole = load("qwen2-q8_0", DType::F32);
    for given in [parts[0].as_path(), home.path()] {
        let files = ModelFiles::open(given).unwrap();
        assert_eq!(files.name(), "qwen2-q8_0");
        let model = Model::load(&files, kernels::cpu(), DType::F32).unwrap();
        check("qwen2-q8_0", &model);
        assert_eq!(logits(&model, None, &[5, 6, 7]), logits(&whole, None, &[5, 6, 7]));
        let tokenizer = Tokenizer::load(&files).unwrap();
        for line in expected("qwen2-q8_0").page {
            assert_eq!(tokenizer.tokenize(&line.text).unwrap(), line.ids, "{:?}", line.text);
        }
    }
}

#[test]
fn parts_that_are_missing_or_mixed_up_are_said() {
    let home = tempfile::tempdir().unwrap();
    let parts = parts_in(home.path());
    let name = |part: usize| parts[part].file_name().unwrap().to_str().unwrap().to_owned();
    let error = |given: &Path| ModelFiles::open(given).unwrap_err().to_string();
    let later = error(&parts[1]);
    assert!(later.contains("give the first part"), "{later}");

    let second = fs::read(&parts[1]).unwrap();
    fs::copy(&parts[2], &parts[1]).unwrap();
    let swapped = error(&parts[0]);
    assert!(swapped.contains(&name(1)) && swapped.contains("its metadata says part 3 of"), "{swapped}");

    fs::remove_file(&parts[1]).unwrap();
    for given in [parts[0].as_path(), home.path()] {
        let missing = error(given);
        for words in [&name(1), "part 2 of", "the folder of the first part", "is the download complete?"] {
            assert!(missing.contains(words), "{words}: {missing}");
        }
    }
    let mut serve = softserve(home.path());
    serve.args(["serve", "--model"]).arg(&parts[0]);
    let (code, _, log) = output(serve);
    assert!(code != Some(0) && log.contains(&name(1)), "{log}");

    fs::write(&parts[1], second).unwrap();
    assert!(ModelFiles::open(&parts[0]).is_ok());
    let renamed = home.path().join("renamed.gguf");
    fs::copy(&parts[0], &renamed).unwrap();
    let error = error(&renamed);
    assert!(error.contains("NAME-00001-of-"), "{error}");
}

#[test]
fn bf16_rounds_the_values_of_a_file() {
    let (exact, rounded) = (load("qwen2-q8_0", DType::F32), load("qwen2-q8_0", DType::BF16));
    let (a, b) = (logits(&exact, None, &[5, 6, 7]), logits(&rounded, None, &[5, 6, 7]));
    let difference = a.iter().zip(&b).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(difference > 0.0 && difference < 0.3, "{difference}");
}

#[test]
fn a_file_that_is_cut_off_or_changed_says_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(path("llama-q4_0")).unwrap();
    let open = |bytes: &[u8]| {
        let file = folder.path().join("x.gguf");
        fs::write(&file, bytes).unwrap();
        let files = ModelFiles::open(&file)?;
        Tokenizer::load(&files).map_err(|e| e.to_string()).ok();
        Model::load(&files, kernels::cpu(), DType::F32).map(drop)
    };
    let replaced = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        let mut changed = bytes.clone();
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        changed
    };
    assert!(open(&bytes).is_ok());
    for (bytes, named) in [
        (bytes[..bytes.len() - 1].to_vec(), "is the download complete?"),
        (bytes[..100].to_vec(), "are left"),
        (Vec::new(), "0 are left"),
        (replaced("blk.1.attn_v.weight", "blk.1.attn_w.weight"), "blk.1.attn_w.weight is not one that"),
        (replaced("llama.block_count", "llama.block_kount"), "llama.block_count is missing"),
        (replaced("general.architecture", "general.archi_ecture"), "general.architecture is missing"),
        (
            replaced("blk.1.ffn_up.weight", "blk.3.ffn_up.weight"),
            "model.layers.1.mlp.up_proj.weight [96, 64] is missing",
        ),
    ] {
        let error = open(&bytes).unwrap_err().to_string();
        assert!(error.contains(named), "{named}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_damage_to_a_file_does_more_than_an_error(
        name in prop::sample::select(vec!["tokens-gpt-2", "llama-q4_0"]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0usize..9), 1..8),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let mut bytes = fs::read(path(name)).unwrap();
        // The header is where a change matters; the last tensors' data are all alike.
        let header = 9000.min(bytes.len());
        for (at, value, width) in changes {
            let at = at.index(header);
            match width {
                8 => bytes[at..(at + 8).min(header)].fill(value),
                _ => bytes[at] = value,
            }
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let _ = gguf::check(&bytes);
    }
}
