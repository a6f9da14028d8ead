//! Figures out of samples: percentiles, medians over repeats, and the table.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    time::Duration,
};

use serde::Serialize;

use super::drive::Measured;

/// What one run of a load showed, or the median of several.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Requests that were answered in full.
    pub answered: f64,
    /// Requests that were not, by code.
    pub errors: BTreeMap<String, usize>,
    pub seconds: f64,
    pub generated_tokens_per_second: f64,
    pub requests_per_second: f64,
    pub generated_tokens: f64,
    pub input_tokens: f64,
    pub virtual_tokens: f64,
    /// Of input and virtual tokens, those that the server did not have to compute.
    pub cached_tokens: f64,
    /// Milliseconds; `None` where nothing was measured.
    pub time_to_first_token: Option<Latency>,
    /// Milliseconds from one piece of text to the next, over all answers.
    pub inter_token_latency: Option<Latency>,
    /// Milliseconds from request to the end of the answer.
    pub latency: Option<Latency>,
}

/// Milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Latency {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Latency {
    /// Of durations in any order; exact.
    pub fn of(durations: impl Iterator<Item = Duration>) -> Option<Self> {
        let mut ms: Vec<f64> = durations.map(|d| d.as_secs_f64() * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        let max = *ms.last()?;
        let mean = ms.iter().sum::<f64>() / ms.len() as f64;
        Some(Self { mean, p50: percentile(&ms, 50), p90: percentile(&ms, 90), p99: percentile(&ms, 99), max })
    }
}

/// The smallest value that this many percent of all do not exceed; 0 of nothing.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

/// The middle value, or the mean of the two in the middle; 0 of nothing.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

impl Figures {
    /// What a load showed.
    pub fn of(measured: &Measured) -> Self {
        let answers = || measured.samples.iter().filter(|s| s.outcome.is_ok());
        let total = |count: fn(&super::client::Usage) -> usize| -> f64 {
            measured.samples.iter().filter_map(|s| s.outcome.as_ref().ok()).map(count).sum::<usize>() as f64
        };
        let mut errors = BTreeMap::new();
        for code in measured.samples.iter().filter_map(|s| s.outcome.as_ref().err()) {
            *errors.entry(code.to_string()).or_default() += 1;
        }
        let seconds = measured.elapsed.as_secs_f64();
        let per_second = |n: f64| if seconds > 0.0 { n / seconds } else { 0.0 };
        let (answered, generated) = (answers().count() as f64, total(|u| u.completion_tokens));
        Self {
            answered,
            errors,
            seconds,
            generated_tokens_per_second: per_second(generated),
            requests_per_second: per_second(answered),
            generated_tokens: generated,
            input_tokens: total(|u| u.prompt_tokens),
            virtual_tokens: total(|u| u.virtual_tokens),
            cached_tokens: total(|u| u.cached_tokens),
            time_to_first_token: Latency::of(answers().filter_map(|s| s.first_token)),
            inter_token_latency: Latency::of(answers().flat_map(|s| s.gaps.iter().copied())),
            latency: Latency::of(answers().map(|s| s.total)),
        }
    }

    /// Each figure's median over the repeats; errors are added up.
    pub fn median(repeats: &[Self]) -> Self {
        let of = |value: fn(&Self) -> f64| median(repeats.iter().map(value).collect());
        let latency = |value: fn(&Self) -> Option<Latency>| {
            let all: Vec<Latency> = repeats.iter().filter_map(value).collect();
            let of = |value: fn(&Latency) -> f64| median(all.iter().map(value).collect());
            (!all.is_empty()).then(|| Latency {
                mean: of(|l| l.mean),
                p50: of(|l| l.p50),
                p90: of(|l| l.p90),
                p99: of(|l| l.p99),
                max: of(|l| l.max),
            })
        };
        let mut errors = BTreeMap::new();
        for (code, n) in repeats.iter().flat_map(|figures| &figures.errors) {
            *errors.entry(code.clone()).or_default() += n;
        }
        Self {
            answered: of(|f| f.answered),
            errors,
            seconds: of(|f| f.seconds),
            generated_tokens_per_second: of(|f| f.generated_tokens_per_second),
            requests_per_second: of(|f| f.requests_per_second),
            generated_tokens: of(|f| f.generated_tokens),
            input_tokens: of(|f| f.input_tokens),
            virtual_tokens: of(|f| f.virtual_tokens),
            cached_tokens: of(|f| f.cached_tokens),
            time_to_first_token: latency(|f| f.time_to_first_token),
            inter_token_latency: latency(|f| f.inter_token_latency),
            latency: latency(|f| f.latency),
        }
    }
}

/// One load's figures.
#[derive(Debug, Clone, Serialize)]
pub struct LoadReport {
    pub name: String,
    /// It ran without the others.
    pub alone: bool,
    pub median: Figures,
    pub repeats: Vec<Figures>,
}

impl LoadReport {
    pub fn new(name: &str, alone: bool, repeats: Vec<Figures>) -> Self {
        Self { name: name.to_owned(), alone, median: Figures::median(&repeats), repeats }
    }

    /// The load as it ran without others, if it did, among `reports`.
    fn alone_of<'a>(&self, reports: &'a [Self]) -> Option<&'a Self> {
        reports.iter().find(|other| other.alone && !self.alone && other.name == self.name)
    }
}

/// The table for people.
#[derive(Debug)]
pub struct Table<'a> {
    pub loads: &'a [LoadReport],
    /// They ran one after another, to be compared with the first.
    pub in_turn: bool,
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for report in self.loads {
            let alone = if report.alone { ", alone" } else { "" };
            writeln!(f, "\n{}{alone}", report.name)?;
            load(f, &report.median)?;
            if let Some(alone) = report.alone_of(self.loads) {
                p99_against(f, &report.median, &alone.median)?;
            }
            if let (true, Some(first)) = (self.in_turn, self.loads.first().filter(|first| first.name != report.name)) {
                against_first(f, &report.median, first)?;
            }
        }
        Ok(())
    }
}

fn load(f: &mut fmt::Formatter<'_>, figures: &Figures) -> fmt::Result {
    let mut row = |name: &str, value: String| writeln!(f, "  {name:<26}{value}");
    row("generated tokens/s", format!("{:.1}", figures.generated_tokens_per_second))?;
    row("requests/s", format!("{:.2}", figures.requests_per_second))?;
    row("answered", format!("{} in {:.2} s", figures.answered, figures.seconds))?;
    let errors = figures.errors.iter().fold(String::new(), |mut text, (code, n)| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{}{n} {code}", if text.is_empty() { "" } else { ", " });
        text
    });
    row("errors", if errors.is_empty() { "none".to_owned() } else { errors })?;
    let (input, cached) = (figures.input_tokens + figures.virtual_tokens, figures.cached_tokens);
    let share = if input > 0.0 { 100.0 * cached / input } else { 0.0 };
    let tokens = format!("{} input, {} virtual", figures.input_tokens, figures.virtual_tokens);
    row("tokens", format!("{tokens} ({share:.0} % of them cached), {} generated", figures.generated_tokens))?;
    if figures.latency.is_some() {
        writeln!(f, "  {:<26}{:>9}{:>9}{:>9}{:>9}{:>9}", "milliseconds", "mean", "p50", "p90", "p99", "max")?;
    }
    for (name, latency) in [
        ("time to first token", figures.time_to_first_token),
        ("inter-token latency", figures.inter_token_latency),
        ("end to end", figures.latency),
    ] {
        let Some(Latency { mean, p50, p90, p99, max }) = latency else { continue };
        writeln!(f, "  {name:<26}{mean:>9.1}{p50:>9.1}{p90:>9.1}{p99:>9.1}{max:>9.1}")?;
    }
    Ok(())
}

fn p99_against(f: &mut fmt::Formatter<'_>, together: &Figures, alone: &Figures) -> fmt::Result {
    let ratio = |value: fn(&Figures) -> Option<Latency>| Some(value(together)?.p99 / value(alone)?.p99);
    if let (Some(first), Some(end)) = (ratio(|f| f.time_to_first_token), ratio(|f| f.latency)) {
        writeln!(f, "  p99 against alone         {first:.2} x to the first token, {end:.2} x end to end")?;
    }
    Ok(())
}

fn against_first(f: &mut fmt::Formatter<'_>, figures: &Figures, first: &LoadReport) -> fmt::Result {
    let middle = |figures: &Figures| figures.time_to_first_token.map(|latency| latency.p50);
    let throughput = figures.generated_tokens_per_second / first.median.generated_tokens_per_second;
    let Some((this, other)) = middle(figures).zip(middle(&first.median)) else { return Ok(()) };
    let name = format!("against {}", first.name);
    writeln!(f, "  {name:<26}{throughput:.3} x tokens/s, {:.3} x to the first token (p50)", this / other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::client::{Sample, Usage};

    #[test]
    fn a_run_without_an_answer_has_noughts_and_no_latencies() {
        let nothing = Figures::of(&Measured { samples: Vec::new(), elapsed: Duration::ZERO });
        let loads = [LoadReport::new("none", false, vec![nothing])];
        let table = Table { loads: &loads, in_turn: false }.to_string();
        assert!(table.contains("  0 input, 0 virtual (0 % of them cached), 0 generated\n"), "{table}");
        assert!(!table.contains("milliseconds"), "{table}");
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!([50, 90, 99].map(|p| percentile(&hundred, p)), [50.0, 90.0, 99.0]);
        assert_eq!([50, 90, 99].map(|p| percentile(&hundred[..2], p)), [1.0, 2.0, 2.0]);
        assert_eq!(percentile(&hundred[..1], 99), 1.0);
        let latency = Latency::of([3, 1, 2].map(Duration::from_millis).into_iter()).unwrap();
        assert_eq!((latency.mean, latency.p50, latency.max), (2.0, 2.0, 3.0));
        assert_eq!(Latency::of(std::iter::empty()), None);
    }

    fn sample(ms: u64, outcome: Result<Usage, &'static str>) -> Sample {
        let time = Duration::from_millis(ms);
        Sample {
            first_token: Some(time / 2),
            gaps: vec![time / 10; 2],
            total: time,
            outcome: outcome.map_err(Into::into),
        }
    }

    fn measured() -> Measured {
        let usage = Usage { virtual_tokens: 20, prompt_tokens: 10, cached_tokens: 15, completion_tokens: 5 };
        let samples = vec![sample(100, Ok(usage)), sample(300, Ok(usage)), sample(9000, Err("overloaded"))];
        Measured { samples, elapsed: Duration::from_secs(2) }
    }

    #[test]
    fn figures_count_answers_and_errors_apart() {
        let figures = Figures::of(&measured());
        assert_eq!((figures.answered, figures.errors["overloaded"]), (2.0, 1));
        assert_eq!((figures.generated_tokens_per_second, figures.requests_per_second), (5.0, 1.0));
        assert_eq!((figures.input_tokens, figures.virtual_tokens, figures.cached_tokens), (20.0, 40.0, 30.0));
        assert_eq!(figures.latency.unwrap().max, 300.0);
        assert_eq!(figures.time_to_first_token.unwrap().p50, 50.0);
    }

    #[test]
    fn the_median_of_repeats_is_taken_figure_by_figure() {
        let with = |tokens: f64, p99: f64| Figures {
            generated_tokens_per_second: tokens,
            latency: Some(Latency { p99, ..Latency::default() }),
            ..Figures::default()
        };
        let middle = Figures::median(&[with(1.0, 30.0), with(3.0, 10.0), with(2.0, 20.0)]);
        assert_eq!((middle.generated_tokens_per_second, middle.latency.unwrap().p99), (2.0, 20.0));
        assert_eq!(median(vec![1.0, 2.0, 4.0, 8.0]), 3.0);
        assert_eq!(middle.time_to_first_token, None);
    }

    #[test]
    fn loads_in_turn_are_compared_with_the_first() {
        let first = Figures::of(&measured());
        let mut half = first.clone();
        half.generated_tokens_per_second /= 2.0;
        let reports = [LoadReport::new("one", false, vec![first]), LoadReport::new("two", false, vec![half])];
        let table = Table { loads: &reports, in_turn: true }.to_string();
        assert_eq!(table.matches("against one").count(), 1, "{table}");
        assert!(table.contains("0.500 x tokens/s, 1.000 x to the first token"), "{table}");
    }

    #[test]
    fn the_table_compares_a_load_with_itself_alone() {
        let figures = Figures::of(&measured());
        let mut slower = figures.clone();
        slower.latency = figures.latency.map(|l| Latency { p99: 2.0 * l.p99, ..l });
        let reports = [LoadReport::new("light", true, vec![figures]), LoadReport::new("light", false, vec![slower])];
        let table = Table { loads: &reports, in_turn: false }.to_string();
        for words in ["light, alone", "1 overloaded", "50 % of them cached", "2.00 x end to end"] {
            assert!(table.contains(words), "{words}: {table}");
        }
    }
}
