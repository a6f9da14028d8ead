//! The keys of a `config.json` as one family means them.

use serde_json::Value;

use super::{
    ModelConfig, NormPlaces,
    keys::{Keys, OneOrMany},
    rope,
};
use crate::{
    kernels::Activation,
    model::family::{
        Family,
        config_spec::{ConfigSpec, Flag, NormOrder, Positions},
    },
};

/// More layers than any model has.
pub(super) const MAX_LAYERS: usize = 4096;

impl ModelConfig {
    /// Reads and checks `config.json`. The error says which key is wrong and what is supported.
    pub fn from_json(bytes: &[u8]) -> Result<Self, String> {
        let root: Value = serde_json::from_slice(bytes).map_err(|e| format!("it is not understood: {e}"))?;
        let Value::Object(root) = &root else { return Err("it is not understood: it is not an object".into()) };
        let root = Keys::new(root, "");
        if root.get::<Value>("quantization_config")?.is_some() {
            return Err(
                "quantization_config is set: quantised safetensors are not supported; use the full weights".into()
            );
        }
        let model_type: String = root.get("model_type")?.ok_or_else(|| root.missing("model_type"))?;
        let family = Family::of_model_type(&model_type)?;
        let keys = match family.multimodal_type {
            Some(name) if name == model_type => {
                root.object("text_config", "text_config ")?.ok_or_else(|| root.missing("text_config"))?
            }
            _ => root,
        };
        for (key, value) in family.config.refused {
            if keys.get(key)? == Some(*value) {
                return Err(format!("{key} {value} is not supported"));
            }
        }
        let mut config = Reader { keys, family }.read()?;
        if config.eos_token_ids.is_empty() {
            config.eos_token_ids = root.get::<OneOrMany>("eos_token_id")?.unwrap_or_default().into_vec();
        }
        Ok(config)
    }
}

/// The longest context that can be asked for.
const MAX_CONTEXT: usize = 1 << 20;

impl ModelConfig {
    /// The same model with another context length. Models whose positions have no bound are computed as far as they are
    /// asked to; transformers does not end them either.
    ///
    /// # Errors
    /// It has no such positions.
    pub fn with_context_length(mut self, positions: usize) -> Result<Self, String> {
        let most = self.most_positions.unwrap_or(MAX_CONTEXT);
        if !(1..=most).contains(&positions) {
            let reason = match self.most_positions {
                Some(_) => "its positions end there",
                None => "the most that is supported",
            };
            return Err(format!("the context length {positions} was asked for, expected 1 to {most}: {reason}"));
        }
        self.context_length = positions;
        Ok(self)
    }
}

/// Reads the keys as one family means them.
pub(super) struct Reader<'a> {
    pub(super) keys: Keys<'a>,
    pub(super) family: &'static Family,
}

impl Reader<'_> {
    /// All of the configuration.
    pub(super) fn read(&self) -> Result<ModelConfig, String> {
        let (keys, spec) = (self.keys, self.spec());
        let hidden_size = self.needed(&["d_model", "n_embed", "n_embd", "hidden_size"])?;
        let num_layers = match spec.encoder.is_some() {
            true => self.needed(&["num_decoder_layers", "num_layers"])?,
            false => self.needed(&["n_layer", "num_hidden_layers"])?,
        };
        if num_layers > MAX_LAYERS {
            return Err(format!("num_hidden_layers is {num_layers}, expected 1 to {MAX_LAYERS}"));
        }
        let num_heads = self.needed(&["num_heads", "n_head", "num_attention_heads"])?;
        let num_kv_heads = match spec.grouped {
            true => self.size(&["num_key_value_heads"])?.unwrap_or(num_heads),
            false => num_heads,
        };
        if num_heads % num_kv_heads != 0 {
            return Err(format!(
                "num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            ));
        }
        let given = match spec {
            ConfigSpec { encoder: Some(_), .. } => Some(self.needed(&["d_kv"])?),
            ConfigSpec { grouped: true, .. } => self.size(&["head_dim"])?,
            _ => None,
        };
        let head_dim = match given {
            Some(d) => d,
            None if hidden_size % num_heads == 0 => hidden_size / num_heads,
            None => {
                return Err(format!("hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"));
            }
        };
        let intermediate_size = match spec.intermediate_size.multiple {
            Some(multiple) => self.size(spec.intermediate_size.keys)?.unwrap_or(multiple * hidden_size),
            None => self.needed(spec.intermediate_size.keys)?,
        };
        let norm_eps = self.norm_eps()?;
        let context_length = self.needed(spec.context_length)?;
        let ropes = match spec.positions {
            Positions::Rope(rope) => rope::read(keys, self.family.model_type, rope, head_dim, context_length)?,
            _ => rope::Ropes {
                ropes: Vec::new(),
                context_length,
                is_bounded: matches!(spec.positions, Positions::Learned { .. }),
            },
        };
        let [attention_softcap, final_softcap] = self.softcaps()?;
        let mut config = ModelConfig {
            family: self.family,
            vocab_size: self.needed(&["vocab_size"])?,
            hidden_size,
            intermediate_size,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            context_length: ropes.context_length,
            most_positions: ropes.is_bounded.then_some(ropes.context_length),
            norm: spec.norm,
            norm_eps,
            attention_norms: spec.attention_norms,
            mlp_norms: spec.mlp_norms,
            final_norm: true,
            qk_norm: spec.qk_norm,
            parallel_residual: self.flag(spec.parallel_residual)?,
            activation: self.activation()?,
            layers: self.layers(num_layers, head_dim, ropes.ropes.len())?,
            ropes: ropes.ropes,
            learned_positions: match spec.positions {
                Positions::Learned { offset } => Some(offset),
                _ => None,
            },
            alibi: matches!(spec.positions, Positions::Alibi),
            relative_bias: None,
            causal: true,
            encoder: None,
            attention_softcap,
            final_softcap,
            embedding_scale: spec.scaled_embeddings.then(|| (hidden_size as f64).sqrt()),
            output_scale: None,
            embedding_norm: spec.embedding_norm,
            gated_mlp: true,
            qkv_bias: self.flag(spec.qkv_bias)?,
            attention_output_bias: self.flag(spec.output_bias)?,
            mlp_bias: self.flag(spec.mlp_bias)?,
            tie_word_embeddings: keys.flag("tie_word_embeddings", spec.tied)?,
            eos_token_ids: keys.get::<OneOrMany>("eos_token_id")?.unwrap_or_default().into_vec(),
        };
        self.embedding_width(hidden_size)?;
        self.move_norms(&mut config)?;
        if let Some(encoder) = spec.encoder {
            self.encoder_decoder(&mut config, encoder)?;
        }
        Ok(config)
    }

    /// What the family says of its config.
    pub(super) fn spec(&self) -> &'static ConfigSpec {
        &self.family.config
    }

    /// The first of `names` that has a value, or the family's default.
    pub(super) fn size(&self, names: &[&str]) -> Result<Option<usize>, String> {
        let default = || self.spec().sizes.iter().find(|(key, _)| names.contains(key)).map(|(_, n)| *n);
        Ok(self.keys.size(names)?.or_else(default))
    }

    /// As [`size`](Self::size); none is an error, which tells the last of the names.
    pub(super) fn needed(&self, names: &[&str]) -> Result<usize, String> {
        self.size(names)?.ok_or_else(|| self.keys.missing(names.last().copied().unwrap_or_default()))
    }

    fn flag(&self, flag: Flag) -> Result<bool, String> {
        match flag {
            Flag::Always => Ok(true),
            Flag::Never => Ok(false),
            Flag::Key(key, default) => self.keys.flag(key, default),
        }
    }

    fn norm_eps(&self) -> Result<f64, String> {
        let Some(key) = self.spec().norm_eps_key else { return Ok(self.spec().norm_eps) };
        let eps = self.keys.get(key)?.unwrap_or(self.spec().norm_eps);
        match eps > 0.0 && eps < 1.0 {
            true => Ok(eps),
            false => Err(format!("{key} {eps} is not a small positive number")),
        }
    }

    fn activation(&self) -> Result<Activation, String> {
        let (key, spec) = (self.spec().activation_key, self.spec());
        let name: Option<String> = key.map_or(Ok(None), |key| self.keys.get(key))?;
        let name = name.unwrap_or_else(|| spec.activation.to_owned());
        // T5's key says both in one.
        let name = match name.strip_prefix("gated-").filter(|_| spec.encoder.is_some()) {
            Some("gelu") => "gelu_new".to_owned(),
            Some(other) => other.to_owned(),
            None => name,
        };
        match name.as_str() {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu" if spec.gelu_is_tanh => Ok(Activation::GeluTanh),
            "gelu" | "gelu_python" => Ok(Activation::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluTanh),
            "relu" => Ok(Activation::Relu),
            other => Err(format!(
                "{} {other:?} is not supported; supported are silu, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, relu",
                key.unwrap_or("the activation")
            )),
        }
    }

    /// Those of attention and of the logits.
    fn softcaps(&self) -> Result<[Option<f64>; 2], String> {
        let Some(defaults) = self.spec().softcaps else { return Ok([None, None]) };
        let mut out = [None; 2];
        for ((key, default), out) in
            ["attn_logit_softcapping", "final_logit_softcapping"].iter().zip(defaults).zip(&mut out)
        {
            *out = if self.keys.has(key) { self.keys.positive(key)? } else { default };
        }
        Ok(out)
    }

    /// Embeddings of another width than the hidden size would need a projection.
    fn embedding_width(&self, hidden_size: usize) -> Result<(), String> {
        let Some(key) = self.spec().embedding_width else { return Ok(()) };
        match self.size(&[key])? {
            Some(width) if width != hidden_size => {
                Err(format!("{key} {width} is not supported; expected hidden_size, which is {hidden_size}"))
            }
            _ => Ok(()),
        }
    }

    fn move_norms(&self, config: &mut ModelConfig) -> Result<(), String> {
        let NormOrder::Keys { before, no_final } = self.spec().norm_order else { return Ok(()) };
        let before = self.keys.flag(before, true)?;
        if !before {
            (config.attention_norms, config.mlp_norms) = (NormPlaces::SUM, NormPlaces::SUM);
        }
        config.final_norm = before && !self.keys.flag(no_final, false)?;
        Ok(())
    }
}
