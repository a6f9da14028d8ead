//! `softserve tune`: learns a prompt from examples.

use std::{
    io::{IsTerminal, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{
    model::ModelArgs,
    prompts::{self, DEFAULT_ROOT},
};
use crate::{
    model::Model,
    prompt::{TaskName, labels::Verbalizer},
    tune::{
        encoder::EncoderKind,
        init::Init,
        job::{self, Observer, Outcome, Places},
        loss::Held,
        plan::{Length, Options, Plan, PromptType},
        schedule::Decay,
        sweep::Sweep,
        trainer::{Ended, Progress, Settings},
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
    let (model, text) = args.model.load()?;
    let options = args.options(&model)?;
    let plan = Plan::new(&model, &text, &options)?;
    let output = args.output.clone().unwrap_or_else(|| args.prompts.join(args.task.as_str()));
    let checkpoint = args.checkpoint.clone().unwrap_or_else(|| job::default_checkpoint(&output));
    let places = Places { output, checkpoint, resume: args.resume };
    let mut screen = Screen::new(&plan, interrupts());
    screen.say(&format!(
        "{}: {} examples, {} held out; {}, {} virtual tokens before {} ({} parameters, frozen)",
        plan.task,
        plan.train.len(),
        if plan.held_out.is_empty() { 0 } else { plan.held_out.len() },
        plan.parameters.method().title(),
        plan.parameters.virtual_tokens(),
        model.info().name,
        model.info().num_parameters
    ));
    for warning in &plan.warnings {
        screen.say(&format!("warning: {warning}"));
    }
    let outcome = job::run(&model, &plan, &places, &mut screen)?;
    screen.bar.finish_and_clear();
    write_result(out, &plan, &outcome, &places, started)?;
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

/// Set by the first Ctrl-C; the second ends the process at once.
fn interrupts() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    std::thread::spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        while runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
            if set.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        }
    });
    flag
}

/// The progress on standard error: a bar on a terminal, lines elsewhere.
struct Screen {
    bar: ProgressBar,
    terminal: bool,
    metric: String,
    interrupted: Arc<AtomicBool>,
    held: Option<Held>,
}

impl Screen {
    fn new(plan: &Plan, interrupted: Arc<AtomicBool>) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            None,
            if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() },
        );
        let template = "{prefix:>8} {wide_bar:.cyan/dim} {pos}/{len}  {msg}  {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self { bar, terminal, metric: plan.metric().replace('_', " "), interrupted, held: None }
    }

    fn say(&self, line: &str) {
        match self.terminal {
            true => self.bar.suspend(|| {
                let _ = writeln!(std::io::stderr(), "{line}");
            }),
            false => {
                let _ = writeln!(std::io::stderr(), "{line}");
            }
        }
    }

    fn flow(&self) -> ControlFlow<()> {
        if self.interrupted.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

impl Observer for Screen {
    fn sweeping(&mut self, done: usize, of: usize) -> ControlFlow<()> {
        self.bar.set_prefix("sweep");
        self.bar.set_length(of as u64);
        self.bar.set_position(done as u64);
        self.flow()
    }

    fn swept(&mut self, sweep: &Sweep) {
        self.say(&format!(
            "learning rates tried, {} steps each (held-out loss at the start: {:.3}):",
            crate::tune::sweep::STEPS,
            sweep.start.loss
        ));
        for trial in &sweep.trials {
            let verdict = match (trial.diverged, sweep.chosen == Some(trial.rate)) {
                (true, _) => "diverged",
                (false, true) => "chosen",
                (false, false) => "",
            };
            let line = format!(
                "  {:>9}  loss {:.3}  {} {:>5.1}%  {verdict}",
                trial.rate,
                trial.held.loss,
                self.metric,
                100.0 * trial.held.exact
            );
            self.say(line.trim_end());
        }
    }

    fn training(&mut self, settings: &Settings, step: usize) {
        self.bar.reset();
        self.bar.set_prefix("tune");
        self.bar.set_length(settings.schedule.steps as u64);
        self.bar.set_position(step as u64);
        if step > 0 {
            self.say(&format!("going on from step {step}"));
        }
    }

    fn progress(&mut self, progress: Progress<'_>) -> ControlFlow<()> {
        match progress {
            Progress::Step { step, loss, rate, .. } => {
                let held = self.held.map_or(String::new(), |h| {
                    format!("  held-out {:.3}  {} {:.0}%", h.loss, self.metric, 100.0 * h.exact)
                });
                self.bar.set_message(format!("loss {loss:.3}{held}  lr {rate:.2e}"));
                self.bar.set_position(step as u64);
            }
            Progress::Evaluated { state, held, best } => {
                self.held = Some(held);
                if !self.terminal {
                    let train = state.losses.last().map_or(String::new(), |l| format!("  loss {l:.3}"));
                    let best = if best { "  best" } else { "" };
                    self.say(&format!(
                        "step {:>5}{train}  held-out loss {:.3}  {} {:>5.1}%{best}",
                        state.step,
                        held.loss,
                        self.metric,
                        100.0 * held.exact
                    ));
                }
            }
        }
        self.flow()
    }
}

fn write_result(
    out: &mut dyn Write,
    plan: &Plan,
    outcome: &Outcome,
    places: &Places,
    started: Instant,
) -> std::io::Result<()> {
    let metric = plan.metric().replace('_', " ");
    let row = |name: &str, held: Held| format!("  {name:<22} {:>8.3} {:>11.1}%", held.loss, 100.0 * held.exact);
    let ended = match outcome.ended {
        Ended::Early => ", stopped early",
        Ended::Diverged => ", stopped where the loss diverged",
        Ended::Finished | Ended::Interrupted => "",
    };
    writeln!(out, "\n  {:<22} {:>8} {:>12}", "", "loss", metric)?;
    writeln!(out, "{}", row("without a prompt", outcome.bare))?;
    writeln!(out, "{}", row("before tuning", outcome.before))?;
    writeln!(out, "{}", row("after tuning", outcome.after))?;
    writeln!(
        out,
        "\nkept step {} of {}{ended}; learning rate {}; {:.0} s\nwrote {} (version {}) and {}\n\nserve it:  softserve serve --prompts {}",
        outcome.best_step,
        outcome.state.step,
        outcome.rate,
        started.elapsed().as_secs_f64(),
        places.output.display(),
        outcome.version.digest,
        places.output.join(crate::tune::output::CURVE).display(),
        places.output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).display(),
    )
}
