//! From a request's words to the engine's numbers: resolve the task, fill in defaults, check every
//! range, render, tokenize, and see that it fits the context.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    App,
    access::Caller,
    problem::{Code, Problem, ProblemError},
    types::GenerateRequest,
};
use crate::{
    engine::{
        request::{CacheNamespace, Goal, Request, SamplingParams, Tenant},
        sampling::mask::TokenConstraint,
    },
    input::{InputEncoder, InputError, truncation},
    packing::{self, InputToken, PromptShape, TokenBudget},
    prompt::{
        LearnedPrompt, TaskName, Version,
        chat::{EdgeTokens, Message},
        grammar::Grammar,
        template::Input,
    },
    sampling::{Fault, MAX_STOP_BYTES, SamplingOptions, SamplingValues},
};

/// The most answers to one request.
const MAX_CHOICES: usize = 16;
const MAX_LOGPROBS: usize = 20;
/// The most forbidden words, and the most tokens whose log-probabilities are asked for.
const MAX_LISTED: usize = 128;
const MAX_PRIORITY: i32 = 1000;
/// The priority of a batch's lines that name none: after all that somebody waits for.
const BATCH_PRIORITY: i32 = 100;
/// Texts longer than this are tokenized off the async threads.
const LONG_TEXT: usize = 16 * 1024;

/// A request that the engine can take, once for each choice.
#[derive(Debug)]
pub struct Prepared {
    /// The answer's id.
    pub id: String,
    /// Held until the answer is complete.
    pub version: Arc<Version>,
    /// One for each choice.
    pub requests: Vec<Request>,
    pub stop: Vec<String>,
    pub logprobs: bool,
    pub virtual_tokens: usize,
    pub prompt_tokens: usize,
    pub caller: Caller,
}

/// Checks a request to `task` and makes it ready.
pub async fn prepare(app: &App, caller: &Caller, task: &str, request: GenerateRequest) -> Result<Prepared, Problem> {
    let started = Instant::now();
    let version = app.version(caller, task, request.version.as_deref()).await?;
    let settings = Settings::check(app, caller, &version, &Parameters::from(&request)).await?;
    let tokenized = tokenize(app, &version, request.input).await?;
    settings.prepare(app, caller, version, tokenized, started)
}

/// What a request says beside its input.
#[derive(Debug, Clone, Default)]
pub struct Parameters {
    pub sampling: SamplingOptions,
    pub seed: Option<u64>,
    /// Added to the logits of tokens, each named once.
    pub logit_bias: Vec<(u32, f32)>,
    pub logprobs: Option<usize>,
    /// Tokens whose log-probabilities are reported too.
    pub logprob_token_ids: Vec<u32>,
    /// Texts that the answer does not have.
    pub bad_words: Vec<String>,
    /// What the answer must obey.
    pub grammar: Option<Grammar>,
    pub n: Option<usize>,
    pub ignore_eos: Option<bool>,
    pub timeout_ms: Option<u64>,
    pub priority: Option<i32>,
}

impl From<&GenerateRequest> for Parameters {
    fn from(request: &GenerateRequest) -> Self {
        Self {
            sampling: request.sampling(),
            seed: request.seed,
            logit_bias: Vec::new(),
            // To ask for some tokens' is to ask for log-probabilities.
            logprobs: request.logprobs.or(request.logprob_token_ids.is_some().then_some(0)),
            logprob_token_ids: request.logprob_token_ids.clone().unwrap_or_default(),
            bad_words: request.bad_words.clone().unwrap_or_default(),
            grammar: request.grammar.clone(),
            n: request.n,
            ignore_eos: request.ignore_eos,
            timeout_ms: request.timeout_ms,
            priority: request.priority,
        }
    }
}

impl Settings {
    /// A request for an answer to these token ids.
    ///
    /// # Errors
    /// They leave no room for an answer.
    pub fn prepare(
        mut self,
        app: &App,
        caller: &Caller,
        version: Arc<Version>,
        tokenized: Tokenized,
        started: Instant,
    ) -> Result<Prepared, Problem> {
        let settings = &mut self;
        let prompt_tokens = tokenized.text_len();
        let Tokenized { tokens, num_public } = tokenized;
        let virtual_tokens = version.prompt.num_virtual_tokens();
        let most = max_answer_tokens(app, &version, prompt_tokens)?;
        settings.sampling.max_tokens = settings.sampling.max_tokens.min(most);
        let tenant = tenant(app, caller, &version.task);
        let requests = (0..settings.choices)
            .map(|i| {
                let seed = settings.sampling.seed.wrapping_add(i as u64);
                let sampling = SamplingParams { seed, ..settings.sampling.clone() };
                let deadline = Some(started + settings.scheduling.timeout);
                Request {
                    deadline,
                    namespace: Some(CacheNamespace(version.digest.0)),
                    public_prefix: num_public,
                    tenant,
                    priority: settings.scheduling.priority,
                    ..Request::of(version.learned_prompt().cloned(), tokens.clone(), Goal::Generate(sampling))
                }
            })
            .collect();
        Ok(Prepared {
            id: uuid::Uuid::now_v7().to_string(),
            version,
            requests,
            logprobs: settings.sampling.logprobs.is_some(),
            stop: self.stop,
            virtual_tokens,
            prompt_tokens,
            caller: caller.clone(),
        })
    }
}

/// Whom the engine counts a request for: each of a caller's tasks by itself. It needs to tell them apart,
/// not to know them.
pub fn tenant(app: &App, caller: &Caller, task: &TaskName) -> Tenant {
    let mut hash = DefaultHasher::new();
    (caller.tenant, task).hash(&mut hash);
    Tenant { owner: caller.tenant, key: hash.finish(), weight: app.limits.task_weights.of(task.as_str()) }
}

/// An input as the positions that the model reads.
#[derive(Debug, Clone)]
pub struct Tokenized {
    /// `[learned prompt][text]`, unless the task's template places virtual tokens elsewhere.
    pub tokens: Vec<InputToken>,
    /// How many of the first positions are the same whatever the input is.
    pub num_public: usize,
}

impl Tokenized {
    /// The ids of a text that no template made.
    ///
    /// # Errors
    /// The version's template says where virtual tokens stand.
    pub fn of_ids(version: &Version, ids: &[u32], field: &str) -> Result<Self, Problem> {
        let prompt = version.learned_prompt();
        if prompt.is_some() && version.template.places_virtual_tokens() {
            let detail =
                "found token ids, expected a text: the task's template says where its virtual tokens stand in it";
            return Err(Problem::field(field, detail));
        }
        let shape = PromptShape::of(prompt.map(Arc::as_ref));
        Ok(Self { tokens: shape.followed_by(ids), num_public: shape.num_virtual_tokens() })
    }

    /// How many tokens of text there are.
    pub fn text_len(&self) -> usize {
        packing::text_len(&self.tokens)
    }

    /// The ids of the text.
    pub fn text_ids(&self) -> Vec<u32> {
        packing::text_ids(&self.tokens)
    }

    /// How many of the first positions come before the text that can be predicted from them: all up to the last virtual
    /// token, if they consist of embeddings, and at least one token that is read.
    pub fn num_given(&self, version: &Version) -> usize {
        let rows = self.tokens.iter().rposition(|token| token.vocab().is_none()).map_or(0, |last| last + 1);
        match &*version.prompt {
            LearnedPrompt::Embeddings(_) => rows.max(1),
            LearnedPrompt::KeyValues(_) => rows + 1,
        }
    }
}

/// Renders the input by the task's template and turns it into positions.
pub async fn tokenize(app: &App, version: &Arc<Version>, input: Input) -> Result<Tokenized, Problem> {
    let bytes = match &input {
        Input::Text(text) => text.len(),
        Input::Fields(fields) => fields.values().map(String::len).sum(),
    };
    let long = bytes + version.template.source().len() > LONG_TEXT;
    let tokenizer = app.tokenizer.clone();
    let version = Arc::clone(version);
    let limit = truncation::limit(app.engine.token_budget(version.learned_prompt().map(Arc::as_ref)), &version);
    let work = move || -> Result<Tokenized, Problem> {
        let encoder = InputEncoder::of(&version, &tokenizer);
        let tokens = encoder.encode(&input, limit)?;
        let fixed = match version.fixed_beginning.get() {
            Some(fixed) => fixed,
            None => {
                let fixed = encoder.fixed_beginning()?;
                version.fixed_beginning.get_or_init(|| fixed)
            }
        };
        // All or nothing: how much of it another request shares must not depend on this one's input.
        let num_public = if tokens.starts_with(fixed) { fixed.len() } else { 0 };
        Ok(Tokenized { tokens, num_public })
    };
    if long { super::blocking(work).await } else { work() }
}

/// Turns a conversation into positions by a version's chat template.
///
/// # Errors
/// The version has none, or it does not take these messages.
pub async fn tokenize_chat(app: &App, version: &Arc<Version>, messages: Vec<Message>) -> Result<Tokenized, Problem> {
    let Some(chat) = version.chat.clone() else {
        let detail = "the model's files have no chat template: ask it with /v1/completions";
        return Err(Problem::field("messages", detail));
    };
    let long = messages.iter().map(|message| message.content.len()).sum::<usize>() > LONG_TEXT;
    let tokenizer = app.tokenizer.clone();
    let version = Arc::clone(version);
    let edges = EdgeTokens { bos: app.model.chat.bos_token.clone(), eos: app.model.chat.eos_token.clone() };
    let work = move || -> Result<Tokenized, Problem> {
        let encoder = InputEncoder::of(&version, &tokenizer);
        let tokens = encoder.encode_conversation(&chat, &messages, &edges).map_err(|error| match error {
            InputError::Template(error) => Problem::field("messages", error.to_string()),
            error => error.into(),
        })?;
        Ok(Tokenized { tokens, num_public: 0 })
    };
    if long { super::blocking(work).await } else { work() }
}

/// How many tokens an answer to a text of this many tokens may have; at least 1.
pub fn max_answer_tokens(app: &App, version: &Version, prompt_tokens: usize) -> Result<usize, Problem> {
    if let Some(limit) = version.spec.limits.max_input_tokens.filter(|&limit| prompt_tokens > limit) {
        let detail = format!("the input has {prompt_tokens} tokens, the task takes at most {limit}: shorten it");
        return Err(Problem::new(Code::InputTooLong, detail));
    }
    let budget = app.engine.token_budget(version.learned_prompt().map(Arc::as_ref));
    match budget.output_after(prompt_tokens) {
        0 => Err(Problem::new(Code::InputTooLong, too_long(app, version, prompt_tokens, budget))),
        tokens => Ok(tokens),
    }
}

/// Says what an input that leaves no room for an answer takes, and what it may.
fn too_long(app: &App, version: &Version, prompt_tokens: usize, budget: TokenBudget) -> String {
    let (most, context) = (budget.input, app.engine.max_sequence());
    match budget.shared {
        true if version.learned_prompt().is_none() => format!(
            "the input has {prompt_tokens} tokens and an answer needs at least 1 more, but the model's context has {context}: \
             shorten the input to {most} tokens"
        ),
        true => format!(
            "the learned prompt has {} tokens and the input {prompt_tokens}, and an answer needs at least 1 more, but \
             the model's context has {context}: shorten the input to {most} tokens",
            version.prompt.num_virtual_tokens()
        ),
        false => format!(
            "the input has {prompt_tokens} tokens, the encoder takes at most {most} beside the learned prompt, and an \
             answer may have {}: shorten the input",
            budget.output
        ),
    }
}

/// When a request is computed, and how long it may take.
#[derive(Debug, Clone, Copy)]
pub struct Scheduling {
    pub timeout: Duration,
    /// Lower is sooner.
    pub priority: i32,
}

impl Scheduling {
    /// With the server's defaults for what is not given.
    ///
    /// # Errors
    /// A value is out of its range.
    pub fn check(app: &App, caller: &Caller, timeout_ms: Option<u64>, priority: Option<i32>) -> Result<Self, Problem> {
        let mut ranges = Ranges::default();
        let scheduling = ranges.scheduling(app, caller, timeout_ms, priority);
        ranges.finish()?;
        Ok(scheduling)
    }
}

/// A request's parameters, with defaults filled in and every range checked.
#[derive(Debug, Clone)]
pub struct Settings {
    sampling: SamplingParams,
    stop: Vec<String>,
    choices: usize,
    scheduling: Scheduling,
}

impl Settings {
    /// With the task's and the server's defaults for what is not given.
    ///
    /// # Errors
    /// A value is out of its range, or a grammar does not compile.
    pub async fn check(app: &App, caller: &Caller, version: &Version, request: &Parameters) -> Result<Self, Problem> {
        let mut ranges = Ranges::default();
        let given = request.sampling.clone().or(&version.spec.defaults);
        ranges.sampling(&given);
        if let Some(logprobs) = request.logprobs {
            ranges.check("logprobs", logprobs, 0, MAX_LOGPROBS);
        }
        let choices = request.n.unwrap_or(1);
        ranges.check("n", choices, 1, MAX_CHOICES);
        let scheduling = ranges.scheduling(app, caller, request.timeout_ms, request.priority);
        if let (Some(found), Some(limit)) = (request.sampling.max_tokens, version.spec.limits.max_tokens)
            && found > limit
        {
            ranges.fault("max_tokens", format!("found {found}, expected at most {limit}, the task's limit"));
        }
        ranges.tokens(app, request);
        let grammar = request.grammar.as_ref().or(version.spec.grammar.as_ref());
        if grammar.is_some() && request.ignore_eos == Some(true) {
            ranges.fault("ignore_eos", "found true, expected an answer with a grammar to end with it".to_owned());
        }
        ranges.finish()?;
        let bad_tokens = bad_tokens(app, &request.bad_words)?;
        let constraint = match grammar {
            Some(grammar) => Some(constraint(app, grammar).await?),
            None => None,
        };
        let SamplingValues {
            max_tokens,
            min_tokens,
            temperature,
            top_p,
            top_k,
            min_p,
            repetition_penalty,
            frequency_penalty,
            presence_penalty,
            stop,
        } = given.or_default();
        let sampling = SamplingParams {
            // Only the server's default may be more than the task's limit by now.
            max_tokens: max_tokens.min(version.spec.limits.max_tokens.unwrap_or(usize::MAX)),
            // An answer that obeys a grammar ends with it.
            min_tokens: if constraint.is_some() { 0 } else { min_tokens },
            bad_tokens,
            temperature,
            top_p,
            top_k,
            min_p,
            seed: request.seed.unwrap_or_else(rand::random),
            repetition_penalty,
            frequency_penalty,
            presence_penalty,
            logit_bias: request.logit_bias.clone(),
            logprobs: request.logprobs,
            logprob_tokens: request.logprob_token_ids.clone(),
            stop_tokens: if request.ignore_eos.unwrap_or(false) { Vec::new() } else { app.model.eos_token_ids.clone() },
            constraint,
        };
        Ok(Self { sampling, stop, choices, scheduling })
    }
}

/// A grammar, compiled. The task's own were checked when it was uploaded.
async fn constraint(app: &App, grammar: &Grammar) -> Result<Arc<dyn TokenConstraint>, Problem> {
    if let Some(compiled) = app.grammars.compiled(grammar) {
        return Ok(compiled);
    }
    let (grammars, grammar) = (Arc::clone(&app.grammars), grammar.clone());
    let compile = move || grammars.compile(&grammar).map_err(|error| Problem::field("grammar", error.to_string()));
    super::blocking(compile).await
}

/// The tokens of words, each as it is written at the beginning of a word and after another text.
fn bad_tokens(app: &App, words: &[String]) -> Result<Vec<Vec<u32>>, Problem> {
    let mut runs = Vec::new();
    for word in words {
        for text in [word.clone(), format!(" {}", word.trim_start())] {
            let run = app.tokenizer.tokenize_continuation(&text)?;
            if !run.is_empty() && !runs.contains(&run) {
                runs.push(run);
            }
        }
    }
    Ok(runs)
}

/// Collects every value that is out of its range.
#[derive(Default)]
struct Ranges(Vec<ProblemError>);

impl Ranges {
    fn check<T: PartialOrd + std::fmt::Display>(&mut self, field: &str, found: T, least: T, most: T) {
        if !(least <= found && found <= most) {
            self.fault(field, format!("found {found}, expected {least} to {most}"));
        }
    }

    fn scheduling(&mut self, app: &App, caller: &Caller, timeout_ms: Option<u64>, priority: Option<i32>) -> Scheduling {
        let (limits, of_batch) = (&app.limits, caller.is_batch);
        let (timeout, default) = match of_batch {
            true => (limits.max_request_timeout, BATCH_PRIORITY),
            false => (limits.request_timeout, 0),
        };
        let priority = priority.unwrap_or(default);
        self.check("priority", priority, -MAX_PRIORITY, MAX_PRIORITY);
        let limit = u64::try_from(app.limits.max_request_timeout.as_millis()).unwrap_or(u64::MAX);
        if let Some(ms) = timeout_ms {
            self.check("timeout_ms", ms, 1, limit);
        }
        Scheduling { timeout: timeout_ms.map_or(timeout, Duration::from_millis), priority }
    }

    fn tokens(&mut self, app: &App, request: &Parameters) {
        for (field, found) in
            [("bad_words", request.bad_words.len()), ("logprob_token_ids", request.logprob_token_ids.len())]
        {
            if found > MAX_LISTED {
                self.fault(field, format!("found {found}, expected at most {MAX_LISTED}"));
            }
        }
        for (i, word) in request.bad_words.iter().enumerate() {
            if word.trim().is_empty() || word.len() > MAX_STOP_BYTES {
                let detail = format!("found a text of {} bytes, expected 1 to {MAX_STOP_BYTES}", word.trim().len());
                self.fault(&format!("bad_words[{i}]"), detail);
            }
        }
        let vocab = app.model.vocab_size;
        for (i, id) in request.logprob_token_ids.iter().enumerate().filter(|(_, id)| **id as usize >= vocab) {
            self.fault(&format!("logprob_token_ids[{i}]"), format!("found {id}, expected 0 to {}", vocab - 1));
        }
    }

    fn sampling(&mut self, given: &SamplingOptions) {
        for Fault { field, detail } in given.faults() {
            self.fault(&field, detail);
        }
    }

    fn fault(&mut self, field: &str, detail: String) {
        self.0.push(ProblemError { code: Code::InvalidRequest, field: Some(field.to_owned()), detail });
    }

    fn finish(self) -> Result<(), Problem> {
        if self.0.is_empty() { Ok(()) } else { Err(Problem::fields(self.0)) }
    }
}
