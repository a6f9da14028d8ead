//! Why a row of logits gives no token.

/// Why no token was chosen, or no log-probability computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoToken {
    /// A logit is NaN or infinite: values overflowed in the forward pass.
    #[error("the logits are not finite")]
    NotFinite,
    /// The token mask allows no token.
    #[error("the token mask allows no token")]
    Masked,
}
