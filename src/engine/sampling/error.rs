//! Why a row of logits gives no token.

use super::mask::MaskError;

/// Why no token was chosen, or no log-probability computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoToken {
    /// A logit is NaN or infinite: values overflowed in the forward pass.
    #[error("the logits are not finite")]
    NotFinite,
    /// The token mask and what else is forbidden leave no token.
    #[error("no token is allowed to come next")]
    Masked,
    /// The token mask could not be computed.
    #[error(transparent)]
    Mask(#[from] MaskError),
}
