//! What becomes of a step's rows of logits: a token is chosen, or continuations get their log-probabilities. Rows are
//! independent, so they are worked on side by side.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use super::{Running, Task, Worker};
use crate::{
    engine::{
        request::{GeneratedToken, SequenceId},
        runner::Output,
        sampling::{NoToken, Sampler, Scratch},
        scheduler::{Chunk, Step},
    },
    kernels::{Largest, rows::RowKernels},
};

/// What is to be made of one row.
enum Row<'a> {
    Choose {
        id: SequenceId,
        sampler: &'a mut Sampler,
    },
    /// Its sequence is gone.
    Nobodys,
}

/// What was made of it: the token, or why there is none.
type Made = Result<GeneratedToken, NoToken>;

impl Row<'_> {
    /// Whether the largest logit and its log-probability are all that is made use of.
    fn needs_largest_only(&self) -> bool {
        matches!(self, Row::Choose { sampler, .. } if sampler.is_greedy())
    }

    fn make_of_largest(&mut self, largest: Largest) -> Option<Made> {
        match self {
            Row::Choose { sampler, .. } if sampler.is_greedy() => Some(sampler.take_largest(largest)),
            _ => None,
        }
    }

    fn make(&mut self, logits: &[f32], kernels: &dyn RowKernels) -> Option<Made> {
        Scratch::with(|scratch| match self {
            Row::Choose { sampler, .. } => Some(sampler.next(logits, kernels, scratch)),
            Row::Nobodys => None,
        })
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

    /// Chooses the next token of each sequence that waits for one, and records the log-probabilities of continuations.
    /// Returns the tokens, and why a sequence has to end without one.
    pub(super) fn use_rows(
        &mut self,
        step: &Step,
        Output { logits, scores }: Output,
    ) -> candle_core::Result<Vec<(SequenceId, Result<GeneratedToken, NoToken>)>> {
        let not_finite = self.use_scores(step, scores);
        let mut jobs: HashMap<SequenceId, &mut Running> = self.jobs.iter_mut().map(|(id, job)| (*id, job)).collect();
        let mut rows = Vec::new();
        for chunk in step.chunks.iter().filter(|chunk| chunk.wanted > 0) {
            match jobs.remove(&chunk.id).map(|job| &mut job.task) {
                Some(Task::Generate { sampler, .. }) => rows.push(Row::Choose { id: chunk.id, sampler }),
                Some(Task::Score { .. }) => {}
                None => rows.extend((0..chunk.wanted).map(|_| Row::Nobodys)),
            }
        }
        let backend = self.runner.model().backend();
        if logits.num_rows() != rows.len() {
            candle_core::bail!("{} rows of logits were computed and {} are wanted", logits.num_rows(), rows.len());
        }
        let mut rows: Vec<Mutex<(Row, Option<Made>)>> = rows.into_iter().map(|row| Mutex::new((row, None))).collect();
        // Where the largest logits are found on the device, what needs nothing else is not copied to the host.
        let mut left: Vec<usize> = (0..rows.len()).collect();
        if rows.iter_mut().any(|row| row.get_mut().is_ok_and(|(row, _)| row.needs_largest_only()))
            && let Some(largest) = logits.largest(&**backend)?
        {
            for (row, largest) in rows.iter_mut().zip(largest) {
                let (row, made) = row.get_mut().unwrap_or_else(PoisonError::into_inner);
                *made = row.make_of_largest(largest);
            }
            left.retain(|&i| rows[i].get_mut().is_ok_and(|(row, made)| made.is_none() && !matches!(row, Row::Nobodys)));
        }
        logits.with_rows(&left, |logits| {
            backend.parallel(left.len(), &|i| {
                let mut row = rows[left[i]].lock().unwrap_or_else(PoisonError::into_inner);
                row.1 = row.0.make(logits[i], backend.row_kernels());
            });
            Ok(())
        })?;
        let mut tokens: Vec<_> = not_finite.into_iter().map(|id| (id, Err(NoToken::NotFinite))).collect();
        for row in rows {
            if let (Row::Choose { id, .. }, Some(made)) = row.into_inner().unwrap_or_else(PoisonError::into_inner) {
                tokens.push((id, made));
            }
        }
        Ok(tokens)
    }
}
