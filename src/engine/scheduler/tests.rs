//! The scheduler's rules, one by one; what tenants get, what encoders need, and everything at random below.

mod encoders;
mod latency;
mod shares;
mod simulation;

use super::{fill::LINGER, *};
use crate::engine::request::Tenant;

/// Small limits with a change.
fn limits(change: impl FnOnce(&mut Limits)) -> Limits {
    let config =
        EngineConfig { max_batch: 4, max_step_tokens: 256, max_prefill_tokens: 256, ..EngineConfig::default() };
    let mut limits = Limits { config, fair_step_tokens: 32, num_blocks: 64, max_encoded: 0, draft_tokens: 0 };
    change(&mut limits);
    limits
}

fn input(n: usize) -> Sequence {
    Sequence::new(vec![InputToken::Vocab(0); n])
}

/// A prompt of `rows` rows and a text, all of one namespace.
fn prompted(rows: u32, text: &[u32]) -> Sequence {
    let tokens = (0..rows).map(InputToken::Virtual).chain(text.iter().map(|&id| InputToken::Vocab(id)));
    Sequence { namespace: Some(CacheNamespace([1; 32])), ..Sequence::new(tokens.collect()) }
}

fn of(key: u64, n: usize) -> Sequence {
    Sequence { tenant: Tenant { owner: 0, key, weight: 1.0 }, ..input(n) }
}

fn id(n: u64) -> SequenceId {
    SequenceId(n)
}

fn chunk(n: u64, start: usize, len: usize, wants_logits: bool) -> Chunk {
    Chunk { id: id(n), start, len, wanted: usize::from(wants_logits), encodes: false }
}

/// Runs one step, in which each sampling sequence gets token 9; returns it.
fn turn(s: &mut Scheduler) -> Step {
    let step = s.schedule();
    let tokens: Vec<_> = step.chunks.iter().filter(|c| c.wanted > 0).map(|c| (c.id, 9)).collect();
    s.commit(&step, &tokens);
    step
}

#[test]
fn a_long_input_is_computed_in_chunks_beside_a_running_one() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.config.max_step_tokens = 10;
    }));
    s.add(id(1), input(3));
    assert_eq!(turn(&mut s).chunks, [chunk(1, 0, 3, true)]);
    s.add(id(2), input(12));
    assert_eq!(turn(&mut s).chunks, [chunk(1, 3, 1, true), chunk(2, 0, 9, false)]);
    assert_eq!(turn(&mut s).chunks[1], chunk(2, 9, 3, true));
}

#[test]
fn inputs_are_cut_smaller_while_others_get_their_tokens() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.config.max_prefill_tokens = 20;
    }));
    s.add(id(1), input(100));
    assert_eq!(turn(&mut s).chunks, [chunk(1, 0, 100, true)]);
    s.add(id(2), input(15));
    s.add(id(3), input(15));
    s.add(id(4), input(15));
    assert_eq!(turn(&mut s).chunks, [chunk(1, 100, 1, true), chunk(2, 0, 15, true), chunk(3, 0, 5, false)]);
    let rest = [chunk(1, 101, 1, true), chunk(2, 15, 1, true), chunk(3, 5, 10, true), chunk(4, 0, 10, false)];
    assert_eq!(turn(&mut s).chunks, rest);
}

#[test]
fn the_youngest_gives_way_when_blocks_run_out_and_comes_back() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.num_blocks = 3;
    }));
    s.add(id(1), input(32));
    s.add(id(2), input(40));
    assert_eq!(turn(&mut s).chunks.len(), 2);
    assert_eq!(turn(&mut s).chunks, [chunk(1, 32, 1, true)]);
    assert_eq!((s.num_waiting(), s.preemptions()), (1, 1));
    s.remove(id(1));
    // All 41 tokens anew: the one it was given before is kept.
    assert_eq!(turn(&mut s).chunks, [chunk(2, 0, 41, true)]);
}

#[test]
fn a_sequence_that_was_preempted_finds_what_it_had_computed() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.num_blocks = 4;
    }));
    s.add(id(1), prompted(64, &[1, 2, 3]));
    turn(&mut s);
    s.add(id(2), Sequence { priority: -1, ..input(60) });
    turn(&mut s);
    assert_eq!((s.num_waiting(), s.preemptions()), (1, 1));
    s.remove(id(2));
    // The end of it had to make room.
    assert_eq!(turn(&mut s).chunks, [chunk(1, 64, 4, true)]);
    // What it had found at first, not now.
    assert_eq!(s.get(id(1)).unwrap().cached_tokens, Some(0));
}

#[test]
fn a_prompt_of_any_length_is_shared_in_full_with_one_copy() {
    for (rows, copies) in [(64, 0), (65, 1), (20, 1), (33, 1)] {
        let mut s = Scheduler::new(limits(|_| ()));
        s.add(id(1), prompted(rows, &[1, 2, 3]));
        turn(&mut s);
        s.add(id(2), prompted(rows, &[4, 5]));
        let step = s.schedule();
        let n = rows as usize;
        assert_eq!(step.chunks[1], chunk(2, n, 2, true));
        assert_eq!(step.copies.len(), copies, "{rows} rows");
        if let Some(copy) = step.copies.first() {
            assert_eq!(copy.slots, n % 32);
            assert_eq!(
                (s.get(id(1)).unwrap().blocks.last(), s.get(id(2)).unwrap().blocks.last()),
                (Some(&copy.from), Some(&copy.to))
            );
        }
        assert_eq!(s.get(id(2)).unwrap().cached_tokens, Some(n));
    }
}

#[test]
fn an_input_seen_before_is_found_but_for_its_last_token() {
    let mut s = Scheduler::new(limits(|_| ()));
    let text: Vec<u32> = (0..50).collect();
    for (n, found) in [(1, 0), (2, 59), (3, 59)] {
        s.add(id(n), prompted(10, &text));
        turn(&mut s);
        assert_eq!(s.remove(id(n)).unwrap().cached_tokens, Some(found));
    }
    // Generated tokens are found as well when they come back as input.
    let mut longer = text.clone();
    longer.extend([9, 7]);
    s.add(id(4), prompted(10, &text));
    turn(&mut s);
    turn(&mut s);
    s.remove(id(4));
    s.add(id(5), prompted(10, &longer));
    turn(&mut s);
    assert_eq!(s.get(id(5)).unwrap().cached_tokens, Some(61));
}

#[test]
fn nothing_is_found_under_another_root_without_one_or_with_sharing_off() {
    let mut s = Scheduler::new(limits(|_| ()));
    let text: Vec<u32> = (0..40).collect();
    let namespaces =
        [Some(CacheNamespace([1; 32])), Some(CacheNamespace([2; 32])), Some(CacheNamespace::TEXT), None, None];
    for (n, namespace) in namespaces.into_iter().enumerate() {
        s.add(id(n as u64), Sequence { namespace, ..prompted(0, &text) });
        turn(&mut s);
        assert_eq!(s.get(id(n as u64)).map(|s| s.cached_tokens), Some(Some(0)), "{namespace:?}");
        s.remove(id(n as u64));
    }
    let mut s = Scheduler::new(limits(|limits| {
        limits.config.prefix_sharing = false;
    }));
    for n in 0..2 {
        s.add(id(n), prompted(40, &[1]));
        turn(&mut s);
        assert_eq!(s.remove(id(n)).unwrap().cached_tokens, Some(0));
    }
    assert_eq!((s.cache().num_kept(), s.cache().num_held()), (0, 0));
}

#[test]
fn two_that_compute_the_same_at_the_same_time_end_up_with_the_same_blocks() {
    let mut s = Scheduler::new(limits(|_| ()));
    s.add(id(1), prompted(64, &[1]));
    s.add(id(2), prompted(64, &[2]));
    turn(&mut s);
    let (a, b) = (&s.get(id(1)).unwrap().blocks, &s.get(id(2)).unwrap().blocks);
    assert_eq!(a[..2], b[..2]);
    assert_ne!(a[2], b[2]);
    assert_eq!(s.cache().num_held(), 4);
}

#[test]
fn a_warmed_prompt_is_found_by_its_first_request_and_outlives_other_content() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.num_blocks = 8;
    }));
    let namespace = CacheNamespace([1; 32]);
    assert!(s.add_warm_up(id(1), prompted(50, &[])));
    assert_eq!(turn(&mut s).chunks, [chunk(1, 0, 50, false)]);
    assert!(s.is_empty() && s.cache().contains_prompt(namespace));
    assert_eq!(s.take_prompt_changes(), [(namespace, true)]);
    for n in 2..10 {
        s.add(id(n), Sequence { namespace: Some(CacheNamespace([n as u8; 32])), ..input(150) });
        turn(&mut s);
        s.remove(id(n));
    }
    assert!(s.cache().evictions() > 0);
    s.add(id(20), prompted(50, &[1]));
    turn(&mut s);
    assert_eq!(s.remove(id(20)).unwrap().cached_tokens, Some(50));
    // What needs the whole cache gets it.
    s.add(id(21), input(8 * 32));
    assert_eq!(turn(&mut s).chunks, [chunk(21, 0, 256, true)]);
    assert_eq!((s.take_prompt_changes(), s.cache().contains_prompt(namespace)), (vec![(namespace, false)], false));
}

#[test]
fn warming_waits_for_those_who_wait_and_gives_its_blocks_up_to_them() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.num_blocks = 4;
        limits.config.max_step_tokens = 40;
    }));
    s.add_warm_up(id(1), prompted(60, &[]));
    assert_eq!(turn(&mut s).chunks, [chunk(1, 0, 40, false)]);
    s.add(id(2), input(120));
    assert_eq!(turn(&mut s).chunks, [chunk(2, 0, 40, false)]);
    for _ in 0..2 {
        turn(&mut s);
    }
    assert_eq!(s.remove(id(2)).unwrap().tokens.len(), 121);
    while !s.is_empty() {
        assert!(!turn(&mut s).chunks.is_empty());
    }
    assert!(s.cache().contains_prompt(CacheNamespace([1; 32])));
}

#[test]
fn a_prompt_that_has_no_room_is_not_warmed() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.num_blocks = 4;
    }));
    assert!(!s.add_warm_up(id(1), prompted(129, &[])));
    assert!(s.add_warm_up(id(2), prompted(100, &[])));
    assert_eq!(turn(&mut s), Step::default());
    assert!(s.is_empty());
}

#[test]
fn priority_goes_before_service_and_takes_places_from_lower_ones() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.config.max_batch = 1;
    }));
    s.add(id(1), of(1, 4));
    turn(&mut s);
    s.add(id(2), of(2, 4));
    s.add(id(3), Sequence { priority: -5, ..of(1, 4) });
    assert_eq!(turn(&mut s).chunks, [chunk(3, 0, 4, true)]);
    s.remove(id(3));
    // Tenant 2 has had nothing yet.
    assert_eq!(turn(&mut s).chunks, [chunk(2, 0, 4, true)]);
}

#[test]
fn a_light_tenant_joins_a_full_batch_at_once_and_its_steps_stay_small() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.config.max_batch = 64;
        limits.config.max_step_tokens = 2048;
        limits.num_blocks = 512;
    }));
    for n in 0..300 {
        s.add(id(n), of(1, 40));
    }
    for _ in 0..5 {
        turn(&mut s);
    }
    assert_eq!(s.num_running(), 64);
    s.add(id(1000), of(2, 24));
    let mut steps = 0;
    while s.get(id(1000)).unwrap().tokens.len() < 24 + 30 {
        let step = turn(&mut s);
        assert!(step.chunks.iter().any(|c| c.id == id(1000)), "left out of step {steps}");
        assert!(step.chunks.iter().map(|c| c.len).sum::<usize>() <= 24 + 32);
        steps += 1;
    }
    assert_eq!(steps, 30);
    s.remove(id(1000));
    // It may come back: for a while the busy one keeps to its part, then it takes all it can again.
    for _ in 0..LINGER - 1 {
        assert!(turn(&mut s).chunks.iter().map(|c| c.len).sum::<usize>() <= 32);
    }
    turn(&mut s);
    turn(&mut s);
    assert!(turn(&mut s).chunks.len() > 60);
}

#[test]
fn sequences_that_cannot_all_have_a_token_take_turns() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.config.max_batch = 8;
        limits.fair_step_tokens = 3;
    }));
    for n in 0..7 {
        s.add(id(n), of(1, 2));
    }
    turn(&mut s);
    s.add(id(100), of(2, 1));
    for _ in 0..14 {
        turn(&mut s);
    }
    let given: Vec<_> = (0..7).map(|n| s.get(id(n)).unwrap().tokens.len() - 2).collect();
    assert!(given.iter().max().unwrap() - given.iter().min().unwrap() <= 1, "{given:?}");
}

#[test]
fn a_failed_step_takes_its_sequences_out_and_leaves_nothing_of_it_to_be_found() {
    let mut s = Scheduler::new(limits(|_| ()));
    s.add(id(1), prompted(20, &[1, 2]));
    turn(&mut s);
    s.add(id(2), prompted(20, &[3, 4]));
    let step = s.schedule();
    assert_eq!((step.copies.len(), step.chunks.len()), (1, 2));
    assert_eq!(s.abort(&step), [id(1), id(2)]);
    assert!(s.is_empty());
    assert_eq!(s.cache().num_held(), 0);
    s.add(id(3), prompted(20, &[3, 4]));
    turn(&mut s);
    assert_eq!(s.get(id(3)).unwrap().cached_tokens, Some(20));
}
