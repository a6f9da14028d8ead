//! What is going to be tuned, checked before anything is: data, template, labels, initial values,
//! settings.

mod held_out;

use std::{collections::HashSet, path::Path};

pub use held_out::{HeldOut, Warning};

use super::{
    Setting, TuneError,
    checkpoint::Identity,
    forward::Forward,
    init::{self, Init, InitError, Source},
    optim::AdamW,
    options::{Length, Options},
    parameters::{Method, Parameters},
    schedule::Schedule,
    trainer::Settings,
};
use crate::examples::{self, Dataset, TokenizedExample};
use crate::{
    input::InputEncoder,
    model::Model,
    packing::PromptShape,
    prompt::{
        TaskName,
        format::Fit,
        labels::Verbalizer,
        soft::PlaceError,
        spec::{SpecialTokens, Truncation},
        template::{DEFAULT_TEMPLATE, PromptTemplate},
    },
    tokenizer::Tokenizer,
};

/// The template of a prompt that is tuned without one: the line break tells the model where the
/// input ends and its answer begins.
pub const TUNED_TEMPLATE: &str = "{{ input }}\n";

/// The template of a prompt that is tuned without one on this model. An encoder knows where its input
/// ends.
pub fn default_template(model: &Model) -> &'static str {
    if model.info().encoder.is_some() { DEFAULT_TEMPLATE } else { TUNED_TEMPLATE }
}

/// How many virtual tokens a prompt has where none are asked for. A whole block of the serving
/// cache, so that nothing of it is copied.
pub const VIRTUAL_TOKENS: usize = 32;

/// The fewest and the most steps where neither steps nor epochs are asked for, and the epochs
/// between.
const STEPS: std::ops::RangeInclusive<usize> = 200..=600;
const EPOCHS: usize = 15;

/// The held-out examples are trained on in one in so many of the steps, the last.
const JOINT_PART: usize = 5;

/// Evaluations in a run where no interval is asked for.
const EVALUATIONS: usize = 20;

/// Everything that a run needs, checked.
#[derive(Debug, Clone)]
pub struct Plan {
    pub task: TaskName,
    pub description: Option<String>,
    pub template: PromptTemplate,
    /// Which field of an input that is too long is shortened.
    pub truncate: Option<Truncation>,
    pub labels: Option<Verbalizer>,
    pub train: Vec<TokenizedExample>,
    pub held_out: Vec<TokenizedExample>,
    pub held_out_is: HeldOut,
    /// The number of folds of a cross-validation, where no examples are held out; 0 is none.
    pub folds: usize,
    /// The last steps, in which the held-out examples are trained on, too; 0 where they never are.
    pub joint_steps: usize,
    /// What is learned.
    pub parameters: Parameters,
    /// Its initial values.
    pub initial: Vec<f32>,
    /// How they were made.
    pub init: Init,
    /// The schedule's peak is the given rate; zero until a sweep has found one.
    pub settings: Settings,
    /// The rates of a sweep; empty where one is given.
    pub rates: Vec<f64>,
    /// Tokens that an answer may take when served.
    pub max_tokens: usize,
    /// What a checkpoint is compared by.
    pub identity: Identity,
    pub warnings: Vec<Warning>,
}

impl Plan {
    /// Reads the data and checks everything against the model.
    pub fn new(forward: &Forward, tokenizer: &Tokenizer, options: &Options) -> Result<Self, TuneError> {
        options.check()?;
        let model = forward.model();
        let info = model.info();
        let mut warnings: Vec<Warning> = Vec::new();
        let template = PromptTemplate::parse(options.template.as_deref().unwrap_or(default_template(model)))?;
        let data = Dataset::read(&options.data, options.labels.as_ref())?;
        if data.has_one_label() {
            warnings.push(Warning::OneLabel);
        }
        let eval = match &options.eval_data {
            Some(path) => Some((path, Dataset::read(path, data.labels.as_ref())?)),
            None => None,
        };
        let eos = *info.eos_token_ids.first().ok_or_else(|| TuneError::NoEos { model: info.name.clone() })?;
        let n = options.virtual_tokens.unwrap_or(VIRTUAL_TOKENS);
        if n == 0 || n + 2 > info.context_length {
            let limit = info.context_length.saturating_sub(2);
            let expected = format!("1 to {limit}, which is what the model's context has room for");
            return Err(TuneError::OutOfRange { setting: Setting::VirtualTokens, found: n.to_string(), expected });
        }
        let method = options.prompt_type.method(n, model)?;
        let fit = Fit::from(info);
        if method == Method::PrefixTuning && fit.num_layers > fit.key_values_layers() {
            return Err(TuneError::DeeperDecoder { encoder: fit.key_values_layers(), decoder: fit.num_layers });
        }
        let shape = match method {
            Method::PromptTuning | Method::PTuning(_) => PromptShape::Embeddings(n),
            Method::PrefixTuning => PromptShape::KeyValues(n),
        };
        check_template(&template, shape, options.truncate.as_ref())?;
        let budget = forward.packing().budget(shape);
        let encoder = InputEncoder {
            tokenizer,
            template: &template,
            special_tokens: SpecialTokens::default(),
            truncate: options.truncate.as_ref(),
            shape,
        };
        let tokenize = |path: &Path, data: &Dataset| examples::tokenize(path, &data.examples, &encoder, eos, budget);
        let all = tokenize(&options.data, &data)?;
        let (train, held_out, held_out_is) = match &eval {
            Some((path, eval)) => {
                let held_out = tokenize(path, eval)?;
                let shared = held_out.iter().filter(|h| all.iter().any(|t| t.input == h.input)).count();
                if shared > 0 {
                    warnings.push(Warning::SharedInputs { shared, held_out: held_out.len() });
                }
                (all, held_out, HeldOut::File)
            }
            None => held_out::split(all, options.seed),
        };
        let inputs = train.iter().map(|example| example.input.as_slice()).collect::<HashSet<_>>().len();
        let folds = match held_out_is {
            HeldOut::Training if inputs > 1 => options.folds.min(inputs),
            HeldOut::Training | HeldOut::File | HeldOut::Split => 0,
        };
        if held_out_is == HeldOut::Training && folds == 0 {
            warnings.push(Warning::NothingHeldOut { examples: train.len() });
        }
        let batch_size = options.batch_size.min(train.len());
        let steps = steps(options.length, train.len(), batch_size * options.accumulate);
        let parameters = Parameters::new(method, n, model);
        let source = Source { forward, tokenizer, examples: &train, seed: options.seed };
        let initial = source.values(&options.init, &parameters)?;
        let unit = init::rate_unit(&parameters, &initial, model)?;
        let settings = Settings {
            batch_size,
            accumulate: options.accumulate,
            schedule: Schedule {
                peak: options.rate.unwrap_or(0.0),
                warmup: (options.warmup * steps as f64).round() as usize,
                steps,
                decay: options.decay,
            },
            optimizer: AdamW { weight_decay: options.weight_decay, ..AdamW::default() },
            clip: options.clip,
            seed: options.seed,
            variation: options.variation(data.labels.is_some()),
            eval_every: options.eval_every.unwrap_or_else(|| steps.div_ceil(EVALUATIONS)),
            patience: options.patience,
            labelled: data.labels.is_some(),
        };
        let mut plan = Self {
            task: options.task.clone(),
            description: options.description.clone(),
            max_tokens: max_tokens(&train, &held_out, data.labels.is_some()),
            rates: match options.rate {
                Some(_) => vec![],
                None => rates(parameters.method(), options.races, unit),
            },
            parameters,
            initial,
            init: options.init.clone(),
            labels: data.labels.clone(),
            truncate: options.truncate.clone(),
            template,
            train,
            held_out,
            held_out_is,
            folds,
            joint_steps: match held_out_is {
                HeldOut::Split if !options.keep_held_out => settings.schedule.steps / JOINT_PART,
                HeldOut::Split | HeldOut::File | HeldOut::Training => 0,
            },
            settings,
            identity: Identity::new(),
            warnings,
        };
        plan.identity = identity(&plan, model, options, &data, eval.as_ref().map(|e| &e.1));
        Ok(plan)
    }

    /// A plan for each type of prompt that may be learned, for the same task and data. Where there are several, those that the
    /// model, the template or the initial values do not allow are left out.
    ///
    /// # Errors
    /// As [`new`](Self::new) for the first of them, if none is left or the fault is not of a type.
    pub fn alternatives(forward: &Forward, tokenizer: &Tokenizer, all: &[Options]) -> Result<Vec<Self>, TuneError> {
        let (mut plans, mut refused) = (Vec::new(), None);
        for options in all {
            match Self::new(forward, tokenizer, options) {
                Ok(plan) => plans.push(plan),
                Err(error) if is_of_the_type(&error) => refused = refused.or(Some(error)),
                Err(error) => return Err(error),
            }
        }
        match refused {
            Some(error) if plans.is_empty() => Err(error),
            _ => Ok(plans),
        }
    }

    /// The initial values of a run on some of the examples: nothing of the others is in them.
    ///
    /// # Errors
    /// A forward pass fails.
    pub fn initial_of(
        &self,
        forward: &Forward,
        tokenizer: &Tokenizer,
        examples: &[TokenizedExample],
    ) -> Result<Vec<f32>, TuneError> {
        match self.init {
            Init::Examples => {
                let source = Source { forward, tokenizer, examples, seed: self.settings.seed };
                Ok(source.values(&self.init, &self.parameters)?)
            }
            Init::Text(_) | Init::Vocab | Init::Prompt(_) | Init::Random => Ok(self.initial.clone()),
        }
    }

    /// What the part of exact answers is called: for labels it is the accuracy.
    pub fn metric(&self) -> &'static str {
        if self.labels.is_some() { "accuracy" } else { "exact_match" }
    }
}

/// Whether another type of prompt would not have this fault.
fn is_of_the_type(error: &TuneError) -> bool {
    matches!(
        error,
        TuneError::DeeperDecoder { .. }
            | TuneError::Place(PlaceError::KeyValues)
            | TuneError::Init(InitError::OtherKind { .. })
    )
}

/// The rates to try: all, or those in the middle where types race. They are rounded, so that what is printed is what is used.
fn rates(method: Method, races: bool, unit: f64) -> Vec<f64> {
    let all = method.relative_rates();
    let tried = if races { &all[1..all.len() - 1] } else { &all[..] };
    tried.iter().map(|rate| round(rate * unit)).collect()
}

/// Checks what a template says of virtual tokens and of the field to shorten.
fn check_template(
    template: &PromptTemplate,
    shape: PromptShape,
    truncate: Option<&Truncation>,
) -> Result<(), TuneError> {
    if template.places_virtual_tokens() {
        match shape {
            PromptShape::KeyValues(_) => return Err(PlaceError::KeyValues.into()),
            shape => template.sample().map(|sample| sample.places(shape.num_virtual_tokens())).transpose()?,
        };
    }
    match truncate.filter(|truncate| !template.fields().contains(&truncate.field)) {
        Some(Truncation { field, .. }) => Err(TuneError::OutOfRange {
            setting: Setting::Truncate,
            found: field.clone(),
            expected: format!("a field of the template: {}", template.fields().join(", ")),
        }),
        None => Ok(()),
    }
}

fn steps(length: Length, examples: usize, per_step: usize) -> usize {
    let epochs = |n: f64| (n * examples as f64 / per_step as f64).ceil().max(1.0) as usize;
    match length {
        Length::Steps(n) => n,
        Length::Epochs(n) => epochs(n),
        Length::Auto => epochs(EPOCHS as f64).clamp(*STEPS.start(), *STEPS.end()),
    }
}

/// The longest answer; half as much again where answers are free text.
fn max_tokens(train: &[TokenizedExample], held_out: &[TokenizedExample], labels: bool) -> usize {
    let longest = train.iter().chain(held_out).map(|e| e.answer.len()).max().unwrap_or(1);
    if labels { longest } else { longest + longest.div_ceil(2).max(4) }
}

/// To two digits: what is printed is what is used.
fn round(x: f64) -> f64 {
    let unit = 10f64.powf(x.abs().log10().floor() - 1.0);
    format!("{:.12}", (x / unit).round() * unit).parse().unwrap_or(x)
}

fn identity(plan: &Plan, model: &Model, options: &Options, data: &Dataset, eval: Option<&Dataset>) -> Identity {
    let settings = &plan.settings;
    let labels = plan.labels.as_ref().map(|l| l.iter().map(|(label, words)| format!("{label}={}", words.join("|"))));
    let encoder = match plan.parameters.method() {
        Method::PTuning(encoder) => format!("{} of {} units", encoder.kind.name(), encoder.hidden_size),
        Method::PromptTuning | Method::PrefixTuning => "none".to_owned(),
    };
    let entries = [
        ("model", format!("{} ({})", model.info().name, model.info().fingerprint)),
        ("dtype", format!("{:?}", model.info().dtype)),
        ("data", data.digest.clone()),
        ("held-out data", eval.map_or("a split".to_owned(), |e| e.digest.clone())),
        ("template", format!("{:?}", plan.template.source())),
        ("truncation", options.truncate.as_ref().map_or("none".to_owned(), |t| format!("{} ({:?})", t.field, t.side))),
        ("labels", labels.map_or("none".to_owned(), |l| l.collect::<Vec<_>>().join(","))),
        ("type", plan.parameters.method().name().to_owned()),
        ("encoder", encoder),
        ("virtual tokens", plan.parameters.virtual_tokens().to_string()),
        ("initial values", options.init_name.clone()),
        ("learning rate", options.rate.map_or("auto".to_owned(), |r| r.to_string())),
        ("steps", settings.schedule.steps.to_string()),
        ("warm-up", settings.schedule.warmup.to_string()),
        ("decay", format!("{:?}", settings.schedule.decay).to_lowercase()),
        ("batch size", settings.batch_size.to_string()),
        ("accumulation", settings.accumulate.to_string()),
        ("weight decay", settings.optimizer.weight_decay.to_string()),
        ("clipping", settings.clip.to_string()),
        ("word dropout", settings.variation.word_dropout.to_string()),
        ("noise", settings.variation.noise.to_string()),
        ("seed", settings.seed.to_string()),
        ("evaluation interval", settings.eval_every.to_string()),
        ("patience", settings.patience.to_string()),
        ("folds", plan.folds.to_string()),
        ("steps with held-out examples", plan.joint_steps.to_string()),
    ];
    entries.map(|(name, value)| (name.to_owned(), value)).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_follow_the_examples_within_bounds() {
        assert_eq!(steps(Length::Auto, 8, 8), 200);
        assert_eq!(steps(Length::Auto, 460, 16), 432);
        assert_eq!(steps(Length::Auto, 100_000, 16), 600);
        assert_eq!(steps(Length::Epochs(2.5), 100, 16), 16);
        assert_eq!(steps(Length::Steps(7), 100, 16), 7);
    }

    #[test]
    fn rates_are_rounded_to_two_digits() {
        assert_eq!(round(0.034_56), 0.035);
        assert_eq!(round(12.7), 13.0);
        assert_eq!(round(0.000_999_9), 0.001);
    }
}
