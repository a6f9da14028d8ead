//! `softserve push`: the admin API's upload from a shell.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::Args;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use super::client::ServerArgs;
use crate::prompt::{
    TaskName,
    files::{ADAPTER_CONFIG, EVAL, PromptFiles, TASK, WEIGHTS},
};

/// Upload a learned prompt to a running server, which checks it, stores it and serves it at once.
///
/// Takes a folder as PEFT or `softserve tune` writes it, a zip or tar of one, or a single
/// .safetensors file.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  softserve push out/sentiment --task sentiment\n  \
    softserve push sentiment.zip --task sentiment --url https://prompts.example.org --no-activate\n  \
    softserve push out/sentiment --task sentiment --gate accuracy --eval test.jsonl")]
pub struct PushArgs {
    /// The folder or file to upload.
    #[arg(value_name = "DIR|FILE")]
    path: PathBuf,
    /// The name of the task.
    #[arg(long, value_name = "NAME")]
    task: TaskName,
    /// Store the version without activating it.
    #[arg(long)]
    no_activate: bool,
    /// Activate the version only if it does not score worse than the active one: accuracy, macro_f1, brier or exact_match. The
    /// examples are those of --eval, or of eval.jsonl in the folder or archive. Ends with exit code 1 if it scores worse.
    #[arg(long, value_name = "METRIC")]
    gate: Option<String>,
    /// The examples for --gate: one JSON object a line, with input and label or output. For a folder only.
    #[arg(long, value_name = "FILE", requires = "gate")]
    eval: Option<PathBuf>,
    /// Accept a prompt that was tuned on another model by its fingerprint, such as the same model in another precision.
    #[arg(long)]
    allow_other_base: bool,
    /// The admin key, if the server has one.
    #[arg(long, env = "SOFTSERVE_ADMIN_KEY", hide_env_values = true, value_name = "KEY")]
    admin_key: Option<String>,
    #[command(flatten)]
    server: ServerArgs,
}

/// Uploads, and prints the version and how to call it.
pub fn run(args: &PushArgs, out: &mut dyn Write) -> Result<()> {
    let (content_type, body) = package(&args.path, args.eval.as_deref(), args.gate.is_some())?;
    let mut path = format!("/v1/admin/tasks/{}/versions?activate={}", args.task, !args.no_activate);
    if let Some(metric) = &args.gate {
        path += &format!("&gate={}", utf8_percent_encode(metric, NON_ALPHANUMERIC));
    }
    if args.allow_other_base {
        path += "&allow_other_base=true";
    }
    let mut request =
        args.server.agent(Duration::from_secs(300)).post(args.server.at(&path)).header("content-type", content_type);
    if let Some(key) = args.admin_key.as_deref().filter(|k| !k.is_empty()) {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let answer = args.server.answer(request.send(&body[..]))?;
    let created = answer.status == 201;
    let body = answer.success()?;
    let version = body.get("version").and_then(Value::as_str).unwrap_or("?");
    let active = body.get("active").and_then(Value::as_bool).unwrap_or(false);
    let stored = if created { "stored" } else { "was there already" };
    let state = if active { "active" } else { "not active" };
    writeln!(out, "task {} version {version}: {stored}, {state}", args.task)?;
    if let Some(gate) = body.get("gate") {
        let line = compared(gate);
        if gate.get("passed") == Some(&Value::Bool(false)) {
            bail!("the gate kept version {version} from being activated: {line}");
        }
        writeln!(out, "{line}")?;
    }
    writeln!(
        out,
        "try: curl {} -H 'content-type: application/json' -d '{{\"input\": \"…\", \"version\": \"{version}\"}}'",
        args.server.at(&format!("/v1/tasks/{}/generate", args.task))
    )?;
    Ok(())
}

/// What a gate found, as a line.
fn compared(gate: &Value) -> String {
    let number = |name: &str| gate.get(name).and_then(Value::as_f64);
    let metric = gate.get("metric").and_then(Value::as_str).unwrap_or("score");
    let (score, examples) = (number("score").unwrap_or(f64::NAN), number("examples").unwrap_or_default());
    let mut line = format!("{metric} {score:.4} on {examples} examples");
    if let (Some(active), Some(worse)) = (number("active_score"), number("worse")) {
        let version = gate.get("active_version").and_then(Value::as_str).unwrap_or("?");
        line += &format!(
            ", the active version {version} has {active:.4}; worse in {:.0} % of bootstrap samples",
            100.0 * worse
        );
    }
    line
}

/// A content type and the bytes to send.
fn package(path: &Path, eval: Option<&Path>, with_eval: bool) -> Result<(&'static str, Vec<u8>)> {
    if path.is_dir() {
        let own = path.join(EVAL);
        let eval = eval.or_else(|| Some(own.as_path()).filter(|own| with_eval && own.is_file()));
        let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        return Ok(("application/x-tar", tar(path, eval.map(read).transpose()?.as_deref())?));
    }
    if eval.is_some() {
        bail!("--eval goes with a folder: put the examples into {} as {EVAL}", path.display());
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let content_type = match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("safetensors") => "application/octet-stream",
        Some("zip") => "application/zip",
        Some("tar") => "application/x-tar",
        Some("gz" | "tgz") => "application/gzip",
        _ => {
            let expected = "expected a folder, or a file .safetensors, .zip, .tar or .tar.gz";
            bail!(
                "{} cannot be uploaded: {expected}; unpack other archives first, and convert other formats with `softserve convert`",
                path.display()
            )
        }
    };
    Ok((content_type, fs::read(path).with_context(|| format!("cannot read {}", path.display()))?))
}

/// The files of a version; anything else in a folder stays where it is.
fn tar(folder: &Path, eval: Option<&[u8]>) -> Result<Vec<u8>> {
    let files = PromptFiles::read_users_dir(folder)?;
    if files.content().next().is_none() {
        bail!("{} holds none of {ADAPTER_CONFIG}, {WEIGHTS}, {TASK}", folder.display());
    }
    let mut tar = tar::Builder::new(Vec::new());
    let files = files.present().map(|(name, bytes)| (name, &bytes[..]));
    for (name, bytes) in files.chain(eval.map(|bytes| (EVAL, bytes))) {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, bytes)?;
    }
    Ok(tar.into_inner()?)
}
