//! The tuning kernels and their gradients against the reference's.

use std::sync::Arc;

use candle_core::{DType, Device, Shape, Var};

use super::{
    super::{Isa, pool, rows},
    attention::HeadTask,
    *,
};
use crate::kernels::{
    Backend as _, cpu::CpuBackend, reference::tuning::ReferenceTuning, relative_position_bias::RelativePositionBias,
    weight::Matrix,
};

fn random(shape: impl Into<Shape>) -> Var {
    Var::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

/// Holds an operation's value and its gradients to every input against the plain one's.
fn compare(inputs: &[&Var], op: impl FnMut(&mut dyn Kernels) -> Tensor) {
    compare_in(&BatchLayout::of_lengths(3, &[4, 1, 6]), None, inputs, op);
}

/// As [`compare`], in a batch, with what an encoder made of its inputs.
fn compare_in(
    batch: &BatchLayout,
    encoded: Option<EncodedBatch>,
    inputs: &[&Var],
    mut op: impl FnMut(&mut dyn Kernels) -> Tensor,
) {
    let mut fused = CpuTuning::default().kernels(batch, None, encoded.clone()).unwrap();
    let mut plain = ReferenceTuning::new(&Device::Cpu).kernels(batch, None, encoded).unwrap();
    let (a, b) = (op(fused.as_mut()), op(plain.as_mut()));
    let weights = random(a.shape().clone());
    let gradients = |y: &Tensor| {
        let grads = (y * weights.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
        inputs.iter().map(|x| host(grads.get(x.as_tensor()).unwrap()).unwrap()).collect::<Vec<_>>()
    };
    let close = |a: &[f32], b: &[f32]| {
        assert!(a.len() == b.len() && b.iter().any(|x| x.abs() > 0.1));
        a.iter().zip(b).for_each(|(a, b)| assert!((a - b).abs() < 1e-4 * (1.0 + b.abs()), "{a} {b}"));
    };
    close(&host(&a).unwrap(), &host(&b).unwrap());
    gradients(&a).iter().zip(&gradients(&b)).for_each(|(a, b)| close(a, b));
}

#[test]
fn attention_and_its_gradients_equal_the_plain_ones() {
    let plain = AttentionParams::scaled(0.22);
    let slopes: Arc<[f32]> = (1..=6).map(|i| 0.9f32.powi(i)).collect();
    for params in [
        plain.clone(),
        AttentionParams { softcap: Some(1.5), ..plain.clone() },
        AttentionParams { window: Some(2), ..plain.clone() },
        AttentionParams { window: Some(5), softcap: Some(2.0), ..plain.clone() },
        AttentionParams { alibi_slopes: Some(slopes), window: Some(6), ..plain.clone() },
        AttentionParams { relative_position_bias: Some(bias(6)), ..plain },
    ] {
        for (heads, kv_heads) in [(4, 2), (3, 3), (6, 1)] {
            let (q, k, v) = (random((14, heads, 20)), random((14, kv_heads, 20)), random((14, kv_heads, 20)));
            let slopes = params.alibi_slopes.as_ref().map(|s| s[..heads].into());
            let relative_position_bias = params.relative_position_bias.as_ref().map(|_| bias(heads));
            let params = AttentionParams { alibi_slopes: slopes, relative_position_bias, ..params.clone() };
            compare(&[&q, &k, &v], |kernels| kernels.attention(0, &q, &k, &v, &params).unwrap());
        }
    }
}

fn bias(heads: usize) -> Arc<RelativePositionBias> {
    RelativePositionBias::new(heads, 4, |head, distance| (head as f32 + 0.3 * distance as f32).sin()).into()
}

#[test]
fn attention_of_and_to_an_encoder_and_its_gradients_equal_the_plain_ones() {
    for (heads, kv_heads) in [(4, 2), (3, 3)] {
        let (q, k, v) = (random((11, heads, 20)), random((11, kv_heads, 20)), random((11, kv_heads, 20)));
        let scaled = AttentionParams { causal: false, ..AttentionParams::scaled(0.22) };
        let biased = AttentionParams { relative_position_bias: Some(bias(heads)), ..scaled.clone() };
        let batch = BatchLayout::of_lengths(0, &[4, 1, 6]);
        compare_in(&batch, None, &[&q, &k, &v], |kernels| kernels.attention(0, &q, &k, &v, &biased).unwrap());

        let (q, encoded) = (random((14, heads, 20)), |(k, v): (&Var, &Var)| EncodedBatch {
            layers: vec![(k.as_tensor().clone(), v.as_tensor().clone())],
            inputs: vec![5..11, 0..5, 5..11],
        });
        let batch = BatchLayout::of_lengths(3, &[4, 1, 6]);
        compare_in(&batch, Some(encoded((&k, &v))), &[&q, &k, &v], |kernels| {
            kernels.cross_attention(0, &q, &scaled).unwrap()
        });
    }
}

#[test]
fn log_probabilities_and_their_gradient_equal_those_of_log_softmax() {
    let logits = random((14, 50));
    let targets: Vec<u32> = (0..14).map(|i| (i * 7) % 50).collect();
    compare(&[&logits], |kernels| kernels.log_probabilities(&logits, &targets).unwrap());
}

#[test]
fn norm_and_rope_and_their_gradients_equal_the_plain_ones() {
    let (x, weight) = (random((14, 24)), random(24));
    compare(&[&x], |kernels| kernels.rms_norm(&x, weight.as_tensor(), 1e-5).unwrap());
    let (x, cos, sin) = (random((14, 3, 8)), random((14, 4)), random((14, 4)));
    compare(&[&x], |kernels| kernels.rope(&x, &cos.as_detached_tensor(), &sin.as_detached_tensor()).unwrap());
    let partial = random((14, 3, 20));
    compare(&[&partial], |kernels| {
        kernels.rope(&partial, &cos.as_detached_tensor(), &sin.as_detached_tensor()).unwrap()
    });
}

/// A layer of this backend, and its weight.
fn layer(out: usize, inputs: usize, bias: bool) -> (Linear, Tensor) {
    let weight = (random((out, inputs)).as_detached_tensor() * 0.3).unwrap();
    let packed = CpuBackend::new().weight(Matrix::Values(weight.clone()), DType::F32).unwrap();
    let bias = bias.then(|| random(out).as_detached_tensor());
    (Linear { name: "layer".to_owned(), weight: packed, bias }, weight)
}

/// `x Wᵀ + bias`, by candle.
fn plain((layer, weight): &(Linear, Tensor), x: &Tensor) -> Tensor {
    let y = x.matmul(&weight.t().unwrap()).unwrap();
    layer.bias.as_ref().map_or(y.clone(), |bias| y.broadcast_add(bias).unwrap())
}

#[test]
fn a_gated_mlp_and_its_gradients_equal_the_plain_ones() {
    let (x, residual) = (random((14, 24)), random((14, 20)));
    for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
        for (with_residual, bias) in [(true, false), (false, false), (true, true)] {
            let (gate, up, down) = (layer(37, 24, bias), layer(37, 24, false), layer(20, 37, true));
            let mut own = true;
            let inputs: &[&Var] = if with_residual { &[&x, &residual] } else { &[&x] };
            compare(inputs, |kernels| {
                let residual = with_residual.then_some(residual.as_tensor());
                if std::mem::replace(&mut own, false) {
                    return kernels.gated_mlp(activation, [&gate.0, &up.0], &down.0, &x, residual).unwrap();
                }
                let inner = (activation.apply(&plain(&gate, &x)).unwrap() * plain(&up, &x)).unwrap();
                let y = plain(&down, &inner);
                residual.map_or(y.clone(), |residual| (residual + y).unwrap())
            });
        }
    }
}

#[test]
fn a_linear_layer_with_a_residual_and_its_gradients_equal_the_plain_ones() {
    let (x, residual) = (random((14, 24)), random((14, 20)));
    for bias in [true, false] {
        let linear = layer(20, 24, bias);
        let mut own = true;
        compare(&[&x, &residual], |kernels| match std::mem::replace(&mut own, false) {
            true => kernels.linear(&x, &[&linear.0], Some(&residual)).unwrap().remove(0),
            false => (residual.as_tensor() + plain(&linear, &x)).unwrap(),
        });
    }
}

#[test]
fn an_mlp_whose_gradient_is_asked_for_twice_gives_the_same_twice() {
    let (x, residual) = (random((5, 24)), random((5, 24)));
    let (gate, up, down) = (layer(37, 24, false), layer(37, 24, false), layer(24, 37, false));
    let mut kernels = CpuTuning::default().kernels(&BatchLayout::of_lengths(0, &[5]), None, None).unwrap();
    let y = kernels.gated_mlp(Activation::Silu, [&gate.0, &up.0], &down.0, &x, Some(&residual)).unwrap();
    let gradient = || host(y.sum_all().unwrap().backward().unwrap().get(x.as_tensor()).unwrap()).unwrap();
    assert_eq!(gradient(), gradient());
}

#[test]
fn every_instruction_set_gives_what_portable_code_gives() {
    let values = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
    let close = |what: &str, isa: Isa, a: &[f32], b: &[f32]| {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).for_each(|(a, b)| assert!((a - b).abs() < 1e-4, "{what}, {isa:?}: {a} {b}"));
    };
    let (pool, n) = (pool::global(), 5 * 37);
    let (x, grad, weight) = (values(n, 0.7), values(n, 0.3), values(37, 0.9));
    let (heads, kv_heads, head_dim, rows) = (6, 2, 20, 9);
    let [q, k, v] =
        [(heads, 0.37), (kv_heads, 0.51), (kv_heads, 0.83)].map(|(n, step)| values(rows * n * head_dim, step));
    let attention = |isa: Isa| {
        let params = AttentionParams { window: Some(5), ..AttentionParams::scaled(0.3) };
        let seen = Sequences::new(&BatchLayout::of_lengths(3, &[2, 4])).seen(&params);
        let mut all = vec![0f32; 2 * q.len()];
        let (out, to_q) = all.split_at_mut(q.len());
        let mut of_keys = Vec::new();
        for (seen, kv_head) in seen.iter().flat_map(|seen| (0..kv_heads).map(move |head| (seen, head))) {
            let task = HeadTask { seen, kv_head, heads, kv_heads, head_dim, params: &params, q: &q, k: &k, v: &v };
            // SAFETY: both are as long as the queries, and there is one thread.
            let gradients = unsafe {
                task.forward(isa, out.as_mut_ptr());
                task.backward(isa, &q, to_q.as_mut_ptr())
            };
            of_keys.extend([gradients.k, gradients.v].concat());
        }
        [all, of_keys].concat()
    };
    let all = |isa: Isa| {
        let mut gradients = [x.clone(), grad.clone()];
        mlp::gated_gradient(isa, Activation::Silu, &mut gradients, &x);
        let gated = mlp::gated(isa, Activation::GeluTanh, &[x.clone(), grad.clone()]);
        let norm = rows::rms_norm_gradient(isa, pool, &x, &weight, 1e-5, &grad);
        [("gradient of a gate", gradients.concat()), ("gate", gated), ("norm", norm), ("attention", attention(isa))]
    };
    let plain = all(Isa::PORTABLE);
    for isa in Isa::available() {
        for ((what, ours), (_, plain)) in all(isa).iter().zip(&plain) {
            close(what, isa, ours, plain);
        }
    }
}
