//! Attention without a causal mask: of an encoder's rows among themselves, and of a decoder's rows to
//! an encoder's output. Plain loops; a row's sums run over the keys in their order.

use super::{pool::Pool, tensors::written};
use crate::kernels::{AttentionParams, host::dot};

/// Consecutive packed rows that see the same keys, all of them.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    /// How many rows.
    pub rows: usize,
    /// `[positions, kv_heads, head_dim]`
    pub keys: &'a [f32],
    /// As `keys`.
    pub values: &'a [f32],
}

/// The heads of [`attend`].
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// A pointer that threads write disjoint rows behind.
struct Out(*mut f32);

// SAFETY: every task of `attend` writes one row, its own.
unsafe impl Sync for Out {}

/// Of `q` `[t, heads, head_dim]`, packed as the spans say, to each span's keys: `[t, heads *
/// head_dim]`. A distance is that of the row and the key within the span.
///
/// # Panics
/// If a shape does not fit, or a span has no keys.
pub fn attend(pool: &Pool, spans: &[Span], q: &[f32], shape: Heads, params: &AttentionParams) -> Vec<f32> {
    let Heads { heads, kv_heads, head_dim } = shape;
    let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
    let places: Vec<(usize, usize)> = (0..spans.len()).flat_map(|s| (0..spans[s].rows).map(move |i| (s, i))).collect();
    assert!(q.len() == places.len() * width && heads.is_multiple_of(kv_heads));
    for span in spans {
        assert!(!span.keys.is_empty() && span.keys.len().is_multiple_of(kv_width));
        assert!(span.values.len() == span.keys.len());
    }
    assert!(params.relative_position_bias.as_ref().is_none_or(|bias| bias.heads() == heads));
    let fill = |out: *mut f32| {
        let out = Out(out);
        pool.run(places.len(), &|row| {
            let out = &out;
            let (span, index) = places[row];
            // SAFETY: the row is within `out`, which is as long as `q`, and this task alone has it.
            let to = unsafe { std::slice::from_raw_parts_mut(out.0.add(row * width), width) };
            attend_row(&spans[span], index, &q[row * width..][..width], shape, params, to);
        });
    };
    // SAFETY: the places are all of the rows, and each is written whole.
    unsafe { written(q.len(), fill) }
}

/// Row `index` of a span, `[heads, head_dim]`.
fn attend_row(span: &Span, index: usize, q: &[f32], shape: Heads, params: &AttentionParams, out: &mut [f32]) {
    let Heads { heads, kv_heads, head_dim } = shape;
    let (kv_width, groups) = (kv_heads * head_dim, heads / kv_heads);
    let mut weights = vec![0f32; span.keys.len() / kv_width];
    for head in 0..heads {
        let (q, out) = (&q[head * head_dim..][..head_dim], &mut out[head * head_dim..][..head_dim]);
        let part = head / groups * head_dim..(head / groups + 1) * head_dim;
        for (j, (weight, keys)) in weights.iter_mut().zip(span.keys.chunks_exact(kv_width)).enumerate() {
            let score = dot(q, &keys[part.clone()]) * params.scale;
            let score = params.softcap.map_or(score, |cap| cap * (score / cap).tanh());
            *weight = score + params.relative_position_bias.as_ref().map_or(0.0, |bias| bias.at(head, index, j));
        }
        let max = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for weight in &mut weights {
            *weight = (*weight - max).exp();
            sum += *weight;
        }
        out.fill(0.0);
        for (&weight, values) in weights.iter().zip(span.values.chunks_exact(kv_width)) {
            out.iter_mut().zip(&values[part.clone()]).for_each(|(out, value)| *out += weight * value);
        }
        out.iter_mut().for_each(|out| *out /= sum);
    }
}
