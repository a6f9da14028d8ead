//! A second reference, beside PEFT's answers: candle-transformers has models of its own for many of the families,
//! written apart from ours, and gives the same logits for the same weights. Both get the same `config.json`, changed
//! where candle's model has no such option or computes it in another way than transformers does.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{
    gemma, gemma2, gemma3, llama, mistral, olmo2, phi3, qwen2, qwen3, smol::smollm3, t5,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use softserve::{
    kernels,
    model::{Model, ModelFiles, family::FAMILIES},
};

use crate::{
    encoder_decoder, fixtures,
    passes::{by_serving, by_tuning, cache, values},
};

/// The greatest difference of two logits, in f32, as a part of the greatest logit.
const TOLERANCE: f32 = 2e-5;

/// Families that candle-transformers has no model for, or none that can be compared, and why.
const WITHOUT: [(&str, &str); 4] = [
    ("gpt2", "it has none; bigcode is GPT-2 with one head of keys and values, under other names"),
    ("gpt_neox", "it has none"),
    ("opt", "it has none"),
    ("bloom", "it has none"),
];

/// A model of the fixtures, what is changed in its config for both, and what candle's config needs beside.
struct Pair {
    fixture: &'static str,
    both: Value,
    candle: Value,
}

/// One or more of each family that candle has.
fn pairs() -> Vec<Pair> {
    let pair = |fixture, both, candle| Pair { fixture, both, candle };
    let same = || json!({});
    // candle's windows are longer by one position than transformers', and in every layer.
    let no_window = json!({"sliding_window": null, "use_sliding_window": false, "layer_types": null});
    let wide = json!({"sliding_window": 512, "query_pre_attn_scalar": 16});
    let mut gemma3 = wide.clone();
    gemma3["rope_parameters"] = json!({"full_attention": {"rope_type": "default", "rope_theta": 1e6},
                                       "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}});
    let gemma3_keys = json!({"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2});
    let gelu = json!({"hidden_act": null, "hidden_activation": "gelu_pytorch_tanh"});
    vec![
        pair("families/llama3", same(), same()),
        // Position interpolation is not among candle's.
        pair("llama-tied", json!({"rope_scaling": null}), same()),
        pair("families/mistral", no_window.clone(), same()),
        pair("qwen2", no_window.clone(), json!({"sliding_window": 512})),
        pair("families/qwen2-window", no_window.clone(), json!({"sliding_window": 512})),
        pair("families/qwen3", no_window.clone(), same()),
        // Of `gelu` transformers makes the other one, candle does not.
        pair("families/gemma", same(), gelu),
        // candle's scores are scaled by the size of a head, whatever `query_pre_attn_scalar` is.
        pair("families/gemma2", wide, same()),
        pair("families/gemma3", gemma3, gemma3_keys),
        // Its longrope multiplies frequencies with the factors that transformers divides by.
        pair("families/phi3", no_window, same()),
        pair("families/olmo2", same(), same()),
        pair("families/smollm3", same(), same()),
        pair("encoder-decoder/t5", same(), same()),
        pair("encoder-decoder/flan-t5", same(), same()),
        pair("encoder-decoder/mt5", same(), same()),
    ]
}

/// The config of a fixture with some keys changed.
fn config(fixture: &str, changes: &Value) -> Value {
    let bytes = std::fs::read(fixtures::dir(fixture).join("config.json")).unwrap();
    changed(serde_json::from_slice(&bytes).unwrap(), changes)
}

fn changed(mut config: Value, changes: &Value) -> Value {
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

/// Our model with this config and the weights of a fixture.
fn ours(fixture: &str, config: &Value) -> Model {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(fixtures::dir(fixture).join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    Model::load(&ModelFiles::dir(dir.path()).unwrap(), kernels::cpu(), DType::F32).unwrap()
}

fn tensors(fixture: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixtures::dir(fixture).join("model.safetensors"), &Device::Cpu).unwrap()
}

/// The config in the form of transformers v4, which candle reads.
fn v4(mut config: Value) -> Value {
    let parameters = config["rope_parameters"].clone();
    if parameters["rope_theta"].is_number() {
        config["rope_theta"] = parameters["rope_theta"].clone();
        if parameters["rope_type"] != "default" {
            config["rope_scaling"] = parameters;
        }
    }
    config
}

fn read<T: DeserializeOwned>(config: &Value) -> T {
    serde_json::from_value(config.clone()).unwrap_or_else(|e| panic!("candle does not read {config}: {e}"))
}

/// What candle's model of a decoder says of the token after `ids`, `[vocab]`.
fn decoder(config: &Value, weights: HashMap<String, Tensor>, ids: &[u32]) -> Result<Vec<f32>> {
    let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    let x = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
    let logits = match config["model_type"].as_str().unwrap() {
        "llama" => {
            let config = read::<llama::LlamaConfig>(config).into_config(false);
            let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
            llama::Llama::load(vb, &config)?.forward(&x, 0, &mut cache)
        }
        "mistral" => mistral::Model::new(&read(config), vb)?.forward(&x, 0),
        "qwen2" => qwen2::ModelForCausalLM::new(&read(config), vb)?.forward(&x, 0),
        "qwen3" => qwen3::ModelForCausalLM::new(&read(config), vb)?.forward(&x, 0),
        "gemma" => gemma::Model::new(false, &read(config), vb)?.forward(&x, 0),
        "gemma2" => gemma2::Model::new(false, &read(config), vb)?.forward(&x, 0),
        "gemma3_text" => {
            // Its cache takes no more than one token at a time on a CPU.
            let mut model = gemma3::Model::new(false, &read(config), vb)?;
            let step = |i| model.forward(&x.narrow(1, i, 1)?, i);
            (0..ids.len()).map(step).last().unwrap()
        }
        "phi3" => phi3::Model::new(&read(config), vb)?.forward(&x, 0),
        "olmo2" => olmo2::Model::new(&read(config), vb)?.forward(&x, 0),
        "smollm3" => smollm3::ModelForCausalLM::new(&read(config), vb)?.forward(&x, 0),
        other => panic!("no model of candle's is known for {other}"),
    };
    logits?.flatten_all()?.to_vec1()
}

/// What candle's T5 says of the token after the decoder's `ids`, `[vocab]`.
fn t5_like(
    config: &Value,
    mut weights: HashMap<String, Tensor>,
    input: &[u32],
    decoder_ids: &[u32],
) -> Result<Vec<f32>> {
    let mut config = config.clone();
    // candle multiplies with √d what the first T5 divides by it and mT5 leaves as it is; so it gets an output matrix.
    config["tie_word_embeddings"] = json!(false);
    if !weights.contains_key("lm_head.weight") {
        let scale = if config["model_type"] == "t5" { config["d_model"].as_f64().unwrap().powf(-0.5) } else { 1.0 };
        let head = (&weights["shared.weight"] * scale)?;
        weights.insert("lm_head.weight".to_owned(), head);
    }
    let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    let ids = |ids: &[u32]| Tensor::new(ids, &Device::Cpu)?.unsqueeze(0);
    let mut model = t5::T5ForConditionalGeneration::load(vb, &read(&config))?;
    model.forward(&ids(input)?, &ids(decoder_ids)?)?.flatten_all()?.to_vec1()
}

fn assert_near(ours: &[f32], candles: &[f32], what: &str) {
    assert_eq!(ours.len(), candles.len(), "{what}");
    let greatest = candles.iter().fold(0f32, |most, x| most.max(x.abs()));
    let apart = ours.iter().zip(candles).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(greatest > 0.0 && apart <= TOLERANCE * greatest, "{what}: {apart} apart, the greatest is {greatest}");
}

#[test]
fn logits_of_decoders_are_those_of_candles_own_models() {
    for Pair { fixture, both, candle } in pairs().into_iter().filter(|p| !p.fixture.starts_with("encoder-decoder")) {
        let config = config(fixture, &both);
        let model = ours(fixture, &config);
        let for_candle = changed(v4(config), &candle);
        let vocab = model.info().vocab_size as u32;
        for len in [1, 2, 13, 40] {
            let ids: Vec<u32> = (0..len).map(|i| (i * 37 + 5) % vocab).collect();
            let expected = decoder(&for_candle, tensors(fixture), &ids);
            let expected = expected.unwrap_or_else(|e| panic!("{fixture}, {len} tokens: {e}"));
            let x = model.embed(&Tensor::new(ids.as_slice(), &Device::Cpu).unwrap()).unwrap();
            let tuning = values(&by_tuning(&model, &x, &[ids.len()], &[len - 1]));
            assert_near(&tuning, &expected, &format!("{fixture}, {len} tokens, tuning"));
            let served = values(&by_serving(&model, &mut *cache(&model, ids.len()), &x, 0, &[len - 1]));
            assert_near(&served, &expected, &format!("{fixture}, {len} tokens, serving"));
        }
    }
}

#[test]
fn logits_of_encoder_decoders_are_those_of_candles_own_models() {
    for Pair { fixture, both, candle } in pairs().into_iter().filter(|p| p.fixture.starts_with("encoder-decoder")) {
        let config = config(fixture, &both);
        let model = ours(fixture, &config);
        let for_candle = changed(config, &candle);
        let cases = fixtures::cases(fixture);
        let case = cases.iter().find(|case| case.prompt.is_empty()).unwrap();
        // candle counts a decoder's distances as an encoder's, which is the same for the first few only.
        for ids in [&[0][..], &[0, 41]] {
            let expected = t5_like(&for_candle, tensors(fixture), &case.input_ids, ids).unwrap();
            let got = encoder_decoder::decoded(&model, None, case, ids, &[ids.len() as u32 - 1]);
            assert_near(&got, &expected, &format!("{fixture}, {} tokens", ids.len()));
        }
    }
}

#[test]
fn each_family_is_compared_or_said_to_be_without_a_second_reference() {
    let compared: Vec<_> = pairs()
        .iter()
        .map(|pair| config(pair.fixture, &json!({}))["model_type"].as_str().unwrap().to_owned())
        .collect();
    for family in &FAMILIES {
        let without = WITHOUT.iter().any(|(name, _)| *name == family.model_type);
        let is_compared = compared.iter().any(|name| name == family.model_type);
        assert!(without != is_compared, "{} is compared: {is_compared}, left out: {without}", family.model_type);
    }
}
