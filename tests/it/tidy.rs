//! What ARCHITECTURE.md says of the code, held against the code.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Each module, and the modules of this crate it may name.
const ARROWS: [(&str, &[&str]); 16] = [
    // One table, plain data, for all who name its parameters.
    ("sampling", &[]),
    // Only for the facts of the model that a prompt must fit.
    ("prompt", &["model", "sampling"]),
    ("kernels", &[]),
    ("model", &["kernels"]),
    ("tokenizer", &["model"]),
    // What the model and a prompt are together, as positions; no kernels.
    ("packing", &["model", "prompt"]),
    ("engine", &["model", "kernels", "packing", "prompt"]),
    ("registry", &["prompt"]),
    ("demo", &["model"]),
    ("tune", &["engine", "kernels", "model", "packing", "prompt", "sampling", "tokenizer"]),
    ("convert", &["prompt"]),
    // It measures from outside.
    ("bench", &["sampling"]),
    ("telemetry", &["config"]),
    ("config", &["model"]),
    ("http", &["config", "engine", "model", "packing", "prompt", "registry", "sampling", "telemetry", "tokenizer"]),
    // The command line puts everything together.
    (
        "cli",
        &[
            "bench",
            "config",
            "convert",
            "demo",
            "engine",
            "http",
            "model",
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

fn sources() -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, out: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                out.push((path, text));
            }
        }
    }
    let mut out = Vec::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut out);
    assert!(out.len() > 20);
    out
}

/// The module of `src` that a file belongs to.
fn module(path: &Path) -> String {
    let below = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
    let first = below.components().next().unwrap().as_os_str().to_string_lossy();
    first.trim_end_matches(".rs").to_owned()
}

/// The code of a file before its own unit tests.
fn code(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod ").next().unwrap_or(text)
}

/// The modules named after `crate::`, also in grouped imports.
fn named(code: &str) -> BTreeSet<String> {
    let word = |s: &str| s.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect::<String>();
    let mut out = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let Some(group) = rest.strip_prefix('{') else {
            out.insert(word(rest));
            continue;
        };
        let mut depth = 1;
        let mut start = true;
        for (i, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => start = true,
                _ if c.is_whitespace() => {}
                _ if start && depth == 1 => {
                    out.insert(word(&group[i..]));
                    start = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    out.remove("");
    out
}

#[test]
fn imports_follow_the_arrows() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let from = module(&path);
        let Some((_, allowed)) = ARROWS.iter().find(|(m, _)| *m == from) else { continue };
        for to in named(code(&text)) {
            if to != from && ARROWS.iter().any(|(m, _)| *m == to) && !allowed.contains(&to.as_str()) {
                wrong.push(format!("{}: {from} names {to}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "imports against the arrows of ARCHITECTURE.md:\n{}", wrong.join("\n"));
}

#[test]
fn grouped_and_plain_imports_are_both_seen() {
    let code = "use crate::{\n    engine::{Engine, request::Event},\n    tokenizer::Tokenizer,\n};\nlet x = crate::prompt::TaskName;";
    assert_eq!(named(code).into_iter().collect::<Vec<_>>(), ["engine", "prompt", "tokenizer"]);
}

#[test]
fn every_file_says_first_what_lives_there() {
    for (path, text) in sources() {
        assert!(text.starts_with("//! "), "{} does not begin with //!", path.display());
    }
}

#[test]
fn the_scheduler_touches_no_clock_channel_or_tensor() {
    let pure = ["scheduler", "cache", "block_manager", "prefix", "prompts", "fairness", "queue", "quota", "sequence"];
    for name in pure {
        let file = format!("engine/{name}.rs");
        let (_, text) = sources().into_iter().find(|(p, _)| p.ends_with(&file)).unwrap();
        for word in ["Instant", "mpsc", "Tensor", "candle", "tokio"] {
            assert!(!code(&text).contains(word), "{file} names {word}");
        }
    }
}

#[test]
fn a_prompt_is_unknown_to_the_model_and_the_wire_to_all_but_http() {
    for (path, text) in sources() {
        let module = module(&path);
        if ["model", "kernels"].contains(&module.as_str()) {
            assert!(!code(&text).contains("LearnedPrompt"), "{} knows prompts", path.display());
        }
        if ["engine", "model", "kernels", "packing", "tune", "tokenizer"].contains(&module.as_str()) {
            for word in ["axum", "StatusCode", "TaskName"] {
                let allowed = module == "tune" && word == "TaskName";
                assert!(allowed || !code(&text).contains(word), "{} names {word}", path.display());
            }
        }
    }
}
