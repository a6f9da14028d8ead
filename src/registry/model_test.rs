//! Random changes against a model in a few lines: after each the registry, and a registry opened
//! anew on the same folder, are what the model says.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use proptest::prelude::*;

use super::{Activation, Registry, RegistryConfig, RegistryError};
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

type Model = BTreeMap<&'static str, Task>;

fn id(value: u8) -> String {
    prompt(f32::from(value)).digest().id()
}

/// What an operation comes to: nothing wrong, or an error's name.
fn apply_to_model(model: &mut Model, op: &Op) -> &'static str {
    match *op {
        Op::Publish { task, value, activate } => {
            let (known, full) = (model.contains_key(TASKS[task]), model.len() >= MAX_TASKS);
            if !known && full {
                return "full";
            }
            let state = model.entry(TASKS[task]).or_default();
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
            let Some(state) = model.get_mut(TASKS[task]) else { return "no task" };
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
            let Some(state) = model.get_mut(TASKS[task]) else { return "no task" };
            if !state.versions.contains(&value) {
                return "no version";
            }
            if state.versions.len() == 1 {
                model.remove(TASKS[task]);
            } else if state.active == Some(value) {
                return "active";
            } else {
                state.versions.remove(&value);
            }
        }
        Op::DeleteTask { task } => return model.remove(TASKS[task]).map_or("no task", |_| "ok"),
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
fn view(registry: &Registry) -> Model {
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
        let config = RegistryConfig {
            root: dir.path().to_owned(),
            fit: fit(),
            max_tasks: MAX_TASKS,
            max_versions_per_task: MAX_VERSIONS,
            // Room for two versions, so that the others are read again and again.
            max_loaded_bytes: 60_000,
        };
        let registry = Registry::open(config.clone()).expect("opens");
        let mut model = Model::new();
        for op in &ops {
            prop_assert_eq!(apply(&registry, op), apply_to_model(&mut model, op), "{:?}", op);
            prop_assert_eq!(&view(&registry), &model, "after {:?}", op);
            let reopened = Registry::open(config.clone()).expect("opens");
            prop_assert_eq!(&view(&reopened), &model, "reopened after {:?}", op);
        }
    }
}
