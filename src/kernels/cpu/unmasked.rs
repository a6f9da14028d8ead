//! Attention without a causal mask: of an encoder's rows among themselves, and of a decoder's rows to
//! an encoder's output. Plain loops; a row's sums run over the keys in their order.

use std::sync::{Mutex, PoisonError};

use super::{elements, pool::Pool};
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

/// Attention of `q` `[t, heads, head_dim]`, packed as the spans say, to each span's keys: `[t, heads *
/// head_dim]`. A distance is that of the row and the key within the span.
///
/// # Panics
/// If a shape does not fit, or a span has no keys.
pub fn attend(pool: &Pool, spans: &[Span], q: &[f32], shape: Heads, params: &AttentionParams) -> Vec<f32> {
    let Heads { heads, kv_heads, head_dim } = shape;
    let (width, kv_width) = (elements(&[heads, head_dim]), elements(&[kv_heads, head_dim]));
    let rows: Vec<(usize, usize)> = (0..spans.len()).flat_map(|s| (0..spans[s].rows).map(move |i| (s, i))).collect();
    assert!(q.len() == elements(&[rows.len(), width]) && heads.is_multiple_of(kv_heads));
    for span in spans {
        assert!(!span.keys.is_empty() && span.keys.len().is_multiple_of(kv_width));
        assert!(span.values.len() == span.keys.len());
    }
    assert!(params.relative_position_bias.as_ref().is_none_or(|bias| bias.heads() == heads));
    let mut out = vec![0f32; q.len()];
    // Each row is locked once, by the task that writes it.
    let targets: Vec<Mutex<&mut [f32]>> = out.chunks_exact_mut(width.max(1)).map(Mutex::new).collect();
    pool.run(targets.len(), &|row| {
        let (span, index) = rows[row];
        let mut to = targets[row].lock().unwrap_or_else(PoisonError::into_inner);
        attend_row(&spans[span], index, &q[row * width..][..width], shape, params, &mut to);
    });
    drop(targets);
    out
}

/// Row `index` of a span, `[heads, head_dim]`. `out` is zero.
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
        for (&weight, values) in weights.iter().zip(span.values.chunks_exact(kv_width)) {
            out.iter_mut().zip(&values[part.clone()]).for_each(|(out, value)| *out += weight * value);
        }
        out.iter_mut().for_each(|out| *out /= sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let pool = Pool::new(2);
        // Three rows of four heads that see two positions of two key-value heads.
        let (q, k) = (vec![1f32; 3 * 4 * 5], vec![1f32; 2 * 2 * 5]);
        let shape = Heads { heads: 4, kv_heads: 2, head_dim: 5 };
        let params = AttentionParams { causal: false, ..AttentionParams::scaled(1.0) };
        let refused = |q: &[f32], span: Span, shape: Heads| {
            let run = || attend(&pool, &[span], q, shape, &params);
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err()
        };
        let span = Span { rows: 3, keys: &k, values: &k };
        assert_eq!(attend(&pool, &[span], &q, shape, &params), q);
        assert!(refused(&q[1..], span, shape));
        assert!(refused(&q, Span { rows: 4, ..span }, shape));
        assert!(refused(&q, Span { keys: &k[1..], ..span }, shape));
        assert!(refused(&q, Span { keys: &[], values: &[], ..span }, shape));
        assert!(refused(&q, Span { values: &k[10..], ..span }, shape));
        assert!(refused(&q, span, Heads { kv_heads: 3, ..shape }));
        assert!(refused(&q, span, Heads { kv_heads: 0, ..shape }));
        assert!(refused(&[], span, Heads { heads: 1 << 62, head_dim: 4, ..shape }), "a width that overflows to zero");
    }
}
