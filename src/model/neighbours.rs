//! Which tokens' embeddings point the same way as some rows: the vocabulary is compared a chunk at a time, so that
//! whoever owns the device can do other work in between.

use std::mem;

use candle_core::{DType, Device, Result, Tensor};

use super::Model;

/// The most tokens of a chunk.
const MAX_TOKENS: usize = 4096;

/// The most pairs of a row and a token that a chunk compares, unless there are very many rows: what others wait for is
/// bounded for long prompts too.
const MAX_PAIRS: usize = 1 << 19;

/// A comparison of rows with the vocabulary's embeddings: what has been found so far.
#[derive(Debug)]
pub struct Neighbours {
    /// `[rows, hidden]`, f32, on the host.
    rows: Tensor,
    /// How many tokens are kept of each row.
    count: usize,
    /// How many tokens are compared at once.
    chunk: u32,
    /// The first token that has not been compared yet, and how many there are.
    next: u32,
    num_tokens: u32,
    vocabulary_norms: Vec<f32>,
    /// Ids with their dot product with the row over their own length: in the order of the cosine similarity.
    nearest: Vec<Vec<(u32, f32)>>,
}

/// What a comparison found.
#[derive(Debug, Clone, PartialEq)]
pub struct Nearest {
    /// The norm of each row.
    pub norms: Vec<f32>,
    /// Of each row the tokens with the highest cosine similarity and that similarity, the nearest first.
    pub nearest: Vec<Vec<(u32, f32)>>,
    /// The norm of each token's embedding, by id.
    pub vocabulary_norms: Vec<f32>,
}

impl Neighbours {
    /// Begins to compare rows `[rows, hidden]` that lie on the host with the first `num_tokens` tokens; `count` of them
    /// are kept of each row. Touches no other device.
    ///
    /// # Errors
    /// The rows are no matrix.
    pub fn new(rows: &Tensor, num_tokens: usize, count: usize) -> Result<Self> {
        let num_rows = rows.dims2()?.0;
        Ok(Self {
            rows: rows.to_dtype(DType::F32)?,
            count,
            chunk: (MAX_PAIRS / num_rows.max(1)).clamp(16, MAX_TOKENS) as u32,
            next: 0,
            num_tokens: u32::try_from(num_tokens).unwrap_or(u32::MAX),
            vocabulary_norms: Vec::new(),
            nearest: vec![Vec::new(); num_rows],
        })
    }

    /// Compares the next chunk of the vocabulary as the model embeds it. After the last one, what was found.
    ///
    /// # Errors
    /// The device fails, or the rows are not as wide as the model's.
    pub fn compare_chunk(&mut self, model: &Model) -> Result<Option<Nearest>> {
        let end = self.num_tokens.min(self.next.saturating_add(self.chunk));
        if self.next < end {
            let ids = Tensor::arange(self.next, end, &Device::Cpu)?;
            let embedded = model.embed(&ids)?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            let lengths = lengths(&embedded)?;
            let along = self.rows.matmul(&embedded.t()?)?.broadcast_div(&at_least_tiny(&lengths.t()?)?)?;
            self.vocabulary_norms.extend(lengths.flatten_all()?.to_vec1::<f32>()?);
            let along = along.flatten_all()?.to_vec1::<f32>()?;
            let mut scratch = Vec::new();
            for (best, along) in self.nearest.iter_mut().zip(along.chunks(ids.elem_count())) {
                keep_best(best, (self.next..).zip(along.iter().copied()), self.count, &mut scratch);
            }
            self.next = end;
        }
        if self.next < self.num_tokens { Ok(None) } else { self.finish().map(Some) }
    }

    fn finish(&mut self) -> Result<Nearest> {
        let lengths = lengths(&self.rows)?;
        let norms = lengths.flatten_all()?.to_vec1::<f32>()?;
        let divisors = at_least_tiny(&lengths)?.flatten_all()?.to_vec1::<f32>()?;
        let mut nearest = mem::take(&mut self.nearest);
        for (best, divisor) in nearest.iter_mut().zip(divisors) {
            best.iter_mut().for_each(|(_, along)| *along /= divisor);
        }
        Ok(Nearest { norms, nearest, vocabulary_norms: mem::take(&mut self.vocabulary_norms) })
    }
}

/// The length of each row, `[rows, 1]`.
fn lengths(rows: &Tensor) -> Result<Tensor> {
    rows.sqr()?.sum_keepdim(1)?.sqrt()
}

/// Lengths to divide by: a row of zeros has a similarity of zero.
fn at_least_tiny(lengths: &Tensor) -> Result<Tensor> {
    lengths.clamp(f32::MIN_POSITIVE, f32::MAX)
}

/// Adds candidates to the `count` best, which stay sorted; of equal ones the lower id goes first.
fn keep_best(
    best: &mut Vec<(u32, f32)>,
    candidates: impl Iterator<Item = (u32, f32)>,
    count: usize,
    scratch: &mut Vec<(u32, f32)>,
) {
    let Some(last) = count.checked_sub(1) else { return };
    // Most candidates of later chunks are worse than all that is kept.
    let bar = best.get(last).map(|(_, value)| *value);
    scratch.clear();
    scratch.extend(candidates.filter(|(_, value)| bar.is_none_or(|bar| value.total_cmp(&bar).is_gt())));
    if scratch.is_empty() {
        return;
    }
    scratch.append(best);
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if scratch.len() > count {
        scratch.select_nth_unstable_by(last, order);
        scratch.truncate(count);
    }
    scratch.sort_unstable_by(order);
    best.extend_from_slice(scratch);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_several_chunks_are_those_of_all_at_once() {
        let values: Vec<(u32, f32)> = (0..1000).map(|i| (i, ((i * 37) % 101) as f32)).collect();
        let mut sorted = values.clone();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
        for count in [0, 1, 5, 20, 2000] {
            let (mut best, mut scratch) = (Vec::new(), Vec::new());
            values.chunks(130).for_each(|chunk| keep_best(&mut best, chunk.iter().copied(), count, &mut scratch));
            assert_eq!(best, sorted[..count.min(1000)], "{count}");
        }
    }
}
