//! Loads: how many requests of which tasks come how quickly.

use std::str::FromStr;

use serde::{Serialize, Serializer};

use super::distribution::{Lengths, Mix};
use crate::sampling::{PARAMETERS, Parameter, SamplingOptions};

/// One load, all choices made.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Load {
    pub name: String,
    /// How many tasks it asks; no other load asks them.
    pub tasks: usize,
    /// The length of their learned prompts, where those are made for the benchmark.
    pub virtual_tokens: usize,
    /// `None` goes on until the time is over, or until the other loads are done.
    pub requests: Option<usize>,
    pub arrival: Arrival,
    #[serde(serialize_with = "shown")]
    pub mix: Mix,
    #[serde(serialize_with = "shown")]
    pub input_tokens: Lengths,
    #[serde(serialize_with = "shown")]
    pub output_tokens: Lengths,
    /// The sampling parameters that its requests name; without a temperature they are greedy.
    #[serde(serialize_with = "shown")]
    pub sampling: SamplingOptions,
    /// Request i is drawn with this seed + i; `None` takes a seed that the benchmark's own gives.
    pub seed: Option<u64>,
    /// It stops when the loads that are not in the background are done.
    pub background: bool,
    /// It is run without the others first, to compare.
    pub alone: bool,
}

/// When the next request comes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Arrival {
    /// A closed loop: this many clients, each asks again when it has its answer.
    Concurrency(usize),
    /// An open loop: requests a second, at random times (Poisson), whatever the server does.
    Rate(f64),
}

fn shown<S: Serializer>(value: &impl ToString, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&value.to_string())
}

/// A load as typed, `name=light,tasks=1,rate=2,alone`: what it does not say is taken from another.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoadSpec {
    name: Option<String>,
    tasks: Option<usize>,
    virtual_tokens: Option<usize>,
    requests: Option<usize>,
    arrival: Option<Arrival>,
    mix: Option<Mix>,
    input_tokens: Option<Lengths>,
    output_tokens: Option<Lengths>,
    sampling: SamplingOptions,
    seed: Option<u64>,
    background: bool,
    alone: bool,
}

impl LoadSpec {
    /// Fills in what was left out. A load has one task if it does not say, and is named by its
    /// place among the loads.
    pub fn over(self, base: &Load, index: usize) -> Load {
        let requests = if self.background { self.requests } else { self.requests.or(base.requests) };
        Load {
            name: self.name.unwrap_or_else(|| format!("load {}", index + 1)),
            tasks: self.tasks.unwrap_or(1),
            virtual_tokens: self.virtual_tokens.unwrap_or(base.virtual_tokens),
            requests,
            arrival: self.arrival.unwrap_or(base.arrival),
            mix: self.mix.unwrap_or(base.mix),
            input_tokens: self.input_tokens.unwrap_or(base.input_tokens),
            output_tokens: self.output_tokens.unwrap_or(base.output_tokens),
            sampling: self.sampling.or(&base.sampling),
            seed: self.seed.or(base.seed),
            background: self.background,
            alone: self.alone,
        }
    }
}

const KEYS: &str = "name=, tasks=, virtual-tokens=, requests=, concurrency=, rate=, mix=, input-tokens=, output-tokens=, seed=, background, alone";

/// The sampling parameters that a load may name: all but the length of the answer, which is drawn from
/// `output-tokens`.
pub fn sampling_parameters() -> impl Iterator<Item = &'static Parameter> {
    PARAMETERS.iter().filter(|parameter| parameter.name != "max_tokens")
}

/// The first sampling parameter that changes nothing, because no temperature is given and the likeliest token is taken.
pub fn without_effect(sampling: &SamplingOptions) -> Option<&'static Parameter> {
    let filters = ["top_p", "top_k", "min_p"];
    let given = || sampling.given().into_iter().map(|(parameter, _)| parameter);
    if sampling.temperature.is_some() { None } else { given().find(|parameter| filters.contains(&parameter.name)) }
}

impl FromStr for LoadSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut spec = Self::default();
        let mut seen = Vec::new();
        for part in text.split(',').map(str::trim) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            if seen.contains(&key) {
                return Err(format!("found {key} twice, expected it once"));
            }
            seen.push(key);
            match key {
                "name" if !value.is_empty() => spec.name = Some(value.to_owned()),
                "tasks" => spec.tasks = Some(count(value)?),
                "virtual-tokens" => spec.virtual_tokens = Some(count(value)?),
                "requests" => spec.requests = Some(count(value)?),
                "concurrency" | "rate" if spec.arrival.is_some() => {
                    return Err("a load has either concurrency= or rate=".to_owned());
                }
                "concurrency" => spec.arrival = Some(Arrival::Concurrency(count(value)?)),
                "rate" => spec.arrival = Some(Arrival::Rate(rate(value)?)),
                "mix" => spec.mix = Some(value.parse()?),
                "input-tokens" => spec.input_tokens = Some(value.parse()?),
                "output-tokens" => spec.output_tokens = Some(value.parse()?),
                "background" if value.is_empty() => spec.background = true,
                "alone" if value.is_empty() => spec.alone = true,
                "seed" => spec.seed = Some(seed(value)?),
                _ if sampling_parameters().any(|parameter| parameter.option == key) => {
                    spec.sampling.set(key, value).map_err(|reason| format!("{key}: {reason}"))?;
                }
                _ => {
                    let sampling: String = sampling_parameters().map(|row| format!(", {}=", row.option)).collect();
                    return Err(format!("found {part:?}, expected some of {KEYS}{sampling}, separated by commas"));
                }
            }
        }
        match spec.background && spec.alone {
            true => Err("a load in the background cannot be run alone: it ends with the others".to_owned()),
            false => Ok(spec),
        }
    }
}

/// Clients, tasks or requests: more than a million is a mistake.
pub fn count(text: &str) -> Result<usize, String> {
    let found = text.parse().ok().filter(|n| (1..=1_000_000).contains(n));
    found.ok_or_else(|| format!("found {text:?}, expected a whole number from 1 to 1000000"))
}

fn seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("seed: found {text:?}, expected a whole number from 0 to {}", u64::MAX))
}

/// Requests a second.
pub fn rate(text: &str) -> Result<f64, String> {
    let found = text.parse().ok().filter(|r| (1e-3..=1e6).contains(r));
    found.ok_or_else(|| format!("found {text:?}, expected requests a second from 0.001 to 1000000"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Load {
        Load {
            name: "all".to_owned(),
            tasks: 8,
            virtual_tokens: 32,
            requests: Some(100),
            arrival: Arrival::Concurrency(8),
            mix: Mix::Uniform,
            input_tokens: Lengths::fixed(32),
            output_tokens: Lengths::fixed(16),
            sampling: SamplingOptions { temperature: Some(0.5), ..SamplingOptions::default() },
            seed: None,
            background: false,
            alone: false,
        }
    }

    #[test]
    fn a_load_takes_what_it_does_not_say_from_the_plain_options() {
        let spec: LoadSpec = "name=light,rate=2.5,alone,output-tokens=4-8".parse().unwrap();
        let expected = Load {
            name: "light".to_owned(),
            tasks: 1,
            arrival: Arrival::Rate(2.5),
            output_tokens: Lengths::Uniform { least: 4, most: 8 },
            alone: true,
            ..base()
        };
        assert_eq!(spec.over(&base(), 0), expected);
        let sampled: LoadSpec = "top-p=0.95,seed=7".parse().unwrap();
        let load = sampled.over(&base(), 0);
        assert_eq!((load.sampling.to_string().as_str(), load.seed), ("temperature=0.5,top-p=0.95", Some(7)));
        let greedy: LoadSpec = "temperature=0".parse().unwrap();
        assert_eq!(greedy.over(&base(), 0).sampling.temperature, Some(0.0));
        let background: LoadSpec = "background, concurrency=100".parse().unwrap();
        let load = background.over(&base(), 1);
        assert_eq!((load.requests, load.name.as_str()), (None, "load 2"));
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (text, named) in [
            ("", "\"\""),
            ("tasks=0", "\"0\""),
            ("taks=1", "taks"),
            ("rate=1,concurrency=2", "either"),
            ("rate=-1", "\"-1\""),
            ("background,alone", "background"),
            ("mix=even", "even"),
            ("alone=yes", "alone=yes"),
            ("tasks=1,tasks=2", "tasks twice"),
            ("temperature=2.5", "temperature: found 2.5, expected 0 to 2"),
            ("top-p=0", "top-p: found 0, expected more than 0"),
            ("top-k=x", "top-k: found \"x\", expected a whole number, 0 or more"),
            ("max-tokens=3", "presence-penalty="),
            ("seed=-1", "seed: found \"-1\""),
        ] {
            let error = text.parse::<LoadSpec>().unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn filters_without_a_temperature_are_seen() {
        let named = |text: &str| {
            let spec: LoadSpec = text.parse().unwrap();
            without_effect(&spec.sampling).map(|parameter| parameter.option)
        };
        assert_eq!(named("top-k=40,min-p=0.1"), Some("top-k"));
        assert_eq!(named("top-k=40,temperature=0"), None);
        assert_eq!(named("presence-penalty=1"), None);
    }
}
