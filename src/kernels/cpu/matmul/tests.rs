//! Products held against plain sums, against themselves row by row, and against arguments that do not fit.

use half::bf16;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;
use crate::kernels::quantized::tests::{FORMATS, random_blocks};

fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect()
}

/// `x Wᵀ`, in f64.
fn plain(x: &[f32], w: &[f32], rows: usize, n: usize, k: usize) -> Vec<f64> {
    let dot = |r: usize, c: usize| (0..k).map(|i| f64::from(x[r * k + i]) * f64::from(w[c * k + i])).sum();
    (0..rows * n).map(|i| dot(i / n, i % n)).collect()
}

fn check(what: &str, ours: &[f32], plain: impl Iterator<Item = f64>) {
    for (i, (a, b)) in ours.iter().zip(plain).enumerate() {
        assert!((f64::from(*a) - b).abs() < 2e-4 * (1.0 + b.abs()), "{what}: {a} and {b} at {i}");
    }
}

/// Rows, `n` and `k`; Miri, which interprets, gets the smaller ones.
const SHAPES: &[(usize, usize, usize)] = &[
    (1, 1, 1),
    (3, 17, 33),
    (16, 32, 64),
    (33, 50, 31),
    #[cfg(not(miri))]
    (40, 96, 70),
    #[cfg(not(miri))]
    (65, 5, 128),
    #[cfg(not(miri))]
    (100, 33, 95),
];

#[test]
fn products_equal_plain_ones_on_odd_shapes() {
    let pool = Pool::new(3);
    for &(rows, n, k) in SHAPES {
        let (x, w) = (random(rows * k, 1), random(n * k, 2));
        let (bias, residual) = (random(n, 3), random(rows * n, 4));
        for isa in Isa::available() {
            for is_rounded in [false, true] {
                let what = format!("{isa:?} rounded {is_rounded} {rows} {n} {k}");
                let (weight, exact) = match is_rounded {
                    false => (PackedMatrix::from_f32(&w, n, k).unwrap(), plain(&x, &w, rows, n, k)),
                    true => {
                        let exact = plain(&rounded(&x), &rounded(&w), rows, n, k);
                        (PackedMatrix::from_f32_rounded(&w, n, k).unwrap(), exact)
                    }
                };
                let bare = Product { weight: &weight, bias: None, residual: None };
                let full = Product { bias: Some(&bias), residual: Some(&residual), ..bare };
                let results = multiply(isa, &pool, &x, rows, &[bare, full]);
                check(&what, &results[0], exact.iter().copied());
                let added = |(i, y): (usize, &f64)| y + f64::from(bias[i % n]) + f64::from(residual[i]);
                check(&what, &results[1], exact.iter().enumerate().map(added));
                let gated = multiply_gated(isa, &pool, Activation::Silu, &x, rows, &weight, &weight);
                check(&what, &gated, exact.iter().map(|y| y / (1.0 + (-y).exp()) * y));
                let gated = multiply_gated(isa, &pool, Activation::Relu, &x, rows, &weight, &weight);
                check(&what, &gated, exact.iter().map(|y| y.max(0.0) * y));
            }
        }
    }
}

#[test]
fn products_with_blocks_are_bit_for_bit_those_with_the_same_values() {
    let pool = Pool::new(2);
    for (i, (format, _)) in FORMATS.into_iter().enumerate() {
        for (rows, n, units) in [(1, 50, 1), (3, 16, 2), (40, 33, 1), (70, 5, 2)] {
            let k = units * if format.values() == 1 { 33 } else { format.values() };
            let bytes = random_blocks(format, n, k, i as u64);
            let mut values = vec![0f32; n * k];
            format.dequantize(&bytes, &mut values);
            let blocks = PackedMatrix::from_blocks(format, bytes, n, k);
            let plain = PackedMatrix::from_f32(&values, n, k).unwrap();
            let x = random(rows * k, 8);
            for isa in Isa::available() {
                let products = |weight| {
                    let product = Product { weight, bias: None, residual: None };
                    let mixed = Product { weight: &plain, ..product };
                    let all = multiply(isa, &pool, &x, rows, &[product, mixed, product]);
                    [all.concat(), multiply_gated(isa, &pool, Activation::Silu, &x, rows, weight, weight)].concat()
                };
                let bits = |x: Vec<f32>| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert!(bits(products(&blocks)) == bits(products(&plain)), "{isa:?} {format:?} {rows} {n} {k}");
            }
            let mut row = vec![0f32; k];
            blocks.row(n - 1, &mut row);
            assert_eq!(row, values[(n - 1) * k..]);
        }
    }
}

#[test]
fn a_row_is_the_same_bit_for_bit_alone_and_among_others() {
    let pool = Pool::new(2);
    // Besides the others, each number of row blocks among which the prefetch of the next column tile is split in
    // another way, and enough rows for several tasks.
    let many = if cfg!(miri) { [].as_slice() } else { &[(170, 40, 65), (290, 40, 33), (600, 3, 1500)] };
    for &(rows, n, k) in SHAPES.iter().chain(many) {
        let (x, w) = (random(rows * k, 5), random(n * k, 6));
        for isa in Isa::available() {
            for weight in [PackedMatrix::from_f32(&w, n, k).unwrap(), PackedMatrix::from_f32_rounded(&w, n, k).unwrap()]
            {
                let product = Product { weight: &weight, bias: None, residual: None };
                let all = &multiply(isa, &pool, &x, rows, &[product])[0];
                let gated = multiply_gated(isa, &pool, Activation::Silu, &x, rows, &weight, &weight);
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                for row in (0..rows).step_by(1 + rows / 128) {
                    let x = &x[row * k..][..k];
                    let what = format!("{isa:?} {:?} {rows} {n} {k}, row {row}", weight.operands());
                    let alone = &multiply(isa, &pool, x, 1, &[product])[0];
                    assert!(bits(alone) == bits(&all[row * n..][..n]), "{what}");
                    let alone = multiply_gated(isa, &pool, Activation::Silu, x, 1, &weight, &weight);
                    assert!(bits(&alone) == bits(&gated[row * n..][..n]), "{what}, gated");
                }
            }
        }
    }
}

#[test]
fn an_mlp_is_bit_for_bit_its_products_one_after_another() {
    let pool = Pool::new(2);
    let blocks = FORMATS[0].0;
    for &(rows, inner, k) in SHAPES {
        let n = 1 + inner / 2;
        let x = random(rows * k, 1);
        let (gate, up, down) = (random(inner * k, 2), random(inner * k, 3), random(n * inner, 4));
        let (bias, residual) = (random(n, 5), random(rows * n, 6));
        for isa in Isa::available() {
            let packings = [PackedMatrix::from_f32, PackedMatrix::from_f32_rounded];
            for (outer, last) in [(0, 0), (1, 1), (1, 0), (0, 1)] {
                let gate = packings[outer](&gate, inner, k).unwrap();
                let up = packings[outer](&up, inner, k).unwrap();
                let weight = packings[last](&down, n, inner).unwrap();
                for (bias, residual) in [(None, None), (Some(&bias[..]), Some(&residual[..]))] {
                    let down = Product { weight: &weight, bias, residual };
                    for activation in [Activation::Silu, Activation::GeluTanh] {
                        let found = multiply_mlp(isa, &pool, activation, &x, rows, [&gate, &up], down);
                        let between = multiply_gated(isa, &pool, activation, &x, rows, &gate, &up);
                        let expected = multiply(isa, &pool, &between, rows, &[down]).remove(0);
                        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                        assert!(bits(&found) == bits(&expected), "{isa:?} {rows} {inner} {k} {outer} {last}");
                    }
                }
            }
        }
    }
    let bytes = random_blocks(blocks, 4, blocks.values(), 1);
    let down = PackedMatrix::from_blocks(blocks, bytes, 4, blocks.values());
    let gate = PackedMatrix::from_f32_rounded(&random(blocks.values() * 8, 7), blocks.values(), 8).unwrap();
    let x = random(40 * 8, 8);
    let product = Product { weight: &down, bias: None, residual: None };
    let found = multiply_mlp(Isa::best(), &pool, Activation::Silu, &x, 40, [&gate, &gate], product);
    let between = multiply_gated(Isa::best(), &pool, Activation::Silu, &x, 40, &gate, &gate);
    assert_eq!(found, multiply(Isa::best(), &pool, &between, 40, &[product])[0]);
}

/// Whether a call panics, as one must whose arguments would have a kernel read or write out of bounds.
fn is_refused<R>(f: impl FnOnce() -> R) -> bool {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).is_err()
}

#[test]
fn what_does_not_fit_is_refused() {
    let pool = Pool::new(2);
    let matrix = |n, k| PackedMatrix::from_f32(&vec![1.0; n * k], n, k).unwrap();
    let (weight, other_k, other_n) = (matrix(20, 8), matrix(20, 9), matrix(21, 8));
    let bf16 = PackedMatrix::from_f32_rounded(&[1.0; 160], 20, 8).unwrap();
    let (x, bias, residual) = (vec![1.0; 3 * 8], vec![1.0; 20], vec![1.0; 3 * 20]);
    for isa in Isa::available() {
        let run = |x: &[f32], rows, products: &[Product]| multiply(isa, &pool, x, rows, products);
        let product = Product { weight: &weight, bias: Some(&bias), residual: Some(&residual) };
        assert!(!is_refused(|| run(&x, 3, &[product])));
        assert!(is_refused(|| run(&x[1..], 3, &[product])), "too few values");
        assert!(is_refused(|| run(&x, 4, &[product])), "too many rows");
        assert!(is_refused(|| run(&x, 3, &[Product { bias: Some(&bias[1..]), ..product }])));
        assert!(is_refused(|| run(&x, 3, &[Product { residual: Some(&residual[1..]), ..product }])));
        assert!(is_refused(|| run(&x, 3, &[product, Product { weight: &other_k, bias: None, residual: None }])));
        let bare = Product { bias: None, residual: None, ..product };
        assert!(is_refused(|| run(&[], usize::MAX / 8 + 1, &[bare])), "as many values as none, once they overflow");
        for up in [&other_n, &other_k] {
            assert!(is_refused(|| multiply_gated(isa, &pool, Activation::Silu, &x, 3, &weight, up)));
        }
        assert!(is_refused(|| multiply_gated(isa, &pool, Activation::Silu, &x, 2, &weight, &weight)));
        for (gate, inner) in [(&weight, 20), (&bf16, 20)] {
            for (k, rows) in [(inner, 3), (inner + 1, 3), (inner, 2)] {
                for packing in [PackedMatrix::from_f32, PackedMatrix::from_f32_rounded] {
                    let down = packing(&vec![1.0; 5 * k], 5, k).unwrap();
                    let down = Product { weight: &down, bias: None, residual: None };
                    let refused = is_refused(|| multiply_mlp(isa, &pool, Activation::Silu, &x, rows, [gate; 2], down));
                    assert_eq!(refused, (k, rows) != (inner, 3), "{k} {rows}");
                }
            }
        }
    }
}
