//! `softserve bench`: a load on a server, and what came of it.

mod inside;
mod options;
mod sampling;
mod tasks;

use std::{cell::Cell, fs::OpenOptions, io::Write as _, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::{
    bench::{
        client::{Client, ClientError},
        drive::{Assigned, Measured, Run},
        load::Load,
        plan::{Target, Words},
        report::{Figures, LoadReport, Table},
    },
    config::ConfigError,
    model::{ModelConfig, random::RandomModel},
};
use inside::ServerInside;
pub use options::BenchArgs;
use tasks::Admin;

/// Tasks that are warmed up unless `--warmup` says more.
const MAX_WARM_TASKS: usize = 256;

/// Measures, or writes a random model.
pub fn run(args: &BenchArgs) -> Result<()> {
    if let Some(folder) = &args.save_model {
        return save(args, folder);
    }
    let loads = args.loads()?;
    check_json(args)?;
    match &args.url {
        Some(url) => {
            client(args, url)?;
            let admin = Admin::new(url, args.api_key(), args.admin_key());
            let prefix = format!("bench-{}", std::process::id());
            let upload = |hidden| admin.upload(&args.prompt_lengths(&loads), hidden, &prefix, args.seed);
            let uploaded = args.hidden_size.filter(|_| args.upload).map(upload).transpose()?;
            let listed = uploaded.clone().map_or_else(|| admin.list(), Ok);
            let done = listed.and_then(|targets| {
                let words = args.vocabulary.map_or(Words::English, |vocabulary| Words::Numbered { vocabulary });
                measure(args, url, loads, &targets, words)
            });
            for target in uploaded.iter().flatten() {
                admin.delete(&target.task)?;
            }
            report(args, json!({"url": url}), None, done?)
        }
        None => {
            let config = args.model_config()?;
            let server = ServerInside::start(args, &loads)?;
            let admin = Admin::new(server.url(), args.api_key(), args.admin_key());
            let targets = admin.upload(&args.prompt_lengths(&loads), config.hidden_size, "bench", args.seed)?;
            let done = measure(args, server.url(), loads, &targets, words(args, &config))?;
            report(args, server.describe(), server.memory(), done)
        }
    }
}

fn words(args: &BenchArgs, config: &ModelConfig) -> Words {
    match (args.vocabulary, &args.model.random_weights) {
        (Some(vocabulary), _) => Words::Numbered { vocabulary },
        (None, Some(_)) => Words::Numbered { vocabulary: config.vocab_size },
        (None, None) => Words::English,
    }
}

fn save(args: &BenchArgs, folder: &Path) -> Result<()> {
    let Some(shape) = &args.model.random_weights else {
        let reason = "it needs --random-weights, which says what to write".to_owned();
        return Err(ConfigError::Option { option: "save-model", reason }.into());
    };
    let model = RandomModel::open(shape)?;
    model.save(folder).with_context(|| format!("cannot write {} to {}", model.name(), folder.display()))?;
    writeln!(std::io::stdout(), "wrote {} to {}", model.name(), folder.display())?;
    Ok(())
}

/// Whether the figures can be written, before they are measured for minutes.
fn check_json(args: &BenchArgs) -> Result<(), ConfigError> {
    let Some(path) = args.json.as_deref().filter(|path| *path != Path::new("-")) else { return Ok(()) };
    // What is there already stays until there is something to put in its place.
    let opened = OpenOptions::new().append(true).create(true).open(path);
    let reason = |e| format!("cannot write {}: {e}; give a file in a folder that is there", path.display());
    opened.map(drop).map_err(|e| ConfigError::Option { option: "json", reason: reason(e) })
}

/// Everything that was measured.
struct Done {
    loads: Vec<Load>,
    reports: Vec<LoadReport>,
}

fn measure(args: &BenchArgs, url: &str, loads: Vec<Load>, targets: &[Target], words: Words) -> Result<Done> {
    let assigned = assign(args, loads, targets)?;
    let client = client(args, url)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let session = Session { args, client, words, phase: Cell::new(0) };
    let reports = runtime.block_on(async {
        tokio::select! {
            reports = session.all(&assigned) => reports,
            () = interrupted() => bail!("interrupted"),
        }
    })?;
    Ok(Done { loads: assigned.into_iter().map(|a| a.load).collect(), reports })
}

fn client(args: &BenchArgs, url: &str) -> Result<Client, ConfigError> {
    Client::new(url, args.api_key().or(args.admin_key())).map_err(|error| {
        let option = if matches!(error, ClientError::Key) { "api-key" } else { "url" };
        ConfigError::Option { option, reason: error.to_string() }
    })
}

/// Gives each load tasks of its own, in their order.
fn assign(args: &BenchArgs, mut loads: Vec<Load>, targets: &[Target]) -> Result<Vec<Assigned>> {
    if let ([load], true) = (&mut loads[..], args.load.is_empty() && args.tasks.is_none()) {
        load.tasks = targets.len();
    }
    let wanted: usize = loads.iter().map(|load| load.tasks).sum();
    if wanted > targets.len() || wanted == 0 {
        bail!(
            "found {} tasks on the server, expected {} or more: ask fewer with --tasks, or add some with --upload",
            targets.len(),
            wanted.max(1)
        );
    }
    let mut left = targets;
    let mut take = |n: usize| {
        let (taken, rest) = left.split_at(n);
        left = rest;
        taken.to_vec()
    };
    Ok(loads.into_iter().map(|load| Assigned { targets: take(load.tasks), load }).collect())
}

/// The measurements of one invocation.
struct Session<'a> {
    args: &'a BenchArgs,
    client: Client,
    words: Words,
    phase: Cell<u64>,
}

impl Session<'_> {
    async fn all(&self, loads: &[Assigned]) -> Result<Vec<LoadReport>> {
        for (assigned, run) in loads.iter().map(|assigned| (assigned, self.next_run())) {
            let requests = self.args.warmup.unwrap_or(assigned.load.tasks.min(MAX_WARM_TASKS));
            let bar = progress(&format!("warming up {}", assigned.load.name), Some(requests), None);
            let samples = run.warm_up(assigned, requests, &|| bar.inc(1)).await;
            bar.finish_and_clear();
            if let (false, Some(Err(code))) =
                (samples.iter().any(|s| s.outcome.is_ok()), samples.first().map(|s| &s.outcome))
            {
                let why = self.client.first_problem().map_or_else(String::new, |detail| format!(": {detail}"));
                bail!("no request of {} was answered, the first because of {code}{why}", assigned.load.name);
            }
        }
        let alone: Vec<_> = loads.iter().filter(|assigned| assigned.load.alone).collect();
        let mut alone_figures = vec![Vec::new(); alone.len()];
        let mut figures = vec![Vec::new(); loads.len()];
        let mut all_figures = Vec::new();
        for repeat in 1..=self.args.repeat {
            for (assigned, figures) in alone.iter().zip(&mut alone_figures) {
                let measured = self.phase(repeat, self.next_run(), std::slice::from_ref(*assigned)).await;
                figures.extend(measured.iter().map(Figures::of));
            }
            let measured = match self.args.in_turn {
                true => self.in_turn(repeat, loads).await,
                false => self.phase(repeat, self.next_run(), loads).await,
            };
            for (measured, figures) in measured.iter().zip(&mut figures) {
                figures.push(Figures::of(measured));
            }
            all_figures.push(Figures::of(&sum(measured)));
        }
        let alone = alone.iter().zip(alone_figures).map(|(a, figures)| LoadReport::new(&a.load.name, true, figures));
        let each = loads.iter().zip(figures).map(|(a, figures)| LoadReport::new(&a.load.name, false, figures));
        let mut reports: Vec<_> = alone.chain(each).collect();
        if loads.len() > 1 && !self.args.in_turn {
            reports.push(LoadReport::new("all loads together", false, all_figures));
        }
        Ok(reports)
    }

    /// One after another. They are sent the same texts, to tasks of their own, and every other time the last goes first,
    /// so that a machine that becomes slower favours none.
    async fn in_turn(&self, repeat: usize, loads: &[Assigned]) -> Vec<Measured> {
        let run = self.next_run();
        let backwards = repeat.is_multiple_of(2);
        let mut order: Vec<_> = loads.iter().collect();
        if backwards {
            order.reverse();
        }
        let mut measured = Vec::with_capacity(loads.len());
        for assigned in order {
            measured.extend(self.phase(repeat, run, std::slice::from_ref(assigned)).await);
        }
        if backwards {
            measured.reverse();
        }
        measured
    }

    async fn phase(&self, repeat: usize, run: Run<'_>, loads: &[Assigned]) -> Vec<Measured> {
        let names: Vec<_> = loads.iter().map(|a| a.load.name.as_str()).collect();
        let title = format!("run {repeat} of {}: {}", self.args.repeat, names.join(", "));
        let requests = loads.iter().map(|a| a.load.requests).sum();
        let bar = progress(&title, requests, self.args.duration.map(|time| time.0));
        let measured = run.together(loads, &|| bar.inc(1)).await;
        bar.finish_and_clear();
        measured
    }

    /// Each has requests of its own, so that none finds what another left in the server's cache.
    fn next_run(&self) -> Run<'_> {
        let phase = self.phase.replace(self.phase.get() + 1);
        let seed = self.args.seed.wrapping_mul(0x2545_F491_4F6C_DD1D).wrapping_add(phase);
        Run { client: &self.client, words: self.words, seed, duration: self.args.duration.map(|time| time.0) }
    }
}

fn sum(measured: Vec<Measured>) -> Measured {
    let elapsed = measured.iter().map(|m| m.elapsed).max().unwrap_or_default();
    Measured { samples: measured.into_iter().flat_map(|m| m.samples).collect(), elapsed }
}

fn progress(title: &str, requests: Option<usize>, duration: Option<Duration>) -> ProgressBar {
    let bar = requests.map_or_else(ProgressBar::no_length, |n| ProgressBar::new(n as u64));
    let of = if requests.is_some() { "{bar:30} {pos}/{len}" } else { "{pos}" };
    let time = duration.map_or_else(String::new, |duration| format!(" of {duration:?}"));
    // A template that is not understood would only look plain.
    let style = ProgressStyle::with_template(&format!("{{msg}}  {of} requests, {{elapsed}}{time}"));
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(title.to_owned());
    bar
}

/// Ctrl-C or SIGTERM: the server inside must not be left behind.
async fn interrupted() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Prints the table or the JSON, and writes the JSON where it was asked for.
fn report(args: &BenchArgs, server: Value, memory: Option<Value>, done: Done) -> Result<()> {
    let everything = json!({
        "softserve": env!("CARGO_PKG_VERSION"),
        "server": server,
        "seed": args.seed,
        "repeat": args.repeat,
        "in_turn": args.in_turn,
        "loads": done.loads,
        "results": done.reports,
        "memory": memory,
    });
    let pretty = format!("{everything:#}\n");
    let mut out = std::io::stdout();
    match &args.json {
        Some(path) if path == Path::new("-") => out.write_all(pretty.as_bytes())?,
        Some(path) => std::fs::write(path, &pretty).with_context(|| format!("cannot write {}", path.display()))?,
        None => {}
    }
    if args.json.as_deref() != Some(Path::new("-")) {
        let named = ["model", "url"].iter().find_map(|key| everything["server"][key].as_str()).unwrap_or_default();
        writeln!(out, "{named}\n{}", describe(args, &done.loads).join("\n"))?;
        write!(out, "{}", Table { loads: &done.reports, in_turn: args.in_turn })?;
        if let Some(peak) = everything["memory"]["peak_bytes"].as_u64() {
            writeln!(out, "\nmemory of the server: {:.0} MiB at most", peak as f64 / f64::from(1 << 20))?;
        }
    }
    match done.reports.iter().any(|report| report.median.answered > 0.0) {
        true => Ok(()),
        false => bail!("no request was answered"),
    }
}

/// What was asked for, a line a load.
fn describe(args: &BenchArgs, loads: &[Load]) -> Vec<String> {
    use crate::bench::load::Arrival;

    let made = args.url.is_none() || args.upload;
    let virtual_tokens =
        |load: &Load| if made { format!(", {} virtual tokens", load.virtual_tokens) } else { String::new() };
    let line = |load: &Load| {
        let requests = load.requests.map_or_else(String::new, |n| format!("{n} requests, "));
        let arrival = match load.arrival {
            Arrival::Concurrency(n) => format!("{n} at once"),
            Arrival::Rate(rate) => format!("{rate} a second"),
        };
        format!(
            "{}: {requests}{arrival}, {} {} ({}{}), input {} tokens, output {}, {}; median of {}",
            load.name,
            load.tasks,
            if load.tasks == 1 { "task" } else { "tasks" },
            load.mix,
            virtual_tokens(load),
            load.input_tokens,
            load.output_tokens,
            load.sampling,
            args.repeat
        )
    };
    loads.iter().map(line).collect()
}
