//! Attention of one sequence in plain operations: scores, biases, mask, softmax, values.

use candle_core::{D, Device, Result, Tensor};

use crate::kernels::{AttentionParams, relative_position_bias::RelativePositionBias, widened};

/// Queries `[rows, heads, head_dim]` at the positions from `first` of a sequence against its keys and values
/// `[keys, kv_heads, head_dim]`, which are those of the positions from 0: `[rows, heads * head_dim]`.
///
/// # Errors
/// A shape does not fit.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, first: usize, params: &AttentionParams) -> Result<Tensor> {
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
    let positions = first..first + rows;
    if let Some(slopes) = &params.alibi_slopes {
        scores = (&scores + alibi(slopes, positions.clone(), keys, q.device())?.to_dtype(scores.dtype())?)?;
    }
    if let Some(bias) = &params.relative_position_bias {
        scores = (&scores + relative(bias, positions.clone(), keys, q.device())?.to_dtype(scores.dtype())?)?;
    }
    if params.causal {
        let mask = causal_mask(params.window, positions, keys, q.device())?;
        scores = scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?;
    }
    let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(q.dtype())?;
    weights.matmul(&heads_first(v)?)?.transpose(0, 1)?.reshape((rows, heads * dim))
}

/// `[rows, keys]`: 0 where the query at a position attends to a key, -inf elsewhere.
pub(super) fn causal_mask(
    window: Option<usize>,
    positions: std::ops::Range<usize>,
    keys: usize,
    device: &Device,
) -> Result<Tensor> {
    let attends = |i: usize, j: usize| j <= i && window.is_none_or(|window| i - j < window);
    let value = |i, j| if attends(i, j) { 0f32 } else { f32::NEG_INFINITY };
    let values: Vec<f32> = positions.clone().flat_map(|i| (0..keys).map(move |j| value(i, j))).collect();
    Tensor::from_vec(values, (positions.len(), keys), device)
}

/// `[heads, rows, keys]`: what ALiBi adds to each score.
pub(super) fn alibi(slopes: &[f32], positions: std::ops::Range<usize>, keys: usize, device: &Device) -> Result<Tensor> {
    let distance = |i, j| (j as f32) - (i as f32);
    let values: Vec<f32> = positions.clone().flat_map(|i| (0..keys).map(move |j| distance(i, j))).collect();
    let distances = Tensor::from_vec(values, (1, positions.len(), keys), device)?;
    Tensor::new(slopes, device)?.reshape((slopes.len(), 1, 1))?.broadcast_mul(&distances)
}

/// `[heads, rows, keys]`: what a relative position bias adds to each score.
pub(super) fn relative(
    bias: &RelativePositionBias,
    positions: std::ops::Range<usize>,
    keys: usize,
    device: &Device,
) -> Result<Tensor> {
    let (heads, rows) = (bias.heads(), positions.len());
    let mut values = Vec::with_capacity(heads * rows * keys);
    for head in 0..heads {
        for query in positions.clone() {
            values.extend((0..keys).map(|key| bias.at(head, query, key)));
        }
    }
    Tensor::from_vec(values, (heads, rows, keys), device)
}
