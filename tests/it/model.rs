//! The decoder against transformers + PEFT, and its forward under both sets of kernels.

use candle_core::{DType, Device, Tensor};
use softserve::{
    kernels,
    model::{Model, ModelFiles},
    prompt::LearnedPrompt,
};

use crate::{
    fixtures,
    passes::{by_tuning, values},
};

/// The packed embeddings of a prompt and a text.
fn packed(model: &Model, prompt: &LearnedPrompt, ids: &[u32]) -> Tensor {
    let LearnedPrompt::Embeddings(prompt) = prompt else { panic!("not embeddings") };
    let rows = prompt.rows.to_dtype(model.info().dtype).unwrap();
    let words = model.embed(&Tensor::new(ids, &Device::Cpu).unwrap()).unwrap();
    Tensor::cat(&[rows, words], 0).unwrap()
}

#[test]
fn the_tokenizer_gives_the_ids_that_peft_was_given() {
    for model in fixtures::MODELS {
        let tokenizer = fixtures::tokenizer(model);
        for case in fixtures::cases(model) {
            assert_eq!(tokenizer.tokenize(&case.text).unwrap(), case.input_ids, "{model}: {:?}", case.text);
        }
    }
}

#[test]
fn the_logits_after_a_prompt_are_those_of_peft() {
    for name in fixtures::MODELS {
        let model = fixtures::load(name, DType::F32);
        for case in fixtures::cases(name) {
            let x = packed(&model, &fixtures::prompt(name, &case.prompt), &case.input_ids);
            let logits = by_tuning(&model, &x, &[x.dims()[0]], &[x.dims()[0] as u32 - 1]);
            case.assert_near(&values(&logits), 1e-3, name);
        }
    }
}

#[test]
fn sequences_packed_together_give_what_each_gives_alone() {
    let model = fixtures::load("llama-scaled", DType::F64);
    let prompts: Vec<_> = ["prompt7", "prompt33", "ptuning5"].map(|p| fixtures::prompt("llama-scaled", p)).into();
    let texts: [&[u32]; 3] = [&[5, 6, 7], &[9; 40], &[11]];
    let parts: Vec<_> = prompts.iter().zip(texts).map(|(p, t)| packed(&model, p, t)).collect();
    let lengths: Vec<usize> = parts.iter().map(|x| x.dims()[0]).collect();
    let x = Tensor::cat(&parts, 0).unwrap();
    let all = |rows: usize| (0..rows as u32).collect::<Vec<_>>();
    let together = by_tuning(&model, &x, &lengths, &all(x.dims()[0]));
    let mut start = 0;
    for (x, length) in parts.iter().zip(lengths) {
        let alone = by_tuning(&model, x, &[length], &all(length));
        let difference = (alone - together.narrow(0, start, length).unwrap()).unwrap().abs().unwrap();
        assert!(difference.max_all().unwrap().to_scalar::<f64>().unwrap() < 1e-9);
        start += length;
    }
}

#[test]
fn a_model_that_does_not_fit_its_config_lists_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixtures::dir("llama-tied")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let config = folder.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"intermediate_size\": 48", "\"intermediate_size\": 50000")).unwrap();
    let load = || Model::load(&ModelFiles::dir(folder.path()).unwrap(), kernels::cpu(), DType::F32);
    let error = load().unwrap_err().to_string();
    assert!(error.contains("model.layers.0.mlp.gate_proj.weight has shape [48, 32], expected [50000, 32]"), "{error}");
    assert!(error.contains("model.layers.1.mlp.down_proj.weight"), "{error}");

    std::fs::write(&config, text).unwrap();
    let weights = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    assert!(load().unwrap_err().to_string().contains("model.safetensors"));
    std::fs::remove_file(&weights).unwrap();
    assert!(load().unwrap_err().to_string().contains("model.safetensors.index.json"));
    assert!(ModelFiles::dir(&folder.path().join("missing")).unwrap_err().to_string().contains("is not a folder"));
}

#[test]
fn the_fingerprint_is_that_of_the_weights_and_not_of_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let weights = folder.path().join("model.safetensors");
    std::fs::copy(fixtures::dir("qwen2").join("model.safetensors"), &weights).unwrap();
    let of = || ModelFiles::dir(folder.path()).unwrap().fingerprint().unwrap();
    assert_eq!(of(), fixtures::files("qwen2").fingerprint().unwrap());
    assert_ne!(of(), fixtures::files("llama-tied").fingerprint().unwrap());
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    let before = of();
    std::fs::write(&weights, bytes).unwrap();
    assert_ne!(of(), before);
}
