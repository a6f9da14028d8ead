//! Attention of one sequence in plain operations: scores, biases, mask, softmax, values.

use candle_core::{D, Device, Result, Tensor};

use crate::kernels::{AttentionParams, layout::Segment, relative_position_bias::RelativePositionBias, widened};

/// Queries `[rows, heads, head_dim]` of a segment against the keys and values `[keys, kv_heads, head_dim]` of its
/// sequence's rows, from the first on: `[rows, heads * head_dim]`.
///
/// # Errors
/// A shape does not fit.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, segment: &Segment, params: &AttentionParams) -> Result<Tensor> {
    let ((rows, heads, dim), (keys, kv_heads, _)) = (q.dims3()?, k.dims3()?);
    let heads_first = |x: &Tensor| {
        let x = x.to_dtype(q.dtype())?.unsqueeze(2)?.expand((keys, kv_heads, heads / kv_heads, dim))?;
        x.reshape((keys, heads, dim))?.transpose(0, 1)?.contiguous()
    };
    let queries = q.transpose(0, 1)?.contiguous()?;
    let scores = (queries.matmul(&heads_first(k)?.t()?)? * f64::from(params.scale))?;
    let mut scores = scores.to_dtype(widened(q.dtype()))?;
    if let Some(softcap) = params.softcap.map(f64::from) {
        scores = ((scores / softcap)?.tanh()? * softcap)?;
    }
    if let Some(slopes) = &params.alibi_slopes {
        scores = (&scores + alibi(slopes, segment, keys, q.device())?.to_dtype(scores.dtype())?)?;
    }
    if let Some(bias) = &params.relative_position_bias {
        scores = (&scores + relative(bias, segment, keys, q.device())?.to_dtype(scores.dtype())?)?;
    }
    if params.causal {
        let mask = causal_mask(params.window, segment, keys, q.device())?;
        scores = scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?;
    }
    let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(q.dtype())?;
    weights.matmul(&heads_first(v)?)?.transpose(0, 1)?.reshape((rows, heads * dim))
}

/// `[rows, keys]`: 0 where a row of a segment attends to a row of its sequence, -inf elsewhere.
pub(super) fn causal_mask(window: Option<usize>, segment: &Segment, keys: usize, device: &Device) -> Result<Tensor> {
    let distance = |i, j| segment.position(i) - segment.position(j);
    let attends = |i: usize, j: usize| segment.sees(i, j) && window.is_none_or(|window| distance(i, j) < window);
    let value = |i, j| if attends(i, j) { 0f32 } else { f32::NEG_INFINITY };
    let values: Vec<f32> = pairs(segment, keys).map(|(i, j)| value(i, j)).collect();
    Tensor::from_vec(values, (segment.rows, keys), device)
}

/// `[heads, rows, keys]`: what ALiBi adds to each score.
pub(super) fn alibi(slopes: &[f32], segment: &Segment, keys: usize, device: &Device) -> Result<Tensor> {
    let distance = |i, j| (segment.position(j) as f32) - (segment.position(i) as f32);
    let values: Vec<f32> = pairs(segment, keys).map(|(i, j)| distance(i, j)).collect();
    let distances = Tensor::from_vec(values, (1, segment.rows, keys), device)?;
    Tensor::new(slopes, device)?.reshape((slopes.len(), 1, 1))?.broadcast_mul(&distances)
}

/// `[heads, rows, keys]`: what a relative position bias adds to each score.
pub(super) fn relative(bias: &RelativePositionBias, segment: &Segment, keys: usize, device: &Device) -> Result<Tensor> {
    let heads = bias.heads();
    let mut values = Vec::with_capacity(heads * segment.rows * keys);
    for head in 0..heads {
        let at = |(query, key)| bias.at(head, segment.position(query), segment.position(key));
        values.extend(pairs(segment, keys).map(at));
    }
    Tensor::from_vec(values, (heads, segment.rows, keys), device)
}

/// Each row of a segment with each of the first rows of its sequence.
fn pairs(segment: &Segment, keys: usize) -> impl Iterator<Item = (usize, usize)> {
    (segment.start..segment.start + segment.rows).flat_map(move |query| (0..keys).map(move |key| (query, key)))
}
