//! `softserve key`: a new key, and the table that goes into the file of `--keys`.

use std::io::Write;

use anyhow::{Context, Result};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use clap::{Args, ValueEnum};
use rand::TryRngCore as _;
use sha2::{Digest as _, Sha256};

use crate::config::check_key_table;

/// Make a new key, and the table for the server's file of --keys, which holds only the key's SHA-256.
///
/// The key is shown once, on standard error. Give it to whoever calls the server. The table goes to standard output, to be
/// appended to the file; a running server reads the file again when it changes.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  softserve key --name app >> keys.toml\n  \
    softserve key --name ci --role admin --task 'team-a-*' --expires 2027-12-31 >> keys.toml")]
pub struct KeyArgs {
    /// What logs call the key.
    #[arg(long, value_name = "NAME")]
    name: String,
    /// What it opens; repeat the option for several roles.
    #[arg(long = "role", value_name = "ROLE", default_value = "infer")]
    roles: Vec<Role>,
    /// The tasks that it may use, with * for any characters; repeat the option for several. Without it, all tasks.
    #[arg(long = "task", value_name = "PATTERN")]
    tasks: Vec<String>,
    /// Keys of one tenant share what the prefix cache holds of their inputs. Without it, the key is a tenant of its own.
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// From when on it opens nothing: a date such as 2027-12-31, or a time in UTC such as 2027-12-31T12:00:00Z.
    #[arg(long, value_name = "DATE")]
    expires: Option<String>,
    /// The most requests a minute.
    #[arg(long, value_name = "N")]
    requests_per_minute: Option<u32>,
    /// The most tokens a minute, of inputs and answers.
    #[arg(long, value_name = "N")]
    tokens_per_minute: Option<u32>,
    /// The most requests that are answered at the same time.
    #[arg(long, value_name = "N")]
    concurrent_requests: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Role {
    /// Requests that ask the model something, and the lists of what can be asked.
    Infer,
    /// GET /metrics.
    Metrics,
    /// The routes under /v1/admin.
    Admin,
}

/// Prints a key for people, and its table.
pub fn run(args: &KeyArgs, out: &mut dyn Write, err: &mut dyn Write) -> Result<()> {
    let mut random = [0; 32];
    rand::rngs::OsRng.try_fill_bytes(&mut random).context("the system gives no random numbers")?;
    let key = format!("ss-{}", BASE64_URL_SAFE_NO_PAD.encode(random));
    let table = table(args, &key);
    check_key_table(&table).map_err(anyhow::Error::msg)?;
    writeln!(err, "The key, which is not shown again:\n\n    {key}\n")?;
    writeln!(out, "{table}")?;
    Ok(())
}

fn table(args: &KeyArgs, key: &str) -> String {
    // JSON's texts and lists of texts are TOML's too.
    let text = |text: &str| serde_json::Value::from(text).to_string();
    let list = |items: Vec<&str>| serde_json::Value::from(items).to_string();
    let role = |role: &Role| role.to_possible_value().map(|value| value.get_name().to_owned());
    let roles: Vec<String> = args.roles.iter().filter_map(role).collect();
    let number = |number: u32| number.to_string();
    let lines = [
        ("name", Some(text(&args.name))),
        ("sha256", Some(text(&hex::encode(Sha256::digest(key.as_bytes()))))),
        ("roles", Some(list(roles.iter().map(String::as_str).collect()))),
        ("tasks", (!args.tasks.is_empty()).then(|| list(args.tasks.iter().map(String::as_str).collect()))),
        ("tenant", args.tenant.as_deref().map(text)),
        ("expires", args.expires.as_deref().map(text)),
        ("requests_per_minute", args.requests_per_minute.map(number)),
        ("tokens_per_minute", args.tokens_per_minute.map(number)),
        ("concurrent_requests", args.concurrent_requests.map(number)),
    ];
    let lines = lines.into_iter().filter_map(|(name, value)| Some(format!("{name} = {}\n", value?)));
    format!("[[key]]\n{}", lines.collect::<String>())
}
