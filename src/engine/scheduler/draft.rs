//! Guessed tokens in a step: where they are worth their rows, and what is left of them after it.

use super::{Chunk, Scheduler};
use crate::engine::{
    request::{InputToken, SequenceId},
    sequence::Sequence,
};
use crate::kernels::layout::BLOCK_SIZE;

/// Rows of a step beyond which guesses cost more than they bring: up to here, reading the weights takes most of the time.
const CHEAP_ROWS: usize = 8;

impl Scheduler {
    /// How many guessed positions a step may have. None beside inputs, whose rows take the time themselves.
    pub(super) fn draft_budget(&self) -> usize {
        let running = || self.running.iter().filter_map(|id| self.sequences.get(id));
        if self.limits.draft_tokens == 0 || running().any(|sequence| sequence.work() > 1) {
            return 0;
        }
        CHEAP_ROWS.min(self.limits.config.max_step_tokens).saturating_sub(running().count())
    }

    /// Guesses the tokens after the one that a sequence waits for, and returns how many: at most `most`, and only what its
    /// blocks have room for.
    pub(super) fn draft(sequence: &mut Sequence, most: usize) -> usize {
        let Some(drafting) = &mut sequence.drafting else { return 0 };
        let room = (sequence.blocks.len() * BLOCK_SIZE).saturating_sub(sequence.tokens.len());
        let guesses = drafting.guess(&sequence.tokens, most.min(room));
        drafting.guessed = guesses.len();
        sequence.tokens.extend(&guesses);
        guesses.len()
    }

    /// Takes the guesses of a step away that were wrong; the others are the first tokens that were chosen.
    pub(super) fn end_draft(sequence: &mut Sequence, chunk: &Chunk, tokens: &[(SequenceId, u32)]) {
        let guessed = sequence.num_guessed();
        let Some(drafting) = sequence.drafting.as_mut().filter(|_| guessed > 0) else { return };
        let chosen = tokens.iter().filter(|(id, _)| *id == chunk.id).count();
        let right = chosen.saturating_sub(1).min(guessed);
        drafting.learn(right);
        sequence.num_computed = chunk.start + 1 + right;
        sequence.tokens.truncate(sequence.num_computed);
        debug_assert!(
            sequence
                .tokens
                .iter()
                .skip(chunk.start + 1)
                .zip(tokens.iter().filter(|t| t.0 == chunk.id))
                .all(|(guess, (_, token))| *guess == InputToken::Vocab(*token))
        );
    }
}
