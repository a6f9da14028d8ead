//! The keys of a `config.json` as one family means them.

use super::{
    ModelConfig, NormPlaces,
    families::{Bias, Family, Order},
    keys::{Keys, OneOrMany},
    rope,
};
use crate::kernels::Activation;

/// More layers than any model has.
pub(super) const MAX_LAYERS: usize = 4096;

/// Reads the keys as one family means them.
pub(super) struct Reader<'a> {
    pub(super) keys: Keys<'a>,
    pub(super) family: &'a Family,
}

impl Reader<'_> {
    /// All of the configuration.
    pub(super) fn read(&self) -> Result<ModelConfig, String> {
        let (keys, family) = (self.keys, self.family);
        let hidden_size = self.needed(&["d_model", "n_embed", "n_embd", "hidden_size"])?;
        let num_layers = match family.encoder {
            true => self.needed(&["num_decoder_layers", "num_layers"])?,
            false => self.needed(&["n_layer", "num_hidden_layers"])?,
        };
        if num_layers > MAX_LAYERS {
            return Err(format!("num_hidden_layers is {num_layers}, expected 1 to {MAX_LAYERS}"));
        }
        let num_heads = self.needed(&["num_heads", "n_head", "num_attention_heads"])?;
        let num_kv_heads = match family.grouped {
            true => self.size(&["num_key_value_heads"])?.unwrap_or(num_heads),
            false => num_heads,
        };
        if num_heads % num_kv_heads != 0 {
            return Err(format!(
                "num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            ));
        }
        let given = match family {
            Family { encoder: true, .. } => Some(self.needed(&["d_kv"])?),
            Family { grouped: true, .. } => self.size(&["head_dim"])?,
            _ => None,
        };
        let head_dim = match given {
            Some(d) => d,
            None if hidden_size % num_heads == 0 => hidden_size / num_heads,
            None => {
                return Err(format!("hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"));
            }
        };
        let intermediate_size = match family.name {
            "bloom" => 4 * hidden_size,
            "gpt2" => self.size(&["n_inner"])?.unwrap_or(4 * hidden_size),
            "opt" => self.needed(&["ffn_dim"])?,
            "t5" | "mt5" => self.needed(&["d_ff"])?,
            _ => self.needed(&["intermediate_size"])?,
        };
        let norm_eps = keys.get(family.norm_eps.0)?.unwrap_or(family.norm_eps.1);
        if !(norm_eps > 0.0 && norm_eps < 1.0) {
            return Err(format!("{} {norm_eps} is not a small positive number", family.norm_eps.0));
        }
        let context_length = self.needed(match family.name {
            "gpt2" => &["n_positions", "max_position_embeddings"],
            "bloom" => &["seq_length", "max_position_embeddings"],
            "t5" | "mt5" => &["n_positions"],
            _ => &["max_position_embeddings"],
        })?;
        let ropes = match family.order {
            Order::Rope(defaults) => rope::read(keys, family.name, defaults, head_dim, context_length)?,
            _ => rope::Ropes { ropes: Vec::new(), context_length },
        };
        let [attention_softcap, final_softcap] = self.softcaps()?;
        let mut config = ModelConfig {
            family: family.name.to_owned(),
            vocab_size: self.needed(&["vocab_size"])?,
            hidden_size,
            intermediate_size,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            context_length: ropes.context_length,
            norm: family.norm,
            norm_eps,
            attention_norms: family.attention_norms,
            mlp_norms: family.mlp_norms,
            final_norm: true,
            qk_norm: family.qk_norm,
            parallel_residual: family.name == "gpt_neox" && keys.flag("use_parallel_residual", true)?,
            activation: self.activation()?,
            layers: self.layers(num_layers, head_dim, ropes.ropes.len())?,
            ropes: ropes.ropes,
            learned_positions: match family.order {
                Order::Learned { offset } => Some(offset),
                _ => None,
            },
            alibi: matches!(family.order, Order::Alibi),
            relative_bias: None,
            causal: true,
            encoder: None,
            attention_softcap,
            final_softcap,
            embedding_scale: family.scaled_embeddings.then(|| (hidden_size as f64).sqrt()),
            output_scale: None,
            embedding_norm: family.embedding_norm,
            gated_mlp: true,
            qkv_bias: self.bias(family.qkv_bias)?,
            attention_output_bias: self.bias(family.output_bias)?,
            mlp_bias: self.bias(family.mlp_bias)?,
            tie_word_embeddings: keys.flag("tie_word_embeddings", family.tied)?,
            eos_token_ids: keys.get::<OneOrMany>("eos_token_id")?.unwrap_or_default().into_vec(),
        };
        if family.name == "opt" {
            self.opt(&mut config)?;
        }
        if family.encoder {
            self.encoder_decoder(&mut config)?;
        }
        Ok(config)
    }

    /// The first of `names` that has a value, or the family's default.
    pub(super) fn size(&self, names: &[&str]) -> Result<Option<usize>, String> {
        let default = || self.family.sizes.iter().find(|(key, _)| names.contains(key)).map(|(_, n)| *n);
        Ok(self.keys.size(names)?.or_else(default))
    }

    /// As [`size`](Self::size); none is an error, which tells the last of the names.
    pub(super) fn needed(&self, names: &[&str]) -> Result<usize, String> {
        self.size(names)?.ok_or_else(|| self.keys.missing(names.last().copied().unwrap_or_default()))
    }

    fn bias(&self, bias: Bias) -> Result<bool, String> {
        match bias {
            Bias::Always => Ok(true),
            Bias::Never => Ok(false),
            Bias::Key(key, default) => self.keys.flag(key, default),
        }
    }

    fn activation(&self) -> Result<Activation, String> {
        let (key, default) = self.family.activation;
        let name: String = self.keys.get(key)?.unwrap_or_else(|| default.to_owned());
        // T5's key says both in one.
        let name = match name.strip_prefix("gated-").filter(|_| self.family.encoder) {
            Some("gelu") => "gelu_new".to_owned(),
            Some(other) => other.to_owned(),
            None => name,
        };
        match name.as_str() {
            "silu" | "swish" => Ok(Activation::Silu),
            // The first Gemma's files say so and mean the other one.
            "gelu" if self.family.name == "gemma" => Ok(Activation::GeluTanh),
            "gelu" | "gelu_python" => Ok(Activation::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluTanh),
            "relu" => Ok(Activation::Relu),
            other => Err(format!(
                "{key} {other:?} is not supported; supported are silu, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, relu"
            )),
        }
    }

    /// Those of attention and of the logits.
    fn softcaps(&self) -> Result<[Option<f64>; 2], String> {
        let Some(defaults) = self.family.softcaps else { return Ok([None, None]) };
        let mut out = [None; 2];
        for ((key, default), out) in
            ["attn_logit_softcapping", "final_logit_softcapping"].iter().zip(defaults).zip(&mut out)
        {
            *out = if self.keys.has(key) { self.keys.positive(key)? } else { default };
        }
        Ok(out)
    }

    /// OPT's own options: where its norms are, and that embeddings are as wide as the rest.
    fn opt(&self, config: &mut ModelConfig) -> Result<(), String> {
        let width = self.size(&["word_embed_proj_dim"])?.unwrap_or(config.hidden_size);
        if width != config.hidden_size {
            return Err(format!(
                "word_embed_proj_dim {width} is not supported; expected hidden_size, which is {}",
                config.hidden_size
            ));
        }
        let before = self.keys.flag("do_layer_norm_before", true)?;
        let places = NormPlaces { before, after: false, sum: !before };
        (config.attention_norms, config.mlp_norms) = (places, places);
        config.final_norm = before && !self.keys.flag("_remove_final_layer_norm", false)?;
        Ok(())
    }
}
