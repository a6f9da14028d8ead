//! The decoder, one for all families, by config: pre-norm blocks of rotary attention and a gated
//! MLP, over packed rows.

use candle_core::{DType, Result, Tensor};

use super::{ModelConfig, ModelError, linear::Linear, weights::Weights};
use crate::kernels::Kernels;

/// The layers of a decoder and the tables around them.
#[derive(Debug)]
pub struct Decoder {
    embeddings: Tensor,
    layers: Vec<Layer>,
    final_norm: Tensor,
    head: Linear,
    /// Cosines and sines of every position, `[context_length, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    eps: f64,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    mlp_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Decoder {
    /// Takes the decoder's tensors out of `weights`, under the names Hugging Face gives them.
    pub fn load(config: &ModelConfig, weights: &mut Weights) -> std::result::Result<Self, ModelError> {
        let embeddings = weights.take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))?;
        let layers =
            (0..config.num_layers).map(|i| Layer::load(config, i, weights)).collect::<std::result::Result<_, _>>()?;
        let final_norm = weights.take("model.norm.weight", config.hidden_size)?;
        let head = match config.tie_word_embeddings {
            true => embeddings.clone(),
            false => weights.take("lm_head.weight", (config.vocab_size, config.hidden_size))?,
        };
        let (cos, sin) = rope_tables(config, &embeddings)?;
        Ok(Self {
            embeddings,
            layers,
            final_norm,
            head: Linear::new(head, None),
            cos,
            sin,
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            eps: config.rms_norm_eps,
        })
    }

    /// `[t]` ids to `[t, hidden]`.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        self.embeddings.index_select(ids, 0)
    }

    /// `[vocab, hidden]`.
    pub fn embedding_table(&self) -> &Tensor {
        &self.embeddings
    }

    /// See [`Model::forward`](super::Model::forward).
    pub fn forward(&self, x: &Tensor, positions: &Tensor, kernels: &mut dyn Kernels) -> Result<Tensor> {
        let cos = self.cos.index_select(positions, 0)?;
        let sin = self.sin.index_select(positions, 0)?;
        let mut x = x.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            let h = kernels.rms_norm(&x, &layer.attention_norm, self.eps)?;
            let heads = |y: Tensor, n: usize| y.reshape((y.dims()[0], n, self.head_dim));
            let q = kernels.rope(&heads(layer.q.forward(&h)?, self.num_heads)?, &cos, &sin)?;
            let k = kernels.rope(&heads(layer.k.forward(&h)?, self.num_kv_heads)?, &cos, &sin)?;
            let v = heads(layer.v.forward(&h)?, self.num_kv_heads)?;
            let attended = kernels.attention(i, &q, &k, &v)?;
            x = (x + layer.o.forward(&attended)?)?;
            let h = kernels.rms_norm(&x, &layer.mlp_norm, self.eps)?;
            let gated = kernels.gated(&layer.gate.forward(&h)?, &layer.up.forward(&h)?)?;
            x = (x + layer.down.forward(&gated)?)?;
        }
        kernels.rms_norm(&x, &self.final_norm, self.eps)
    }

    /// `[t, hidden]` to `[t, vocab]`, in f32; in f64 for a model in f64.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = self.head.forward(hidden)?;
        match logits.dtype() {
            DType::F64 => Ok(logits),
            _ => logits.to_dtype(DType::F32),
        }
    }

    /// Every weight, in a fixed order.
    pub fn tensors(&self) -> Vec<&Tensor> {
        let layers = self.layers.iter().flat_map(|layer| {
            let linear = [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down];
            [&layer.attention_norm, &layer.mlp_norm].into_iter().chain(linear.into_iter().flat_map(Linear::tensors))
        });
        [&self.embeddings, &self.final_norm].into_iter().chain(self.head.tensors()).chain(layers).collect()
    }
}

impl Layer {
    fn load(config: &ModelConfig, index: usize, weights: &mut Weights) -> std::result::Result<Self, ModelError> {
        let mut linear = |name: &str, outer: usize, inner: usize, bias: bool| {
            let path = format!("model.layers.{index}.{name}");
            let weight = weights.take(&format!("{path}.weight"), (outer, inner))?;
            let bias = if bias { Some(weights.take(&format!("{path}.bias"), outer)?) } else { None };
            Ok::<_, ModelError>(Linear::new(weight, bias))
        };
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q_dim, kv_dim) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let q = linear("self_attn.q_proj", q_dim, hidden, config.qkv_bias)?;
        let k = linear("self_attn.k_proj", kv_dim, hidden, config.qkv_bias)?;
        let v = linear("self_attn.v_proj", kv_dim, hidden, config.qkv_bias)?;
        let o = linear("self_attn.o_proj", hidden, q_dim, config.attention_output_bias)?;
        let gate = linear("mlp.gate_proj", inner, hidden, config.mlp_bias)?;
        let up = linear("mlp.up_proj", inner, hidden, config.mlp_bias)?;
        let down = linear("mlp.down_proj", hidden, inner, config.mlp_bias)?;
        let attention_norm = weights.take(&format!("model.layers.{index}.input_layernorm.weight"), hidden)?;
        let mlp_norm = weights.take(&format!("model.layers.{index}.post_attention_layernorm.weight"), hidden)?;
        Ok(Self { attention_norm, q, k, v, o, mlp_norm, gate, up, down })
    }
}

/// Computed in f64 and rounded once, in the dtype and on the device of `like`.
fn rope_tables(config: &ModelConfig, like: &Tensor) -> Result<(Tensor, Tensor)> {
    let frequencies = config.rope.inverse_frequencies(config.head_dim);
    let angles = (0..config.context_length).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
    let table = |of: fn(f64) -> f64| {
        let values: Vec<f32> = angles.clone().map(|a| of(a) as f32).collect();
        Tensor::from_vec(values, (config.context_length, config.head_dim / 2), like.device())?.to_dtype(like.dtype())
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}
