//! The specification: committed as it is served, and complete.

use serde_json::Value;
use softserve::http::openapi;

fn spec() -> Value {
    serde_json::from_str(&openapi::json().unwrap()).unwrap()
}

/// Every operation as (method and path, itself).
fn operations(spec: &Value) -> Vec<(String, &Value)> {
    let paths = spec["paths"].as_object().unwrap();
    let of_path = |(path, item): (&String, &'_ Value)| -> Vec<(String, Value)> {
        item.as_object().unwrap().iter().map(|(method, op)| (format!("{method} {path}"), op.clone())).collect()
    };
    let names: Vec<(String, Value)> = paths.iter().flat_map(of_path).collect();
    names
        .into_iter()
        .map(|(name, _)| {
            let (method, path) = name.split_once(' ').unwrap();
            let operation = &spec["paths"][path][method];
            (name.clone(), operation)
        })
        .collect()
}

#[test]
fn the_committed_specification_is_the_one_that_is_served() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi/openapi.json");
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        committed == openapi::json().unwrap(),
        "openapi/openapi.json is out of date: run `cargo run -- openapi > openapi/openapi.json` and commit it"
    );
}

#[test]
fn every_route_is_described_with_schemas_and_examples() {
    let spec = spec();
    let operations = operations(&spec);
    assert!(operations.len() >= 13, "{}", operations.len());
    for (name, operation) in operations {
        assert!(operation["summary"].is_string(), "{name}: no summary");
        assert!(operation["tags"].is_array(), "{name}: no tag");
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            assert!(parameter["description"].as_str().is_some_and(|d| !d.is_empty()), "{name}: {parameter}");
        }
        for (status, response) in operation["responses"].as_object().unwrap() {
            assert!(response["description"].as_str().is_some_and(|d| !d.is_empty()), "{name} {status}");
            for (media_type, content) in response["content"].as_object().into_iter().flatten() {
                assert!(content["schema"].is_object(), "{name} {status} {media_type}: no schema");
            }
        }
        assert!(operation["responses"].get("500").is_some(), "{name}: no 500");
        let is_open = name.contains("/health/");
        assert_eq!(operation["responses"].get("401").is_some(), !is_open, "{name}");
        assert!(operation.get("x-problems").is_none(), "{name}");
    }
}

#[test]
fn every_reference_of_the_specification_leads_somewhere() {
    fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(map) => {
                found.extend(map.get("$ref").and_then(Value::as_str));
                map.values().for_each(|v| references(v, found));
            }
            Value::Array(list) => list.iter().for_each(|v| references(v, found)),
            _ => {}
        }
    }
    let spec = spec();
    let mut found = Vec::new();
    references(&spec, &mut found);
    assert!(found.len() > 20);
    for reference in found {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(spec.pointer(pointer).is_some(), "{reference}");
    }
}
