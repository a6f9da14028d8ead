use std::collections::HashMap;

use serde_json::{Value, json};

use super::*;
use crate::demo;

fn demo_tokenizer() -> Tokenizer {
    Tokenizer::load(&demo::model()).expect("the demo's tokenizer")
}

fn grammars(tokenizer: &Tokenizer) -> Grammars {
    Grammars::new(tokenizer.clone(), tokenizer.vocab_size() + 3, vec![0])
}

/// Writes an answer by drawing from what is allowed; returns its text, and whether the grammar ended it.
fn draw(tokenizer: &Tokenizer, constraint: &dyn TokenConstraint, seed: u64, most: usize) -> (String, bool) {
    let mut mask = constraint.start();
    let (mut ids, mut state) = (Vec::new(), seed);
    while ids.len() < most {
        let mut logits = vec![0f32; tokenizer.vocab_size() + 3];
        mask.apply(&mut logits).expect("a mask");
        let allowed: Vec<u32> = (0..logits.len() as u32).filter(|&id| logits[id as usize] == 0.0).collect();
        assert!(!allowed.is_empty(), "nothing follows {ids:?}");
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let id = allowed[(state >> 33) as usize % allowed.len()];
        mask.accept(id);
        if id == 0 {
            return (tokenizer.decode(&ids).expect("text"), true);
        }
        ids.push(id);
        if mask.is_complete() {
            return (tokenizer.decode(&ids).expect("text"), true);
        }
    }
    (tokenizer.decode(&ids).expect("text"), false)
}

fn compile(grammars: &Grammars, grammar: Value) -> Arc<dyn TokenConstraint> {
    grammars.compile(&serde_json::from_value(grammar).expect("a grammar")).expect("compiles")
}

#[test]
fn whatever_is_drawn_from_the_masks_obeys_the_grammar() {
    let tokenizer = demo_tokenizer();
    let grammars = grammars(&tokenizer);
    let schema = json!({"type": "object", "properties": {"a": {"enum": ["x", "long word"]}, "b": {"type": "integer", "minimum": 0,
        "maximum": 99}, "c": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}}, "required": ["a", "b", "c"],
        "additionalProperties": false});
    let constraint = compile(&grammars, json!({"json_schema": schema}));
    for seed in 0..50 {
        let (text, ended) = draw(&tokenizer, &*constraint, seed, 400);
        assert!(ended, "{text}");
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(
            ["x", "long word"].contains(&value["a"].as_str().unwrap()) && value["b"].as_u64().unwrap() < 100,
            "{text}"
        );
        assert!(value["c"].as_array().unwrap().iter().all(Value::is_boolean) && value.as_object().unwrap().len() == 3);
    }
    let choice = ["positive", "negative", "neither \"of\" both", "é\n"];
    let constraint = compile(&grammars, json!({"choice": choice}));
    let mut seen = HashMap::new();
    for seed in 0..60 {
        let (text, ended) = draw(&tokenizer, &*constraint, seed, 100);
        assert!(ended && choice.contains(&text.as_str()), "{text}");
        *seen.entry(text).or_insert(0) += 1;
    }
    assert!(seen.len() >= 3, "{seen:?}");
    let constraint = compile(&grammars, json!({"regex": "[0-9]{2}-(a|b)"}));
    for seed in 0..20 {
        let (text, ended) = draw(&tokenizer, &*constraint, seed, 30);
        let bytes = text.as_bytes();
        assert!(ended && bytes.len() == 4 && bytes[2] == b'-' && b"ab".contains(&bytes[3]), "{text}");
    }
}

#[test]
fn grammars_are_compiled_once_and_only_the_last_are_kept() {
    let tokenizer = demo_tokenizer();
    let grammars = grammars(&tokenizer);
    let of = |i: usize| Grammar::Choice(vec![format!("a{i}")]);
    assert!(grammars.compiled(&of(0)).is_none());
    let first = grammars.compile(&of(0)).expect("compiles");
    assert!(Arc::ptr_eq(&first, &grammars.compiled(&of(0)).expect("kept")));
    for i in 1..=KEPT {
        // Used each time, so it stays.
        assert!(grammars.compiled(&of(0)).is_some());
        grammars.compile(&of(i)).expect("compiles");
    }
    assert!(grammars.compiled(&of(1)).is_none() && grammars.compiled(&of(KEPT)).is_some());
    let error = grammars.compile(&Grammar::Regex("(".to_owned())).expect_err("no regular expression");
    assert!(error.to_string().contains("unclosed"), "{error}");
}
