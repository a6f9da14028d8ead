//! What becomes of a step's rows of logits: a token is chosen, or continuations get their log-probabilities. Rows are
//! independent, so they are worked on side by side.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use super::{Running, Task, Worker};
use crate::engine::{
    request::{GeneratedToken, InputToken, SequenceId},
    runner::Output,
    sampling::{NoToken, Sampler, Scratch},
    scheduler::{Chunk, Step},
};

/// What is to be made of rows that follow each other in one sequence.
enum Rows<'a> {
    /// The next token of the first row; and as long as a token is the one that was guessed, that of the row after it.
    Choose { id: SequenceId, sampler: &'a mut Sampler, guesses: &'a [InputToken] },
    /// Their sequence is gone.
    Nobodys { count: usize },
}

/// What was made of them: tokens, or why there is no further one.
type Made = Vec<Result<GeneratedToken, NoToken>>;

impl Rows<'_> {
    fn len(&self) -> usize {
        match self {
            Rows::Choose { guesses, .. } => 1 + guesses.len(),
            Rows::Nobodys { count } => *count,
        }
    }

    /// Whether the largest logits and their log-probabilities are all that is made use of.
    fn need_largest_only(&self) -> bool {
        matches!(self, Rows::Choose { sampler, .. } if sampler.is_greedy())
    }

    /// Chooses tokens by `next`, which is told the row.
    fn make(&mut self, mut next: impl FnMut(&mut Sampler, usize) -> Result<GeneratedToken, NoToken>) -> Made {
        let Rows::Choose { sampler, guesses, .. } = self else { return Vec::new() };
        let mut made = Vec::with_capacity(1);
        for row in 0..=guesses.len() {
            let token = next(sampler, row);
            let was_guessed =
                matches!((&token, guesses.get(row)), (Ok(token), Some(guess)) if guess.vocab() == Some(token.id));
            made.push(token);
            if !was_guessed {
                break;
            }
        }
        made
    }
}

impl Worker {
    /// Of which ids the log-probabilities are wanted for each wanted row of a chunk; empty of a chunk that is not scored.
    pub(super) fn scored_ids(&self, chunk: &Chunk) -> Vec<Vec<u32>> {
        let Some(&Running { task: Task::Score { group, part }, .. }) = self.jobs.get(&chunk.id) else {
            return Vec::new();
        };
        let Some(group) = self.groups.get(&group) else { return Vec::new() };
        let first = self.first_wanted_row(chunk);
        (first..first + chunk.wanted).map(|row| group.wanted(part, row)).collect()
    }

    /// The first wanted row of a chunk, counted from the first one that is wanted of its sequence.
    fn first_wanted_row(&self, chunk: &Chunk) -> usize {
        let from = self.scheduler.get(chunk.id).map_or(0, |sequence| sequence.wanted_from());
        (chunk.start + chunk.len - chunk.wanted).saturating_sub(from)
    }

    /// Records the log-probabilities that continuations are scored with. Returns the sequences whose logits are not
    /// finite.
    fn use_scores(&mut self, step: &Step, scores: Vec<Vec<f32>>) -> Vec<SequenceId> {
        let mut not_finite = Vec::new();
        let mut scores = scores.into_iter();
        for chunk in step.chunks.iter().filter(|chunk| chunk.wanted > 0) {
            let first = self.first_wanted_row(chunk);
            let Some(&Running { task: Task::Score { group, part }, .. }) = self.jobs.get(&chunk.id) else { continue };
            let Some(group) = self.groups.get_mut(&group) else { continue };
            for (row, log_probs) in (first..).zip(scores.by_ref().take(chunk.wanted)) {
                if log_probs.iter().any(|x| x.is_nan()) {
                    not_finite.push(chunk.id);
                }
                group.record(part, row, &log_probs);
            }
        }
        not_finite.dedup();
        not_finite
    }

    /// Chooses the next token of each sequence that waits for one, and those after it that were guessed, and records the
    /// log-probabilities of continuations. Returns the tokens, those of a sequence in order, and why a sequence has to end
    /// without one.
    pub(super) fn use_rows(
        &mut self,
        step: &Step,
        Output { logits, scores }: Output,
    ) -> candle_core::Result<Vec<(SequenceId, Result<GeneratedToken, NoToken>)>> {
        let not_finite = self.use_scores(step, scores);
        let mut jobs: HashMap<SequenceId, &mut Running> = self.jobs.iter_mut().map(|(id, job)| (*id, job)).collect();
        let mut all = Vec::new();
        // The first row of each.
        let mut firsts = Vec::new();
        let mut num_rows = 0;
        for chunk in step.chunks.iter().filter(|chunk| chunk.wanted > 0) {
            let rows = match jobs.remove(&chunk.id).map(|job| &mut job.task) {
                Some(Task::Generate { sampler, .. }) => {
                    let tokens = self.scheduler.get(chunk.id).map_or(&[][..], |sequence| &sequence.tokens);
                    let guesses = tokens.len().saturating_sub(chunk.wanted - 1)..;
                    Rows::Choose { id: chunk.id, sampler, guesses: &tokens[guesses] }
                }
                Some(Task::Score { .. }) => continue,
                None => Rows::Nobodys { count: chunk.wanted },
            };
            firsts.push(num_rows);
            num_rows += rows.len();
            all.push(Mutex::new((rows, Made::new())));
        }
        let backend = self.runner.model().backend();
        if logits.num_rows() != num_rows {
            candle_core::bail!("{} rows of logits were computed and {num_rows} are wanted", logits.num_rows());
        }
        // Where the largest logits are found on the device, what needs nothing else is not copied to the host.
        let mut is_made = vec![false; all.len()];
        if all.iter_mut().any(|own| own.get_mut().is_ok_and(|(rows, _)| rows.need_largest_only()))
            && let Some(largest) = logits.largest(&**backend)?
        {
            for ((own, first), is_made) in all.iter_mut().zip(&firsts).zip(&mut is_made) {
                let (rows, made) = own.get_mut().unwrap_or_else(PoisonError::into_inner);
                if rows.need_largest_only() {
                    *made = rows.make(|sampler, row| sampler.take_largest(largest[first + row]));
                    *is_made = true;
                }
            }
        }
        // Of those that are left, their rows on the host, and where those of each begin.
        let (mut left, mut host_rows) = (Vec::new(), Vec::new());
        for (i, own) in all.iter_mut().enumerate() {
            let (rows, _) = own.get_mut().unwrap_or_else(PoisonError::into_inner);
            if !is_made[i] && matches!(rows, Rows::Choose { .. }) {
                left.push((i, host_rows.len()));
                host_rows.extend(firsts[i]..firsts[i] + rows.len());
            }
        }
        logits.with_rows(&host_rows, |logits| {
            backend.parallel(left.len(), &|i| {
                let (own, first) = left[i];
                let mut own = all[own].lock().unwrap_or_else(PoisonError::into_inner);
                own.1 = Scratch::with(|scratch| {
                    own.0.make(|sampler, row| sampler.next(logits[first + row], backend.row_kernels(), scratch))
                });
            });
            Ok(())
        })?;
        let mut tokens: Vec<_> = not_finite.into_iter().map(|id| (id, Err(NoToken::NotFinite))).collect();
        for own in all {
            if let (Rows::Choose { id, .. }, made) = own.into_inner().unwrap_or_else(PoisonError::into_inner) {
                tokens.extend(made.into_iter().map(|made| (id, made)));
            }
        }
        Ok(tokens)
    }
}
