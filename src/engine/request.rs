//! What the engine is asked and what it answers: token ids and numbers, no text.

use std::{sync::Arc, time::Instant};

use super::sampling::mask::TokenConstraint;
pub use crate::packing::InputToken;
use crate::{
    packing::{PromptShape, leading_virtual_tokens},
    prompt::LearnedPrompt,
};

/// Names a sequence for as long as the engine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// What stands before a sequence's first token: the content of its learned prompt, by digest, or
/// none. Keys and values are shared only among sequences of one namespace and, beyond the
/// [public prefix](Request::public_prefix), of one [owner](Tenant::owner). It is never a name and never what a
/// client sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CacheNamespace(pub [u8; 32]);

impl CacheNamespace {
    /// The namespace of sequences without a learned prompt.
    pub const TEXT: Self = Self([0; 32]);

    /// A namespace that no other request of an engine has.
    pub(super) fn of_request(number: u64) -> Self {
        // Not a digest: one with so many equal bytes does not come up.
        let mut bytes = [0xa5; 32];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        Self(bytes)
    }
}

/// Whom a request's work is counted for when the engine shares itself out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tenant {
    /// The API key's tenant, who alone finds in the cache what lies beyond the [public prefix](Request::public_prefix);
    /// 0 where there are no keys.
    pub owner: u64,
    /// The tenant's task: requests of one key are counted together.
    pub key: u64,
    /// A task of weight 2 gets twice the service of one of weight 1 of the same tenant while both want more.
    pub weight: f64,
}

impl Default for Tenant {
    fn default() -> Self {
        Self { owner: 0, key: 0, weight: 1.0 }
    }
}

/// One sequence to continue. The prompt is held for as long as the request runs, so a swap or a
/// delete in the registry cannot change its answer.
#[derive(Debug, Clone)]
pub struct Request {
    /// The positions 0… of the input, virtual tokens included.
    pub tokens: Vec<InputToken>,
    /// Where the virtual tokens' embeddings come from.
    pub prompt: Option<Arc<LearnedPrompt>>,
    /// What is wanted of the input.
    pub goal: Goal,
    /// When to give up, with [`FinishReason::Timeout`].
    pub deadline: Option<Instant>,
    /// Whose cached keys and values may be used; `None` shares nothing.
    pub namespace: Option<CacheNamespace>,
    /// The public prefix: how many positions, from the first on, hold nothing that a client sent. Their
    /// keys and values are shared by all owners, those after them within one. Virtual tokens that the input begins with
    /// always belong to it.
    pub public_prefix: usize,
    pub tenant: Tenant,
    /// Lower is sooner, whatever the tenants say; 0 is usual.
    pub priority: i32,
}

impl Request {
    /// A learned prompt followed by the ids of a text, special tokens included. With a prompt, set
    /// [`namespace`](Self::namespace) to its content's digest to share its keys and values.
    pub fn new(prompt: Option<Arc<LearnedPrompt>>, ids: &[u32], sampling: SamplingParams) -> Self {
        let tokens = PromptShape::of(prompt.as_deref()).followed_by(ids);
        Self::of(prompt, tokens, Goal::Generate(sampling))
    }

    /// Positions as they are, with the virtual tokens of a learned prompt where they stand in them.
    pub fn of(prompt: Option<Arc<LearnedPrompt>>, tokens: Vec<InputToken>, goal: Goal) -> Self {
        let namespace = prompt.is_none().then_some(CacheNamespace::TEXT);
        let public_prefix = leading_virtual_tokens(&tokens);
        Self { tokens, prompt, goal, deadline: None, namespace, public_prefix, tenant: Tenant::default(), priority: 0 }
    }

    /// One token after one token, which tells whether the model's output is finite with this prompt. Nothing of it is
    /// shared with other requests.
    pub fn probe(prompt: Arc<LearnedPrompt>) -> Self {
        let sampling = SamplingParams { max_tokens: 1, ..SamplingParams::default() };
        Self { namespace: None, ..Self::new(Some(prompt), &[0], sampling) }
    }

    /// As [`new`](Self::new), to score continuations of the input.
    pub fn score(prompt: Option<Arc<LearnedPrompt>>, ids: &[u32], continuations: Vec<Vec<u32>>) -> Self {
        Self { goal: Goal::Score(continuations), ..Self::new(prompt, ids, SamplingParams::default()) }
    }
}

/// What is wanted of an input.
#[derive(Debug, Clone)]
pub enum Goal {
    /// New tokens, one after another.
    Generate(SamplingParams),
    /// The log-probability of each token of each continuation, at least one token each. What continuations have in
    /// common is computed once.
    Score(Vec<Vec<u32>>),
}

/// How the next token is chosen from the logits.
#[derive(Debug, Clone)]
pub struct SamplingParams {
    /// The most new tokens; at least 1.
    pub max_tokens: usize,
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep tokens at least this likely relative to the likeliest; 0 keeps all.
    pub min_p: f32,
    /// The same seed and request give the same tokens.
    pub seed: u64,
    /// CTRL's penalty (Keskar et al. 2019) over the text's and the new tokens; 1 is none.
    pub repetition_penalty: f32,
    /// Subtracted from a logit once for each time its token was generated.
    pub frequency_penalty: f32,
    /// Subtracted from a logit if its token was generated.
    pub presence_penalty: f32,
    /// Added to the logits of tokens, each named once, after penalties.
    pub logit_bias: Vec<(u32, f32)>,
    /// The answer does not end by a stop token before it has this many tokens.
    pub min_tokens: usize,
    /// Runs of tokens that the answer does not have.
    pub bad_tokens: Vec<Vec<u32>>,
    /// Report log-probabilities: of the chosen token, and of this many likeliest ones.
    pub logprobs: Option<usize>,
    /// Report the log-probabilities of these tokens too, where any are reported.
    pub logprob_tokens: Vec<u32>,
    /// Tokens that end the sequence and are not part of it (EOS).
    pub stop_tokens: Vec<u32>,
    /// What the new tokens must obey, such as a grammar.
    pub constraint: Option<Arc<dyn TokenConstraint>>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            max_tokens: 64,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            min_tokens: 0,
            bad_tokens: Vec::new(),
            logprobs: None,
            logprob_tokens: Vec::new(),
            stop_tokens: Vec::new(),
            constraint: None,
        }
    }
}

/// One new token.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedToken {
    pub id: u32,
    /// Natural log-probability under the model's distribution, before temperature and penalties;
    /// there when [`SamplingParams::logprobs`] is set.
    pub logprob: Option<f32>,
    /// The likeliest tokens with their log-probabilities, likeliest first, then those of
    /// [`SamplingParams::logprob_tokens`] that are not among them.
    pub top: Vec<(u32, f32)>,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was chosen.
    Stop,
    /// `max_tokens` or the context's end was reached.
    Length,
    /// The server is stopping and its drain time is over.
    Cancelled,
    /// The request's deadline passed.
    Timeout,
}

/// What happens to a request, in order: tokens, then exactly one of the others.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token was chosen.
    Token(GeneratedToken),
    /// The continuations were scored, and the sequence ended: the natural log-probability of each token of each
    /// continuation under the model's distribution.
    Scored {
        log_probs: Vec<Vec<f32>>,
        /// Positions of the input whose keys and values were found in the cache.
        cached_tokens: usize,
    },
    /// The sequence ended.
    Finished {
        reason: FinishReason,
        /// Positions of the input whose keys and values were found in the cache.
        cached_tokens: usize,
    },
    /// The sequence ended because its logits are not finite: values overflowed in its forward pass.
    NotFinite,
    /// The sequence ended because its constraint, and what else is forbidden, allow no next token, for this reason.
    NoTokenAllowed(String),
    /// The forward pass that the sequence was part of failed; the log has the cause.
    Failed,
}
