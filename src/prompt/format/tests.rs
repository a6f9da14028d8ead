//! Good and bad prompts' files, one rule a test.

use bytes::Bytes;
use candle_core::DType;
use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::json;

use super::*;
use crate::prompt::fixtures::{HIDDEN, config, fit, prompt, safetensors, weights};

fn check(files: &PromptFiles) -> Result<Version, Faults> {
    read("task".parse().expect("a name"), files, &fit())
}

fn rows(version: &Version) -> Vec<Vec<f32>> {
    let LearnedPrompt::Embeddings(e) = version.prompt.as_ref() else { panic!("not embeddings") };
    e.rows.to_dtype(DType::F32).and_then(|rows| rows.to_vec2()).expect("rows")
}

fn refused(files: &PromptFiles, kind: FaultKind, words: &str) {
    let faults = check(files).expect_err(words);
    assert_eq!(faults.0[0].kind, kind, "{faults}");
    assert!(faults.to_string().contains(words), "{faults}");
}

fn with_config(changes: serde_json::Value) -> PromptFiles {
    PromptFiles { adapter_config: Some(config(5, changes)), ..prompt(0.5) }
}

fn with_weights(weights: Bytes) -> PromptFiles {
    PromptFiles { weights: Some(weights), ..prompt(0.5) }
}

fn with_task(task: serde_json::Value) -> PromptFiles {
    PromptFiles { task: Some(task.to_string().into()), ..prompt(0.5) }
}

fn tensor(dtype: Dtype, shape: &[usize], data: &[u8]) -> Bytes {
    safetensors(&[("prompt_embeddings", dtype, shape, data)])
}

fn raw_header(header: &str, data: &[u8]) -> Bytes {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat().into()
}

#[test]
fn a_good_prompt_has_its_rows_and_the_default_template() {
    let version = check(&prompt(0.5)).expect("good");
    assert_eq!(rows(&version), vec![vec![0.5; HIDDEN]; 5]);
    assert_eq!(version.digest, prompt(0.5).digest());
    assert_eq!(version.template.source(), "{{ input }}");
    assert!(version.labels.is_none() && version.warnings.is_empty(), "{:?}", version.warnings);
}

#[test]
fn a_single_safetensors_file_is_taken_as_prompt_tuning() {
    let files = PromptFiles { adapter_config: None, ..prompt(0.5) };
    assert_eq!(check(&files).expect("good").prompt.num_virtual_tokens(), 5);
}

#[test]
fn p_tuning_and_cpt_are_served_like_prompt_tuning() {
    for peft_type in ["P_TUNING", "CPT"] {
        let files = with_config(json!({"peft_type": peft_type, "task_type": null, "num_virtual_tokens": null}));
        assert_eq!(check(&files).expect(peft_type).prompt.num_virtual_tokens(), 5);
    }
}

#[test]
fn half_and_double_precision_files_are_cast() {
    let f16s: Vec<u8> = (0..8).flat_map(|i| f16::from_f32(i as f32 / 3.0).to_le_bytes()).collect();
    let bf16s: Vec<u8> = (0..8).flat_map(|i| bf16::from_f32(i as f32 / 3.0).to_le_bytes()).collect();
    let f64s: Vec<u8> = (0..8).flat_map(|i| (i as f64 / 3.0).to_le_bytes()).collect();
    let cast = |of: fn(f32) -> f32| vec![(0..8).map(|i| of(i as f32 / 3.0)).collect::<Vec<_>>()];
    let files = |dtype, data: &[u8]| PromptFiles { adapter_config: None, ..with_weights(tensor(dtype, &[1, 8], data)) };
    let found = |dtype, data: &[u8]| rows(&check(&files(dtype, data)).expect("good"));
    assert_eq!(found(Dtype::F16, &f16s), cast(|v| f16::from_f32(v).to_f32()));
    assert_eq!(found(Dtype::BF16, &bf16s), cast(|v| bf16::from_f32(v).to_f32()));
    assert_eq!(found(Dtype::F64, &f64s), vec![(0..8).map(|i| (i as f64 / 3.0) as f32).collect::<Vec<_>>()]);
}

#[test]
fn integers_are_not_embeddings() {
    refused(&with_weights(tensor(Dtype::I8, &[5, 8], &[1; 40])), FaultKind::Malformed, "I8");
}

#[test]
fn another_hidden_size_is_refused_by_the_tensor_and_by_the_configuration() {
    let files = PromptFiles {
        adapter_config: Some(config(5, json!({"token_dim": 6}))),
        weights: Some(tensor(Dtype::F32, &[5, 6], &[0; 120])),
        ..PromptFiles::default()
    };
    let faults = check(&files).expect_err("another model's");
    assert_eq!(faults.0.iter().map(|f| f.kind).collect::<Vec<_>>(), [FaultKind::Shape; 2], "{faults}");
    assert!(faults.to_string().contains("token_dim is 6") && faults.to_string().contains("6 columns"), "{faults}");
}

#[test]
fn nan_and_infinity_are_found_where_they_are() {
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = [0.25f32; 40];
        values[3 * HIDDEN + 2] = odd;
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        refused(&with_weights(tensor(Dtype::F32, &[5, 8], &data)), FaultKind::NotFinite, "row 3, column 2");
    }
}

#[test]
fn a_value_that_overflows_in_the_cast_is_told_from_one_that_is_not_finite() {
    for (dtype, value) in [(DType::F16, 1e5), (DType::BF16, f32::MAX)] {
        let fit = Fit { dtype, ..fit() };
        let faults = read("task".parse().expect("a name"), &prompt(value), &fit).expect_err("overflows");
        assert_eq!(faults.0[0].kind, FaultKind::NotFinite);
        assert!(faults.to_string().contains("40 values that overflow in the cast"), "{faults}");
        assert!(check(&prompt(value)).is_ok());
    }
    let data: Vec<u8> = [1e300f64; 40].iter().flat_map(|v| v.to_le_bytes()).collect();
    refused(&with_weights(tensor(Dtype::F64, &[5, 8], &data)), FaultKind::NotFinite, "overflow in the cast");
}

#[test]
fn a_damaged_file_is_refused_whatever_its_header_claims() {
    let good = weights(5, 0.5);
    refused(&with_weights(Bytes::new()), FaultKind::Malformed, "0 bytes");
    refused(&with_weights(good.slice(..good.len() - 7)), FaultKind::Malformed, "not a complete safetensors file");
    let huge = [&(1u64 << 60).to_le_bytes()[..], b"{}"].concat();
    refused(&with_weights(huge.into()), FaultKind::Malformed, "1152921504606846976");
    let past_end = r#"{"prompt_embeddings":{"dtype":"F32","shape":[5,8],"data_offsets":[0,1073741824]}}"#;
    refused(&with_weights(raw_header(past_end, &[0; 160])), FaultKind::Malformed, "not a complete safetensors file");
    let overflow = r#"{"prompt_embeddings":{"dtype":"F32","shape":[18446744073709551615,8],"data_offsets":[0,160]}}"#;
    refused(&with_weights(raw_header(overflow, &[0; 160])), FaultKind::Malformed, "not a complete safetensors file");
    let long = format!(r#"{{"__metadata__":{{"x":"{}"}}}}"#, "x".repeat(2 << 20));
    refused(&with_weights(raw_header(&long, &[])), FaultKind::Malformed, "the maximum is");
}

#[test]
fn missing_files_and_a_configuration_that_is_no_json_are_refused() {
    let weights_only = PromptFiles { adapter_config: None, ..prompt(0.5) };
    assert!(weights_only.check_complete().is_err(), "a directory must have its configuration");
    refused(&PromptFiles { weights: None, ..prompt(0.5) }, FaultKind::Malformed, "no adapter_model.safetensors");
    refused(&PromptFiles::default(), FaultKind::Malformed, "no adapter_model.safetensors");
    for bad in ["{ not json", "[]", "", "null"] {
        let files = PromptFiles { adapter_config: Some(bad.into()), ..prompt(0.5) };
        refused(&files, FaultKind::Malformed, "not a JSON object");
    }
    refused(&with_config(json!({"peft_type": null})), FaultKind::Malformed, "no peft_type");
    refused(&with_config(json!({"num_virtual_tokens": -1})), FaultKind::Malformed, "num_virtual_tokens is -1");
    refused(&with_config(json!({"token_dim": "8"})), FaultKind::Malformed, "token_dim is");
}

#[test]
fn a_foreign_base_model_name_is_a_warning() {
    let version = check(&with_config(json!({"base_model_name_or_path": "org/other"}))).expect("accepted");
    assert!(
        version.warnings[0].contains("org/other") && version.warnings[0].contains("tiny"),
        "{:?}",
        version.warnings
    );
    let version = check(&with_task(json!({"base_model": {"name": "other"}}))).expect("accepted");
    assert_eq!(version.warnings.len(), 1);
}

#[test]
fn keys_from_a_newer_peft_are_ignored_with_a_warning() {
    let version = check(&with_config(json!({"from_the_future": {"a": [1]}}))).expect("accepted");
    assert!(version.warnings[0].contains("from_the_future"), "{:?}", version.warnings);
}

#[test]
fn rows_must_be_as_many_as_the_configuration_says() {
    let files = PromptFiles { adapter_config: Some(config(20, json!({}))), ..prompt(0.5) };
    refused(&files, FaultKind::Shape, "5 rows");
}

#[test]
fn a_prompt_needs_one_row_and_leaves_room_for_text_and_answer() {
    let of = |n| PromptFiles {
        adapter_config: Some(config(n, json!({}))),
        weights: Some(weights(n, 0.5)),
        ..PromptFiles::default()
    };
    refused(&of(0), FaultKind::Shape, "no rows");
    refused(&of(63), FaultKind::Shape, "63 virtual tokens");
    refused(&of(100_000), FaultKind::Shape, "100000 virtual tokens");
    assert!(check(&of(62)).is_ok());
}

#[test]
fn a_tensor_of_another_rank_is_refused() {
    refused(&with_weights(tensor(Dtype::F32, &[1, 5, 8], &[0; 160])), FaultKind::Shape, "3 dimensions");
    refused(&with_weights(tensor(Dtype::F32, &[40], &[0; 160])), FaultKind::Shape, "1 dimensions");
}

#[test]
fn only_prompt_embeddings_may_be_in_the_file() {
    let zeros = [0u8; 160];
    let misspelt = safetensors(&[("prompt_embedding", Dtype::F32, &[5, 8], &zeros)]);
    refused(&with_weights(misspelt), FaultKind::Malformed, "no tensor prompt_embeddings");
    for foreign in ["base_model.lm_head.weight", "base_model.score.weight"] {
        let two =
            safetensors(&[("prompt_embeddings", Dtype::F32, &[5, 8], &zeros), (foreign, Dtype::F32, &[5, 8], &zeros)]);
        refused(&with_weights(two), FaultKind::Malformed, foreign);
    }
}

#[test]
fn types_that_are_not_served_are_named() {
    for peft_type in ["LORA", "ADAPTION_PROMPT", "TRAINABLE_TOKENS", "new"] {
        let lora = safetensors(&[("base_model.q_proj.lora_A.weight", Dtype::F32, &[5, 8], &[0; 160])]);
        let files = PromptFiles { weights: Some(lora), ..with_config(json!({"peft_type": peft_type})) };
        let faults = check(&files).expect_err(peft_type);
        assert_eq!(faults.0.len(), 1, "only the type is worth reporting: {faults}");
        refused(&files, FaultKind::UnsupportedType, peft_type);
        refused(&files, FaultKind::UnsupportedType, "PROMPT_TUNING, P_TUNING, CPT, MULTITASK");
        let no_config = PromptFiles { adapter_config: None, ..files };
        refused(&no_config, FaultKind::UnsupportedType, "LORA");
    }
}

#[test]
fn prompts_for_other_kinds_of_model_are_refused_with_the_reason() {
    for (changes, words) in [
        (json!({"task_type": "SEQ_2_SEQ_LM"}), "serve it with the model it was tuned on"),
        (json!({"num_transformer_submodules": 2}), "decoder-only"),
        (json!({"task_type": "SEQ_CLS"}), "head"),
        (json!({"task_type": "FEATURE_EXTRACTION"}), "FEATURE_EXTRACTION"),
        (json!({"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}), "[\"classifier\",\"score\"]"),
        (json!({"modules_to_save": ["score"]}), "modules_to_save"),
    ] {
        refused(&with_config(changes), FaultKind::UnsupportedType, words);
    }
    assert!(check(&with_config(json!({"modules_to_save": []}))).is_ok());
}

#[test]
fn another_models_fingerprint_is_refused_and_this_models_is_not() {
    let task = |fingerprint| with_task(json!({"base_model": {"name": "x", "fingerprint": fingerprint}}));
    refused(&task("fedcba9876543210"), FaultKind::BaseModel, "fedcba9876543210");
    assert!(check(&task("0123456789abcdef")).expect("accepted").warnings.is_empty());
    // Who uploads it may allow it; the version is the same one.
    let allowed = PromptFiles { other_base: Some("".into()), ..task("fedcba9876543210") };
    let version = check(&allowed).expect("accepted");
    assert!(version.warnings.iter().any(|warning| warning.contains("fedcba9876543210")), "{:?}", version.warnings);
    assert_eq!(version.digest, task("fedcba9876543210").digest());
}

#[test]
fn task_json_makes_the_template_and_the_labels() {
    let task = json!({"template": "Q: {{ q }}\n", "labels": {"pos": ["good"], "neg": ["bad"]}, "task_id": 3});
    let version = check(&with_task(task)).expect("good");
    assert_eq!(version.template.fields(), ["q"]);
    assert_eq!(version.labels.as_ref().and_then(|l| l.label_of("GOOD ")), Some("pos"));
    assert!(version.warnings[0].contains("task_id"));
}

#[test]
fn a_fault_of_task_json_names_its_field() {
    for (task, field) in [
        (json!({"templat": "x"}), "templat"),
        (json!({"template": "{{ input"}), "template"),
        (json!({"template": "constant"}), "template"),
        (json!({"labels": {"a": ["x"], "b": ["x"]}}), "labels"),
        (json!({"defaults": {"temperature": -1}}), "defaults.temperature"),
        (json!({"defaults": {"max_tokens": 0}}), "defaults.max_tokens"),
        (json!({"limits": {"max_input_tokens": 0}}), "limits.max_input_tokens"),
        (json!({"metrics": {"accuracy": "high"}}), "metrics.accuracy"),
    ] {
        refused(&with_task(task), FaultKind::Task, field);
    }
}

#[test]
fn every_fault_is_listed_and_the_gravest_is_first() {
    let nan: Vec<u8> = [f32::NAN; 6].iter().flat_map(|v| v.to_le_bytes()).collect();
    let files = PromptFiles {
        adapter_config: Some(config(5, json!({"token_dim": 6}))),
        weights: Some(tensor(Dtype::F32, &[1, 6], &nan)),
        task: Some(json!({"template": "", "base_model": {"fingerprint": "x"}}).to_string().into()),
        ..PromptFiles::default()
    };
    let faults = check(&files).expect_err("all wrong");
    let kinds: Vec<_> = faults.0.iter().map(|f| f.kind).collect();
    use FaultKind::{BaseModel, NotFinite, Shape, Task};
    assert_eq!(kinds, [BaseModel, Shape, Shape, Shape, NotFinite, Task], "{faults}");
}

#[test]
fn what_the_tuner_writes_is_what_serve_reads() {
    let spec = TaskSpec { template: Some("{{ q }}:".into()), ..TaskSpec::default() };
    let LearnedPrompt::Embeddings(e) = check(&prompt(0.5)).expect("good").prompt.as_ref().clone() else {
        panic!("not embeddings")
    };
    let peft =
        PeftConfig { base_model_name: "tiny".into(), num_layers: 2, num_attention_heads: 2, ..Default::default() };
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let files = encode_prompt_tuning(&e.rows.to_dtype(dtype).expect("casts"), &peft, &spec).expect("encodes");
        assert!(files.check_complete().is_ok());
        let version = check(&files).expect("serve takes it");
        assert_eq!(rows(&version), vec![vec![0.5; HIDDEN]; 5]);
        assert_eq!(version.spec, spec);
        assert!(version.warnings.is_empty(), "{:?}", version.warnings);
    }
}

#[test]
fn files_that_could_not_be_read_again_are_refused() {
    let long = format!("{{{}}}", " ".repeat(crate::prompt::files::MAX_JSON_BYTES as usize));
    refused(&PromptFiles { task: Some(long.clone().into()), ..prompt(0.5) }, FaultKind::Malformed, "task.json has");
    let files = PromptFiles { adapter_config: Some(long.into()), ..prompt(0.5) };
    refused(&files, FaultKind::Malformed, "adapter_config.json has");
}

/// Bytes of a good file with some of them changed, cut or doubled.
fn mutated(good: Bytes) -> impl Strategy<Value = Bytes> {
    let n = good.len();
    let edits = proptest::collection::vec((0..n, any::<u8>()), 0..6);
    (edits, 0..=n, any::<bool>()).prop_map(move |(edits, cut, whole)| {
        let mut bytes = good.to_vec();
        for (at, byte) in edits {
            bytes[at] = byte;
        }
        if !whole {
            bytes.truncate(cut);
        }
        bytes.into()
    })
}

proptest! {
    #[test]
    fn mutated_files_never_panic_and_what_is_accepted_fits(
        adapter_config in proptest::option::weighted(0.8, mutated(config(5, json!({})))),
        weights in mutated(weights(5, 0.5)),
        task in proptest::option::of(mutated(json!({"template": "{{ q }}", "labels": {"a": ["x"]}}).to_string().into())),
        bf16 in any::<bool>(),
    ) {
        let fit = Fit { dtype: if bf16 { DType::BF16 } else { DType::F32 }, ..fit() };
        let files = PromptFiles { adapter_config, weights: Some(weights), task, ..PromptFiles::default() };
        match read("task".parse().expect("a name"), &files, &fit) {
            Ok(version) => {
                let rows = rows(&version);
                prop_assert!(rows.iter().all(|row| row.len() == HIDDEN && row.iter().all(|v| v.is_finite())));
                prop_assert!(!rows.is_empty());
            }
            Err(faults) => prop_assert!(!faults.0.is_empty()),
        }
    }

    #[test]
    fn any_f32_row_is_accepted_if_and_only_if_it_is_finite(bits in proptest::array::uniform8(any::<u32>())) {
        let data: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
        let files = PromptFiles { adapter_config: None, weights: Some(tensor(Dtype::F32, &[1, 8], &data)), ..PromptFiles::default() };
        prop_assert_eq!(check(&files).is_ok(), bits.iter().all(|b| f32::from_bits(*b).is_finite()));
    }
}
