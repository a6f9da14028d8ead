//! T5's relative position bias (Raffel et al. 2020, section 2.1): distances in buckets, a number for
//! each bucket and head.

use candle_core::{DType, Result, Tensor};

use super::config::RelativeBias;
use crate::kernels::relative_position_bias::RelativePositionBias;

/// The bias of a table `[buckets, heads]`, for keys on both sides of a query or on one.
pub fn relative_position_bias(table: &Tensor, config: RelativeBias, causal: bool) -> Result<RelativePositionBias> {
    let heads = table.dim(1)?;
    let table = table.to_device(&candle_core::Device::Cpu)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    Ok(RelativePositionBias::new(heads, config.max_distance, |head, distance| {
        table[bucket(config, causal, distance)][head]
    }))
}

/// The bucket of a key that lies `distance` positions after the query, as transformers'
/// `T5Attention._relative_position_bucket` has it.
fn bucket(config: RelativeBias, causal: bool, distance: isize) -> usize {
    let away = distance.unsigned_abs();
    // A causal query has no keys after it; else the upper half of the buckets is for those.
    let (buckets, first, away) = match (causal, distance > 0) {
        (true, true) => (config.buckets, 0, 0),
        (true, false) => (config.buckets, 0, away),
        (false, after) => (config.buckets / 2, if after { config.buckets / 2 } else { 0 }, away),
    };
    let exact = buckets / 2;
    if away < exact {
        return first + away;
    }
    // In f32, as there.
    let share = (away as f32 / exact as f32).ln() / (config.max_distance as f64 / exact as f64).ln() as f32;
    let far = exact + (share * (buckets - exact) as f32) as usize;
    first + far.min(buckets - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_those_of_transformers() {
        let usual = RelativeBias { buckets: 32, max_distance: 128 };
        let small = RelativeBias { buckets: 8, max_distance: 20 };
        // The first distance of each bucket, as transformers 5.23 has them.
        let both = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91];
        let past: Vec<usize> = (0..17).chain([19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]).collect();
        for (config, causal, firsts) in [
            (usual, false, both.to_vec()),
            (usual, true, past),
            (small, false, vec![0, 1, 2, 7]),
            (small, true, vec![0, 1, 2, 3, 4, 6, 9, 14]),
        ] {
            for away in 0..3 * config.max_distance {
                let expected = firsts.iter().filter(|&&first| first <= away).count() - 1;
                let found = bucket(config, causal, -(away as isize));
                assert_eq!(found, expected, "{config:?} {causal} {away}");
                let after = bucket(config, causal, away as isize);
                let expected = if causal || away == 0 { 0 } else { config.buckets / 2 + expected };
                assert_eq!(after, expected, "{config:?} {causal} {away} after");
            }
        }
    }
}
