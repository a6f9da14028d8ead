//! The loss of a prompt on a batch: the cross-entropy of the answers' tokens, through the forward
//! that serves.

use candle_core::{D, DType, Result, Tensor, Var, bail};

use super::{forward::Forward, parameters::Parameters};
use crate::examples::TokenizedExample;
use crate::prompt::learned::LearnedPrompt;

/// What a forward pass over a batch gives.
#[derive(Debug)]
pub struct Scored {
    /// The negative log-likelihood of all answer tokens, summed; a differentiable scalar.
    pub sum: Tensor,
    /// How many answer tokens there are, EOS included.
    pub tokens: usize,
    /// The model's likeliest token at each of them, `[tokens]`.
    likeliest: Tensor,
    /// The log-probability of each, `[tokens]`.
    log_probs: Tensor,
}

impl Scored {
    /// The log-likelihood of each answer of the batch, summed over its tokens.
    pub fn log_likelihoods(&self, batch: &[&TokenizedExample]) -> Result<Vec<f64>> {
        let log_probs = self.log_probs.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let mut rest = log_probs.as_slice();
        Ok(batch
            .iter()
            .map(|example| {
                let (own, others) = rest.split_at(example.answer.len());
                rest = others;
                own.iter().sum()
            })
            .collect())
    }

    /// How many of the batch's answers greedy decoding gives, token for token with the end: those
    /// whose every token is the likeliest after the ones before it.
    pub fn exact(&self, batch: &[&TokenizedExample]) -> Result<usize> {
        let likeliest = self.likeliest.to_vec1::<u32>()?;
        let mut rest = likeliest.as_slice();
        Ok(batch
            .iter()
            .filter(|example| {
                let (own, others) = rest.split_at(example.answer.len());
                rest = others;
                own == example.answer
            })
            .count())
    }
}

/// One forward pass over the examples after a prompt. `prompt` is in any float type; with none, the model
/// answers on its own.
pub fn score(forward: &Forward, prompt: Option<&LearnedPrompt>, batch: &[&TokenizedExample]) -> Result<Scored> {
    let targets: Vec<u32> = batch.iter().flat_map(|example| example.answer.iter().copied()).collect();
    let tokens = targets.len();
    let (logits, mut kernels) = forward.answer_logits(prompt, batch)?;
    let likeliest = logits.detach().argmax(D::Minus1)?;
    let log_probs = kernels.log_probabilities(&logits, &targets)?;
    let sum = log_probs.sum_all()?.neg()?;
    Ok(Scored { sum, tokens, likeliest, log_probs: log_probs.detach() })
}

/// The loss on a batch and its gradient to the values that are learned, both as sums over the answer
/// tokens.
pub fn gradient(
    forward: &Forward,
    parameters: &Parameters,
    values: &[f32],
    batch: &[&TokenizedExample],
) -> Result<(f64, Vec<f32>)> {
    let variables = parameters.variables(values, &forward.model().info().device)?;
    let tensors: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
    let scored = score(forward, Some(&parameters.prompt(&tensors)?), batch)?;
    let mut all = Vec::with_capacity(values.len());
    for gradient in gradients_of(&scored.sum, &variables)? {
        all.extend(gradient.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok((scalar(&scored.sum)?, all))
}

/// The gradients of a scalar to variables. That there are all is checked: candle's fused operations
/// drop them without a word.
pub fn gradients_of(scalar: &Tensor, variables: &[Var]) -> Result<Vec<Tensor>> {
    let mut gradients = scalar.backward()?;
    let found = variables.iter().map(|variable| match gradients.remove(variable.as_tensor()) {
        Some(gradient) => Ok(gradient),
        None => bail!("no gradient reached the prompt: an operation of the forward pass has no backward"),
    });
    found.collect()
}

/// The value of a scalar of any float type.
pub fn scalar(x: &Tensor) -> Result<f64> {
    x.to_dtype(DType::F64)?.to_scalar()
}

/// The mean loss of a prompt over examples and the part of them it answers exactly, without
/// gradients.
pub fn evaluate(
    forward: &Forward,
    prompt: Option<&LearnedPrompt>,
    examples: &[&TokenizedExample],
    batch_size: usize,
) -> Result<ValidationMetrics> {
    let (mut sum, mut tokens, mut exact) = (0.0, 0, 0);
    for batch in examples.chunks(batch_size.max(1)) {
        let scored = score(forward, prompt, batch)?;
        sum += scalar(&scored.sum)?;
        tokens += scored.tokens;
        exact += scored.exact(batch)?;
    }
    Ok(ValidationMetrics { loss: sum / tokens.max(1) as f64, exact: exact as f64 / examples.len().max(1) as f64 })
}

/// How good a prompt is on held-out examples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ValidationMetrics {
    /// Mean cross-entropy of an answer token, in nats.
    pub loss: f64,
    /// The part of the answers that greedy decoding gives exactly, 0 to 1; a labelled task's
    /// accuracy.
    pub exact: f64,
}

impl ValidationMetrics {
    /// The standard error of `exact` as an estimate from `n` examples, by the rule of succession: not zero where all or none
    /// are exact.
    pub fn standard_error(&self, n: usize) -> f64 {
        let n = n as f64;
        let p = (self.exact * n + 1.0) / (n + 2.0);
        (p * (1.0 - p) / (n + 2.0)).sqrt()
    }

    /// Whether this is better: more exact answers, or as many and a lower loss.
    pub fn better_than(&self, other: &ValidationMetrics) -> bool {
        self.loss.is_finite() && (self.exact > other.exact || self.exact == other.exact && self.loss < other.loss)
    }

    /// Whether it is better by enough to wait for more.
    pub fn clearly_better_than(&self, other: &ValidationMetrics) -> bool {
        self.loss.is_finite()
            && (self.exact > other.exact || self.exact == other.exact && self.loss < 0.99 * other.loss)
    }
}
