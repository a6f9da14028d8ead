//! PEFT's `adapter_config.json`: what matters of it.

use serde_json::{Map, Value};

use super::{
    format::{Fault, FaultKind, Fit},
    peft_type::PeftType,
};
use crate::content;

/// Of a file with as many keys as queries on a model that has fewer.
pub(super) const UNADJUSTED: &str = "that is the hidden size, which PEFT before 0.12 wrote for models with \
     grouped-query attention: tune the prompt again with PEFT 0.12 or later";

/// Keys of every prompt's configuration, then of the served types. Of the latter only the numbers of
/// tasks and ranks matter once the rows are learned; a path among them is never opened.
#[rustfmt::skip]
const KNOWN_KEYS: [&str; 36] = [
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
    "modules_to_save",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
    "cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "cpt_prompt_init",
    "opt_weighted_loss_type", "opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon",
    "prefix_projection", "init_weights", "num_frozen_tokens",
    "num_tasks", "num_ranks", "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task",
];

/// What a configuration says.
#[derive(Debug, Default)]
pub(super) struct Declared {
    /// The type, if it is one that is served.
    pub peft_type: Option<PeftType>,
    /// Rows that are used.
    pub virtual_tokens: Option<usize>,
    /// The file has so many times as many rows; one of these.
    pub submodules: Vec<usize>,
    /// Tasks and ranks of a multitask prompt.
    pub tasks: Option<usize>,
    pub ranks: Option<usize>,
    pub warnings: Vec<String>,
    pub faults: Vec<Fault>,
}

/// Checks `adapter_config.json` against the model. A type that is not served is the only fault
/// reported then: the other keys mean other things there.
pub(super) fn check_config(bytes: &[u8], fit: &Fit) -> Declared {
    let config: Map<String, Value> = match serde_json::from_slice(bytes) {
        Ok(config) => config,
        Err(e) => {
            let detail = match content::stand_in(bytes) {
                Some(reason) => format!("adapter_config.json: {reason}"),
                None => format!(
                    "adapter_config.json is not a JSON object ({}); use the file that PEFT wrote",
                    content::json_fault(bytes, &e)
                ),
            };
            return Declared { faults: vec![fault(FaultKind::Malformed, detail)], ..Declared::default() };
        }
    };
    let mut keys = Keys { config: &config, faults: Vec::new() };
    let Some(peft_type) = check_type(&mut keys) else {
        return Declared { faults: keys.faults, ..Declared::default() };
    };
    check_purpose(&mut keys, fit);
    let submodules = check_submodules(&mut keys, peft_type, fit);
    let virtual_tokens = keys.count("num_virtual_tokens");
    match peft_type.is_key_values() {
        true => check_key_values(&mut keys, fit),
        false => check_embeddings(&mut keys, fit),
    }
    let mut of_multitask = |key| if peft_type == PeftType::Multitask { keys.count(key) } else { None };
    let (tasks, ranks) = (of_multitask("num_tasks"), of_multitask("num_ranks"));

    let mut warnings = Vec::new();
    if let Some(base) = keys.text("base_model_name_or_path").filter(|base| !same_model(base, &fit.model_name)) {
        let (base, served) = (short(base), &fit.model_name);
        warnings.push(format!("adapter_config.json names the base model {base:?}, this server has {served:?}"));
    }
    let unknown: Vec<String> = config.keys().filter(|k| !KNOWN_KEYS.contains(&k.as_str())).map(|k| short(k)).collect();
    if !unknown.is_empty() {
        let shown = unknown.iter().take(8).map(|k| format!("{k:?}")).collect::<Vec<_>>().join(", ");
        warnings.push(format!("adapter_config.json has {} unknown keys, ignored: {shown}", unknown.len()));
    }
    Declared { peft_type: Some(peft_type), virtual_tokens, submodules, tasks, ranks, warnings, faults: keys.faults }
}

/// Whether two model names mean one model: the last part of a path or hub id, in any letter case.
pub(super) fn same_model(a: &str, b: &str) -> bool {
    let last = |name: &str| name.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().unwrap_or("").to_lowercase();
    last(a) == last(b)
}

fn fault(kind: FaultKind, detail: String) -> Fault {
    Fault { kind, detail }
}

fn short(text: &str) -> String {
    text.chars().take(80).collect()
}

/// Reads typed values; a wrong one becomes a fault and reads as absent.
struct Keys<'a> {
    config: &'a Map<String, Value>,
    faults: Vec<Fault>,
}

impl<'a> Keys<'a> {
    fn fault(&mut self, kind: FaultKind, detail: String) {
        self.faults.push(fault(kind, format!("adapter_config.json: {detail}")));
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.config.get(key).filter(|value| !value.is_null())
    }

    fn text(&mut self, key: &str) -> Option<&'a str> {
        let value = self.get(key)?;
        if value.as_str().is_none() {
            self.fault(FaultKind::Malformed, format!("{key} is {}, expected a text", short(&value.to_string())));
        }
        value.as_str()
    }

    fn count(&mut self, key: &str) -> Option<usize> {
        let value = self.get(key)?;
        let count = value.as_u64().and_then(|n| usize::try_from(n).ok());
        if count.is_none() {
            let found = short(&value.to_string());
            self.fault(FaultKind::Malformed, format!("{key} is {found}, expected a whole number from 0"));
        }
        count
    }
}

fn check_type(keys: &mut Keys<'_>) -> Option<PeftType> {
    let served = PeftType::names();
    match keys.text("peft_type") {
        Some(found) => {
            let peft_type = PeftType::from_name(found);
            if peft_type.is_none() {
                let detail = format!(
                    "peft_type is {:?}, which is not supported; the supported types are {served}",
                    short(found)
                );
                keys.fault(FaultKind::UnsupportedType, detail);
            }
            peft_type
        }
        None => {
            if keys.faults.is_empty() {
                keys.fault(FaultKind::Malformed, format!("there is no peft_type, expected one of {served}"));
            }
            None
        }
    }
}

/// The numbers of a prompt of embeddings are those of the model's hidden states.
fn check_embeddings(keys: &mut Keys<'_>, fit: &Fit) {
    if let Some(found) = keys.count("token_dim").filter(|&n| n != fit.hidden_size) {
        let (name, hidden) = (&fit.model_name, fit.hidden_size);
        let detail = format!("token_dim is {found}, the model {name} has a hidden size of {hidden}");
        keys.fault(FaultKind::Shape, format!("{detail}; use a prompt tuned on this model"));
    }
}

/// The numbers of a prompt of keys and values are those of the model's keys.
fn check_key_values(keys: &mut Keys<'_>, fit: &Fit) {
    for (key, expected, what) in [
        ("num_layers", fit.key_values_layers(), "layers"),
        ("num_attention_heads", fit.num_kv_heads, "heads of keys and values"),
        ("token_dim", fit.kv_dim(), "dimensions of keys in a layer"),
    ] {
        if let Some(found) = keys.count(key).filter(|&n| n != expected) {
            let name = &fit.model_name;
            let detail = format!("{key} is {found}, the model {name} has {expected} {what}");
            // PEFT before 0.12 took the numbers of the queries.
            let advice = match key == "token_dim" && found == fit.hidden_size {
                true => UNADJUSTED,
                false => "use a prompt tuned on this model",
            };
            keys.fault(FaultKind::Shape, format!("{detail}; {advice}"));
        }
    }
}

fn check_purpose(keys: &mut Keys<'_>, fit: &Fit) {
    let expected = if fit.encoder_layers.is_some() { "SEQ_2_SEQ_LM" } else { "CAUSAL_LM" };
    match keys.text("task_type") {
        None => {}
        Some(found) if found == expected => {}
        Some(found) => {
            let reason = match found {
                "CAUSAL_LM" => {
                    "is for a decoder-only model and this one has an encoder: serve it with the model it was tuned on, \
                     or tune it on this one"
                }
                "SEQ_2_SEQ_LM" => {
                    "is for an encoder-decoder model and this one is decoder-only: serve it with the model it was \
                     tuned on, or tune it on this one"
                }
                "SEQ_CLS" | "TOKEN_CLS" | "QUESTION_ANS" => {
                    "needs a head of its own, which is not served: tune a prompt whose labels are words"
                }
                _ => "does not make text",
            };
            let detail = format!("task_type is {:?}, which {reason}; expected {expected} or null", short(found));
            keys.fault(FaultKind::UnsupportedType, detail);
        }
    }
    let modules = keys.get("modules_to_save").filter(|m| m.as_array().is_none_or(|list| !list.is_empty()));
    if let Some(modules) = modules {
        let found = short(&modules.to_string());
        let detail = format!(
            "modules_to_save is {found}; weights of the model's own are not replaced for a task, so train without \
             modules_to_save"
        );
        keys.fault(FaultKind::UnsupportedType, detail);
    }
}

/// How many times as many rows as virtual tokens a file may have. An encoder-decoder model's has rows for
/// both, of which PEFT uses the encoder's.
fn check_submodules(keys: &mut Keys<'_>, peft_type: PeftType, fit: &Fit) -> Vec<usize> {
    if fit.encoder_layers.is_some() {
        let found = keys.count("num_transformer_submodules");
        return match (found, peft_type.is_key_values()) {
            (None | Some(2), true) => vec![1],
            (None, false) => vec![1, 2],
            (Some(found @ (1 | 2)), false) => vec![found],
            (Some(found), is_key_values) => {
                let expected = if is_key_values { "2" } else { "1 or 2" };
                let detail = format!(
                    "num_transformer_submodules is {found}; a prompt of this type for an encoder-decoder model has \
                     {expected}: tune it with task_type SEQ_2_SEQ_LM"
                );
                keys.fault(FaultKind::UnsupportedType, detail);
                vec![1, 2]
            }
        };
    }
    if let Some(found) = keys.count("num_transformer_submodules").filter(|&n| n != 1) {
        let whose = if found == 2 { ", as for an encoder-decoder model" } else { "" };
        let detail = format!("num_transformer_submodules is {found}{whose}; this model is decoder-only and takes 1");
        keys.fault(FaultKind::UnsupportedType, detail);
    }
    vec![1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_known_by_the_last_part_of_its_name() {
        for (a, b) in [("org/Model", "model"), ("/data/model/", "Model"), ("model", "model")] {
            assert!(same_model(a, b), "{a} {b}");
        }
        assert!(!same_model("org/model-2", "org/model"));
    }
}
