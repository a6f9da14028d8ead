//! What `inspect` found, as JSON and as a page to read.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::Path,
};

use serde::Serialize;
use serde_json::Value;

use super::{subject::Subject, vocabulary::Vocabulary};
use crate::{
    convert::{
        peft,
        tensor::{Summary, norm},
    },
    prompt::{
        format,
        spec::{BaseModel, TaskSpec},
    },
    tokenizer::Tokenizer,
};

/// Everything; fields that do not apply are null or empty.
#[derive(Debug, Serialize)]
pub struct Report {
    path: String,
    format: String,
    /// What its files would be as a version.
    version: String,
    bytes: u64,
    peft_type: Option<String>,
    task_type: Option<String>,
    peft_version: Option<String>,
    /// `base_model_name_or_path` of the configuration.
    base_model: Option<String>,
    tensors: Vec<TensorReport>,
    num_virtual_tokens: Option<usize>,
    norms: Option<Summary>,
    virtual_tokens: Vec<Token>,
    /// Of prompts that are keys and values.
    layers: Vec<Layer>,
    task: Option<TaskReport>,
    notes: Vec<String>,
    /// What is wrong for every model.
    pub faults: Vec<String>,
    pub model: Option<ModelReport>,
}

#[derive(Debug, Serialize)]
struct TensorReport {
    name: String,
    dtype: String,
    shape: Vec<usize>,
}

#[derive(Debug, Serialize)]
struct Token {
    norm: f64,
    /// How many percent of the vocabulary have a smaller norm.
    percentile: Option<f64>,
    nearest: Vec<Near>,
}

#[derive(Debug, Serialize)]
struct Near {
    id: u32,
    text: String,
    similarity: f32,
}

impl Near {
    /// Its text, or its id where that is only a part of a character.
    fn shown(&self) -> String {
        if self.text.contains('\u{fffd}') { format!("#{}", self.id) } else { format!("{:?}", self.text) }
    }
}

/// Norms of one layer's keys and values over the virtual tokens.
#[derive(Debug, Serialize)]
struct Layer {
    keys: Option<Summary>,
    values: Option<Summary>,
}

#[derive(Debug, Serialize)]
struct TaskReport {
    description: Option<String>,
    template: Option<String>,
    labels: Vec<String>,
    task_id: Option<usize>,
    base_model: Option<BaseModel>,
    metrics: BTreeMap<String, f64>,
}

/// Whether a model would accept the prompt.
#[derive(Debug, Serialize)]
pub struct ModelReport {
    pub name: String,
    pub fingerprint: String,
    pub hidden_size: usize,
    pub takes: bool,
    pub faults: Vec<String>,
    pub warnings: Vec<String>,
    pub vocabulary: Option<VocabularyReport>,
}

/// Norms of the vocabulary's embeddings.
#[derive(Debug, Serialize)]
pub struct VocabularyReport {
    mean: f64,
    p5: f64,
    p50: f64,
    p95: f64,
}

impl Report {
    /// What can be said without a model.
    pub fn new(path: &Path, subject: &Subject) -> Self {
        let config = subject.config().unwrap_or_default();
        let text = |key: &str| config.get(key).and_then(Value::as_str).map(str::to_owned);
        let layers = layers(subject);
        let norms = subject.rows().map(|rows| rows.norms()).unwrap_or_default();
        let faults = subject.task_name().and_then(|task| {
            format::read(task, &subject.files, &peft::own_fit(&subject.files)).err().map(|faults| faults.0)
        });
        let num_virtual_tokens = subject.num_virtual_tokens();
        let mut notes = subject.notes.clone();
        if let Some((_, unused @ 1..)) = num_virtual_tokens {
            notes.push(format!(
                "the other {unused} rows are not used: PEFT stores them for the model's decoder and never reads them"
            ));
        }
        Self {
            path: path.display().to_string(),
            format: subject.format.clone(),
            version: subject.files.digest().id(),
            bytes: subject.files.content().map(|(_, bytes)| bytes.len() as u64).sum(),
            peft_type: text("peft_type"),
            task_type: text("task_type"),
            peft_version: text("peft_version").filter(|_| !subject.is_foreign),
            base_model: text("base_model_name_or_path"),
            tensors: subject
                .tensors
                .iter()
                .map(|t| TensorReport { name: t.name.clone(), dtype: format!("{:?}", t.dtype), shape: t.shape.clone() })
                .collect(),
            num_virtual_tokens: num_virtual_tokens.map(|(used, _)| used),
            norms: Summary::of(&norms),
            virtual_tokens: norms
                .into_iter()
                .map(|norm| Token { norm, percentile: None, nearest: Vec::new() })
                .collect(),
            layers,
            task: subject.files.task.as_ref().and_then(|json| TaskSpec::from_json(json).ok()).map(|spec| TaskReport {
                description: spec.description,
                template: spec.template,
                labels: spec.labels.into_keys().collect(),
                task_id: spec.task_id,
                base_model: spec.base_model,
                metrics: spec.metrics,
            }),
            notes,
            faults: faults.unwrap_or_default().into_iter().map(|fault| fault.detail).collect(),
            model: None,
        }
    }

    /// The names of the model that it was tuned on, as its files have them.
    pub fn base_models(&self) -> impl Iterator<Item = &str> {
        let of_task = self.task.as_ref().and_then(|task| task.base_model.as_ref()?.name.as_deref());
        self.base_model.as_deref().into_iter().chain(of_task)
    }

    /// Adds what the vocabulary says.
    pub fn compare(&mut self, vocabulary: &Vocabulary, tokenizer: &Tokenizer) {
        for (token, nearest) in self.virtual_tokens.iter_mut().zip(&vocabulary.nearest) {
            token.percentile = Some(vocabulary.percentile(token.norm));
            let near = |&(id, similarity): &(u32, f32)| Near { id, text: tokenizer.token_text(id), similarity };
            token.nearest = nearest.iter().map(near).collect();
        }
        if let (Some(model), Some(norms)) = (&mut self.model, Summary::of(&vocabulary.norms)) {
            let [p5, p50, p95] = [5.0, 50.0, 95.0].map(|percent| vocabulary.norm_at(percent));
            model.vocabulary = Some(VocabularyReport { mean: norms.mean, p5, p50, p95 });
        }
    }

    /// Writes the page.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}: {}", self.path, self.format)?;
        let mut line = |name: &str, value: String| writeln!(out, "  {name:<16}{value}");
        let or = |text: &Option<String>, none: &str| text.as_deref().map_or_else(|| none.to_owned(), plain);
        let task_type = self.task_type.as_deref().map_or_else(String::new, |t| format!(" for {}", plain(t)));
        let peft = self.peft_version.as_deref().map_or_else(String::new, |v| format!(", PEFT {}", plain(v)));
        line("type", format!("{}{task_type}{peft}", or(&self.peft_type, "not stated, assumed PROMPT_TUNING")))?;
        for tensor in &self.tensors {
            line("tensor", format!("{} {} {:?}", plain(&tensor.name), tensor.dtype, tensor.shape))?;
        }
        line("size", format!("{} bytes, version {}", self.bytes, self.version))?;
        if let Some(n) = self.num_virtual_tokens {
            line("virtual tokens", n.to_string())?;
        }
        line("base model", or(&self.base_model, "not stated"))?;
        if let Some(task) = &self.task {
            let of_task = task.base_model.clone().unwrap_or_default();
            if let Some(fingerprint) = of_task.fingerprint {
                line("", format!("{}, fingerprint {}", or(&of_task.name, "no name"), plain(&fingerprint)))?;
            }
            if let Some(description) = &task.description {
                line("description", plain(description))?;
            }
            if let Some(template) = &task.template {
                line("template", format!("{template:?}"))?;
            }
            if !task.labels.is_empty() {
                line("labels", task.labels.iter().map(|l| plain(l)).collect::<Vec<_>>().join(", "))?;
            }
            if let Some(id) = task.task_id {
                line("task id", id.to_string())?;
            }
            if !task.metrics.is_empty() {
                let metrics: Vec<_> =
                    task.metrics.iter().map(|(name, value)| format!("{} {value}", plain(name))).collect();
                line("measured", metrics.join(", "))?;
            }
        }
        if let Some(norms) = &self.norms {
            line("norms", format!("mean {:.3}, from {:.3} to {:.3}", norms.mean, norms.min, norms.max))?;
        }
        if let Some(vocabulary) = self.model.as_ref().and_then(|m| m.vocabulary.as_ref()) {
            let VocabularyReport { mean, p5, p50, p95 } = vocabulary;
            line("vocabulary's", format!("mean {mean:.3}; 5 % up to {p5:.3}, 50 % {p50:.3}, 95 % {p95:.3}"))?;
        }
        for note in &self.notes {
            line("note", note.clone())?;
        }
        self.write_tokens(out)?;
        self.write_layers(out)?;
        self.write_verdict(out)
    }

    fn write_tokens(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.virtual_tokens.is_empty() {
            return Ok(());
        }
        let compared = self.virtual_tokens.iter().any(|token| token.percentile.is_some());
        match compared {
            true => writeln!(out, "\n  token     norm  percentile  nearest tokens, by cosine similarity")?,
            false => writeln!(out, "\n  token     norm")?,
        }
        for (i, token) in self.virtual_tokens.iter().enumerate() {
            write!(out, "  {i:>5} {:>8.3}", token.norm)?;
            if let Some(percentile) = token.percentile {
                let near = token.nearest.iter().map(|near| format!("{} {:.2}", near.shown(), near.similarity));
                write!(out, "  {:>10}  {}", format!("{percentile:.0} %"), near.collect::<Vec<_>>().join("  "))?;
            }
            writeln!(out)?;
        }
        Ok(())
    }

    fn write_layers(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.layers.is_empty() {
            return Ok(());
        }
        writeln!(out, "\n  layer  norms of keys (from, to)        norms of values (from, to)")?;
        let shown = |summary: &Option<Summary>| match summary {
            Some(s) => format!("{:.3} ({:.3}, {:.3})", s.mean, s.min, s.max),
            None => String::new(),
        };
        for (i, layer) in self.layers.iter().enumerate() {
            writeln!(out, "  {i:>5}  {:<30}  {}", shown(&layer.keys), shown(&layer.values))?;
        }
        Ok(())
    }

    fn write_verdict(&self, out: &mut dyn Write) -> io::Result<()> {
        let (whose, faults, warnings) = match &self.model {
            Some(model) => (model.name.as_str(), &model.faults, &model.warnings[..]),
            None => ("any model", &self.faults, &[][..]),
        };
        writeln!(out)?;
        match (faults.is_empty(), &self.model) {
            (false, _) => writeln!(out, "{whose} would refuse it:")?,
            (true, Some(model)) => writeln!(out, "{whose} (fingerprint {}) would accept it", model.fingerprint)?,
            (true, None) => {
                writeln!(out, "the files are valid; with --model you see whether a model would accept them")?
            }
        }
        for fault in faults {
            writeln!(out, "  - {fault}")?;
        }
        for warning in warnings {
            writeln!(out, "  warning: {warning}")?;
        }
        Ok(())
    }
}

/// A text out of a file, on one line and without control characters.
fn plain(text: &str) -> String {
    text.chars().take(200).flat_map(|c| c.escape_debug()).collect()
}

fn layers(subject: &Subject) -> Vec<Layer> {
    let (Some(num_layers), Some(tensor)) = (subject.num_layers(), subject.main_tensor()) else { return Vec::new() };
    let Some((_, columns)) = tensor.matrix() else { return Vec::new() };
    let width = columns / (2 * num_layers);
    let values = tensor.values();
    let norms = |part: usize| {
        let norms: Vec<f64> =
            values.chunks(columns).filter_map(|row| row.get(part * width..(part + 1) * width)).map(norm).collect();
        Summary::of(&norms)
    };
    // PEFT doubles the rows for an encoder-decoder model, deals four to a layer and uses the first two.
    let step = if subject.is_for_encoder_decoder() { 4 } else { 2 };
    let of = |part: usize| norms(part % (2 * num_layers));
    (0..num_layers).map(|layer| Layer { keys: of(step * layer), values: of(step * layer + 1) }).collect()
}
