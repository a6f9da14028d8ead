//! The README's table of families and prompt types: a cell is ticked if, and only if, there are answers of
//! PEFT's that `families.rs`, `prompt_types.rs` or `encoder_decoder.rs` hold the program to.

use std::{collections::BTreeSet, fs, path::Path};

use serde_json::Value;
use softserve::model::family::{FAMILIES, Family};

const TYPES: [&str; 6] = ["PROMPT_TUNING", "P_TUNING", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE"];

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Every pair of a family's `model_type` and a PEFT type that there are answers for.
fn covered() -> BTreeSet<(&'static str, String)> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let folders = ["families", "encoder-decoder"].map(|kind| fs::read_dir(fixtures.join(kind)).unwrap());
    let mut covered = BTreeSet::new();
    for folder in folders.into_iter().flatten().map(|entry| entry.unwrap().path()) {
        let config = json(&folder.join("config.json"));
        let family = Family::of_model_type(config["model_type"].as_str().unwrap()).unwrap();
        for case in json(&folder.join("expected.json")).as_array().unwrap() {
            if let Some(peft_type) = case["peft_type"].as_str() {
                covered.insert((family.model_type, peft_type.to_owned()));
            }
        }
    }
    covered
}

#[test]
fn the_table_of_families_and_prompt_types_is_what_the_tests_cover() {
    let covered = covered();
    for (_, peft_type) in &covered {
        assert!(TYPES.contains(&peft_type.as_str()), "{peft_type} has no column");
    }
    let row = |cells: &[&str]| format!("| {} |\n", cells.join(" | "));
    let heads = TYPES.map(|name| format!("`{name}`"));
    let mut table = row(&[&["family"][..], &heads.each_ref().map(String::as_str)].concat());
    table += &row(&["---"; 7]);
    for Family { title, model_type, .. } in &FAMILIES {
        let has = |peft_type: &str| covered.contains(&(*model_type, peft_type.to_owned()));
        let cells = TYPES.map(|peft_type| if has(peft_type) { "yes" } else { "–" });
        table += &row(&[&[*title][..], &cells].concat());
    }
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    assert!(readme.contains(&table), "README.md should have this table:\n\n{table}");
}
