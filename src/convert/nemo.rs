//! NeMo's p-tuning archives: a tar, plain or gzipped, of `model_config.yaml` and a torch file
//! `model_weights.ckpt` whose prompt table has one matrix a task.

use std::io::Read;

use bytes::Bytes;

use super::{ConvertError, Foreign, Format, RawTensor, torch, zip::Zip};
use crate::prompt::files::{ADAPTER_CONFIG, MAX_JSON_BYTES};

const CONFIG: &str = "model_config.yaml";
const CHECKPOINT: &str = "model_weights.ckpt";

/// The most entries, and what their headers and padding may take.
const MAX_ENTRIES: usize = 256;
const MAX_OVERHEAD: u64 = MAX_ENTRIES as u64 * 4096;

/// Where a template puts the virtual tokens.
const MARK: &str = "<|VIRTUAL_PROMPT_";

/// Reads the prompt of each task, by the task's name. At most `limit` bytes are unpacked.
pub fn read(bytes: &[u8], limit: u64) -> Result<Foreign, ConvertError> {
    let unpacked = match bytes.starts_with(b"\x1f\x8b") {
        true => unpack(flate2::read::GzDecoder::new(bytes), limit)?,
        false => unpack(bytes, limit)?,
    };
    let templates = templates(&unpacked.config).map_err(damaged)?;
    let left = limit.saturating_sub(unpacked.checkpoint.len() as u64);
    let all = match unpacked.checkpoint.starts_with(torch::LEGACY_MAGIC) {
        true => torch::read_legacy(&unpacked.checkpoint, left)?,
        false => torch::read_zip(&mut Zip::open(&unpacked.checkpoint, left)?)?,
    };
    let tensors: Vec<RawTensor> = all.into_iter().filter_map(of_a_task).collect();
    if tensors.is_empty() {
        return Err(damaged(format!("its {CHECKPOINT} has no prompt_table.TASK.prompt_embeddings.weight")));
    }
    let mut foreign = Foreign::new(Format::Nemo, tensors);
    foreign.notes = templates
        .iter()
        .map(|template| format!("its template is {template:?}; say the words in it as \"template\" in task.json"))
        .collect();
    Ok(foreign)
}

fn damaged(reason: String) -> ConvertError {
    ConvertError::Damaged { format: Format::Nemo.name(), reason }
}

/// A task's rows under the task's name.
fn of_a_task(tensor: RawTensor) -> Option<RawTensor> {
    let name = tensor.name.strip_suffix(".prompt_embeddings.weight")?;
    let mut name = name;
    while let Some(rest) = name.strip_prefix("prompt_table.") {
        name = rest;
    }
    Some(RawTensor { name: name.to_owned(), ..tensor })
}

struct Unpacked {
    config: String,
    checkpoint: Bytes,
}

fn unpack(stream: impl Read, limit: u64) -> Result<Unpacked, ConvertError> {
    let fail = |e: std::io::Error| damaged(e.to_string());
    let mut archive = tar::Archive::new(stream.take(limit.saturating_add(MAX_OVERHEAD)));
    let (mut config, mut checkpoint) = (None, None);
    let mut names = Vec::new();
    for (i, entry) in archive.entries().map_err(fail)?.enumerate() {
        let entry = entry.map_err(fail)?;
        if i >= MAX_ENTRIES {
            return Err(damaged(format!("it has more than {MAX_ENTRIES} entries")));
        }
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let name = path.trim_start_matches("./");
        match name {
            CONFIG => config = Some(content(entry, CONFIG, MAX_JSON_BYTES.min(limit))?),
            CHECKPOINT => checkpoint = Some(content(entry, CHECKPOINT, limit)?),
            _ if name.ends_with(CHECKPOINT) => {
                let reason = format!("its weights are in parts ({name:.80}); merge them with NeMo's own scripts first");
                return Err(damaged(reason));
            }
            _ if torch::in_folder(name, ADAPTER_CONFIG) => {
                return Err(damaged("it is a packed PEFT directory; softserve push takes it, or unpack it".to_owned()));
            }
            _ if names.len() < 8 => names.push(name.chars().take(80).collect::<String>()),
            _ => {}
        }
    }
    match (config, checkpoint) {
        (Some(config), Some(checkpoint)) => {
            let config = String::from_utf8(config).map_err(|_| damaged(format!("its {CONFIG} is not text")))?;
            Ok(Unpacked { config, checkpoint: checkpoint.into() })
        }
        _ => Err(damaged(format!("it has {names:?}, expected {CONFIG} and {CHECKPOINT}"))),
    }
}

fn content(entry: impl Read, name: &str, limit: u64) -> Result<Vec<u8>, ConvertError> {
    let mut bytes = Vec::new();
    entry.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| damaged(format!("{name}: {e}")))?;
    match bytes.len() as u64 > limit {
        true => Err(ConvertError::TooLarge { what: format!("{name} of the {}", Format::Nemo.name()), limit }),
        false => Ok(bytes),
    }
}

/// The templates in the configuration, if each puts all virtual tokens in front, which is the only
/// place that PEFT has for them. Only lines of `prompt_template` are looked at; a mark anywhere else
/// is one that was not understood.
fn templates(yaml: &str) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    let mut marks = 0;
    for line in yaml.lines() {
        let line = line.trim().trim_start_matches("- ");
        let Some(value) = line.strip_prefix("prompt_template:") else { continue };
        let value = value.trim();
        let quoted = ['"', '\''].into_iter().find_map(|q| value.strip_prefix(q)?.strip_suffix(q));
        let template = quoted.unwrap_or(value);
        let shown: String = template.chars().take(120).collect();
        let in_front = template.starts_with(&format!("{MARK}0|>"));
        if template.matches(MARK).count() > 1 || template.contains(MARK) && !in_front {
            return Err(format!(
                "its template {shown:?} does not put all virtual tokens in front of the text, and PEFT has no other \
                 place for them; tune again with one {MARK}0|> at the beginning"
            ));
        }
        marks += template.matches(MARK).count();
        found.push(shown);
    }
    if yaml.matches(MARK).count() != marks {
        return Err(format!("its {CONFIG} has virtual tokens in a place that is not understood"));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_templates_with_all_virtual_tokens_in_front_are_taken() {
        let good = "task_templates:\n- taskname: a\n  prompt_template: '<|VIRTUAL_PROMPT_0|>{text} is {label}'\n";
        assert_eq!(templates(good), Ok(vec!["<|VIRTUAL_PROMPT_0|>{text} is {label}".to_owned()]));
        assert_eq!(templates("hidden_size: 8\n"), Ok(vec![]));
        for bad in [
            "prompt_template: \"{text}<|VIRTUAL_PROMPT_0|>\"",
            "prompt_template: <|VIRTUAL_PROMPT_0|>{text}<|VIRTUAL_PROMPT_1|>",
            "prompt_template: <|VIRTUAL_PROMPT_1|>{text}",
            "prompt_template: >\n  <|VIRTUAL_PROMPT_0|>{text}",
        ] {
            assert!(templates(bad).is_err(), "{bad}");
        }
    }
}
