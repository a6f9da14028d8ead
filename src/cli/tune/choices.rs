//! The options of `softserve tune` that are one of a few words.

use clap::ValueEnum;

/// What is learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TypeArg {
    Auto,
    Prompt,
    PTuning,
    Prefix,
}

/// The network of P-tuning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EncoderArg {
    Mlp,
    Lstm,
}

/// How the learning rate falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DecayArg {
    Linear,
    Cosine,
    Constant,
}
