//! The configuration of the engine, with its defaults.

/// The engine's configuration: one struct from the options that were typed to the scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// Requests that may wait for a slot in the batch; more are refused.
    pub max_waiting: usize,
    /// Sequences in the batch at once.
    pub max_batch: usize,
    /// Positions computed in one step.
    pub max_step_tokens: usize,
    /// Positions of inputs computed in a step in which other sequences get their next token: what a
    /// long input may delay them by.
    pub max_prefill_tokens: usize,
    /// Positions that each tenant may always take of a step that several share. Less keeps light
    /// tenants quick beside busy ones, more gives busy ones more throughput. `None` is as many as
    /// can be computed in about twice the time of one, which is measured at the start.
    pub fair_step_tokens: Option<usize>,
    /// The most tokens of a sequence that are guessed from its earlier tokens and checked in one step
    /// ([`draft`](super::draft)); 0 guesses none. `None` is 7 on a CPU and 0 elsewhere.
    pub draft_tokens: Option<usize>,
    /// Bytes for keys and values; with an encoder half of them for those of its output.
    pub kv_cache_bytes: usize,
    /// Whether keys and values are shared among sequences of one namespace, and what an encoder makes of
    /// equal inputs.
    pub prefix_sharing: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_waiting: 256,
            max_batch: 64,
            max_step_tokens: 2048,
            max_prefill_tokens: 512,
            fair_step_tokens: None,
            draft_tokens: None,
            kv_cache_bytes: 512 << 20,
            prefix_sharing: true,
        }
    }
}

impl EngineConfig {
    /// The same with counts of at least one where nothing would run with none.
    pub(super) fn at_least_one(self) -> Self {
        Self {
            max_batch: self.max_batch.max(1),
            max_step_tokens: self.max_step_tokens.max(1),
            max_prefill_tokens: self.max_prefill_tokens.max(1),
            ..self
        }
    }
}
