//! Data files to records: JSON Lines, one JSON array, or CSV. Each record is a JSON object, known by the line that it
//! begins on.

use std::path::Path;

use serde_json::{Map, Value, value::RawValue};

use super::json::kind;
use crate::content;

/// A record with its line, counted from 1, or what is wrong with it.
pub type Record = (usize, Result<Map<String, Value>, String>);

/// Splits a file's content. The name's ending tells CSV (`.csv`, and `.tsv` with tabs); a content that begins with `[`
/// is one JSON array, any other has an object on each line. Blank lines do not count.
pub fn split(path: &Path, bytes: &[u8]) -> Vec<Record> {
    let bytes = content::without_byte_order_mark(bytes);
    let ending = path.extension().unwrap_or_default().to_ascii_lowercase();
    match ending.to_str() {
        Some("csv") => csv_rows(bytes, b','),
        Some("tsv") => csv_rows(bytes, b'\t'),
        _ if bytes.trim_ascii_start().starts_with(b"[") => array(bytes),
        _ => lines(bytes),
    }
}

fn lines(bytes: &[u8]) -> Vec<Record> {
    let lines = bytes.split(|byte| *byte == b'\n').enumerate();
    lines.filter(|(_, line)| !line.trim_ascii().is_empty()).map(|(i, line)| (i + 1, object(line))).collect()
}

fn array(bytes: &[u8]) -> Vec<Record> {
    let items: Vec<&RawValue> = match serde_json::from_slice(bytes) {
        Ok(items) => items,
        // A file of lines that are arrays is told line by line.
        Err(_) if lines(bytes).iter().skip(1).any(|(_, record)| record.is_ok()) => return lines(bytes),
        Err(e) => {
            return vec![(e.line(), Err(format!("it is not a JSON array: {}", json_fault(bytes, &e))))];
        }
    };
    let mut records = Vec::with_capacity(items.len());
    let (mut line, mut at) = (1, 0);
    for item in items {
        let item = item.get().as_bytes();
        // The items are slices of the file, in its order.
        let start = (item.as_ptr() as usize).saturating_sub(bytes.as_ptr() as usize).min(bytes.len());
        line += bytes[at..start.max(at)].iter().filter(|byte| **byte == b'\n').count();
        at = start.max(at);
        records.push((line, object(item)));
    }
    records
}

fn object(bytes: &[u8]) -> Result<Map<String, Value>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())?;
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(format!("expected a JSON object, found {}", kind(&other))),
        Err(e) => Err(format!("it is not JSON: {}", json_fault(bytes, &e))),
    }
}

/// The parser's message without its "line 1", which is not the file's line.
fn json_fault(bytes: &[u8], e: &serde_json::Error) -> String {
    let message = content::json_fault(bytes, e);
    match message.split_once(" at line ") {
        Some((what, _)) => format!("{what} at column {}", e.column()),
        None => message,
    }
}

/// The rows below a header line, as objects of texts.
fn csv_rows(bytes: &[u8], delimiter: u8) -> Vec<Record> {
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(bytes);
    let names: Vec<String> = match reader.headers() {
        Ok(names) => names.iter().map(|name| name.trim().to_owned()).collect(),
        Err(e) => return vec![(1, Err(format!("it is not CSV: {e}")))],
    };
    let mut records = Vec::new();
    for row in reader.records() {
        match row {
            Ok(row) => {
                let line = row.position().map_or(0, |position| position.line() as usize);
                let cells = names.iter().zip(row.iter());
                let object = cells.map(|(name, cell)| (name.clone(), Value::from(cell))).collect();
                records.push((line, Ok(object)));
            }
            Err(e) => {
                let line = e.position().map_or(0, |position| position.line() as usize);
                let reason = match e.kind() {
                    csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                        format!("it has {len} cells, expected {expected_len}, as the first line has names")
                    }
                    _ => format!("it is not CSV: {e}"),
                };
                records.push((line, Err(reason)));
            }
        }
    }
    records
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn records(name: &str, text: &str) -> Vec<(usize, Result<Value, String>)> {
        let found = split(Path::new(name), text.as_bytes());
        found.into_iter().map(|(line, record)| (line, record.map(Value::Object))).collect()
    }

    #[test]
    fn lines_an_array_and_csv_give_the_same_records_at_their_lines() {
        let wanted = |lines: [usize; 2]| {
            let objects = [json!({"input": "a, b", "label": "x"}), json!({"input": "c\n\"d\"", "label": "y"})];
            lines.into_iter().zip(objects.map(Ok)).collect::<Vec<_>>()
        };
        let lines =
            "\u{feff}{\"input\": \"a, b\", \"label\": \"x\"}\n\n{\"input\": \"c\\n\\\"d\\\"\", \"label\": \"y\"}\r\n";
        assert_eq!(records("d.jsonl", lines), wanted([1, 3]));
        let array =
            "\n[{\"input\": \"a, b\",\n \"label\": \"x\"},\n  {\"input\": \"c\\n\\\"d\\\"\", \"label\": \"y\"}]";
        assert_eq!(records("d.json", array), wanted([2, 4]));
        assert_eq!(records("d.csv", "input,label\n\"a, b\",x\n\"c\n\"\"d\"\"\",y\n"), wanted([2, 3]));
        assert_eq!(records("d.TSV", "input\tlabel\na, b\tx\n\"c\n\"\"d\"\"\"\ty\n"), wanted([2, 3]));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (name, text, line, words) in [
            ("d.csv", "input,label\na\n", 2, "it has 1 cells, expected 2"),
            ("d.json", "[{\"input\": \"a\"},\n oops]", 2, "not a JSON array"),
            ("d.json", "[1,\n 2]", 1, "found a number"),
            ("d.jsonl", "{\"input\": \"cut \\ud83d\"}", 1, "lone surrogate"),
            ("d.jsonl", "{}\n[1]\n", 2, "found a list"),
        ] {
            let found = records(name, text);
            let fault = found.iter().find_map(|(at, record)| Some((*at, record.as_ref().err()?)));
            let (at, reason) = fault.unwrap_or_else(|| panic!("{name}: {found:?}"));
            assert!(at == line && reason.contains(words), "{name}: {at} {reason}");
        }
    }
}
