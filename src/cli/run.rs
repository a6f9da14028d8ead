//! `softserve run`: a file of requests, answered without a server.

use std::{
    fs::{File, OpenOptions},
    io::{BufRead as _, BufReader, IsTerminal as _, Read as _, Seek as _, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use clap::Args;
use futures::{StreamExt as _, pin_mut, stream};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Deserialize;

use super::{
    model::{self, ModelArgs},
    serve,
};
use crate::{
    config::{ByteSize, LogConfig, LogFormat, ServeArgs, Time},
    http::{
        access::Caller,
        lines::{LineAnswer, Lines},
    },
    telemetry,
};

const EXAMPLES: &str = "\
Each line of the input is a JSON object: a task with its input, or a request in the form of OpenAI's batches, of any
route that asks the model something. Tasks and routes may be mixed.
  {\"task\": \"sentiment\", \"input\": \"The food was cold.\", \"custom_id\": \"1\"}
  {\"custom_id\": \"2\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {\"model\": \"topic\", \"prompt\": \"…\"}}

Each line of the output is the answer to the input's line of the same number (empty lines are not counted):
  {\"id\": …, \"custom_id\": \"1\", \"response\": {\"status_code\": 200, \"request_id\": …, \"body\": {…}}, \"error\": null}

If the run is interrupted, the same command goes on where the output ends.

Examples:
  softserve run --input in.jsonl --output out.jsonl
  softserve run --input in.jsonl --output out.jsonl --model ./llama --prompts ./prompts --dtype bf16";

/// How often a run that nobody watches on a terminal says how far it is.
const REPORT: Duration = Duration::from_secs(30);

/// Answer the requests of a file, without a server
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct RunArgs {
    /// The requests, one JSON object per line
    #[arg(long, value_name = "FILE")]
    pub input: PathBuf,

    /// Where the answers go, one per line. If the file exists, the run goes on after its last answer
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,

    /// Start anew if the output exists, instead of going on
    #[arg(long)]
    pub overwrite: bool,

    #[command(flatten)]
    pub model: ModelArgs,

    /// The folder or bucket that stores the learned prompts [default: the one that `softserve serve` uses for this model]
    #[arg(long, value_name = "DIR", env = "SOFTSERVE_PROMPTS")]
    pub prompts: Option<crate::registry::PromptLocation>,

    /// The maximum number of requests that run at the same time [default: 64]
    #[arg(long, value_name = "N", env = "SOFTSERVE_MAX_BATCH")]
    pub max_batch: Option<usize>,

    /// Memory for the KV cache, such as 512MiB [default: as `softserve serve`]
    #[arg(long, value_name = "SIZE", env = "SOFTSERVE_KV_CACHE")]
    pub kv_cache: Option<ByteSize>,
}

/// Runs the sub-command; writes the summary to `out`.
pub fn run(args: &RunArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut input = Requests::open(&args.input)?;
    let total = count_lines(&args.input)?;
    let mut output = open_output(args)?;
    let done = resume(&mut input, &mut output, args)?;
    if done == total {
        writeln!(out, "{} has all {total} answers", args.output.display())?;
        return Ok(());
    }
    let ModelArgs { model, random_weights, context, device, backend, dtype, threads } = args.model.clone();
    // A line waits for others rather than fail.
    let patient = Some(Time(Duration::from_secs(24 * 3600)));
    let serving = ServeArgs {
        model,
        random_weights,
        context,
        device,
        backend,
        dtype,
        prompts: args.prompts.clone(),
        max_batch: args.max_batch,
        kv_cache: args.kv_cache,
        threads,
        max_request_timeout: patient,
        max_body: Some(ByteSize(1 << 30)),
        ..ServeArgs::default()
    };
    let config = serving.check()?;
    telemetry::init(&LogConfig { format: LogFormat::Text, level: "warn".to_owned() })?;
    model::use_threads(config.threads)?;
    let loaded = serve::load(&config)?;
    let lines = Lines::new(Arc::clone(&loaded.app), Caller::anyone());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let at_once = 2 * config.engine.max_batch;
    let bar = bar(total, done);
    let started = Instant::now();
    let mut tally = Tally::default();
    runtime.block_on(async {
        let answers = lines.answers(stream::iter(input), at_once);
        pin_mut!(answers);
        let mut reported = Instant::now();
        while let Some(answer) = answers.next().await {
            let answer = answer?;
            let mut line = serde_json::to_string(&answer)?;
            line.push('\n');
            output.write_all(line.as_bytes()).with_context(|| format!("cannot write {}", args.output.display()))?;
            tally.add(&answer);
            bar.set_position(done + tally.lines);
            bar.set_message(format!("{:.0} tokens/s", tally.tokens as f64 / started.elapsed().as_secs_f64()));
            if bar.is_hidden() && reported.elapsed() >= REPORT {
                reported = Instant::now();
                let _ = writeln!(std::io::stderr(), "{} of {total} lines, {} failed", done + tally.lines, tally.failed);
            }
        }
        anyhow::Ok(())
    })?;
    bar.finish_and_clear();
    output.sync_all()?;
    let seconds = started.elapsed().as_secs_f64();
    let Tally { lines, failed, tokens } = tally;
    writeln!(
        out,
        "{lines} lines in {seconds:.1} s ({:.1} lines/s, {:.0} tokens/s), {failed} failed: {}",
        lines as f64 / seconds,
        tokens as f64 / seconds,
        args.output.display()
    )?;
    Ok(())
}

/// What came of the lines.
#[derive(Debug, Default)]
struct Tally {
    lines: u64,
    failed: u64,
    /// New tokens.
    tokens: u64,
}

impl Tally {
    fn add(&mut self, answer: &LineAnswer) {
        #[derive(Deserialize)]
        struct Body {
            usage: Option<Usage>,
        }
        #[derive(Deserialize)]
        struct Usage {
            completion_tokens: Option<u64>,
        }
        self.lines += 1;
        self.failed += u64::from(!answer.is_success());
        let body = answer.response.as_ref().and_then(|r| serde_json::from_str::<Body>(r.body.get()).ok());
        self.tokens += body.and_then(|body| body.usage?.completion_tokens).unwrap_or(0);
    }
}

/// The requests' lines, empty ones left out.
struct Requests {
    reader: BufReader<File>,
    path: PathBuf,
}

impl Requests {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { reader: BufReader::with_capacity(1 << 20, file), path: path.to_owned() })
    }
}

impl Iterator for Requests {
    type Item = anyhow::Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let mut line = String::new();
            match self.reader.read_line(&mut line) {
                Ok(0) => return None,
                Ok(_) if line.trim().is_empty() => {}
                Ok(_) => return Some(Ok(line.trim().to_owned())),
                Err(error) => {
                    return Some(Err(error).with_context(|| format!("cannot read {}", self.path.display())));
                }
            }
        }
    }
}

fn count_lines(path: &Path) -> anyhow::Result<u64> {
    let mut count = 0;
    for line in Requests::open(path)? {
        line?;
        count += 1;
    }
    Ok(count)
}

/// The output, for reading what is there and for appending.
fn open_output(args: &RunArgs) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(args.overwrite);
    options.open(&args.output).with_context(|| format!("cannot open {}", args.output.display()))
}

/// Skips the requests that have an answer already. An answer that was not written whole is cut off.
///
/// # Errors
/// The answers are not those of these requests.
fn resume(input: &mut Requests, output: &mut File, args: &RunArgs) -> anyhow::Result<u64> {
    #[derive(Deserialize)]
    struct Id {
        custom_id: Option<serde_json::Value>,
    }
    let mut reader = BufReader::new(&*output);
    let (mut done, mut whole) = (0, 0);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = reader.by_ref().read_until(b'\n', &mut line)?;
        if read == 0 || line.last() != Some(&b'\n') {
            break;
        }
        let number = done + 1;
        let Some(request) = input.next().transpose()? else {
            bail!("{} has more lines than {}", args.output.display(), args.input.display())
        };
        let answer: Id = serde_json::from_slice(&line)
            .with_context(|| format!("line {number} of {} is no answer", args.output.display()))?;
        // A request that cannot be read has an answer without an id.
        let asked = serde_json::from_str::<Id>(&request).ok().and_then(|id| id.custom_id);
        if answer.custom_id.is_some() && answer.custom_id != asked {
            bail!(
                "line {number} of {} answers the request {}, and that of {} is {}: choose another output, or --overwrite",
                args.output.display(),
                answer.custom_id.unwrap_or_default(),
                args.input.display(),
                asked.unwrap_or_default()
            );
        }
        done = number;
        whole += read as u64;
    }
    drop(reader);
    output.set_len(whole)?;
    output.seek(SeekFrom::End(0))?;
    if done > 0 {
        let _ = writeln!(std::io::stderr(), "going on after {done} answers of {}", args.output.display());
    }
    Ok(done)
}

fn bar(total: u64, done: u64) -> ProgressBar {
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(total), target).with_position(done);
    if let Ok(style) = ProgressStyle::with_template("    run {wide_bar:.cyan/dim} {pos}/{len}  {msg}  {eta}") {
        bar.set_style(style);
    }
    bar
}
