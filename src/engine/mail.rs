//! What the handles of the engine and its thread have between them: messages, and what both see.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize},
    },
    time::Instant,
};

use tokio::sync::mpsc;

use super::{
    admission::{Admission, Slot},
    encoder::EncoderLimits,
    nearest::Search,
    prefix::ChainHash,
    request::{CacheNamespace, Event, InputToken, Request, SamplingParams},
    score::ScorePlan,
    stats::Counters,
};
use crate::{packing::Packing, prompt::LearnedPrompt};

/// What the thread is sent.
#[derive(Debug)]
pub(super) enum Mail {
    /// Requests that are seen at once, so that they share a step if they fit into one.
    Jobs(Vec<Job>),
    WarmUp(WarmUp),
    /// Rows to compare with the vocabulary.
    Nearest(Search),
    /// Nothing but a reason to look at [`Shared`] again.
    Wake,
}

/// A request on its way to the thread.
#[derive(Debug)]
pub(super) struct Job {
    pub request: Request,
    pub work: Work,
    /// The encoder's input, if the model has an encoder, and the name of its content; the request's
    /// tokens are the decoder's.
    pub encoder: Option<(Vec<InputToken>, Option<ChainHash>)>,
    pub events: mpsc::Sender<Event>,
    pub cached_tokens: Arc<AtomicUsize>,
    pub slot: Slot,
}

/// A request's goal, checked.
#[derive(Debug)]
pub(super) enum Work {
    Generate(SamplingParams),
    Score(ScorePlan),
}

/// A learned prompt to compute ahead of its first request.
#[derive(Debug)]
pub(super) struct WarmUp {
    pub prompt: Arc<LearnedPrompt>,
    pub namespace: CacheNamespace,
    /// Held until the prompt is computed.
    pub _slot: Slot,
}

/// What handles and the thread both see.
#[derive(Debug)]
pub(super) struct Shared {
    /// How the model reads an input, and how long it may be: the context, or what the cache can hold.
    pub packing: Packing,
    /// The bounds of the encoder's output, if the model has an encoder.
    pub encoder: Option<EncoderLimits>,
    /// Requests submitted and not yet in the batch.
    pub waiting: Arc<Admission>,
    pub warm_ups: Arc<Admission>,
    /// Comparisons with the vocabulary that wait or run.
    pub searches: Arc<Admission>,
    /// The learned prompts whose keys and values are in the cache as a whole.
    pub cached_prompts: Mutex<HashSet<CacheNamespace>>,
    pub ready: AtomicBool,
    /// Set once, by [`Engine::drain`](super::Engine::drain). Read at each step, so a lock is cheap enough.
    pub drain_by: Mutex<Option<Instant>>,
    pub draining: AtomicBool,
    pub counters: Counters,
}
