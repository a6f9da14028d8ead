//! One thread that owns the device and batches sequences; everything else sends it messages.
//!
//! The engine knows token ids and rows, and neither text, tasks nor HTTP. The queue in is bounded
//! and never waited on; the events out can never fill, so a slow reader cannot hold the batch up.

mod admission;
pub mod block_manager;
pub mod cache;
pub mod config;
pub mod draft;
pub mod encoder;
mod error;
pub mod fairness;
mod mail;
mod nearest;
pub mod prefix;
pub mod prompts;
pub mod queue;
pub mod quota;
pub mod request;
pub mod runner;
pub mod sampling;
pub mod scheduler;
pub mod score;
pub mod sequence;
mod stats;
mod trial;
mod worker;

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::Instant,
};

use tokio::sync::{
    mpsc::{self, error::TrySendError},
    oneshot,
};

use crate::{
    model::{
        Model,
        neighbours::{Nearest, Neighbours},
    },
    packing::{Packing, PromptShape, TokenBudget},
    prompt::LearnedPrompt,
};
use admission::Admission;
pub use config::EngineConfig;
use encoder::EncoderLimits;
pub use error::{StartError, SubmitError};
use mail::{Job, Mail, Shared, WarmUp, Work};
use nearest::{MAX_SEARCHES, Search};
use request::{CacheNamespace, Event, Goal, Request, Tenant};
use runner::Runner;
use scheduler::Limits;
use score::ScorePlan;
use stats::Counters;
pub use stats::EngineStats;

/// Learned prompts that may wait to be warmed; more are computed at their first use.
const MAX_WARM_UPS: usize = 1024;

/// Tokens that are guessed of a sequence in a step on a CPU: eight rows cost little more than one there.
const CPU_DRAFT_TOKENS: usize = 7;

/// Blocks of the cache beyond what the batch can fill: millions of positions of prompts and texts that
/// may come again. A bound for what is known of blocks, however small they are.
const MAX_KEPT_BLOCKS: usize = 1 << 16;

/// A handle to the engine thread. Cheap to clone; when the last is dropped the thread finishes
/// what it has and stops.
#[derive(Debug, Clone)]
pub struct Engine {
    mail: mpsc::Sender<Mail>,
    shared: Arc<Shared>,
}

/// The engine thread's end.
#[derive(Debug)]
pub struct EngineThread {
    thread: JoinHandle<()>,
}

/// A running request's events. Dropping it is the one way to cancel.
#[derive(Debug)]
pub struct EventStream {
    events: mpsc::Receiver<Event>,
    cached_tokens: Arc<AtomicUsize>,
}

impl EventStream {
    /// Positions of the input whose keys and values were found in the cache: known with the first
    /// event, 0 before.
    pub fn cached_tokens(&self) -> usize {
        self.cached_tokens.load(Relaxed)
    }

    /// The next event; `None` after the last one, or when the engine's thread died.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// As [`next`](Self::next), for callers without an async runtime.
    pub fn blocking_next(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }
}

impl Engine {
    /// Runs one forward pass, then starts the thread. The model may be shared: the engine keeps nothing
    /// in it.
    ///
    /// # Errors
    /// The forward pass failed, or the KV cache has too few bytes.
    pub fn start(model: impl Into<Arc<Model>>, config: EngineConfig) -> Result<(Engine, EngineThread), StartError> {
        let (model, config) = (model.into(), config.at_least_one());
        let block_bytes = model.backend().block_bytes(&model.kv_shape());
        let context = model.info().context_length;
        let is_cpu = model.info().device.is_cpu();
        // Every slot in the batch at full length, and what is kept of prompts and texts beside them.
        let useful = config.max_batch * context.div_ceil(crate::kernels::layout::BLOCK_SIZE) + MAX_KEPT_BLOCKS;
        let (kv_cache_bytes, encoder) = EncoderLimits::of(&model, &config)?;
        let num_blocks = (kv_cache_bytes / block_bytes).min(useful);
        if num_blocks == 0 {
            return Err(StartError::KvCacheTooSmall { bytes: kv_cache_bytes, holds: "one block", needed: block_bytes });
        }
        let max_encoder = encoder.map_or(context, |encoder| encoder.max_positions);
        let max_sequence = num_blocks * crate::kernels::layout::BLOCK_SIZE;
        let packing = Packing::of(model.info()).bounded(max_encoder, max_sequence);
        let mut runner = Runner::new(model, num_blocks)?;
        trial::first_pass(&mut runner)?;
        let fair_step_tokens = match config.fair_step_tokens {
            Some(tokens) => tokens,
            None => trial::cheap_rows(&mut runner, num_blocks.min(config.max_step_tokens))?,
        };
        tracing::debug!(fair_step_tokens, num_blocks, "the engine is ready");
        let shared = Arc::new(Shared {
            packing,
            encoder,
            waiting: Admission::for_requests(config.max_waiting),
            warm_ups: Admission::new(MAX_WARM_UPS, MAX_WARM_UPS),
            searches: Admission::new(MAX_SEARCHES, MAX_SEARCHES),
            cached_prompts: Mutex::new(HashSet::new()),
            ready: AtomicBool::new(true),
            drain_by: Mutex::new(None),
            draining: AtomicBool::new(false),
            counters: Counters::new(num_blocks, block_bytes),
        });
        // A letter for each slot, and one to wake the thread.
        let (mail, inbox) = mpsc::channel(config.max_waiting + MAX_WARM_UPS + MAX_SEARCHES + 1);
        let limits = Limits {
            config,
            num_blocks,
            fair_step_tokens: fair_step_tokens.max(1),
            max_encoded: shared.encoder.as_ref().map_or(0, |encoder| encoder.max_positions),
            draft_tokens: config.draft_tokens.unwrap_or(if is_cpu { CPU_DRAFT_TOKENS } else { 0 }),
        };
        let worker = worker::Worker::new(runner, limits, inbox, shared.clone());
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || worker.run())
            .map_err(candle_core::Error::wrap)?;
        Ok((Engine { mail, shared }, EngineThread { thread }))
    }

    /// Hands over a request. Never waits. `max_tokens` is cut to what the context leaves. With an
    /// encoder, its tokens are the encoder's input and the decoder begins with its start token; a
    /// prompt of keys and values is the decoder's.
    pub fn submit(&self, request: Request) -> Result<EventStream, SubmitError> {
        let (job, stream) = self.job(request)?;
        self.send(vec![job])?;
        Ok(stream)
    }

    /// Hands over several requests that the engine sees at once, so that they share a step if they fit into one. Each is taken or
    /// not by itself.
    pub fn submit_all(&self, requests: Vec<Request>) -> Vec<Result<EventStream, SubmitError>> {
        let mut jobs = Vec::with_capacity(requests.len());
        let own = |request| {
            let (job, stream) = self.job(request)?;
            jobs.push(job);
            Ok(stream)
        };
        let streams: Vec<_> = requests.into_iter().map(own).collect();
        match self.send(jobs) {
            Ok(()) => streams,
            Err(error) => streams.into_iter().map(|stream| stream.and(Err(error.clone()))).collect(),
        }
    }

    fn send(&self, jobs: Vec<Job>) -> Result<(), SubmitError> {
        if jobs.is_empty() { Ok(()) } else { self.post(Mail::Jobs(jobs), &self.shared.waiting) }
    }

    fn post(&self, mail: Mail, slots: &Admission) -> Result<(), SubmitError> {
        self.mail.try_send(mail).map_err(|e| match e {
            TrySendError::Full(_) => SubmitError::Full { limit: slots.limit() },
            TrySendError::Closed(_) => SubmitError::Closed,
        })
    }

    /// A request that the engine takes, with its place in the queue.
    fn job(&self, mut request: Request) -> Result<(Job, EventStream), SubmitError> {
        let shared = &self.shared;
        let mut work = match &request.goal {
            Goal::Generate(sampling) if sampling.max_tokens > 0 => Work::Generate(sampling.clone()),
            Goal::Generate(_) => return Err(SubmitError::Empty),
            Goal::Score(continuations) => Work::Score(ScorePlan::new(continuations)?),
        };
        if request.tokens.is_empty() {
            return Err(SubmitError::Empty);
        }
        let shape = PromptShape::of(request.prompt.as_deref());
        let packed = shared.packing.pack(shape, std::mem::take(&mut request.tokens))?;
        shared.packing.check(&packed)?;
        request.tokens = packed.decoder;
        let encoder = shared.encoder.as_ref().zip(packed.encoder).map(|(limits, input)| {
            let content = limits.content(&input, request.namespace.take(), request.tenant.owner);
            (input, content)
        });
        let left = shared.packing.max_decoder() - request.tokens.len();
        // One event a token and one at the end: sending never has to wait.
        let most_events = match &mut work {
            Work::Generate(sampling) => {
                sampling.max_tokens = sampling.max_tokens.min(left);
                sampling.max_tokens + 1
            }
            Work::Score(plan) if plan.longest() <= left => 1,
            Work::Score(plan) => {
                let found = request.tokens.len() + plan.longest();
                return Err(SubmitError::TooLong { found, limit: shared.packing.max_decoder() });
            }
        };
        if shared.draining.load(Relaxed) {
            return Err(SubmitError::Closed);
        }
        let slot = Admission::take(&shared.waiting, request.tenant).map_err(|limit| SubmitError::Full { limit })?;
        let (events, stream) = mpsc::channel(most_events);
        let cached_tokens = Arc::new(AtomicUsize::new(0));
        let job = Job { request, work, encoder, events, cached_tokens: Arc::clone(&cached_tokens), slot };
        Ok((job, EventStream { events: stream, cached_tokens }))
    }

    /// Asks for a learned prompt's keys and values to be computed when there is time and room, so
    /// that its first request finds them. `namespace` is the digest of its content, as in
    /// [`Request::namespace`]. Never waits; what cannot be done now is left to the first request.
    pub fn warm_up(&self, prompt: Arc<LearnedPrompt>, namespace: CacheNamespace) {
        // What goes into an encoder is computed with every text anew.
        if self.shared.encoder.is_some() || self.is_cached(namespace) || self.shared.draining.load(Relaxed) {
            return;
        }
        if let Ok(slot) = Admission::take(&self.shared.warm_ups, Tenant::default()) {
            // If the thread is gone, so is the cache.
            let _ = self.mail.try_send(Mail::WarmUp(WarmUp { prompt, namespace, _slot: slot }));
        }
    }

    /// Compares rows with the model's vocabulary, a chunk of it between two steps: requests are held up by no more, and
    /// neither what they are answered nor who is next depends on it. Never waits. Dropping the receiver ends it; it gets
    /// an error where no answer comes, because the engine drains or died.
    pub fn nearest(
        &self,
        neighbours: Neighbours,
    ) -> Result<oneshot::Receiver<candle_core::Result<Nearest>>, SubmitError> {
        let slots = &self.shared.searches;
        if self.shared.draining.load(Relaxed) {
            return Err(SubmitError::Closed);
        }
        let slot = Admission::take(slots, Tenant::default()).map_err(|limit| SubmitError::Full { limit })?;
        let (answer, found) = oneshot::channel();
        self.post(Mail::Nearest(Search { neighbours, answer, _slot: slot }), slots)?;
        Ok(found)
    }

    /// Whether all keys and values of the learned prompt with this namespace are in the cache.
    pub fn is_cached(&self, namespace: CacheNamespace) -> bool {
        self.shared.cached_prompts.lock().unwrap_or_else(PoisonError::into_inner).contains(&namespace)
    }

    /// The longest sequence that is taken, its new tokens included.
    pub fn max_sequence(&self) -> usize {
        self.shared.packing.max_decoder()
    }

    /// How many tokens a learned prompt leaves for a text and an answer.
    pub fn token_budget(&self, prompt: Option<&LearnedPrompt>) -> TokenBudget {
        self.shared.packing.budget(PromptShape::of(prompt))
    }

    /// A snapshot of the counters.
    pub fn stats(&self) -> EngineStats {
        let shared = &self.shared;
        EngineStats {
            ready: shared.ready.load(Relaxed) && !shared.draining.load(Relaxed) && !self.mail.is_closed(),
            waiting: shared.waiting.taken(),
            encoded_positions_total: shared.encoder.as_ref().map_or(0, |encoder| encoder.max_positions),
            cached_prompts: shared.cached_prompts.lock().unwrap_or_else(PoisonError::into_inner).len(),
            ..shared.counters.read()
        }
    }

    /// Refuses new requests, lets taken ones finish, and cancels those that have not by
    /// `deadline`. Returns at once; [`EngineThread::join`] waits.
    pub fn drain(&self, deadline: Instant) {
        *self.shared.drain_by.lock().unwrap_or_else(PoisonError::into_inner) = Some(deadline);
        self.shared.draining.store(true, Relaxed);
        // A full inbox means that the thread is awake.
        let _ = self.mail.try_send(Mail::Wake);
    }

    /// Completes when the thread takes no more requests, drained or dead.
    pub async fn closed(&self) {
        self.mail.closed().await;
    }
}

impl EngineThread {
    /// Waits for the thread; `false` if it panicked.
    pub fn join(self) -> bool {
        self.thread.join().is_ok()
    }
}
