//! `softserve tune`: learns a prompt from examples.

mod choices;
mod errors;
mod screen;

use std::{
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, bail};
use choices::{DecayArg, EncoderArg, TypeArg};
use clap::Args;
use errors::explain;
use screen::{Screen, write_result};

use super::{
    model::ModelArgs,
    prompts::{self, DEFAULT_ROOT},
};
use crate::{
    model::Model,
    prompt::{
        TaskName,
        labels::Verbalizer,
        spec::{Side, Truncation},
    },
    tune::{
        forward::Forward,
        init::Init,
        job::{self, OutputPaths},
        options::{FOLDS, Length, Options, PromptType},
        plan::{Plan, Warning},
        prompt_encoder::PromptEncoderKind,
        schedule::Decay,
    },
};

const EXAMPLES: &str = "\
Examples:
  Learn a classifier from lines like {\"input\": \"lovely film\", \"label\": \"positive\"}:
      softserve tune --task sentiment --data train.jsonl
  Learn to write answers, from lines like {\"input\": \"cat\", \"output\": \"chat\"}:
      softserve tune --task french --data train.jsonl --eval-data dev.jsonl --init-text \"Translate to French:\"
  Inputs with several fields, {\"input\": {\"question\": \"…\", \"text\": \"…\"}, \"output\": \"…\"}:
      softserve tune --task qa --data qa.jsonl --template $'{{ text }}\\n{{ question }}\\n'
  Continue after Ctrl-C or a crash:
      softserve tune --task sentiment --data train.jsonl --resume
  Stop (Ctrl-C) and keep the best prompt so far; while it runs, .tune-NAME/loss.svg shows how it goes:
      softserve tune --task sentiment --data train.jsonl --finish
  Serve the result:
      softserve serve --prompts prompts";

/// Learn a prompt from examples. The model is not changed: what is learned is a prompt of a few
/// kilobytes in front of the input. It is written as a PEFT directory that `softserve serve --prompts` serves.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct TuneArgs {
    /// The name of the task: lower-case letters, digits, '-' and '_'
    #[arg(long, value_name = "NAME")]
    pub task: TaskName,

    /// The training examples, one JSON object per line: {"input": …, "output": "…"} or
    /// {"input": …, "label": "…"}. The input is a text, or an object with a text for each field. A JSON array,
    /// CSV (.csv, .tsv) with these column names, {"prompt", "completion"} and {"messages"} are read too. 8
    /// examples can be enough for a simple task; 100 or more are better
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,

    /// Held-out examples in the same form, which decide the learning rate and which prompt is the best. Those that
    /// are not trained on, if they are 20 or more, also calibrate the probabilities of a task with labels
    /// [default: a tenth of the data if it has 40 examples or more]
    #[arg(long, value_name = "FILE")]
    pub eval_data: Option<PathBuf>,

    #[command(flatten)]
    pub model: ModelArgs,

    /// The folder with the tasks' prompts. The new prompt is written to DIR/NAME
    #[arg(long, value_name = "DIR", env = "SOFTSERVE_PROMPTS", default_value = DEFAULT_ROOT)]
    pub prompts: PathBuf,

    /// The folder to write the prompt to, instead of a folder under --prompts
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,

    /// The template that turns the input's fields into the text after the prompt, in Jinja's syntax. It is
    /// stored with the task, so that requests are rendered the same way. {{ soft() }} puts the virtual tokens
    /// where it stands, {{ soft(0, 8) }} the first eight of them; without it they come before the text [default: "{{ input }}" and, for a
    /// model without an encoder, a line break, which tells the model where the input ends]
    #[arg(long)]
    pub template: Option<String>,

    /// The field of an input that is shortened where it is too long for the model's context, instead of an error:
    /// FIELD, or FIELD:left to cut its beginning off. It is stored with the task, so that requests are shortened
    /// in the same way
    #[arg(long, value_name = "FIELD[:left|:right]")]
    pub truncate: Option<String>,

    /// The labels, separated by commas. Where the model is to write other words than the label itself,
    /// they follow it: positive=great|good,negative=bad. The first word is the one that is trained
    /// [default: the labels in the data]
    #[arg(long, value_name = "LABELS")]
    pub labels: Option<String>,

    /// A one-line description of the task, for people
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,

    /// What to learn: prompt (embeddings in front of the input), p-tuning (embeddings as well, trained
    /// through a network that is then dropped), prefix (keys and values in every layer, which can hold
    /// more and take more memory), or auto: prompt or prefix, whichever has the lower loss on examples that are set apart,
    /// after a few steps of each [default: auto; with --lr, prompt]
    #[arg(long = "type", value_name = "TYPE", value_enum)]
    pub prompt_type: Option<TypeArg>,

    /// The network of --type p-tuning [default: mlp]
    #[arg(long, value_enum)]
    pub encoder: Option<EncoderArg>,

    /// The hidden size of that network [default: 128, or the number of virtual tokens if that is larger]
    #[arg(long, value_name = "N")]
    pub encoder_hidden: Option<usize>,

    /// The length of the prompt in tokens. They count towards the model's context length [default: 32]
    #[arg(long, value_name = "N")]
    pub virtual_tokens: Option<usize>,

    /// The initial values: vocab (embeddings of random words of the vocabulary), text:… (embeddings of a
    /// text), examples (embeddings of training examples), task:NAME or task:DIR (another prompt) or random.
    /// A prefix starts from the keys and values that the model computes for these words [default: vocab;
    /// for a prefix, examples]
    #[arg(long, value_name = "HOW", conflicts_with = "init_text")]
    pub init: Option<String>,

    /// The same as --init text:…
    #[arg(long, value_name = "TEXT")]
    pub init_text: Option<String>,

    /// The maximum learning rate of AdamW. auto tries several in short runs from the same initial values, of which the better
    /// half goes on, and takes the one with the lowest loss on a third of the examples, set apart for this
    #[arg(long, value_name = "RATE|auto", default_value = "auto")]
    pub lr: String,

    /// The number of updates [default: 15 epochs, but at least 200 and at most 600 updates]
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    pub steps: Option<usize>,

    /// The number of passes over the training data, instead of --steps
    #[arg(long, value_name = "N")]
    pub epochs: Option<f64>,

    /// The number of examples in a forward pass
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub batch_size: usize,

    /// Gradient accumulation: the number of forward passes for one update. The effect is that of a batch
    /// so many times as large, without its memory
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub accumulate: usize,

    /// The fraction of the steps in which the learning rate rises to its maximum
    #[arg(long, value_name = "PART", default_value_t = 0.06)]
    pub warmup: f64,

    /// How the learning rate decreases after the warm-up
    #[arg(long, value_enum, default_value_t = DecayArg::Linear)]
    pub decay: DecayArg,

    /// The weight decay of AdamW
    #[arg(long, value_name = "W", default_value_t = 0.0)]
    pub weight_decay: f64,

    /// Gradient clipping: the maximum norm of a gradient. 0 turns it off
    #[arg(long, value_name = "NORM", default_value_t = 1.0)]
    pub clip: f64,

    /// The part of the inputs' words that is left out in training, others in each step, so that no single word decides. What
    /// the template puts around them stays [default: 0.2 for a prefix with labels, else 0]
    #[arg(long, value_name = "PART")]
    pub word_dropout: Option<f64>,

    /// The noise that is added to the prompt's values in training, other noise in each step, relative to their size
    /// [default: 0.2 for a prefix with labels, else 0]
    #[arg(long, value_name = "SIZE")]
    pub noise: Option<f64>,

    /// The seed of the random numbers. The same seed, data and options give the same prompt, bit for bit,
    /// on the same machine
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// The number of steps between evaluations. Each evaluation also saves the state for --resume
    /// [default: a twentieth of the steps]
    #[arg(long, value_name = "N")]
    pub eval_every: Option<usize>,

    /// Early stopping: the number of evaluations in a row without an improvement after which tuning may stop. With labels it then
    /// stops only if the training examples are learnt, or the held-out accuracy is lower than before by two standard errors.
    /// 0 turns it off
    #[arg(long, value_name = "N", default_value_t = 6)]
    pub patience: usize,

    /// The number of folds of the cross-validation that decides how many steps are best, where there are too few examples to
    /// hold some out: one run for each fold comes before the run on all examples. 0 turns it off
    #[arg(long, value_name = "N", default_value_t = FOLDS)]
    pub folds: usize,

    /// Never train on the held-out examples. By default those that are a part of --data join the training examples for the last fifth of
    /// the steps, after they have judged
    #[arg(long)]
    pub keep_held_out: bool,

    /// The folder for the state of the unfinished run [default: .tune-NAME beside the prompt's folder]
    #[arg(long, value_name = "DIR")]
    pub checkpoint: Option<PathBuf>,

    /// Continue the same run from its saved state
    #[arg(long)]
    pub resume: bool,

    /// Do not continue the run: write the best prompt of its saved state
    #[arg(long, conflicts_with = "resume")]
    pub finish: bool,
}

/// Runs the sub-command; writes the result to `out`.
pub fn run(args: &TuneArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let started = Instant::now();
    let (model, tokenizer) = args.model.load()?;
    let options = args.alternatives(&model)?;
    let forward = Forward::new(model);
    let plans = Plan::alternatives(&forward, &tokenizer, &options).map_err(explain)?;
    let Some(plan) = plans.first() else { bail!("there is no type of prompt to learn") };
    let output = args.output.clone().unwrap_or_else(|| args.prompts.join(args.task.as_str()));
    let checkpoint = args.checkpoint.clone().unwrap_or_else(|| job::default_checkpoint(&output));
    let paths = OutputPaths { output, checkpoint, resume: args.resume, finish: args.finish };
    let info = forward.model().info();
    let mut screen = Screen::new(plan);
    screen.say(&format!(
        "{}: {} examples, {} held out; {}, {} virtual tokens before {} ({} parameters, frozen)",
        plan.task,
        plan.train.len(),
        if plan.held_out.is_empty() { 0 } else { plan.held_out.len() },
        plans.iter().map(|plan| plan.parameters.method().title()).collect::<Vec<_>>().join(" or "),
        plan.parameters.virtual_tokens(),
        info.name,
        info.num_parameters
    ));
    if plan.folds > 0 {
        screen.say(&format!(
            "too few examples to hold some out: {}-fold cross-validation decides how many steps are best",
            plan.folds
        ));
    }
    for warning in &plan.warnings {
        screen.say(&match warning {
            Warning::SharedInputs { .. } | Warning::OneLabel => format!("warning: {warning}"),
            Warning::NothingHeldOut { .. } => format!("warning: {warning}; give --eval-data"),
        });
    }
    let outcome = job::run(&forward, &tokenizer, &plans, &paths, &mut screen).map_err(explain)?;
    screen.close();
    write_result(out, &plans[outcome.plan], &outcome, &paths, started)?;
    Ok(())
}

impl TuneArgs {
    /// The options of each type of prompt that may be learned.
    fn alternatives(&self, model: &Model) -> anyhow::Result<Vec<Options>> {
        let types = self.prompt_types()?;
        let races = types.len() > 1;
        types.into_iter().map(|prompt_type| Ok(Options { races, ..self.options(model, prompt_type)? })).collect()
    }

    fn options(&self, model: &Model, prompt_type: PromptType) -> anyhow::Result<Options> {
        let how = match (&self.init, &self.init_text) {
            (_, Some(text)) => format!("text:{text}"),
            (Some(how), None) => how.clone(),
            (None, None) => match prompt_type.default_init() {
                Init::Examples => "examples".to_owned(),
                _ => "vocab".to_owned(),
            },
        };
        let rate = match self.lr.as_str() {
            "auto" => None,
            number => Some(number.parse().with_context(|| format!("--lr is {number:?}, expected a number or auto"))?),
        };
        let init = self.init(&how, model)?;
        let from = match &init {
            Init::Prompt(prompt) => Some(prompt.num_virtual_tokens()),
            _ => None,
        };
        Ok(Options {
            eval_data: self.eval_data.clone(),
            template: self.template.clone(),
            truncate: self.truncate.as_deref().map(parse_truncation).transpose()?,
            labels: self.labels.as_deref().map(parse_labels).transpose()?,
            description: self.description.clone(),
            prompt_type,
            virtual_tokens: self.virtual_tokens.or(from),
            init,
            init_name: how,
            rate,
            length: match (self.steps, self.epochs) {
                (Some(steps), _) => Length::Steps(steps),
                (None, Some(epochs)) => Length::Epochs(epochs),
                (None, None) => Length::Auto,
            },
            warmup: self.warmup,
            decay: match self.decay {
                DecayArg::Linear => Decay::Linear,
                DecayArg::Cosine => Decay::Cosine,
                DecayArg::Constant => Decay::Constant,
            },
            batch_size: self.batch_size,
            accumulate: self.accumulate,
            weight_decay: self.weight_decay,
            clip: self.clip,
            word_dropout: self.word_dropout,
            noise: self.noise,
            seed: self.seed,
            eval_every: self.eval_every,
            patience: self.patience,
            folds: self.folds,
            keep_held_out: self.keep_held_out,
            ..Options::new(self.task.clone(), &self.data)
        })
    }

    /// The types that may be learned, the smallest first. A given rate is for one type, since each has its own unit.
    fn prompt_types(&self) -> anyhow::Result<Vec<PromptType>> {
        if self.prompt_type != Some(TypeArg::PTuning) && (self.encoder.is_some() || self.encoder_hidden.is_some()) {
            bail!("--encoder and --encoder-hidden are for --type p-tuning; the other types have no network");
        }
        let has_rate = self.lr != "auto";
        Ok(match self.prompt_type {
            Some(TypeArg::Auto) if has_rate => {
                bail!("--lr is given for one type of prompt, and --type auto tries several; choose a --type")
            }
            None if has_rate => vec![PromptType::Prompt],
            None | Some(TypeArg::Auto) => vec![PromptType::Prompt, PromptType::Prefix],
            Some(TypeArg::Prompt) => vec![PromptType::Prompt],
            Some(TypeArg::Prefix) => vec![PromptType::Prefix],
            Some(TypeArg::PTuning) => vec![PromptType::PTuning {
                encoder: match self.encoder {
                    None | Some(EncoderArg::Mlp) => PromptEncoderKind::Mlp,
                    Some(EncoderArg::Lstm) => PromptEncoderKind::Lstm,
                },
                hidden_size: self.encoder_hidden,
            }],
        })
    }

    fn init(&self, how: &str, model: &Model) -> anyhow::Result<Init> {
        Ok(match how.split_once(':') {
            None if how == "vocab" => Init::Vocab,
            None if how == "examples" => Init::Examples,
            None if how == "random" => Init::Random,
            Some(("text", text)) => Init::Text(text.to_owned()),
            Some(("task", name)) => {
                let folder = Path::new(name);
                let version = match name.parse::<TaskName>() {
                    Ok(task) if !folder.is_dir() => prompts::by_task(&self.prompts, &task, model)?,
                    _ => prompts::by_folder(folder, &self.task, model)?,
                };
                Init::Prompt(version.prompt.as_ref().clone())
            }
            _ => bail!("--init is {how:?}, expected vocab, text:…, examples, task:NAME, task:DIR or random"),
        })
    }
}

/// `field`, `field:left` or `field:right`.
fn parse_truncation(text: &str) -> anyhow::Result<Truncation> {
    let (field, side) = match text.rsplit_once(':') {
        None => (text, Side::default()),
        Some((field, "left")) => (field, Side::Left),
        Some((field, "right")) => (field, Side::Right),
        Some((_, side)) => bail!("--truncate: found the side {side:?}, expected left or right"),
    };
    Ok(Truncation { field: field.to_owned(), side })
}

/// `a,b` or `a=word|word,b=word`.
fn parse_labels(text: &str) -> anyhow::Result<Verbalizer> {
    let labels = text.split(',').map(|part| match part.split_once('=') {
        None => (part.trim().to_owned(), vec![part.trim().to_owned()]),
        Some((label, words)) => (label.trim().to_owned(), words.split('|').map(|w| w.trim().to_owned()).collect()),
    });
    Verbalizer::new(&labels.collect()).context("--labels")
}
