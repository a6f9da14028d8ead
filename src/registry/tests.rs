//! The registry against a real folder.

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{Activation, Draw, PromptLocation, Registry, RegistryConfig, RegistryError};
use crate::prompt::{
    TaskName,
    fixtures::{self, prompt},
    format::PromptFiles,
};

fn open(root: &Path) -> Arc<Registry> {
    open_with(root, 8, 4)
}

fn open_with(root: &Path, max_tasks: usize, max_versions_per_task: usize) -> Arc<Registry> {
    open_at(root.to_owned().into(), max_tasks, max_versions_per_task)
}

pub(super) fn open_at(root: PromptLocation, max_tasks: usize, max_versions_per_task: usize) -> Arc<Registry> {
    let (fit, max_loaded_bytes) = (fixtures::fit(), 64 << 20);
    let poll_interval = Duration::from_secs(10);
    Registry::open(RegistryConfig {
        root,
        fit,
        max_tasks,
        max_versions_per_task,
        max_loaded_bytes,
        poll_interval,
        keep: None,
    })
    .expect("opens")
}

pub(super) fn name(task: &str) -> TaskName {
    task.parse().expect("a task name")
}

pub(super) fn id(files: &PromptFiles) -> String {
    files.digest().id()
}

pub(super) fn one(version: &str) -> Activation {
    Activation::One(version.to_owned())
}

pub(super) fn active_id(registry: &Registry, task: &str) -> String {
    registry.resolve(task, None).expect("has an active version").digest.id()
}

/// Every path under a folder with its content, to see that nothing changed.
fn snapshot(dir: &Path) -> Vec<(String, Option<Vec<u8>>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).expect("lists").flatten() {
        let path = entry.path();
        all.push((path.display().to_string(), if path.is_dir() { None } else { fs::read(&path).ok() }));
        if path.is_dir() {
            all.extend(snapshot(&path));
        }
    }
    all.sort();
    all
}

#[test]
fn a_published_version_answers_and_is_there_after_a_restart() {
    let dir = tempfile::tempdir().expect("temp dir");
    let files = prompt(0.5);
    let registry = open(dir.path());
    let published = registry.publish(name("a"), files.clone(), true).expect("publishes");
    assert!(published.created && published.active);
    assert_eq!(published.generation, 1);
    assert_eq!(active_id(&registry, "a"), id(&files));
    let version = dir.path().join("a/versions").join(id(&files));
    assert_eq!(PromptFiles::read_dir(&version).expect("reads"), files, "bytes are kept as uploaded");
    assert_eq!(
        fs::read_to_string(dir.path().join("a/active.json")).expect("reads").trim(),
        format!(r#"{{"version":"{}","generation":1}}"#, id(&files))
    );
    let again = open(dir.path());
    assert_eq!(active_id(&again, "a"), id(&files));
    assert_eq!(again.task("a").expect("is there").generation, 1);
}

#[test]
fn the_same_upload_is_the_same_version() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    registry.publish(name("a"), prompt(0.5), false).expect("publishes");
    assert!(matches!(registry.resolve("a", None), Err(RegistryError::NoActiveVersion { .. })));
    let stored = registry.publish(name("a"), prompt(0.5), false).expect("publishes");
    assert!(!stored.created && !stored.active);
    let activated = registry.publish(name("a"), prompt(0.5), true).expect("publishes");
    assert!(!activated.created && activated.active);
    assert_eq!(activated.generation, 1);
    assert_eq!(registry.task("a").expect("is there").versions.len(), 1);
}

#[test]
fn a_version_is_found_by_its_id_or_a_unique_beginning() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    registry.publish(name("a"), prompt(0.5), true).expect("publishes");
    registry.publish(name("a"), prompt(0.25), true).expect("publishes");
    let id = id(&prompt(0.5));
    for found in [&id[..], &id[..6], &id.to_uppercase(), &hex::encode(prompt(0.5).digest().0)] {
        assert_eq!(registry.resolve("a", Some(found)).expect(found).digest, prompt(0.5).digest());
    }
    for missing in [&id[..5], "", "000000000000", "zzzzzz"] {
        match registry.resolve("a", Some(missing)) {
            Err(RegistryError::VersionNotFound { known, .. }) => assert_eq!(known.len(), 2),
            other => panic!("{missing}: {other:?}"),
        }
    }
    match registry.resolve("b", None) {
        Err(RegistryError::TaskNotFound { known, .. }) => assert_eq!(known, [name("a")]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_invalid_prompt_changes_nothing() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    registry.publish(name("a"), prompt(0.5), true).expect("publishes");
    let before = snapshot(dir.path());
    for task in ["a", "b"] {
        let refused = registry.publish(name(task), prompt(f32::NAN), true);
        assert!(matches!(refused, Err(RegistryError::Invalid(_))));
    }
    assert_eq!(snapshot(dir.path()), before);
    assert_eq!(registry.num_tasks(), 1);
}

#[test]
fn a_publish_that_the_disk_refuses_changes_nothing() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    registry.publish(name("a"), prompt(0.5), true).expect("publishes");
    // A folder where a file must go, and a file where a folder must go.
    fs::remove_file(dir.path().join("a/active.json")).expect("removes");
    fs::create_dir(dir.path().join("a/active.json")).expect("makes");
    fs::write(dir.path().join("b"), "in the way").expect("writes");
    let before = snapshot(dir.path());
    for task in ["a", "b"] {
        let refused = registry.publish(name(task), prompt(0.25), true);
        assert!(matches!(refused, Err(RegistryError::Store(_))), "{refused:?}");
        assert_eq!(snapshot(dir.path()), before, "{task}");
    }
    assert_eq!(active_id(&registry, "a"), id(&prompt(0.5)));
    assert!(matches!(
        registry.activate("a", &one(&id(&prompt(0.25))), None),
        Err(RegistryError::VersionNotFound { .. })
    ));
    assert!(matches!(registry.task("b"), Err(RegistryError::TaskNotFound { .. })));
}

#[test]
fn what_an_interrupted_write_left_is_cleared() {
    let dir = tempfile::tempdir().expect("temp dir");
    prompt(0.1).write_dir(&dir.path().join(".staging-x/a/versions/0123456789ab")).expect("writes");
    let registry = open(dir.path());
    assert!((registry.num_tasks() == 0));
    assert!(snapshot(dir.path()).is_empty());
}

#[test]
fn writers_of_other_processes_wait_for_each_other() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registries = [open(dir.path()), open(dir.path())];
    std::thread::scope(|scope| {
        for registry in &registries {
            scope.spawn(|| {
                for i in 0..10u8 {
                    let value = f32::from(i % 4);
                    registry.publish(name("a"), prompt(value), true).expect("publishes");
                    registry.activate("a", &one(&id(&prompt(value))), None).expect("activates");
                }
            });
        }
    });
    registries.iter().for_each(|registry| registry.rescan().expect("scans"));
    let [a, b] = registries.map(|registry| registry.task("a").expect("is there"));
    assert_eq!(a.active, b.active);
    assert_eq!((a.generation, a.versions.len()), (b.generation, 4));
}

#[test]
fn a_folder_with_a_versions_name_and_other_content_is_replaced_by_the_real_one() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    registry.publish(name("a"), prompt(0.1), true).expect("publishes");
    let folder = dir.path().join("a/versions").join(id(&prompt(0.2)));
    fs::create_dir(&folder).expect("makes");
    fs::write(folder.join("adapter_config.json"), "{").expect("writes");
    registry.publish(name("a"), prompt(0.2), true).expect("publishes");
    assert_eq!(PromptFiles::read_dir(&folder).expect("reads"), prompt(0.2));
    assert_eq!(active_id(&open(dir.path()), "a"), id(&prompt(0.2)));
}

#[test]
fn tasks_and_versions_have_their_bounds() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open_with(dir.path(), 2, 2);
    for (task, value) in [("a", 0.1), ("a", 0.2), ("b", 0.1)] {
        registry.publish(name(task), prompt(value), true).expect("publishes");
    }
    for (task, value) in [("a", 0.3), ("c", 0.1)] {
        let full = registry.publish(name(task), prompt(value), true);
        assert!(matches!(full, Err(RegistryError::Full { .. })), "{full:?}");
    }
    assert!(registry.publish(name("a"), prompt(0.1), true).is_ok(), "what is there needs no room");
    let smaller = open_with(dir.path(), 1, 1);
    assert_eq!(smaller.num_tasks(), 1);
    assert_eq!(active_id(&smaller, "a"), id(&prompt(0.1)), "the active version is the one that stays");
}

#[test]
fn activation_honours_the_generation() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    registry.publish(name("a"), prompt(0.1), true).expect("publishes");
    registry.publish(name("a"), prompt(0.2), false).expect("publishes");
    let second = id(&prompt(0.2));
    let refused = registry.activate("a", &one(&second), Some(7));
    assert!(matches!(refused, Err(RegistryError::PreconditionFailed { found: 1, .. })), "{refused:?}");
    assert_eq!(registry.activate("a", &one(&second), Some(1)).expect("activates").task.generation, 2);
    assert_eq!(
        registry.activate("a", &one(&second), Some(2)).expect("is active").task.generation,
        2,
        "nothing changed"
    );
    assert_eq!(active_id(&registry, "a"), second);
    assert_eq!(open(dir.path()).task("a").expect("is there").generation, 2);
}

#[test]
fn the_active_version_goes_only_as_the_last_and_takes_its_task_along() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    let (first, second) = (id(&prompt(0.1)), id(&prompt(0.2)));
    registry.publish(name("a"), prompt(0.1), true).expect("publishes");
    registry.publish(name("a"), prompt(0.2), false).expect("publishes");
    assert!(matches!(registry.delete_version("a", &first), Err(RegistryError::VersionActive { .. })));
    let held = registry.resolve("a", Some(&second)).expect("is there");
    registry.delete_version("a", &second).expect("deletes");
    assert!(matches!(registry.resolve("a", Some(&second)), Err(RegistryError::VersionNotFound { .. })));
    assert_eq!(held.prompt.num_virtual_tokens(), 5, "a running request keeps what it holds");
    registry.delete_version("a", &first).expect("deletes");
    assert!(matches!(registry.delete_task("a"), Err(RegistryError::TaskNotFound { .. })));
    assert!(snapshot(dir.path()).is_empty());
}

#[test]
fn a_plain_peft_directory_is_served_as_it_is() {
    let dir = tempfile::tempdir().expect("temp dir");
    prompt(0.1).write_dir(&dir.path().join("a")).expect("writes");
    fs::write(dir.path().join("a/README.md"), "hello").expect("writes");
    let before = snapshot(dir.path());
    let registry = open(dir.path());
    assert_eq!(active_id(&registry, "a"), id(&prompt(0.1)));
    assert_eq!(registry.task("a").expect("is there").generation, 1);
    assert!(!registry.publish(name("a"), prompt(0.1), true).expect("is there").created);
    assert_eq!(snapshot(dir.path()), before);

    registry.publish(name("a"), prompt(0.2), true).expect("publishes");
    for registry in [&registry, &open(dir.path())] {
        assert_eq!(active_id(registry, "a"), id(&prompt(0.2)));
        assert_eq!(registry.task("a").expect("is there").versions.len(), 2);
    }
    assert_eq!(registry.activate("a", &one(&id(&prompt(0.1))), Some(2)).expect("activates").task.generation, 3);
    assert_eq!(active_id(&open(dir.path()), "a"), id(&prompt(0.1)));

    registry.activate("a", &one(&id(&prompt(0.2))), None).expect("activates");
    registry.delete_version("a", &id(&prompt(0.1))).expect("deletes");
    assert_eq!(open(dir.path()).task("a").expect("is there").versions.len(), 1);
    assert!(dir.path().join("a/README.md").exists(), "what is no part of the prompt stays");
}

#[test]
fn a_wrong_folder_is_left_out_and_keeps_no_other_from_being_served() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    registry.publish(name("good"), prompt(0.1), true).expect("publishes");
    prompt(f32::NAN).write_dir(&dir.path().join("nan")).expect("writes");
    PromptFiles { adapter_config: None, ..prompt(0.2) }.write_dir(&dir.path().join("cut-short")).expect("writes");
    fs::create_dir_all(dir.path().join("empty")).expect("makes");
    fs::create_dir_all(dir.path().join("Not A Name")).expect("makes");
    fs::write(dir.path().join("a-file"), "x").expect("writes");
    // A version whose files were changed by hand is not that version.
    prompt(0.3).write_dir(&dir.path().join("good/versions/0123456789ab")).expect("writes");
    for registry in [&open(dir.path()), &registry] {
        registry.rescan().expect("scans");
        assert_eq!(registry.num_tasks(), 1);
        assert_eq!(registry.task("good").expect("is there").versions.len(), 1);
    }
}

#[test]
fn a_version_that_was_half_written_is_taken_once_it_is_whole() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    registry.publish(name("a"), prompt(0.1), true).expect("publishes");
    let folder = dir.path().join("a/versions").join(id(&prompt(0.2)));
    let part = PromptFiles { weights: None, ..prompt(0.2) };
    part.write_dir(&folder).expect("writes");
    for _ in 0..3 {
        registry.rescan().expect("scans");
        assert_eq!(registry.task("a").expect("is there").versions.len(), 1);
    }
    prompt(0.2).write_dir(&folder).expect("writes");
    registry.rescan().expect("scans");
    assert_eq!(registry.task("a").expect("is there").versions.len(), 2);
}

/// Makes a folder's files look as if they had been there for an hour.
fn age(dir: &Path) {
    for entry in fs::read_dir(dir).expect("lists").flatten().filter(|e| e.path().is_file()) {
        let file = fs::File::options().write(true).open(entry.path()).expect("opens");
        file.set_modified(SystemTime::now() - Duration::from_secs(3600)).expect("sets");
    }
}

#[test]
fn folders_that_lie_still_are_not_read_again_and_changes_to_them_are_seen() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (good, wrong, away) = (dir.path().join("good"), dir.path().join("wrong"), dir.path().join(".away"));
    prompt(0.1).write_dir(&good).expect("writes");
    prompt(f32::NAN).write_dir(&wrong).expect("writes");
    age(&good);
    age(&wrong);
    let registry = open(dir.path());
    let held = registry.resolve("good", None).expect("answers");
    registry.rescan().expect("scans");
    assert!(Arc::ptr_eq(&held, &registry.resolve("good", None).expect("answers")));
    assert!(registry.task("wrong").is_err());

    prompt(0.2).write_dir(&wrong).expect("writes");
    registry.rescan().expect("scans");
    assert_eq!(active_id(&registry, "wrong"), id(&prompt(0.2)));

    fs::create_dir(&away).expect("makes");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::rename(good.join(name), away.join(name)).expect("moves");
    }
    registry.rescan().expect("scans");
    assert!(registry.task("good").is_err());
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::rename(away.join(name), good.join(name)).expect("moves");
    }
    registry.rescan().expect("scans");
    assert_eq!(active_id(&registry, "good"), id(&prompt(0.1)));
}

#[test]
fn a_generation_written_by_hand_has_no_end_to_run_over() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    registry.publish(name("a"), prompt(0.1), true).expect("publishes");
    let text = format!(r#"{{"version": "{}", "generation": {}}}"#, id(&prompt(0.1)), u64::MAX);
    fs::write(dir.path().join("a/active.json"), text).expect("writes");
    let published = registry.publish(name("a"), prompt(0.2), true).expect("publishes");
    assert_eq!(published.generation, u64::MAX);
    assert_eq!(active_id(&open(dir.path()), "a"), id(&prompt(0.2)));
}

#[test]
fn a_named_adapter_one_folder_down_is_followed_and_deleted_like_any_other() {
    let dir = tempfile::tempdir().expect("temp dir");
    let folder = dir.path().join("a/french");
    prompt(0.1).write_dir(&folder).expect("writes");
    fs::write(dir.path().join("a/task.json"), r#"{"description": "x"}"#).expect("writes");
    let registry = open(dir.path());
    let with_task = |value| PromptFiles { task: Some(r#"{"description": "x"}"#.into()), ..prompt(value) };
    assert_eq!(active_id(&registry, "a"), id(&with_task(0.1)));
    prompt(0.2).write_dir(&folder).expect("writes");
    registry.rescan().expect("reads");
    assert_eq!(active_id(&registry, "a"), id(&with_task(0.2)));

    registry.publish(name("a"), prompt(0.3), true).expect("publishes");
    fs::write(folder.join("README.md"), "hello").expect("writes");
    registry.delete_version("a", &id(&with_task(0.2))).expect("deletes");
    for registry in [&registry, &open(dir.path())] {
        assert_eq!(active_id(registry, "a"), id(&prompt(0.3)));
        assert_eq!(registry.task("a").expect("is there").versions.len(), 1);
    }
    assert!(folder.join("README.md").exists(), "what is no part of the prompt stays");
}

#[test]
fn a_half_written_plain_directory_keeps_the_version_before_it() {
    let dir = tempfile::tempdir().expect("temp dir");
    let task = dir.path().join("a");
    prompt(0.1).write_dir(&task).expect("writes");
    let registry = open(dir.path());
    let whole = prompt(0.2).weights.expect("weights");
    fs::write(task.join("adapter_model.safetensors"), &whole[..whole.len() / 2]).expect("writes");
    registry.rescan().expect("scans");
    assert_eq!(active_id(&registry, "a"), id(&prompt(0.1)));
    fs::write(task.join("adapter_model.safetensors"), &whole).expect("writes");
    registry.rescan().expect("scans");
    assert_eq!(active_id(&registry, "a"), id(&prompt(0.2)));
    let entry = registry.task("a").expect("is there");
    assert_eq!((entry.generation, entry.versions.len()), (2, 1));
    fs::remove_dir_all(&task).expect("removes");
    registry.rescan().expect("scans");
    assert!((registry.num_tasks() == 0));
}

#[test]
fn what_another_replica_does_is_followed() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (here, there) = (open(dir.path()), open(dir.path()));
    there.publish(name("a"), prompt(0.1), true).expect("publishes");
    here.publish(name("a"), prompt(0.2), true).expect("publishes");
    assert_eq!(here.task("a").expect("is there").generation, 2, "a writer looks at the disk first");
    let refused = there.activate("a", &one(&id(&prompt(0.1))), Some(1));
    assert!(matches!(refused, Err(RegistryError::PreconditionFailed { found: 2, .. })), "{refused:?}");
    there.activate("a", &one(&id(&prompt(0.1))), Some(2)).expect("activates");
    assert_eq!(active_id(&here, "a"), id(&prompt(0.2)), "readers never look at the disk");
    here.rescan().expect("scans");
    assert_eq!(active_id(&here, "a"), id(&prompt(0.1)));
    there.delete_version("a", &id(&prompt(0.2))).expect("deletes");
    here.rescan().expect("scans");
    assert_eq!(here.task("a").expect("is there").versions.len(), 1);
    there.delete_task("a").expect("deletes");
    assert!(matches!(here.delete_task("a"), Err(RegistryError::TaskNotFound { .. })));
}

#[test]
fn a_wrong_active_json_takes_nothing_out_of_service() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    registry.publish(name("a"), prompt(0.1), true).expect("publishes");
    registry.publish(name("a"), prompt(0.2), true).expect("publishes");
    let active = dir.path().join("a/active.json");
    for wrong in ["", "{", r#"{"version": "000000000000", "generation": 9}"#, r#"{"version": 1}"#] {
        fs::write(&active, wrong).expect("writes");
        registry.rescan().expect("scans");
        assert_eq!(active_id(&registry, "a"), id(&prompt(0.2)), "{wrong}");
    }
    fs::write(&active, format!(r#"{{"version": "{}"}}"#, id(&prompt(0.1)))).expect("writes");
    registry.rescan().expect("scans");
    assert_eq!(active_id(&registry, "a"), id(&prompt(0.1)), "by hand, without a generation");
    assert_eq!(registry.task("a").expect("is there").generation, 10);
    let gone = dir.path().join("a/versions").join(id(&prompt(0.1)));
    fs::remove_dir_all(gone).expect("removes");
    registry.rescan().expect("scans");
    assert_eq!(active_id(&registry, "a"), id(&prompt(0.1)), "what runs goes on while its task is there");
}

#[test]
fn a_reader_always_finds_a_whole_version_while_writers_work() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    registry.publish(name("a"), prompt(0.1), true).expect("publishes");
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                assert_eq!(registry.resolve("a", None).expect("answers").prompt.num_virtual_tokens(), 5);
            }
        });
        for i in 0..10u8 {
            let value = f32::from(i % 3);
            registry.publish(name("a"), prompt(value), true).expect("publishes");
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        reader.join().expect("the reader saw no gap");
    });
    assert_eq!(registry.task("a").expect("is there").generation, 11);
}

#[test]
fn requests_are_split_between_versions_and_a_restart_and_another_process_see_the_same() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    registry.publish(name("a"), prompt(0.1), true).expect("publishes");
    registry.publish(name("a"), prompt(0.2), false).expect("publishes");
    let (first, second) = (id(&prompt(0.1)), id(&prompt(0.2)));
    let split = |shares: &[(&str, f64)]| Activation::Split(shares.iter().map(|(v, w)| ((*v).to_owned(), *w)).collect());
    for wrong in [
        split(&[]),
        split(&[(&first, 0.0)]),
        split(&[(&first, f64::NAN), (&second, 1.0)]),
        split(&[(&first, 1.0), (&first[..8], 1.0)]),
    ] {
        assert!(matches!(registry.activate("a", &wrong, None), Err(RegistryError::Routing { .. })), "{wrong:?}");
    }
    let missing = registry.activate("a", &split(&[(&first, 1.0), ("000000000000", 1.0)]), None);
    assert!(matches!(missing, Err(RegistryError::VersionNotFound { .. })));
    assert_eq!(registry.task("a").expect("is there").generation, 1, "nothing has changed");

    let task = registry.activate("a", &split(&[(&first, 3.0), (&second, 1.0)]), Some(1)).expect("activates").task;
    assert_eq!((task.generation, task.active.as_deref()), (2, Some(&first[..])));
    let mut shares = vec![(first.clone(), 0.75), (second.clone(), 0.25)];
    shares.sort_by_key(|(id, _)| id.clone());
    assert_eq!(task.shares, shares);
    let count = |registry: &Registry| {
        let drawn =
            |i| registry.resolve_drawn("a", None, Draw::Key(&format!("user {i}"))).expect("answers").digest.id();
        (0..400).filter(|i| drawn(*i) == second).count()
    };
    let of_second = count(&registry);
    assert!((60..140).contains(&of_second), "{of_second}");
    assert_eq!(count(&open(dir.path())), of_second, "each key has its version on every replica");
    assert_eq!(active_id(&registry, "a"), first);
    let named = registry.resolve_drawn("a", Some(&second), Draw::Key("user 1")).expect("answers");
    assert_eq!(named.digest.id(), second);
    assert!(matches!(registry.delete_version("a", &second), Err(RegistryError::VersionInUse { .. })));

    let ended = registry.roll_back("a", None).expect("rolls back").task;
    assert_eq!((ended.generation, ended.active, ended.shares), (3, Some(first), Vec::new()));
    assert_eq!(count(&registry), 0);
}

#[test]
fn a_task_is_rolled_back_through_the_versions_that_were_active() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    for value in [0.1, 0.2, 0.3] {
        registry.publish(name("a"), prompt(value), true).expect("publishes");
    }
    assert_eq!(registry.task("a").expect("is there").previous, [id(&prompt(0.2)), id(&prompt(0.1))]);
    let refused = registry.roll_back("a", Some(2));
    assert!(matches!(refused, Err(RegistryError::PreconditionFailed { found: 3, .. })), "{refused:?}");
    assert_eq!(registry.roll_back("a", Some(3)).expect("rolls back").before, Some(id(&prompt(0.3))));
    let again = open(dir.path());
    assert_eq!(active_id(&again, "a"), id(&prompt(0.2)));
    registry.delete_version("a", &id(&prompt(0.3))).expect("deletes");
    registry.roll_back("a", None).expect("rolls back");
    assert_eq!(active_id(&registry, "a"), id(&prompt(0.1)));
    assert!(matches!(registry.roll_back("a", None), Err(RegistryError::NoPreviousVersion { .. })));
}

#[test]
fn an_alias_names_a_version_until_it_is_changed_or_removed() {
    let dir = tempfile::tempdir().expect("temp dir");
    let registry = open(dir.path());
    registry.publish(name("a"), prompt(0.1), true).expect("publishes");
    registry.publish(name("a"), prompt(0.2), false).expect("publishes");
    let (first, second) = (id(&prompt(0.1)), id(&prompt(0.2)));
    registry.set_alias("a", "latest-approved", Some(&second), Some(1)).expect("names it");
    for registry in [&registry, &open(dir.path())] {
        assert_eq!(registry.resolve("a@latest-approved", None).expect("answers").digest.id(), second);
        assert_eq!(active_id(registry, "a"), first);
    }
    assert!(matches!(registry.delete_version("a", &second), Err(RegistryError::VersionInUse { .. })));
    // An alias may be set from another one, and a new active version leaves it as it is.
    registry.set_alias("a", "canary", Some("latest-approved"), None).expect("names it");
    registry.publish(name("a"), prompt(0.3), true).expect("publishes");
    assert_eq!(registry.resolve("a", Some("canary")).expect("answers").digest.id(), second);
    for wrong in ["decade", "", "A"] {
        assert!(registry.set_alias("a", wrong, Some(&first), None).is_err(), "{wrong:?}");
    }
    for alias in ["canary", "latest-approved"] {
        registry.set_alias("a", alias, None, None).expect("removes it");
        assert!(matches!(registry.resolve("a", Some(alias)), Err(RegistryError::VersionNotFound { .. })));
    }
    registry.delete_version("a", &second).expect("deletes");
}
