//! The files that PEFT itself would write for a prompt that was tuned here.

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor};
use serde_json::{Value, json};

use super::{PeftType, files::PromptFiles, spec::TaskSpec, weights::TENSOR};

/// The release whose files are written.
const PEFT_VERSION: &str = "0.21.2";

/// What PEFT writes of the model beside a prompt's values.
#[derive(Debug, Clone, Default)]
pub struct PeftConfig {
    /// `base_model_name_or_path`
    pub base_model_name: String,
    /// `tokenizer_name_or_path`; informative only.
    pub tokenizer_name: Option<String>,
    /// Layers of the decoder; of the encoder, if there is one.
    pub num_layers: usize,
    /// Whether the model has an encoder.
    pub has_encoder: bool,
    /// Heads of the queries; for prefix tuning those of the keys.
    pub num_attention_heads: usize,
}

/// The network that made the rows of a P-tuned prompt; informative only, since its output is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeftEncoder {
    /// `MLP` or `LSTM`.
    pub kind: &'static str,
    pub hidden_size: usize,
}

/// Prompt tuning: rows `[n, hidden]` in any float dtype.
/// `prompt_tuning_init` is RANDOM whatever the rows began as, so that PEFT loads them without a
/// tokenizer.
pub fn encode_prompt_tuning(rows: &Tensor, config: &PeftConfig, spec: &TaskSpec) -> Result<PromptFiles> {
    let own = [
        ("prompt_tuning_init", json!("RANDOM")),
        ("prompt_tuning_init_text", Value::Null),
        ("tokenizer_kwargs", Value::Null),
        ("tokenizer_name_or_path", json!(config.tokenizer_name)),
    ];
    encode(PeftType::PromptTuning, rows, rows.dim(1)?, own, config, spec)
}

/// P-tuning: the rows `[n, hidden]` that the encoder gives.
pub fn encode_p_tuning(
    rows: &Tensor,
    encoder: PeftEncoder,
    config: &PeftConfig,
    spec: &TaskSpec,
) -> Result<PromptFiles> {
    let own = [
        ("encoder_dropout", json!(0.0)),
        ("encoder_hidden_size", json!(encoder.hidden_size)),
        ("encoder_num_layers", json!(2)),
        ("encoder_reparameterization_type", json!(encoder.kind)),
    ];
    encode(PeftType::PTuning, rows, rows.dim(1)?, own, config, spec)
}

/// Prefix tuning: `[n, 2 * layers * kv_dim]`, in each row the key and the value of each layer, keys as
/// attention reads them. `token_dim` is the width of a layer's keys.
pub fn encode_prefix_tuning(values: &Tensor, config: &PeftConfig, spec: &TaskSpec) -> Result<PromptFiles> {
    let columns = values.dim(1)?;
    let parts = 2 * config.num_layers;
    if parts == 0 || !columns.is_multiple_of(parts) {
        candle_core::bail!("a prefix of {columns} columns does not divide into keys and values of {parts} parts");
    }
    let own =
        [("encoder_hidden_size", Value::Null), ("init_weights", Value::Null), ("prefix_projection", json!(false))];
    encode(PeftType::PrefixTuning, values, columns / parts, own, config, spec)
}

fn encode<const N: usize>(
    peft_type: PeftType,
    values: &Tensor,
    token_dim: usize,
    own: [(&'static str, Value); N],
    config: &PeftConfig,
    spec: &TaskSpec,
) -> Result<PromptFiles> {
    let (n, columns) = values.dims2()?;
    let values = values.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![n, columns], &data)
        .map_err(candle_core::Error::wrap)?;
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let weights = safetensors::serialize([(TENSOR, view)], Some(metadata)).map_err(candle_core::Error::wrap)?;

    let task_type = if config.has_encoder { "SEQ_2_SEQ_LM" } else { "CAUSAL_LM" };
    // Twice as many rows as are used would go with 2; keys and values are dealt out by it.
    let submodules = if config.has_encoder && peft_type.is_key_values() { 2 } else { 1 };
    // PEFT sorts the keys.
    let mut adapter_config: BTreeMap<&str, Value> = [
        ("auto_mapping", Value::Null),
        ("base_model_name_or_path", json!(config.base_model_name)),
        ("inference_mode", json!(true)),
        ("modules_to_save", Value::Null),
        ("num_attention_heads", json!(config.num_attention_heads)),
        ("num_layers", json!(config.num_layers)),
        ("num_transformer_submodules", json!(submodules)),
        ("num_virtual_tokens", json!(n)),
        ("peft_type", json!(peft_type.as_str())),
        ("peft_version", json!(PEFT_VERSION)),
        ("revision", Value::Null),
        ("task_type", json!(task_type)),
        ("token_dim", json!(token_dim)),
    ]
    .into();
    adapter_config.extend(own);
    let task = if *spec == TaskSpec::default() { None } else { Some(json_bytes(spec)?) };
    Ok(PromptFiles {
        adapter_config: Some(json_bytes(&adapter_config)?),
        weights: Some(weights.into()),
        task,
        ..PromptFiles::default()
    })
}

fn json_bytes(value: &impl serde::Serialize) -> Result<bytes::Bytes> {
    Ok(serde_json::to_vec_pretty(value).map_err(candle_core::Error::wrap)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(num_attention_heads: usize) -> PeftConfig {
        PeftConfig { base_model_name: "llama".into(), num_layers: 2, num_attention_heads, ..PeftConfig::default() }
    }

    fn zeros(n: usize, columns: usize) -> Tensor {
        Tensor::zeros((n, columns), DType::F32, &candle_core::Device::Cpu).expect("zeros")
    }

    fn written(files: &PromptFiles) -> String {
        String::from_utf8_lossy(files.adapter_config.as_deref().expect("a configuration")).into_owned()
    }

    #[test]
    fn the_written_configuration_has_the_keys_and_the_layout_of_pefts_own() {
        let files = encode_prompt_tuning(&zeros(5, 64), &config(4), &TaskSpec::default()).expect("encodes");
        let expected = r#"{
  "auto_mapping": null,
  "base_model_name_or_path": "llama",
  "inference_mode": true,
  "modules_to_save": null,
  "num_attention_heads": 4,
  "num_layers": 2,
  "num_transformer_submodules": 1,
  "num_virtual_tokens": 5,
  "peft_type": "PROMPT_TUNING",
  "peft_version": "0.21.2",
  "prompt_tuning_init": "RANDOM",
  "prompt_tuning_init_text": null,
  "revision": null,
  "task_type": "CAUSAL_LM",
  "token_dim": 64,
  "tokenizer_kwargs": null,
  "tokenizer_name_or_path": null
}"#;
        assert_eq!(written(&files), expected);
        assert!(files.task.is_none());
        let weights = files.weights.expect("weights");
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&weights).expect("reads");
        assert_eq!(metadata.metadata().as_ref().and_then(|m| m.get("format")).map(String::as_str), Some("pt"));
    }

    #[test]
    fn p_tuning_is_written_with_its_encoder_as_peft_writes_it() {
        let encoder = PeftEncoder { kind: "MLP", hidden_size: 32 };
        let files = encode_p_tuning(&zeros(8, 64), encoder, &config(4), &TaskSpec::default()).expect("encodes");
        let expected = r#"{
  "auto_mapping": null,
  "base_model_name_or_path": "llama",
  "encoder_dropout": 0.0,
  "encoder_hidden_size": 32,
  "encoder_num_layers": 2,
  "encoder_reparameterization_type": "MLP",
  "inference_mode": true,
  "modules_to_save": null,
  "num_attention_heads": 4,
  "num_layers": 2,
  "num_transformer_submodules": 1,
  "num_virtual_tokens": 8,
  "peft_type": "P_TUNING",
  "peft_version": "0.21.2",
  "revision": null,
  "task_type": "CAUSAL_LM",
  "token_dim": 64
}"#;
        assert_eq!(written(&files), expected);
    }

    #[test]
    fn for_an_encoder_decoder_rows_are_written_once_and_keys_and_values_as_peft_deals_them() {
        let config = PeftConfig { has_encoder: true, ..config(4) };
        let encoder = PeftEncoder { kind: "LSTM", hidden_size: 32 };
        let spec = TaskSpec::default();
        for (files, submodules) in [
            (encode_prompt_tuning(&zeros(5, 64), &config, &spec).expect("encodes"), 1),
            (encode_p_tuning(&zeros(5, 64), encoder, &config, &spec).expect("encodes"), 1),
            (encode_prefix_tuning(&zeros(5, 2 * 2 * 32), &config, &spec).expect("encodes"), 2),
        ] {
            let written = written(&files);
            assert!(written.contains("\"task_type\": \"SEQ_2_SEQ_LM\""), "{written}");
            assert!(written.contains(&format!("\"num_transformer_submodules\": {submodules},")), "{written}");
        }
    }

    #[test]
    fn prefix_tuning_is_written_with_the_numbers_of_the_keys() {
        let files = encode_prefix_tuning(&zeros(6, 2 * 2 * 32), &config(2), &TaskSpec::default()).expect("encodes");
        let expected = r#"{
  "auto_mapping": null,
  "base_model_name_or_path": "llama",
  "encoder_hidden_size": null,
  "inference_mode": true,
  "init_weights": null,
  "modules_to_save": null,
  "num_attention_heads": 2,
  "num_layers": 2,
  "num_transformer_submodules": 1,
  "num_virtual_tokens": 6,
  "peft_type": "PREFIX_TUNING",
  "peft_version": "0.21.2",
  "prefix_projection": false,
  "revision": null,
  "task_type": "CAUSAL_LM",
  "token_dim": 32
}"#;
        assert_eq!(written(&files), expected);
        assert!(encode_prefix_tuning(&zeros(6, 30), &config(2), &TaskSpec::default()).is_err());
    }
}
