//! What ARCHITECTURE.md says of the code, held against the code. Where the code does not hold a rule yet, the
//! exceptions are listed; one that is no longer needed fails, so that the lists only get shorter.

mod modules;

use std::collections::BTreeSet;

use modules::{Modules, room};

/// Each room (a folder or file of `src`), and the rooms that it may name.
const ARROWS: [(&str, &[&str]); 22] = [
    // One table, plain data, for all who name its parameters.
    ("sampling", &[]),
    // Only for the facts of the model that a prompt must fit.
    ("prompt", &["content", "model", "sampling"]),
    ("kernels", &[]),
    ("model", &["content", "kernels"]),
    ("tokenizer", &["model"]),
    // What the model and a prompt are together, as positions; no kernels.
    ("packing", &["model", "prompt"]),
    // What an input is as positions, for who serves, tunes and evaluates.
    ("input", &["packing", "prompt", "sampling", "tokenizer"]),
    ("engine", &["model", "kernels", "packing", "prompt"]),
    // What the engine obeys without knowing text.
    ("grammar", &["engine", "prompt", "tokenizer"]),
    ("records", &[]),
    // Examples of a task, for who tunes and who compares versions.
    ("examples", &["content", "input", "packing", "prompt"]),
    // How good answers are: texts and labels alone.
    ("quality", &[]),
    ("registry", &["content", "prompt"]),
    ("demo", &["model"]),
    (
        "tune",
        &[
            "content",
            "engine",
            "examples",
            "grammar",
            "input",
            "kernels",
            "model",
            "packing",
            "prompt",
            "quality",
            "sampling",
            "tokenizer",
        ],
    ),
    ("convert", &["content", "prompt"]),
    // It knows nothing but bytes.
    ("content", &[]),
    // It measures from outside.
    ("bench", &["sampling"]),
    ("telemetry", &["config"]),
    // The engine's configuration is one struct from the options to the scheduler.
    ("config", &["engine", "model", "registry"]),
    (
        "http",
        &[
            "config",
            "content",
            "engine",
            "examples",
            "grammar",
            "input",
            "model",
            "packing",
            "prompt",
            "quality",
            "records",
            "registry",
            "sampling",
            "telemetry",
            "tokenizer",
        ],
    ),
    // The command line puts everything together.
    (
        "cli",
        &[
            "bench",
            "config",
            "convert",
            "demo",
            "engine",
            "examples",
            "http",
            "model",
            "packing",
            "prompt",
            "registry",
            "sampling",
            "telemetry",
            "tokenizer",
            "tune",
            "kernels",
        ],
    ),
];

/// Modules outside `kernels::cpu` that name it: the choice of a backend, and the backend that chooses tokens on the host.
const NAMES_THE_CPU: &[&str] = &["kernels::cuda", "kernels::open"];

/// Modules of one room that name each other, perhaps through others.
const CIRCLES: &[&[&str]] = &[
    &["cli::bench", "cli::bench::tasks"],
    &["convert::pickle", "convert::pickle::machine"],
    &[
        "http",
        "http::access",
        "http::admin",
        "http::admin::contents",
        "http::admin::gate",
        "http::admin::routing",
        "http::admin::types",
        "http::admin::upload",
        "http::classify",
        "http::extract",
        "http::generate",
        "http::health",
        "http::lines",
        "http::observe",
        "http::openai",
        "http::openai::answer",
        "http::openai::batches",
        "http::openai::batches::work",
        "http::openai::chat",
        "http::openai::completions",
        "http::openai::decisions",
        "http::openai::decisions::ask",
        "http::openai::decisions::systemone",
        "http::openai::decisions::wire",
        "http::openai::files",
        "http::openai::models",
        "http::openai::request",
        "http::openai::run",
        "http::openapi",
        "http::prepare",
        "http::running",
        "http::scoring",
        "http::tokenize",
    ],
    &["kernels", "kernels::weight"],
    &[
        "kernels::cpu::attention",
        "kernels::cpu::attention::scores",
        "kernels::cpu::attention::values",
        "kernels::cpu::attention::write",
    ],
    &[
        "prompt::files",
        "prompt::format",
        "prompt::layout",
        "prompt::peft",
        "prompt::peft_type",
        "prompt::task",
        "prompt::weights",
    ],
    &["registry", "registry::collect", "registry::state", "registry::watch"],
];

/// What decides who is next, beside all of `engine::scheduler`.
const DECIDES: [&str; 9] =
    ["admission", "block_manager", "cache", "fairness", "prefix", "prompts", "queue", "quota", "sequence"];

/// What the program does not decide with: clocks, channels, tensors.
const CLOCKS: [&str; 4] = ["Instant", "SystemTime", "sleep", "chrono"];
const CHANNELS: [&str; 6] = ["mpsc", "oneshot", "broadcast", "Sender", "Receiver", "tokio"];
const TENSORS: [&str; 5] = ["Tensor", "Device", "DType", "candle_core", "candle_nn"];

fn list(lines: impl IntoIterator<Item = String>) -> String {
    lines.into_iter().map(|line| format!("\n  {line}")).collect()
}

#[test]
fn imports_follow_the_arrows() {
    let modules = Modules::read();
    let rooms: BTreeSet<_> = modules.all.keys().map(|path| room(path)).filter(|room| !room.is_empty()).collect();
    let listed: BTreeSet<_> = ARROWS.iter().map(|(room, _)| *room).collect();
    assert_eq!(rooms, listed, "each room has its line in ARROWS");
    let mut wrong = Vec::new();
    for (path, targets) in &modules.edges {
        let Some((from, allowed)) = ARROWS.iter().find(|(from, _)| *from == room(path)) else { continue };
        let against = targets.iter().filter(|to| room(to) != *from && !allowed.contains(&room(to)));
        wrong.extend(against.map(|to| format!("{path} names {to}")));
    }
    assert!(wrong.is_empty(), "imports against the arrows of ARCHITECTURE.md:{}", list(wrong));
}

#[test]
fn only_those_that_are_listed_name_the_cpu() {
    let is_cpu = |path: &str| path == "kernels::cpu" || path.starts_with("kernels::cpu::");
    let modules = Modules::read();
    let names = modules.edges.iter().filter(|(from, to)| !is_cpu(from) && to.iter().any(|to| is_cpu(to)));
    let names: BTreeSet<_> = names.map(|(from, _)| from.as_str()).collect();
    let listed: BTreeSet<_> = NAMES_THE_CPU.iter().copied().collect();
    let more: Vec<_> = names.difference(&listed).map(|path| (*path).to_owned()).collect();
    assert!(more.is_empty(), "only the choice of a backend names kernels::cpu; these do too:{}", list(more));
    let fewer: Vec<_> = listed.difference(&names).map(|path| (*path).to_owned()).collect();
    assert!(fewer.is_empty(), "these no longer name kernels::cpu; take them off NAMES_THE_CPU:{}", list(fewer));
    eprintln!("{} modules outside kernels::cpu name it", names.len());
    let is_cuda = |path: &str| path == "kernels::cuda" || path.starts_with("kernels::cuda::");
    let names = modules.edges.iter().filter(|(from, to)| !is_cuda(from) && to.iter().any(|to| is_cuda(to)));
    let names: Vec<_> = names.map(|(from, _)| from.as_str()).collect();
    assert_eq!(names, ["kernels::open"], "only the choice of a backend names kernels::cuda");
}

#[test]
fn modules_name_each_other_in_no_circle_but_those_that_are_listed() {
    let circles: BTreeSet<_> = Modules::read().circles().into_iter().collect();
    let listed: BTreeSet<Vec<String>> =
        CIRCLES.iter().map(|circle| circle.iter().map(|path| (*path).to_owned()).collect()).collect();
    let show = |circles: Vec<&Vec<String>>| list(circles.into_iter().map(|circle| circle.join(", ")));
    let more: Vec<_> = circles.difference(&listed).collect();
    assert!(more.is_empty(), "new circles of modules that name each other:{}", show(more));
    let fewer: Vec<_> = listed.difference(&circles).collect();
    assert!(fewer.is_empty(), "these are no circles any more; take them off CIRCLES:{}", show(fewer));
    assert!(circles.iter().all(|circle| circle.iter().all(|path| room(path) == room(&circle[0]))), "{circles:?}");
    eprintln!("{} circles of modules that name each other", circles.len());
}

#[test]
fn every_file_says_first_what_lives_there() {
    for module in Modules::read().all.values() {
        assert!(module.text.starts_with("//! "), "{} does not begin with //!", module.file.display());
    }
}

#[test]
fn what_decides_who_is_next_touches_no_clock_channel_or_tensor() {
    let modules = Modules::read();
    let below = |path: &str| path == "engine::scheduler" || path.starts_with("engine::scheduler::");
    let scheduler = modules.all.keys().map(String::as_str).filter(|path| below(path)).map(str::to_owned);
    let deciding: Vec<_> = scheduler.chain(DECIDES.map(|name| format!("engine::{name}"))).collect();
    assert!(deciding.len() > DECIDES.len() + 3, "{deciding:?}");
    for path in deciding {
        let module = modules.all.get(&path).unwrap_or_else(|| panic!("there is no {path}"));
        for word in [&CLOCKS[..], &CHANNELS, &TENSORS].concat() {
            assert!(!module.has(word), "{path} names {word}");
        }
    }
}

#[test]
fn a_prompt_is_unknown_to_the_model_and_the_wire_to_all_but_http() {
    for (path, module) in &Modules::read().all {
        let room = room(path);
        if ["model", "kernels"].contains(&room) {
            assert!(!module.has("LearnedPrompt"), "{path} knows prompts");
        }
        if ["engine", "model", "kernels", "packing", "tune", "tokenizer"].contains(&room) {
            for word in ["axum", "StatusCode", "TaskName"] {
                let allowed = room == "tune" && word == "TaskName";
                assert!(allowed || !module.has(word), "{path} names {word}");
            }
        }
    }
}
