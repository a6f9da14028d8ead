//! Which rows each sequence of a batch has, and which keys each of its queries sees.

use std::ops::Range;

use crate::kernels::{AttentionParams, layout::BatchLayout};

/// Sequences in packed rows: first those that all share, then each one's own.
#[derive(Debug, Clone)]
pub struct Sequences {
    prefix: usize,
    own: Vec<Range<usize>>,
}

/// The queries of one sequence and the keys that they see some of. The keys are numbered from 0: the shared ones first,
/// then its own.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The queries' rows.
    pub rows: Range<usize>,
    /// How many of the shared rows are keys.
    pub shared: usize,
    /// The keys after them.
    pub own: Range<usize>,
    /// Of each query, the numbers of the keys that it sees.
    pub visible: Vec<Range<usize>>,
    /// The number of the first query's own key, if queries are keys, too.
    pub place: usize,
}

impl Sequences {
    /// The sequences of a batch.
    pub fn new(batch: &BatchLayout) -> Self {
        Self { prefix: batch.shared, own: batch.rows().collect() }
    }

    /// How many sequences there are, the shared rows aside.
    pub fn len(&self) -> usize {
        self.own.len()
    }

    /// What each row sees of its own sequence, the shared rows' first.
    pub fn seen(&self, params: &AttentionParams) -> Vec<Seen> {
        let of = |shared: usize, own: &Range<usize>| {
            let all = shared + own.len();
            let visible = |i: usize| {
                let end = if params.causal { shared + i + 1 } else { all };
                params.window.map_or(0, |window| end.saturating_sub(window))..end
            };
            let visible = (0..own.len()).map(visible).collect();
            Seen { rows: own.clone(), shared, own: own.clone(), visible, place: shared }
        };
        let first = (self.prefix > 0).then(|| of(0, &(0..self.prefix)));
        first.into_iter().chain(self.own.iter().map(|own| of(self.prefix, own))).collect()
    }

    /// What each row sees of other rows, `inputs`, one for each sequence: all of it. Shared rows see none.
    pub fn seen_of(&self, inputs: &[Range<usize>]) -> Vec<Seen> {
        let all = |rows: Range<usize>, input: Range<usize>| {
            let visible = vec![0..input.len(); rows.len()];
            Seen { rows, shared: 0, own: input, visible, place: 0 }
        };
        let first = (self.prefix > 0).then(|| all(0..self.prefix, 0..0));
        let own = self.own.iter().zip(inputs).map(|(own, input)| all(own.clone(), input.clone()));
        first.into_iter().chain(own).collect()
    }
}

impl Seen {
    /// The rows of the keys, in the order of their numbers.
    pub fn keys(&self) -> impl Iterator<Item = usize> + Clone + use<> {
        (0..self.shared).chain(self.own.clone())
    }

    /// How many keys there are.
    pub fn num_keys(&self) -> usize {
        self.shared + self.own.len()
    }
}
