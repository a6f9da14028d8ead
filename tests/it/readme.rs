//! The README's table of families and prompt types: a cell is ticked if, and only if, there are answers of
//! PEFT's that `families.rs`, `prompt_types.rs` or `encoder_decoder.rs` hold the program to.

use std::{collections::BTreeSet, fs, path::Path};

use serde_json::Value;

const TYPES: [&str; 6] = ["PROMPT_TUNING", "P_TUNING", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE"];

/// What people call a family, and its `model_type`s.
const FAMILIES: [(&str, &[&str]); 16] = [
    ("Llama 2, 3.x", &["llama"]),
    ("Mistral", &["mistral"]),
    ("Qwen2, Qwen2.5", &["qwen2"]),
    ("Qwen3", &["qwen3"]),
    ("Gemma", &["gemma"]),
    ("Gemma 2", &["gemma2"]),
    ("Gemma 3 (text)", &["gemma3_text", "gemma3"]),
    ("Phi-3, 3.5, 4-mini", &["phi3"]),
    ("SmolLM3", &["smollm3"]),
    ("OLMo 2", &["olmo2"]),
    ("GPT-2", &["gpt2"]),
    ("GPT-NeoX, Pythia", &["gpt_neox"]),
    ("OPT", &["opt"]),
    ("BLOOM", &["bloom"]),
    ("T5, Flan-T5", &["t5"]),
    ("mT5", &["mt5"]),
];

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Every pair of a `model_type` and a PEFT type that there are answers for.
fn covered() -> BTreeSet<(String, String)> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let folders = ["families", "encoder-decoder"].map(|kind| fs::read_dir(fixtures.join(kind)).unwrap());
    let mut covered = BTreeSet::new();
    for folder in folders.into_iter().flatten().map(|entry| entry.unwrap().path()) {
        let family = json(&folder.join("config.json"))["model_type"].as_str().unwrap().to_owned();
        for case in json(&folder.join("expected.json")).as_array().unwrap() {
            if let Some(peft_type) = case["peft_type"].as_str() {
                covered.insert((family.clone(), peft_type.to_owned()));
            }
        }
    }
    covered
}

#[test]
fn the_table_of_families_and_prompt_types_is_what_the_tests_cover() {
    let covered = covered();
    for (family, peft_type) in &covered {
        assert!(FAMILIES.iter().any(|(_, types)| types.contains(&family.as_str())), "{family} has no row");
        assert!(TYPES.contains(&peft_type.as_str()), "{peft_type} has no column");
    }
    let row = |cells: &[&str]| format!("| {} |\n", cells.join(" | "));
    let heads = TYPES.map(|name| format!("`{name}`"));
    let mut table = row(&[&["family"][..], &heads.each_ref().map(String::as_str)].concat());
    table += &row(&["---"; 7]);
    for (name, families) in FAMILIES {
        let has = |peft_type: &str| families.iter().any(|f| covered.contains(&((*f).to_owned(), peft_type.to_owned())));
        let cells = TYPES.map(|peft_type| if has(peft_type) { "yes" } else { "–" });
        table += &row(&[&[name][..], &cells].concat());
    }
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    assert!(readme.contains(&table), "README.md should have this table:\n\n{table}");
}
