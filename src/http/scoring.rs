//! An input whose continuations are scored: from the request to the log-probabilities.

use std::{sync::Arc, time::Instant};

use metrics::histogram;

use super::{
    App,
    access::Caller,
    prepare::{self, Scheduling, Tokenized},
    problem::{Code, Problem},
    running::record_input,
    types::Usage,
};
use crate::{
    engine::{
        EventStream, SubmitError,
        request::{CacheNamespace, Event, FinishReason, Goal, Request},
    },
    prompt::{Version, template::Input},
    telemetry,
};

/// What a call has in common for all of its inputs.
#[derive(Debug, Clone)]
pub struct Call {
    pub caller: Caller,
    pub version: Arc<Version>,
    pub scheduling: Scheduling,
    pub started: Instant,
}

/// An input that the engine works on. Dropping it cancels it.
#[derive(Debug)]
pub struct Running {
    pub version: Arc<Version>,
    /// The ids of the input's text.
    pub ids: Vec<u32>,
    events: EventStream,
    submitted: Instant,
}

/// The log-probabilities of each token of each continuation.
#[derive(Debug)]
pub struct Scored {
    pub version: Arc<Version>,
    pub ids: Vec<u32>,
    pub log_probs: Vec<Vec<f32>>,
    pub usage: Usage,
}

impl Call {
    /// Resolves the task and checks what any call may say.
    ///
    /// # Errors
    /// There is no such task or version, or a value is out of its range.
    pub async fn new(
        app: &App,
        caller: Caller,
        task: &str,
        version: Option<&str>,
        (timeout_ms, priority): (Option<u64>, Option<i32>),
    ) -> Result<Self, Problem> {
        let started = Instant::now();
        let version = app.version(&caller, task, version).await?;
        let scheduling = Scheduling::check(app, &caller, timeout_ms, priority)?;
        Ok(Self { caller, version, scheduling, started })
    }

    /// The positions of an input.
    ///
    /// # Errors
    /// It does not fit the template, or leaves no room for a continuation.
    pub async fn tokenize(&self, app: &App, input: Input) -> Result<Tokenized, Problem> {
        let tokenized = prepare::tokenize(app, &self.version, input).await?;
        prepare::max_answer_tokens(app, &self.version, tokenized.text_len())?;
        Ok(tokenized)
    }

    /// Hands the first `given` positions of an input to the engine, to score continuations of them.
    ///
    /// # Errors
    /// The engine does not take it.
    pub fn start(
        &self,
        app: &App,
        tokenized: Tokenized,
        given: usize,
        continuations: Vec<Vec<u32>>,
    ) -> Result<Running, Problem> {
        let request = self.request(app, &tokenized, given, continuations);
        self.running(tokenized.text_ids(), app.engine.submit(request))
    }

    /// The engine's request to score continuations of the first `given` positions of an input.
    pub fn request(&self, app: &App, tokenized: &Tokenized, given: usize, continuations: Vec<Vec<u32>>) -> Request {
        let version = &self.version;
        let Tokenized { tokens, num_public } = tokenized;
        record_input(&self.caller, version.task.as_str(), tokenized.text_len());
        let given = given.min(tokens.len());
        Request {
            deadline: Some(self.started + self.scheduling.timeout),
            namespace: Some(CacheNamespace(version.digest.0)),
            public_prefix: (*num_public).min(given),
            tenant: prepare::tenant(app, &self.caller, &version.task),
            priority: self.scheduling.priority,
            ..Request::of(version.learned_prompt().cloned(), tokens[..given].to_vec(), Goal::Score(continuations))
        }
    }

    /// An input, by its ids, that was handed to the engine.
    ///
    /// # Errors
    /// The engine did not take it.
    pub fn running(&self, ids: Vec<u32>, submitted: Result<EventStream, SubmitError>) -> Result<Running, Problem> {
        let events = submitted.map_err(|error| match error {
            SubmitError::TooLong { found, limit } => Problem::new(
                Code::InputTooLong,
                format!(
                    "the learned prompt, the input and the longest text after it take {found} positions of {limit}: shorten \
                     the input or that text"
                ),
            ),
            error => error.into(),
        })?;
        Ok(Running { version: Arc::clone(&self.version), ids, events, submitted: Instant::now() })
    }
}

impl Running {
    /// Waits for the log-probabilities.
    ///
    /// # Errors
    /// The time is over, the server stops, or the forward pass fails.
    pub async fn finish(mut self) -> Result<Scored, Problem> {
        let (log_probs, cached_tokens) = match self.events.next().await {
            Some(Event::Scored { log_probs, cached_tokens }) => (log_probs, cached_tokens),
            Some(Event::Finished { reason: FinishReason::Timeout, .. }) => return Err(Problem::timeout()),
            Some(Event::Finished { .. }) => return Err(Problem::stopping()),
            Some(Event::NotFinite) => return Err(Problem::not_finite(0)),
            Some(Event::Token(_)) => return Err(Problem::internal("a request for scores was answered with tokens")),
            Some(Event::Failed | Event::NoTokenAllowed(_)) => return Err(Problem::internal("the forward pass failed")),
            None => return Err(Problem::internal("the engine ended before the answer")),
        };
        let labels = telemetry::version_labels(self.version.task.as_str(), &self.version.digest.id());
        histogram!(telemetry::VERSION_SECONDS, &labels).record(self.submitted.elapsed());
        let usage = Usage {
            virtual_tokens: self.version.prompt.num_virtual_tokens(),
            prompt_tokens: self.ids.len(),
            cached_tokens,
            completion_tokens: 0,
        };
        Ok(Scored { version: self.version, ids: self.ids, log_probs, usage })
    }
}

/// The inputs of a call that has one or several, and whether it has a list of them.
///
/// # Errors
/// There is none, both are given, or there are too many.
pub fn inputs(input: Option<Input>, inputs: Option<Vec<Input>>, most: usize) -> Result<(Vec<Input>, bool), Problem> {
    match (input, inputs) {
        (Some(input), None) => Ok((vec![input], false)),
        (None, Some(inputs)) if (1..=most).contains(&inputs.len()) => Ok((inputs, true)),
        (None, Some(inputs)) => Err(Problem::field("inputs", format!("found {}, expected 1 to {most}", inputs.len()))),
        (Some(_), Some(_)) => Err(Problem::field("inputs", "found beside \"input\", expected one of the two")),
        (None, None) => Err(Problem::field("input", "it is missing, expected \"input\" or \"inputs\"")),
    }
}
