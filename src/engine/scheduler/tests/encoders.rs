//! Sequences of a model with an encoder: the rules one by one, then anything at random.

use std::{
    collections::HashSet,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use proptest::prelude::*;

use super::{super::*, chunk, id, input, limits, turn};
use crate::engine::{
    encoder::{EncoderInput, InputKey},
    prefix::ChainHash,
    request::Tenant,
};

/// A sequence with an encoder's input of `n` positions that starts with `first`; equal ones are shared.
fn encoding_of(first: u32, n: usize) -> Sequence {
    let tokens: Vec<_> = (first..).take(n).map(InputToken::Vocab).collect();
    let key = InputKey::Content(ChainHash::namespace(CacheNamespace::TEXT).next(&tokens));
    Sequence { encoder: Some(EncoderInput { key, tokens }), ..input(1) }
}

/// One with an input of its own.
fn encoding(n: usize) -> Sequence {
    static FIRST: AtomicU32 = AtomicU32::new(1);
    encoding_of(FIRST.fetch_add(1, Relaxed), n)
}

#[test]
fn an_encoders_input_is_taken_whole_and_counts_toward_the_step() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.config.max_step_tokens = 30;
        limits.max_encoded = 1000;
    }));
    let encoded = |n| Chunk { encodes: true, ..chunk(n, 0, 1, true) };
    s.add(id(1), encoding(20));
    s.add(id(2), encoding(8));
    s.add(id(3), encoding(5));
    assert_eq!(turn(&mut s).chunks, [encoded(1), encoded(2)]);
    assert_eq!(turn(&mut s).chunks, [chunk(1, 1, 1, true), chunk(2, 1, 1, true), encoded(3)]);
    // Longer than any step: it has one, and no other input is in it.
    s.add(id(4), encoding(100));
    assert_eq!(turn(&mut s).chunks[3..], [encoded(4)]);
    assert_eq!(turn(&mut s).chunks.len(), 4);
}

#[test]
fn inputs_of_an_encoder_wait_for_room_and_are_encoded_anew_after_their_sequence_was_preempted() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.max_encoded = 50;
        limits.num_blocks = 3;
    }));
    s.add(id(1), encoding(30));
    s.add(id(2), encoding(30));
    assert_eq!(turn(&mut s).chunks.len(), 1);
    assert_eq!((s.num_running(), s.num_waiting()), (1, 1));
    s.add(id(3), Sequence { priority: -1, ..encoding(50) });
    let step = turn(&mut s);
    assert_eq!((step.chunks.len(), step.chunks[0].id, step.chunks[0].encodes), (1, id(3), true));
    assert!(!s.get(id(1)).unwrap().encoded && s.preemptions() == 1);
    s.remove(id(3));
    let step = turn(&mut s);
    // All of its two tokens, after its input.
    assert_eq!(step.chunks, [Chunk { encodes: true, ..chunk(1, 0, 2, true) }]);
    s.remove(id(1));
    assert!(turn(&mut s).chunks[0].encodes && s.get(id(2)).unwrap().encoded);
}

#[test]
fn equal_inputs_of_an_encoder_are_computed_and_counted_once_while_one_of_their_sequences_runs() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.max_encoded = 50;
        limits.num_blocks = 4;
    }));
    let key = encoding_of(7, 40).encoder_key().unwrap();
    s.add(id(1), encoding_of(7, 40));
    s.add(id(2), encoding_of(7, 40));
    let step = turn(&mut s);
    assert_eq!(step.chunks, [Chunk { encodes: true, ..chunk(1, 0, 1, true) }, chunk(2, 0, 1, true)]);
    // Another finds it there.
    s.add(id(3), encoding_of(7, 40));
    assert!(turn(&mut s).chunks.contains(&chunk(3, 0, 1, true)));
    // For one of its own there is no room until none of them runs.
    s.add(id(4), encoding(20));
    for gone in [1, 3, 2] {
        assert_eq!(s.encoded_inputs(), HashSet::from([key]));
        assert!(turn(&mut s).chunks.iter().all(|chunk| !chunk.encodes));
        s.remove(id(gone));
    }
    assert!(s.encoded_inputs().is_empty());
    assert_eq!(turn(&mut s).chunks, [Chunk { encodes: true, ..chunk(4, 0, 1, true) }]);
}

#[test]
fn what_an_encoder_made_stays_for_the_others_when_one_sequence_is_preempted_or_its_step_failed() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.max_encoded = 50;
        limits.num_blocks = 2;
    }));
    s.add(id(1), encoding_of(7, 40));
    turn(&mut s);
    s.add(id(2), Sequence { priority: 1, ..encoding_of(7, 40) });
    turn(&mut s);
    // The second gives way; it finds the output again, since the first still runs.
    s.add(id(3), Sequence { priority: -1, ..encoding_of(7, 40) });
    assert_eq!(
        turn(&mut s).chunks.iter().map(|c| (c.id, c.encodes)).collect::<Vec<_>>(),
        [(id(3), false), (id(1), false)]
    );
    assert!(!s.get(id(2)).unwrap().encoded && s.preemptions() == 1);
    s.remove(id(3));
    assert!(turn(&mut s).chunks.iter().all(|chunk| !chunk.encodes));
    assert!(s.get(id(2)).unwrap().encoded);
    // Of a step that failed nothing is relied upon.
    s.remove(id(1));
    s.remove(id(2));
    s.add(id(4), encoding_of(7, 40));
    s.add(id(5), encoding_of(7, 40));
    let failed = s.schedule();
    assert_eq!(s.abort(&failed), [id(4), id(5)]);
    s.add(id(6), encoding_of(7, 40));
    assert!(turn(&mut s).chunks[0].encodes);
}

#[derive(Debug, Clone)]
struct Arrival {
    at: usize,
    /// Which input: equal ones are shared.
    first: u32,
    positions: usize,
    rows: usize,
    new: usize,
    priority: i32,
    cancel_after: Option<usize>,
}

fn arrivals() -> impl Strategy<Value = Vec<Arrival>> {
    let shape = (0u32..4, 1usize..50, 0usize..40, 1usize..20);
    let one = (0usize..40, shape, -1..2, prop::option::weighted(0.2, 0usize..30));
    let one = one.prop_map(|(at, (first, positions, rows, new), priority, cancel_after)| Arrival {
        at,
        first: 100 * first,
        // Inputs that begin alike are of few lengths, so that some are equal.
        positions: positions.next_multiple_of(16).min(50),
        rows,
        new,
        priority,
        cancel_after,
    });
    prop::collection::vec(one, 1..20)
}

proptest! {
    /// Every request ends in bounded time; no step is empty while one is there; what a decoder
    /// reads of its encoder is there, kept as the engine keeps it, and never more than may be.
    #[test]
    fn whatever_a_decoder_reads_of_its_encoder_is_there(
        arrivals in arrivals(),
        max_batch in 1usize..6,
        (max_step_tokens, max_prefill_tokens, fair_step_tokens) in (1usize..80, 1usize..80, 1usize..12),
        num_blocks in 2usize..8,
        max_encoded in 50usize..120,
        fail_at in prop::option::weighted(0.3, 1usize..40),
    ) {
        let config = EngineConfig { max_batch, max_step_tokens, max_prefill_tokens, ..EngineConfig::default() };
        let limits = Limits { config, fair_step_tokens, num_blocks, max_encoded, draft_tokens: 0 };
        let mut s = Scheduler::new(limits);
        let mut encoded: HashSet<InputKey> = HashSet::new();
        let mut ended = HashSet::new();
        let mut clock = 0;
        let work: usize = arrivals.iter().map(|a| a.positions + a.rows + 1 + a.new).sum();
        while ended.len() < arrivals.len() || !s.is_empty() {
            for (i, a) in arrivals.iter().enumerate() {
                let id = SequenceId(i as u64);
                if a.at == clock {
                    let tenant = Tenant { owner: 0, key: u64::from(a.first) % 3, weight: 1.0 };
                    let Sequence { encoder, .. } = encoding_of(a.first, a.positions);
                    s.add(id, Sequence { encoder, tenant, priority: a.priority, ..input(a.rows + 1) });
                }
                if a.cancel_after.is_some_and(|n| a.at + n == clock) && s.remove(id).is_some() {
                    ended.insert(id);
                }
            }
            clock += 1;
            prop_assert!(clock < 100 + work * (arrivals.len() + 1), "starved");
            let step = s.schedule();
            prop_assert!(!step.chunks.is_empty() || s.is_empty(), "nothing is done");
            let needed = s.encoded_inputs();
            encoded.retain(|key| needed.contains(key));
            if fail_at == Some(clock) {
                ended.extend(s.abort(&step));
                continue;
            }
            let key = |c: &Chunk| s.get(c.id).and_then(Sequence::encoder_key);
            encoded.extend(step.chunks.iter().filter(|c| c.encodes).filter_map(key));
            for c in &step.chunks {
                prop_assert!(encoded.contains(&key(c).unwrap()), "{:?} has nothing of its encoder", c.id);
            }
            let inputs = s.encoder_inputs();
            prop_assert!(inputs.values().map(|input| input.positions).sum::<usize>() <= max_encoded);
            prop_assert!(encoded.iter().all(|key| inputs.contains_key(key)));
            let tokens: Vec<_> = step.chunks.iter().filter(|c| c.wanted > 0).map(|c| (c.id, 9)).collect();
            s.commit(&step, &tokens);
            for (id, _) in tokens {
                let sequence = s.get(id).unwrap();
                if sequence.tokens.len() == sequence.num_input + arrivals[id.0 as usize].new {
                    s.remove(id);
                    prop_assert!(ended.insert(id), "ended twice");
                }
            }
        }
        prop_assert!(s.cache().num_held() == 0 && s.encoded_inputs().is_empty() && s.ledger.is_idle());
    }
}
