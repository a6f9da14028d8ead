//! What one row of the table of families says.

use super::config_spec::ConfigSpec;
use crate::model::{
    gguf::{config::OwnConfig, names::GgufNames},
    names::Names,
};

/// A model family: models that differ in sizes and options only.
#[derive(Debug)]
pub struct Family {
    /// What people call its models.
    pub title: &'static str,
    /// Its `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The `model_type` of models of several parts whose text part, under `text_config`, is of this family.
    pub multimodal_type: Option<&'static str>,
    /// How its `config.json` is read.
    pub config: ConfigSpec,
    /// What its tensors are called; with an encoder, those of the decoder.
    pub names: Names,
    /// What the encoder's tensors are called, if there is an encoder.
    pub encoder_names: Option<Names>,
    /// Its GGUF files; none if they are not read, or go by another family's name.
    pub gguf: Option<GgufFamily>,
}

/// What GGUF files of a family look like.
#[derive(Debug)]
pub struct GgufFamily {
    /// `general.architecture`.
    pub architecture: &'static str,
    pub names: GgufNames,
    /// How its metadata become a `config.json`.
    pub config: OwnConfig,
}

/// A family is its row of the table.
impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.model_type == other.model_type
    }
}
