//! What differs from pass to pass while a prompt is learned, so that few examples are not learnt by heart: some words of the
//! inputs are left out (Iyyer et al. 2015; Wei & Zou 2019), and the prompt's values are moved by noise (Bishop 1995). A prompt that
//! answers rightly all the same depends on no single word and lies in a wide minimum.
//!
//! It follows from the seed and the number of the pass alone, so a run that is resumed sees what an uninterrupted one sees.

use rand::{Rng, rngs::StdRng};
use rand_distr::StandardNormal;

use super::{learned_tensor::LearnedTensor, order};
use crate::examples::TokenizedExample;
use crate::packing::InputToken;

/// How much differs.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Variation {
    /// The part of an input's tokens that is left out, 0 to 1.
    pub word_dropout: f64,
    /// The standard deviation of the noise on the values, in units of the root mean square of their tensor.
    pub noise: f64,
}

impl Variation {
    /// The random numbers of a pass.
    pub fn rng(seed: u64, pass: usize) -> StdRng {
        order::rng(seed, order::VARIATION + pass as u64)
    }

    /// The examples with words left out, each by itself. Virtual tokens and what is in `template` stay, and one other token at
    /// least.
    pub fn examples(&self, batch: &[&TokenizedExample], template: &[u32], rng: &mut StdRng) -> Vec<TokenizedExample> {
        let part = self.word_dropout;
        let mut without_words = |example: &&TokenizedExample| {
            if part <= 0.0 {
                return (*example).clone();
            }
            let is_word = |token: &InputToken| token.vocab().is_some_and(|id| !template.contains(&id));
            let words: Vec<usize> = (0..example.input.len()).filter(|&i| is_word(&example.input[i])).collect();
            if words.is_empty() {
                return (*example).clone();
            }
            let spared = words[rng.random_range(0..words.len())];
            let left_out: Vec<usize> =
                words.into_iter().filter(|&i| rng.random::<f64>() < part && i != spared).collect();
            let stays = |i: &usize| left_out.binary_search(i).is_err();
            let input = (0..example.input.len()).filter(stays).map(|i| example.input[i]).collect();
            TokenizedExample { input, answer: example.answer.clone() }
        };
        batch.iter().map(&mut without_words).collect()
    }

    /// The values of `tensors`, one after another, moved by noise.
    pub fn values(&self, values: &[f32], tensors: &[LearnedTensor], rng: &mut StdRng) -> Vec<f32> {
        if self.noise <= 0.0 {
            return values.to_vec();
        }
        let (mut rest, mut all) = (values, Vec::with_capacity(values.len()));
        for tensor in tensors {
            let (own, after) = rest.split_at(tensor.len());
            rest = after;
            let square = own.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / own.len() as f64;
            let size = self.noise * square.sqrt();
            all.extend(own.iter().map(|&x| (f64::from(x) + size * rng.sample::<f64, _>(StandardNormal)) as f32));
        }
        all
    }
}

/// The tokens that every input has: what the template puts around the fields, and nothing that tells inputs apart.
pub fn template_tokens(examples: &[TokenizedExample]) -> Vec<u32> {
    let Some((first, others)) = examples.split_first() else { return Vec::new() };
    if others.is_empty() {
        return Vec::new();
    }
    let mut common = first.text_ids();
    common.sort_unstable();
    common.dedup();
    for example in others {
        common.retain(|&id| example.input.iter().any(|token| token.vocab() == Some(id)));
        if common.is_empty() {
            break;
        }
    }
    common
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packing::PromptShape;

    fn examples() -> Vec<TokenizedExample> {
        let input = |words: &[u32]| PromptShape::Embeddings(2).followed_by(&[&[7], words, &[9, 10]].concat());
        [&[20, 21, 22, 23, 24][..], &[25, 26, 27], &[28]]
            .map(|words| TokenizedExample { input: input(words), answer: vec![3, 2] })
            .to_vec()
    }

    #[test]
    fn words_are_left_out_and_the_template_stays() {
        let all = examples();
        let template = template_tokens(&all);
        assert_eq!(template, [7, 9, 10]);
        let batch: Vec<&TokenizedExample> = all.iter().collect();
        let variation = Variation { word_dropout: 0.5, noise: 0.0 };
        let (mut kept, mut seen) = (0, std::collections::BTreeSet::new());
        for pass in 0..200 {
            let varied = variation.examples(&batch, &template, &mut Variation::rng(1, pass));
            for (was, is) in all.iter().zip(&varied) {
                assert_eq!(is.answer, was.answer);
                let mut rest = was.input.iter();
                assert!(is.input.iter().all(|token| rest.any(|other| other == token)), "the order stays");
                assert_eq!(is.input[..3], was.input[..3], "the virtual tokens and the template before");
                assert_eq!(is.text_ids()[is.text_ids().len() - 2..], [9, 10], "the template after");
                assert!(is.input.len() > 5, "a word is left");
            }
            kept += varied[0].input.len() - 5;
            seen.insert(varied[0].text_ids());
        }
        assert!((550..650).contains(&kept), "one of five is spared, and half of the others: {kept}");
        assert!(seen.len() > 20, "they differ: {}", seen.len());
        let again = |seed| variation.examples(&batch, &template, &mut Variation::rng(seed, 3));
        assert_eq!(again(1), again(1));
    }

    #[test]
    fn noise_is_as_large_as_the_tensor_says() {
        let tensors = [LearnedTensor::new("a", &[100, 50]), LearnedTensor::new("b", &[10, 500])];
        let values: Vec<f32> = (0..10_000).map(|i| if i < 5000 { 3.0 } else { -0.1 }).collect();
        let variation = Variation { word_dropout: 0.0, noise: 0.2 };
        let moved = variation.values(&values, &tensors, &mut Variation::rng(5, 0));
        let spread = |at: std::ops::Range<usize>| {
            let sum: f32 = at.clone().map(|i| (moved[i] - values[i]).powi(2)).sum();
            (sum / at.len() as f32).sqrt()
        };
        assert!((spread(0..5000) - 0.6).abs() < 0.03 && (spread(5000..10_000) - 0.02).abs() < 0.001);
        assert_ne!(moved, variation.values(&values, &tensors, &mut Variation::rng(5, 1)));
    }

    #[test]
    fn without_variation_nothing_is_changed() {
        let all = examples();
        let batch: Vec<&TokenizedExample> = all.iter().collect();
        let mut rng = Variation::rng(0, 0);
        assert_eq!(Variation::default().examples(&batch, &[], &mut rng), all);
        let tensors = [LearnedTensor::new("a", &[2])];
        assert_eq!(
            Variation::default().values(&[0.1, f32::MIN_POSITIVE], &tensors, &mut rng),
            [0.1, f32::MIN_POSITIVE]
        );
        assert_eq!(template_tokens(&all[..1]), [0u32; 0], "one input says nothing of the template");
    }
}
