//! Random values: normal, quick to draw and the same on every machine.

use std::sync::OnceLock;

use half::bf16;
use rayon::prelude::*;
use sha2::{Digest as _, Sha256};

/// Changes with anything that changes the weights.
pub(super) const GENERATION: &str = "softserve random weights 1";

const STANDARD_DEVIATION: f64 = 0.02;

/// Bytes that one task of the thread pool fills; part of what the weights are.
const CHUNK: usize = 1 << 20;

/// Fills with bf16 values, the same for the same name. Half a billion of them should take a second, so
/// each is one of 65,536 that were drawn beforehand, picked by 16 random bits.
pub(super) fn fill_normal(bytes: &mut [u8], name: &str) {
    let seed = seed(name);
    let table = normal_table();
    bytes.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| {
        let mut random = SplitMix(seed.wrapping_add((i as u64).wrapping_mul(0xD134_2543_DE82_EF95)));
        for four in chunk.chunks_mut(8) {
            let mut bits = random.next();
            for value in four.chunks_exact_mut(2) {
                value.copy_from_slice(&table[(bits & 0xFFFF) as usize].to_le_bytes());
                bits >>= 16;
            }
        }
    });
}

fn seed(name: &str) -> u64 {
    let digest = Sha256::new().chain_update(GENERATION).chain_update(name).finalize();
    digest.iter().take(8).fold(0, |seed, byte| seed << 8 | u64::from(*byte))
}

fn normal_table() -> &'static [bf16] {
    static TABLE: OnceLock<Vec<bf16>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut random = SplitMix(0);
        // (0, 1], as the logarithm needs.
        let mut uniform = || ((random.next() >> 11) + 1) as f64 / (1u64 << 53) as f64;
        let pair = |_| {
            // Box and Muller 1958
            let (radius, angle) = ((-2.0 * uniform().ln()).sqrt(), std::f64::consts::TAU * uniform());
            [radius * angle.cos(), radius * angle.sin()]
        };
        (0..1 << 15).flat_map(pair).map(|z| bf16::from_f64(STANDARD_DEVIATION * z)).collect()
    })
}

/// SplitMix64 (Steele et al. 2014): small, quick and the same for ever, as `rand`'s generators are not.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_normal_and_the_same_every_time() {
        let draw = |name: &str| {
            let mut bytes = vec![0; 2 * 1100 * 1000];
            fill_normal(&mut bytes, name);
            bytes
        };
        let (once, again, other) = (draw("a"), draw("a"), draw("b"));
        assert!(once == again && once != other);
        let values: Vec<f64> = once.chunks(2).map(|v| bf16::from_le_bytes([v[0], v[1]]).to_f64()).collect();
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let deviation = (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt();
        let within = values.iter().filter(|x| x.abs() < STANDARD_DEVIATION).count() as f64 / n;
        assert!(mean.abs() < 2e-4 && (deviation / STANDARD_DEVIATION - 1.0).abs() < 0.02, "{mean} {deviation}");
        assert!((within - 0.683).abs() < 0.01, "{within} lie within one standard deviation");
    }
}
