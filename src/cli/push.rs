//! `softserve push`: the admin API's upload from a shell.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use super::client::ServerArgs;
use crate::prompt::{
    TaskName,
    files::{ADAPTER_CONFIG, PromptFiles, TASK, WEIGHTS},
};

/// Upload a learned prompt to a running server, which checks it, stores it and serves it at once.
///
/// Takes a folder as PEFT or `softserve tune` writes it, a zip or tar of one, or a single
/// .safetensors file.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  softserve push out/sentiment --task sentiment\n  \
    softserve push sentiment.zip --task sentiment --url https://prompts.example.org --no-activate")]
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
    /// The admin key, if the server has one.
    #[arg(long, env = "SOFTSERVE_ADMIN_KEY", hide_env_values = true, value_name = "KEY")]
    admin_key: Option<String>,
    #[command(flatten)]
    server: ServerArgs,
}

/// Uploads, and prints the version and how to call it.
pub fn run(args: &PushArgs, out: &mut dyn Write) -> Result<()> {
    let (content_type, body) = package(&args.path)?;
    let path = format!("/v1/admin/tasks/{}/versions?activate={}", args.task, !args.no_activate);
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
    writeln!(
        out,
        "try: curl {} -H 'content-type: application/json' -d '{{\"input\": \"…\", \"version\": \"{version}\"}}'",
        args.server.at(&format!("/v1/tasks/{}/generate", args.task))
    )?;
    Ok(())
}

/// A content type and the bytes to send.
fn package(path: &Path) -> Result<(&'static str, Vec<u8>)> {
    if path.is_dir() {
        return Ok(("application/x-tar", tar(path)?));
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
fn tar(folder: &Path) -> Result<Vec<u8>> {
    let files = PromptFiles::read_users_dir(folder)?;
    if files.content().next().is_none() {
        bail!("{} holds none of {ADAPTER_CONFIG}, {WEIGHTS}, {TASK}", folder.display());
    }
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in files.present() {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, &bytes[..])?;
    }
    Ok(tar.into_inner()?)
}
