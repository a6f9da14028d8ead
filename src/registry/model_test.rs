//! Random changes against a model in a few lines: after each the registry, and a registry opened
//! anew on the same folder, are what the model says.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use proptest::prelude::*;

use super::{Activation, Bucket, PromptLocation, Registry, RegistryConfig, RegistryError};
use crate::prompt::fixtures::{fit, prompt};

const TASKS: [&str; 3] = ["a", "b", "c"];
const MAX_TASKS: usize = 2;
const MAX_VERSIONS: usize = 3;

#[derive(Debug, Clone)]
enum Op {
    Publish { task: usize, value: u8, activate: bool },
    Activate { task: usize, value: u8, expected: Option<u64> },
    DeleteVersion { task: usize, value: u8 },
    DeleteTask { task: usize },
    Rescan,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let (task, value) = (0..TASKS.len(), 0..5u8);
    let op = prop_oneof![
        6 => (task.clone(), value.clone(), any::<bool>())
            .prop_map(|(task, value, activate)| Op::Publish { task, value, activate }),
        3 => (task.clone(), value.clone(), proptest::option::of(0..4u64))
            .prop_map(|(task, value, expected)| Op::Activate { task, value, expected }),
        2 => (task.clone(), value).prop_map(|(task, value)| Op::DeleteVersion { task, value }),
        1 => task.prop_map(|task| Op::DeleteTask { task }),
        1 => Just(Op::Rescan),
    ];
    proptest::collection::vec(op, 1..16)
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Task {
    generation: u64,
    active: Option<u8>,
    versions: BTreeSet<u8>,
}

/// The tasks that are there.
type Tasks = BTreeMap<&'static str, Task>;

#[derive(Debug, Default)]
struct Model {
    tasks: Tasks,
    /// Whether a deleted task goes on where its generation was, as in a bucket, or begins anew.
    remembers: bool,
    deleted: BTreeMap<&'static str, u64>,
}

impl Model {
    fn delete(&mut self, task: &'static str) -> &'static str {
        let Some(gone) = self.tasks.remove(task) else { return "no task" };
        if self.remembers {
            self.deleted.insert(task, gone.generation + 1);
        }
        "ok"
    }
}

fn id(value: u8) -> String {
    prompt(f32::from(value)).digest().id()
}

/// What an operation comes to: nothing wrong, or an error's name.
fn apply_to_model(model: &mut Model, op: &Op) -> &'static str {
    match *op {
        Op::Publish { task, value, activate } => {
            let (known, full) = (model.tasks.contains_key(TASKS[task]), model.tasks.len() >= MAX_TASKS);
            if !known && full {
                return "full";
            }
            let generation = model.deleted.get(TASKS[task]).copied().unwrap_or_default();
            let is_new = || Task { generation, ..Task::default() };
            let state = model.tasks.entry(TASKS[task]).or_insert_with(is_new);
            if !state.versions.contains(&value) && state.versions.len() >= MAX_VERSIONS {
                return "full";
            }
            state.versions.insert(value);
            if activate && state.active != Some(value) {
                state.active = Some(value);
                state.generation += 1;
            }
        }
        Op::Activate { task, value, expected } => {
            let Some(state) = model.tasks.get_mut(TASKS[task]) else { return "no task" };
            if !state.versions.contains(&value) {
                return "no version";
            }
            if expected.is_some_and(|expected| expected != state.generation) {
                return "precondition";
            }
            if state.active != Some(value) {
                state.active = Some(value);
                state.generation += 1;
            }
        }
        Op::DeleteVersion { task, value } => {
            let Some(state) = model.tasks.get_mut(TASKS[task]) else { return "no task" };
            if !state.versions.contains(&value) {
                return "no version";
            }
            if state.versions.len() == 1 {
                model.delete(TASKS[task]);
            } else if state.active == Some(value) {
                return "active";
            } else {
                state.versions.remove(&value);
            }
        }
        Op::DeleteTask { task } => return model.delete(TASKS[task]),
        Op::Rescan => {}
    }
    "ok"
}

fn apply(registry: &Registry, op: &Op) -> &'static str {
    let outcome = match *op {
        Op::Publish { task, value, activate } => {
            let name = TASKS[task].parse().expect("a name");
            registry.publish(name, prompt(f32::from(value)), activate).map(drop)
        }
        Op::Activate { task, value, expected } => {
            registry.activate(TASKS[task], &Activation::One(id(value)), expected).map(drop)
        }
        Op::DeleteVersion { task, value } => registry.delete_version(TASKS[task], &id(value)).map(drop),
        Op::DeleteTask { task } => registry.delete_task(TASKS[task]).map(drop),
        Op::Rescan => registry.rescan(),
    };
    match outcome {
        Ok(()) => "ok",
        Err(RegistryError::TaskNotFound { .. }) => "no task",
        Err(RegistryError::VersionNotFound { .. }) => "no version",
        Err(RegistryError::PreconditionFailed { .. }) => "precondition",
        Err(RegistryError::VersionActive { .. }) => "active",
        Err(RegistryError::Full { .. }) => "full",
        Err(other) => panic!("{other:?}"),
    }
}

/// The registry in the model's terms.
fn view(registry: &Registry) -> Tasks {
    let values: BTreeMap<String, u8> = (0..5).map(|value| (id(value), value)).collect();
    let value = |version: &Arc<crate::prompt::Version>| values[&version.digest.id()];
    let task = |entry: super::TaskEntry| {
        let name = TASKS.into_iter().find(|name| *name == entry.task.as_str()).expect("a task of the test");
        let active = registry.resolve(name, None).ok();
        assert_eq!(active.as_ref().map(|version| version.digest.id()), entry.active);
        assert!(entry.unreadable.is_empty());
        let versions = entry.versions.iter().map(|entry| value(&entry.version)).collect();
        (name, Task { generation: entry.generation, active: active.as_ref().map(value), versions })
    };
    registry.tasks_page(None, TASKS.len(), |_| true).items.into_iter().map(task).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn the_registry_and_its_folder_are_what_the_model_says(ops in ops()) {
        let dir = tempfile::tempdir().expect("temp dir");
        hold(dir.path().to_owned().into(), false, &ops)?;
    }

    #[test]
    fn the_registry_and_its_bucket_are_what_the_model_says(ops in ops()) {
        let bucket = Bucket::of("memory://bucket/prompts", Arc::new(object_store::memory::InMemory::new()));
        hold(PromptLocation::Bucket(bucket), true, &ops)?;
    }
}

/// Holds a registry at this place to the model.
fn hold(root: PromptLocation, remembers: bool, ops: &[Op]) -> Result<(), TestCaseError> {
    let config = RegistryConfig {
        root,
        fit: fit(),
        max_tasks: MAX_TASKS,
        max_versions_per_task: MAX_VERSIONS,
        // Room for two versions, so that the others are read again and again.
        max_loaded_bytes: 60_000,
        poll_interval: Duration::from_secs(5),
        keep: None,
    };
    let registry = Registry::open(config.clone()).expect("opens");
    let mut model = Model { remembers, ..Model::default() };
    for op in ops {
        prop_assert_eq!(apply(&registry, op), apply_to_model(&mut model, op), "{:?}", op);
        prop_assert_eq!(&view(&registry), &model.tasks, "after {:?}", op);
        let reopened = Registry::open(config.clone()).expect("opens");
        prop_assert_eq!(&view(&reopened), &model.tasks, "reopened after {:?}", op);
        prop_assert_eq!(reopened.revision(), registry.revision());
    }
    Ok(())
}
