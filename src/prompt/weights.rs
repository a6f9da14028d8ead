//! The tensors' file: exactly one matrix, `prompt_embeddings`, finite in the file and in the
//! model's dtype. Nothing is allocated for it before all checks have passed.

use std::fmt;

use candle_core::{DType, Tensor};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::format::{Fault, FaultKind, Fit};

/// The name of the one tensor that is read.
pub const TENSOR: &str = "prompt_embeddings";

/// The longest safetensors header: one tensor needs about a hundred bytes.
const MAX_HEADER_BYTES: u64 = 1024 * 1024;

/// Positions that must stay free behind a prompt: one of text, one new.
const MIN_FREE_POSITIONS: usize = 2;

/// Reads the virtual tokens' rows `[n, hidden]` in the model's dtype on its device.
pub(super) fn read_rows(bytes: &[u8], fit: &Fit) -> Result<Tensor, Vec<Fault>> {
    let file = open(bytes).map_err(|fault| vec![fault])?;
    let view = the_one_tensor(&file)?;
    let mut faults = shape_faults(view.shape(), fit);
    match Format::of(view.dtype()) {
        None => faults.push(fault(
            FaultKind::Malformed,
            format!(
                "{TENSOR} is stored as {:?}, expected F32, F16, BF16 or F64; integers and 8-bit floats are not \
                 embeddings without their scales, so save it as F32",
                view.dtype()
            ),
        )),
        Some(format) => faults.extend(value_faults(format, &view, fit.dtype)),
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    to_tensor(&view, fit).map_err(|e| vec![fault(FaultKind::Malformed, format!("cannot load {TENSOR}: {e}"))])
}

/// How many rows the file has, if it has rows at all.
pub(super) fn num_rows(bytes: &[u8]) -> Option<usize> {
    let file = open(bytes).ok()?;
    let view = file.tensor(TENSOR).ok()?;
    match view.shape() {
        [rows, _] => Some(*rows),
        _ => None,
    }
}

/// PEFT's name for what the tensors' names look like, where it is not a prompt that is served.
pub(super) fn foreign_type(bytes: &[u8]) -> Option<&'static str> {
    let file = open(bytes).ok()?;
    let names = file.names();
    [
        ("lora_", "LORA"),
        ("prefix_task_", "MULTITASK_PROMPT_TUNING"),
        ("adaption_", "ADAPTION_PROMPT"),
        ("trainable_tokens_", "TRAINABLE_TOKENS"),
    ]
    .into_iter()
    .find(|(mark, _)| names.iter().any(|name| name.contains(mark)))
    .map(|(_, peft_type)| peft_type)
}

fn fault(kind: FaultKind, detail: String) -> Fault {
    Fault { kind, detail }
}

fn open(bytes: &[u8]) -> Result<SafeTensors<'_>, Fault> {
    let damaged = |reason: String| {
        let detail = format!(
            "adapter_model.safetensors is not a whole safetensors file ({reason}); upload it again, or save it again \
             with PEFT's save_pretrained"
        );
        fault(FaultKind::Malformed, detail)
    };
    let Some(header) = bytes.first_chunk::<8>().map(|n| u64::from_le_bytes(*n)) else {
        return Err(damaged(format!("it has {} bytes, its header alone takes 8 or more", bytes.len())));
    };
    let rest = bytes.len() as u64 - 8;
    if header > rest {
        return Err(damaged(format!("its header claims {header} bytes and {rest} follow")));
    }
    if header > MAX_HEADER_BYTES {
        return Err(damaged(format!("its header has {header} bytes, the most is {MAX_HEADER_BYTES}")));
    }
    SafeTensors::deserialize(bytes).map_err(|e| damaged(e.to_string()))
}

fn the_one_tensor<'a>(file: &SafeTensors<'a>) -> Result<TensorView<'a>, Vec<Fault>> {
    let mut foreign: Vec<&str> = file.names().into_iter().filter(|name| *name != TENSOR).collect();
    foreign.sort_unstable();
    let mut faults = Vec::new();
    let view = file.tensor(TENSOR);
    if view.is_err() {
        faults.push(fault(FaultKind::Malformed, format!("there is no tensor {TENSOR} in adapter_model.safetensors")));
    }
    if !foreign.is_empty() {
        let detail = format!(
            "adapter_model.safetensors has the tensors {}; expected {TENSOR} alone: a prompt never replaces weights of \
             the model that all tasks share, and heads of modules_to_save are not served; remove them",
            Names(&foreign)
        );
        faults.push(fault(FaultKind::Malformed, detail));
    }
    match view {
        Ok(view) if faults.is_empty() => Ok(view),
        _ => Err(faults),
    }
}

/// The first names of a list that a file may have made long.
struct Names<'a>(&'a [&'a str]);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 6;
        for (i, name) in self.0.iter().take(SHOWN).enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{:?}", name.chars().take(80).collect::<String>())?;
        }
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

fn shape_faults(shape: &[usize], fit: &Fit) -> Vec<Fault> {
    let shape_fault = |detail| fault(FaultKind::Shape, detail);
    let &[rows, columns] = shape else {
        let shown = &shape[..shape.len().min(8)];
        let detail = format!(
            "{TENSOR} has {} dimensions {shown:?}, expected 2: [virtual tokens, {}]",
            shape.len(),
            fit.hidden_size
        );
        return vec![shape_fault(detail)];
    };
    let mut faults = Vec::new();
    if columns != fit.hidden_size {
        faults.push(shape_fault(format!(
            "{TENSOR} has {columns} columns, the model {} has a hidden size of {}; use a prompt tuned on this model",
            fit.model_name, fit.hidden_size
        )));
    }
    if rows == 0 {
        faults.push(shape_fault(format!("{TENSOR} has no rows, expected at least one virtual token")));
    }
    if rows.saturating_add(MIN_FREE_POSITIONS) > fit.context_length {
        faults.push(shape_fault(format!(
            "{TENSOR} has {rows} virtual tokens and the model's context has {} positions, of which a text and its \
             answer need at least {MIN_FREE_POSITIONS}; tune a shorter prompt",
            fit.context_length
        )));
    }
    faults
}

#[derive(Clone, Copy)]
enum Format {
    F16,
    Bf16,
    F32,
    F64,
}

impl Format {
    fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F16 => Some(Self::F16),
            Dtype::BF16 => Some(Self::Bf16),
            Dtype::F32 => Some(Self::F32),
            Dtype::F64 => Some(Self::F64),
            _ => None,
        }
    }
}

/// Calls `each` with every value, whatever its format. The casts go by way of f32, as PEFT's do.
fn for_each_value(format: Format, data: &[u8], mut each: impl FnMut(usize, f64)) {
    fn values<const N: usize>(data: &[u8]) -> impl Iterator<Item = [u8; N]> {
        data.chunks_exact(N).map(|chunk| {
            let mut bytes = [0; N];
            bytes.copy_from_slice(chunk);
            bytes
        })
    }
    match format {
        Format::F16 => values(data).enumerate().for_each(|(i, b)| each(i, f16::from_le_bytes(b).to_f64())),
        Format::Bf16 => values(data).enumerate().for_each(|(i, b)| each(i, bf16::from_le_bytes(b).to_f64())),
        Format::F32 => values(data).enumerate().for_each(|(i, b)| each(i, f64::from(f32::from_le_bytes(b)))),
        Format::F64 => values(data).enumerate().for_each(|(i, b)| each(i, f64::from_le_bytes(b))),
    }
}

fn survives_cast(value: f64, dtype: DType) -> bool {
    let value = value as f32;
    match dtype {
        DType::F16 => f16::from_f32(value).is_finite(),
        DType::BF16 => bf16::from_f32(value).is_finite(),
        _ => value.is_finite(),
    }
}

fn value_faults(format: Format, view: &TensorView<'_>, dtype: DType) -> Vec<Fault> {
    let columns = view.shape().last().copied().unwrap_or(1).max(1);
    let mut not_finite = Odd::default();
    let mut overflow = Odd::default();
    for_each_value(format, view.data(), |i, value| {
        if !value.is_finite() {
            not_finite.add(i, value);
        } else if !survives_cast(value, dtype) {
            overflow.add(i, value);
        }
    });
    let place = |i: usize| format!("row {}, column {}", i / columns, i % columns);
    let mut faults = Vec::new();
    if let Some((i, value)) = not_finite.first {
        let detail = format!(
            "{TENSOR} has {} values that are not finite, the first is {value} in {}; the tuning run diverged: tune \
             again with a lower learning rate",
            not_finite.count,
            place(i)
        );
        faults.push(fault(FaultKind::NotFinite, detail));
    }
    if let Some((i, value)) = overflow.first {
        let detail = format!(
            "{TENSOR} has {} values that overflow in the cast to the model's {}, the first is {value:e} in {}; serve \
             with a dtype of more range (bf16 or f32), or tune again with weight decay",
            overflow.count,
            dtype.as_str(),
            place(i)
        );
        faults.push(fault(FaultKind::NotFinite, detail));
    }
    faults
}

#[derive(Default)]
struct Odd {
    count: usize,
    first: Option<(usize, f64)>,
}

impl Odd {
    fn add(&mut self, i: usize, value: f64) {
        self.count += 1;
        self.first.get_or_insert((i, value));
    }
}

fn to_tensor(view: &TensorView<'_>, fit: &Fit) -> candle_core::Result<Tensor> {
    let dtype = DType::try_from(view.dtype())?;
    let cpu = candle_core::Device::Cpu;
    let stored = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &cpu)?;
    stored.to_dtype(DType::F32)?.to_dtype(fit.dtype)?.to_device(&fit.device)?.contiguous()
}
