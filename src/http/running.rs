//! An answer while it is made: the engine's tokens become text, and the first stop text ends it.

use std::time::Instant;

use futures::Stream;
use metrics::{Histogram, histogram};

use super::{
    App,
    access::Caller,
    prepare::Prepared,
    problem::Problem,
    types::{Finish, TokenInfo, TokenLogprob, Usage},
};
use crate::{
    engine::{
        EventStream,
        request::{Event, GeneratedToken},
    },
    prompt::Version,
    telemetry,
    tokenizer::{Detokenizer, Tokenizer},
};

/// One choice that the engine works on. Dropping it cancels it.
#[derive(Debug)]
pub struct Running {
    events: EventStream,
    detokenizer: Detokenizer,
    tokenizer: Tokenizer,
    logprobs: bool,
    completion_tokens: usize,
    measured: Measured,
    caller: Caller,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.caller.count_tokens(self.completion_tokens);
    }
}

/// What is measured of a choice.
#[derive(Debug)]
struct Measured {
    submitted: Instant,
    /// When the last token came.
    last: Instant,
    first_token: Histogram,
    inter_token: Histogram,
    output_tokens: Histogram,
    answer: Histogram,
}

impl Measured {
    fn new(version: &Version) -> Self {
        let task = version.task.as_str();
        let labels = [("task", telemetry::task_label(task))];
        let now = Instant::now();
        Self {
            submitted: now,
            last: now,
            first_token: histogram!(telemetry::FIRST_TOKEN_SECONDS, &labels),
            inter_token: histogram!(telemetry::INTER_TOKEN_SECONDS, &labels),
            output_tokens: histogram!(telemetry::OUTPUT_TOKENS, &labels),
            answer: histogram!(telemetry::VERSION_SECONDS, &telemetry::version_labels(task, &version.digest.id())),
        }
    }

    fn token(&mut self, is_first: bool) {
        let now = Instant::now();
        match is_first {
            true => self.first_token.record(now - self.submitted),
            false => self.inter_token.record(now - self.last),
        }
        self.last = now;
    }
}

/// What happens to a choice: any number of deltas, then one end.
#[derive(Debug)]
pub enum Piece {
    /// Text and tokens that are final.
    Delta { output: String, tokens: Option<Vec<TokenInfo>> },
    /// Nothing follows; `output` is the text that was still held back.
    End { output: String, finish: Finish, cached_tokens: usize, completion_tokens: usize },
}

/// A choice as a whole.
#[derive(Debug)]
pub struct Finished {
    pub output: String,
    pub tokens: Option<Vec<TokenInfo>>,
    pub finish: Finish,
    pub cached_tokens: usize,
    pub completion_tokens: usize,
}

/// Notes how long the input of a task's request is.
pub fn record_input(caller: &Caller, task: &str, tokens: usize) {
    caller.count_tokens(tokens);
    histogram!(telemetry::INPUT_TOKENS, "task" => telemetry::task_label(task)).record(tokens as f64);
}

/// Hands every choice of a request to the engine, or none.
pub fn start(app: &App, prepared: &mut Prepared) -> Result<Vec<Running>, Problem> {
    record_input(&prepared.caller, prepared.version.task.as_str(), prepared.prompt_tokens);
    std::mem::take(&mut prepared.requests)
        .into_iter()
        .map(|request| {
            Ok(Running {
                events: app.engine.submit(request)?,
                detokenizer: app.tokenizer.detokenizer(prepared.stop.clone()),
                tokenizer: app.tokenizer.clone(),
                logprobs: prepared.logprobs,
                completion_tokens: 0,
                measured: Measured::new(&prepared.version),
                caller: prepared.caller.clone(),
            })
        })
        .collect()
}

impl Running {
    /// What happens next. Not to be called after the end or an error.
    pub async fn next(&mut self) -> Result<Piece, Problem> {
        loop {
            match self.events.next().await {
                Some(Event::Token(token)) => {
                    if let Some(piece) = self.token(token)? {
                        return Ok(piece);
                    }
                }
                Some(Event::Finished { reason, cached_tokens }) => {
                    let rest = self.detokenizer.finish()?;
                    let finish = if rest.stopped { Finish::Stop } else { reason.into() };
                    return Ok(self.end(rest.text, finish, cached_tokens));
                }
                Some(Event::Scored { .. }) => {
                    return Err(Problem::internal("a request for new tokens was answered with scores"));
                }
                Some(Event::NotFinite) => return Err(Problem::not_finite(self.completion_tokens)),
                Some(Event::NoTokenAllowed(reason)) => {
                    return Err(Problem::no_token_allowed(self.completion_tokens, &reason));
                }
                Some(Event::Failed) => return Err(Problem::internal("the forward pass failed")),
                None => return Err(Problem::internal("the engine ended before the answer")),
            }
        }
    }

    /// The choice as a stream; the last item is the end or an error.
    pub fn into_stream(mut self) -> impl Stream<Item = Result<Piece, Problem>> {
        async_stream::stream! {
            loop {
                let piece = self.next().await;
                let last = !matches!(piece, Ok(Piece::Delta { .. }));
                yield piece;
                if last {
                    break;
                }
            }
        }
    }

    /// Waits for the whole of it.
    pub async fn finish(mut self) -> Result<Finished, Problem> {
        let mut text = String::new();
        let mut all = self.logprobs.then(Vec::new);
        loop {
            match self.next().await? {
                Piece::Delta { output, tokens } => {
                    text += &output;
                    if let (Some(all), Some(tokens)) = (&mut all, tokens) {
                        all.extend(tokens);
                    }
                }
                Piece::End { output, finish, cached_tokens, completion_tokens } => {
                    text += &output;
                    return Ok(Finished { output: text, tokens: all, finish, cached_tokens, completion_tokens });
                }
            }
        }
    }

    /// `None` while the token's text is held back and nothing has to be reported.
    fn token(&mut self, token: GeneratedToken) -> Result<Option<Piece>, Problem> {
        self.measured.token(self.completion_tokens == 0);
        self.completion_tokens += 1;
        let delta = self.detokenizer.push(token.id)?;
        if delta.stopped {
            return Ok(Some(self.end(delta.text, Finish::Stop, self.events.cached_tokens())));
        }
        let tokens = self.logprobs.then(|| vec![self.describe(&token)]);
        let silent = delta.text.is_empty() && tokens.is_none();
        Ok((!silent).then_some(Piece::Delta { output: delta.text, tokens }))
    }

    fn end(&self, output: String, finish: Finish, cached_tokens: usize) -> Piece {
        self.measured.output_tokens.record(self.completion_tokens as f64);
        self.measured.answer.record(self.measured.submitted.elapsed());
        Piece::End { output, finish, cached_tokens, completion_tokens: self.completion_tokens }
    }

    fn describe(&self, token: &GeneratedToken) -> TokenInfo {
        let one = |id, logprob| TokenLogprob { id, text: self.tokenizer.token_text(id), logprob };
        TokenInfo {
            token: one(token.id, token.logprob.unwrap_or_default()),
            top_logprobs: token.top.iter().map(|&(id, logprob)| one(id, logprob)).collect(),
        }
    }
}

impl Prepared {
    /// What was counted, once `completion_tokens` of all choices and the cache hits are known.
    pub fn usage(&self, cached_tokens: usize, completion_tokens: usize) -> Usage {
        Usage {
            virtual_tokens: self.virtual_tokens,
            prompt_tokens: self.prompt_tokens,
            cached_tokens,
            completion_tokens,
        }
    }
}
