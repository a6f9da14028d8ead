//! The engine's thread: take mail, schedule, run, send tokens out; again until drained.

mod group;
mod rows;
mod scoring;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use tokio::sync::mpsc::{self, error::TryRecvError};

use super::{
    admission::Slot,
    draft::Drafting,
    encoder::{EncoderInput, InputKey},
    mail::{Job, Mail, Shared, WarmUp, Work},
    nearest::Searches,
    request::{Event, FinishReason, GeneratedToken, InputToken, Request, SequenceId},
    runner::{Output, Part, Runner},
    sampling::{NoToken, Sampler},
    scheduler::{Limits, Scheduler, Step},
    sequence::Sequence,
};
use crate::{kernels::cross::CrossKeyValues, prompt::LearnedPrompt};
use group::{Group, GroupId};

/// Everything the thread owns.
pub(super) struct Worker {
    runner: Runner,
    scheduler: Scheduler,
    jobs: HashMap<SequenceId, Running>,
    /// Requests that score continuations, each with one sequence or more in `jobs`.
    groups: HashMap<GroupId, Group>,
    /// What the encoder made of the inputs of running sequences.
    encoded: HashMap<InputKey, CrossKeyValues>,
    /// The prompts that the scheduler is to warm.
    warm_ups: HashMap<SequenceId, WarmUp>,
    /// What is compared with the vocabulary between steps.
    searches: Searches,
    inbox: mpsc::Receiver<Mail>,
    shared: Arc<Shared>,
    next_id: u64,
}

/// A sequence's side that the scheduler need not see.
struct Running {
    prompt: Option<Arc<LearnedPrompt>>,
    task: Task,
    deadline: Option<Instant>,
    events: mpsc::Sender<Event>,
    /// For the reader of the events: [`EventStream::cached_tokens`](super::EventStream::cached_tokens).
    cached_tokens: Arc<AtomicUsize>,
    /// Given up when the sequence joins the batch.
    slot: Option<Slot>,
}

/// What becomes of a sequence's logits.
enum Task {
    Generate {
        sampler: Box<Sampler>,
        stop_tokens: Vec<u32>,
        remaining: usize,
    },
    /// A part of the tree of a request's continuations.
    Score {
        group: GroupId,
        part: usize,
    },
}

impl Worker {
    pub(super) fn new(runner: Runner, limits: Limits, inbox: mpsc::Receiver<Mail>, shared: Arc<Shared>) -> Self {
        let scheduler = Scheduler::new(limits);
        let (jobs, groups, encoded, warm_ups, searches) = Default::default();
        Self { runner, scheduler, jobs, groups, encoded, warm_ups, searches, inbox, shared, next_id: 0 }
    }

    /// Runs until drained, or until every handle is dropped and nothing is left to do.
    pub(super) fn run(mut self) {
        // Set also when this thread unwinds: readiness must drop.
        let _unready = Unready(self.shared.clone());
        loop {
            let open = self.take_mail();
            self.retire();
            if !open {
                self.scheduler.cancel_warm_ups();
                self.searches.clear();
            }
            self.searches.run_chunk(self.runner.model());
            if !self.scheduler.is_empty() {
                self.step();
            } else if !open {
                return;
            } else if !self.searches.is_empty() {
                // Nothing else to do: the next chunk.
            } else if let Some(mail) = self.inbox.blocking_recv() {
                self.open(mail);
            }
        }
    }

    /// Moves all mail to the scheduler; false when no more can come.
    fn take_mail(&mut self) -> bool {
        if self.shared.draining.load(Relaxed) {
            // What was sent before still arrives.
            self.inbox.close();
        }
        loop {
            match self.inbox.try_recv() {
                Ok(mail) => self.open(mail),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn open(&mut self, mail: Mail) {
        match mail {
            Mail::Jobs(jobs) => jobs.into_iter().for_each(|job| self.accept(job)),
            Mail::WarmUp(warm_up) => {
                let id = self.new_id();
                let rows = warm_up.prompt.num_virtual_tokens() as u32;
                let mut sequence = Sequence::new((0..rows).map(InputToken::Virtual).collect());
                sequence.namespace = Some(warm_up.namespace);
                if self.scheduler.add_warm_up(id, sequence) {
                    self.warm_ups.insert(id, warm_up);
                }
            }
            Mail::Nearest(search) => self.searches.push(search),
            Mail::Wake => {}
        }
    }

    fn new_id(&mut self) -> SequenceId {
        self.next_id += 1;
        SequenceId(self.next_id)
    }

    fn accept(&mut self, Job { request, work, encoder, events, cached_tokens, slot }: Job) {
        let id = self.new_id();
        let Request { tokens, prompt, deadline, namespace, public_prefix, tenant, priority, .. } = request;
        let encoder = encoder.map(|(tokens, content)| {
            let key = content.map_or(InputKey::Own(id), InputKey::Content);
            EncoderInput { key, tokens }
        });
        let text: Vec<u32> = tokens.iter().filter_map(InputToken::vocab).collect();
        let sequence = Sequence::new(tokens);
        let public_prefix = public_prefix.max(sequence.num_virtual);
        let sequence = Sequence { namespace, public_prefix, tenant, priority, encoder, ..sequence };
        let running = |task| Running { prompt, task, deadline, events, cached_tokens, slot: Some(slot) };
        match work {
            Work::Generate(sampling) => {
                let (stop_tokens, remaining) = (sampling.stop_tokens.clone(), sampling.max_tokens);
                let mask = sampling.constraint.as_ref().map(|constraint| constraint.start());
                // A mask is computed beside the forward pass, for one token.
                let drafting = mask.is_none().then(|| Drafting::new(sequence.num_input + sampling.max_tokens));
                let sequence = Sequence { drafting, ..sequence };
                let sampler = Box::new(Sampler::new(sampling, text.into_iter()).with_mask(mask));
                self.jobs.insert(id, running(Task::Generate { sampler, stop_tokens, remaining }));
                self.scheduler.add(id, sequence);
            }
            Work::Score(plan) => {
                self.accept_score(id, plan, sequence, running(Task::Score { group: id.0, part: 0 }));
            }
        }
    }

    /// Ends sequences whose reader went away, whose deadline passed, or that the drain's end cuts.
    fn retire(&mut self) {
        let now = Instant::now();
        let drain_by = *self.shared.drain_by.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let over = drain_by.is_some_and(|by| now >= by);
        for id in self.scheduler.ids() {
            let Some(job) = self.jobs.get(&id) else { continue };
            let reason = if job.events.is_closed() || over {
                FinishReason::Cancelled
            } else if job.deadline.is_some_and(|by| now >= by) {
                FinishReason::Timeout
            } else {
                continue;
            };
            let finished = self.finished(id, reason);
            self.end(id, finished);
        }
    }

    fn step(&mut self) {
        let step = self.scheduler.schedule();
        for chunk in &step.chunks {
            if let Some(job) = self.jobs.get_mut(&chunk.id).filter(|job| job.slot.is_some()) {
                job.slot = None;
                let cached = self.scheduler.get(chunk.id).and_then(|s| s.cached_tokens).unwrap_or(0);
                job.cached_tokens.store(cached, Relaxed);
                self.shared.counters.cached_tokens.fetch_add(cached as u64, Relaxed);
            }
        }
        let copied = self.runner.copy(&step.copies);
        // Of those that were preempted nothing is kept.
        self.forget_encoded();
        if !step.chunks.is_empty() {
            let result = copied.and_then(|()| self.compute(&step));
            self.shared.counters.steps.fetch_add(1, Relaxed);
            match result.and_then(|output| self.use_rows(&step, output)) {
                Ok(tokens) => self.deliver(&step, tokens),
                Err(error) => self.fail(&step, &error),
            }
        }
        self.warm_ups.retain(|&id, _| self.scheduler.get(id).is_some());
        self.publish();
    }

    fn compute(&mut self, step: &Step) -> candle_core::Result<Output> {
        self.run_encoder(step)?;
        let scored: Vec<Vec<Vec<u32>>> = step.chunks.iter().map(|chunk| self.scored_ids(chunk)).collect();
        let mut parts = Vec::with_capacity(step.chunks.len());
        for (chunk, scored) in step.chunks.iter().zip(&scored) {
            let prompt = match (self.jobs.get(&chunk.id), self.warm_ups.get(&chunk.id)) {
                (Some(job), _) => job.prompt.as_ref(),
                (None, warm_up) => warm_up.map(|warm_up| &warm_up.prompt),
            };
            let Some(sequence) = self.scheduler.get(chunk.id) else {
                candle_core::bail!("sequence {:?} was scheduled but is not known", chunk.id)
            };
            parts.push(Part {
                tokens: &sequence.tokens[chunk.start..chunk.start + chunk.len],
                start: chunk.start,
                blocks: &sequence.blocks,
                tree: sequence.tree.as_ref(),
                prompt,
                encoded: sequence.encoder_key().and_then(|key| self.encoded.get(&key)),
                wanted: chunk.wanted,
                scored,
            });
        }
        self.runner.run(&parts)
    }

    /// Computes the encoder's inputs of a step.
    fn run_encoder(&mut self, step: &Step) -> candle_core::Result<()> {
        let (mut keys, mut inputs) = (Vec::new(), Vec::new());
        for chunk in step.chunks.iter().filter(|chunk| chunk.encodes) {
            let (Some(sequence), Some(job)) = (self.scheduler.get(chunk.id), self.jobs.get(&chunk.id)) else {
                candle_core::bail!("sequence {:?} was scheduled but is not known", chunk.id)
            };
            let Some(input) = &sequence.encoder else {
                candle_core::bail!("sequence {:?} was scheduled for an encoder and has no input for it", chunk.id)
            };
            let (tokens, prompt) = (&input.tokens[..], job.prompt.as_ref());
            inputs.push(Part { tokens, prompt, ..Part::default() });
            keys.push(input.key);
        }
        let made = self.runner.run_encoder(&inputs)?;
        self.encoded.extend(keys.into_iter().zip(made));
        Ok(())
    }

    /// Drops what the encoder made of inputs that no running sequence has any more.
    fn forget_encoded(&mut self) {
        if !self.encoded.is_empty() {
            let needed = self.scheduler.encoded_inputs();
            self.encoded.retain(|key, _| needed.contains(key));
        }
    }

    fn fail(&mut self, step: &Step, error: &candle_core::Error) {
        tracing::error!(%error, sequences = step.chunks.len(), "a forward pass failed");
        for id in self.scheduler.abort(step) {
            self.end(id, Event::Failed);
        }
    }

    /// Sends the chosen tokens out.
    fn deliver(&mut self, step: &Step, tokens: Vec<(SequenceId, Result<GeneratedToken, NoToken>)>) {
        let mut chosen = Vec::with_capacity(tokens.len());
        let mut ended = Vec::new();
        for (id, token) in tokens {
            let token = match token {
                Ok(token) => token,
                Err(reason) => {
                    ended.push((id, Err(reason)));
                    continue;
                }
            };
            // After the end of an answer nothing counts that guesses brought.
            if ended.last().is_some_and(|(last, _)| *last == id) {
                continue;
            }
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            let Task::Generate { stop_tokens, remaining, sampler } = &mut job.task else { continue };
            if stop_tokens.contains(&token.id) {
                ended.push((id, Ok(FinishReason::Stop)));
                continue;
            }
            chosen.push((id, token.id));
            // There is room for every token; an error means that the reader is gone.
            let _ = job.events.try_send(Event::Token(token));
            *remaining -= 1;
            if sampler.is_complete() {
                ended.push((id, Ok(FinishReason::Stop)));
            } else if *remaining == 0 {
                ended.push((id, Ok(FinishReason::Length)));
            }
        }
        let input = |id| self.scheduler.get(id).map_or(0, |s| s.num_input);
        let computed: usize =
            step.chunks.iter().map(|c| (c.start + c.len).min(input(c.id)).saturating_sub(c.start)).sum();
        let encoder = |id| self.scheduler.get(id).map_or(0, |s| s.num_encoder());
        let encoded: usize = step.chunks.iter().filter(|c| c.encodes).map(|c| encoder(c.id)).sum();
        let guessed: usize = step.chunks.iter().filter_map(|c| Some(self.scheduler.get(c.id)?.num_guessed())).sum();
        let sequences = chosen.chunk_by(|a, b| a.0 == b.0).count();
        let right = if guessed > 0 { chosen.len() - sequences } else { 0 };
        self.scheduler.commit(step, &chosen);
        self.shared.counters.prompt_tokens.fetch_add((computed + encoded) as u64, Relaxed);
        self.shared.counters.generated_tokens.fetch_add(chosen.len() as u64, Relaxed);
        self.shared.counters.draft_tokens.fetch_add(guessed as u64, Relaxed);
        self.shared.counters.draft_tokens_accepted.fetch_add(right as u64, Relaxed);
        for (id, reason) in ended {
            let event = match reason {
                Ok(reason) => self.finished(id, reason),
                Err(NoToken::NotFinite) => Event::NotFinite,
                Err(reason @ (NoToken::Masked | NoToken::Mask(_))) => Event::NoTokenAllowed(reason.to_string()),
            };
            self.end(id, event);
        }
        let scored: Vec<_> = step.chunks.iter().filter(|chunk| chunk.wanted > 0).map(|chunk| chunk.id).collect();
        self.end_parts(&scored);
    }

    fn finished(&self, id: SequenceId, reason: FinishReason) -> Event {
        let cached_tokens = self.scheduler.get(id).and_then(|s| s.cached_tokens).unwrap_or(0);
        Event::Finished { reason, cached_tokens }
    }

    fn end(&mut self, id: SequenceId, event: Event) {
        self.scheduler.remove(id);
        let job = self.jobs.remove(&id);
        if let Some(Running { task: Task::Score { group, .. }, .. }) = job {
            self.forget_group(group);
        }
        // First, so that whoever reads the last event finds the counters without this sequence.
        self.publish();
        if let Some(job) = job {
            let _ = job.events.try_send(event);
        }
    }

    fn publish(&mut self) {
        self.forget_encoded();
        let changes = self.scheduler.take_prompt_changes();
        let (s, cache) = (&self.shared.counters, self.scheduler.cache());
        s.running.store(self.scheduler.num_running(), Relaxed);
        s.encoded_positions.store(self.encoded.values().map(CrossKeyValues::positions).sum(), Relaxed);
        s.kv_blocks_used.store(cache.num_held(), Relaxed);
        s.kv_blocks_cached.store(cache.num_kept(), Relaxed);
        s.prompt_blocks.store(cache.num_of_prompts(), Relaxed);
        s.evictions.store(cache.evictions(), Relaxed);
        s.preemptions.store(self.scheduler.preemptions(), Relaxed);
        if !changes.is_empty() {
            let mut prompts = self.shared.cached_prompts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            for (namespace, came) in changes {
                if came {
                    prompts.insert(namespace)
                } else {
                    prompts.remove(&namespace)
                };
            }
        }
    }
}

struct Unready(Arc<Shared>);

impl Drop for Unready {
    fn drop(&mut self) {
        self.0.ready.store(false, Relaxed);
    }
}
