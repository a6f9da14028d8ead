//! The scheduler against a model of the cache that remembers what was written where: random
//! requests, prompts, priorities, weights, cancels, failures and cache sizes.

use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;

use super::super::*;
use crate::{
    engine::{draft::Drafting, request::Tenant},
    kernels::layout::BlockId,
};

/// Warm-ups have names from here on.
const WARM_UPS: u64 = 1000;
/// The longest sequence: 70 rows, 64 words, 30 new tokens.
const MOST_BLOCKS: usize = 6;

#[derive(Debug, Clone)]
struct Arrival {
    at: usize,
    /// 0 has no namespace, 1 is without a prompt, others have one of their own.
    namespace: u8,
    /// The words are those of a common text up to here, then those of its own.
    common: usize,
    own: usize,
    new: usize,
    priority: i32,
    cancel_after: Option<usize>,
    /// Who sends it.
    owner: u64,
}

impl Arrival {
    fn rows(&self) -> u32 {
        [0, 0, 20, 32, 70][usize::from(self.namespace)]
    }

    /// How many words of the common text are public after its prompt.
    fn public(&self) -> usize {
        [0, 12, 7, 0, 40][usize::from(self.namespace)].min(self.common)
    }

    fn sequence(&self, n: usize) -> Sequence {
        let rows = (0..self.rows()).map(InputToken::Virtual);
        let words =
            (0..self.common as u32).map(|i| i * i % 7).chain((0..self.own as u32).map(|i| 7 + (i + n as u32) % 5));
        let weight = [1.0, 2.5][usize::from(self.namespace) % 2];
        Sequence {
            namespace: namespace(self.namespace),
            tenant: Tenant { owner: self.owner, key: u64::from(self.namespace) % 3 + 3 * self.owner, weight },
            priority: self.priority,
            public_prefix: self.rows() as usize + self.public(),
            drafting: Some(Drafting::new(self.rows() as usize + self.common + self.own + self.new)),
            ..Sequence::new(rows.chain(words.map(InputToken::Vocab)).collect())
        }
    }
}

fn namespace(kind: u8) -> Option<CacheNamespace> {
    match kind {
        0 => None,
        1 => Some(CacheNamespace::TEXT),
        _ => Some(CacheNamespace([kind; 32])),
    }
}

fn arrivals() -> impl Strategy<Value = Vec<Arrival>> {
    let shape = (0u8..5, prop_oneof![Just(0usize), Just(31), 0usize..40], 1usize..24, 1usize..30);
    let one =
        (0usize..40, shape, prop_oneof![4 => Just(0), 1 => -2..3], prop::option::weighted(0.2, 0usize..30), 0u64..3);
    let one = one.prop_map(|(at, (namespace, common, own, new), priority, cancel_after, owner)| Arrival {
        at,
        namespace,
        common,
        own,
        new,
        priority,
        cancel_after,
        owner,
    });
    prop::collection::vec(one, 1..24)
}

/// What a slot holds: the name of everything up to its position.
type Slot = u64;
const NOTHING: Slot = 0;

/// For each position of a sequence, what its slot must hold: beyond its public prefix, what its own
/// owner's sequences wrote there.
fn names(id: SequenceId, sequence: &Sequence) -> Vec<Slot> {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    let mut hash = DefaultHasher::new();
    // Without a namespace a sequence shares with nobody.
    sequence.namespace.ok_or(id).hash(&mut hash);
    let mut name = |(i, token): (usize, &InputToken)| {
        if i == sequence.public_prefix {
            (2, sequence.tenant.owner).hash(&mut hash);
        }
        match token {
            InputToken::Vocab(id) => (0, *id).hash(&mut hash),
            InputToken::Virtual(row) => (1, *row).hash(&mut hash),
        }
        hash.finish()
    };
    sequence.tokens.iter().enumerate().map(&mut name).collect()
}

/// The cache's memory.
struct Memory(Vec<[Slot; BLOCK_SIZE]>);

impl Memory {
    fn slot(&mut self, blocks: &[BlockId], position: usize) -> &mut Slot {
        &mut self.0[blocks[position / BLOCK_SIZE] as usize][position % BLOCK_SIZE]
    }

    /// Does what a step says, after looking whether all that it builds on is there.
    fn run(&mut self, s: &Scheduler, step: &Step) -> Result<(), TestCaseError> {
        for copy in &step.copies {
            let source = self.0[copy.from as usize];
            self.0[copy.to as usize][..copy.slots].copy_from_slice(&source[..copy.slots]);
        }
        for c in &step.chunks {
            let q = s.get(c.id).unwrap();
            let names = names(c.id, q);
            for (p, name) in names[..c.start].iter().enumerate() {
                prop_assert_eq!(self.slot(&q.blocks, p), name, "position {} of {:?}", p, c.id);
            }
        }
        for c in &step.chunks {
            let q = s.get(c.id).unwrap();
            let names = names(c.id, q);
            for (p, name) in names.iter().enumerate().skip(c.start).take(c.len) {
                *self.slot(&q.blocks, p) = *name;
            }
        }
        Ok(())
    }

    /// What a failed step may have left where it was to write.
    fn spoil(&mut self, s: &Scheduler, step: &Step) {
        for copy in &step.copies {
            self.0[copy.to as usize] = [NOTHING; BLOCK_SIZE];
        }
        for c in &step.chunks {
            let q = s.get(c.id).unwrap();
            (c.start..c.start + c.len).for_each(|p| *self.slot(&q.blocks, p) = NOTHING);
        }
    }
}

/// What holds of every step before it is run.
fn check(s: &Scheduler, step: &Step, limits: Limits) -> Result<(), TestCaseError> {
    prop_assert!(step.chunks.iter().map(|c| c.len).sum::<usize>() <= limits.config.max_step_tokens);
    prop_assert!(s.num_running() <= limits.config.max_batch);
    let ids: HashSet<_> = step.chunks.iter().map(|c| c.id).collect();
    prop_assert_eq!(ids.len(), step.chunks.len());
    let mut holders: BTreeMap<BlockId, u32> = BTreeMap::new();
    for block in s.sequences.values().flat_map(|q| &q.blocks) {
        *holders.entry(*block).or_default() += 1;
    }
    for c in &step.chunks {
        let q = s.get(c.id).unwrap();
        prop_assert_eq!(c.start, q.num_computed);
        prop_assert!(c.len > 0 && c.start + c.len <= q.tokens.len());
        prop_assert!(q.tokens.len() <= q.blocks.len() * BLOCK_SIZE);
        let is_warm_up = c.id.0 >= WARM_UPS;
        let is_last = !is_warm_up && c.start + c.len == q.tokens.len();
        prop_assert_eq!(c.wanted, if is_last { 1 + q.num_guessed() } else { 0 });
        prop_assert!(q.num_guessed() <= limits.draft_tokens);
        for block in &q.blocks[c.start / BLOCK_SIZE..=(c.start + c.len - 1) / BLOCK_SIZE] {
            prop_assert_eq!(holders[block], 1, "block {} is written and shared", block);
        }
    }
    // Sources of copies are held until the step is done.
    for copy in &step.copies {
        prop_assert_eq!(holders[&copy.to], 1);
        *holders.entry(copy.from).or_default() += 1;
    }
    for block in 0..limits.num_blocks as BlockId {
        prop_assert_eq!(s.cache.holders(block), holders.get(&block).copied().unwrap_or(0), "block {}", block);
    }
    prop_assert_eq!(s.cache.num_held(), holders.len());
    prop_assert_eq!(s.cache.num_held() + s.cache.num_available(), limits.num_blocks);
    Ok(())
}

/// The tokens that a sequence gets in a step: they repeat themselves, with surprises. One, and one more for each guess that
/// is right.
fn chosen(s: &Scheduler, id: SequenceId) -> Vec<(SequenceId, u32)> {
    let q = s.get(id).unwrap();
    let first = q.tokens.len() - q.num_guessed();
    let token =
        |position: usize| if (7 * position + id.0 as usize).is_multiple_of(5) { 6 } else { position as u32 % 4 };
    let right = q.tokens[first..].iter().zip(first..).take_while(|(guess, p)| guess.vocab() == Some(token(*p))).count();
    (first..=first + right).map(|position| (id, token(position))).collect()
}

proptest! {
    /// Every request ends, in bounded time, with exactly its tokens, and each position is computed
    /// over what it should be computed over, however blocks are shared, copied and evicted.
    #[test]
    fn every_request_ends_with_its_own_tokens_over_its_own_past(
        arrivals in arrivals(),
        warm_ups in prop::collection::vec((0usize..60, 2u8..5), 0..6),
        max_batch in 1usize..6,
        max_step_tokens in 1usize..80,
        (fair_step_tokens, max_prefill_tokens) in (1usize..12, 1usize..80),
        spare_blocks in 0usize..24,
        prefix_sharing in prop::bool::weighted(0.9),
        fail_at in prop::option::weighted(0.3, 1usize..60),
        draft_tokens in 0usize..5,
    ) {
        let num_blocks = MOST_BLOCKS + spare_blocks;
        let config =
            EngineConfig { max_batch, max_step_tokens, max_prefill_tokens, prefix_sharing, ..EngineConfig::default() };
        let limits = Limits { config, fair_step_tokens, num_blocks, max_encoded: 0, draft_tokens };
        let mut s = Scheduler::new(limits);
        let mut memory = Memory(vec![[NOTHING; BLOCK_SIZE]; num_blocks]);
        let mut given: BTreeMap<SequenceId, usize> = BTreeMap::new();
        let mut ended = HashSet::new();
        let mut clock = 0;
        let work: usize = arrivals.iter().map(|a| 70 + a.common + a.own + a.new).sum();
        while ended.len() < arrivals.len() || !s.is_empty() {
            for (i, a) in arrivals.iter().enumerate().filter(|(_, a)| a.at == clock) {
                s.add(SequenceId(i as u64), a.sequence(i));
            }
            for (i, (_, kind)) in warm_ups.iter().enumerate().filter(|(_, w)| w.0 == clock) {
                let prompt = Arrival { namespace: *kind, common: 0, own: 0, ..arrivals[0].clone() };
                prop_assert!(s.add_warm_up(SequenceId(WARM_UPS + i as u64), prompt.sequence(0)));
            }
            for (i, a) in arrivals.iter().enumerate() {
                let id = SequenceId(i as u64);
                if a.cancel_after.is_some_and(|n| a.at + n == clock) && s.remove(id).is_some() {
                    ended.insert(id);
                }
            }
            let step = s.schedule();
            check(&s, &step, limits)?;
            prop_assert!(!step.chunks.is_empty() || s.is_empty(), "nothing is done");
            clock += 1;
            prop_assert!(clock < 100 + work * (arrivals.len() + 1), "starved");
            if fail_at == Some(clock) {
                memory.spoil(&s, &step);
                let failed = s.abort(&step);
                prop_assert!(step.chunks.iter().all(|c| failed.contains(&c.id)));
                ended.extend(failed.into_iter().filter(|id| id.0 < WARM_UPS));
                continue;
            }
            memory.run(&s, &step)?;
            let tokens: Vec<_> = step.chunks.iter().filter(|c| c.wanted > 0).flat_map(|c| chosen(&s, c.id)).collect();
            s.commit(&step, &tokens);
            prop_assert!(step.chunks.iter().filter_map(|c| s.get(c.id)).all(|q| q.num_guessed() == 0));
            for (id, _) in tokens {
                let n = given.entry(id).or_default();
                *n += 1;
                let a = &arrivals[id.0 as usize];
                if *n == a.new {
                    let done = s.remove(id).unwrap();
                    let input = a.rows() as usize + a.common + a.own;
                    prop_assert_eq!(done.tokens.len(), input + a.new);
                    prop_assert!(done.cached_tokens.unwrap() < input);
                    prop_assert!(ended.insert(id), "ended twice");
                }
            }
        }
        prop_assert_eq!((s.num_waiting(), s.num_running(), s.cache.num_held()), (0, 0, 0));
        prop_assert!(s.ledger.is_idle());
        prop_assert!(prefix_sharing || s.cache.num_kept() == 0);
    }
}
