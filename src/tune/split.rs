//! Which examples are held out, and parts of about one size: by the seed, with equal inputs on one side.

use std::collections::HashMap;

use super::order;
use crate::examples::TokenizedExample;
use crate::packing::InputToken;

/// Fewer examples than this are not split: they are all needed for training.
pub const SPLIT_FROM: usize = 40;

/// The smallest held-out part of a split.
const SPLIT_AT_LEAST: usize = 8;

/// Which of `examples` are held out: a tenth, at least 8, chosen by `seed`; none where there are
/// fewer than [`SPLIT_FROM`]. Examples with the same input stay on one side.
pub fn held_out(examples: &[TokenizedExample], seed: u64) -> Vec<bool> {
    let mut out = vec![false; examples.len()];
    if examples.len() < SPLIT_FROM {
        return out;
    }
    let wanted = (examples.len() / 10).max(SPLIT_AT_LEAST);
    let mut same: HashMap<&[InputToken], Vec<usize>> = HashMap::new();
    for (i, example) in examples.iter().enumerate() {
        same.entry(&example.input).or_default().push(i);
    }
    let mut taken = 0;
    for i in order::shuffled(examples.len(), seed, order::SPLIT) {
        let group = &same[examples[i].input.as_slice()];
        // A large group would take far more than was wanted.
        if taken < wanted && group[0] == i && taken + group.len() <= 2 * wanted {
            group.iter().for_each(|&j| out[j] = true);
            taken += group.len();
        }
    }
    out
}

/// Splits `examples` into `n` parts of about one size, by `seed`: the part of each example. Examples with the same input are
/// in one part.
pub fn parts(examples: &[TokenizedExample], n: usize, seed: u64) -> Vec<usize> {
    let mut part_of: HashMap<&[InputToken], usize> = HashMap::new();
    let mut parts = vec![0; examples.len()];
    for i in order::shuffled(examples.len(), seed, order::SWEEP) {
        let next = part_of.len() % n.max(1);
        parts[i] = *part_of.entry(&examples[i].input).or_insert(next);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_keeps_equal_inputs_on_one_side_and_takes_a_tenth_but_at_least_eight() {
        let example = |i: u32| TokenizedExample::of_ids(&[i / 2], vec![1]);
        let few: Vec<_> = (0..39).map(example).collect();
        assert!(held_out(&few, 1).iter().all(|&out| !out));
        let many: Vec<_> = (0..100).map(example).collect();
        let out = held_out(&many, 1);
        assert_eq!(out.iter().filter(|&&o| o).count(), 10);
        assert!(out.chunks(2).all(|pair| pair[0] == pair[1]));
        assert_ne!(out, held_out(&many, 2));
    }
}
