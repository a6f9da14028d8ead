//! The keys that callers show. Only their SHA-256 is kept.

use std::{fmt, path::Path};

use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConditionallySelectable as _, ConstantTimeEq as _};

/// A set of keys, as digests, each with its tenant.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Keys(Vec<Key>);

#[derive(Clone, PartialEq, Eq)]
struct Key {
    digest: [u8; 32],
    tenant: u64,
}

/// The shortest key, in bytes: shorter ones can be guessed.
const MIN_KEY: usize = 8;

impl Keys {
    /// Keys typed by the user, and one a line from a file: either the key itself or
    /// `sha256:<64 hex digits>`. Each key is a tenant of its own, unless `tenant=NAME` and a space
    /// stand before it: keys of one name are one tenant. Empty lines and lines that begin with `#`
    /// are skipped.
    pub fn read(typed: &[String], file: Option<&Path>) -> Result<Self, String> {
        let mut keys = typed.iter().map(|key| parse(key)).collect::<Result<Vec<_>, _>>()?;
        if let Some(path) = file {
            let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
            let before = keys.len();
            for (i, line) in text.lines().map(str::trim).enumerate() {
                if !line.is_empty() && !line.starts_with('#') {
                    keys.push(parse(line).map_err(|e| format!("{} line {}: {e}", path.display(), i + 1))?);
                }
            }
            if keys.len() == before {
                return Err(format!("{} holds no key: expected one a line", path.display()));
            }
        }
        Ok(Self(keys))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `key` is one of them, in a time that does not tell how much of it was right.
    pub fn contains(&self, key: &str) -> bool {
        self.tenant(key).is_some()
    }

    /// The tenant of `key`, never 0; `None` if it is not one of them. Takes the same time however much
    /// of the key was right.
    pub fn tenant(&self, key: &str) -> Option<u64> {
        let digest = Sha256::digest(key.as_bytes());
        let (mut found, mut tenant) = (Choice::from(0), 0);
        for known in &self.0 {
            let same = known.digest.ct_eq(digest.as_slice());
            tenant.conditional_assign(&known.tenant, same);
            found |= same;
        }
        bool::from(found).then_some(tenant)
    }
}

/// One key as it is written, with the name of its tenant or without.
fn parse(text: &str) -> Result<Key, String> {
    let Some(named) = text.strip_prefix("tenant=") else {
        let digest = digest(text)?;
        return Ok(Key { digest, tenant: tenant_of(b"key", &digest) });
    };
    let (name, key) = named.split_once(char::is_whitespace).unwrap_or((named, ""));
    if name.is_empty() || key.trim().is_empty() {
        return Err("found \"tenant=\", expected tenant=NAME, a space and the key".to_owned());
    }
    Ok(Key { digest: digest(key.trim())?, tenant: tenant_of(b"name", name.as_bytes()) })
}

/// A number for a tenant; 0 is left to those who show no key.
fn tenant_of(kind: &[u8], name: &[u8]) -> u64 {
    let hash = Sha256::new().chain_update(kind).chain_update(name).finalize();
    hash.iter().take(8).fold(0, |number, &byte| number << 8 | u64::from(byte)).max(1)
}

fn digest(key: &str) -> Result<[u8; 32], String> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_known_by_itself_or_by_its_digest_in_a_file() -> Result<(), Box<dyn std::error::Error>> {
        let file = tempfile::NamedTempFile::new()?;
        let hashed = hex::encode(Sha256::digest(b"second-key"));
        std::fs::write(file.path(), format!("# keys\n\nfirst-key\nsha256:{hashed}\n"))?;
        let keys = Keys::read(&["typed-key".to_owned()], Some(file.path()))?;
        for key in ["typed-key", "first-key", "second-key"] {
            assert!(keys.contains(key), "{key}");
        }
        for key in ["", "# keys", "typed-ke", "typed-key ", &hashed] {
            assert!(!keys.contains(key), "{key}");
        }
        assert_eq!(format!("{keys:?}"), "Keys(3)");
        Ok(())
    }

    #[test]
    fn each_key_is_a_tenant_of_its_own_unless_keys_name_the_same() -> Result<(), String> {
        let typed =
            ["first-key", "second-key", "tenant=acme third-key", "tenant=acme fourth-key", "tenant=other fifth-key"];
        let keys = Keys::read(&typed.map(str::to_owned), None)?;
        let tenant = |key| keys.tenant(key);
        assert_eq!(tenant("third-key"), tenant("fourth-key"));
        let different: std::collections::HashSet<_> =
            ["first-key", "second-key", "third-key", "fifth-key", "unknown-key"].map(tenant).into();
        assert_eq!((different.len(), tenant("unknown-key"), tenant("tenant=acme third-key")), (5, None, None));
        for bad in ["tenant=acme", "tenant= some-long-key", "tenant=acme short"] {
            assert!(Keys::read(&[bad.to_owned()], None).is_err(), "{bad}");
        }
        Ok(())
    }

    #[test]
    fn short_keys_and_empty_key_files_are_refused() -> std::io::Result<()> {
        let file = tempfile::NamedTempFile::new()?;
        assert!(Keys::read(&["short".to_owned()], None).is_err());
        assert!(Keys::read(&[], Some(file.path())).is_err());
        assert!(Keys::read(&[], Some(Path::new("no/such/file"))).is_err());
        Ok(())
    }
}
