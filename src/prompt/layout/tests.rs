//! Layouts of the types that are more than rows, on a decoder of two layers, one head of keys of 4
//! dimensions and a hidden size of 8: a row of keys and values has 16 columns.

use bytes::Bytes;
use candle_core::{DType, Tensor};
use half::f16;
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::prompt::{
    LearnedPrompt, PeftType, Version,
    fixtures::{config, fit, prompt, safetensors},
    format::{self, FaultKind, Faults, Fit, PromptFiles},
};

fn check(files: &PromptFiles, fit: &Fit) -> Result<Version, Faults> {
    format::read("task".parse().expect("a name"), files, fit)
}

fn refused(files: &PromptFiles, kind: FaultKind, words: &str) {
    let faults = check(files, &fit()).expect_err(words);
    assert_eq!(faults.0[0].kind, kind, "{faults}");
    assert!(faults.to_string().contains(words), "{words}: {faults}");
}

fn bytes(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

fn counted(n: usize) -> Vec<u8> {
    bytes((0..n).map(|i| i as f32))
}

/// A configuration as PEFT writes it for prefix tuning of this decoder.
fn prefix_config(n: usize, changes: Value) -> Bytes {
    let mut all = json!({"peft_type": "PREFIX_TUNING", "num_attention_heads": 1, "token_dim": 4,
        "encoder_hidden_size": 8, "prefix_projection": false});
    all.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
    config(n, all)
}

fn prefix(changes: Value) -> PromptFiles {
    let weights = safetensors(&[("prompt_embeddings", Dtype::F32, &[3, 16], &counted(48))]);
    PromptFiles { adapter_config: Some(prefix_config(3, changes)), weights: Some(weights), ..PromptFiles::default() }
}

/// Three tasks of rank 1: the rows of task t are multiplied by `(t + 1) * (row + 1)`.
fn multitask(task: Option<Value>, changes: Value) -> PromptFiles {
    let cols = bytes((0..3).flat_map(|t| (0..2).map(move |row| ((t + 1) * (row + 1)) as f32)));
    let weights = safetensors(&[
        ("prompt_embeddings", Dtype::F32, &[2, 8], &counted(16)),
        ("prefix_task_cols", Dtype::F32, &[3, 2, 1], &cols),
        ("prefix_task_rows", Dtype::F32, &[3, 1, 8], &bytes([1.0; 24])),
    ]);
    let mut all = json!({"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 3, "num_ranks": 1,
        "prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": "/etc/passwd"});
    all.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
    let task = task.map(|task| task.to_string().into());
    PromptFiles { adapter_config: Some(config(2, all)), weights: Some(weights), task, ..PromptFiles::default() }
}

fn rows(version: &Version) -> Vec<Vec<f32>> {
    let LearnedPrompt::Embeddings(e) = version.prompt.as_ref() else { panic!("not embeddings") };
    e.rows.to_dtype(DType::F32).and_then(|rows| rows.to_vec2()).expect("rows")
}

#[test]
fn keys_are_the_even_rows_of_a_position_and_values_the_odd_ones() {
    for peft_type in ["PREFIX_TUNING", "CARTRIDGE"] {
        let version = check(&prefix(json!({"peft_type": peft_type})), &fit()).expect("good");
        assert!(version.warnings.is_empty(), "{:?}", version.warnings);
        let prompt = &version.prompt;
        assert_eq!((prompt.num_virtual_tokens(), prompt.num_bytes(), prompt.kind()), (3, 48 * 4, "key-values"));
        assert_eq!(version.peft_type.as_str(), peft_type);
        let LearnedPrompt::KeyValues(kv) = prompt.as_ref() else { panic!("not key-values") };
        assert_eq!(kv.layers.len(), 2);
        let values = |x: &Tensor| x.to_vec3::<f32>().expect("values");
        for (i, layer) in kv.layers.iter().enumerate() {
            let expected = |row: usize| -> Vec<Vec<Vec<f32>>> {
                vec![(0..3).map(|n| (0..4).map(|d| (n * 16 + row * 4 + d) as f32).collect()).collect()]
            };
            assert_eq!(values(&layer.keys), expected(2 * i));
            assert_eq!(values(&layer.values), expected(2 * i + 1));
        }
    }
}

#[test]
fn heads_lie_side_by_side_in_a_row() {
    let fit = Fit { num_layers: 1, num_kv_heads: 2, head_dim: 2, ..fit() };
    let weights = safetensors(&[("prompt_embeddings", Dtype::F32, &[1, 8], &counted(8))]);
    let config = prefix_config(1, json!({"num_layers": 1, "num_attention_heads": 2}));
    let files = PromptFiles { adapter_config: Some(config), weights: Some(weights), ..PromptFiles::default() };
    let version = check(&files, &fit).expect("good");
    let LearnedPrompt::KeyValues(kv) = version.prompt.as_ref() else { panic!("not key-values") };
    assert_eq!(kv.layers[0].keys.to_vec3::<f32>().expect("keys"), [[[0.0, 1.0]], [[2.0, 3.0]]]);
    assert_eq!(kv.layers[0].values.to_vec3::<f32>().expect("values"), [[[4.0, 5.0]], [[6.0, 7.0]]]);
}

#[test]
fn a_prefix_of_another_model_is_refused_by_each_number_that_differs() {
    let files = prefix(json!({"num_layers": 3, "num_attention_heads": 4, "token_dim": 16}));
    let faults = check(&files, &fit()).expect_err("refused").to_string();
    for words in ["num_layers is 3, the model tiny has 2", "num_attention_heads is 4", "token_dim is 16"] {
        assert!(faults.contains(words), "{words}: {faults}");
    }
    let weights = safetensors(&[("prompt_embeddings", Dtype::F32, &[3, 12], &counted(36))]);
    let files = PromptFiles { weights: Some(weights), ..prefix(json!({})) };
    refused(&files, FaultKind::Shape, "12 columns, keys and values of the model tiny take 16");
}

#[test]
fn a_prefix_with_the_numbers_of_the_queries_says_which_peft_wrote_it() {
    let weights = safetensors(&[("prompt_embeddings", Dtype::F32, &[3, 32], &counted(96))]);
    let old = json!({"num_attention_heads": 2, "token_dim": 8});
    let files = PromptFiles { weights: Some(weights.clone()), ..prefix(old) };
    refused(&files, FaultKind::Shape, "PEFT before 0.12");
    // Also where only the tensor tells.
    let silent = json!({"num_attention_heads": null, "token_dim": null, "num_layers": null});
    refused(&PromptFiles { weights: Some(weights), ..prefix(silent) }, FaultKind::Shape, "PEFT before 0.12");
}

#[test]
fn a_prefix_without_its_configuration_is_told_from_another_models_rows() {
    let files = PromptFiles { adapter_config: None, ..prefix(json!({})) };
    refused(&files, FaultKind::Shape, "upload it with its adapter_config.json");
}

#[test]
fn keys_and_values_are_checked_like_rows() {
    let with = |weights| PromptFiles { weights: Some(weights), ..prefix(json!({})) };
    let tensor = |dtype, shape: &[usize], data: &[u8]| safetensors(&[("prompt_embeddings", dtype, shape, data)]);
    let nan = bytes((0..48).map(|i| if i == 20 { f32::NAN } else { 0.5 }));
    refused(&with(tensor(Dtype::F32, &[3, 16], &nan)), FaultKind::NotFinite, "row 1, column 4");
    refused(&with(tensor(Dtype::F32, &[48], &counted(48))), FaultKind::Shape, "1 dimensions");
    refused(&with(tensor(Dtype::F32, &[4, 16], &counted(64))), FaultKind::Shape, "num_virtual_tokens 3");
    let zeros = [0; 192];
    let head = safetensors(&[
        ("prompt_embeddings", Dtype::F32, &[3, 16], &zeros),
        ("base_model.lm_head.weight", Dtype::F32, &[3, 16], &zeros),
    ]);
    refused(&with(head), FaultKind::Malformed, "base_model.lm_head.weight");
    let big = bytes([1e5; 48]);
    let fit = Fit { dtype: DType::F16, ..fit() };
    let faults = check(&with(tensor(Dtype::F32, &[3, 16], &big)), &fit).expect_err("overflows").to_string();
    assert!(faults.contains("overflow in the cast"), "{faults}");
    let halves: Vec<u8> = (0..48).flat_map(|i| f16::from_f32(i as f32).to_le_bytes()).collect();
    assert!(check(&with(tensor(Dtype::F16, &[3, 16], &halves)), &fit).is_ok());
}

#[test]
fn a_multitask_prompt_is_folded_with_the_task_that_task_json_names() {
    for task in [0, 2] {
        let version = check(&multitask(Some(json!({"task_id": task})), json!({})), &fit()).expect("good");
        let factor = |row: usize| ((task + 1) * (row + 1)) as f32;
        let expected = [0, 1].map(|row| (0..8).map(|c| (row * 8 + c) as f32 * factor(row)).collect::<Vec<_>>());
        assert_eq!(rows(&version), expected);
        assert_eq!((version.peft_type, version.warnings.len()), (PeftType::Multitask, 0));
    }
}

#[test]
fn a_multitask_prompt_without_a_task_that_is_there_is_refused() {
    refused(&multitask(None, json!({})), FaultKind::Task, "give a task.json with a task_id of 0 to 2");
    refused(&multitask(Some(json!({})), json!({})), FaultKind::Task, "no task_id");
    refused(&multitask(Some(json!({"task_id": 3})), json!({})), FaultKind::Task, "task_id is 3 and the prompt has 3");
    // What is wrong with task.json is not said twice.
    let faults = check(&multitask(Some(json!({"typo": 1})), json!({})), &fit()).expect_err("refused");
    assert_eq!(faults.0.len(), 1, "{faults}");
}

#[test]
fn a_multitask_prompts_matrices_must_fit_each_other_and_the_configuration() {
    let task = || Some(json!({"task_id": 0}));
    refused(&multitask(task(), json!({"num_tasks": 4})), FaultKind::Shape, "expected [4, 2, 1] and [4, 1, 8]");
    refused(&multitask(task(), json!({"num_ranks": 2})), FaultKind::Shape, "expected [3, 2, 2] and [3, 2, 8]");
    let plain = PromptFiles { weights: prompt(0.5).weights, ..multitask(task(), json!({})) };
    refused(&plain, FaultKind::Malformed, "no tensor prefix_task_cols");
    let alone = PromptFiles { adapter_config: None, task: None, ..multitask(None, json!({})) };
    refused(&alone, FaultKind::Malformed, "needs its adapter_config.json and a task.json");
}

#[test]
fn a_product_that_overflows_is_refused() {
    let weights = safetensors(&[
        ("prompt_embeddings", Dtype::F32, &[2, 8], &bytes([1e20; 16])),
        ("prefix_task_cols", Dtype::F32, &[1, 2, 1], &bytes([1e20; 2])),
        ("prefix_task_rows", Dtype::F32, &[1, 1, 8], &bytes([1.0; 8])),
    ]);
    let files =
        PromptFiles { weights: Some(weights), ..multitask(Some(json!({"task_id": 0})), json!({"num_tasks": 1})) };
    refused(&files, FaultKind::NotFinite, "row 0, column 0");
}

#[test]
fn rows_are_scaled_where_task_json_asks_and_the_model_scales_its_embeddings() {
    let task = Some(json!({"scale_by_sqrt_hidden": true}).to_string().into());
    let files = PromptFiles { task, ..prompt(0.5) };
    refused(&files, FaultKind::Task, "does not scale its embeddings");
    let gemma = Fit { embedding_scale: Some(8f64.sqrt()), ..fit() };
    let scaled = rows(&check(&files, &gemma).expect("good"));
    assert_eq!(scaled[4][7], 0.5 * 8f32.sqrt());
    assert_eq!(rows(&check(&prompt(0.5), &gemma).expect("good"))[4][7], 0.5);
    let files = PromptFiles { task: files.task, ..prefix(json!({})) };
    refused(&files, FaultKind::Task, "these are keys and values");
}

/// A good file with some bytes changed or its end cut off.
fn mutated(good: Option<Bytes>) -> impl Strategy<Value = Bytes> {
    let good = good.expect("a file").to_vec();
    let edits = proptest::collection::vec((0..good.len(), any::<u8>()), 0..4);
    let cut = prop_oneof![3 => Just(good.len()), 1 => 0..good.len()];
    (edits, cut).prop_map(move |(edits, cut)| {
        let mut bytes = good.clone();
        edits.into_iter().for_each(|(at, byte)| bytes[at] = byte);
        bytes.truncate(cut);
        bytes.into()
    })
}

fn all_finite(prompt: &LearnedPrompt) -> bool {
    let finite = |x: &Tensor| {
        let values = x.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("values");
        values.iter().all(|value| value.is_finite())
    };
    match prompt {
        LearnedPrompt::Embeddings(e) => finite(&e.rows),
        LearnedPrompt::KeyValues(kv) => kv.layers.iter().all(|layer| finite(&layer.keys) && finite(&layer.values)),
    }
}

proptest! {
    #[test]
    fn mutated_files_never_panic_and_what_is_accepted_is_finite_and_of_the_models_shape(
        (is_prefix, (config, weights)) in any::<bool>().prop_flat_map(|is_prefix| {
            let files = if is_prefix { prefix(json!({})) } else { multitask(None, json!({})) };
            (Just(is_prefix), (mutated(files.adapter_config), mutated(files.weights)))
        }),
        task_id in 0usize..5,
    ) {
        let task = (!is_prefix).then(|| json!({"task_id": task_id}).to_string().into());
        let files = PromptFiles { adapter_config: Some(config), weights: Some(weights), task, ..PromptFiles::default() };
        match check(&files, &fit()) {
            Ok(version) => {
                prop_assert!(all_finite(&version.prompt));
                match version.prompt.as_ref() {
                    LearnedPrompt::Embeddings(e) => prop_assert_eq!(e.rows.dims()[1], 8),
                    LearnedPrompt::KeyValues(kv) => prop_assert_eq!(kv.layers[1].values.dims(), [1, 3, 4]),
                }
            }
            Err(faults) => prop_assert!(!faults.0.is_empty()),
        }
    }
}
