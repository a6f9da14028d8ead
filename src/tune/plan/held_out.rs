//! Which examples judge a run, and what is odd about that.

use crate::examples::TokenizedExample;
use crate::tune::split;

/// Which examples choose the learning rate and the best prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeldOut {
    /// A file of their own.
    File,
    /// A part of the data that is not trained on.
    Split,
    /// The training examples themselves: there are too few to split.
    Training,
}

/// What is odd about a plan and not wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Warning {
    #[error("{shared} of the {held_out} held-out inputs are also trained on")]
    SharedInputs { shared: usize, held_out: usize },
    /// The data are too few to split, there are no other, and they are not cross-validated.
    #[error(
        "{examples} examples are too few to hold some out: the best prompt is chosen by the training examples, and what is \
         reported says nothing of others"
    )]
    NothingHeldOut { examples: usize },
    /// There is nothing to tell apart.
    #[error("every example has the same label: what is learned is to answer with it, whatever the input is")]
    OneLabel,
}

/// Examples to train on and others to hold out: a part of them, or, of too few, all in both places.
pub(super) fn split(all: Vec<TokenizedExample>, seed: u64) -> (Vec<TokenizedExample>, Vec<TokenizedExample>, HeldOut) {
    let out = split::held_out(&all, seed);
    if !out.contains(&true) {
        return (all.clone(), all, HeldOut::Training);
    }
    let (held_out, train): (Vec<_>, Vec<_>) = all.into_iter().zip(out).partition(|(_, out)| *out);
    let examples = |side: Vec<(TokenizedExample, bool)>| side.into_iter().map(|e| e.0).collect();
    (examples(train), examples(held_out), HeldOut::Split)
}
