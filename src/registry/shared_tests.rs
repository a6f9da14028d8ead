//! What a folder and a bucket have in common, and several registries on one store.

use std::{sync::Arc, time::Duration};

use super::{
    Bucket, Keep, PromptLocation, Registry, RegistryConfig, RegistryError,
    tests::{active_id, id, name, one, open_at},
};
use crate::prompt::{
    fixtures::{self, prompt},
    format::PromptFiles,
};

#[test]
fn old_versions_are_deleted_but_none_that_is_used() {
    let dir = tempfile::tempdir().expect("temp dir");
    let bucket = Bucket::of("memory://bucket/prompts", Arc::new(object_store::memory::InMemory::new()));
    for root in [dir.path().to_owned().into(), PromptLocation::Bucket(bucket)] {
        let keep_for = |younger_than| {
            let keep = Some(Keep { newest: 2, younger_than });
            let (fit, root, poll_interval) = (fixtures::fit(), root.clone(), Duration::from_secs(10));
            let (max_tasks, max_versions_per_task, max_loaded_bytes) = (8, 20, 64 << 20);
            Registry::open(RegistryConfig {
                root,
                fit,
                max_tasks,
                max_versions_per_task,
                max_loaded_bytes,
                poll_interval,
                keep,
            })
            .expect("opens")
        };
        let stored = |registry: &Registry| {
            let mut ids: Vec<String> =
                registry.task("a").expect("is there").versions.iter().map(|v| v.version.digest.id()).collect();
            ids.sort();
            ids
        };
        let versions: Vec<PromptFiles> = (0..8).map(|i| prompt(i as f32 / 8.0)).collect();
        let registry = keep_for(Duration::from_secs(3600));
        for files in &versions[..6] {
            registry.publish(name("a"), files.clone(), true).expect("publishes");
            // Times of files tell which is newer.
            std::thread::sleep(Duration::from_millis(5));
        }
        registry.set_alias("a", "good", Some(&id(&versions[0])), None).expect("has an alias");
        assert_eq!(stored(&registry).len(), 6, "none is old enough");
        let registry = keep_for(Duration::ZERO);
        registry.publish(name("a"), versions[6].clone(), false).expect("publishes");
        // The newest two, the active one (5), the one before it (4), and the one with an alias.
        let mut expected: Vec<String> = [0, 4, 5, 6].map(|i| id(&versions[i])).to_vec();
        expected.sort();
        assert_eq!(stored(&registry), expected);
        assert_eq!(active_id(&registry, "a"), id(&versions[5]));
        registry.roll_back("a", None).expect("goes back");
        assert_eq!(active_id(&registry, "a"), id(&versions[4]));
    }
}

#[test]
fn two_registries_on_one_bucket_see_each_others_changes_and_refuse_what_is_based_on_old_ones() {
    let bucket = Bucket::of("memory://bucket/prompts", Arc::new(object_store::memory::InMemory::new()));
    let [one_side, other] = [0, 1].map(|_| open_at(PromptLocation::Bucket(bucket.clone()), 8, 8));
    let (first, second) = (prompt(0.25), prompt(0.5));
    one_side.publish(name("a"), first.clone(), true).expect("publishes");
    assert!(other.resolve("a", None).is_err(), "nothing was looked for yet");
    other.rescan().expect("looks");
    assert_eq!((active_id(&other, "a"), other.revision()), (id(&first), one_side.revision()));
    other.publish(name("a"), second.clone(), true).expect("publishes");
    assert_eq!(active_id(&one_side, "a"), id(&first), "until it looks");
    // It has not seen the second version, and finds out.
    let refused = one_side.activate("a", &one(&id(&first)), Some(1));
    assert!(matches!(refused, Err(RegistryError::PreconditionFailed { found: 2, .. })), "{refused:?}");
    assert_eq!(one_side.activate("a", &one(&id(&first)), Some(2)).expect("activates").task.generation, 3);
    other.rescan().expect("looks");
    assert_eq!((active_id(&other, "a"), other.revision()), (id(&first), one_side.revision()));
    other.delete_version("a", &id(&second)).expect("deletes");
    one_side.rescan().expect("looks");
    assert_eq!(one_side.task("a").expect("is there").versions.len(), 1);
    other.delete_task("a").expect("deletes");
    one_side.rescan().expect("looks");
    assert!(matches!(one_side.resolve("a", None), Err(RegistryError::TaskNotFound { .. })));
    let again = one_side.publish(name("a"), second.clone(), true).expect("publishes");
    assert!(again.created && again.generation > 3, "{again:?}");
    other.rescan().expect("looks");
    assert_eq!((active_id(&other, "a"), other.revision()), (id(&second), one_side.revision()));
}

#[test]
fn that_another_base_model_was_allowed_is_remembered() {
    let task = r#"{"base_model": {"fingerprint": "fedcba9876543210"}}"#;
    let refused = PromptFiles { task: Some(task.into()), ..prompt(0.5) };
    let allowed = PromptFiles { other_base: Some("allowed".into()), ..refused.clone() };
    let dir = tempfile::tempdir().expect("temp dir");
    let bucket = Bucket::of("memory://bucket/prompts", Arc::new(object_store::memory::InMemory::new()));
    for root in [dir.path().to_owned().into(), PromptLocation::Bucket(bucket)] {
        let registry = open_at(root.clone(), 8, 4);
        let error = registry.publish(name("a"), refused.clone(), true).expect_err("another model's");
        assert!(error.to_string().contains("allow_other_base=true"), "{error}");
        registry.publish(name("a"), allowed.clone(), true).expect("publishes");
        assert_eq!(active_id(&open_at(root, 8, 4), "a"), id(&refused));
    }
}
