//! The table of model families: one row for each, in a file of its own under `family/`, that says how its
//! `config.json` is read, what its tensors are called, and what a GGUF file of it looks like. A new family
//! is a new file and its two lines here.

mod bloom;
pub mod config_spec;
mod gemma;
mod gemma2;
mod gemma3;
mod gpt2;
mod gpt_neox;
mod llama;
mod mistral;
mod olmo2;
mod opt;
mod phi3;
mod qwen2;
mod qwen3;
mod row;
mod smollm3;
mod t5;

pub use row::{Family, GgufFamily};

/// Every supported family.
pub static FAMILIES: [Family; 16] = [
    llama::LLAMA,
    mistral::MISTRAL,
    qwen2::QWEN2,
    qwen3::QWEN3,
    gemma::GEMMA,
    gemma2::GEMMA2,
    gemma3::GEMMA3,
    phi3::PHI3,
    smollm3::SMOLLM3,
    olmo2::OLMO2,
    gpt2::GPT2,
    gpt_neox::GPT_NEOX,
    opt::OPT,
    bloom::BLOOM,
    t5::T5,
    t5::MT5,
];

impl Family {
    /// The family of a `model_type`, which may be that of a model with a text part. The error lists what is
    /// supported.
    pub fn of_model_type(model_type: &str) -> Result<&'static Self, String> {
        let is = |family: &&Self| family.model_type == model_type || family.multimodal_type == Some(model_type);
        FAMILIES.iter().find(is).ok_or_else(|| {
            let known = FAMILIES.iter().flat_map(|family| [Some(family.model_type), family.multimodal_type]);
            let known: Vec<_> = known.flatten().collect();
            format!("model_type {model_type:?} is not supported; supported are {}", known.join(", "))
        })
    }

    /// The family of a GGUF file's `general.architecture`, and what such files look like. The error lists
    /// what is supported.
    pub fn of_gguf(architecture: &str) -> Result<(&'static Self, &'static GgufFamily), String> {
        let mut all = FAMILIES.iter().filter_map(|family| family.gguf.as_ref().map(|gguf| (family, gguf)));
        all.clone().find(|(_, gguf)| gguf.architecture == architecture).ok_or_else(|| {
            let known: Vec<_> = all.by_ref().map(|(_, gguf)| gguf.architecture).collect();
            format!("the architecture {architecture:?} is not supported; supported are {}", known.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{
        config_spec::{NormKind, NormPlaces, Positions},
        *,
    };
    use crate::model::names::NormNames;

    #[test]
    fn no_two_families_share_a_name() {
        let model_types = FAMILIES.iter().flat_map(|f| [Some(f.model_type), f.multimodal_type]).flatten();
        let architectures = FAMILIES.iter().filter_map(|f| f.gguf.as_ref().map(|gguf| gguf.architecture));
        for mut names in [model_types.collect::<Vec<_>>(), architectures.collect()] {
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count, "{names:?}");
        }
    }

    #[test]
    fn what_is_not_in_the_table_is_an_error_that_lists_what_is() {
        let error = Family::of_model_type("mamba").unwrap_err();
        assert!(
            error.contains("\"mamba\"") && error.contains("llama, mistral") && error.contains("gemma3,"),
            "{error}"
        );
        let error = Family::of_gguf("mamba").unwrap_err();
        assert!(error.contains("\"mamba\"") && error.contains("llama, qwen2"), "{error}");
        assert_eq!(Family::of_model_type("gemma3").unwrap(), Family::of_model_type("gemma3_text").unwrap());
    }

    /// A tensor that the config asks for and that has no name would be left out without a word.
    #[test]
    fn whatever_a_familys_config_asks_for_has_a_name() {
        let holds = |places: NormPlaces, names: NormNames, family: &Family| {
            for (is, name) in [(places.before, names.before), (places.after, names.after), (places.sum, names.sum)] {
                assert!(!is || name.is_some(), "{} has {places:?} and {names:?}", family.model_type);
            }
        };
        for family in &FAMILIES {
            let (config, model_type) = (&family.config, family.model_type);
            for names in [Some(&family.names), family.encoder_names.as_ref()].into_iter().flatten() {
                for (attention, mlp) in config.norm_order.possible(config.attention_norms, config.mlp_norms) {
                    holds(attention, names.attention_norms, family);
                    holds(mlp, names.mlp_norms, family);
                }
                let relative = matches!(config.positions, Positions::RelativeBias);
                assert_eq!(relative, names.relative_bias.is_some(), "{model_type}");
                assert_eq!(config.qk_norm.is_some(), names.qk_norms.is_some(), "{model_type}");
            }
            let learned = matches!(config.positions, Positions::Learned { .. });
            assert_eq!(learned, family.names.positions.is_some(), "{model_type}");
            assert_eq!(config.embedding_norm, family.names.embedding_norm.is_some(), "{model_type}");
            assert_eq!(config.encoder.is_some(), family.encoder_names.is_some(), "{model_type}");
            assert_eq!(config.encoder.is_some(), family.names.cross.is_some(), "{model_type}");
            if let Some(gguf) = &family.gguf {
                assert_eq!(config.norm == NormKind::RmsPlusOne, gguf.names.plus_one, "{model_type}");
                assert_eq!(family.names.transposed, gguf.names.transposed, "{model_type}");
            }
        }
    }
}
