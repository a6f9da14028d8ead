//! Scoring continuations: the tree of their tokens, cut into branches that are computed as sequences.
//!
//! A continuation's token gets its log-probability from the row of the position before it. Continuations that begin
//! alike share these rows: a node of the tree is one token after one beginning, and each node that another token follows
//! is computed once. A sequence is a path, so the tree is cut into paths: the first follows the input and always goes
//! on where most is still to compute; each other one leaves a path that was computed before and finds all up to there in
//! the cache. Last tokens are never computed.

use std::collections::BTreeMap;

use super::error::{MAX_CONTINUATION_TOKENS, MAX_CONTINUATIONS, SubmitError};

/// The branches of a request's continuations.
#[derive(Debug, Clone, PartialEq)]
pub struct ScorePlan {
    nodes: Vec<Node>,
    /// For each continuation the node of its last token.
    ends: Vec<usize>,
    branches: Vec<Branch>,
    longest: usize,
}

#[derive(Debug, Clone, PartialEq, Default)]
struct Node {
    parent: usize,
    children: BTreeMap<u32, usize>,
    /// Nodes at or below this one that other tokens follow.
    inner: usize,
}

/// Tokens after the input that one sequence computes.
#[derive(Debug, Clone, PartialEq)]
pub struct Branch {
    /// All tokens after the input.
    pub tokens: Vec<u32>,
    /// How many of them, at the beginning, another branch computes; their rows are not wanted here.
    pub shared: usize,
    /// The branches that leave this one.
    pub next: Vec<usize>,
    /// The node of each row that is wanted. The first branch's first row is the input's last.
    rows: Vec<usize>,
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
                    nodes.push(Node { parent, ..Node::default() });
                    let node = nodes.len() - 1;
                    nodes[parent].children.insert(token, node);
                    node
                }
            })
        };
        let ends = continuations.iter().map(&mut end).collect();
        // Children come after their parents.
        for i in (0..nodes.len()).rev() {
            nodes[i].inner += usize::from(!nodes[i].children.is_empty());
            let (inner, parent) = (nodes[i].inner, nodes[i].parent);
            if i > 0 {
                nodes[parent].inner += inner;
            }
        }
        let longest = continuations.iter().map(Vec::len).max().unwrap_or(0);
        let mut plan = Self { nodes, ends, branches: Vec::new(), longest };
        plan.lay(0, Vec::new());
        Ok(plan)
    }

    /// Cuts the tree below a node into branches; `tokens` lead to it. Returns the branch that begins with it.
    fn lay(&mut self, start: usize, tokens: Vec<u32>) -> usize {
        let index = self.branches.len();
        let shared = tokens.len().saturating_sub(1);
        self.branches.push(Branch { tokens, shared, next: Vec::new(), rows: Vec::new() });
        let (mut node, mut leaving) = (start, Vec::new());
        loop {
            self.branches[index].rows.push(node);
            let inner = |(_, child): &(&u32, &usize)| self.nodes[**child].inner > 0;
            let children = self.nodes[node].children.iter().filter(inner);
            let mut children: Vec<(u32, usize)> = children.map(|(token, child)| (*token, *child)).collect();
            // The path goes on where most is left: fewer paths leave paths that left paths.
            let Some(most) = (0..children.len()).max_by_key(|&i| (self.nodes[children[i].1].inner, usize::MAX - i))
            else {
                break;
            };
            let (token, child) = children.swap_remove(most);
            leaving.extend(
                children
                    .into_iter()
                    .map(|(token, child)| (child, [self.branches[index].tokens.as_slice(), &[token]].concat())),
            );
            self.branches[index].tokens.push(token);
            node = child;
        }
        for (child, tokens) in leaving {
            let branch = self.lay(child, tokens);
            self.branches[index].next.push(branch);
        }
        index
    }

    /// The branches; the first is to be computed first, and the others when the one that they leave is.
    pub fn branches(&self) -> &[Branch] {
        &self.branches
    }

    /// The most tokens of a continuation.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// The ids whose log-probabilities are wanted of row `row` of a branch.
    pub fn wanted(&self, branch: usize, row: usize) -> Vec<u32> {
        self.node(branch, row).map_or_else(Vec::new, |node| node.children.keys().copied().collect())
    }

    fn node(&self, branch: usize, row: usize) -> Option<&Node> {
        self.nodes.get(*self.branches.get(branch)?.rows.get(row)?)
    }

    /// The log-probabilities of nothing yet.
    pub fn begin(&self) -> Scores {
        Scores(vec![f32::NAN; self.nodes.len()])
    }

    /// Records what [`wanted`](Self::wanted) asked of a row.
    pub fn record(&self, scores: &mut Scores, branch: usize, row: usize, log_probs: &[f32]) {
        if let Some(node) = self.node(branch, row) {
            node.children.values().zip(log_probs).for_each(|(&child, &x)| scores.0[child] = x);
        }
    }

    /// The log-probability of each token of each continuation.
    pub fn finish(&self, scores: &Scores) -> Vec<Vec<f32>> {
        let path = |&end: &usize| {
            let mut path: Vec<f32> = std::iter::successors(Some(end), |&node| Some(self.nodes[node].parent))
                .take_while(|&node| node > 0)
                .map(|node| scores.0[node])
                .collect();
            path.reverse();
            path
        };
        self.ends.iter().map(path).collect()
    }
}

/// Log-probabilities as they come, by node.
#[derive(Debug, Clone)]
pub struct Scores(Vec<f32>);

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn continuations_without_an_inner_token_need_the_inputs_last_row_only() {
        let plan = ScorePlan::new(&[vec![3], vec![5], vec![3]]).unwrap();
        assert_eq!(plan.branches().len(), 1);
        assert_eq!((plan.branches()[0].tokens.len(), plan.wanted(0, 0)), (0, vec![3, 5]));
        let mut scores = plan.begin();
        plan.record(&mut scores, 0, 0, &[-1.0, -2.0]);
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
        /// Whatever the continuations, each inner position is computed by exactly one branch, a branch's shared
        /// beginning is one that the branch before it computes, and every token gets its own log-probability.
        #[test]
        fn every_beginning_is_computed_once_and_every_token_is_scored(
            continuations in prop::collection::vec(prop::collection::vec(0u32..4, 1..7), 1..40),
        ) {
            let plan = ScorePlan::new(&continuations).unwrap();
            // A log-probability that tells the beginning and the token.
            let score = |path: &[u32]| path.iter().fold(1.0f32, |sum, &token| sum * 5.0 + token as f32);
            let mut scores = plan.begin();
            let mut computed = HashSet::new();
            let mut order = vec![(0, HashSet::from([Vec::new()]))];
            let mut done = 0;
            while let Some((index, known)) = order.pop() {
                let branch = &plan.branches()[index];
                prop_assert!(known.contains(&branch.tokens[..branch.shared]), "it leaves what was computed");
                let first = if index == 0 { 0 } else { branch.shared + 1 };
                let mut own = known.clone();
                for (row, len) in (first..=branch.tokens.len()).enumerate() {
                    let path = &branch.tokens[..len];
                    prop_assert!(computed.insert(path.to_vec()), "{path:?} is computed twice");
                    own.insert(path.to_vec());
                    let log_probs: Vec<f32> =
                        plan.wanted(index, row).iter().map(|&id| score(&[path, &[id]].concat())).collect();
                    prop_assert!(!log_probs.is_empty(), "a row that nobody wants");
                    plan.record(&mut scores, index, row, &log_probs);
                }
                order.extend(branch.next.iter().map(|&next| (next, own.clone())));
                done += 1;
            }
            prop_assert_eq!(done, plan.branches().len());
            let inner: HashSet<&[u32]> = continuations.iter().flat_map(|c| (0..c.len()).map(|n| &c[..n])).collect();
            prop_assert_eq!(computed.len(), inner.len());
            for (continuation, found) in continuations.iter().zip(plan.finish(&scores)) {
                let expected: Vec<f32> = (1..=continuation.len()).map(|n| score(&continuation[..n])).collect();
                prop_assert_eq!(found, expected);
            }
        }
    }
}
