//! Good and bad archives, built in code.

use std::io::Write as _;

use flate2::{Compression, write::GzEncoder};
use proptest::prelude::*;
use zip::write::SimpleFileOptions;

use super::*;
use crate::prompt::fixtures::prompt;

const LIMIT: u64 = 1 << 20;

fn entries<'a>(files: &'a PromptFiles, folder: &str) -> Vec<(String, &'a [u8])> {
    files.present().map(|(name, bytes)| (format!("{folder}{name}"), bytes.as_ref())).collect()
}

fn zip_of(entries: &[(String, &[u8])]) -> Bytes {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        zip.start_file(name.as_str(), SimpleFileOptions::default()).expect("starts");
        zip.write_all(bytes).expect("writes");
    }
    zip.finish().expect("finishes").into_inner().into()
}

fn tar_of(entries: &[(String, &[u8])]) -> Bytes {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in entries {
        tar_entry(&mut tar, name, tar::EntryType::Regular, "", bytes);
    }
    tar.into_inner().expect("finishes").into()
}

/// An entry as `tar` itself would refuse to write it.
fn tar_entry(tar: &mut tar::Builder<Vec<u8>>, name: &str, kind: tar::EntryType, link: &str, bytes: &[u8]) {
    let mut header = tar::Header::new_ustar();
    let fields = header.as_ustar_mut().expect("ustar");
    fields.name[..name.len()].copy_from_slice(name.as_bytes());
    fields.linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    tar.append(&header, bytes).expect("appends");
}

fn gz_of(bytes: &[u8]) -> Bytes {
    let mut gz = GzEncoder::new(Vec::new(), Compression::best());
    gz.write_all(bytes).expect("writes");
    gz.finish().expect("finishes").into()
}

fn all_packings(entries: &[(String, &[u8])]) -> [(Packing, Bytes); 3] {
    let tar = tar_of(entries);
    [(Packing::Zip, zip_of(entries)), (Packing::TarGz, gz_of(&tar)), (Packing::Tar, tar)]
}

fn file(name: &str, bytes: &'static [u8]) -> (String, &'static [u8]) {
    (name.to_owned(), bytes)
}

#[test]
fn a_prompt_comes_out_as_it_went_in_at_the_top_or_one_folder_down() {
    let files = PromptFiles { task: Some("{}".into()), curve: Some("<svg/>".into()), ..prompt(0.5) };
    for folder in ["", "./", "my_adapter/", "./my_adapter/"] {
        let mut entries = entries(&files, folder);
        entries.push(file(&format!("{folder}README.md"), b"# hello"));
        entries.push(file("__MACOSX/adapter_config.json", b"junk"));
        for (packing, body) in all_packings(&entries) {
            assert_eq!(
                unpack(packing, body, LIMIT).map(|upload| upload.files).as_ref(),
                Ok(&files),
                "{packing:?} {folder}"
            );
        }
    }
}

#[test]
fn examples_beside_a_prompt_come_out_beside_it() {
    let files = prompt(0.5);
    for (folder, eval) in [("", "eval.jsonl"), ("sentiment/", "eval.jsonl"), ("sentiment/", "sentiment/eval.jsonl")] {
        let mut all = entries(&files, folder);
        all.push((eval.to_owned(), b"{}"));
        let upload = unpack(Packing::Zip, zip_of(&all), LIMIT).expect("unpacks");
        assert_eq!((upload.files, upload.eval), (files.clone(), Some(Bytes::from_static(b"{}"))), "{folder} {eval}");
    }
}

#[test]
fn a_safetensors_file_is_the_weights_alone() {
    let weights = prompt(0.5).weights.expect("weights");
    let files = unpack(Packing::Safetensors, weights.clone(), LIMIT).expect("unpacks").files;
    assert_eq!(files, PromptFiles { weights: Some(weights.clone()), ..PromptFiles::default() });
    assert_eq!(unpack(Packing::Safetensors, weights, 10), Err(PackageError::TooLarge { limit: 10 }));
}

#[test]
fn content_of_another_packing_is_named() {
    let files = prompt(0.5);
    let [zip, tar_gz, tar] = all_packings(&entries(&files, ""));
    let single = (Packing::Safetensors, files.weights.clone().expect("weights"));
    let all = [zip, tar_gz, tar, single];
    for (real, body) in &all {
        assert_eq!(sniff(body), Some(*real));
        for (declared, _) in all.iter().filter(|(declared, _)| declared != real) {
            let expected = PackageError::Mismatch { declared: declared.name(), found: real.name() };
            assert_eq!(unpack(*declared, body.clone(), LIMIT), Err(expected));
        }
    }
}

#[test]
fn paths_that_lead_out_are_refused() {
    for bad in ["../../tmp/x", "/etc/x", "a/../../x", "a\\..\\x", "C:/x", "adapter_config.json/.."] {
        let files = prompt(0.5);
        let mut entries = entries(&files, "");
        entries.push(file(bad, b"x"));
        for (packing, body) in all_packings(&entries) {
            let error = unpack(packing, body, LIMIT).expect_err(bad);
            assert!(matches!(error, PackageError::Unsafe { .. }), "{packing:?} {bad}: {error}");
        }
    }
}

#[test]
fn links_and_devices_are_refused() {
    use tar::EntryType::{Block, Char, Fifo, Link, Symlink};
    for kind in [Symlink, Link, Char, Block, Fifo] {
        let mut tar = tar::Builder::new(Vec::new());
        tar_entry(&mut tar, "adapter_config.json", tar::EntryType::Regular, "", b"{}");
        tar_entry(&mut tar, "adapter_model.safetensors", kind, "/etc/passwd", b"");
        let body = gz_of(&tar.into_inner().expect("finishes"));
        let error = unpack(Packing::TarGz, body, LIMIT).expect_err("refused");
        assert!(matches!(error, PackageError::Unsafe { .. }), "{kind:?}: {error}");
    }
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    zip.add_symlink("adapter_model.safetensors", "/etc/passwd", SimpleFileOptions::default()).expect("adds");
    let body = zip.finish().expect("finishes").into_inner().into();
    assert!(matches!(unpack(Packing::Zip, body, LIMIT), Err(PackageError::Unsafe { .. })));
}

#[test]
fn what_unpacks_to_too_much_is_stopped() {
    let zeros = vec![0; 4 << 20];
    let wanted = [("adapter_model.safetensors".to_owned(), zeros.as_slice())];
    for (packing, body) in all_packings(&wanted) {
        assert_eq!(unpack(packing, body, LIMIT), Err(PackageError::TooLarge { limit: LIMIT }), "{packing:?}");
    }
    let files = prompt(0.5);
    let mut skipped = entries(&files, "");
    skipped.push(("checkpoint.pt".to_owned(), zeros.as_slice()));
    let body = gz_of(&tar_of(&skipped));
    assert_eq!(unpack(Packing::TarGz, body, LIMIT), Err(PackageError::TooLarge { limit: LIMIT }));
    assert!(unpack(Packing::Zip, zip_of(&skipped), LIMIT).is_ok(), "a zip's other files are not unpacked at all");
}

#[test]
fn the_limit_is_for_all_files_together() {
    let files = prompt(0.5);
    let size = files.num_bytes();
    for (packing, body) in all_packings(&entries(&files, "")) {
        assert!(unpack(packing, body.clone(), size).is_ok(), "{packing:?}");
        let limit = size - 1;
        assert_eq!(unpack(packing, body, limit), Err(PackageError::TooLarge { limit }), "{packing:?}");
    }
}

#[test]
fn too_many_entries_are_refused() {
    let names: Vec<_> = (0..=MAX_ENTRIES).map(|i| (format!("{i}.txt"), b"".as_slice())).collect();
    for (packing, body) in all_packings(&names) {
        assert_eq!(unpack(packing, body, LIMIT), Err(PackageError::TooManyEntries { limit: MAX_ENTRIES }));
    }
}

#[test]
fn two_prompts_in_one_archive_are_listed() {
    let (a, b) = (prompt(0.5), prompt(0.25));
    for (first, second, shown) in [("a/", "b/", ["a/", "b/"]), ("", "b/", ["/", "b/"])] {
        let both = [entries(&a, first), entries(&b, second)].concat();
        for (packing, body) in all_packings(&both) {
            let folders = shown.map(str::to_owned).to_vec();
            assert_eq!(unpack(packing, body, LIMIT), Err(PackageError::SeveralPrompts { folders }));
        }
    }
}

#[test]
fn an_archive_needs_configuration_and_weights() {
    let files = prompt(0.5);
    for missing in [ADAPTER_CONFIG, WEIGHTS] {
        let mut some = entries(&files, "x/");
        some.retain(|(name, _)| !name.ends_with(missing));
        for (packing, body) in all_packings(&some) {
            let error = unpack(packing, body, LIMIT).expect_err("incomplete").to_string();
            assert!(error.contains(&format!("there is no {missing}")) && error.contains("it has x/"), "{error}");
        }
    }
    for (packing, body) in all_packings(&[file("a/b/adapter_config.json", b"{}")]) {
        let error = unpack(packing, body, LIMIT).expect_err("too deep").to_string();
        assert!(error.contains("a/b/adapter_config.json"), "{error}");
    }
}

#[test]
fn a_pickle_is_never_opened() {
    let pickle = [file("adapter_config.json", b"{}"), file("adapter_model.bin", b"\x80\x04.")];
    for (packing, body) in all_packings(&pickle) {
        let error = unpack(packing, body, LIMIT).expect_err("refused").to_string();
        assert!(error.contains("never opened") && error.contains("softserve convert"), "{error}");
    }
    let files = prompt(0.5);
    let mut both = entries(&files, "");
    both.push(file("adapter_model.bin", b"\x80\x04."));
    for (packing, body) in all_packings(&both) {
        assert_eq!(unpack(packing, body, LIMIT).map(|upload| upload.files).as_ref(), Ok(&files), "safetensors wins");
    }
}

#[test]
fn a_file_that_is_there_twice_is_refused() {
    let files = prompt(0.5);
    let mut twice = entries(&files, "");
    twice.extend(entries(&files, "./"));
    for (packing, body) in all_packings(&twice) {
        assert!(matches!(unpack(packing, body, LIMIT), Err(PackageError::Unsafe { .. })), "{packing:?}");
    }
}

#[test]
fn garbage_is_damaged() {
    let garbage = Bytes::from_static(b"this is no archive, whatever its name says");
    for packing in [Packing::Zip, Packing::Tar, Packing::TarGz] {
        for body in [garbage.clone(), Bytes::new()] {
            assert!(matches!(unpack(packing, body, LIMIT), Err(PackageError::Damaged { .. })), "{packing:?}");
        }
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(body in proptest::collection::vec(any::<u8>(), 0..2048)) {
        for packing in [Packing::Safetensors, Packing::Zip, Packing::Tar, Packing::TarGz] {
            let _ = unpack(packing, body.clone().into(), LIMIT);
        }
    }

    #[test]
    fn mutated_archives_never_panic_and_stay_within_the_limit(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        limit in 0u64..4096,
    ) {
        let files = prompt(0.5);
        for (packing, body) in all_packings(&entries(&files, "a/")) {
            let mut bytes = body.to_vec();
            for (at, byte) in &edits {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            if let Ok(files) = unpack(packing, bytes.into(), limit) {
                prop_assert!(files.files.num_bytes() + files.eval.map_or(0, |eval| eval.len() as u64) <= limit);
            }
        }
    }
}
