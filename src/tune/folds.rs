//! Folds: the examples split into some to train on and others, which are not trained on, to judge by.

use candle_core::Result;

use super::{
    forward::Forward,
    loss::{self, ValidationMetrics},
    order,
    plan::{HeldOut, Plan},
    split,
};
use crate::examples::TokenizedExample;

/// Examples that the candidates of a race are compared by, at most.
const MOST_JUDGED: usize = 256;
/// How many parts the examples of a race are split into, one of which judges.
const PARTS: usize = 3;
/// Below so many examples, each part judges once: one part alone is too few.
const EVERY_PART_JUDGES_BELOW: usize = 40;

/// Some examples to train on and others to judge by.
#[derive(Debug)]
pub struct Fold {
    pub train: Vec<TokenizedExample>,
    pub judge: Vec<TokenizedExample>,
}

/// The folds of a race. A file of held-out examples judges; otherwise a part of all examples does, or each part once.
pub fn of_race(plan: &Plan) -> Vec<Fold> {
    let seed = plan.settings.seed;
    let all: Vec<TokenizedExample> = match plan.held_out_is {
        HeldOut::File => {
            let order = order::shuffled(plan.held_out.len(), seed, order::SWEEP);
            let judge = order.into_iter().take(MOST_JUDGED).map(|i| plan.held_out[i].clone()).collect();
            return vec![Fold { train: plan.train.clone(), judge }];
        }
        HeldOut::Split => plan.train.iter().chain(&plan.held_out).cloned().collect(),
        HeldOut::Training => plan.train.clone(),
    };
    let mut folds = split(&all, PARTS, seed);
    if all.len() >= EVERY_PART_JUDGES_BELOW {
        folds.truncate(1);
    }
    folds.iter_mut().for_each(|fold| fold.judge.truncate(MOST_JUDGED));
    match folds.is_empty() {
        // One input, of which nothing can be set apart.
        true => vec![Fold { train: all.clone(), judge: all }],
        false => folds,
    }
}

/// `k` folds in which each example judges once; fewer if there are fewer different inputs, and none if there is one.
pub fn split(all: &[TokenizedExample], k: usize, seed: u64) -> Vec<Fold> {
    let parts = split::parts(all, k, seed);
    let fold = |part: usize| {
        let of =
            |judges: bool| all.iter().zip(&parts).filter(move |(_, p)| (**p == part) == judges).map(|(e, _)| e.clone());
        Fold { train: of(false).collect(), judge: of(true).collect() }
    };
    (0..k).map(fold).filter(|fold| !fold.train.is_empty() && !fold.judge.is_empty()).collect()
}

/// What values, of each fold, make of the examples that judge it, together.
///
/// # Errors
/// A forward pass fails.
pub fn validate(forward: &Forward, plan: &Plan, folds: &[Fold], values: &[&[f32]]) -> Result<ValidationMetrics> {
    let mut sum = ValidationMetrics { loss: 0.0, exact: 0.0 };
    let mut examples = 0.0;
    for (fold, values) in folds.iter().zip(values) {
        let prompt = plan.parameters.prompt_of(values, &forward.model().info().device)?;
        let judge: Vec<&TokenizedExample> = fold.judge.iter().collect();
        let part = loss::evaluate(forward, Some(&prompt), &judge, plan.settings.batch_size)?;
        let n = judge.len() as f64;
        sum.loss += n * part.loss;
        sum.exact += n * part.exact;
        examples += n;
    }
    Ok(ValidationMetrics { loss: sum.loss / examples, exact: sum.exact / examples })
}
