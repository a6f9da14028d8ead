//! One layer: attention, perhaps attention to an encoder's output, and an MLP, each with its norms and
//! its residual.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::{
    ModelConfig,
    branch::{BranchNorms, Stream, last},
    config::QkNorm,
    names::{CrossNames, Mlp as MlpNames, Qkv},
    rotation::Rotation,
    source::{Loaded, Source},
};
use crate::kernels::{
    Activation, AttentionParams, Kernels,
    norm::{Norm, QkNorms},
    relative_position_bias::RelativePositionBias,
    weight::Linear,
};

/// Attention, an MLP, and the residuals around them.
#[derive(Debug)]
pub struct Layer {
    attention: Attention,
    attention_norms: BranchNorms,
    output: Linear,
    cross: Option<CrossAttention>,
    mlp: Mlp,
    mlp_norms: BranchNorms,
    down: Linear,
    parallel_residual: bool,
}

impl Layer {
    /// Takes layer `index` out of a file. The position bias is that of all layers.
    pub fn load(
        config: &ModelConfig,
        index: usize,
        bias: Option<&Arc<RelativePositionBias>>,
        source: &mut Source,
    ) -> Loaded<Self> {
        let (names, hidden) = (source.names(), config.hidden_size);
        let attended = config.num_heads * config.head_dim;
        Ok(Self {
            attention: Attention::load(config, index, bias, source)?,
            attention_norms: BranchNorms::load(source, index, names.attention_norms, config.attention_norms, hidden)?,
            output: source.linear(index, names.output, hidden, attended, config.attention_output_bias)?.whole()?,
            cross: match (&config.encoder, names.cross) {
                (Some(_), Some(names)) => Some(CrossAttention::load(config, index, names, source)?),
                _ => None,
            },
            mlp: Mlp::load(config, index, source)?,
            mlp_norms: BranchNorms::load(source, index, names.mlp_norms, config.mlp_norms, hidden)?,
            down: source.linear(index, names.down, hidden, config.intermediate_size, config.mlp_bias)?.whole()?,
            parallel_residual: config.parallel_residual,
        })
    }

    /// The norm that reads the stream first, if one does.
    pub fn first_norm(&self) -> Option<&Norm> {
        self.attention_norms.before.as_ref()
    }

    /// The stream through layer `index`; only these `rows` of it, if any are named. The others are then computed as far as
    /// attention reads them. `next` is the norm that reads the result, if one does.
    pub fn forward(
        &self,
        index: usize,
        stream: Stream,
        next: Option<&Norm>,
        rows: Option<&Tensor>,
        rotations: &[Rotation],
        kernels: &mut dyn Kernels,
    ) -> Result<Stream> {
        let pick = |x: &Tensor, kernels: &mut dyn Kernels| match rows {
            Some(rows) => kernels.pick(x, rows),
            None => Ok(x.clone()),
        };
        let x = stream.x.clone();
        let h = stream.into_normed(self.first_norm(), kernels)?;
        let attended = self.attention.forward(index, &h, rotations, kernels)?;
        // Beside attention the MLP reads the same stream, not the sum.
        let of_mlp = self.mlp_norms.before.as_ref().filter(|_| !self.parallel_residual);
        let (x, y) = match &self.cross {
            None => {
                let (x, attended) = (pick(&x, kernels)?, pick(&attended, kernels)?);
                let y = self.attention_norms.leave(last(&self.output, &attended), &x, of_mlp, kernels)?;
                (x, y)
            }
            Some(cross) => {
                let of_cross = cross.norms.before.as_ref();
                let y = self.attention_norms.leave(last(&self.output, &attended), &x, of_cross, kernels)?;
                let of_mlp = of_mlp.filter(|_| rows.is_none());
                let y = cross.forward(index, y, of_mlp, kernels)?;
                let y = match rows {
                    Some(_) => Stream::new(pick(&y.x, kernels)?),
                    None => y,
                };
                (pick(&x, kernels)?, y)
            }
        };
        let sum = y.x.clone();
        let of_mlp = if self.parallel_residual { Stream::new(x) } else { y };
        let h = of_mlp.into_normed(self.mlp_norms.before.as_ref(), kernels)?;
        let mlp =
            |residual: Option<&Tensor>, kernels: &mut dyn Kernels| self.mlp.forward(&h, &self.down, residual, kernels);
        self.mlp_norms.leave(mlp, &sum, next, kernels)
    }

    /// Keys and values of an encoder's output `[t, hidden]`, both `[t, kv_heads, head_dim]`.
    pub fn cross_key_values(&self, encoded: &Tensor, kernels: &mut dyn Kernels) -> Result<(Tensor, Tensor)> {
        match &self.cross {
            Some(cross) => cross.key_values(encoded, kernels),
            None => bail!("the layer does not attend to an encoder's output"),
        }
    }

    /// Every weight, in a fixed order.
    pub fn tensors(&self) -> impl Iterator<Item = Result<Tensor>> {
        let cross_norms = self.cross.iter().flat_map(|cross| cross.norms.all());
        let norms = self.attention_norms.all().chain(cross_norms).chain(self.mlp_norms.all());
        let norms = norms.chain(self.attention.qk_norms.iter().flat_map(|norms| [&norms.queries, &norms.keys]));
        let cross = self.cross.iter().flat_map(|cross| [&cross.q, &cross.k, &cross.v, &cross.output]);
        let linear = self.attention.linear().into_iter().chain([&self.output]).chain(cross);
        let linear = linear.chain(self.mlp.linear()).chain([&self.down]);
        norms.flat_map(|norm| norm.tensors().map(Ok)).chain(linear.flat_map(Linear::tensors))
    }
}

/// Attention up to its output projection.
#[derive(Debug)]
struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    qk_norms: Option<QkNorms>,
    rope: Option<usize>,
    params: AttentionParams,
    head_dim: usize,
}

impl Attention {
    fn load(
        config: &ModelConfig,
        index: usize,
        bias: Option<&Arc<RelativePositionBias>>,
        source: &mut Source,
    ) -> Loaded<Self> {
        let ModelConfig { num_heads, num_kv_heads, head_dim, hidden_size, qkv_bias, .. } = *config;
        let (queries, keys) = (num_heads * head_dim, num_kv_heads * head_dim);
        let [q, k, v] = match source.names().qkv {
            Qkv::Apart(names) => {
                let mut linear = |name, rows| source.linear(index, name, rows, hidden_size, qkv_bias)?.whole();
                [linear(names[0], queries)?, linear(names[1], keys)?, linear(names[2], keys)?]
            }
            Qkv::Stacked(name) => {
                let all = source.linear(index, name, queries + 2 * keys, hidden_size, qkv_bias)?;
                [all.rows(0, queries)?, all.rows(queries, keys)?, all.rows(queries + keys, keys)?]
            }
            Qkv::ByHead(name) => {
                let all = source.linear(index, name, 3 * queries, hidden_size, qkv_bias)?;
                [all.of_heads(0, head_dim)?, all.of_heads(1, head_dim)?, all.of_heads(2, head_dim)?]
            }
        };
        let widths = config.qk_norm.map(|qk_norm| match qk_norm {
            QkNorm::Head => [head_dim; 2],
            QkNorm::Projection => [queries, keys],
        });
        let qk_norms = match widths.zip(source.names().qk_norms) {
            None => None,
            Some((widths, names)) => Some(QkNorms {
                queries: source.norm(Some(index), names[0], widths[0])?,
                keys: source.norm(Some(index), names[1], widths[1])?,
                by_head: config.qk_norm == Some(QkNorm::Head),
            }),
        };
        let layer = &config.layers[index];
        let params = AttentionParams {
            scale: layer.scale as f32,
            softcap: config.attention_softcap.map(|cap| cap as f32),
            window: layer.window,
            alibi_slopes: config.alibi.then(|| alibi_slopes(num_heads).into()),
            relative_position_bias: bias.cloned(),
            causal: config.causal,
        };
        let [q, k, v] = source.side_by_side([q, k, v])?;
        Ok(Self { q, k, v, qk_norms, rope: layer.rope, params, head_dim })
    }

    fn forward(&self, index: usize, x: &Tensor, rotations: &[Rotation], kernels: &mut dyn Kernels) -> Result<Tensor> {
        let [q, k, v] = Linear::forward_all([&self.q, &self.k, &self.v], x, kernels)?;
        let rotation = self.rope.map(|rope| &rotations[rope]).map(|(cos, sin)| (cos, sin));
        let qkv = [&q, &k, &v];
        match &self.qk_norms {
            None => kernels.rotary_attention(index, qkv, self.head_dim, rotation, &self.params),
            Some(norms) => kernels.normed_rotary_attention(index, qkv, self.head_dim, norms, rotation, &self.params),
        }
    }

    fn linear(&self) -> [&Linear; 3] {
        [&self.q, &self.k, &self.v]
    }
}

/// Attention to an encoder's output, with its norms and its residual.
#[derive(Debug)]
struct CrossAttention {
    norms: BranchNorms,
    q: Linear,
    k: Linear,
    v: Linear,
    output: Linear,
    params: AttentionParams,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

impl CrossAttention {
    fn load(config: &ModelConfig, index: usize, names: CrossNames, source: &mut Source) -> Loaded<Self> {
        let ModelConfig { num_heads, num_kv_heads, head_dim, hidden_size, qkv_bias, .. } = *config;
        let (queries, keys) = (num_heads * head_dim, num_kv_heads * head_dim);
        let norms = BranchNorms::load(source, index, names.norms, config.attention_norms, hidden_size)?;
        let mut linear = |name, rows| source.linear(index, name, rows, hidden_size, qkv_bias)?.whole();
        let [q, k, v] = names.qkv;
        let (q, k, v) = (linear(q, queries)?, linear(k, keys)?, linear(v, keys)?);
        let output = source.linear(index, names.output, hidden_size, queries, config.attention_output_bias)?.whole()?;
        let params = AttentionParams { causal: false, ..AttentionParams::scaled(config.layers[index].scale as f32) };
        Ok(Self { norms, q, k, v, output, params, num_heads, num_kv_heads, head_dim })
    }

    fn forward(&self, index: usize, stream: Stream, next: Option<&Norm>, kernels: &mut dyn Kernels) -> Result<Stream> {
        let x = stream.x.clone();
        let h = stream.into_normed(self.norms.before.as_ref(), kernels)?;
        let q = self.q.forward(&h, kernels)?.reshape((x.dims()[0], self.num_heads, self.head_dim))?;
        let attended = kernels.cross_attention(index, &q, &self.params)?;
        self.norms.leave(last(&self.output, &attended), &x, next, kernels)
    }

    fn key_values(&self, encoded: &Tensor, kernels: &mut dyn Kernels) -> Result<(Tensor, Tensor)> {
        let [k, v] = Linear::forward_all([&self.k, &self.v], encoded, kernels)?;
        let shape = (encoded.dims()[0], self.num_kv_heads, self.head_dim);
        Ok((k.reshape(shape)?, v.reshape(shape)?))
    }
}

/// The slope of each head (Press et al. 2022, as transformers' modeling_bloom.py has them).
fn alibi_slopes(heads: usize) -> Vec<f32> {
    let power = 1usize << heads.ilog2();
    let slope = |of: usize, i: usize| 2f64.powf(-8.0 / of as f64 * i as f64) as f32;
    let between = (0..heads - power).map(|i| slope(2 * power, 2 * i + 1));
    (1..=power).map(|i| slope(power, i)).chain(between).collect()
}

/// The inner layers of an MLP.
#[derive(Debug)]
enum Mlp {
    /// A gate and what it lets through.
    Gated(Linear, Linear, Activation),
    Plain(Linear, Activation),
}

impl Mlp {
    fn load(config: &ModelConfig, index: usize, source: &mut Source) -> Loaded<Self> {
        let ModelConfig { intermediate_size: inner, hidden_size: hidden, mlp_bias: bias, activation, .. } = *config;
        Ok(match source.names().mlp {
            MlpNames::Gated([gate, up]) | MlpNames::Either { gated: [gate, up], .. } if config.gated_mlp => {
                let mut linear = |name| source.linear(index, name, inner, hidden, bias)?.whole();
                let (gate, up) = (linear(gate)?, linear(up)?);
                let [gate, up] = source.side_by_side([gate, up])?;
                Self::Gated(gate, up, activation)
            }
            MlpNames::GatedStacked(name) => {
                let both = source.linear(index, name, 2 * inner, hidden, bias)?;
                let [gate, up] = source.side_by_side([both.rows(0, inner)?, both.rows(inner, inner)?])?;
                Self::Gated(gate, up, activation)
            }
            MlpNames::Gated([_, name]) | MlpNames::Plain(name) | MlpNames::Either { plain: name, .. } => {
                Self::Plain(source.linear(index, name, inner, hidden, bias)?.whole()?, activation)
            }
        })
    }

    /// `[t, hidden]` to `[t, hidden]`, through the `down` layer too, plus `residual` if there is one.
    fn forward(
        &self,
        x: &Tensor,
        down: &Linear,
        residual: Option<&Tensor>,
        kernels: &mut dyn Kernels,
    ) -> Result<Tensor> {
        match self {
            Self::Gated(gate, up, activation) => kernels.gated_mlp(*activation, [gate, up], down, x, residual),
            Self::Plain(inner, activation) => {
                let inner = inner.forward(x, kernels)?;
                let inner = kernels.activate(*activation, &inner)?;
                last(down, &inner)(residual, kernels)
            }
        }
    }

    fn linear(&self) -> impl Iterator<Item = &Linear> {
        let (first, second) = match self {
            Self::Gated(gate, up, _) => (gate, Some(up)),
            Self::Plain(inner, _) => (inner, None),
        };
        std::iter::once(first).chain(second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alibi_slopes_are_those_of_its_paper() {
        assert_eq!(alibi_slopes(8), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]);
        let twelve = alibi_slopes(12);
        assert_eq!(twelve[..8], alibi_slopes(8));
        assert!((twelve[8] - 0.5f32.sqrt()).abs() < 1e-7 && (twelve[9] - 0.5 * 0.5f32.sqrt()).abs() < 1e-7);
    }
}
