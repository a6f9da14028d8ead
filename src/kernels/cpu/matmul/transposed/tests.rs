//! Products with quantised matrices held against plain sums, against each other, and against themselves with other rows and
//! threads.

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::*;
use crate::kernels::quantized::tests::{FORMATS, modest_blocks};

fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// The matrix as blocks and as integers (blocks again of a format of floats), and its values.
fn matrix(format: BlockFormat, n: usize, k: usize, seed: u64) -> ([PackedMatrix; 2], Vec<f32>) {
    let bytes = modest_blocks(format, n, k, seed);
    let mut values = vec![0f32; n * k];
    format.dequantize(&bytes, &mut values);
    let integers = PackedMatrix::from_blocks_as_integers(format, bytes.clone(), n, k).unwrap();
    ([PackedMatrix::from_blocks(format, bytes, n, k), integers], values)
}

/// Rows, `n`, and `k` in units of a block (or 33 floats): one chunk of rows and less, and several; Miri gets the smaller ones.
const SHAPES: &[(usize, usize, usize)] = &[
    (1, 1, 1),
    (3, 16, 2),
    #[cfg(not(miri))]
    (7, 300, 1),
    #[cfg(not(miri))]
    (33, 515, 3),
];

#[test]
fn products_are_those_of_the_blocks_values_however_they_are_kept() {
    let pool = Pool::new(3);
    for (format, _) in FORMATS {
        for &(rows, n, units) in SHAPES {
            let k = units * if format.values() == 1 { 33 } else { format.values() };
            let (matrices, values) = matrix(format, n, k, 2);
            let x = random(rows * n, 1);
            for isa in Isa::available() {
                let [blocks, integers] =
                    matrices.each_ref().map(|m| QuantisedMatrix::of(m).unwrap().multiply(isa, &pool, &x, rows));
                let what = format!("{format:?} {isa:?} {rows} {n} {k}");
                assert!(bits(&blocks) == bits(&integers), "{what}");
                for row in 0..rows {
                    for column in 0..k {
                        let product = |i: usize| f64::from(x[row * n + i]) * f64::from(values[i * k + column]);
                        let exact: f64 = (0..n).map(product).sum();
                        let size: f64 = (0..n).map(|i| product(i).abs()).sum();
                        let found = f64::from(blocks[row * k + column]);
                        assert!((found - exact).abs() <= 1e-5 * size, "{what}: {found} {exact} at {row}, {column}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_is_the_same_bit_for_bit_alone_and_among_others_on_any_number_of_threads() {
    let shapes = if cfg!(miri) { [(5, 20, 1)].as_slice() } else { &[(70, 40, 2), (150, 300, 1)] };
    for format in [BlockFormat::F16, BlockFormat::Q4_0, BlockFormat::Q5_1, BlockFormat::Q8_0, BlockFormat::Q6K] {
        for &(rows, n, units) in shapes {
            let k = units * if format.values() == 1 { 33 } else { format.values() };
            let (matrices, _) = matrix(format, n, k, 5);
            let x = random(rows * n, 6);
            for isa in Isa::available() {
                for matrix in &matrices {
                    let matrix = QuantisedMatrix::of(matrix).unwrap();
                    let all = matrix.multiply(isa, &Pool::new(2), &x, rows);
                    let what = format!("{format:?} {isa:?} {rows} {n} {k}");
                    for threads in [1, 3, 8] {
                        let pool = Pool::new(threads);
                        assert!(bits(&matrix.multiply(isa, &pool, &x, rows)) == bits(&all), "{what}, {threads}");
                    }
                    let pool = Pool::new(2);
                    for own in [0..1, 3..5, 1..5, rows / 2..rows, rows - 1..rows] {
                        let part = &x[own.start * n..own.end * n];
                        let found = matrix.multiply(isa, &pool, part, own.len());
                        assert!(bits(&found) == bits(&all[own.start * k..own.end * k]), "{what}, {own:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_and_no_rows_are_no_result() {
    let pool = Pool::new(2);
    let (matrices, _) = matrix(BlockFormat::Q4K, 20, 256, 1);
    let x = random(3 * 20, 1);
    for matrix in &matrices {
        let matrix = QuantisedMatrix::of(matrix).unwrap();
        let run = |x: &[f32], rows| {
            let run = || matrix.multiply(Isa::best(), &pool, x, rows).len();
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).ok()
        };
        assert_eq!(run(&x, 3), Some(3 * 256));
        assert_eq!(run(&[], 0), Some(0));
        for (x, rows) in [(&x[1..], 3), (&x[..], 4), (&x[..], 2), (&[], usize::MAX / 20 + 1)] {
            assert_eq!(run(x, rows), None, "{rows}");
        }
    }
    let floats = PackedMatrix::from_f32(&[1.0; 6], 2, 3).unwrap();
    assert!(QuantisedMatrix::of(&floats).is_none());
}
