//! The tensors' file: the tensors of its type and no others, in a float format, finite in the file and
//! in the dtype that they are cast to. Nothing is allocated for them before all checks have passed.

use std::fmt;

use candle_core::DType;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::format::{Fault, FaultKind};
use crate::content;

/// The tensor that every prompt has.
pub const TENSOR: &str = "prompt_embeddings";
/// A multitask prompt's `[tasks, n, ranks]`.
pub const TASK_COLS: &str = "prefix_task_cols";
/// A multitask prompt's `[tasks, ranks, hidden]`.
pub const TASK_ROWS: &str = "prefix_task_rows";

/// The longest safetensors header: one tensor needs about a hundred bytes.
const MAX_HEADER_BYTES: u64 = 1024 * 1024;

/// A file that has the tensors of its type and no others.
pub(super) struct Tensors<'a> {
    file: SafeTensors<'a>,
}

/// One of them.
pub(super) struct Stored<'a> {
    name: &'static str,
    view: TensorView<'a>,
}

impl<'a> Tensors<'a> {
    /// Opens a file that must have the tensors of these names, and only those.
    pub fn open(bytes: &'a [u8], names: &[&str]) -> Result<Self, Vec<Fault>> {
        let file = open(bytes).map_err(|fault| vec![fault])?;
        let mut faults: Vec<Fault> =
            names.iter().filter(|name| file.tensor(name).is_err()).map(|name| missing(name)).collect();
        let mut foreign: Vec<&str> = file.names().into_iter().filter(|name| !names.contains(name)).collect();
        foreign.sort_unstable();
        if !foreign.is_empty() {
            let expected = names.join(", ");
            let detail = format!(
                "adapter_model.safetensors has the tensors {}; expected {expected} alone: a prompt never replaces \
                 weights of the model that all tasks share, and heads of modules_to_save are not served; remove them",
                Names(&foreign)
            );
            faults.push(fault(FaultKind::Malformed, detail));
        }
        if faults.is_empty() { Ok(Self { file }) } else { Err(faults) }
    }

    /// The tensor of this name.
    pub fn get(&self, name: &'static str) -> Result<Stored<'a>, Vec<Fault>> {
        let view = self.file.tensor(name).map_err(|_| vec![missing(name)])?;
        Ok(Stored { name, view })
    }
}

impl Stored<'_> {
    pub fn shape(&self) -> &[usize] {
        self.view.shape()
    }

    /// What is wrong with the format or with values that are to be cast to `dtype`.
    pub fn value_faults(&self, dtype: DType) -> Vec<Fault> {
        match Format::of(self.view.dtype()) {
            Some(format) => value_faults(self.name, format, &self.view, dtype),
            None => vec![fault(
                FaultKind::Malformed,
                format!(
                    "{} is stored as {:?}, expected F32, F16, BF16 or F64; integers and 8-bit floats are no values \
                     without their scales, so save it as F32",
                    self.name,
                    self.view.dtype()
                ),
            )],
        }
    }

    /// All values; none of a format that [`value_faults`](Self::value_faults) refuses.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = Vec::with_capacity(self.shape().iter().product());
        if let Some(format) = Format::of(self.view.dtype()) {
            for_each_value(format, self.view.data(), |_, value| values.push(value as f32));
        }
        values
    }
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

/// PEFT's name for what the tensors' names look like, where it is not a prompt that can do without a
/// configuration.
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

fn missing(name: &str) -> Fault {
    fault(FaultKind::Malformed, format!("there is no tensor {name} in adapter_model.safetensors"))
}

fn open(bytes: &[u8]) -> Result<SafeTensors<'_>, Fault> {
    let damaged = |reason: String| {
        let detail = format!(
            "adapter_model.safetensors is not a complete safetensors file ({reason}); upload it again, or save it again \
             with PEFT's save_pretrained"
        );
        fault(FaultKind::Malformed, detail)
    };
    if let Some(reason) = content::stand_in(bytes) {
        return Err(fault(FaultKind::Malformed, format!("adapter_model.safetensors: {reason}")));
    }
    let Some(header) = bytes.first_chunk::<8>().map(|n| u64::from_le_bytes(*n)) else {
        return Err(damaged(format!("it has {} bytes, its header alone takes 8 or more", bytes.len())));
    };
    let rest = bytes.len() as u64 - 8;
    if header > rest {
        return Err(damaged(format!("its header claims {header} bytes and {rest} follow")));
    }
    if header > MAX_HEADER_BYTES {
        return Err(damaged(format!("its header has {header} bytes; the maximum is {MAX_HEADER_BYTES}")));
    }
    SafeTensors::deserialize(bytes).map_err(|e| damaged(e.to_string()))
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

/// Whether a value is a number in `dtype`.
pub(super) fn survives_cast(value: f64, dtype: DType) -> bool {
    let value = value as f32;
    match dtype {
        DType::F16 => f16::from_f32(value).is_finite(),
        DType::BF16 => bf16::from_f32(value).is_finite(),
        _ => value.is_finite(),
    }
}

fn value_faults(name: &str, format: Format, view: &TensorView<'_>, dtype: DType) -> Vec<Fault> {
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
            "{name} has {} values that are not finite, the first is {value} in {}; the tuning run diverged: tune \
             again with a lower learning rate",
            not_finite.count,
            place(i)
        );
        faults.push(fault(FaultKind::NotFinite, detail));
    }
    if let Some((i, value)) = overflow.first {
        let detail = format!(
            "{name} has {} values that overflow in the cast to the model's {}, the first is {value:e} in {}; serve \
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
