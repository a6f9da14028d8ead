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
        runner::Logits,
        sampling::{NoToken, Sampler, Scratch, log_probs},
        scheduler::Step,
    },
    kernels::{Largest, rows::RowKernels},
};

/// What is to be made of one row.
enum Row<'a> {
    Choose {
        id: SequenceId,
        sampler: &'a mut Sampler,
    },
    Score {
        id: SequenceId,
        group: u64,
        branch: usize,
        row: usize,
        ids: Vec<u32>,
    },
    /// Its sequence is gone.
    Nobodys,
}

/// What was made of it.
enum Made {
    Token(Result<GeneratedToken, NoToken>),
    LogProbs(Result<Vec<f32>, NoToken>),
}

impl Row<'_> {
    /// Whether the largest logit and its log-probability are all that is made use of.
    fn needs_largest_only(&self) -> bool {
        matches!(self, Row::Choose { sampler, .. } if sampler.is_greedy())
    }

    fn make_of_largest(&mut self, largest: Largest) -> Option<Made> {
        match self {
            Row::Choose { sampler, .. } if sampler.is_greedy() => Some(Made::Token(sampler.take_largest(largest))),
            _ => None,
        }
    }

    fn make(&mut self, logits: &[f32], kernels: &dyn RowKernels) -> Option<Made> {
        Scratch::with(|scratch| match self {
            Row::Choose { sampler, .. } => Some(Made::Token(sampler.next(logits, kernels, scratch))),
            Row::Score { ids, .. } => Some(Made::LogProbs(log_probs::of_ids(logits, ids, kernels, scratch))),
            Row::Nobodys => None,
        })
    }
}

impl Worker {
    /// Chooses the next token of each sequence that waits for one, and records the log-probabilities of continuations.
    /// Returns the tokens, and why a sequence has to end without one.
    pub(super) fn use_rows(
        &mut self,
        step: &Step,
        logits: &Logits,
    ) -> candle_core::Result<Vec<(SequenceId, Result<GeneratedToken, NoToken>)>> {
        let mut jobs: HashMap<SequenceId, &mut Running> = self.jobs.iter_mut().map(|(id, job)| (*id, job)).collect();
        let mut rows = Vec::new();
        for chunk in step.chunks.iter().filter(|chunk| chunk.wanted > 0) {
            match jobs.remove(&chunk.id).map(|job| &mut job.task) {
                Some(Task::Generate { sampler, .. }) => rows.push(Row::Choose { id: chunk.id, sampler }),
                Some(&mut Task::Score { group, branch }) => {
                    let from = self.scheduler.get(chunk.id).map_or(0, |sequence| sequence.wanted_from());
                    let first = (chunk.start + chunk.len - chunk.wanted).saturating_sub(from);
                    let plan = self.groups.get(&group).map(|group| &group.plan);
                    rows.extend((first..first + chunk.wanted).map(|row| {
                        let ids = plan.map_or_else(Vec::new, |plan| plan.wanted(branch, row));
                        Row::Score { id: chunk.id, group, branch, row, ids }
                    }));
                }
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
        let mut tokens = Vec::with_capacity(rows.len());
        for row in rows {
            match row.into_inner().unwrap_or_else(PoisonError::into_inner) {
                (Row::Choose { id, .. }, Some(Made::Token(token))) => tokens.push((id, token)),
                (Row::Score { group, branch, row, .. }, Some(Made::LogProbs(Ok(log_probs)))) => {
                    if let Some(group) = self.groups.get_mut(&group) {
                        group.record(branch, row, &log_probs);
                    }
                }
                (Row::Score { id, .. }, Some(Made::LogProbs(Err(reason)))) => tokens.push((id, Err(reason))),
                _ => {}
            }
        }
        Ok(tokens)
    }
}
