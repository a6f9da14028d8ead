//! The requests of a load, one after another, the same for the same seed.

use bytes::Bytes;
use rand::{
    Rng as _, SeedableRng as _,
    distr::{Distribution as _, weighted::WeightedIndex},
    rngs::StdRng,
    seq::IndexedRandom as _,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::load::Load;
use crate::sampling::SamplingOptions;

/// A task that can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Target {
    pub task: String,
    /// The fields of its input.
    pub fields: Vec<String>,
}

/// What inputs are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Words {
    /// Common words, about a token each for most tokenizers.
    English,
    /// The words `w0`, `w1`… of a model with random weights, exactly a token each.
    Numbered { vocabulary: usize },
}

const ENGLISH: [&str; 64] = [
    "the", "of", "and", "to", "in", "that", "was", "his", "he", "it", "with", "is", "for", "as", "had", "you", "not",
    "be", "her", "on", "at", "by", "which", "have", "or", "from", "this", "but", "all", "she", "they", "were", "my",
    "are", "me", "one", "their", "so", "an", "said", "them", "we", "who", "would", "been", "will", "no", "when",
    "there", "if", "more", "out", "up", "into", "do", "any", "your", "what", "has", "man", "could", "other", "than",
    "our",
];

impl Words {
    fn text(self, words: usize, random: &mut StdRng) -> String {
        let mut text = String::with_capacity(6 * words);
        for i in 0..words {
            if i > 0 {
                text.push(' ');
            }
            match self {
                Self::English => text.push_str(ENGLISH.choose(random).unwrap_or(&"the")),
                Self::Numbered { vocabulary } => {
                    text.push('w');
                    text.push_str(&random.random_range(0..vocabulary.max(1)).to_string());
                }
            }
        }
        text
    }
}

/// What to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    pub path: String,
    pub body: Bytes,
}

/// Makes the requests of one load.
#[derive(Debug)]
pub struct Plan {
    random: StdRng,
    load: Load,
    targets: Vec<Target>,
    words: Words,
    pick: Option<WeightedIndex<f64>>,
    left: Option<usize>,
    /// The next request's, where it is drawn. Not of `random`, so that a load has the same texts with and without sampling.
    next_seed: u64,
}

/// A generate request on the wire.
#[derive(Debug, Serialize)]
struct Body {
    input: Value,
    #[serde(flatten)]
    sampling: SamplingOptions,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    ignore_eos: bool,
    stream: bool,
}

impl Plan {
    /// Requests of `load` to `targets`. Other seeds give other texts, so that a server that
    /// remembers texts has not seen them.
    pub fn new(load: &Load, targets: &[Target], words: Words, seed: u64) -> Self {
        Self {
            random: StdRng::seed_from_u64(seed),
            load: load.clone(),
            targets: targets.to_vec(),
            words,
            pick: load.mix.over(targets.len()),
            left: load.requests,
            next_seed: load.seed.unwrap_or(seed),
        }
    }

    /// A request to the target of this number, counted round and round, besides those of the load.
    pub fn round_robin(&mut self, number: usize) -> Option<Ask> {
        self.ask(number.checked_rem(self.targets.len())?)
    }

    /// Time until the next request at a mean `rate` a second, in seconds.
    pub fn pause(&mut self, rate: f64) -> f64 {
        // Exponential, by inversion; 1 - u is never 0.
        -(1.0 - self.random.random::<f64>()).ln() / rate
    }

    fn ask(&mut self, index: usize) -> Option<Ask> {
        let target = self.targets.get(index)?;
        let length = self.load.input_tokens.sample(&mut self.random);
        let max_tokens = self.load.output_tokens.sample(&mut self.random);
        let input = match &target.fields[..] {
            [] | [_] => json!(self.words.text(length, &mut self.random)),
            fields => {
                let each = length.div_ceil(fields.len());
                fields.iter().map(|field| (field.clone(), json!(self.words.text(each, &mut self.random)))).collect()
            }
        };
        // Every answer has the length that was drawn: no end of text and no stop text ends it.
        let temperature = self.load.sampling.temperature.unwrap_or(0.0);
        let seed = (temperature > 0.0).then_some(self.next_seed);
        self.next_seed = self.next_seed.wrapping_add(1);
        let sampling = SamplingOptions {
            max_tokens: Some(max_tokens),
            temperature: Some(temperature),
            stop: Some(Vec::new()),
            ..self.load.sampling.clone()
        };
        let body = serde_json::to_vec(&Body { input, sampling, seed, ignore_eos: true, stream: true }).ok()?;
        Some(Ask { path: format!("/v1/tasks/{}/generate", target.task), body: body.into() })
    }
}

/// The requests, until there have been as many as the load has.
impl Iterator for Plan {
    type Item = Ask;

    fn next(&mut self) -> Option<Ask> {
        if let Some(left) = &mut self.left {
            *left = left.checked_sub(1)?;
        }
        let index = self.pick.as_ref()?.sample(&mut self.random);
        self.ask(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{
        distribution::{Lengths, Mix},
        load::Arrival,
    };

    fn load() -> Load {
        Load {
            name: "all".to_owned(),
            tasks: 2,
            virtual_tokens: 5,
            requests: Some(50),
            arrival: Arrival::Concurrency(1),
            mix: Mix::Uniform,
            input_tokens: Lengths::Uniform { least: 3, most: 5 },
            output_tokens: Lengths::fixed(7),
            sampling: SamplingOptions::default(),
            seed: None,
            background: false,
            alone: false,
        }
    }

    fn targets() -> Vec<Target> {
        let target = |task: &str, fields: &[&str]| Target {
            task: task.to_owned(),
            fields: fields.iter().map(|f| (*f).to_owned()).collect(),
        };
        vec![target("one", &["input"]), target("two", &["text", "question"])]
    }

    fn all(seed: u64) -> Vec<Ask> {
        Plan::new(&load(), &targets(), Words::Numbered { vocabulary: 9 }, seed).collect()
    }

    #[test]
    fn a_seed_gives_the_same_requests_and_another_gives_others() {
        assert_eq!(all(1), all(1));
        assert_ne!(all(1), all(2));
    }

    #[test]
    fn requests_have_the_lengths_tasks_and_fields_that_were_asked_for() {
        let asked = all(3);
        assert_eq!(asked.len(), 50);
        let mut seen = [0; 2];
        for ask in asked {
            let body: Value = serde_json::from_slice(&ask.body).unwrap();
            assert_eq!((&body["max_tokens"], &body["stream"]), (&json!(7), &json!(true)));
            let words = |text: &Value| text.as_str().unwrap().split(' ').count();
            match ask.path.as_str() {
                "/v1/tasks/one/generate" => {
                    seen[0] += 1;
                    assert!((3..=5).contains(&words(&body["input"])));
                }
                "/v1/tasks/two/generate" => {
                    seen[1] += 1;
                    assert!((2..=3).contains(&words(&body["input"]["question"])), "{body}");
                    assert!((2..=3).contains(&words(&body["input"]["text"])), "{body}");
                }
                other => panic!("{other}"),
            }
        }
        assert!(seen.iter().all(|n| *n > 10), "{seen:?}");
    }

    #[test]
    fn sampled_requests_name_their_parameters_and_seeds_and_have_the_texts_of_greedy_ones() {
        let bodies = |load: &Load| -> Vec<Value> {
            let asked = Plan::new(load, &targets(), Words::English, 3);
            asked.map(|ask| serde_json::from_slice(&ask.body).unwrap()).collect()
        };
        let greedy = bodies(&load());
        assert!(greedy.iter().all(|body| body["temperature"] == 0.0 && body.get("seed").is_none()));
        assert!(greedy.iter().all(|body| body.get("top_k").is_none() && body["stop"] == json!([])));
        let sampling = SamplingOptions { temperature: Some(0.7), top_k: Some(40), ..SamplingOptions::default() };
        let sampled = bodies(&Load { sampling: sampling.clone(), ..load() });
        for (greedy, sampled) in greedy.iter().zip(&sampled) {
            assert_eq!(greedy["input"], sampled["input"]);
            assert_eq!((&sampled["temperature"], &sampled["top_k"]), (&json!(0.7), &json!(40)));
        }
        let seeds = |bodies: &[Value]| bodies.iter().map(|body| body["seed"].as_u64().unwrap()).collect::<Vec<_>>();
        assert_eq!(seeds(&sampled), (3..53).collect::<Vec<_>>());
        let from_base = bodies(&Load { sampling, seed: Some(u64::MAX), ..load() });
        assert_eq!(seeds(&from_base)[..2], [u64::MAX, 0]);
    }

    #[test]
    fn pauses_are_exponential() {
        let mut plan = Plan::new(&load(), &targets(), Words::English, 4);
        let pauses: Vec<f64> = (0..20_000).map(|_| plan.pause(50.0)).collect();
        let mean = pauses.iter().sum::<f64>() / 20_000.0;
        let longer = pauses.iter().filter(|p| **p > mean).count() as f64 / 20_000.0;
        assert!((mean - 0.02).abs() < 0.001 && (longer - 0.368).abs() < 0.02, "{mean} {longer}");
    }
}
