//! Tokens that may not come next: the end before enough tokens, and the last token of a forbidden run of tokens.

use crate::engine::request::SamplingParams;

/// What is forbidden in one answer.
#[derive(Debug)]
pub struct Bans {
    stop_tokens: Vec<u32>,
    min_tokens: usize,
    runs: Vec<Vec<u32>>,
    /// The new tokens so far.
    generated: Vec<u32>,
}

impl Bans {
    /// `None` if nothing is forbidden.
    pub fn new(params: &SamplingParams) -> Option<Self> {
        let SamplingParams { min_tokens, bad_tokens, stop_tokens, .. } = params;
        let any = *min_tokens > 0 || !bad_tokens.is_empty();
        any.then(|| Self {
            stop_tokens: stop_tokens.clone(),
            min_tokens: *min_tokens,
            runs: bad_tokens.iter().filter(|run| !run.is_empty()).cloned().collect(),
            generated: Vec::new(),
        })
    }

    /// Sets the logits of what may not come next to negative infinity.
    pub fn apply(&self, logits: &mut [f32]) {
        let too_early = self.generated.len() < self.min_tokens;
        let ends = self.stop_tokens.iter().filter(|_| too_early);
        let completes = |run: &&Vec<u32>| self.generated.ends_with(&run[..run.len() - 1]);
        let last = self.runs.iter().filter(completes).filter_map(|run| run.last());
        for &id in ends.chain(last) {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// One more token was generated.
    pub fn generated(&mut self, id: u32) {
        self.generated.push(id);
    }
}
