//! What the user typed: one file a sub-command.

mod bench;
pub mod client;
mod convert;
mod eval;
mod health;
mod inspect;
mod key;
mod model;
pub mod model_source;
mod openapi;
mod prompts;
mod push;
mod run;
mod serve;
mod tune;

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

use crate::{
    config::{ConfigError, ServeArgs},
    kernels::prepare_process,
};

/// Many tuned prompts, one frozen model, one server.
///
/// Softserve answers requests for many tasks with one frozen language model. Each task is a learned
/// prompt of a few kilobytes, which is put in front of the input. Without a subcommand softserve runs
/// `serve`; without --model it uses the small demo model inside this program.
#[derive(Debug, Parser)]
#[command(name = "softserve", version, max_term_width = 100, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: ServeArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve tasks over HTTP. This is the default command
    Serve(Box<ServeArgs>),
    Tune(Box<tune::TuneArgs>),
    Eval(eval::EvalArgs),
    Convert(convert::ConvertArgs),
    Inspect(inspect::InspectArgs),
    Push(push::PushArgs),
    Key(key::KeyArgs),
    Run(Box<run::RunArgs>),
    Bench(Box<bench::BenchArgs>),
    Health(health::HealthArgs),
    /// Print the OpenAPI specification that the server serves at /openapi.json
    Openapi,
}

/// Runs what was typed. The code is 0 when all went well, 1 when it failed, 2 when an option or
/// the configuration file is wrong.
pub fn run() -> ExitCode {
    prepare_process();
    let done = match Cli::parse() {
        Cli { command: Some(Command::Serve(args)), .. } => serve::run(*args),
        Cli { command: None, serve: args } => serve::run(args),
        Cli { command: Some(Command::Tune(args)), .. } => tune::run(&args, &mut io::stdout()),
        Cli { command: Some(Command::Eval(args)), .. } => eval::run(&args, &mut io::stdout()),
        Cli { command: Some(Command::Convert(args)), .. } => convert::run(&args, &mut io::stdout()),
        Cli { command: Some(Command::Inspect(args)), .. } => inspect::run(&args, &mut io::stdout()),
        Cli { command: Some(Command::Push(args)), .. } => push::run(&args, &mut io::stdout()),
        Cli { command: Some(Command::Key(args)), .. } => key::run(&args, &mut io::stdout(), &mut io::stderr()),
        Cli { command: Some(Command::Run(args)), .. } => run::run(&args, &mut io::stdout()),
        Cli { command: Some(Command::Bench(args)), .. } => bench::run(&args),
        Cli { command: Some(Command::Health(args)), .. } => health::run(&args, &mut io::stdout()),
        Cli { command: Some(Command::Openapi), .. } => openapi::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has read enough (`| head`).
        Err(error) if error.downcast_ref().is_some_and(|e: &io::Error| e.kind() == io::ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            // Nobody may be reading; the exit code says it too.
            let _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::from(if error.is::<ConfigError>() { 2 } else { 1 })
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_options_of_every_command_have_names_of_their_own() {
        Cli::command().debug_assert();
    }
}
