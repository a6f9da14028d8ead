//! Which version a request gets that names none, or an alias: the active one, or one of several by their shares.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

use super::store::Active;
use crate::prompt::{Digest, TaskName};

/// The most versions that requests are split between.
pub const MAX_SHARES: usize = 8;
/// The most aliases of a task.
pub const MAX_ALIASES: usize = 32;
/// The most versions that a task can be rolled back through.
const MAX_PREVIOUS: usize = 20;
/// The longest alias, in bytes.
const MAX_ALIAS: usize = 63;

/// How requests of a task find their version, beside the active one.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Routing {
    /// Versions with their shares of the requests, which sum to 1, in the order of their digests. Empty where the active version
    /// gets all requests.
    pub(super) shares: Vec<(Digest, f64)>,
    pub(super) aliases: BTreeMap<String, Digest>,
    /// The versions that were active before, the last one first.
    pub(super) previous: Vec<Digest>,
}

/// What decides which version of a split a request gets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Draw<'a> {
    /// Always the active version, which has the largest share.
    Active,
    /// Any, by the shares.
    Random,
    /// The same one for every request with this key, as long as the shares stay as they are; also on other replicas.
    Key(&'a str),
}

impl Draw<'_> {
    /// A number from 0 to 1 (exclusive); `None` for the active version.
    fn number(self, task: &TaskName) -> Option<f64> {
        match self {
            Self::Active => None,
            Self::Random => Some(rand::random()),
            Self::Key(key) => {
                let hash = Sha256::new().chain_update(task.as_str()).chain_update([0]).chain_update(key).finalize();
                let bits = hash.iter().take(8).fold(0u64, |bits, &byte| bits << 8 | u64::from(byte));
                // As many bits as an f64 has.
                Some((bits >> 11) as f64 / (1u64 << 53) as f64)
            }
        }
    }
}

impl Routing {
    /// The version of a split that a request gets; `None` where the active version gets all.
    pub(super) fn pick(&self, task: &TaskName, draw: Draw) -> Option<Digest> {
        let (last, _) = self.shares.last()?;
        let mut number = draw.number(task)?;
        for (digest, share) in &self.shares {
            if number < *share {
                return Some(*digest);
            }
            number -= share;
        }
        Some(*last)
    }

    /// Shares that sum to 1, in the order of their digests. One version alone is no split.
    pub(super) fn set_shares(&mut self, mut weights: Vec<(Digest, f64)>) {
        let sum: f64 = weights.iter().map(|(_, weight)| weight).sum();
        weights.iter_mut().for_each(|(_, weight)| *weight /= sum);
        weights.sort_by_key(|(digest, _)| *digest);
        self.shares = if weights.len() > 1 { weights } else { Vec::new() };
    }

    /// Notes that a version was active.
    pub(super) fn push_previous(&mut self, active: Option<Digest>) {
        if let Some(active) = active {
            self.previous.insert(0, active);
            self.previous.truncate(MAX_PREVIOUS);
        }
    }

    /// What of it uses a version, in words; `None` if nothing does.
    pub(super) fn use_of(&self, digest: Digest) -> Option<String> {
        if self.shares.iter().any(|(of, _)| *of == digest) {
            return Some("it gets a share of the requests".to_owned());
        }
        let alias = self.aliases.iter().find(|(_, of)| **of == digest);
        alias.map(|(alias, _)| format!("the alias {alias:?} names it"))
    }

    /// Forgets a version that is gone.
    pub(super) fn forget(&mut self, digest: Digest) {
        self.previous.retain(|previous| *previous != digest);
    }

    /// What a file says, as far as the versions are there; and what is wrong with it.
    pub(super) fn of_file(said: &Active, find: impl Fn(&str) -> Option<Digest>) -> (Self, Option<String>) {
        let mut routing =
            Self { previous: said.previous.iter().filter_map(|id| find(id)).collect(), ..Self::default() };
        let mut wrong = None;
        for (alias, id) in &said.aliases {
            match find(id) {
                Some(digest) if is_alias(alias) => drop(routing.aliases.insert(alias.clone(), digest)),
                Some(_) => wrong = Some(format!("{alias:?} is not an alias, so it is left out")),
                None => wrong = Some(format!("the alias {alias:?} names version {id:?}, which is not there")),
            }
        }
        let shares = said.versions.iter().map(|(id, share)| Some((find(id)?, *share)).filter(|(_, s)| is_weight(*s)));
        match shares.collect::<Option<Vec<_>>>() {
            Some(shares) if shares.len() <= MAX_SHARES => routing.set_shares(shares),
            _ => {
                wrong = Some(
                    "\"versions\" names a version that is not there, has a share that is not positive, or has too many; all \
                     requests go to \"version\""
                        .to_owned(),
                );
            }
        }
        (routing, wrong)
    }

    /// As it is written.
    pub(super) fn to_file(&self, active: Digest, generation: u64) -> Active {
        Active {
            version: Some(active.id()),
            generation,
            versions: self.shares.iter().map(|(digest, share)| (digest.id(), *share)).collect(),
            aliases: self.aliases.iter().map(|(alias, digest)| (alias.clone(), digest.id())).collect(),
            previous: self.previous.iter().map(Digest::id).collect(),
            ..Active::default()
        }
    }
}

/// Whether a share can be weighed against others.
pub(super) fn is_weight(weight: f64) -> bool {
    weight.is_finite() && weight > 0.0
}

/// Whether a text can be an alias: as a task's name, and no version's id could begin so.
pub(super) fn is_alias(text: &str) -> bool {
    let is_part = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_');
    let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    (1..=MAX_ALIAS).contains(&text.len()) && text.bytes().all(is_part) && !text.bytes().all(is_hex)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(first: u8) -> Digest {
        Digest([first; 32])
    }

    fn split() -> Routing {
        let mut routing = Routing::default();
        routing.set_shares(vec![(digest(2), 1.0), (digest(1), 9.0)]);
        routing
    }

    #[test]
    fn requests_are_split_by_the_shares_and_a_key_gets_one_version() {
        let (routing, task) = (split(), "a".parse().expect("a name"));
        assert_eq!(routing.pick(&task, Draw::Active), None);
        let count = |draws: &mut dyn Iterator<Item = Option<Digest>>| draws.filter(|d| *d == Some(digest(2))).count();
        let random = count(&mut (0..4000).map(|_| routing.pick(&task, Draw::Random)));
        assert!((300..500).contains(&random), "{random}");
        let keys: Vec<String> = (0..4000).map(|i| format!("user {i}")).collect();
        let by_key = |routing: &Routing| keys.iter().map(|key| routing.pick(&task, Draw::Key(key))).collect::<Vec<_>>();
        let keyed = by_key(&routing);
        assert!((300..500).contains(&count(&mut keyed.iter().copied())));
        assert_eq!(keyed, by_key(&routing));
        // A larger share takes keys over, and moves none the other way.
        let mut more = Routing::default();
        more.set_shares(vec![(digest(1), 0.5), (digest(2), 0.5)]);
        assert!(by_key(&more).iter().zip(&keyed).all(|(now, before)| *before == Some(digest(1)) || now == before));
    }

    #[test]
    fn what_is_written_is_read_again_and_what_names_no_version_is_left_out() {
        let mut routing = split();
        routing.aliases.insert("latest-approved".to_owned(), digest(2));
        routing.push_previous(Some(digest(2)));
        let file = routing.to_file(digest(1), 7);
        let find = |id: &str| [digest(1), digest(2)].into_iter().find(|digest| digest.id() == id);
        assert_eq!(Routing::of_file(&file, find), (routing, None));
        let (fewer, wrong) = Routing::of_file(&file, |id| find(id).filter(|found| *found == digest(1)));
        assert_eq!(fewer, Routing::default());
        assert!(wrong.is_some());
    }

    #[test]
    fn an_alias_cannot_be_taken_for_a_version() {
        for good in ["latest-approved", "canary", "v2", "x"] {
            assert!(is_alias(good), "{good}");
        }
        for bad in ["", "decade", "123456", "beef", "A", "a b", "a@b", &"x".repeat(64)] {
            assert!(!is_alias(bad), "{bad}");
        }
    }
}
