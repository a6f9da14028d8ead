//! Attention refuses what would have a kernel read or write out of bounds, or two threads meet in one block.

use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::DType;

use super::*;
use crate::kernels::layout::KvShape;

const SHAPE: KvShape = KvShape { num_layers: 2, num_kv_heads: 2, head_dim: 20, dtype: DType::F32 };
const HEADS: usize = 4;

fn segment(rows: usize, start: usize, blocks: &[u32]) -> Segment {
    Segment::new(rows, start, blocks.to_vec())
}

/// What attention of these segments answers, over a cache of eight blocks; `None` if it panics. `change` may
/// spoil what fits.
fn attended(shape: KvShape, segments: &[Segment], layer: usize, change: impl Fn(&mut Rows)) -> Option<Vec<f32>> {
    let rows: usize = segments.iter().map(|s| s.rows).sum();
    let params = AttentionParams::scaled(0.5);
    let (q, k) = (vec![0.5; rows * HEADS * shape.head_dim], vec![0.25; rows * shape.num_kv_heads * shape.head_dim]);
    let mut cache = CpuKvCache::new(shape, 8).unwrap();
    let mut rows = Rows { q: &q, k: &k, v: &k, heads: HEADS, params: &params };
    change(&mut rows);
    let pool = Pool::new(2);
    let run = |isa| catch_unwind(AssertUnwindSafe(|| attend(isa, &pool, &mut cache, layer, segments, rows))).ok();
    let mut all: Vec<_> = Isa::available().into_iter().map(run).collect();
    assert!(all.iter().all(|found| found.is_some() == all[0].is_some()));
    all.swap_remove(0)
}

fn refused(segments: &[Segment]) -> bool {
    [DType::F32, DType::BF16]
        .map(|dtype| attended(KvShape { dtype, ..SHAPE }, segments, 1, |_| ()).is_none())
        .into_iter()
        .reduce(|a, b| {
            assert_eq!(a, b);
            a
        })
        .unwrap()
}

#[test]
fn a_block_that_a_segment_writes_is_in_no_other_place_of_a_block_table() {
    assert!(!refused(&[segment(3, 0, &[0]), segment(40, 0, &[1, 2])]));
    assert!(!refused(&[segment(3, 33, &[0, 1]), segment(5, 33, &[0, 2])]), "both read the first block");
    assert!(!refused(&[segment(3, 0, &[0, 1]), segment(3, 0, &[2, 1])]), "nobody uses the second block yet");
    assert!(refused(&[segment(3, 0, &[0]), segment(40, 0, &[1, 0])]), "both write it");
    assert!(refused(&[segment(1, 30, &[0]), segment(1, 33, &[0, 1])]), "the first writes what the second reads");
    assert!(refused(&[segment(1, 33, &[0, 1]), segment(20, 0, &[0])]), "the second writes what the first reads");
    assert!(refused(&[segment(40, 0, &[3, 3])]), "a segment writes it twice");
    assert!(refused(&[segment(1, 33, &[3, 3])]), "a segment reads what it writes as another position");
}

#[test]
fn blocks_that_a_segment_does_not_have_are_refused() {
    assert!(refused(&[segment(1, 32, &[0])]));
    assert!(refused(&[segment(33, 0, &[0])]));
    assert!(refused(&[segment(0, 0, &[0])]));
    assert!(refused(&[segment(1, 0, &[8])]), "there are eight");
    assert!(refused(&[segment(1, 0, &[0, u32::MAX])]));
    assert!(refused(&[segment(2, usize::MAX, &[0])]), "an end that overflows to 1");
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let one = [segment(3, 0, &[0])];
    let refused = |layer, change: &dyn Fn(&mut Rows)| attended(SHAPE, &one, layer, change).is_none();
    assert!(!refused(1, &|_| ()));
    assert!(refused(2, &|_| ()), "there are two layers");
    assert!(refused(0, &|rows| rows.q = &rows.q[1..]));
    assert!(refused(0, &|rows| rows.k = &rows.k[1..]));
    assert!(refused(0, &|rows| rows.v = &rows.v[1..]));
    assert!(refused(0, &|rows| rows.heads = 3), "not the queries' number of heads");
    assert!(refused(0, &|rows| (rows.heads, rows.q) = (1 << 62, &[])), "a length that overflows to zero");
    for params in [
        AttentionParams { window: Some(0), ..AttentionParams::scaled(1.0) },
        AttentionParams { causal: false, ..AttentionParams::scaled(1.0) },
        AttentionParams { alibi_slopes: Some([1.0; 3].into()), ..AttentionParams::scaled(1.0) },
    ] {
        let params: &'static AttentionParams = Box::leak(Box::new(params));
        assert!(refused(0, &|rows| rows.params = params), "{params:?}");
    }
    for dtype in [DType::F32, DType::BF16] {
        let none = KvShape { head_dim: 0, dtype, ..SHAPE };
        assert!(attended(none, &one, 0, |_| ()).is_none(), "heads without dimensions");
    }
}

#[test]
fn a_cache_whose_offsets_cannot_be_counted_is_an_error() {
    for shape in [
        KvShape { head_dim: usize::MAX, ..SHAPE },
        KvShape { num_layers: usize::MAX / 2, ..SHAPE },
        // The product of these is zero once it overflows.
        KvShape { num_layers: 1 << 32, num_kv_heads: 1 << 32, ..SHAPE },
    ] {
        assert!(CpuKvCache::new(shape, 8).is_err(), "{shape:?}");
    }
    assert!(CpuKvCache::new(SHAPE, usize::MAX / 2).is_err());
}
