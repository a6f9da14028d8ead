//! `softserve health`: whether a server answers; for container health checks.

use std::{io::Write, time::Duration};

use anyhow::{Result, bail};
use clap::Args;

use super::client::ServerArgs;

/// Ask a running server whether it is ready; the exit code is 0 if it is.
///
/// Ready means that the model is loaded and a real forward pass has run.
#[derive(Debug, Clone, Args)]
pub struct HealthArgs {
    #[command(flatten)]
    server: ServerArgs,
}

/// Asks `/health/ready`.
pub fn run(args: &HealthArgs, out: &mut dyn Write) -> Result<()> {
    let agent = args.server.agent(Duration::from_secs(3));
    let answer = args.server.answer(agent.get(args.server.at("/health/ready")).call())?;
    if answer.status != 200 {
        bail!("the server at {} is not ready ({}): {}", args.server.url, answer.status, answer.body);
    }
    writeln!(out, "ready")?;
    Ok(())
}
