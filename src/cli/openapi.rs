//! `softserve openapi`: the specification on standard output.

use std::io::Write as _;

pub fn run() -> anyhow::Result<()> {
    let json = crate::http::openapi::json()?;
    std::io::stdout().write_all(json.as_bytes())?;
    Ok(())
}
