//! A request that scores continuations: its plan, what was found, and what its sequences have in common.

use std::sync::Arc;

use crate::{
    engine::{
        encoder::EncoderInput,
        request::{CacheNamespace, InputToken, Tenant},
        score::{Part, ScorePlan, Scores},
        sequence::Sequence,
    },
    kernels::layout::TokenTree,
};

/// A request whose continuations are scored.
pub(super) struct Group {
    pub plan: ScorePlan,
    /// The parts of the plan's tree, each computed as a sequence.
    pub parts: Vec<Part>,
    pub scores: Scores,
    /// Parts that are not done.
    pub left: usize,
    /// What every part begins with, and how it is scheduled.
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
    /// The ids whose log-probabilities are wanted of a row of a part.
    pub fn wanted(&self, part: usize, row: usize) -> Vec<u32> {
        self.parts.get(part).map_or_else(Vec::new, |part| self.plan.wanted(part, row))
    }

    /// The log-probabilities of a row of a part.
    pub fn record(&mut self, part: usize, row: usize, log_probs: &[f32]) {
        if let Some(part) = self.parts.get(part) {
            self.plan.record(&mut self.scores, part, row, log_probs);
        }
    }

    /// The sequence of a part.
    pub fn sequence(&self, index: usize) -> Option<Sequence> {
        let part = self.parts.get(index)?;
        let rows = part.tokens.iter().map(|&id| InputToken::Vocab(id));
        let tokens = self.input.iter().copied().chain(rows).collect();
        let start = self.input.len();
        // The first part has also the row that predicts first tokens, the input's last.
        let scored_from = if index == 0 { start - 1 } else { start + part.num_ancestors };
        let tree = (!part.depths.is_empty()).then(|| Arc::new(TokenTree::new(start, part.depths.clone())));
        Some(Sequence {
            namespace: Some(self.namespace),
            public_prefix: self.public_prefix,
            tenant: self.tenant,
            priority: self.priority,
            encoder: self.encoder.clone(),
            scored_from: Some(scored_from),
            tree,
            ..Sequence::new(tokens)
        })
    }
}
