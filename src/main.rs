//! The `softserve` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    softserve::cli::run()
}
