//! Forward passes over rows that a test has at hand, by a backend's serving and tuning kernels.

use candle_core::Tensor;
use softserve::{
    kernels::{
        KvCache,
        cross::EncodedBatch,
        layout::{BLOCK_SIZE, BatchLayout, Segment},
    },
    model::Model,
};

/// The logits of `wanted` rows of whole sequences of these lengths, `[wanted, vocab]`, by the tuning kernels.
pub fn by_tuning(model: &Model, x: &Tensor, lengths: &[usize], wanted: &[u32]) -> Tensor {
    with_encoded(model, x, lengths, wanted, None)
}

/// As [`by_tuning`], with what an encoder made of each sequence's input.
pub fn with_encoded(
    model: &Model,
    x: &Tensor,
    lengths: &[usize],
    wanted: &[u32],
    encoded: Option<EncodedBatch>,
) -> Tensor {
    let batch = BatchLayout { wanted: wanted.to_vec(), ..BatchLayout::of_lengths(0, lengths) };
    let mut kernels = model.backend().tuning().kernels(&batch, None, encoded).unwrap();
    let hidden = model.forward(x, &batch, kernels.as_mut()).unwrap();
    model.logits(&hidden, kernels.as_mut()).unwrap()
}

/// A key-value cache for one sequence of `positions`.
pub fn cache(model: &Model, positions: usize) -> Box<dyn KvCache> {
    model.backend().kv_cache(model.kv_shape(), positions.div_ceil(BLOCK_SIZE)).unwrap()
}

/// The logits of `wanted` rows `[wanted, vocab]` by the serving kernels: `x` are the rows from `start` of the one
/// sequence in this cache, whose blocks lie there from the last to the first.
pub fn by_serving(model: &Model, cache: &mut dyn KvCache, x: &Tensor, start: usize, wanted: &[u32]) -> Tensor {
    let blocks = (0..cache.num_blocks() as u32).rev().collect();
    let segments = vec![Segment::new(x.dims()[0], start, blocks)];
    let batch = BatchLayout { segments, wanted: wanted.to_vec(), ..Default::default() };
    let mut kernels = model.backend().serving(cache, &batch, &[]).unwrap();
    let hidden = model.forward(x, &batch, kernels.as_mut()).unwrap();
    model.logits(&hidden, kernels.as_mut()).unwrap()
}

/// The values of a tensor, one behind the other.
pub fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}
