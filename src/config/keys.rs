//! The keys that callers show. Only their SHA-256 is kept.

use std::{fmt, path::Path};

use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq as _};

/// A set of keys, as digests.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Keys(Vec<[u8; 32]>);

/// The shortest key, in bytes: shorter ones can be guessed.
const MIN_KEY: usize = 8;

impl Keys {
    /// Keys typed by the user, and one a line from a file: either the key itself or
    /// `sha256:<64 hex digits>`. Empty lines and lines that begin with `#` are skipped.
    pub fn read(typed: &[String], file: Option<&Path>) -> Result<Self, String> {
        let mut keys = typed.iter().map(|key| digest(key)).collect::<Result<Vec<_>, _>>()?;
        if let Some(path) = file {
            let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
            let before = keys.len();
            for (i, line) in text.lines().map(str::trim).enumerate() {
                if !line.is_empty() && !line.starts_with('#') {
                    keys.push(digest(line).map_err(|e| format!("{} line {}: {e}", path.display(), i + 1))?);
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
        let digest = Sha256::digest(key.as_bytes());
        let found = self.0.iter().fold(Choice::from(0), |found, known| found | known.ct_eq(digest.as_slice()));
        found.into()
    }
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
    fn short_keys_and_empty_key_files_are_refused() -> std::io::Result<()> {
        let file = tempfile::NamedTempFile::new()?;
        assert!(Keys::read(&["short".to_owned()], None).is_err());
        assert!(Keys::read(&[], Some(file.path())).is_err());
        assert!(Keys::read(&[], Some(Path::new("no/such/file"))).is_err());
        Ok(())
    }
}
