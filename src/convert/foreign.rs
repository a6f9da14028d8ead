//! What a foreign file holds: its format, its tensors, and what it says of itself.

use bytes::Bytes;

use super::tensor::RawTensor;

/// What a file turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Safetensors,
    Npy,
    Npz,
    Kobold,
    Torch,
    TorchLegacy,
    PeftPickle,
    Nemo,
    Mkultra,
    Pickle,
}

impl Format {
    /// The format's name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors file",
            Self::Npy => "NumPy array",
            Self::Npz => "NumPy npz archive",
            Self::Kobold => "KoboldAI soft prompt",
            Self::Torch => "torch file",
            Self::TorchLegacy => "torch file (the form before torch 1.6)",
            Self::PeftPickle => "PEFT directory with adapter_model.bin",
            Self::Nemo => "NeMo p-tuning archive",
            Self::Mkultra => "mkultra JSON file",
            Self::Pickle => "Python pickle",
        }
    }
}

/// What a foreign file holds.
#[derive(Debug, Clone)]
pub struct Foreign {
    pub format: Format,
    /// In the file's order.
    pub tensors: Vec<RawTensor>,
    /// What it says of itself, for `task.json`.
    pub description: Option<String>,
    /// `adapter_config.json` beside it, and `task.json`.
    pub adapter_config: Option<Bytes>,
    pub task: Option<Bytes>,
    /// The part of a model that the file is for, where its name says so.
    pub part: Option<ModelPart>,
    /// What a person should know of it.
    pub notes: Vec<String>,
}

/// The part of a model whose input a prompt of TGIS goes before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelPart {
    Encoder,
    /// Of a decoder-only model or, where an encoder's prompt lies beside it, of an encoder-decoder model.
    Decoder {
        has_encoder: bool,
    },
}

impl Foreign {
    pub(super) fn new(format: Format, tensors: Vec<RawTensor>) -> Self {
        Self { format, tensors, description: None, adapter_config: None, task: None, part: None, notes: Vec::new() }
    }
}
