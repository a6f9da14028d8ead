//! What the tensors of each PEFT type mean: from a file's matrices to rows or to keys and values.
//!
//! The layouts are those of PEFT 0.21: `PeftModel.get_prompt` and
//! `tuners/multitask_prompt_tuning/model.py`.

use candle_core::{DType, Device, Tensor};

use super::{
    LearnedPrompt, PeftType,
    format::{Fault, FaultKind, Fit},
    learned::{Embeddings, KeyValues, LayerKeyValues},
    peft::UNADJUSTED,
    spec::TaskSpec,
    weights::{Stored, TASK_COLS, TASK_ROWS, TENSOR, Tensors, survives_cast},
};

/// Positions that must stay free behind a prompt: one of text, one new.
const MIN_FREE_POSITIONS: usize = 2;

/// What changes the meaning of the tensors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Meaning<'a> {
    pub peft_type: PeftType,
    /// The rows that are used, the first ones, if `adapter_config.json` says it.
    pub virtual_tokens: Option<usize>,
    /// The tasks and ranks that `adapter_config.json` says a multitask prompt has.
    pub tasks: Option<usize>,
    pub ranks: Option<usize>,
    /// `task.json`; `None` if it is wrong itself, so that nothing can be missed in it.
    pub task: Option<&'a TaskSpec>,
}

impl Meaning<'_> {
    /// How many of a file's rows are used.
    fn used(&self, rows: usize) -> usize {
        self.virtual_tokens.map_or(rows, |n| n.min(rows))
    }
}

/// Reads the tensors' file into what the model is given, on the host and in its dtype.
pub(super) fn read(bytes: &[u8], meaning: Meaning<'_>, fit: &Fit) -> Result<LearnedPrompt, Vec<Fault>> {
    let tensors = Tensors::open(bytes, meaning.peft_type.tensors())?;
    let prompt = tensors.get(TENSOR)?;
    match meaning.peft_type {
        PeftType::PrefixTuning | PeftType::Cartridge => key_values(&prompt, meaning, fit),
        PeftType::Multitask => {
            let factors = Factors { cols: tensors.get(TASK_COLS)?, rows: tensors.get(TASK_ROWS)? };
            embeddings(&prompt, Some(&factors), meaning, fit)
        }
        PeftType::PromptTuning | PeftType::PTuning | PeftType::Cpt => embeddings(&prompt, None, meaning, fit),
    }
}

fn fault(kind: FaultKind, detail: impl Into<String>) -> Fault {
    Fault { kind, detail: detail.into() }
}

fn not_loaded(error: candle_core::Error) -> Vec<Fault> {
    vec![fault(FaultKind::Malformed, format!("cannot load {TENSOR}: {error}"))]
}

/// Rows `[n, hidden]`.
fn embeddings(
    prompt: &Stored<'_>,
    factors: Option<&Factors<'_>>,
    meaning: Meaning<'_>,
    fit: &Fit,
) -> Result<LearnedPrompt, Vec<Fault>> {
    let mut faults = shape_faults(prompt.shape(), meaning, fit, fit.hidden_size, |columns| {
        let (name, hidden) = (&fit.model_name, fit.hidden_size);
        let advice = match columns == fit.key_values_columns() {
            true => {
                "it is as wide as the keys and values of prefix tuning on this model: upload it with its \
                 adapter_config.json"
            }
            false => "use a prompt tuned on this model",
        };
        format!("{TENSOR} has {columns} columns, the model {name} has a hidden size of {hidden}; {advice}")
    });
    let scale = scale(meaning, fit, &mut faults);
    let task = factors.map(|factors| factors.check(prompt.shape(), meaning, fit, &mut faults));
    let is_changed = task.is_some() || scale.is_some();
    // Of what is changed here, the outcome has to survive the cast.
    faults.extend(prompt.value_faults(if is_changed { DType::F32 } else { fit.dtype }));
    if !faults.is_empty() {
        return Err(faults);
    }
    let shape = (prompt.shape()[0], prompt.shape()[1]);
    let rows = || -> candle_core::Result<Tensor> {
        let mut rows = Tensor::from_vec(prompt.to_f32(), shape, &Device::Cpu)?;
        if let (Some(factors), Some(Some(task))) = (factors, task) {
            rows = rows.mul(&factors.product(task)?)?;
        }
        if let Some(scale) = scale {
            // Both rounded first, as transformers before 5.4 did.
            let scale = Tensor::new(scale as f32, &Device::Cpu)?.to_dtype(fit.dtype)?.to_dtype(DType::F32)?;
            rows = rows.to_dtype(fit.dtype)?.to_dtype(DType::F32)?.broadcast_mul(&scale)?;
        }
        rows.narrow(0, 0, meaning.used(shape.0))?.copy()
    };
    let rows = rows().map_err(not_loaded)?;
    if is_changed {
        check_outcome(&rows, fit.dtype)?;
    }
    let rows = rows.to_dtype(fit.dtype).map_err(not_loaded)?;
    Ok(LearnedPrompt::Embeddings(Embeddings { rows }))
}

/// `[n, 2 * layers * kv_dim]` seen as `[n, 2 * layers, kv_heads, head_dim]`: layer i has its keys in
/// row 2i and its values in row 2i + 1. Those of an encoder-decoder model are for the decoder's
/// self-attention, by [`Fit::key_values_layer`].
fn key_values(prompt: &Stored<'_>, meaning: Meaning<'_>, fit: &Fit) -> Result<LearnedPrompt, Vec<Fault>> {
    let &Fit { num_kv_heads, head_dim, .. } = fit;
    let num_layers = fit.key_values_layers();
    let mut faults = shape_faults(prompt.shape(), meaning, fit, fit.key_values_columns(), |columns| {
        let (name, expected) = (&fit.model_name, fit.key_values_columns());
        let advice = match columns == 2 * num_layers * fit.hidden_size {
            true => UNADJUSTED,
            false => "use a prompt tuned on this model",
        };
        format!(
            "{TENSOR} has {columns} columns, keys and values of the model {name} take {expected}, 2 for each of \
             {num_layers} layers of {num_kv_heads} heads of {head_dim}; {advice}"
        )
    });
    if meaning.task.is_some_and(|task| task.scale_by_sqrt_hidden) {
        let detail = "task.json: scale_by_sqrt_hidden is for prompts of embeddings, and these are keys and values; \
                      remove it";
        faults.push(fault(FaultKind::Task, detail));
    }
    if fit.num_layers > num_layers {
        let detail = format!(
            "keys and values are those of {num_layers} layers, and the decoder has {}: PEFT cannot apply them either; \
             use prompt tuning",
            fit.num_layers
        );
        faults.push(fault(FaultKind::Shape, detail));
    }
    faults.extend(prompt.value_faults(fit.dtype));
    if !faults.is_empty() {
        return Err(faults);
    }
    let shape = (prompt.shape()[0], 2 * num_layers, num_kv_heads, head_dim);
    let layers = || -> candle_core::Result<Vec<LayerKeyValues>> {
        let all = Tensor::from_vec(prompt.to_f32(), shape, &Device::Cpu)?.to_dtype(fit.dtype)?;
        let of = |row: usize| all.narrow(1, row, 1)?.squeeze(1)?.transpose(0, 1)?.contiguous();
        let layer = |i| Ok(LayerKeyValues { keys: of(2 * i)?, values: of(2 * i + 1)? });
        (0..fit.num_layers).map(|i| layer(fit.key_values_layer(i))).collect()
    };
    Ok(LearnedPrompt::KeyValues(KeyValues { layers: layers().map_err(not_loaded)? }))
}

/// What is wrong with a matrix that should be `[n, columns]`.
fn shape_faults(
    shape: &[usize],
    meaning: Meaning<'_>,
    fit: &Fit,
    columns: usize,
    other_columns: impl Fn(usize) -> String,
) -> Vec<Fault> {
    let &[rows, found] = shape else {
        let shown = &shape[..shape.len().min(8)];
        let detail =
            format!("{TENSOR} has {} dimensions {shown:?}, expected 2: [virtual tokens, {columns}]", shape.len());
        return vec![fault(FaultKind::Shape, detail)];
    };
    let mut details = Vec::new();
    if found != columns {
        details.push(other_columns(found));
    }
    if rows == 0 {
        details.push(format!("{TENSOR} has no rows, expected at least one virtual token"));
    }
    let rows = meaning.used(rows);
    if rows.saturating_add(MIN_FREE_POSITIONS) > fit.context_length {
        details.push(format!(
            "{TENSOR} has {rows} virtual tokens and the model's context has {} positions, of which a text and its \
             answer need at least {MIN_FREE_POSITIONS}; tune a shorter prompt",
            fit.context_length
        ));
    }
    details.into_iter().map(|detail| fault(FaultKind::Shape, detail)).collect()
}

/// What rows are multiplied by: the root of the hidden size where `task.json` asks for it.
fn scale(meaning: Meaning<'_>, fit: &Fit, faults: &mut Vec<Fault>) -> Option<f64> {
    if !meaning.task?.scale_by_sqrt_hidden {
        return None;
    }
    if fit.embedding_scale.is_none() {
        let detail = format!(
            "task.json: scale_by_sqrt_hidden is true, and the model {} does not scale its embeddings; remove it: it is \
             for prompts tuned on Gemma with transformers before 5.4",
            fit.model_name
        );
        faults.push(fault(FaultKind::Task, detail));
    }
    fit.embedding_scale
}

/// A multitask prompt's matrices of low rank: the rows of task t are multiplied, value by value, by
/// `cols[t] @ rows[t]`.
struct Factors<'a> {
    /// `[tasks, n, ranks]`
    cols: Stored<'a>,
    /// `[tasks, ranks, hidden]`
    rows: Stored<'a>,
}

impl Factors<'_> {
    /// Checks them beside a prompt of this shape. Returns the task that is asked for, if it is there.
    fn check(&self, prompt: &[usize], meaning: Meaning<'_>, fit: &Fit, faults: &mut Vec<Fault>) -> Option<usize> {
        faults.extend([&self.cols, &self.rows].into_iter().flat_map(|stored| stored.value_faults(DType::F32)));
        let (n, hidden) = (prompt.first().copied().unwrap_or(0), fit.hidden_size);
        let declared = |expected: Option<usize>, found: usize| expected.is_none_or(|expected| expected == found);
        let tasks = match (self.cols.shape(), self.rows.shape()) {
            (&[tasks, rows, ranks], &[tasks_too, ranks_too, columns])
                if (tasks, ranks) == (tasks_too, ranks_too)
                    && (rows, columns) == (n, hidden)
                    && declared(meaning.tasks, tasks)
                    && declared(meaning.ranks, ranks)
                    && tasks > 0 =>
            {
                tasks
            }
            (cols, rows) => {
                let number = |n: Option<usize>, name: &str| n.map_or_else(|| name.to_owned(), |n| n.to_string());
                let (tasks, ranks) = (number(meaning.tasks, "tasks"), number(meaning.ranks, "ranks"));
                let detail = format!(
                    "{TASK_COLS} has the shape {:?} and {TASK_ROWS} {:?}, expected [{tasks}, {n}, {ranks}] and \
                     [{tasks}, {ranks}, {hidden}]; use the files of one run on this model",
                    &cols[..cols.len().min(8)],
                    &rows[..rows.len().min(8)]
                );
                faults.push(fault(FaultKind::Shape, detail));
                return None;
            }
        };
        let expected = format!("a task_id of 0 to {}", tasks - 1);
        let detail = match meaning.task?.task_id {
            Some(task) if task < tasks => return Some(task),
            Some(task) => format!("task.json: task_id is {task} and the prompt has {tasks} tasks; expected {expected}"),
            None => format!(
                "the prompt is one of {tasks} tasks and no task_id says which is served; give a task.json with {expected}"
            ),
        };
        faults.push(fault(FaultKind::Task, detail));
        None
    }

    /// `cols[t] @ rows[t]`, `[n, hidden]`, in f32.
    fn product(&self, task: usize) -> candle_core::Result<Tensor> {
        let matrix = |stored: &Stored<'_>| Tensor::from_vec(stored.to_f32(), stored.shape(), &Device::Cpu)?.get(task);
        matrix(&self.cols)?.matmul(&matrix(&self.rows)?)
    }
}

/// Rows that were multiplied must still be numbers in the model's dtype.
fn check_outcome(rows: &Tensor, dtype: DType) -> Result<(), Vec<Fault>> {
    let values = rows.to_vec2::<f32>().map_err(not_loaded)?;
    let odd = |row: &[f32]| row.iter().position(|value| !survives_cast(f64::from(*value), dtype));
    let Some((row, column)) = values.iter().enumerate().find_map(|(i, row)| Some((i, odd(row)?))) else {
        return Ok(());
    };
    let detail = format!(
        "the prompt's rows are not finite in the model's {} once they are multiplied as their type and task.json ask \
         for, the first in row {row}, column {column}; serve with a dtype of more range, or tune with weight decay",
        dtype.as_str()
    );
    Err(vec![fault(FaultKind::NotFinite, detail)])
}

#[cfg(test)]
mod tests;
