//! Every parser of foreign bytes, on bytes at random and on damaged copies of good files: it answers
//! or refuses, never panics, and never allocates beyond its limit. `fuzz/` asks the same for longer.

use std::{fs, io::Write as _, path::Path};

use bytes::Bytes;
use candle_core::DType;
use proptest::prelude::*;
use serde_json::json;
use softserve::examples::Dataset;
use softserve::{
    convert::{self, npy, pickle::Pickle},
    model::{ModelConfig, ModelFiles},
    prompt::{
        files::PromptFiles,
        format::{self, Fit},
        spec::TaskSpec,
    },
    registry::package::{self, Packing},
};

use crate::{
    convert::foreign,
    fixtures,
    support::{MODEL, TASK, prompt_files},
};

/// What a parser may unpack in these tests.
const LIMIT: u64 = 1 << 20;

/// What a parser may hold beside that whatever it reads: windows of decompression, and the values of
/// the largest pickle.
const FIXED: u64 = 8 << 20;

/// A parser, and good files for it.
struct Parser {
    name: &'static str,
    parse: fn(&Bytes),
    seeds: Vec<Vec<u8>>,
}

fn fit() -> Fit {
    Fit::from(fixtures::load(MODEL, DType::F32).info())
}

thread_local! {
    static FIT: Fit = fit();
    static FILES: PromptFiles = PromptFiles::read_dir(&fixtures::dir(MODEL).join("prompts").join(TASK)).unwrap();
}

fn read(files: &PromptFiles) {
    FIT.with(|fit| drop(format::read("task".parse().unwrap(), files, fit)));
}

fn with(change: impl FnOnce(&mut PromptFiles)) {
    let mut files = FILES.with(Clone::clone);
    change(&mut files);
    read(&files);
}

fn unpack(bytes: &Bytes) {
    for packing in [Packing::Safetensors, Packing::Zip, Packing::Tar, Packing::TarGz] {
        if let Ok(package::Upload { files, .. }) = package::unpack(packing, bytes.clone(), LIMIT) {
            assert!(files.num_bytes() <= LIMIT);
        }
    }
}

fn parsers() -> Vec<Parser> {
    let file = |name: &str| fs::read(foreign().join(name)).unwrap();
    let files = |names: &[&str]| names.iter().map(|name| file(name)).collect::<Vec<_>>();
    let (config, weights) = prompt_files(TASK);
    let demo = Path::new(env!("CARGO_MANIFEST_DIR"));
    vec![
        Parser {
            name: "safetensors",
            parse: |bytes| with(|files| files.weights = Some(bytes.clone())),
            seeds: vec![weights.clone(), file("embedding.safetensors"), file("two.safetensors")],
        },
        Parser {
            name: "adapter_config.json",
            parse: |bytes| with(|files| files.adapter_config = Some(bytes.clone())),
            seeds: vec![config, fs::read(fixtures::dir(MODEL).join("prompts/ptuning5/adapter_config.json")).unwrap()],
        },
        Parser {
            name: "task.json",
            parse: |bytes| {
                with(|files| files.task = Some(bytes.clone()));
                drop(TaskSpec::from_json(bytes));
            },
            seeds: vec![fs::read(demo.join("prompts/sentiment/task.json")).unwrap()],
        },
        Parser { name: "package", parse: unpack, seeds: packages() },
        Parser {
            name: "npy",
            parse: |bytes| drop(npy::read("x", bytes.clone(), LIMIT)),
            seeds: files(&["c.npy", "fortran.npy", "bf16.npy", "version2.npy", "hostile/huge-shape.npy"]),
        },
        Parser { name: "pickle", parse: |bytes| drop(Pickle::read(bytes)), seeds: pickles() },
        Parser {
            name: "bare pickle",
            parse: |bytes| drop(Pickle::read_bare(bytes)),
            seeds: files(&["computed/rows.pkl"]),
        },
        Parser {
            name: "training data",
            parse: |bytes| {
                for name in ["d.jsonl", "d.csv", "d.tsv"] {
                    drop(Dataset::parse(Path::new(name), bytes, None));
                }
            },
            seeds: vec![
                br#"[{"input": "a", "label": 1}, {"prompt": "b", "completion": "c"}]"#.to_vec(),
                br#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ud83d\ude00"}]}"#.to_vec(),
                b"input,label\n\"a, b\",x\nc,y\n".to_vec(),
            ],
        },
        Parser {
            name: "torch with a damaged pickle",
            parse: |bytes| {
                let stored = zip(&[("archive/data.pkl", bytes), ("archive/data/0", &[0; 896])]);
                drop(convert::parse(stored.into(), LIMIT));
            },
            seeds: pickles(),
        },
        Parser {
            name: "convert",
            parse: |bytes| {
                if let Ok(found) = convert::parse(bytes.clone(), LIMIT) {
                    drop(found.to_peft(&convert::Target::default()));
                }
            },
            seeds: files(&[
                "tgis/decoder.pt",
                "legacy.pt",
                "transposed.pt",
                "kobold.zip",
                "arrays.npz",
                "tasks.nemo",
                "middle.nemo",
                "soft_prompt.safetensors",
                "hostile/bomb.zip",
                "hostile/expanded.pt",
                "computed/mlp.pt",
                "computed/lstm.pt",
                "computed/projection.pt",
                "computed/cartridge.pt",
                "computed/titan.safetensors",
                "computed/list.pt",
                "computed/mkultra.json",
                "computed/rows.pkl",
            ]),
        },
        Parser {
            name: "config.json",
            parse: |bytes| drop(ModelConfig::from_json(bytes)),
            seeds: fixtures::MODELS.map(|model| fs::read(fixtures::dir(model).join("config.json")).unwrap()).into(),
        },
    ]
}

/// A zip of stored entries.
fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, content) in entries {
        zip.start_file(*name, stored).unwrap();
        zip.write_all(content).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn packages() -> Vec<Vec<u8>> {
    let (config, weights) = prompt_files(TASK);
    let entries = [("p/adapter_config.json", &config[..]), ("p/adapter_model.safetensors", &weights[..])];
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in entries {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, content).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(&tar).unwrap();
    vec![zip(&entries), tar, gz.finish().unwrap(), weights]
}

/// The pickles within torch's files.
fn pickles() -> Vec<Vec<u8>> {
    [
        "tgis/decoder.pt",
        "parameter.pt",
        "state_dict.pt",
        "peft-bin/adapter_model.bin",
        "hostile/command.pt",
        "hostile/shared.pt",
    ]
    .map(|name| {
        let bytes = fs::read(foreign().join(name)).unwrap();
        let mut zip = zip::ZipArchive::new(std::io::Cursor::new(bytes)).unwrap();
        let name = zip.file_names().map(|n| n.unwrap().into_owned()).find(|n| n.ends_with("data.pkl")).unwrap();
        let mut pickle = Vec::new();
        std::io::Read::read_to_end(&mut zip.by_name(&name).unwrap(), &mut pickle).unwrap();
        pickle
    })
    .into()
}

/// One way of damaging a file; places are taken modulo its length.
#[derive(Debug, Clone)]
enum Damage {
    Set(usize, u8),
    Number(usize, u64, u8),
    Cut(usize),
    Remove(usize, usize),
    Insert(usize, Vec<u8>),
    Repeat(usize, usize, usize),
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let len = bytes.len();
        match self {
            Self::Set(at, byte) => bytes[at % len] = *byte,
            Self::Number(at, number, width) => {
                let at = at % len;
                let number = &number.to_le_bytes()[..usize::from(*width).min(len - at)];
                bytes[at..at + number.len()].copy_from_slice(number);
            }
            Self::Cut(at) => bytes.truncate(at % len),
            Self::Remove(at, n) => drop(bytes.drain(at % len..(at % len + n).min(len))),
            Self::Insert(at, new) => drop(bytes.splice(at % len..at % len, new.iter().copied())),
            Self::Repeat(at, n, times) => {
                let part = bytes[at % len..(at % len + n).min(len)].repeat(*times);
                bytes.splice(at % len..at % len, part);
            }
        }
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    // Numbers at the edges of what sizes, counts and offsets can be.
    let number = prop_oneof![
        any::<u64>(),
        prop::sample::select(vec![
            0,
            1,
            0x7f,
            0xff,
            0x7fff,
            0xffff,
            0x7fff_ffff,
            0xffff_ffff,
            i64::MAX as u64,
            u64::MAX
        ]),
    ];
    // Headers are where a byte counts most.
    let place = || prop_oneof![0..64_usize, any::<usize>()];
    let digit = prop::sample::select(b"0123456789-+eE\"'{}[](),:.nNtf\0\n".to_vec());
    prop_oneof![
        (place(), any::<u8>()).prop_map(|(at, byte)| Damage::Set(at, byte)),
        (place(), digit).prop_map(|(at, byte)| Damage::Set(at, byte)),
        (place(), number, prop::sample::select(vec![2_u8, 4, 8]))
            .prop_map(|(at, n, width)| Damage::Number(at, n, width)),
        any::<usize>().prop_map(Damage::Cut),
        (place(), 1..64_usize).prop_map(|(at, n)| Damage::Remove(at, n)),
        (place(), prop::collection::vec(any::<u8>(), 1..16)).prop_map(|(at, new)| Damage::Insert(at, new)),
        (place(), 1..64_usize, 2..200_usize).prop_map(|(at, n, times)| Damage::Repeat(at, n, times)),
    ]
}

/// Runs a parser and holds it to its memory.
fn hold(parser: &Parser, bytes: Vec<u8>) {
    let bytes = Bytes::from(bytes);
    let len = bytes.len() as u64;
    let info = allocation_counter::measure(|| (parser.parse)(&bytes));
    let most = LIMIT + FIXED + 8 * len;
    assert!(info.bytes_max <= most, "{} held {} bytes for {len}", parser.name, info.bytes_max);
}

#[test]
fn good_files_are_within_their_limit() {
    for parser in parsers() {
        for seed in &parser.seeds {
            hold(&parser, seed.clone());
        }
    }
}

#[test]
fn damaged_files_are_answered_or_refused_within_the_limit() {
    let parsers = parsers();
    let place = (0..parsers.len(), any::<prop::sample::Index>());
    let config = ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |((parser, seed) in place, damages in prop::collection::vec(damage(), 1..5))| {
        let parser = &parsers[parser];
        let mut bytes = seed.get(&parser.seeds).clone();
        damages.iter().for_each(|damage| damage.apply(&mut bytes));
        hold(parser, bytes);
    });
}

#[test]
fn bytes_at_random_behind_a_good_beginning_are_refused_within_the_limit() {
    let parsers = parsers();
    let beginnings: [&[u8]; 7] = [
        b"",
        b"PK\x03\x04",
        b"\x1f\x8b\x08\x00",
        b"\x93NUMPY\x01\x00",
        b"\x80\x02",
        b"{\"",
        b"\x10\x00\x00\x00\x00\x00\x00\x00{",
    ];
    let config = ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(
        parser in 0..parsers.len(),
        beginning in prop::sample::select(beginnings.to_vec()),
        rest in prop::collection::vec(any::<u8>(), 0..600),
    )| {
        hold(&parsers[parser], [beginning, &rest].concat());
    });
}

#[test]
fn what_unpacks_to_far_more_than_it_is_does_not_get_the_memory() {
    let zeros = vec![0; 32 << 20];
    let deflated = |name: &str| {
        let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        zip.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(&zeros).unwrap();
        zip.finish().unwrap().into_inner()
    };
    let gzipped = |name: &str| {
        let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
        let mut header = tar::Header::new_ustar();
        header.set_size(zeros.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, &zeros[..]).unwrap();
        tar.into_inner().unwrap().finish().unwrap()
    };
    let parsers = parsers();
    let named = |name: &str| parsers.iter().find(|parser| parser.name == name).unwrap();
    for name in ["tensor.npy", "archive/data.pkl", "x.npy"] {
        hold(named("convert"), deflated(name));
        let error = convert::parse(deflated(name).into(), LIMIT).unwrap_err().to_string();
        assert!(error.contains("more than 1048576 bytes"), "{error}");
    }
    for name in ["model_weights.ckpt", "model_config.yaml", "x"] {
        hold(named("convert"), gzipped(name));
        assert!(convert::parse(gzipped(name).into(), LIMIT).is_err());
    }
    for name in ["adapter_model.safetensors", "adapter_config.json"] {
        hold(named("package"), deflated(name));
        hold(named("package"), gzipped(name));
    }
}

#[test]
fn a_shard_that_an_index_names_lies_beside_it() {
    let names = prop_oneof![
        "[a-z./\\\\:]{0,12}",
        prop::sample::select(vec!["../x", "/etc/passwd", "a/../../b", "..", ".", "a\\b", "model-1.safetensors"])
            .prop_map(str::to_owned),
    ];
    let home = tempfile::tempdir().unwrap();
    let config = ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(names in prop::collection::vec(names, 1..4))| {
        let map: serde_json::Map<_, _> = names.iter().enumerate().map(|(i, n)| (i.to_string(), json!(n))).collect();
        let index = json!({"weight_map": map}).to_string();
        fs::write(home.path().join("model.safetensors.index.json"), index).unwrap();
        if let Ok(files) = ModelFiles::dir(home.path()).unwrap().weight_files() {
            for file in files {
                let path = home.path().join(file);
                prop_assert_eq!(path.parent(), Some(home.path()));
                prop_assert!(path.file_name().is_some());
            }
        }
    });
}
