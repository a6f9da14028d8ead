//! Integer products against plain ones: the values of ggml's blocks, and sums in f64 of rounded activations.

use proptest::prelude::*;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::{
    super::{
        Buffer, Isa, PackedMatrix,
        matmul::{Product, multiply, multiply_gated},
        pool,
    },
    Group, STRIPE, Scheme, quantise,
};
use crate::kernels::{
    Activation,
    quantized::{
        BlockFormat,
        tests::{FORMATS, modest_blocks, random_blocks},
    },
    stored::StoredBytes,
};

fn random_values(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-3.0..3.0)).collect()
}

fn quantised_formats() -> impl Iterator<Item = BlockFormat> {
    FORMATS.into_iter().map(|(format, _)| format).filter(|format| Scheme::of(*format).is_some())
}

/// `x` as the products see it.
fn rounded(x: &[f32], k: usize) -> Vec<f32> {
    let mut scratch = Buffer::empty();
    let groups = quantise(Isa::PORTABLE, pool::global(), x, k, &mut scratch);
    // SAFETY: there is a group for each 32 values, and the scratch lives on.
    let groups: &[Group] = unsafe { std::slice::from_raw_parts(groups, x.len() / STRIPE) };
    let value = |group: &Group, j: usize| f32::from(group.codes[j]) * group.scales[2 * j / STRIPE];
    groups.iter().flat_map(|group| (0..STRIPE).map(move |j| value(group, j))).collect()
}

#[test]
fn what_is_in_a_file_is_packed_a_piece_at_a_time_to_what_it_is_in_memory() {
    let (format, n, k) = (BlockFormat::Q4K, 2007, 512);
    let bytes = random_blocks(format, n, k, 6);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blocks");
    std::fs::write(&path, [&[1; 64], bytes.as_slice()].concat()).unwrap();
    let stored = StoredBytes::File { path: path.as_path().into(), offset: 64, len: bytes.len() };
    let rows = |matrix: PackedMatrix| {
        let mut values = vec![0f32; n * k];
        values.chunks_exact_mut(k).enumerate().for_each(|(i, row)| matrix.row(i, row));
        values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    // On this thread, where allocations are counted.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build().unwrap();
    let mut packed = None;
    let info = allocation_counter::measure(|| {
        packed = pool.install(|| PackedMatrix::from_blocks_as_integers(format, stored.clone(), n, k).ok());
    });
    assert!(info.bytes_max < bytes.len() as u64 / 2, "{} for {}", info.bytes_max, bytes.len());
    let memory = PackedMatrix::from_blocks_as_integers(format, bytes.clone(), n, k).unwrap();
    assert!(rows(packed.unwrap()) == rows(memory));
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    assert!(PackedMatrix::from_blocks_as_integers(format, stored, n, k).is_err());
}

#[test]
fn rows_are_the_values_of_their_blocks_bit_for_bit() {
    for format in quantised_formats() {
        for (n, k) in [(1, 256), (17, 512), (16, 768)] {
            // Also values that are not finite are what they were.
            let bytes = random_blocks(format, n, k, 5);
            let matrix = PackedMatrix::from_blocks_as_integers(format, bytes.clone(), n, k).unwrap();
            let mut plain = vec![0f32; n * k];
            format.dequantize(&bytes, &mut plain);
            let mut row = vec![0f32; k];
            for i in 0..n {
                matrix.row(i, &mut row);
                for (j, (a, b)) in row.iter().zip(&plain[i * k..]).enumerate() {
                    assert_eq!(a.to_bits(), b.to_bits(), "{format:?}, row {i} of {n}, value {j}: {a} and {b}");
                }
            }
        }
    }
}

#[test]
fn activations_are_rounded_to_a_hundred_and_twenty_seventh_of_their_groups_largest() {
    let k = 96;
    let mut x = random_values(5 * k, 3);
    x[40] = 1e30;
    x[k..k + STRIPE].fill(0.0);
    x[2 * k..2 * k + STRIPE].fill(1e-42);
    for isa in Isa::available() {
        let mut scratch = Buffer::empty();
        let groups = quantise(isa, pool::global(), &x, k, &mut scratch);
        assert!(groups.is_aligned());
        for (i, values) in x.chunks(STRIPE).enumerate() {
            // SAFETY: there is a group for each 32 values.
            let group = unsafe { *groups.add(i) };
            for (half, values) in values.chunks(STRIPE / 2).enumerate() {
                let largest = values.iter().fold(0f32, |m, x| m.max(x.abs()));
                for (code, x) in group.codes[half * STRIPE / 2..].iter().zip(values) {
                    let error = (f32::from(*code) * group.scales[half] - x).abs();
                    assert!(error <= largest / 127.0 * 0.501 || largest < 1e-37, "{isa:?}: {code} of {x}, {largest}");
                }
            }
            let sum = |codes: &[i8]| codes.iter().map(|&x| i32::from(x)).sum::<i32>();
            assert_eq!(group.sums, [sum(&group.codes[..16]), sum(&group.codes[16..])]);
            let values = [0, 1].map(|half| group.sums[half] as f32 * group.scales[half]);
            assert_eq!((group.values, group.value), (values, values[0] + values[1]));
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = x.clone();
            x[70] = bad;
            let groups = quantise(isa, pool::global(), &x, k, &mut scratch);
            // SAFETY: there is a group for each 32 values.
            let group = unsafe { *groups.add(2) };
            assert!(group.scales[0].is_nan() && group.value.is_nan(), "{isa:?}: {group:?}");
        }
    }
}

#[test]
fn products_are_those_of_the_rounded_activations_and_a_row_does_not_depend_on_others() {
    let (rows, n, k) = (35, 37, 512);
    let x = random_values(rows * k, 7);
    let seen = rounded(&x, k);
    for format in quantised_formats() {
        let bytes = modest_blocks(format, n, k, 11);
        let mut plain = vec![0f32; n * k];
        format.dequantize(&bytes, &mut plain);
        let weight = PackedMatrix::from_blocks_as_integers(format, bytes, n, k).unwrap();
        let product = Product { weight: &weight, bias: None, residual: None };
        for isa in Isa::available() {
            let all = multiply(isa, pool::global(), &x, rows, &[product]).remove(0);
            for row in 0..rows {
                for column in 0..n {
                    let (w, x) = (&plain[column * k..][..k], &seen[row * k..][..k]);
                    let exact: f64 = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                    let size: f64 = w.iter().zip(x).map(|(w, x)| (f64::from(*w) * f64::from(*x)).abs()).sum();
                    let found = f64::from(all[row * n + column]);
                    assert!((found - exact).abs() <= 2e-5 * size, "{format:?} {isa:?} {row} {column}: {found} {exact}");
                }
            }
            for range in [0..1, 3..5, 8..16, 20..35] {
                let part = &x[range.start * k..range.end * k];
                let part = multiply(isa, pool::global(), part, range.len(), &[product]).remove(0);
                assert_eq!(part, all[range.start * n..range.end * n], "{format:?} {isa:?} rows {range:?}");
            }
        }
    }
}

#[test]
fn matrices_of_other_kinds_beside_them_are_multiplied_as_by_themselves() {
    let (rows, n, k) = (3, 20, 256);
    let x = random_values(rows * k, 1);
    let of =
        |format, seed| PackedMatrix::from_blocks_as_integers(format, modest_blocks(format, n, k, seed), n, k).unwrap();
    let float = PackedMatrix::from_blocks_as_integers(
        BlockFormat::F16,
        random_values(n * k, 9).iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect::<Vec<u8>>(),
        n,
        k,
    );
    let all = [of(BlockFormat::Q4K, 1), of(BlockFormat::Q6K, 2), float.unwrap()];
    let isa = Isa::best();
    let products = all.each_ref().map(|weight| Product { weight, bias: None, residual: None });
    let together = multiply(isa, pool::global(), &x, rows, &products);
    for (product, together) in products.iter().zip(&together) {
        assert_eq!(multiply(isa, pool::global(), &x, rows, &[*product])[0], *together);
    }
    for [gate, up] in [[0, 1], [0, 2], [2, 1]] {
        let gated = multiply_gated(isa, pool::global(), Activation::Silu, &x, rows, &all[gate], &all[up]);
        for ((gate, up), found) in together[gate].iter().zip(&together[up]).zip(gated) {
            let exact = f64::from(*gate) / (1.0 + f64::from(-gate).exp()) * f64::from(*up);
            assert!((f64::from(found) - exact).abs() <= 1e-5 * (1.0 + exact.abs()), "{found} {exact}");
        }
    }
}

proptest! {
    #[test]
    fn any_shape_is_multiplied(rows in 1usize..40, n in 1usize..70, blocks_of_k in 1usize..4, which in 0usize..10, seed in 0u64..100) {
        let format = quantised_formats().nth(which).unwrap();
        let k = blocks_of_k * format.values();
        let bytes = modest_blocks(format, n, k, seed);
        let x = random_values(rows * k, seed);
        let exact = PackedMatrix::from_blocks(format, bytes.clone(), n, k);
        let weight = PackedMatrix::from_blocks_as_integers(format, bytes, n, k).unwrap();
        let seen = rounded(&x, k);
        let found = multiply(Isa::best(), pool::global(), &x, rows, &[Product { weight: &weight, bias: None, residual: None }]);
        let plain = multiply(Isa::best(), pool::global(), &seen, rows, &[Product { weight: &exact, bias: None, residual: None }]);
        let size = plain[0].iter().fold(1e-3f32, |m, x| m.max(x.abs()));
        for (a, b) in found[0].iter().zip(&plain[0]) {
            prop_assert!((a - b).abs() <= 1e-3 * size, "{a} {b}");
        }
    }
}
