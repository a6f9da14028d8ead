//! The keys that callers show, and what each opens. Only their SHA-256 is kept.

use std::{
    fmt,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConditionallySelectable as _, ConstantTimeEq as _};

/// A set of keys.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Keys(Vec<Arc<Key>>);

/// A key, and what it opens.
#[derive(Clone, PartialEq, Eq)]
pub struct Key {
    /// The SHA-256 of the key.
    pub digest: [u8; 32],
    /// What logs call it.
    pub name: String,
    /// Whom its requests are counted for, never 0. Keys of one tenant share what the prefix cache holds of their inputs.
    pub tenant: u64,
    pub roles: Roles,
    pub tasks: TaskPatterns,
    /// From when on it opens nothing.
    pub expires: Option<SystemTime>,
    pub limits: KeyLimits,
}

/// What a key may be used for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Roles {
    /// Requests that ask the model something, and the lists of what can be asked.
    pub infer: bool,
    /// `GET /metrics`.
    pub metrics: bool,
    /// The routes under `/v1/admin`.
    pub admin: bool,
}

/// What a key may use at the most; `None` is as much as the server has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeyLimits {
    pub requests_per_minute: Option<u32>,
    /// Tokens of inputs and of answers.
    pub tokens_per_minute: Option<u32>,
    /// Requests that are being answered at the same time.
    pub concurrent_requests: Option<u32>,
}

/// The tasks that a key may use, as patterns in which `*` stands for any characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskPatterns(Arc<[String]>);

impl TaskPatterns {
    /// These patterns.
    pub fn new(patterns: Vec<String>) -> Self {
        Self(patterns.into())
    }

    /// Every task.
    pub fn all() -> Self {
        Self::new(vec!["*".to_owned()])
    }

    /// Whether every task is allowed.
    pub fn is_all(&self) -> bool {
        self.0.iter().any(|pattern| pattern == "*")
    }

    /// Whether a task of this name is allowed, be there one or not.
    pub fn allow(&self, task: &str) -> bool {
        self.0.iter().any(|pattern| matches(pattern, task))
    }

    /// The patterns.
    pub fn patterns(&self) -> &[String] {
        &self.0
    }
}

/// Whether a text is as a pattern says. Takes the first place for what stands between two stars, which is enough.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut text) = text.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        match text.find(part) {
            Some(at) => text = &text[at + part.len()..],
            None => return false,
        }
    }
    text.ends_with(last)
}

impl Roles {
    /// What an API key has that was typed, or stands in a file without more.
    pub const API: Self = Self { infer: true, metrics: true, admin: false };
    /// What an admin key has that was typed, or stands in a file without more.
    pub const ADMIN: Self = Self { infer: true, metrics: true, admin: true };
}

impl fmt::Display for Roles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [("infer", self.infer), ("metrics", self.metrics), ("admin", self.admin)];
        let names: Vec<_> = all.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect();
        f.write_str(&names.join(", "))
    }
}

impl Key {
    /// A key that opens all that its roles do, for as long as it is known.
    fn simple(digest: [u8; 32], tenant: Option<&str>, roles: Roles) -> Self {
        let tenant = tenant.map_or_else(|| tenant_of(b"key", &digest), named_tenant);
        let name = format!("key-{}", hex::encode(&digest[..4]));
        Self { digest, name, tenant, roles, tasks: TaskPatterns::all(), expires: None, limits: KeyLimits::default() }
    }

    /// Whether the key opens nothing any more.
    pub fn has_expired(&self) -> bool {
        self.expires
            .is_some_and(|expires| expires.duration_since(SystemTime::now()).unwrap_or(Duration::ZERO).is_zero())
    }
}

/// The shortest key, in bytes: shorter ones can be guessed.
const MIN_KEY: usize = 8;

impl Keys {
    /// These keys.
    pub fn new(keys: Vec<Key>) -> Self {
        Self(keys.into_iter().map(Arc::new).collect())
    }

    /// Keys typed by the user, and one a line from a file: either the key itself or
    /// `sha256:<64 hex digits>`. Each key is a tenant of its own, unless `tenant=NAME` and a space
    /// stand before it: keys of one name are one tenant. Empty lines and lines that begin with `#`
    /// are skipped.
    pub fn read(typed: &[String], file: Option<&Path>, roles: Roles) -> Result<Self, String> {
        let mut keys = typed.iter().map(|key| parse(key, roles)).collect::<Result<Vec<_>, _>>()?;
        if let Some(path) = file {
            let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
            let before = keys.len();
            for (i, line) in text.lines().map(str::trim).enumerate() {
                if !line.is_empty() && !line.starts_with('#') {
                    keys.push(parse(line, roles).map_err(|e| format!("{} line {}: {e}", path.display(), i + 1))?);
                }
            }
            if keys.len() == before {
                return Err(format!("{} holds no key: expected one a line", path.display()));
            }
        }
        Ok(Self::new(keys))
    }

    /// The keys of both sets. A key that is in both opens what it does in either.
    pub fn and(mut self, others: Self) -> Self {
        for other in others.0 {
            match self.0.iter_mut().find(|key| key.digest == other.digest) {
                Some(key) => {
                    let (a, b) = (key.roles, other.roles);
                    let roles =
                        Roles { infer: a.infer || b.infer, metrics: a.metrics || b.metrics, admin: a.admin || b.admin };
                    *key = Arc::new(Key { roles, ..Key::clone(&other) });
                }
                None => self.0.push(other),
            }
        }
        self
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each key.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Key>> {
        self.0.iter()
    }

    /// The key that `shown` is, be it expired or not. Takes the same time however much of it was right.
    pub fn find(&self, shown: &str) -> Option<&Arc<Key>> {
        let digest = Sha256::digest(shown.as_bytes());
        let (mut found, mut index) = (Choice::from(0), 0u64);
        for (i, known) in (0u64..).zip(&self.0) {
            let same = known.digest.ct_eq(digest.as_slice());
            index.conditional_assign(&i, same);
            found |= same;
        }
        if bool::from(found) { self.0.get(usize::try_from(index).ok()?) } else { None }
    }
}

/// One key as it is written, with the name of its tenant or without.
fn parse(text: &str, roles: Roles) -> Result<Key, String> {
    let Some(named) = text.strip_prefix("tenant=") else {
        return Ok(Key::simple(digest(text)?, None, roles));
    };
    let (name, key) = named.split_once(char::is_whitespace).unwrap_or((named, ""));
    if name.is_empty() || key.trim().is_empty() {
        return Err("found \"tenant=\", expected tenant=NAME, a space and the key".to_owned());
    }
    Ok(Key::simple(digest(key.trim())?, Some(name), roles))
}

/// The number of a tenant that has a name.
pub(super) fn named_tenant(name: &str) -> u64 {
    tenant_of(b"name", name.as_bytes())
}

/// A number for a tenant; 0 is left to those who show no key.
pub(super) fn tenant_of(kind: &[u8], name: &[u8]) -> u64 {
    let hash = Sha256::new().chain_update(kind).chain_update(name).finalize();
    hash.iter().take(8).fold(0, |number, &byte| number << 8 | u64::from(byte)).max(1)
}

/// The SHA-256 of a key that is written as itself or as `sha256:<64 hex digits>`.
pub(super) fn digest(key: &str) -> Result<[u8; 32], String> {
    if let Some(hex_digits) = key.strip_prefix("sha256:") {
        let mut digest = [0; 32];
        hex::decode_to_slice(hex_digits, &mut digest)
            .map_err(|_| "found \"sha256:\" and then something else than 64 hex digits".to_owned())?;
        return Ok(digest);
    }
    if key.len() < MIN_KEY {
        return Err(format!("found a key of {} bytes, expected at least {MIN_KEY}", key.len()));
    }
    Ok(Sha256::digest(key.as_bytes()).into())
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({})", self.0.len())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_known_by_itself_or_by_its_digest_in_a_file() -> Result<(), Box<dyn std::error::Error>> {
        let file = tempfile::NamedTempFile::new()?;
        let hashed = hex::encode(Sha256::digest(b"second-key"));
        std::fs::write(file.path(), format!("# keys\n\nfirst-key\nsha256:{hashed}\n"))?;
        let keys = Keys::read(&["typed-key".to_owned()], Some(file.path()), Roles::API)?;
        for key in ["typed-key", "first-key", "second-key"] {
            assert!(keys.find(key).is_some_and(|key| key.roles == Roles::API), "{key}");
        }
        for key in ["", "# keys", "typed-ke", "typed-key ", &hashed] {
            assert!(keys.find(key).is_none(), "{key}");
        }
        assert_eq!(format!("{keys:?}"), "Keys(3)");
        Ok(())
    }

    #[test]
    fn each_key_is_a_tenant_of_its_own_unless_keys_name_the_same() -> Result<(), String> {
        let typed =
            ["first-key", "second-key", "tenant=acme third-key", "tenant=acme fourth-key", "tenant=other fifth-key"];
        let keys = Keys::read(&typed.map(str::to_owned), None, Roles::API)?;
        let tenant = |key| keys.find(key).map(|key| key.tenant);
        assert_eq!(tenant("third-key"), tenant("fourth-key"));
        let different: std::collections::HashSet<_> =
            ["first-key", "second-key", "third-key", "fifth-key", "unknown-key"].map(tenant).into();
        assert_eq!((different.len(), tenant("unknown-key"), tenant("tenant=acme third-key")), (5, None, None));
        for bad in ["tenant=acme", "tenant= some-long-key", "tenant=acme short"] {
            assert!(Keys::read(&[bad.to_owned()], None, Roles::API).is_err(), "{bad}");
        }
        Ok(())
    }

    #[test]
    fn short_keys_and_empty_key_files_are_refused() -> std::io::Result<()> {
        let file = tempfile::NamedTempFile::new()?;
        assert!(Keys::read(&["short".to_owned()], None, Roles::API).is_err());
        assert!(Keys::read(&[], Some(file.path()), Roles::API).is_err());
        assert!(Keys::read(&[], Some(Path::new("no/such/file")), Roles::API).is_err());
        Ok(())
    }

    #[test]
    fn a_key_that_is_typed_twice_has_the_roles_of_both() -> Result<(), String> {
        let read = |roles| Keys::read(&["some-long-key".to_owned()], None, roles);
        let keys = read(Roles::ADMIN)?.and(read(Roles::API)?);
        assert_eq!((keys.iter().count(), keys.find("some-long-key").map(|key| key.roles)), (1, Some(Roles::ADMIN)));
        Ok(())
    }

    #[test]
    fn a_star_of_a_pattern_stands_for_any_characters() {
        for (pattern, yes, no) in [
            ("*", &["a", "team-a-x"][..], &[][..]),
            ("sentiment", &["sentiment"], &["sentiment2", "sentimen", ""]),
            ("team-a-*", &["team-a-", "team-a-topic"], &["team-b-topic", "x-team-a-y", "team-a"]),
            ("*-prod", &["a-prod", "-prod", "prod-prod"], &["a-prod-2", "prod"]),
            ("a*b*c", &["abc", "axbxc", "abbc", "abcc"], &["ab", "acb", "abcd"]),
            ("aba*aba", &["abaaba", "abaxaba"], &["aba", "ababa"]),
        ] {
            let patterns = TaskPatterns::new(vec![pattern.to_owned()]);
            assert!(yes.iter().all(|task| patterns.allow(task)), "{pattern}");
            assert!(!no.iter().any(|task| patterns.allow(task)), "{pattern}");
        }
        assert!(!TaskPatterns::new(Vec::new()).allow("a"));
    }
}
