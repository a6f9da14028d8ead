//! A request that scores continuations: its plan, what was found, and what its sequences have in common.

use crate::engine::{
    encoder::EncoderInput,
    request::{CacheNamespace, InputToken, Tenant},
    score::{ScorePlan, Scores},
    sequence::Sequence,
};

/// A request whose continuations are scored.
pub(super) struct Group {
    pub plan: ScorePlan,
    pub scores: Scores,
    /// Branches that are not done.
    pub left: usize,
    /// What every branch begins with, and how it is scheduled.
    pub input: Vec<InputToken>,
    pub encoder: Option<EncoderInput>,
    pub namespace: CacheNamespace,
    pub public_prefix: usize,
    pub tenant: Tenant,
    pub priority: i32,
    pub cached_tokens: usize,
}

/// Names a group.
pub(super) type GroupId = u64;

impl Group {
    /// The log-probabilities of a row of a branch.
    pub fn record(&mut self, branch: usize, row: usize, log_probs: &[f32]) {
        self.plan.record(&mut self.scores, branch, row, log_probs);
    }

    /// The sequence of a branch.
    pub fn sequence(&self, index: usize) -> Option<Sequence> {
        let branch = self.plan.branches().get(index)?;
        let continuation = branch.tokens.iter().map(|&id| InputToken::Vocab(id));
        let tokens = self.input.iter().copied().chain(continuation).collect();
        // The first branch begins with the row that predicts first tokens, the input's last.
        let scored_from = if index == 0 { self.input.len() - 1 } else { self.input.len() + branch.shared };
        Some(Sequence {
            namespace: Some(self.namespace),
            public_prefix: self.public_prefix,
            tenant: self.tenant,
            priority: self.priority,
            encoder: self.encoder.clone(),
            scored_from: Some(scored_from),
            // What nobody leaves, nobody looks for.
            commits: index == 0 || !branch.next.is_empty(),
            ..Sequence::new(tokens)
        })
    }
}
