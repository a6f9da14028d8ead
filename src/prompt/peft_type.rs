//! PEFT's types of learned prompts: what each is called, which tensors it has and how it is applied.

use std::fmt;

use super::weights::{TASK_COLS, TASK_ROWS, TENSOR};

/// A type of prompt that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeftType {
    /// Lester et al. 2021.
    PromptTuning,
    /// Liu et al. 2021; the file has what the reparameterisation gave.
    PTuning,
    /// Context-aware prompt tuning, Tsabari et al. 2024.
    Cpt,
    /// Wang et al. 2023: a shared prompt, and a matrix of low rank for each task.
    Multitask,
    /// Li & Liang 2021.
    PrefixTuning,
    /// Eyuboglu et al. 2025.
    Cartridge,
}

impl PeftType {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::PromptTuning, Self::PTuning, Self::Cpt, Self::Multitask, Self::PrefixTuning, Self::Cartridge];

    /// As `adapter_config.json` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PromptTuning => "PROMPT_TUNING",
            Self::PTuning => "P_TUNING",
            Self::Cpt => "CPT",
            Self::Multitask => "MULTITASK_PROMPT_TUNING",
            Self::PrefixTuning => "PREFIX_TUNING",
            Self::Cartridge => "CARTRIDGE",
        }
    }

    /// The type of this name, if it is served.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|peft_type| peft_type.as_str() == name)
    }

    /// The names of all of them, for messages.
    pub fn names() -> String {
        Self::ALL.map(Self::as_str).join(", ")
    }

    /// Whether its tensor holds keys and values instead of embeddings.
    pub fn is_key_values(self) -> bool {
        matches!(self, Self::PrefixTuning | Self::Cartridge)
    }

    /// The tensors that its file has, and no others.
    pub fn tensors(self) -> &'static [&'static str] {
        match self {
            Self::Multitask => &[TENSOR, TASK_COLS, TASK_ROWS],
            _ => &[TENSOR],
        }
    }
}

impl fmt::Display for PeftType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
