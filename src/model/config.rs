//! A decoder described by data: the parts of a Hugging Face `config.json` that change what is
//! computed, in the form of transformers v4 and of v5. An option that is not supported is an
//! error that names it, never an approximation.

mod encoder_decoder;
mod families;
mod keys;
mod rope;
#[cfg(test)]
mod tests;

use serde_json::Value;

use crate::kernels::Activation;
pub use encoder_decoder::{EncoderConfig, RelativeBias};
use families::{Bias, FAMILIES, Family, Order, Windows};
use keys::Keys;
pub use keys::OneOrMany;
pub use rope::{Rope, RopeScaling};

/// The shape of a transformer: a decoder, and perhaps an encoder before it.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `model_type`, such as `llama`.
    pub family: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    /// Heads of keys and values; fewer than `num_heads` is grouped-query attention.
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// The most positions of one sequence.
    pub context_length: usize,
    pub norm: NormKind,
    pub norm_eps: f64,
    pub attention_norms: NormPlaces,
    pub mlp_norms: NormPlaces,
    /// Whether a norm follows the last layer.
    pub final_norm: bool,
    /// Norms of queries and keys before they are rotated.
    pub qk_norm: Option<QkNorm>,
    /// Attention and MLP read the same input, and both are added to it.
    pub parallel_residual: bool,
    pub activation: Activation,
    /// The rotary embeddings that layers choose from.
    pub ropes: Vec<Rope>,
    /// The first row of the table of learned positions that is used; none without such a table.
    pub learned_positions: Option<usize>,
    /// Scores fall with the distance, by the slopes of ALiBi.
    pub alibi: bool,
    /// Scores get a bias for the distance, by a table that the first layer has for all.
    pub relative_bias: Option<RelativeBias>,
    /// Whether a position sees only those before it, as in every decoder.
    pub causal: bool,
    /// The encoder whose output the decoder's layers attend to.
    pub encoder: Option<EncoderConfig>,
    /// What is particular to each layer, `[num_layers]`.
    pub layers: Vec<LayerConfig>,
    /// What caps the scores of attention.
    pub attention_softcap: Option<f64>,
    /// What caps the logits.
    pub final_softcap: Option<f64>,
    /// What token embeddings are multiplied with; rows that are given instead of tokens are not.
    pub embedding_scale: Option<f64>,
    /// What the last hidden states are multiplied with before they meet the output matrix.
    pub output_scale: Option<f64>,
    /// Whether a norm follows the embeddings.
    pub embedding_norm: bool,
    /// Whether the MLP is gated, in a family that has both kinds.
    pub gated_mlp: bool,
    /// Biases of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub attention_output_bias: bool,
    pub mlp_bias: bool,
    /// The output matrix is the embedding table; with an encoder only if the file has no other.
    pub tie_word_embeddings: bool,
    pub eos_token_ids: Vec<u32>,
}

/// One layer's attention.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerConfig {
    /// Positions that one sees, itself among them; all before it if there is none.
    pub window: Option<usize>,
    /// Which of [`ModelConfig::ropes`] it has, if any.
    pub rope: Option<usize>,
    /// What scores are multiplied with.
    pub scale: f64,
}

/// What a norm computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square, by a weight.
    Rms,
    /// Root mean square, by one plus a weight (Gemma).
    RmsPlusOne,
    /// Mean and variance, by a weight and a bias.
    Layer,
}

/// Where the norms of a branch are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NormPlaces {
    /// On what goes into the branch.
    pub before: bool,
    /// On what comes out of it, before it is added.
    pub after: bool,
    /// On the sum.
    pub sum: bool,
}

/// What one norm of queries or keys spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// A head.
    Head,
    /// All heads together.
    Projection,
}

/// More layers than any model has.
const MAX_LAYERS: usize = 4096;

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
        let mut model_type: String = root.get("model_type")?.ok_or_else(|| root.missing("model_type"))?;
        let mut keys = root;
        if model_type == "gemma3" {
            // The text part of a model that reads images too.
            keys = root.object("text_config", "text_config ")?.ok_or_else(|| root.missing("text_config"))?;
            model_type = "gemma3_text".to_owned();
        }
        let family = FAMILIES.iter().find(|f| f.name == model_type).ok_or_else(|| {
            let known: Vec<_> = FAMILIES.iter().map(|f| f.name).collect();
            format!("model_type {model_type:?} is not supported; supported are {}", known.join(", "))
        })?;
        for (key, value) in family.refused {
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

/// Reads the keys as one family means them.
struct Reader<'a> {
    keys: Keys<'a>,
    family: &'a Family,
}

impl Reader<'_> {
    fn read(&self) -> Result<ModelConfig, String> {
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
    fn size(&self, names: &[&str]) -> Result<Option<usize>, String> {
        let default = || self.family.sizes.iter().find(|(key, _)| names.contains(key)).map(|(_, n)| *n);
        Ok(self.keys.size(names)?.or_else(default))
    }

    /// As [`size`](Self::size); none is an error, which tells the last of the names.
    fn needed(&self, names: &[&str]) -> Result<usize, String> {
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

    fn layers(&self, num_layers: usize, head_dim: usize, ropes: usize) -> Result<Vec<LayerConfig>, String> {
        let keys = self.keys;
        let mut scale = (head_dim as f64).powf(-0.5);
        if self.family.query_scalar {
            scale = keys.positive("query_pre_attn_scalar")?.unwrap_or(256.0).powf(-0.5);
        }
        let gpt2 = self.family.name == "gpt2";
        if gpt2 && !keys.flag("scale_attn_weights", true)? {
            scale = 1.0;
        }
        if self.family.encoder {
            // Its weights are drawn so that no scale is needed.
            scale = 1.0;
        }
        let by_depth = gpt2 && keys.flag("scale_attn_by_inverse_layer_idx", false)?;
        let rotated = self.rotated(num_layers)?;
        let windows = self.windows(num_layers, &rotated)?;
        let layer = |i: usize| LayerConfig {
            window: windows[i],
            rope: (ropes > 0 && rotated[i]).then_some(if windows[i].is_some() && ropes > 1 { 1 } else { 0 }),
            scale: if by_depth { scale / (i + 1) as f64 } else { scale },
        };
        Ok((0..num_layers).map(layer).collect())
    }

    /// Which layers rotate their queries and keys, if any do.
    fn rotated(&self, num_layers: usize) -> Result<Vec<bool>, String> {
        if self.family.name != "smollm3" {
            return Ok(vec![true; num_layers]);
        }
        match self.keys.get::<Vec<u8>>("no_rope_layers")? {
            Some(layers) if layers.len() >= num_layers => Ok(layers.iter().map(|rope| *rope != 0).collect()),
            Some(layers) => Err(format!("no_rope_layers has {} entries, expected {num_layers}", layers.len())),
            None => {
                let interval = self.size(&["no_rope_layer_interval"])?.unwrap_or(4);
                Ok((1..=num_layers).map(|i| i % interval != 0).collect())
            }
        }
    }

    /// The window of each layer.
    fn windows(&self, num_layers: usize, rotated: &[bool]) -> Result<Vec<Option<usize>>, String> {
        let keys = self.keys;
        let default = match self.family.windows {
            Windows::None => return Ok(vec![None; num_layers]),
            Windows::All(default) => default,
            Windows::WithoutRope => None,
            _ => Some(4096),
        };
        let key = "sliding_window";
        let mut window = if keys.has(key) { keys.size(&[key])? } else { default };
        let optional = matches!(self.family.windows, Windows::Late | Windows::WithoutRope);
        if optional && !keys.flag("use_sliding_window", false)? {
            window = None;
        }
        let slides: Vec<bool> = match self.family.windows {
            Windows::All(_) => return Ok(vec![window; num_layers]),
            _ => match keys.get::<Vec<String>>("layer_types")? {
                Some(types) => self.slides(&types, num_layers)?,
                None => self.slides_by_default(num_layers, rotated, window.is_some())?,
            },
        };
        if window.is_none() && slides.contains(&true) {
            return Err("layer_types has sliding_attention, but no sliding_window is set".into());
        }
        Ok(slides.iter().map(|slides| window.filter(|_| *slides)).collect())
    }

    /// Whether each layer of `layer_types` has a window.
    fn slides(&self, types: &[String], num_layers: usize) -> Result<Vec<bool>, String> {
        if types.len() < num_layers {
            return Err(format!("layer_types has {} entries, expected {num_layers}", types.len()));
        }
        let slides = |of: &String| match of.as_str() {
            "full_attention" => Ok(false),
            "sliding_attention" => Ok(true),
            other => Err(format!(
                "layer_types has {other:?}, which is not supported; supported are full_attention, sliding_attention"
            )),
        };
        types[..num_layers].iter().map(slides).collect()
    }

    fn slides_by_default(&self, num_layers: usize, rotated: &[bool], set: bool) -> Result<Vec<bool>, String> {
        let from = self.keys.get::<usize>("max_window_layers")?.unwrap_or(28);
        Ok(match self.family.windows {
            Windows::Late => (0..num_layers).map(|i| set && i >= from).collect(),
            Windows::WithoutRope => rotated[..num_layers].iter().map(|rotated| set && !rotated).collect(),
            Windows::Pattern(every) => {
                let every = self.size(&["sliding_window_pattern"])?.unwrap_or(every);
                (1..=num_layers).map(|i| i % every != 0).collect()
            }
            Windows::None | Windows::All(_) => vec![set; num_layers],
        })
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
