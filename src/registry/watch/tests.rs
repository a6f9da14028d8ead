//! Changes on the disk show without a call.

use std::fs;

use super::*;
use crate::{
    prompt::{fixtures, fixtures::prompt, format::PromptFiles},
    registry::{Activation, RegistryConfig},
};

fn open(root: &Path) -> Arc<Registry> {
    let config = RegistryConfig {
        root: root.to_owned().into(),
        fit: fixtures::fit(),
        max_tasks: 8,
        max_versions_per_task: 8,
        max_loaded_bytes: 64 << 20,
        poll_interval: Duration::from_secs(10),
        keep: None,
    };
    Registry::open(config).expect("opens")
}

/// Waits until a task's active version is this one; `None` is until there is no such task.
fn wait_for(registry: &Registry, task: &str, files: Option<&PromptFiles>) {
    let deadline = Instant::now() + Duration::from_secs(30);
    let expected = files.map(PromptFiles::digest);
    while registry.resolve(task, None).ok().map(|version| version.digest) != expected {
        assert!(Instant::now() < deadline, "{task} never came to be {expected:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn folders_that_come_change_and_go_are_followed() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    let _watcher = registry.watch().expect("watches");
    let task = dir.path().join("a");
    prompt(0.1).write_dir(&task).expect("writes");
    wait_for(&registry, "a", Some(&prompt(0.1)));

    // A wrong one beside it shows that the good one is kept once the scan has passed both.
    fs::write(task.join("adapter_model.safetensors"), "half").expect("writes");
    prompt(0.3).write_dir(&dir.path().join("b")).expect("writes");
    wait_for(&registry, "b", Some(&prompt(0.3)));
    wait_for(&registry, "a", Some(&prompt(0.1)));

    prompt(0.2).write_dir(&task).expect("writes");
    wait_for(&registry, "a", Some(&prompt(0.2)));
    fs::remove_dir_all(&task).expect("removes");
    wait_for(&registry, "a", None);
}

#[test]
fn another_process_is_followed_and_own_writes_do_no_harm() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (here, there) = (open(dir.path()), open(dir.path()));
    let _watcher = here.watch().expect("watches");
    let task = || "a".parse().expect("a name");
    there.publish(task(), prompt(0.1), true).expect("publishes");
    wait_for(&here, "a", Some(&prompt(0.1)));
    here.publish(task(), prompt(0.2), true).expect("publishes");
    wait_for(&here, "a", Some(&prompt(0.2)));
    there.activate("a", &Activation::One(prompt(0.1).digest().id()), Some(2)).expect("activates");
    wait_for(&here, "a", Some(&prompt(0.1)));
    assert_eq!(here.task("a").expect("is there").generation, 3);
    there.delete_task("a").expect("deletes");
    wait_for(&here, "a", None);
}

#[test]
fn the_guard_ends_the_watching_and_does_not_keep_the_registry() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    let watcher = registry.watch().expect("watches");
    let weak = Arc::downgrade(&registry);
    drop(watcher);
    drop(registry);
    assert!(weak.upgrade().is_none());
}

#[test]
fn reading_and_staging_are_no_changes() {
    let root = Path::new("/prompts");
    let event = |kind, path: &str| Event::new(kind).add_path(path.into());
    let open = EventKind::Access(AccessKind::Open(AccessMode::Read));
    let written = EventKind::Access(AccessKind::Close(AccessMode::Write));
    assert!(!is_change(&event(open, "/prompts/a/task.json"), root));
    assert!(!is_change(&event(written, "/prompts/.staging-x/task.json"), root));
    assert!(is_change(&event(written, "/prompts/a/task.json"), root));
    assert!(is_change(&event(EventKind::Any, "/prompts/a"), root));
    assert!(is_change(&event(EventKind::Any, "/prompts"), root));
}
