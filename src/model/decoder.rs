//! The decoder, one for all families, by config: pre-norm blocks of rotary attention and a gated
//! MLP, over packed rows.

use candle_core::{DType, Result, Tensor};

use super::{
    ModelConfig, ModelError,
    linear::{Linear, Weight},
    weights::Weights,
};
use crate::kernels::Kernels;

/// The layers of a decoder and the tables around them.
#[derive(Debug)]
pub struct Decoder {
    embeddings: Weight,
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
        let table = |weights: &mut Weights, name| {
            let table = weights.take(name, (config.vocab_size, config.hidden_size))?;
            Ok::<_, ModelError>(Weight::new(table)?)
        };
        let embeddings = table(weights, "model.embed_tokens.weight")?;
        let layers =
            (0..config.num_layers).map(|i| Layer::load(config, i, weights)).collect::<std::result::Result<_, _>>()?;
        let final_norm = activations(weights.take("model.norm.weight", config.hidden_size)?)?;
        let head = match config.tie_word_embeddings {
            true => embeddings.clone(),
            false => table(weights, "lm_head.weight")?,
        };
        let (cos, sin) = rope_tables(config, &final_norm)?;
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
        self.embeddings.rows(ids)
    }

    /// The type of hidden states.
    pub fn activation_dtype(&self) -> DType {
        self.final_norm.dtype()
    }

    /// `[vocab, hidden]`.
    pub fn embedding_table(&self) -> Result<Tensor> {
        self.embeddings.to_tensor()
    }

    /// See [`Model::forward`](super::Model::forward).
    pub fn forward(&self, x: &Tensor, positions: &Tensor, kernels: &mut dyn Kernels) -> Result<Tensor> {
        let cos = self.cos.index_select(positions, 0)?;
        let sin = self.sin.index_select(positions, 0)?;
        let mut x = x.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            let h = kernels.rms_norm(&x, &layer.attention_norm, self.eps)?;
            let heads = |y: Tensor, n: usize| y.reshape((y.dims()[0], n, self.head_dim));
            let [q, k, v] = Linear::forward_all([&layer.q, &layer.k, &layer.v], &h)?;
            let q = kernels.rope(&heads(q, self.num_heads)?, &cos, &sin)?;
            let k = kernels.rope(&heads(k, self.num_kv_heads)?, &cos, &sin)?;
            let attended = kernels.attention(i, &q, &k, &heads(v, self.num_kv_heads)?)?;
            x = layer.o.forward_add(&attended, &x)?;
            let h = kernels.rms_norm(&x, &layer.mlp_norm, self.eps)?;
            let gated = Linear::forward_gated(&layer.gate, &layer.up, &h, kernels)?;
            x = layer.down.forward_add(&gated, &x)?;
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

    /// Every weight, in a fixed order, one at a time.
    pub fn tensors(&self) -> impl Iterator<Item = Result<Tensor>> {
        let layers = self.layers.iter().flat_map(|layer| {
            let linear = [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down];
            let norms = [&layer.attention_norm, &layer.mlp_norm].map(|norm| Ok(norm.clone()));
            norms.into_iter().chain(linear.into_iter().flat_map(all))
        });
        [self.embeddings.to_tensor(), Ok(self.final_norm.clone())].into_iter().chain(all(&self.head)).chain(layers)
    }
}

fn all(linear: &Linear) -> Vec<Result<Tensor>> {
    match linear.tensors() {
        Ok(tensors) => tensors.into_iter().map(Ok).collect(),
        Err(error) => vec![Err(error)],
    }
}

/// A vector in the type of activations, which are never less than f32 on a CPU.
fn activations(x: Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::BF16 | DType::F16 if x.device().is_cpu() => x.to_dtype(DType::F32),
        _ => Ok(x),
    }
}

impl Layer {
    fn load(config: &ModelConfig, index: usize, weights: &mut Weights) -> std::result::Result<Self, ModelError> {
        let mut linear = |name: &str, outer: usize, inner: usize, bias: bool| {
            let path = format!("model.layers.{index}.{name}");
            let weight = weights.take(&format!("{path}.weight"), (outer, inner))?;
            let bias = if bias { Some(activations(weights.take(&format!("{path}.bias"), outer)?)?) } else { None };
            Ok::<_, ModelError>(Linear::new(Weight::new(weight)?, bias))
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
        let mut norm = |name: &str| {
            Ok::<_, ModelError>(activations(weights.take(&format!("model.layers.{index}.{name}.weight"), hidden)?)?)
        };
        let (attention_norm, mlp_norm) = (norm("input_layernorm")?, norm("post_attention_layernorm")?);
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
