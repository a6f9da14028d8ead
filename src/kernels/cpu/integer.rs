//! Products of quantised weights as integers: the blocks of a GGUF file, laid out in micro-panels, times activations that are
//! rounded to 8 bits, much as ggml multiplies them. Sums of 16 products are exact; those are added in f32, in one order, so
//! that a row's result is the same whichever rows it is multiplied with.

mod activations;
mod codes;
mod product;
mod scheme;
#[cfg(test)]
mod tests;
mod values;

pub(super) use activations::{Group, quantise};
pub use codes::IntegerMatrix;
pub(super) use product::panel;
pub(super) use scheme::Scheme;

/// Inner values that lie together in a micro-panel: a stripe.
pub(super) const STRIPE: usize = 32;
/// Steps of four inner values in a stripe.
const STEPS: usize = STRIPE / 4;
/// Bytes of a step: four inner values of each of sixteen columns.
const STEP_BYTES: usize = 64;
/// Stripes that share what scales are multiplied by, in nested schemes.
const NEST: usize = 8;
