//! What is computed before the first request: whether the model runs, and how much fits in a step.

use std::time::{Duration, Instant};

use super::{
    request::InputToken,
    runner::{Part, Runner},
};
use crate::kernels::{cross::CrossKeyValues, layout::BlockId};

/// Computes one token, so that the first request finds everything in place and a model that
/// cannot run is known before anyone asks.
pub(super) fn first_pass(runner: &mut Runner) -> candle_core::Result<()> {
    let encoded = one_token_encoded(runner)?;
    let tokens = [InputToken::Vocab(0)];
    let part = Part { tokens: &tokens, blocks: &[0], encoded: encoded.as_ref(), wanted: 1, ..Part::default() };
    let logits = runner.run(&[part])?.logits;
    let finite = logits.with_rows(&[0], |rows| Ok(rows.iter().all(|row| row.iter().all(|x| x.is_finite()))))?;
    match finite {
        true => Ok(()),
        false => candle_core::bail!("the model's first logits are not finite; the weights or the dtype are wrong"),
    }
}

/// An input of one token for a model with an encoder.
fn one_token_encoded(runner: &mut Runner) -> candle_core::Result<Option<CrossKeyValues>> {
    if runner.model().info().encoder.is_none() {
        return Ok(None);
    }
    let tokens = [InputToken::Vocab(0)];
    let input = Part { tokens: &tokens, ..Part::default() };
    Ok(runner.run_encoder(&[input])?.pop())
}

/// The numbers of rows that [`cheap_rows`] tries.
const ROWS: [usize; 6] = [8, 16, 24, 32, 48, 64];

/// How many sequences can get a token in about twice the time that one takes, at most `most`: as
/// long as reading the weights is what takes the time, more rows cost little.
pub(super) fn cheap_rows(runner: &mut Runner, most: usize) -> candle_core::Result<usize> {
    let blocks: Vec<BlockId> = (0..most as BlockId).collect();
    let encoded = one_token_encoded(runner)?;
    let encoded = encoded.as_ref();
    // The best of three, or the first that is good enough.
    let mut time = |rows: usize, enough: Duration| -> candle_core::Result<Duration> {
        let tokens = [InputToken::Vocab(0)];
        let part = |blocks| Part { tokens: &tokens, blocks, encoded, wanted: 1, ..Part::default() };
        let parts: Vec<Part> = blocks.chunks(1).take(rows).map(part).collect();
        let mut best = Duration::MAX;
        for _ in 0..3 {
            let started = Instant::now();
            runner.run(&parts)?;
            best = best.min(started.elapsed());
            if best <= enough {
                break;
            }
        }
        Ok(best)
    };
    let twice = 2 * time(1, Duration::ZERO)?;
    let mut cheap = ROWS[0];
    for rows in ROWS.into_iter().take_while(|&rows| rows <= most) {
        if time(rows, twice)? > twice {
            break;
        }
        cheap = rows;
    }
    Ok(cheap)
}
