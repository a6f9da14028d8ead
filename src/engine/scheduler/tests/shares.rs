//! What each tenant gets of the engine beside others.

use proptest::prelude::*;

use super::{super::*, chunk, id, input, limits, of, prompted, turn};
use crate::engine::request::Tenant;

#[test]
fn two_busy_tenants_get_service_by_their_weights_however_much_more_one_asks_for() {
    for (weights, sizes, load) in
        [([1.0, 1.0], [10, 10], [4, 100]), ([1.0, 3.0], [60, 9], [20, 20]), ([2.0, 1.0], [5, 80], [50, 5])]
    {
        let limits = limits(|limits| {
            limits.config.max_batch = 8;
            limits.config.max_step_tokens = 64;
            limits.num_blocks = 32;
        });
        let mut s = Scheduler::new(limits);
        let mut next = 0;
        let mut waiting = [0usize; 2];
        let mut served = [0.0f64; 2];
        let owner = |n: u64| (n % 2) as usize;
        // No request is larger than 96 positions, each counted twice at most, and 8 run.
        let bound = 2.0 * 8.0 * 96.0 * 2.0;
        while served.iter().sum::<f64>() < 40.0 * bound {
            for tenant in 0..2 {
                while waiting[tenant] < load[tenant] {
                    let key = tenant as u64;
                    let sequence =
                        Sequence { tenant: Tenant { owner: 0, key, weight: weights[tenant] }, ..input(sizes[tenant]) };
                    s.add(id(next * 2 + key), sequence);
                    next += 1;
                    waiting[tenant] += 1;
                }
            }
            let step = turn(&mut s);
            for c in &step.chunks {
                let sequence = s.get(c.id).unwrap();
                let inputs = (c.start + c.len).min(sequence.num_input).saturating_sub(c.start);
                served[owner(c.id.0)] += inputs as f64 + if c.wanted > 0 { 2.0 } else { 0.0 };
                if sequence.tokens.len() >= sequence.num_input + 16 {
                    s.remove(c.id);
                    waiting[owner(c.id.0)] -= 1;
                }
            }
            let apart = (served[0] / weights[0] - served[1] / weights[1]).abs();
            assert!(apart <= bound, "{served:?} for weights {weights:?}");
        }
    }
}

#[test]
fn a_light_tenant_does_not_wait_for_all_of_a_long_input() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.config.max_batch = 8;
        limits.config.max_step_tokens = 100;
    }));
    s.add(id(1), of(1, 1500));
    assert_eq!(turn(&mut s).chunks, [chunk(1, 0, 100, false)]);
    s.add(id(2), of(2, 30));
    // They are equal now, and who came first goes first.
    assert_eq!(turn(&mut s).chunks, [chunk(1, 100, 100, false)]);
    assert_eq!(turn(&mut s).chunks, [chunk(2, 0, 30, true), chunk(1, 200, 70, false)]);
    // The next one of the same tenant waits for it.
    s.add(id(3), of(1, 30));
    assert_eq!(turn(&mut s).chunks, [chunk(2, 30, 1, true), chunk(1, 270, 99, false)]);
    assert_eq!(s.num_waiting(), 1);
}

#[test]
fn a_request_of_high_priority_does_not_wait_for_all_of_a_long_input() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.config.max_step_tokens = 100;
    }));
    s.add(id(1), of(1, 1500));
    turn(&mut s);
    s.add(id(2), Sequence { priority: -1, ..of(1, 30) });
    assert_eq!(turn(&mut s).chunks, [chunk(2, 0, 30, true), chunk(1, 100, 70, false)]);
}

#[test]
fn an_input_that_is_a_known_prompt_alone_gets_its_last_position_beside_others() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.config.max_batch = 4;
        limits.fair_step_tokens = 2;
    }));
    s.add(id(1), prompted(40, &[1]));
    turn(&mut s);
    s.remove(id(1));
    for n in 10..14 {
        s.add(id(n), of(5, 20));
    }
    s.add(id(2), prompted(40, &[]));
    // The other tenant is owed far more.
    s.ledger.charge(0, Tenant::default(), 1e6);
    let mut steps = 0;
    while s.get(id(2)).unwrap().tokens.len() == 40 {
        turn(&mut s);
        steps += 1;
        assert!(steps < 4, "left out of {steps} steps");
    }
}

#[test]
fn a_request_that_waits_at_a_low_priority_saves_up_no_claim() {
    let mut s = Scheduler::new(limits(|limits| {
        limits.config.max_batch = 2;
    }));
    let mut next = 100;
    // Tenants 1 to `tenants` always have four requests; returns what each got.
    let mut busy = |s: &mut Scheduler, tenants: u64, steps: usize| {
        let mut served = [0usize; 3];
        for _ in 0..steps {
            for key in 1..=tenants {
                while s.sequences.values().filter(|q| q.tenant.key == key && q.priority == 0).count() < 4 {
                    s.add(id(next), of(key, 10));
                    next += 1;
                }
            }
            for c in turn(s).chunks {
                let sequence = s.get(c.id).unwrap();
                served[sequence.tenant.key as usize] += c.len;
                if sequence.tokens.len() >= 20 {
                    s.remove(c.id);
                }
            }
        }
        served
    };
    // It waits while tenant 1 has all there is.
    s.add(id(1), Sequence { priority: 1000, ..of(2, 10) });
    busy(&mut s, 1, 300);
    assert_eq!(s.get(id(1)).unwrap().num_computed, 0);
    // From now on both ask for the same.
    let served = busy(&mut s, 2, 100);
    assert!(served[1].abs_diff(served[2]) < 60, "{served:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// The bound of "Fairness in Serving Large Language Models": of tenants that always have more to
    /// ask, none is ahead of another by more than what a batch can hold, however long it goes on.
    #[test]
    fn tenants_that_always_want_more_stay_within_a_batch_of_each_other(
        tenants in prop::collection::vec((1usize..60, 1usize..12, 1u8..5), 2..5),
        max_batch in 1usize..8,
        (max_step_tokens, max_prefill_tokens, fair_step_tokens) in (8usize..80, 8usize..80, 1usize..12),
        num_blocks in 3usize..24,
    ) {
        let config = EngineConfig { max_batch, max_step_tokens, max_prefill_tokens, ..EngineConfig::default() };
        let limits = Limits { config, fair_step_tokens, num_blocks, max_encoded: 0, draft_tokens: 0 };
        let mut s = Scheduler::new(limits);
        let mut next = 0;
        let most = tenants.iter().map(|&(n, new, _)| n + 2 * new).max().unwrap_or(0);
        let bound = 2.0 * (max_batch * most) as f64;
        let counter = |s: &Scheduler, key: usize| s.ledger.rank(0, key as u64).counter;
        while counter(&s, 0) < 5.0 * bound {
            for (key, &(n, _, weight)) in tenants.iter().enumerate() {
                let own = |q: &&Sequence| q.tenant.key == key as u64;
                for _ in s.sequences.values().filter(own).count()..=max_batch {
                    next += 1;
                    s.add(id(next), Sequence { tenant: Tenant { owner: 0, key: key as u64, weight: weight.into() }, ..input(n) });
                }
            }
            let step = turn(&mut s);
            prop_assert!(!step.chunks.is_empty(), "nothing is done");
            for c in &step.chunks {
                let q = s.get(c.id).unwrap();
                if q.tokens.len() >= q.num_input + tenants[q.tenant.key as usize].1 {
                    s.remove(c.id);
                }
            }
            let counters: Vec<_> = (0..tenants.len()).map(|key| counter(&s, key)).collect();
            let (least, greatest) = counters.iter().fold((f64::MAX, 0.0f64), |(a, b), &c| (a.min(c), b.max(c)));
            prop_assert!(greatest - least <= bound, "{:?} are further apart than {}", counters, bound);
        }
    }
}
