//! `softserve tune`: learns a prompt from examples.

mod errors;
mod screen;

use std::{
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use errors::explain;
use screen::{Screen, write_result};

use super::{
    model::ModelArgs,
    prompts::{self, DEFAULT_ROOT},
};
use crate::{
    model::Model,
    prompt::{TaskName, labels::Verbalizer},
    tune::{
        encoder::EncoderKind,
        forward::Forward,
        init::Init,
        job::{self, OutputPaths},
        plan::{Length, Options, Plan, PromptType, Warning},
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
  Go on after Ctrl-C or a crash:
      softserve tune --task sentiment --data train.jsonl --resume
  Serve the result:
      softserve serve --prompts prompts";

/// Learn a prompt from examples. The model stays as it is; what is learned is a prompt of a few
/// kilobytes in front of the input, written as a PEFT directory that `softserve serve --prompts` serves.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct TuneArgs {
    /// The name of the task: lower-case letters, digits, '-' and '_'
    #[arg(long, value_name = "NAME")]
    pub task: TaskName,

    /// Examples to learn from, one JSON object a line: {"input": …, "output": "…"} or
    /// {"input": …, "label": "…"}; input is a text or an object of texts. 8 may do, 100 are better
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,

    /// Held-out examples, in the same form: they choose the learning rate and the best prompt
    /// [default: a tenth of the data where there are 40 examples or more]
    #[arg(long, value_name = "FILE")]
    pub eval_data: Option<PathBuf>,

    #[command(flatten)]
    pub model: ModelArgs,

    /// The folder of the tasks; the prompt goes to DIR/NAME
    #[arg(long, value_name = "DIR", env = "SOFTSERVE_PROMPTS", default_value = DEFAULT_ROOT)]
    pub prompts: PathBuf,

    /// The folder that the prompt goes to, instead of one under --prompts
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,

    /// How fields become the text that follows the prompt, in minijinja's syntax. The default ends
    /// with a line break, which tells the model where the input ends, unless it has an encoder, which
    /// knows; the task keeps it, so requests are rendered the same way [default: "{{ input }}" and a line
    /// break]
    #[arg(long)]
    pub template: Option<String>,

    /// The labels, separated by commas, each with the words that the model writes for it if they
    /// are not the label itself: positive=great|good,negative=bad. The first word is taught
    /// [default: those in the data]
    #[arg(long, value_name = "LABELS")]
    pub labels: Option<String>,

    /// One line about the task, for people
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,

    /// What is learned: prompt (rows in front of the input), p-tuning (the same rows, by way of a
    /// network that makes them and is then dropped), prefix (keys and values in every layer, which
    /// hold more than rows do)
    #[arg(long = "type", value_name = "TYPE", value_enum, default_value_t = TypeArg::Prompt)]
    pub prompt_type: TypeArg,

    /// The network of p-tuning [default: mlp]
    #[arg(long, value_enum)]
    pub encoder: Option<EncoderArg>,

    /// Units in a layer of that network [default: 128, or as many as virtual tokens if those are more]
    #[arg(long, value_name = "N")]
    pub encoder_hidden: Option<usize>,

    /// The prompt's length: positions of the context that it takes [default: 32]
    #[arg(long, value_name = "N")]
    pub virtual_tokens: Option<usize>,

    /// Where it begins: vocab (random words of the vocabulary), text:… (the words of a text),
    /// examples (words of the training examples), task:NAME or task:DIR (another prompt), random.
    /// A prefix begins at the keys and values that the model has for these words [default: vocab;
    /// examples for a prefix]
    #[arg(long, value_name = "HOW", conflicts_with = "init_text")]
    pub init: Option<String>,

    /// The same as --init text:…
    #[arg(long, value_name = "TEXT")]
    pub init_text: Option<String>,

    /// The highest learning rate of AdamW, or auto: several are tried in short runs from the same
    /// start and the one with the lowest held-out loss is taken
    #[arg(long, value_name = "RATE|auto", default_value = "auto")]
    pub lr: String,

    /// Updates [default: 15 times through the data, but 200 at least and 600 at most]
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    pub steps: Option<usize>,

    /// Times through the data, instead of --steps
    #[arg(long, value_name = "N")]
    pub epochs: Option<f64>,

    /// Examples in a forward pass
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub batch_size: usize,

    /// Forward passes for one update: as a batch that many times as large, in the same memory
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub accumulate: usize,

    /// Part of the steps over which the learning rate rises
    #[arg(long, value_name = "PART", default_value_t = 0.06)]
    pub warmup: f64,

    /// How the learning rate falls after that
    #[arg(long, value_enum, default_value_t = DecayArg::Linear)]
    pub decay: DecayArg,

    /// AdamW's weight decay
    #[arg(long, value_name = "W", default_value_t = 0.0)]
    pub weight_decay: f64,

    /// The largest norm of a gradient; 0 is no limit
    #[arg(long, value_name = "NORM", default_value_t = 1.0)]
    pub clip: f64,

    /// The same seed, data and options give the same prompt, bit for bit, on the same machine
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Steps between evaluations, each of which also saves the state [default: a twentieth of the
    /// steps]
    #[arg(long, value_name = "N")]
    pub eval_every: Option<usize>,

    /// Evaluations without a gain after which to stop; 0 is never. Accuracy counts before the loss
    #[arg(long, value_name = "N", default_value_t = 6)]
    pub patience: usize,

    /// The folder of the unfinished run's state [default: .tune-NAME beside the prompt's folder]
    #[arg(long, value_name = "DIR")]
    pub checkpoint: Option<PathBuf>,

    /// Go on from the saved state of the same run
    #[arg(long)]
    pub resume: bool,
}

/// What is learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TypeArg {
    Prompt,
    PTuning,
    Prefix,
}

/// The network of P-tuning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EncoderArg {
    Mlp,
    Lstm,
}

/// How the learning rate falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DecayArg {
    Linear,
    Cosine,
    Constant,
}

/// Runs the sub-command; writes the result to `out`.
pub fn run(args: &TuneArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let started = Instant::now();
    let (model, tokenizer) = args.model.load()?;
    let options = args.options(&model)?;
    let forward = Forward::new(model);
    let plan = Plan::new(&forward, &tokenizer, &options).map_err(explain)?;
    let output = args.output.clone().unwrap_or_else(|| args.prompts.join(args.task.as_str()));
    let checkpoint = args.checkpoint.clone().unwrap_or_else(|| job::default_checkpoint(&output));
    let paths = OutputPaths { output, checkpoint, resume: args.resume };
    let info = forward.model().info();
    let mut screen = Screen::new(&plan);
    screen.say(&format!(
        "{}: {} examples, {} held out; {}, {} virtual tokens before {} ({} parameters, frozen)",
        plan.task,
        plan.train.len(),
        if plan.held_out.is_empty() { 0 } else { plan.held_out.len() },
        plan.parameters.method().title(),
        plan.parameters.virtual_tokens(),
        info.name,
        info.num_parameters
    ));
    for warning in &plan.warnings {
        screen.say(&match warning {
            Warning::SharedInputs { .. } => format!("warning: {warning}"),
            Warning::NothingHeldOut { .. } => format!("warning: {warning}; give --eval-data"),
        });
    }
    let outcome = job::run(&forward, &plan, &paths, &mut screen).map_err(explain)?;
    screen.close();
    write_result(out, &plan, &outcome, &paths, started)?;
    Ok(())
}

impl TuneArgs {
    fn options(&self, model: &Model) -> anyhow::Result<Options> {
        let prompt_type = self.prompt_type()?;
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
            seed: self.seed,
            eval_every: self.eval_every,
            patience: self.patience,
            ..Options::new(self.task.clone(), &self.data)
        })
    }

    fn prompt_type(&self) -> anyhow::Result<PromptType> {
        if self.prompt_type != TypeArg::PTuning && (self.encoder.is_some() || self.encoder_hidden.is_some()) {
            bail!("--encoder and --encoder-hidden are for --type p-tuning; the other types have no network");
        }
        Ok(match self.prompt_type {
            TypeArg::Prompt => PromptType::Prompt,
            TypeArg::Prefix => PromptType::Prefix,
            TypeArg::PTuning => PromptType::PTuning {
                encoder: match self.encoder {
                    None | Some(EncoderArg::Mlp) => EncoderKind::Mlp,
                    Some(EncoderArg::Lstm) => EncoderKind::Lstm,
                },
                hidden_size: self.encoder_hidden,
            },
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

/// `a,b` or `a=word|word,b=word`.
fn parse_labels(text: &str) -> anyhow::Result<Verbalizer> {
    let labels = text.split(',').map(|part| match part.split_once('=') {
        None => (part.trim().to_owned(), vec![part.trim().to_owned()]),
        Some((label, words)) => (label.trim().to_owned(), words.split('|').map(|w| w.trim().to_owned()).collect()),
    });
    Verbalizer::new(&labels.collect()).context("--labels")
}
