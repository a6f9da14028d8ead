//! Small prompts for tests, built in code.

use std::collections::BTreeMap;

use bytes::Bytes;
use candle_core::DType;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

use super::format::{Fit, PromptFiles};

/// The hidden size of [`fit`].
pub(crate) const HIDDEN: usize = 8;

/// A decoder of hidden size 8, two layers of two heads that share one of keys, and context 64.
pub(crate) fn fit() -> Fit {
    Fit {
        model_name: "tiny".into(),
        fingerprint: "0123456789abcdef".into(),
        hidden_size: HIDDEN,
        num_layers: 2,
        encoder_layers: None,
        num_kv_heads: 1,
        head_dim: 4,
        embedding_scale: None,
        context_length: 64,
        dtype: DType::F32,
    }
}

/// A safetensors file of named tensors.
pub(crate) fn safetensors(tensors: &[(&str, Dtype, &[usize], &[u8])]) -> Bytes {
    let views: BTreeMap<&str, TensorView<'_>> = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.to_vec(), data).expect("fits")))
        .collect();
    safetensors::serialize(views, None).expect("serialises").into()
}

/// `prompt_embeddings` of `n` rows in f32, every value `value`.
pub(crate) fn weights(n: usize, value: f32) -> Bytes {
    let data: Vec<u8> = std::iter::repeat_n(value.to_le_bytes(), n * HIDDEN).flatten().collect();
    safetensors(&[("prompt_embeddings", Dtype::F32, &[n, HIDDEN], &data)])
}

/// `adapter_config.json` of prompt tuning with `n` virtual tokens and some keys changed; a null
/// removes a key.
pub(crate) fn config(n: usize, changes: Value) -> Bytes {
    let mut config = json!({
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/Tiny",
        "num_virtual_tokens": n, "token_dim": HIDDEN, "num_transformer_submodules": 1, "num_layers": 2,
        "num_attention_heads": 2, "inference_mode": true, "modules_to_save": null,
    });
    let keys = config.as_object_mut().expect("an object");
    for (key, value) in changes.as_object().expect("an object") {
        match value {
            Value::Null => keys.remove(key),
            value => keys.insert(key.clone(), value.clone()),
        };
    }
    config.to_string().into()
}

/// A good prompt of five rows; another `value` is another version.
pub(crate) fn prompt(value: f32) -> PromptFiles {
    PromptFiles {
        adapter_config: Some(config(5, json!({}))),
        weights: Some(weights(5, value)),
        ..PromptFiles::default()
    }
}
