//! The file of `--keys`: one table for each key, with its roles, tasks, limits and expiry.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use figment::{
    Figment,
    providers::{Format as _, Toml},
};
use serde::Deserialize;

use super::keys::{Key, KeyLimits, Keys, Roles, TaskPatterns, digest, named_tenant, tenant_of};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    #[serde(default)]
    key: Vec<KeyTable>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyTable {
    name: String,
    /// The key itself.
    key: Option<String>,
    /// Its SHA-256 in hex digits.
    sha256: Option<String>,
    #[serde(default)]
    roles: Option<Vec<Role>>,
    #[serde(default)]
    tasks: Option<Vec<String>>,
    tenant: Option<String>,
    expires: Option<String>,
    requests_per_minute: Option<u32>,
    tokens_per_minute: Option<u32>,
    concurrent_requests: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    Infer,
    Metrics,
    Admin,
}

/// Reads the keys of a file.
///
/// # Errors
/// It cannot be read, is not of this form, or has a key twice.
pub(super) fn read(path: &Path) -> Result<Keys, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    let keys = parse(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    if keys.is_empty() {
        return Err(format!("{} holds no key: expected a [[key]] table for each", path.display()));
    }
    Ok(keys)
}

/// Checks a table for the file of `--keys`.
///
/// # Errors
/// It would be refused.
pub fn check_key_table(table: &str) -> Result<(), String> {
    parse(table).map(drop)
}

fn parse(text: &str) -> Result<Keys, String> {
    let file: KeyFile = Figment::from(Toml::string(text)).extract().map_err(|e| e.to_string())?;
    let mut keys: Vec<Key> = Vec::with_capacity(file.key.len());
    for table in file.key {
        let name = table.name.clone();
        let key = table.read().map_err(|e| format!("key {name:?}: {e}"))?;
        if let Some(other) = keys.iter().find(|other| other.name == key.name || other.digest == key.digest) {
            let what = if other.name == key.name { "name" } else { "key" };
            return Err(format!("key {name:?}: {:?} has the same {what}, expected each once", other.name));
        }
        keys.push(key);
    }
    Ok(Keys::new(keys))
}

impl KeyTable {
    fn read(self) -> Result<Key, String> {
        let is_name = |name: &str| !name.is_empty() && name.len() <= 100 && !name.chars().any(char::is_control);
        if !is_name(&self.name) {
            return Err("its name must have 1 to 100 characters".to_owned());
        }
        let digest = match (&self.key, &self.sha256) {
            (Some(key), None) => digest(key)?,
            (None, Some(sha256)) => digest(&format!("sha256:{sha256}"))
                .map_err(|_| "sha256 must have 64 hex digits: those that `softserve key` prints".to_owned())?,
            _ => return Err("expected either \"sha256\" or \"key\"".to_owned()),
        };
        let listed = self.roles.unwrap_or_else(|| vec![Role::Infer]);
        let has = |role| listed.contains(&role);
        let roles = Roles { infer: has(Role::Infer), metrics: has(Role::Metrics), admin: has(Role::Admin) };
        if listed.is_empty() {
            return Err("roles is empty, expected some of \"infer\", \"metrics\" and \"admin\"".to_owned());
        }
        let tasks = self.tasks.map_or_else(TaskPatterns::all, TaskPatterns::new);
        if roles.metrics && !tasks.is_all() {
            return Err("the role \"metrics\" shows the names of all tasks: leave out either it or tasks".to_owned());
        }
        let limits = KeyLimits {
            requests_per_minute: self.requests_per_minute,
            tokens_per_minute: self.tokens_per_minute,
            concurrent_requests: self.concurrent_requests,
        };
        for (name, limit) in [
            ("requests_per_minute", limits.requests_per_minute),
            ("tokens_per_minute", limits.tokens_per_minute),
            ("concurrent_requests", limits.concurrent_requests),
        ] {
            if limit == Some(0) {
                return Err(format!("{name} is 0, expected 1 or more; leave it out for no limit"));
            }
        }
        Ok(Key {
            tenant: self.tenant.as_deref().map_or_else(|| tenant_of(b"key", &digest), named_tenant),
            digest,
            name: self.name,
            roles,
            tasks,
            expires: self.expires.as_deref().map(time).transpose()?,
            limits,
        })
    }
}

/// A date, or a date and time, in UTC.
fn time(text: &str) -> Result<SystemTime, String> {
    let whole = if text.len() == "2027-01-31".len() { format!("{text}T00:00:00Z") } else { text.to_owned() };
    let time = humantime::parse_rfc3339(&whole).map_err(|_| {
        format!("expires is {text:?}, expected a date such as \"2027-01-31\" or a time in UTC such as \"2027-01-31T12:00:00Z\"")
    })?;
    // A time before 1970 would be a slip of the pen.
    if time < SystemTime::UNIX_EPOCH + Duration::from_secs(1) {
        return Err(format!("expires is {text:?}, which is before 1970"));
    }
    Ok(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"
        [[key]]
        name = "ci"
        sha256 = "9c3ed6ea12eab28b29a0cbbdb2c5fa9f1a0a0d25a6a8ac1bf2fd3ed1d6b8a9c0"
        roles = ["admin"]
        tasks = ["team-a-*", "shared"]
        expires = "2027-01-31"

        [[key]]
        name = "app"
        key = "some-long-key"
        tenant = "acme"
        requests_per_minute = 600
        tokens_per_minute = 100000
        concurrent_requests = 8
    "#;

    #[test]
    fn a_table_says_what_a_key_opens_and_what_it_leaves_out_has_its_default() -> Result<(), String> {
        let keys = parse(WHOLE)?;
        let [ci, app] = &keys.iter().collect::<Vec<_>>()[..] else { panic!("two keys") };
        assert_eq!(
            (ci.roles.to_string(), ci.tasks.allow("team-a-x"), ci.tasks.allow("other")),
            ("admin".into(), true, false)
        );
        assert_eq!(
            ci.expires.map(|at| humantime::format_rfc3339(at).to_string()),
            Some("2027-01-31T00:00:00Z".to_owned())
        );
        assert_eq!((app.roles.to_string(), app.tasks.is_all(), app.expires), ("infer".into(), true, None));
        let limits = KeyLimits {
            requests_per_minute: Some(600),
            tokens_per_minute: Some(100_000),
            concurrent_requests: Some(8),
        };
        assert_eq!((app.limits, app.tenant), (limits, named_tenant("acme")));
        assert_eq!(keys.find("some-long-key").map(|key| key.name.as_str()), Some("app"));
        Ok(())
    }

    #[test]
    fn a_wrong_table_is_refused_by_its_name_with_what_is_wrong() {
        for (table, expected) in [
            ("name = \"a\"", "\"sha256\" or \"key\""),
            ("name = \"a\"\nkey = \"some-long-key\"\nsha256 = \"00\"", "\"sha256\" or \"key\""),
            ("name = \"a\"\nkey = \"short\"", "at least 8"),
            ("name = \"a\"\nsha256 = \"00\"", "64 hex digits"),
            ("name = \"\"\nkey = \"some-long-key\"", "1 to 100 characters"),
            ("name = \"a\"\nkey = \"some-long-key\"\nroles = []", "roles is empty"),
            ("name = \"a\"\nkey = \"some-long-key\"\nroles = [\"root\"]", "root"),
            (
                "name = \"a\"\nkey = \"some-long-key\"\nroles = [\"metrics\"]\ntasks = [\"b\"]",
                "shows the names of all tasks",
            ),
            ("name = \"a\"\nkey = \"some-long-key\"\nexpires = \"tomorrow\"", "2027-01-31"),
            ("name = \"a\"\nkey = \"some-long-key\"\nrequests_per_minute = 0", "requests_per_minute is 0"),
            ("name = \"a\"\nkey = \"some-long-key\"\nrole = \"infer\"", "role"),
        ] {
            let error = parse(&format!("[[key]]\n{table}")).expect_err(table);
            assert!(error.contains(expected), "{error}");
        }
        let twice = "[[key]]\nname = \"a\"\nkey = \"some-long-key\"\n[[key]]\nname = \"b\"\nkey = \"some-long-key\"";
        assert!(parse(twice).expect_err("twice").contains("the same key"));
    }
}
