//! The network of P-tuning (Liu et al. 2021) that makes a prompt's rows while they are learned, as
//! PEFT's `PromptEncoder` builds it. Only its output is kept.

use candle_core::{Device, Result, Tensor};
use rand::Rng;
use rand_distr::StandardNormal;

use super::{learned_tensor::LearnedTensor, order};

/// How the rows are made of their embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptEncoderKind {
    /// Each row by itself through three layers.
    Mlp,
    /// All rows through a bidirectional LSTM of two layers, then each through two more layers.
    Lstm,
}

/// Layers of the LSTM.
const LSTM_LAYERS: usize = 2;

/// An encoder's form and size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PromptEncoder {
    pub kind: PromptEncoderKind,
    /// Units of a layer; of one direction of the LSTM.
    pub hidden_size: usize,
    /// What the output is multiplied by, where PEFT has 1: the size of the model's embeddings, so
    /// that one learning rate suits all layers, and the encoders of all models.
    pub scale: f64,
}

impl PromptEncoderKind {
    /// PEFT's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mlp => "MLP",
            Self::Lstm => "LSTM",
        }
    }
}

impl PromptEncoder {
    /// The embeddings and weights for `n` rows of `width`, named as in PEFT; of the two biases that
    /// PyTorch adds up in an LSTM there is one.
    pub fn named(&self, n: usize, width: usize) -> Vec<LearnedTensor> {
        let h = self.hidden_size;
        let mut all = vec![LearnedTensor::new("embedding.weight", &[n, width])];
        let mut linear = |path: &str, outer: usize, inner: usize| {
            all.push(LearnedTensor::new(&format!("{path}.weight"), &[outer, inner]));
            all.push(LearnedTensor::new(&format!("{path}.bias"), &[outer]));
        };
        match self.kind {
            PromptEncoderKind::Mlp => {
                linear("mlp_head.0", h, width);
                linear("mlp_head.2", h, h);
                linear("mlp_head.4", width, h);
            }
            PromptEncoderKind::Lstm => {
                linear("mlp_head.0", 2 * h, 2 * h);
                linear("mlp_head.2", width, 2 * h);
                for layer in 0..LSTM_LAYERS {
                    let inner = if layer == 0 { width } else { 2 * h };
                    for direction in ["", "_reverse"] {
                        let name = |part: &str| format!("lstm_head.{part}_l{layer}{direction}");
                        all.push(LearnedTensor::new(&name("weight_ih"), &[4 * h, inner]));
                        all.push(LearnedTensor::new(&name("weight_hh"), &[4 * h, h]));
                        all.push(LearnedTensor::new(&name("bias"), &[4 * h]));
                    }
                }
            }
        }
        all
    }

    /// The rows `[n, width]` of tensors in the order of [`named`](Self::named); differentiable.
    pub fn rows(&self, tensors: &[Tensor]) -> Result<Tensor> {
        let features = self.features(tensors)?;
        let [weight, bias] = self.output(tensors)?;
        linear(&features, weight, bias)? * self.scale
    }

    /// Values for the tensors with which the encoder gives `rows` `[n, width]`, row by row, as
    /// closely as its size allows: exactly where it has as many features as there are rows. A
    /// prompt thus begins at words, or at another prompt, in whichever way it is learned.
    pub fn values(&self, rows: &[f32], n: usize, seed: u64) -> Result<Vec<f32>> {
        let width = rows.len() / n;
        let mut rng = order::rng(seed, order::ENCODER);
        let mut tensors = Vec::new();
        for named in self.named(n, width) {
            // Values keep their size from layer to layer (He et al. 2015). Biases begin at zero.
            let std = match named.shape[..] {
                [_, inner] if named.name.starts_with("mlp_head") => (2.0 / inner as f64).sqrt(),
                [_, inner] if named.name.starts_with("lstm_head") => (1.0 / inner as f64).sqrt(),
                [_, _] => 1.0,
                _ => 0.0,
            };
            let values: Vec<f32> =
                (0..named.len()).map(|_| (rng.sample::<f64, _>(StandardNormal) * std) as f32).collect();
            tensors.push(Tensor::from_vec(values, named.shape, &Device::Cpu)?);
        }
        let features = self.features(&tensors)?.to_vec2::<f32>()?;
        let targets: Vec<f32> = rows.iter().map(|x| (f64::from(*x) / self.scale) as f32).collect();
        let (weight, bias) = fit(&features, &targets, width);
        let count = features.first().map_or(0, Vec::len);
        let at = self.output_at();
        tensors[at] = Tensor::from_vec(weight, (width, count), &Device::Cpu)?;
        tensors[at + 1] = Tensor::from_vec(bias, width, &Device::Cpu)?;
        let mut values = Vec::new();
        for tensor in tensors {
            values.extend(tensor.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(values)
    }

    /// Where the output layer's weight is; its bias follows.
    fn output_at(&self) -> usize {
        match self.kind {
            PromptEncoderKind::Mlp => 5,
            PromptEncoderKind::Lstm => 3,
        }
    }

    fn output<'a>(&self, tensors: &'a [Tensor]) -> Result<[&'a Tensor; 2]> {
        match &tensors[self.output_at().min(tensors.len())..] {
            [weight, bias, ..] => Ok([weight, bias]),
            _ => candle_core::bail!("an encoder was given {} tensors", tensors.len()),
        }
    }

    /// What the output layer reads, `[n, features]`.
    fn features(&self, tensors: &[Tensor]) -> Result<Tensor> {
        match (self.kind, tensors) {
            (PromptEncoderKind::Mlp, [x, w0, b0, w2, b2, ..]) => {
                let x = linear(x, w0, b0)?.relu()?;
                linear(&x, w2, b2)?.relu()
            }
            (PromptEncoderKind::Lstm, [x, w0, b0, _, _, lstm @ ..]) => {
                let mut x = x.clone();
                for layer in lstm.chunks_exact(6) {
                    let forward = lstm_direction(&x, &layer[..3], false)?;
                    let backward = lstm_direction(&x, &layer[3..], true)?;
                    x = Tensor::cat(&[forward, backward], 1)?;
                }
                linear(&x, w0, b0)?.relu()
            }
            (_, tensors) => candle_core::bail!("an encoder was given {} tensors", tensors.len()),
        }
    }
}

fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)?.broadcast_add(bias)
}

/// One direction of an LSTM layer (Hochreiter & Schmidhuber 1997), with the gates in PyTorch's
/// order: input, forget, cell, output. `x` `[n, inner]` to `[n, hidden]`.
fn lstm_direction(x: &Tensor, weights: &[Tensor], reverse: bool) -> Result<Tensor> {
    let [input, recurrent, bias] = weights else {
        candle_core::bail!("a direction of an LSTM has 3 tensors, found {}", weights.len());
    };
    let (n, size) = (x.dim(0)?, recurrent.dim(1)?);
    let from_input = linear(x, input, bias)?;
    let recurrent = recurrent.t()?;
    let mut outputs: Vec<Tensor> = Vec::with_capacity(n);
    let mut cell: Option<Tensor> = None;
    for step in 0..n {
        let row = if reverse { n - 1 - step } else { step };
        let mut gates = from_input.narrow(0, row, 1)?;
        if let Some(last) = outputs.last() {
            gates = (gates + last.matmul(&recurrent)?)?;
        }
        let gate = |i: usize| gates.narrow(1, i * size, size);
        let sigmoid = candle_nn::ops::sigmoid;
        let new = (sigmoid(&gate(0)?)? * gate(2)?.tanh()?)?;
        let next = match cell {
            Some(cell) => ((sigmoid(&gate(1)?)? * cell)? + new)?,
            None => new,
        };
        outputs.push((sigmoid(&gate(3)?)? * next.tanh()?)?);
        cell = Some(next);
    }
    if reverse {
        outputs.reverse();
    }
    Tensor::cat(&outputs, 0)
}

/// How much of the features' mean square is added to the diagonal of their products, so that
/// equal features do no harm.
const RIDGE: f64 = 1e-6;

/// The output layer, weight `[width, features]` and bias, that makes `rows` of `features`: the
/// smallest weight among those that come closest. The bias is the mean row.
fn fit(features: &[Vec<f32>], rows: &[f32], width: usize) -> (Vec<f32>, Vec<f32>) {
    let n = features.len();
    let count = features.first().map_or(0, Vec::len);
    let mean: Vec<f64> =
        (0..width).map(|c| rows.iter().skip(c).step_by(width).map(|&x| f64::from(x)).sum::<f64>() / n as f64).collect();
    let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    let mut gram: Vec<Vec<f64>> = features.iter().map(|a| features.iter().map(|b| product(a, b)).collect()).collect();
    let ridge = RIDGE * (0..n).map(|i| gram[i][i]).sum::<f64>() / n as f64 + f64::MIN_POSITIVE;
    (0..n).for_each(|i| gram[i][i] += ridge);
    let mut targets: Vec<Vec<f64>> =
        rows.chunks_exact(width).map(|row| row.iter().zip(&mean).map(|(&x, m)| f64::from(x) - m).collect()).collect();
    solve(&mut gram, &mut targets);
    let weight = (0..width)
        .flat_map(|c| (0..count).map(move |f| (c, f)))
        .map(|(c, f)| features.iter().zip(&targets).map(|(x, t)| f64::from(x[f]) * t[c]).sum::<f64>() as f32)
        .collect();
    (weight, mean.into_iter().map(|m| m as f32).collect())
}

/// Solves `matrix * x = targets` for a positive definite matrix, by Cholesky's decomposition; the
/// solution is left in `targets`.
fn solve(matrix: &mut [Vec<f64>], targets: &mut [Vec<f64>]) {
    let n = matrix.len();
    for i in 0..n {
        for j in 0..=i {
            let sum = matrix[i][j] - (0..j).map(|k| matrix[i][k] * matrix[j][k]).sum::<f64>();
            matrix[i][j] = if i == j { sum.max(f64::MIN_POSITIVE).sqrt() } else { sum / matrix[j][j] };
        }
    }
    let subtract = |targets: &mut [Vec<f64>], from: usize, of: usize, factor: f64| {
        let other = targets[of].clone();
        targets[from].iter_mut().zip(other).for_each(|(x, y)| *x -= factor * y);
    };
    for i in 0..n {
        (0..i).for_each(|k| subtract(targets, i, k, matrix[i][k]));
        targets[i].iter_mut().for_each(|x| *x /= matrix[i][i]);
    }
    for i in (0..n).rev() {
        (i + 1..n).for_each(|k| subtract(targets, i, k, matrix[k][i]));
        targets[i].iter_mut().for_each(|x| *x /= matrix[i][i]);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::*;

    const KINDS: [PromptEncoderKind; 2] = [PromptEncoderKind::Mlp, PromptEncoderKind::Lstm];

    fn tensors(encoder: &PromptEncoder, rows: &[f32], n: usize) -> Vec<Tensor> {
        let mut rest = encoder.values(rows, n, 3).expect("values");
        let mut tensors = Vec::new();
        for named in encoder.named(n, rows.len() / n) {
            let after = rest.split_off(named.len());
            tensors.push(Tensor::from_vec(rest, named.shape, &Device::Cpu).expect("a tensor"));
            rest = after;
        }
        assert!(rest.is_empty());
        tensors
    }

    fn words(n: usize, width: usize) -> Vec<f32> {
        (0..n * width).map(|i| ((i * 37 + i / width * 11) % 19) as f32 / 9.0 - 1.0).collect()
    }

    #[test]
    fn an_encoder_begins_at_the_rows_it_is_given() {
        for kind in KINDS {
            let rows = words(6, 10);
            let encoder = PromptEncoder { kind, hidden_size: 16, scale: 0.1 };
            let made = encoder.rows(&tensors(&encoder, &rows, 6)).expect("rows");
            let made = made.flatten_all().and_then(|r| r.to_vec1::<f32>()).expect("values");
            for (a, b) in made.iter().zip(&rows) {
                assert!((a - b).abs() < 2e-3, "{kind:?}: {a} {b}");
            }
        }
    }

    #[test]
    fn the_gradient_of_every_weight_is_that_of_central_differences() {
        let (n, width) = (4, 3);
        let weights = Tensor::from_vec(words(n, width), (n, width), &Device::Cpu).expect("weights");
        let weights = weights.to_dtype(DType::F64).expect("casts");
        for kind in KINDS {
            let encoder = PromptEncoder { kind, hidden_size: 5, scale: 0.5 };
            let tensors = tensors(&encoder, &words(n, width), n);
            let vars: Vec<Var> = tensors
                .iter()
                .map(|t| Var::from_tensor(&t.to_dtype(DType::F64).expect("casts")).expect("a variable"))
                .collect();
            let loss = |tensors: &[Tensor]| {
                let rows = encoder.rows(tensors).expect("rows");
                (rows.sqr().expect("squares") * &weights).and_then(|x| x.sum_all()).expect("a loss")
            };
            let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
            let gradients = loss(&inputs).backward().expect("gradients");
            for (i, var) in vars.iter().enumerate() {
                let gradient = gradients.get(var).expect("a gradient").flatten_all().expect("flat");
                let gradient = gradient.to_vec1::<f64>().expect("values");
                let values = var.flatten_all().and_then(|v| v.to_vec1::<f64>()).expect("values");
                for (j, gradient) in gradient.iter().enumerate() {
                    let moved = |by: f64| {
                        let mut values = values.clone();
                        values[j] += by;
                        let mut inputs = inputs.clone();
                        inputs[i] = Tensor::from_vec(values, var.shape(), &Device::Cpu).expect("a tensor");
                        loss(&inputs).to_scalar::<f64>().expect("a number")
                    };
                    let numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                    assert!((gradient - numeric).abs() < 1e-6 * (1.0 + numeric.abs()), "{kind:?} {i} {j}");
                }
            }
        }
    }

    #[test]
    fn an_lstm_direction_gives_what_pytorch_gives() {
        let tensor =
            |values: &[f32], shape: (usize, usize)| Tensor::from_slice(values, shape, &Device::Cpu).expect("a tensor");
        let ramp = |n: usize, from: f32, step: f32| (0..n).map(|i| from + step * i as f32).collect::<Vec<f32>>();
        let x = tensor(&ramp(6, -0.5, 0.2), (3, 2));
        let weights = [
            tensor(&ramp(16, -0.8, 0.1), (8, 2)),
            tensor(&ramp(16, 0.6, -0.07), (8, 2)),
            Tensor::from_vec(ramp(8, -0.2, 0.05), 8, &Device::Cpu).expect("a tensor"),
        ];
        for (reverse, expected) in [(false, PYTORCH), (true, PYTORCH_REVERSE)] {
            let made = lstm_direction(&x, &weights, reverse).and_then(|y| y.flatten_all()?.to_vec1::<f32>());
            for (a, b) in made.expect("rows").iter().zip(expected) {
                assert!((a - b).abs() < 1e-6, "{reverse}: {a} {b}");
            }
        }
    }
    const PYTORCH: [f32; 6] =
        [-0.007_891_89, -0.032_766_227, -0.002_010_564, -0.004_629_714, 0.008_638_148, 0.058_007_754];
    const PYTORCH_REVERSE: [f32; 6] =
        [-0.005_384_816, -0.019_856_254, 0.005_993_783_5, 0.036_093_71, 0.009_596_401, 0.060_415_04];
}
