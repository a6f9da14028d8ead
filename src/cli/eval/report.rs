//! What `softserve eval` reports, as JSON or as a table: the scores with their intervals, what was confused, and answers to
//! look at.

use std::{collections::BTreeMap, io::Write};

use serde_json::{Value, json};

use crate::examples::Dataset;
use crate::{
    prompt::Version,
    tune::{
        evaluate::{Column, NO_LABEL},
        in_context::Shots,
    },
};

/// How a metric is shown.
#[derive(Clone, Copy)]
enum Shown {
    Percent,
    Decimals(usize),
}

/// The metrics in the order they are shown.
const ROWS: [(&str, &str, Shown); 9] = [
    ("accuracy", "accuracy", Shown::Percent),
    ("macro_f1", "macro-F1", Shown::Percent),
    ("choice_accuracy", "choice accuracy", Shown::Percent),
    ("brier", "Brier score", Shown::Decimals(4)),
    ("ece", "ECE", Shown::Decimals(4)),
    ("exact_match", "exact match", Shown::Percent),
    ("token_f1", "word F1", Shown::Percent),
    ("chrf", "chrF2", Shown::Decimals(1)),
    ("bleu", "BLEU", Shown::Decimals(1)),
];

/// The most labels whose whole matrix is printed; more do not fit a screen.
const MAX_SHOWN_LABELS: usize = 12;

/// The most confusions that are listed where the matrix is not.
const LISTED_CONFUSIONS: usize = 10;

/// How often each label was expected, and what was answered then.
type Confusion = BTreeMap<String, BTreeMap<String, usize>>;

/// A learned prompt that was measured, and what it is compared with.
pub struct Report<'a> {
    pub version: &'a Version,
    pub data: &'a Dataset,
    /// The learned prompt's first.
    pub columns: &'a [Column],
    /// That of the column `instruction`.
    pub instruction: Option<&'a str>,
    /// Those of the column `in_context`, and the seed that chose them.
    pub shots: Option<(&'a Shots, u64)>,
}

impl Report<'_> {
    /// All of it, but for answers.
    pub fn json(&self) -> Value {
        let mut report = json!({
            "task": self.version.task,
            "version": self.version.digest.id(),
            "examples": self.data.examples.len(),
            "instruction": self.instruction,
            "columns": self.columns,
        });
        if let Some((shots, seed)) = self.shots {
            report["in_context"] =
                json!({"examples": shots.path, "lines": shots.lines, "excluded": shots.excluded, "seed": seed});
        }
        report
    }

    /// As a table, with the answers to the first `show` examples. `name` says what was measured.
    pub fn write(&self, out: &mut dyn Write, name: &str, show: usize) -> std::io::Result<()> {
        let Self { version, data, columns, .. } = self;
        writeln!(
            out,
            "{name} (version {}) on {} examples, with 95 % confidence intervals\n",
            version.digest,
            data.examples.len()
        )?;
        write_scores(out, columns)?;
        if let Some(confusion) = columns.first().and_then(|c| c.confusion.as_ref()) {
            write_confusion(out, confusion)?;
        }
        for (i, example) in data.examples.iter().take(show).enumerate() {
            writeln!(out, "\nline {}, expected {:?}", example.line, example.output)?;
            columns.iter().try_for_each(|c| writeln!(out, "  {:<13} {:?}", title(c), c.outputs[i]))?;
        }
        writeln!(out)?;
        if let Some(text) = self.instruction {
            writeln!(out, "text prompt: {text:?}")?;
        }
        if let Some((shots, _)) = self.shots {
            write_shots(out, shots, columns)?;
        }
        let hint = if self.instruction.is_some() { "" } else { "; to compare with a text prompt, set --instruction" };
        writeln!(out, "without a learned prompt, the first line of an answer counts{hint}")
    }
}

/// Which examples stood in the context.
fn write_shots(out: &mut dyn Write, shots: &Shots, columns: &[Column]) -> std::io::Result<()> {
    let lines: Vec<String> = shots.lines.iter().map(usize::to_string).collect();
    let (of, lines) = (shots.path.display(), lines.join(", "));
    write!(out, "in context: {} examples of {of} before each input (lines {lines})", shots.len())?;
    if let Some(used) = columns.iter().find_map(|column| column.shots).filter(|used| used.inputs_with_fewer > 0) {
        write!(
            out,
            "; the context had room for fewer before {} of the inputs, for {} at least",
            used.inputs_with_fewer, used.fewest
        )?;
    }
    if shots.excluded > 0 {
        write!(out, "; {} examples are also test inputs and were not taken", shots.excluded)?;
    }
    writeln!(out)
}

/// A column's name above it.
fn title(column: &Column) -> &'static str {
    match column.name {
        "tuned" => "tuned prompt",
        "no_prompt" => "no prompt",
        "in_context" => "in context",
        _ => "text prompt",
    }
}

/// A row for each metric and a column for each prompt, each as wide as its widest cell.
fn write_scores(out: &mut dyn Write, columns: &[Column]) -> std::io::Result<()> {
    let rows = || ROWS.iter().filter(|row| columns.iter().any(|column| column.metrics.contains_key(row.0)));
    let cells: Vec<Vec<String>> =
        columns.iter().map(|column| rows().map(|(key, _, shown)| cell(column, key, *shown)).collect()).collect();
    let width = |(column, cells): (&Column, &Vec<String>)| {
        cells.iter().map(|cell| cell.chars().count()).chain([title(column).len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = columns.iter().zip(&cells).map(width).collect();
    let mut line = format!("  {:<16}", "");
    for (column, width) in columns.iter().zip(&widths) {
        line += &format!("  {:<width$}", title(column));
    }
    writeln!(out, "{}", line.trim_end())?;
    for (i, (_, name, _)) in rows().enumerate() {
        let mut line = format!("  {name:<16}");
        for (cells, width) in cells.iter().zip(&widths) {
            line += &format!("  {:<width$}", cells[i]);
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// A score, and its interval in parentheses.
fn cell(column: &Column, key: &str, shown: Shown) -> String {
    let Some(&value) = column.metrics.get(key) else { return String::new() };
    let interval = column.intervals.get(key);
    match shown {
        Shown::Percent => {
            let interval = interval.map(|[low, high]| format!(" ({:.1}–{:.1})", 100.0 * low, 100.0 * high));
            format!("{:>5.1}%{}", 100.0 * value, interval.unwrap_or_default())
        }
        Shown::Decimals(n) => {
            let interval = interval.map(|[low, high]| format!(" ({low:.n$}–{high:.n$})"));
            format!("{value:>6.n$}{}", interval.unwrap_or_default())
        }
    }
}

/// The matrix of expected and answered labels; of many labels the confusions that are the most frequent.
fn write_confusion(out: &mut dyn Write, confusion: &Confusion) -> std::io::Result<()> {
    let mut names: Vec<&str> =
        confusion.iter().flat_map(|(label, row)| row.keys().chain([label])).map(String::as_str).collect();
    names.sort_by_key(|name| (*name == NO_LABEL, *name));
    names.dedup();
    if names.len() > MAX_SHOWN_LABELS {
        return write_most_frequent(out, confusion);
    }
    writeln!(out, "\n  expected (rows) and answered (columns) with the tuned prompt")?;
    let first = confusion.keys().map(|name| name.chars().count()).max().unwrap_or(0);
    write!(out, "  {:<first$}", "")?;
    let width = |name: &str| name.chars().count().max(4);
    names.iter().try_for_each(|name| write!(out, "  {name:>width$}", width = width(name)))?;
    writeln!(out)?;
    for (label, row) in confusion {
        write!(out, "  {label:<first$}")?;
        for name in &names {
            // A dot for none: what is there is seen at once.
            let count = row.get(*name).map_or("·".to_owned(), usize::to_string);
            write!(out, "  {count:>width$}", width = width(name))?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn write_most_frequent(out: &mut dyn Write, confusion: &Confusion) -> std::io::Result<()> {
    let all = confusion.iter().flat_map(|(label, row)| row.iter().map(move |(answer, count)| (label, answer, *count)));
    let mut wrong: Vec<(&String, &String, usize)> = all.filter(|(label, answer, _)| label != answer).collect();
    wrong.sort_by(|a, b| b.2.cmp(&a.2).then(a.0.cmp(b.0)).then(a.1.cmp(b.1)));
    if wrong.is_empty() {
        return writeln!(out, "\n  the tuned prompt confused no labels");
    }
    writeln!(out, "\n  the most frequent confusions with the tuned prompt: expected → answered")?;
    for (label, answer, count) in wrong.iter().take(LISTED_CONFUSIONS) {
        writeln!(out, "  {label} → {answer}: {count}")?;
    }
    match wrong.len().checked_sub(LISTED_CONFUSIONS) {
        None | Some(0) => Ok(()),
        Some(more) => writeln!(out, "  and {more} more; --json has all of them"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(labels: usize, wrong: &[(usize, usize, usize)]) -> String {
        let name = |i: usize| format!("label-{i:02}");
        let mut confusion: Confusion = (0..labels).map(|i| (name(i), [(name(i), 5)].into())).collect();
        for &(label, answer, count) in wrong {
            confusion.entry(name(label)).or_default().insert(name(answer), count);
        }
        let mut out = Vec::new();
        write_confusion(&mut out, &confusion).expect("written");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn few_labels_are_a_matrix_and_many_a_list_of_what_was_confused() {
        let matrix = written(3, &[(0, 2, 7)]);
        let rows: Vec<Vec<&str>> = matrix.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[2], ["label-00", "label-01", "label-02"]);
        assert_eq!(rows[3], ["label-00", "5", "·", "7"]);
        let list = written(20, &[(3, 4, 2), (1, 2, 9)]);
        let lines: Vec<&str> = list.lines().map(str::trim).collect();
        assert_eq!(lines[2..], ["label-01 → label-02: 9", "label-03 → label-04: 2"]);
        let many: Vec<_> = (0..14).map(|i| (i, i + 1, 1)).collect();
        assert!(written(20, &many).ends_with("and 4 more; --json has all of them\n"));
        assert!(written(20, &[]).contains("confused no labels"));
    }
}
