//! What is in memory of a registry that holds more than memory may.

use std::{fs, path::Path, sync::Arc};

use super::{Activation, Draw, Registry, RegistryConfig, RegistryError};
use crate::prompt::{
    TaskName, Version,
    fixtures::{self, prompt},
    format::PromptFiles,
};

/// Room for about two versions of the fixture.
const TWO_VERSIONS: u64 = 60_000;

fn open(root: &Path, max_loaded_bytes: u64) -> Arc<Registry> {
    let (root, fit) = (root.to_owned().into(), fixtures::fit());
    let poll_interval = std::time::Duration::from_secs(10);
    let config = RegistryConfig {
        root,
        fit,
        max_tasks: 10_000,
        max_versions_per_task: 8,
        max_loaded_bytes,
        poll_interval,
        keep: None,
    };
    Registry::open(config).expect("opens")
}

fn name(task: &str) -> TaskName {
    task.parse().expect("a task name")
}

fn value(i: usize) -> PromptFiles {
    prompt(i as f32 / 64.0)
}

fn folder(root: &Path, task: &str, files: &PromptFiles) -> std::path::PathBuf {
    root.join(task).join("versions").join(files.digest().id())
}

fn is_in_memory(registry: &Registry, task: &str) -> bool {
    registry.resolve_in_memory(task, None, Draw::Active).expect("is there").is_some()
}

#[test]
fn versions_beyond_the_bound_are_read_again_and_every_task_answers_with_its_own() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path(), TWO_VERSIONS);
    let tasks: Vec<String> = (0..6).map(|i| format!("t{i}")).collect();
    for (i, task) in tasks.iter().enumerate() {
        registry.publish(name(task), value(i), true).expect("publishes");
    }
    for registry in [registry, open(dir.path(), TWO_VERSIONS)] {
        for round in 0..3 {
            for (i, task) in tasks.iter().enumerate() {
                let version = registry.resolve(task, None).expect("answers");
                assert_eq!((version.digest, version.task.as_str()), (value(i).digest(), &task[..]), "round {round}");
            }
        }
        let stats = registry.residency();
        assert!(stats.bytes <= TWO_VERSIONS && (1..=2).contains(&stats.versions), "{stats:?}");
        assert!(stats.loads >= 12 && stats.evictions >= 12, "{stats:?}");
    }
}

#[test]
fn a_version_in_use_outlives_its_eviction_and_one_that_is_used_again_and_again_is_not_read_again() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path(), 64 << 20);
    registry.publish(name("a"), value(1), true).expect("publishes");
    let first = registry.resolve("a", None).expect("answers");
    let again = registry.resolve_in_memory("a", None, Draw::Active).expect("answers").expect("is in memory");
    assert!(Arc::ptr_eq(&first, &again));
    assert_eq!(registry.residency().loads, 0, "a publish leaves the version in memory");
    let reopened = open(dir.path(), 64 << 20);
    assert!(is_in_memory(&reopened, "a"), "where there is room, versions are read at the start");
}

#[test]
fn a_version_larger_than_the_bound_answers_and_is_not_kept() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path(), 1_000);
    registry.publish(name("a"), value(1), true).expect("publishes");
    for _ in 0..2 {
        assert!(!is_in_memory(&registry, "a"));
        assert_eq!(registry.resolve("a", None).expect("answers").digest, value(1).digest());
    }
    assert_eq!(registry.residency().bytes, 0);
}

#[test]
fn looking_at_everything_evicts_nothing() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path(), TWO_VERSIONS);
    for i in 0..6 {
        registry.publish(name(&format!("t{i}")), value(i), true).expect("publishes");
    }
    registry.resolve("t0", None).expect("answers");
    let before = registry.residency();
    let page = registry.tasks_page(None, 100, |_| true);
    let loaded = page.items.iter().flat_map(|task| &task.versions).filter(|version| version.loaded).count();
    assert_eq!((page.items.len(), page.next, loaded), (6, None, before.versions));
    let versions: Vec<Arc<Version>> = registry.active_page(None, 100, |_| true).items;
    assert!(versions.iter().enumerate().all(|(i, version)| version.digest == value(i).digest()));
    assert_eq!(registry.residency(), before);
}

#[test]
fn pages_follow_each_other_by_name_and_have_everything_once() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path(), 64 << 20);
    for task in ["d", "a", "c", "b", "e"] {
        registry.publish(name(task), value(1), true).expect("publishes");
    }
    let (mut found, mut after) = (Vec::new(), None::<TaskName>);
    loop {
        let page = registry.active_page(after.as_ref().map(TaskName::as_str), 2, |_| true);
        assert!(page.items.len() <= 2);
        found.extend(page.items.iter().map(|version| version.task.to_string()));
        match page.next {
            Some(next) => after = Some(next),
            None => break,
        }
    }
    assert_eq!(found, ["a", "b", "c", "d", "e"]);
    assert!(registry.active_page(Some("e"), 2, |_| true).items.is_empty());
}

#[test]
fn of_very_many_tasks_those_that_nobody_asked_for_are_known_by_name_and_read_when_they_are_needed() {
    let dir = tempfile::tempdir().expect("temp dir");
    let tasks: Vec<String> = (0..700).map(|i| format!("t{i:03}")).collect();
    for task in &tasks {
        value(1).write_dir(&dir.path().join(task)).expect("writes");
    }
    fs::create_dir(dir.path().join("t699-empty")).expect("makes");
    fs::write(dir.path().join("t650/adapter_config.json"), "{").expect("writes");
    let registry = open(dir.path(), 64 << 20);
    assert_eq!(registry.num_tasks(), 701);
    assert!(!is_in_memory(&registry, "t600"));
    assert_eq!(registry.resolve("t600", None).expect("answers").digest, value(1).digest());
    assert!(is_in_memory(&registry, "t600"));
    for wrong in ["t650", "t699-empty"] {
        assert!(matches!(registry.resolve(wrong, None), Err(RegistryError::TaskNotFound { .. })), "{wrong}");
    }
    assert_eq!(registry.num_tasks(), 699);
    registry.rescan().expect("scans");
    registry.read_ahead(|| true);
    assert_eq!(registry.num_tasks(), 699);
    assert_eq!(registry.active_page(None, 1000, |_| true).items.len(), 699);
}

#[test]
fn files_that_cannot_be_read_are_named_and_the_task_answers_again_once_they_can() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path(), 1_000);
    for (task, i) in [("a", 1), ("b", 2)] {
        registry.publish(name(task), value(i), true).expect("publishes");
    }
    let weights = folder(dir.path(), "a", &value(1)).join("adapter_model.safetensors");
    let whole = fs::read(&weights).expect("reads");
    fs::write(&weights, &whole[..whole.len() - 1]).expect("writes");
    match registry.resolve("a", None) {
        Err(RegistryError::Unreadable { version, reason, .. }) => {
            assert_eq!(version, value(1).digest().id());
            assert!(reason.contains("changed by hand"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    let entry = registry.task("a").expect("is listed");
    assert_eq!((entry.versions.len(), entry.unreadable.len()), (0, 1));
    assert_eq!(registry.resolve("b", None).expect("another task is not touched").digest, value(2).digest());
    fs::write(&weights, &whole).expect("writes");
    assert_eq!(registry.resolve("a", None).expect("answers again").digest, value(1).digest());

    fs::write(&weights, "damaged").expect("writes");
    let again = registry.publish(name("a"), value(1), true).expect("publishes");
    assert!(!again.created && again.active);
    assert_eq!(fs::read(&weights).expect("reads"), whole, "an upload of the same content repairs the files");
    assert_eq!(registry.resolve("a", None).expect("answers").digest, value(1).digest());
}

#[test]
fn a_version_whose_files_go_while_it_answers_is_kept_as_long_as_it_is_in_memory() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path(), 64 << 20);
    registry.publish(name("a"), value(1), true).expect("publishes");
    registry.publish(name("a"), value(2), false).expect("publishes");
    fs::remove_dir_all(folder(dir.path(), "a", &value(1))).expect("removes");
    registry.rescan().expect("scans");
    assert_eq!(registry.resolve("a", None).expect("answers").digest, value(1).digest());
    let cold = open(dir.path(), 64 << 20);
    assert!(matches!(cold.resolve("a", None), Err(RegistryError::NoActiveVersion { .. })));
    assert_eq!(registry.publish(name("a"), value(1), true).expect("is stored again").generation, 1);
    assert!(folder(dir.path(), "a", &value(1)).is_dir());
}

#[test]
fn a_version_that_cannot_be_read_is_not_activated_and_the_one_before_goes_on() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path(), 1_000);
    registry.publish(name("a"), value(1), true).expect("publishes");
    registry.publish(name("a"), value(2), false).expect("publishes");
    let other = value(2).digest().id();
    fs::write(folder(dir.path(), "a", &value(2)).join("adapter_config.json"), "{").expect("writes");
    assert!(matches!(
        registry.activate("a", &Activation::One(other.clone()), None),
        Err(RegistryError::Unreadable { .. })
    ));
    fs::write(dir.path().join("a/active.json"), format!(r#"{{"version": "{other}", "generation": 9}}"#))
        .expect("writes");
    registry.rescan().expect("scans");
    assert_eq!(registry.resolve("a", None).expect("answers").digest, value(1).digest());
}
