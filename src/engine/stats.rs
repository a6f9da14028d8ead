//! What the engine counts, for health and metrics.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use crate::kernels::layout::BLOCK_SIZE;

/// What the engine is doing now, for health and metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// A forward pass has run, the thread lives and takes requests.
    pub ready: bool,
    pub waiting: usize,
    pub running: usize,
    /// Blocks held by sequences.
    pub kv_blocks_used: usize,
    /// Cached blocks: no request references them, and their content can be reused.
    pub kv_blocks_cached: usize,
    pub kv_blocks_total: usize,
    /// Positions of encoders' inputs whose output is kept for running sequences; equal ones count once.
    pub encoded_positions: usize,
    /// How many of them there may be at once; 0 without an encoder.
    pub encoded_positions_total: usize,
    /// Learned prompts whose keys and values are in the cache as a whole.
    pub cached_prompts: usize,
    /// Bytes of the cache's blocks that hold them, which are on the device.
    pub cached_prompt_bytes: usize,
    /// Forward passes since the start.
    pub steps: u64,
    /// Input positions computed, virtual tokens included.
    pub prompt_tokens: u64,
    /// Input positions found in the cache, virtual tokens included.
    pub cached_tokens: u64,
    pub generated_tokens: u64,
    /// Tokens that were guessed from earlier ones and checked.
    pub draft_tokens: u64,
    /// Those of them that were right.
    pub draft_tokens_accepted: u64,
    /// Blocks whose content had to make room for other content.
    pub evictions: u64,
    /// Running sequences that were preempted: queued again to make room for others.
    pub preemptions: u64,
}

impl EngineStats {
    /// Positions of one block of keys and values.
    pub const KV_BLOCK_POSITIONS: usize = BLOCK_SIZE;

    /// The part of the blocks that sequences hold, from 0 to 1. What is only cached counts as free.
    pub fn kv_usage(&self) -> f64 {
        match self.kv_blocks_total {
            0 => 0.0,
            total => self.kv_blocks_used as f64 / total as f64,
        }
    }
}

/// What the thread counts and handles read.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub running: AtomicUsize,
    pub kv_blocks_used: AtomicUsize,
    pub kv_blocks_cached: AtomicUsize,
    kv_blocks_total: usize,
    block_bytes: usize,
    pub prompt_blocks: AtomicUsize,
    pub encoded_positions: AtomicUsize,
    pub steps: AtomicU64,
    pub prompt_tokens: AtomicU64,
    pub cached_tokens: AtomicU64,
    pub evictions: AtomicU64,
    pub generated_tokens: AtomicU64,
    pub draft_tokens: AtomicU64,
    pub draft_tokens_accepted: AtomicU64,
    pub preemptions: AtomicU64,
}

impl Counters {
    /// Nothing has happened yet in a cache of `kv_blocks_total` blocks of `block_bytes` each.
    pub fn new(kv_blocks_total: usize, block_bytes: usize) -> Self {
        Self { kv_blocks_total, block_bytes, ..Self::default() }
    }

    /// All of them now; what is not counted here is 0.
    pub fn read(&self) -> EngineStats {
        EngineStats {
            running: self.running.load(Relaxed),
            kv_blocks_used: self.kv_blocks_used.load(Relaxed),
            kv_blocks_cached: self.kv_blocks_cached.load(Relaxed),
            kv_blocks_total: self.kv_blocks_total,
            cached_prompt_bytes: self.prompt_blocks.load(Relaxed) * self.block_bytes,
            encoded_positions: self.encoded_positions.load(Relaxed),
            steps: self.steps.load(Relaxed),
            prompt_tokens: self.prompt_tokens.load(Relaxed),
            cached_tokens: self.cached_tokens.load(Relaxed),
            generated_tokens: self.generated_tokens.load(Relaxed),
            draft_tokens: self.draft_tokens.load(Relaxed),
            draft_tokens_accepted: self.draft_tokens_accepted.load(Relaxed),
            evictions: self.evictions.load(Relaxed),
            preemptions: self.preemptions.load(Relaxed),
            ..EngineStats::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usage_is_the_part_of_the_blocks_that_sequences_hold() {
        let stats = |kv_blocks_used, kv_blocks_total| EngineStats {
            kv_blocks_used,
            kv_blocks_total,
            kv_blocks_cached: 3,
            ..EngineStats::default()
        };
        assert_eq!([stats(0, 8), stats(2, 8), stats(8, 8)].map(|stats| stats.kv_usage()), [0.0, 0.25, 1.0]);
        assert_eq!(stats(0, 0).kv_usage(), 0.0, "no cache is no reason for NaN");
    }
}
