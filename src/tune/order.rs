//! The order of the examples, from the seed and a place in it alone: nothing to save, so a run
//! that is resumed sees what an uninterrupted one sees.

use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

/// The stream of the held-out split.
pub const SPLIT: u64 = u64::MAX;
/// The stream of the initial values.
pub const INIT: u64 = u64::MAX - 1;
/// The stream of the examples that a sweep is judged by.
pub const SWEEP: u64 = u64::MAX - 3;
/// The stream of an encoder's initial weights.
pub const ENCODER: u64 = u64::MAX - 2;
/// The stream of the examples that are put into the context.
pub const SHOTS: u64 = u64::MAX - 3;
/// The first of the streams of what is varied, one for each forward pass.
pub const VARIATION: u64 = 1 << 63;

/// A generator for one purpose, independent of those for others.
pub fn rng(seed: u64, stream: u64) -> StdRng {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&stream.to_le_bytes());
    StdRng::from_seed(bytes)
}

/// 0…n-1 in the order of a stream.
pub fn shuffled(n: usize, seed: u64, stream: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(&mut rng(seed, stream));
    order
}

/// Batch `index` of `size` out of `n` examples: all of them in a new order each time round, the
/// rounds one after another without a gap.
pub fn batch(n: usize, size: usize, index: usize, seed: u64) -> Vec<usize> {
    let places = index * size..(index + 1) * size;
    let mut round = (usize::MAX, Vec::new());
    places
        .map(|place| {
            if round.0 != place / n {
                round = (place / n, shuffled(n, seed, (place / n) as u64));
            }
            round.1[place % n]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_round_has_every_example_once_and_another_order() {
        let places: Vec<usize> = (0..5).flat_map(|i| batch(10, 4, i, 7)).collect();
        let (mut first, mut second) = (places[..10].to_vec(), places[10..].to_vec());
        assert_ne!(first, second);
        first.sort_unstable();
        second.sort_unstable();
        assert_eq!(first, (0..10).collect::<Vec<_>>());
        assert_eq!(second, first);
        assert_eq!(batch(10, 4, 3, 7), places[12..16]);
        assert_ne!(batch(10, 4, 3, 8), places[12..16]);
    }
}
