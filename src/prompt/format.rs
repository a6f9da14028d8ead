//! A prompt's files: PEFT's `adapter_config.json` and `adapter_model.safetensors`, and `task.json`.
//! Reads and validates them into a [`Version`], and lists every fault.

use std::sync::{Arc, OnceLock};

use candle_core::DType;

use super::{
    LearnedPrompt, PeftType, TaskName, Version,
    chat::ChatTemplate,
    labels::Verbalizer,
    layout::{self, Meaning},
    peft::{self, Declared},
    spec::TaskSpec,
    template::{DEFAULT_TEMPLATE, PromptTemplate},
    weights,
};
pub use super::{
    encode::{PeftConfig, encode_prompt_tuning},
    files::PromptFiles,
};
use crate::model::ModelInfo;

/// What a prompt must fit: the facts of the model it is put in front of.
#[derive(Debug, Clone)]
pub struct Fit {
    pub model_name: String,
    /// See `model::ModelInfo::fingerprint`.
    pub fingerprint: String,
    pub hidden_size: usize,
    /// Layers of the decoder.
    pub num_layers: usize,
    /// Layers of the encoder, if the model has one.
    pub encoder_layers: Option<usize>,
    /// Heads of keys and values.
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// What the model multiplies its token embeddings by, if it does: the root of the hidden size.
    pub embedding_scale: Option<f64>,
    /// The most positions of one sequence, virtual tokens included.
    pub context_length: usize,
    pub dtype: DType,
}

impl From<&ModelInfo> for Fit {
    fn from(info: &ModelInfo) -> Self {
        Self {
            model_name: info.name.clone(),
            fingerprint: info.fingerprint.clone(),
            hidden_size: info.hidden_size,
            num_layers: info.num_layers,
            encoder_layers: info.encoder.as_ref().map(|encoder| encoder.num_layers),
            num_kv_heads: info.num_kv_heads,
            head_dim: info.head_dim,
            embedding_scale: info.embedding_scale,
            context_length: info.context_length,
            dtype: info.dtype,
        }
    }
}

impl Fit {
    /// Keys of one position in one layer.
    pub fn kv_dim(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// The layers of keys and values that a file has: PEFT counts those of the encoder, if there is one.
    pub fn key_values_layers(&self) -> usize {
        self.encoder_layers.unwrap_or(self.num_layers)
    }

    /// Which of them a layer of the decoder reads. For an encoder-decoder model PEFT doubles a file's layers,
    /// deals two to each of the decoder's and uses the first; so layers may share one, and one may be of no
    /// use.
    pub fn key_values_layer(&self, layer: usize) -> usize {
        match self.encoder_layers {
            None => layer,
            Some(encoder_layers) => 2 * layer % encoder_layers.max(1),
        }
    }

    /// Keys and values of one position in all layers.
    pub fn key_values_columns(&self) -> usize {
        2 * self.key_values_layers() * self.kv_dim()
    }
}

/// Something that is wrong with a prompt's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub kind: FaultKind,
    /// What was found, what was expected and what to do.
    pub detail: String,
}

/// The sort of fault, the gravest first; the wire has a stable code for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    /// Not a prompt type that is served.
    UnsupportedType,
    /// A file is missing, damaged or not of its format.
    Malformed,
    /// Tuned on another model.
    BaseModel,
    /// Rank, rows, columns or length do not fit the model or the configuration.
    Shape,
    /// A value is NaN or infinite, also after the cast to the model's dtype.
    NotFinite,
    /// `task.json` has a wrong field or template.
    Task,
}

/// All faults of one version's files, the gravest first; never empty.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}", .0.iter().map(|f| f.detail.as_str()).collect::<Vec<_>>().join("; "))]
pub struct Faults(pub Vec<Fault>);

/// Checks the files of one version and makes it ready for the model. A prompt without
/// `adapter_config.json` is taken as prompt tuning.
pub fn read(task: TaskName, files: &PromptFiles, fit: &Fit) -> Result<Version, Faults> {
    let too_large = files.size_faults();
    if !too_large.is_empty() {
        return Err(Faults(too_large));
    }
    let spec = read_spec(files);
    let prompt = read_prompt(files, spec.as_ref().ok(), fit);
    match (prompt, spec.and_then(|spec| read_words(spec, fit, files.other_base.is_some()))) {
        (Ok((prompt, peft_type, mut warnings)), Ok(words)) => {
            words.check_places(&prompt).map_err(|reason| Faults(vec![task_fault(reason)]))?;
            warnings.extend(words.warnings);
            if words.spec.task_id.is_some() && peft_type != PeftType::Multitask {
                warnings.push("task.json has a task_id, which only multitask prompts use; ignored".to_owned());
            }
            Ok(Version {
                task,
                digest: files.digest(),
                peft_type,
                prompt: Arc::new(prompt),
                template: words.template,
                chat: words.chat,
                labels: words.labels,
                spec: words.spec,
                warnings,
                fixed_beginning: OnceLock::new(),
                label_tokens: OnceLock::new(),
            })
        }
        (prompt, words) => {
            let mut faults = prompt.err().unwrap_or_default();
            faults.extend(words.err().unwrap_or_default());
            faults.sort_by_key(|fault| fault.kind);
            Err(Faults(faults))
        }
    }
}

fn fault(kind: FaultKind, detail: impl Into<String>) -> Fault {
    Fault { kind, detail: detail.into() }
}

/// The learned prompt, its type, and what is odd about its files. `task` is `task.json`, if that can be
/// read.
fn read_prompt(
    files: &PromptFiles,
    task: Option<&TaskSpec>,
    fit: &Fit,
) -> Result<(LearnedPrompt, PeftType, Vec<String>), Vec<Fault>> {
    let declared = files.adapter_config.as_ref().map(|bytes| peft::check_config(bytes, fit)).unwrap_or_default();
    let mut faults = declared.faults;
    let Some(bytes) = &files.weights else {
        faults.push(fault(FaultKind::Malformed, "there is no adapter_model.safetensors, so no prompt to serve"));
        return Err(faults);
    };
    // The tensors of another type follow other rules: only the type is worth reporting.
    if faults.iter().any(|fault| fault.kind == FaultKind::UnsupportedType) {
        return Err(faults);
    }
    if let (None, Some(foreign)) = (&files.adapter_config, weights::foreign_type(bytes)) {
        let (kind, reason) = match PeftType::from_name(foreign) {
            Some(_) => (
                FaultKind::Malformed,
                "which needs its adapter_config.json and a task.json that says which task is served; upload all three"
                    .to_owned(),
            ),
            None => (
                FaultKind::UnsupportedType,
                format!("which is not supported; the supported types are {}", PeftType::names()),
            ),
        };
        return Err(vec![fault(kind, format!("the tensors are those of {foreign}, {reason}"))]);
    }
    if let (Some(found), Some(n)) = (weights::num_rows(bytes), declared.virtual_tokens)
        && !declared.submodules.iter().any(|submodules| found == n.saturating_mul(*submodules))
    {
        let expected: Vec<_> = declared.submodules.iter().map(|s| n.saturating_mul(*s).to_string()).collect();
        let detail = format!(
            "prompt_embeddings has {found} rows, expected {} for num_virtual_tokens {n} in adapter_config.json: use the \
             two files of one run",
            expected.join(" or ")
        );
        faults.push(fault(FaultKind::Shape, detail));
    }
    let peft_type = declared.peft_type.unwrap_or(PeftType::PromptTuning);
    let Declared { virtual_tokens, tasks, ranks, .. } = declared;
    let meaning = Meaning { peft_type, virtual_tokens, tasks, ranks, task };
    match layout::read(bytes, meaning, fit) {
        Ok(prompt) if faults.is_empty() => Ok((prompt, peft_type, declared.warnings)),
        Ok(_) => Err(faults),
        Err(found) => {
            faults.extend(found);
            Err(faults)
        }
    }
}

/// `task.json`, checked, with what it says ready for use.
struct Words {
    spec: TaskSpec,
    template: PromptTemplate,
    chat: Option<ChatTemplate>,
    labels: Option<Verbalizer>,
    warnings: Vec<String>,
}

impl Words {
    /// Checks that templates that place virtual tokens place all of this prompt's.
    fn check_places(&self, prompt: &LearnedPrompt) -> Result<(), String> {
        let template = self.template.places_virtual_tokens();
        if self.chat.as_ref().is_some_and(|chat| chat.places_virtual_tokens() != template) {
            return Err(
                "only one of template and chat_template calls soft(), which says where virtual tokens stand: call it \
                        in both or in neither"
                    .to_owned(),
            );
        }
        if !template {
            return Ok(());
        }
        if let LearnedPrompt::KeyValues(_) = prompt {
            return Err(
                "template: it calls soft(), which places rows of embeddings, and this prompt consists of keys and \
                        values, which come before all text: leave soft() out"
                    .to_owned(),
            );
        }
        // A template that does not take the sample says so to each request.
        let Some(sample) = self.template.sample() else { return Ok(()) };
        sample.places(prompt.num_virtual_tokens()).map_err(|error| format!("template: {error}"))?;
        Ok(())
    }
}

fn task_fault(reason: String) -> Fault {
    fault(FaultKind::Task, format!("task.json: {reason}"))
}

fn read_spec(files: &PromptFiles) -> Result<TaskSpec, Vec<Fault>> {
    match &files.task {
        None => Ok(TaskSpec::default()),
        Some(bytes) => TaskSpec::from_json(bytes).map_err(|reason| vec![task_fault(reason)]),
    }
}

fn read_words(spec: TaskSpec, fit: &Fit, other_base_allowed: bool) -> Result<Words, Vec<Fault>> {
    let mut faults: Vec<Fault> = spec.range_faults().into_iter().map(task_fault).collect();
    let mut warnings = Vec::new();
    let template = PromptTemplate::parse(spec.template.as_deref().unwrap_or(DEFAULT_TEMPLATE))
        .map_err(|e| faults.push(task_fault(format!("template: {e}"))));
    if let (Ok(template), Some(truncate)) = (&template, &spec.truncate)
        && !template.fields().contains(&truncate.field)
    {
        let fields = template.fields().join(", ");
        faults.push(task_fault(format!(
            "truncate.field: found {:?}, expected a field of the template: {fields}",
            truncate.field
        )));
    }
    let chat = match spec.chat_template.as_deref().map(ChatTemplate::parse).transpose() {
        Ok(chat) => chat,
        Err(error) => {
            faults.push(task_fault(format!("chat_template: {error}")));
            None
        }
    };
    let labels = match spec.labels.is_empty() {
        true => None,
        false => Verbalizer::new(&spec.labels).map_err(|e| faults.push(task_fault(format!("labels: {e}")))).ok(),
    };
    check_base_model(&spec, fit, other_base_allowed, &mut faults, &mut warnings);
    match template {
        Ok(template) if faults.is_empty() => Ok(Words { spec, template, chat, labels, warnings }),
        _ => Err(faults),
    }
}

fn check_base_model(
    spec: &TaskSpec,
    fit: &Fit,
    other_allowed: bool,
    faults: &mut Vec<Fault>,
    warnings: &mut Vec<String>,
) {
    let Some(base) = &spec.base_model else { return };
    let name = base.name.as_deref();
    match &base.fingerprint {
        Some(found) if !found.eq_ignore_ascii_case(&fit.fingerprint) => {
            let (served, expected) = (&fit.model_name, &fit.fingerprint);
            let whose: String = name.unwrap_or("another model").chars().take(80).collect();
            let found: String = found.chars().take(80).collect();
            let differs = format!(
                "task.json: base_model.fingerprint is {found:?} ({whose}), the model {served} has {expected:?}"
            );
            match other_allowed {
                true => warnings.push(format!("{differs}; the upload allowed that")),
                false => {
                    let detail = format!(
                        "{differs}; tune the prompt on this model, or serve it with the model it was tuned on, or upload it with \
                         ?allow_other_base=true if the two models differ in precision only"
                    );
                    faults.push(fault(FaultKind::BaseModel, detail));
                }
            }
        }
        Some(_) => {}
        None => {
            if let Some(name) = name.filter(|name| !peft::same_model(name, &fit.model_name)) {
                warnings.push(format!("task.json names the base model {name:?}, this server has {:?}", fit.model_name));
            }
        }
    }
}

#[cfg(test)]
mod tests;
