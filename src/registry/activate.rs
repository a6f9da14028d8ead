//! Changes of which versions answer: activate, split, roll back, name by an alias. Every change is one write of `active.json`.

use std::sync::Arc;

use super::{
    Registry, RegistryError, TaskEntry,
    publish::until_first,
    routing::{MAX_ALIASES, MAX_SHARES, Routing, is_alias, is_weight},
    state::TaskState,
    store::Basis,
};
use crate::prompt::{Digest, TaskName};

/// Which versions are to answer requests that name none.
#[derive(Debug, Clone, PartialEq)]
pub enum Activation {
    /// One version, by its id or the beginning of its digest.
    One(String),
    /// Several with their shares of the requests.
    Split(Vec<(String, f64)>),
}

/// What a change did.
#[derive(Debug, Clone)]
pub struct Activated {
    pub task: TaskEntry,
    /// The id of the active version before.
    pub before: Option<String>,
}

impl Registry {
    /// Decides which versions answer, if the generation is still `expected`. It ends a split. Blocks on the store.
    pub fn activate(
        &self,
        task: &str,
        activation: &Activation,
        expected: Option<u64>,
    ) -> Result<Activated, RegistryError> {
        self.change(task, expected, |name, state| {
            let mut routing = state.routing.clone();
            let (active, weights) = match activation {
                Activation::One(version) => (state.find(name, version)?.digest, Vec::new()),
                Activation::Split(shares) => {
                    let weights = weights(name, state, shares)?;
                    let by_weight = |a: &&(Digest, f64), b: &&(Digest, f64)| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0));
                    let heaviest = weights.iter().max_by(by_weight).map(|(digest, _)| *digest);
                    let none = || RegistryError::Routing { task: name.clone(), reason: "found no version".to_owned() };
                    (heaviest.ok_or_else(none)?, weights)
                }
            };
            routing.set_shares(weights);
            if state.active == Some(active) && routing.shares == state.routing.shares {
                return Ok(None);
            }
            routing.push_previous(state.active);
            Ok(Some((active, routing)))
        })
    }

    /// Makes the version active again that was active before, if the generation is still `expected`; once more goes one further
    /// back. Blocks on the store.
    pub fn roll_back(&self, task: &str, expected: Option<u64>) -> Result<Activated, RegistryError> {
        self.change(task, expected, |name, state| {
            let mut routing = state.routing.clone();
            let is_other = |digest: &Digest| Some(*digest) != state.active || !state.routing.shares.is_empty();
            let Some(at) = routing.previous.iter().position(is_other) else {
                return Err(RegistryError::NoPreviousVersion { task: name.clone() });
            };
            let active = routing.previous[at];
            routing.previous.drain(..=at);
            routing.set_shares(Vec::new());
            Ok(Some((active, routing)))
        })
    }

    /// Has an alias name a version, or no version any more. Blocks on the store.
    pub fn set_alias(
        &self,
        task: &str,
        alias: &str,
        version: Option<&str>,
        expected: Option<u64>,
    ) -> Result<Activated, RegistryError> {
        self.change(task, expected, |name, state| {
            let refused = |reason| RegistryError::Routing { task: name.clone(), reason };
            let active = state.active.ok_or_else(|| RegistryError::NoActiveVersion { task: name.clone() })?;
            let mut routing = state.routing.clone();
            match version {
                Some(_) if !is_alias(alias) => {
                    return Err(refused(format!(
                        "{:?} is not an alias: expected 1 to 63 lower-case letters, digits, '-' or '_', of which one could be \
                         in no version's id, such as \"latest-approved\"",
                        alias.chars().take(80).collect::<String>()
                    )));
                }
                Some(version) => {
                    let digest = state.find(name, version)?.digest;
                    routing.aliases.insert(alias.to_owned(), digest);
                    if routing.aliases.len() > MAX_ALIASES {
                        return Err(refused(format!("it has {MAX_ALIASES} aliases, which is the maximum; delete one first")));
                    }
                }
                None => {
                    // The error that a request with such a version gets.
                    state.find(name, alias)?;
                    if routing.aliases.remove(alias).is_none() {
                        return Err(refused(format!("{alias:?} is a version, not an alias")));
                    }
                }
            }
            Ok((routing != state.routing).then_some((active, routing)))
        })
    }

    /// Writes what `decide` wants the active version and the routing to be, and then shows it; `None` changes nothing.
    fn change(
        &self,
        task: &str,
        expected: Option<u64>,
        decide: impl Fn(&TaskName, &TaskState) -> Result<Option<(Digest, Routing)>, RegistryError>,
    ) -> Result<Activated, RegistryError> {
        until_first(|| self.try_change(task, expected, &decide))
    }

    fn try_change(
        &self,
        task: &str,
        expected: Option<u64>,
        decide: impl Fn(&TaskName, &TaskState) -> Result<Option<(Digest, Routing)>, RegistryError>,
    ) -> Result<Activated, RegistryError> {
        let mut seen = self.writer();
        let _lock = self.store.lock();
        let (name, state, basis) = self.fresh_state(&mut seen, task)?;
        let decided = decide(&name, &state)?;
        if let Some(expected) = expected.filter(|expected| *expected != state.generation) {
            return Err(RegistryError::PreconditionFailed { expected: expected.to_string(), found: state.generation });
        }
        let before = state.active.map(|active| active.id());
        let state = match decided {
            None => state,
            Some((active, routing)) => self.route(&name, &state, &basis, active, routing)?,
        };
        Ok(Activated { task: self.entry(&name, &state), before })
    }

    /// Makes a version the active one, with the routing beside it. All versions that will answer have to be readable.
    pub(super) fn route(
        &self,
        task: &TaskName,
        state: &Arc<TaskState>,
        basis: &Basis,
        active: Digest,
        routing: Routing,
    ) -> Result<Arc<TaskState>, RegistryError> {
        let mut loaded = None;
        for digest in routing.shares.iter().map(|(digest, _)| *digest).chain([active]) {
            let stored =
                state.by_digest(digest).ok_or_else(|| RegistryError::NoActiveVersion { task: task.clone() })?;
            loaded = Some(self.load(task, stored)?);
        }
        let generation = state.generation.max(basis.generation).saturating_add(1);
        self.store.write_active(task, &routing.to_file(active, generation), basis)?;
        tracing::info!(%task, version = %active, generation, "activated");
        let state = TaskState { generation, active: Some(active), routing, ..TaskState::clone(state) };
        Ok(self.show(task, state, loaded.as_ref()))
    }
}

/// The versions of a split with their weights.
fn weights(task: &TaskName, state: &TaskState, shares: &[(String, f64)]) -> Result<Vec<(Digest, f64)>, RegistryError> {
    let refused = |reason| RegistryError::Routing { task: task.clone(), reason };
    if !(1..=MAX_SHARES).contains(&shares.len()) {
        return Err(refused(format!("found {} versions, expected 1 to {MAX_SHARES}", shares.len())));
    }
    let mut weights: Vec<(Digest, f64)> = Vec::with_capacity(shares.len());
    for (version, weight) in shares {
        if !is_weight(*weight) {
            return Err(refused(format!("the share of {version} is {weight}, expected a number above 0")));
        }
        let digest = state.find(task, version)?.digest;
        if weights.iter().any(|(other, _)| *other == digest) {
            return Err(refused(format!("version {} has two shares, expected each version once", digest.id())));
        }
        weights.push((digest, *weight));
    }
    Ok(weights)
}
