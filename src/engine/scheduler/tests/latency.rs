//! What a light tenant waits beside a busy one, by a simple model of what a step costs.

use std::collections::HashMap;

use super::super::*;
use crate::engine::request::Tenant;

/// A step costs as much as reading the weights at least, which is as much as computing so many
/// positions: on CPUs about 13 in f32, 64 in bf16. And what each tenant may then take of a step.
const FLOORS: [(usize, usize); 2] = [(13, 16), (64, 64)];
const OUTPUT: usize = 32;
const VIRTUAL: u32 = 32;

/// A small seeded generator.
struct Numbers(u64);

impl Numbers {
    fn between(&mut self, least: usize, most: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        least + (self.0 >> 33) as usize % (most + 1 - least)
    }
}

/// What the requests of one light client take, in positions: until the first token, and in all.
/// Beside them, `busy` clients of another tenant ask again as soon as they are answered.
fn waits(busy: usize, floor: usize, fair: usize) -> (Vec<usize>, Vec<usize>) {
    let mut s = Scheduler::new(Limits {
        config: EngineConfig { max_prefill_tokens: 256, ..EngineConfig::default() },
        fair_step_tokens: fair,
        num_blocks: 4096,
        max_encoded: 0,
        draft_tokens: 0,
    });
    let mut numbers = Numbers(7);
    let mut clock = 0;
    let mut next = 0;
    // By sequence: whose it is, and when it came.
    let mut live: HashMap<SequenceId, (u64, usize)> = HashMap::new();
    let mut ask = |s: &mut Scheduler, live: &mut HashMap<_, _>, numbers: &mut Numbers, key: u64, clock: usize| {
        let words = (0..numbers.between(16, 64)).map(|_| InputToken::Vocab(numbers.between(0, 9999) as u32));
        let tokens = (0..VIRTUAL).map(InputToken::Virtual).chain(words).collect();
        let namespace = Some(CacheNamespace([key as u8; 32]));
        let tenant = Tenant { owner: 0, key, weight: 1.0 };
        next += 1;
        s.add(SequenceId(next), Sequence { namespace, tenant, ..Sequence::new(tokens) });
        live.insert(SequenceId(next), (key, clock));
    };
    for _ in 0..busy {
        ask(&mut s, &mut live, &mut numbers, 1, clock);
    }
    let (mut first, mut whole) = (Vec::new(), Vec::new());
    let mut light_comes_at = Some(20_000);
    while whole.len() < 200 {
        if let Some(at) = light_comes_at {
            if live.is_empty() {
                clock = clock.max(at);
            }
            if at <= clock {
                light_comes_at = None;
                ask(&mut s, &mut live, &mut numbers, 2, at);
            }
        }
        let step = s.schedule();
        clock += step.chunks.iter().map(|c| c.len).sum::<usize>().max(floor);
        let tokens: Vec<_> = step.chunks.iter().filter(|c| c.wanted > 0).map(|c| (c.id, 1)).collect();
        s.commit(&step, &tokens);
        for (id, _) in tokens {
            let (key, came) = live[&id];
            let sequence = s.get(id).unwrap();
            let given = sequence.tokens.len() - sequence.num_input;
            if key == 2 && given == 1 {
                first.push(clock - came);
            }
            if given == OUTPUT {
                s.remove(id);
                live.remove(&id);
                if key == 2 {
                    whole.push(clock - came);
                    light_comes_at = Some(clock + numbers.between(0, 4000));
                } else {
                    ask(&mut s, &mut live, &mut numbers, key, clock);
                }
            }
        }
    }
    first.sort_unstable();
    whole.sort_unstable();
    (first, whole)
}

#[test]
fn the_p99_of_a_light_tenant_stays_within_three_times_of_alone_beside_a_hundred_times_its_load() {
    let p99 = |times: &[usize]| times[times.len() * 99 / 100];
    for (floor, fair) in FLOORS {
        let (alone, beside) = (waits(0, floor, fair), waits(100, floor, fair));
        assert!(p99(&beside.0) <= 3 * p99(&alone.0), "first token, floor {floor}");
        assert!(p99(&beside.1) <= 3 * p99(&alone.1), "whole answer, floor {floor}");
    }
}
