//! Scoring continuations: the tree of their tokens, computed as rows after the input.
//!
//! A continuation's token gets its log-probability from the row of the position before it. Continuations that begin
//! alike share these rows: a node of the tree is one token after one beginning, and each node that another token follows
//! is one row. The rows follow the input as a [`TokenTree`](crate::kernels::layout::TokenTree), all in one sequence; only a tree of many rows is cut into
//! several. Last tokens are never computed.

use std::collections::BTreeMap;

use super::error::{MAX_CONTINUATION_TOKENS, MAX_CONTINUATIONS, SubmitError};

/// The most rows of a tree that are computed as one sequence: each row of a tree is compared with each other one.
const MAX_TREE_ROWS: usize = 512;

/// The tree of a request's continuations.
#[derive(Debug, Clone, PartialEq)]
pub struct ScorePlan {
    nodes: Vec<Node>,
    /// For each continuation the node of its last token.
    ends: Vec<usize>,
    /// The nodes that other tokens follow, depth-first; the first is the root, which stands for the input.
    order: Vec<usize>,
    longest: usize,
}

#[derive(Debug, Clone, PartialEq, Default)]
struct Node {
    parent: usize,
    /// The last token of its beginning.
    token: u32,
    /// How many tokens its beginning has.
    depth: usize,
    children: BTreeMap<u32, usize>,
}

/// Rows of the tree that are computed as one sequence, after the input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Their tokens, after those of their ancestors that other parts compute.
    pub tokens: Vec<u32>,
    /// For each of the tokens, how many of them come before it on its path.
    pub depths: Vec<u32>,
    /// How many tokens at the beginning are such ancestors.
    pub num_ancestors: usize,
    /// Where its rows begin in the order of all.
    first: usize,
}

impl ScorePlan {
    /// Lays out continuations of at least one token each.
    ///
    /// # Errors
    /// There is none, one is empty, or there are more than [`MAX_CONTINUATIONS`] or
    /// [`MAX_CONTINUATION_TOKENS`].
    pub fn new(continuations: &[Vec<u32>]) -> Result<Self, SubmitError> {
        if continuations.is_empty() || continuations.iter().any(Vec::is_empty) {
            return Err(SubmitError::Empty);
        }
        let tokens: usize = continuations.iter().map(Vec::len).sum();
        if continuations.len() > MAX_CONTINUATIONS || tokens > MAX_CONTINUATION_TOKENS {
            return Err(SubmitError::TooManyContinuations { continuations: continuations.len(), tokens });
        }
        let mut nodes = vec![Node::default()];
        let mut end = |tokens: &Vec<u32>| {
            tokens.iter().fold(0, |parent, &token| match nodes[parent].children.get(&token) {
                Some(&node) => node,
                None => {
                    let depth = nodes[parent].depth + 1;
                    nodes.push(Node { parent, token, depth, ..Node::default() });
                    let node = nodes.len() - 1;
                    nodes[parent].children.insert(token, node);
                    node
                }
            })
        };
        let ends = continuations.iter().map(&mut end).collect();
        let (mut order, mut open) = (Vec::new(), vec![0]);
        while let Some(node) = open.pop() {
            let Node { children, .. } = &nodes[node];
            if !children.is_empty() {
                order.push(node);
                open.extend(children.values().rev());
            }
        }
        let longest = continuations.iter().map(Vec::len).max().unwrap_or(0);
        Ok(Self { nodes, ends, order, longest })
    }

    /// Cuts the tree into parts of at most `most_rows` tokens; the first has also the input's last row. There is room for
    /// every node with its ancestors where `most_rows` is as much as the [longest](Self::longest) continuation.
    pub fn parts(&self, most_rows: usize) -> Vec<Part> {
        let most_rows = most_rows.min(MAX_TREE_ROWS.max(self.longest));
        let mut parts = vec![Part { tokens: Vec::new(), depths: Vec::new(), num_ancestors: 0, first: 0 }];
        for (i, &index) in self.order.iter().enumerate().skip(1) {
            if parts.last().is_none_or(|part| part.tokens.len() >= most_rows) {
                let ancestors = self.path(self.nodes[index].parent);
                let depths = (0..ancestors.len() as u32).collect();
                let tokens: Vec<u32> = ancestors.iter().map(|&node| self.nodes[node].token).collect();
                parts.push(Part { num_ancestors: tokens.len(), tokens, depths, first: i });
            }
            if let Some(part) = parts.last_mut() {
                part.tokens.push(self.nodes[index].token);
                part.depths.push(self.nodes[index].depth as u32 - 1);
            }
        }
        parts
    }

    /// The nodes from the first token to the last of a node's beginning.
    fn path(&self, node: usize) -> Vec<usize> {
        let up = std::iter::successors(Some(node), |&node| Some(self.nodes[node].parent));
        let mut path: Vec<usize> = up.take_while(|&node| node > 0).collect();
        path.reverse();
        path
    }

    /// The most tokens of a continuation.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// The ids whose log-probabilities are wanted of row `row` of those of a part.
    pub fn wanted(&self, part: &Part, row: usize) -> Vec<u32> {
        self.node(part, row).map_or_else(Vec::new, |node| node.children.keys().copied().collect())
    }

    /// Row 0 of the first part is the input's last row.
    fn node(&self, part: &Part, row: usize) -> Option<&Node> {
        self.nodes.get(*self.order.get(part.first + row)?)
    }

    /// The log-probabilities of nothing yet.
    pub fn begin(&self) -> Scores {
        Scores(vec![f32::NAN; self.nodes.len()])
    }

    /// Records what [`wanted`](Self::wanted) asked of a row.
    pub fn record(&self, scores: &mut Scores, part: &Part, row: usize, log_probs: &[f32]) {
        if let Some(node) = self.node(part, row) {
            node.children.values().zip(log_probs).for_each(|(&child, &x)| scores.0[child] = x);
        }
    }

    /// The log-probability of each token of each continuation.
    pub fn finish(&self, scores: &Scores) -> Vec<Vec<f32>> {
        self.ends.iter().map(|&end| self.path(end).into_iter().map(|node| scores.0[node]).collect()).collect()
    }
}

/// Log-probabilities as they come, by node.
#[derive(Debug, Clone)]
pub struct Scores(Vec<f32>);

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, sync::Arc};

    use proptest::prelude::*;

    use super::*;
    use crate::kernels::layout::{Segment, TokenTree};

    #[test]
    fn continuations_without_an_inner_token_need_the_inputs_last_row_only() {
        let plan = ScorePlan::new(&[vec![3], vec![5], vec![3]]).unwrap();
        let parts = plan.parts(1);
        assert_eq!(parts.len(), 1);
        assert_eq!((parts[0].tokens.len(), plan.wanted(&parts[0], 0)), (0, vec![3, 5]));
        let mut scores = plan.begin();
        plan.record(&mut scores, &parts[0], 0, &[-1.0, -2.0]);
        assert_eq!(plan.finish(&scores), [[-1.0], [-2.0], [-1.0]]);
    }

    #[test]
    fn what_is_empty_or_too_much_is_refused() {
        assert_eq!(ScorePlan::new(&[]), Err(SubmitError::Empty));
        assert_eq!(ScorePlan::new(&[vec![1], vec![]]), Err(SubmitError::Empty));
        let many = vec![vec![1]; MAX_CONTINUATIONS + 1];
        assert!(matches!(ScorePlan::new(&many), Err(SubmitError::TooManyContinuations { .. })));
        let long = vec![vec![1; MAX_CONTINUATION_TOKENS / 2]; 3];
        assert!(matches!(ScorePlan::new(&long), Err(SubmitError::TooManyContinuations { .. })));
    }

    proptest! {
        /// Whatever the continuations and the size of a part, each beginning is one row, whose ancestors are those that
        /// its part's tree says, and every token gets its own log-probability.
        #[test]
        fn every_beginning_is_computed_once_and_every_token_is_scored(
            continuations in prop::collection::vec(prop::collection::vec(0u32..4, 1..7), 1..40),
            more_rows in 0usize..40,
        ) {
            let plan = ScorePlan::new(&continuations).unwrap();
            // A log-probability that tells the beginning and the token.
            let score = |path: &[u32]| path.iter().fold(1.0f32, |sum, &token| sum * 5.0 + token as f32);
            let mut scores = plan.begin();
            let mut computed = HashSet::new();
            for (number, part) in plan.parts(plan.longest() + more_rows).iter().enumerate() {
                prop_assert!(part.tokens.len() <= plan.longest() + more_rows);
                let tree = TokenTree::new(0, part.depths.clone());
                let segment = Segment { tree: Some(Arc::new(tree)), ..Segment::new(part.tokens.len(), 0, Vec::new()) };
                let own = part.num_ancestors..part.tokens.len();
                let input = if number == 0 { Some(Vec::new()) } else { None };
                let path = |row: usize| (0..=row).filter(|&key| segment.sees(row, key)).map(|key| part.tokens[key]).collect();
                let paths: Vec<Vec<u32>> = input.into_iter().chain(own.map(path)).collect();
                for (row, path) in paths.iter().enumerate() {
                    prop_assert!(computed.insert(path.clone()), "{path:?} is computed twice");
                    let log_probs: Vec<f32> =
                        plan.wanted(part, row).iter().map(|&id| score(&[path.as_slice(), &[id]].concat())).collect();
                    prop_assert!(!log_probs.is_empty(), "a row that nobody wants");
                    plan.record(&mut scores, part, row, &log_probs);
                }
            }
            let inner: HashSet<&[u32]> = continuations.iter().flat_map(|c| (0..c.len()).map(|n| &c[..n])).collect();
            prop_assert_eq!(computed.len(), inner.len());
            for (continuation, found) in continuations.iter().zip(plan.finish(&scores)) {
                let expected: Vec<f32> = (1..=continuation.len()).map(|n| score(&continuation[..n])).collect();
                prop_assert_eq!(found, expected);
            }
        }
    }
}
