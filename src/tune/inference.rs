//! Answers of the engine that serves, for evaluations: what a prompt is measured by is what a server with it
//! would say.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use super::TuneError;
use crate::{
    engine::{
        Engine, EngineConfig, EngineThread, EventStream, SubmitError,
        request::{CacheNamespace, Event, Goal, Request, SamplingParams},
        sampling::mask::TokenConstraint,
    },
    kernels::layout::BLOCK_SIZE,
    model::Model,
    packing::{InputToken, PromptShape},
    prompt::LearnedPrompt,
};

/// Sequences in a batch.
const BATCH: usize = 32;

/// Bytes for keys and values, unless a single sequence needs more.
const KV_CACHE_BYTES: usize = 512 << 20;

/// The name of the one learned prompt that an engine of an evaluation sees.
const NAMESPACE: CacheNamespace = CacheNamespace([1; 32]);

/// An engine that answers inputs of up to a length after one learned prompt, or after none. Its KV cache
/// is as large as a batch of them needs and is released when this is dropped.
#[derive(Debug)]
pub struct Inference {
    engine: Engine,
    /// `None` once it is joined.
    thread: Option<EngineThread>,
    prompt: Option<Arc<LearnedPrompt>>,
    stop_tokens: Vec<u32>,
}

impl Inference {
    /// Starts an engine for inputs of at most `max_input` tokens of text and as many as `max_new` new tokens.
    ///
    /// # Errors
    /// The engine does not start.
    pub fn start(
        model: &Arc<Model>,
        prompt: Option<&Arc<LearnedPrompt>>,
        max_input: usize,
        max_new: usize,
    ) -> Result<Self, TuneError> {
        let shape = PromptShape::of(prompt.map(Arc::as_ref));
        let config = EngineConfig {
            max_batch: BATCH,
            // There is one tenant, so nothing is shared out.
            fair_step_tokens: Some(BATCH),
            kv_cache_bytes: kv_cache_bytes(model, shape, max_input, max_new),
            ..EngineConfig::default()
        };
        let (engine, thread) = Engine::start(Arc::clone(model), config)?;
        let stop_tokens = model.info().eos_token_ids.clone();
        Ok(Self { engine, thread: Some(thread), prompt: prompt.cloned(), stop_tokens })
    }

    /// The likeliest tokens after each input, up to the end-of-sequence token, which is left out, or to
    /// `max_new`, or to the end of the context. An input that has nothing to predict from (no text, and no
    /// rows before it) has no answer. Answers obey `constraint`. `done` is told how many inputs are answered.
    ///
    /// # Errors
    /// An input is too long, or a forward pass fails.
    pub fn greedy(
        &self,
        inputs: &[Vec<InputToken>],
        max_new: usize,
        constraint: Option<&Arc<dyn TokenConstraint>>,
        done: &mut dyn FnMut(usize),
    ) -> Result<Vec<Vec<u32>>, TuneError> {
        let sampling = SamplingParams {
            max_tokens: max_new,
            stop_tokens: self.stop_tokens.clone(),
            constraint: constraint.cloned(),
            ..SamplingParams::default()
        };
        let answers = self.answer(inputs, &Goal::Generate(sampling), collect, done)?;
        Ok(answers.into_iter().map(Option::unwrap_or_default).collect())
    }

    /// The log-probability of each token of each continuation after each input; `None` for an input that has nothing to
    /// predict from.
    ///
    /// # Errors
    /// An input is too long, there are too many continuations, or a forward pass fails.
    pub fn score(
        &self,
        inputs: &[Vec<InputToken>],
        continuations: &[Vec<u32>],
    ) -> Result<Vec<Option<Vec<Vec<f32>>>>, TuneError> {
        self.answer(inputs, &Goal::Score(continuations.to_vec()), scores, &mut |_| ())
    }

    /// What `read` makes of the answer to each input, `None` where there is nothing to predict from. As many as the
    /// batch takes run at once.
    fn answer<T>(
        &self,
        inputs: &[Vec<InputToken>],
        goal: &Goal,
        read: impl Fn(EventStream) -> Result<T, TuneError>,
        done: &mut dyn FnMut(usize),
    ) -> Result<Vec<Option<T>>, TuneError> {
        let shape = PromptShape::of(self.prompt.as_deref());
        let request = |input: &[InputToken]| Request {
            namespace: Some(NAMESPACE),
            ..Request::of(self.prompt.clone(), shape.applied_to(input), goal.clone())
        };
        let mut answers: Vec<Option<T>> = inputs.iter().map(|_| None).collect();
        let mut running: VecDeque<(usize, EventStream)> = VecDeque::new();
        let mut waiting = inputs.iter().enumerate();
        loop {
            while running.len() < 2 * BATCH
                && let Some((i, input)) = waiting.next()
            {
                match self.engine.submit(request(input)) {
                    Ok(stream) => running.push_back((i, stream)),
                    Err(SubmitError::Empty | SubmitError::NoText) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            let Some((i, stream)) = running.pop_front() else { break };
            answers[i] = Some(read(stream)?);
            done(i + 1);
        }
        done(inputs.len());
        Ok(answers)
    }
}

impl Drop for Inference {
    fn drop(&mut self) {
        // Whatever still runs has no reader any more.
        self.engine.drain(Instant::now());
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

/// The ids of a request's new tokens.
fn collect(mut stream: EventStream) -> Result<Vec<u32>, TuneError> {
    let mut ids = Vec::new();
    loop {
        match stream.blocking_next() {
            Some(Event::Token(token)) => ids.push(token.id),
            Some(Event::Finished { .. }) => return Ok(ids),
            Some(Event::NotFinite) => return Err(TuneError::NotFinite),
            Some(Event::NoTokenAllowed(reason)) => return Err(TuneError::NoTokenAllowed { reason }),
            Some(Event::Scored { .. } | Event::Failed) | None => {
                return Err(TuneError::EngineFailed);
            }
        }
    }
}

/// The scores of a request that asked for them.
fn scores(mut stream: EventStream) -> Result<Vec<Vec<f32>>, TuneError> {
    match stream.blocking_next() {
        Some(Event::Scored { log_probs, .. }) => Ok(log_probs),
        Some(Event::NotFinite) => Err(TuneError::NotFinite),
        Some(Event::Token(_) | Event::Finished { .. } | Event::NoTokenAllowed(_) | Event::Failed) | None => {
            Err(TuneError::EngineFailed)
        }
    }
}

/// The bytes that a batch of sequences of these lengths takes: at least those of one sequence, and no more
/// than [`KV_CACHE_BYTES`] beyond that.
fn kv_cache_bytes(model: &Model, prompt: PromptShape, max_input: usize, max_new: usize) -> usize {
    let info = model.info();
    let positions = (prompt.num_virtual_tokens() + max_input + max_new + 1).min(info.context_length);
    let blocks = model.backend().block_bytes(&model.kv_shape()) * positions.div_ceil(BLOCK_SIZE);
    let one = match &info.encoder {
        None => blocks,
        // Half of the bytes are for what the encoder leaves.
        Some(_) => 2 * blocks.max(positions * model.cross_bytes()),
    };
    one.max((one * BATCH).min(KV_CACHE_BYTES))
}
