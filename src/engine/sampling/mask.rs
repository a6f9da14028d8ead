//! Constraints on the tokens of an answer: which may come next, given those before.

use std::fmt;

/// What an answer must obey, such as a grammar, compiled once and shared by requests. The engine knows no text: a
/// constraint speaks of token ids.
pub trait TokenConstraint: fmt::Debug + Send + Sync {
    /// The state at the beginning of one answer.
    fn start(&self) -> Box<dyn TokenMask>;
}

/// Why a constraint cannot say which tokens may come next.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct MaskError(pub String);

/// The state of a constraint within one answer.
pub trait TokenMask: Send {
    /// Sets the logits `[vocab]` of the tokens that may not come next to negative infinity.
    ///
    /// # Errors
    /// It cannot say which those are.
    fn apply(&mut self, logits: &mut [f32]) -> Result<(), MaskError>;

    /// The token that came next, one that was allowed.
    fn accept(&mut self, id: u32);

    /// Whether no token may follow: the answer ends.
    fn is_complete(&self) -> bool {
        false
    }
}
