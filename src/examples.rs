//! Examples of a task: records to examples, examples to token ids. Every fault is found before anything is trained, and
//! listed by line.

mod json;
mod messages;
mod records;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use json::kind;

use crate::{
    content,
    input::InputEncoder,
    packing::{InputToken, PromptShape, TokenBudget, text_ids, text_len},
    prompt::{
        labels::{LabelError, Verbalizer},
        template::Input,
    },
};

/// The most faults that an error message lists; the rest are counted.
const LISTED_FAULTS: usize = 20;

/// The longest piece of a user's data that an error message quotes, in characters.
const QUOTED: usize = 60;

/// One line of the data.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Counted from 1.
    pub line: usize,
    pub input: Input,
    /// What the model is to write.
    pub output: String,
    /// The label that `output` is the word of, where the task has labels.
    pub label: Option<String>,
}

/// A data file that is right in every line.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Where it was read from, for messages.
    pub path: PathBuf,
    pub examples: Vec<Example>,
    /// The labels, where the lines have `label` instead of `output`.
    pub labels: Option<Verbalizer>,
    /// SHA-256 of the file, in hex.
    pub digest: String,
}

/// Why a data file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("cannot read the data {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} has no examples; expected one JSON object a line, such as {{\"input\": \"…\", \"output\": \"…\"}}", path.display())]
    Empty { path: PathBuf },
    /// Something else in place of the file.
    #[error("{} is not training data: {reason}", path.display())]
    StandIn { path: PathBuf, reason: String },
    #[error("{0}")]
    Faults(Faults),
    #[error("the labels cannot be used: {0}")]
    Labels(#[from] LabelError),
}

/// What is wrong, line by line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults {
    pub path: PathBuf,
    /// Line and fault, in order.
    pub faults: Vec<(usize, String)>,
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.faults.len();
        let lines = if n == 1 { "1 line".to_owned() } else { format!("{n} lines") };
        write!(f, "{} has {lines} that cannot be used:", self.path.display())?;
        for (line, fault) in self.faults.iter().take(LISTED_FAULTS) {
            write!(f, "\n  line {line}: {fault}")?;
        }
        if n > LISTED_FAULTS {
            write!(f, "\n  … and {} more", n - LISTED_FAULTS)?;
        }
        Ok(())
    }
}

/// What a line says of its answer, before labels are known.
enum Answer {
    Output(String),
    Label(String),
}

impl Dataset {
    /// Reads JSON Lines, a JSON array or CSV. A record has `input`, a text or an object of texts, and `output` or
    /// `label`; or, as other programs write it, `prompt` and `completion`, or `messages`. Without `labels` the labels are
    /// those of the data, each its own word.
    pub fn read(path: &Path, labels: Option<&Verbalizer>) -> Result<Self, DataError> {
        let bytes = fs::read(path).map_err(|source| DataError::Read { path: path.to_owned(), source })?;
        Self::parse(path, &bytes, labels)
    }

    /// Whether all examples have one label.
    pub fn has_one_label(&self) -> bool {
        let mut labels = self.examples.iter().map(|example| &example.label);
        labels.next().is_some_and(|first| first.is_some() && labels.all(|label| label == first))
    }

    /// Like [`read`](Self::read), of a file's content; `path` is for messages.
    pub fn parse(path: &Path, bytes: &[u8], labels: Option<&Verbalizer>) -> Result<Self, DataError> {
        if let Some(reason) = content::marked_stand_in(bytes) {
            return Err(DataError::StandIn { path: path.to_owned(), reason });
        }
        let mut faults = Vec::new();
        let mut lines: Vec<(usize, Input, Answer)> = Vec::new();
        for (line, record) in records::split(path, bytes) {
            match record.and_then(parse_record) {
                Ok((input, answer)) => lines.push((line, input, answer)),
                Err(fault) => faults.push((line, fault)),
            }
        }
        if lines.is_empty() && faults.is_empty() {
            return Err(DataError::Empty { path: path.to_owned() });
        }
        let labels = match labels {
            Some(given) => Some(given.clone()),
            None => labels_of(&lines)?,
        };
        let examples = lines
            .into_iter()
            .filter_map(|(line, input, answer)| match with_label(answer, labels.as_ref()) {
                Ok((output, label)) => Some(Example { line, input, output, label }),
                Err(fault) => {
                    faults.push((line, fault));
                    None
                }
            })
            .collect();
        if !faults.is_empty() {
            faults.sort();
            return Err(DataError::Faults(Faults { path: path.to_owned(), faults }));
        }
        Ok(Self { path: path.to_owned(), examples, labels, digest: hex::encode(Sha256::digest(bytes)) })
    }
}

/// The names of an input, and of an answer, the first as `tune` writes it.
const INPUTS: [&str; 2] = ["input", "prompt"];
const OUTPUTS: [&str; 2] = ["output", "completion"];

fn parse_record(mut object: Map<String, Value>) -> Result<(Input, Answer), String> {
    if let Some(conversation) = object.remove("messages") {
        if !object.is_empty() {
            return Err(format!("unknown key{}; expected messages alone", found_keys(&object)));
        }
        let (input, output) = messages::one_turn(conversation)?;
        return Ok((Input::Text(input), Answer::Output(output)));
    }
    let input = match INPUTS.iter().find_map(|name| Some((*name, object.remove(*name)?))) {
        Some((name, Value::String(text))) if text.trim().is_empty() => return Err(format!("{name:?} is empty")),
        Some((_, Value::String(text))) => Input::Text(text),
        Some((_, Value::Object(fields))) => Input::Fields(text_fields(fields)?),
        Some(("prompt", list @ Value::Array(_))) => Input::Text(messages::input(list)?),
        Some((name, other)) => {
            return Err(format!("{name:?} is {}, expected a text or an object of texts", kind(&other)));
        }
        None => return Err(format!("\"input\" is missing{}", found_keys(&object))),
    };
    let output = match OUTPUTS.iter().find_map(|name| Some((*name, object.remove(*name)?))) {
        None => None,
        Some((name, Value::String(text))) if text.trim().is_empty() => return Err(format!("{name:?} is empty")),
        Some((_, Value::String(text))) => Some(text),
        Some(("completion", list @ Value::Array(_))) => Some(messages::answer(list)?),
        Some((name, other)) => return Err(format!("{name:?} is {}, expected a text", kind(&other))),
    };
    let label = match object.remove("label") {
        None => None,
        // Spaces around a label are not part of it.
        Some(Value::String(text)) if text.trim().is_empty() => return Err("\"label\" is empty".to_owned()),
        Some(Value::String(text)) => Some(text.trim().to_owned()),
        // Class numbers, as data sets have them.
        Some(Value::Number(number)) if number.is_i64() || number.is_u64() => Some(number.to_string()),
        Some(other) => return Err(format!("\"label\" is {}, expected a text or a whole number", kind(&other))),
    };
    let answer = match (output, label) {
        (Some(output), None) => Answer::Output(output),
        (None, Some(label)) => Answer::Label(label),
        (Some(_), Some(_)) => return Err("it has \"output\" and \"label\"; expected one of them".to_owned()),
        (None, None) => return Err(format!("\"output\" or \"label\" is missing{}", found_keys(&object))),
    };
    if !object.is_empty() {
        return Err(format!("unknown key{}; expected are input and output or label", found_keys(&object)));
    }
    Ok((input, answer))
}

fn text_fields(fields: Map<String, Value>) -> Result<BTreeMap<String, String>, String> {
    fields
        .into_iter()
        .map(|(name, value)| match value {
            Value::String(text) => Ok((name, text)),
            other => Err(format!("the field {name:?} of \"input\" is {}, expected a text", kind(&other))),
        })
        .collect()
}

fn found_keys(object: &Map<String, Value>) -> String {
    if object.is_empty() {
        return String::new();
    }
    let keys: Vec<String> = object.keys().take(5).map(|k| quote(k)).collect();
    format!("; found {}", keys.join(", "))
}

/// A piece of the user's data, cut for a message.
pub(crate) fn quote(text: &str) -> String {
    if text.chars().count() <= QUOTED {
        return format!("{text:?}");
    }
    format!("{:?}…", text.chars().take(QUOTED).collect::<String>())
}

/// The labels that the lines have, each its own word; `None` where the lines have outputs.
fn labels_of(lines: &[(usize, Input, Answer)]) -> Result<Option<Verbalizer>, LabelError> {
    let found: BTreeSet<&str> = lines
        .iter()
        .filter_map(|(_, _, answer)| match answer {
            Answer::Label(label) => Some(label.as_str()),
            Answer::Output(_) => None,
        })
        .collect();
    if found.is_empty() {
        return Ok(None);
    }
    Verbalizer::new(&found.into_iter().map(|l| (l.to_owned(), vec![l.to_owned()])).collect()).map(Some)
}

fn with_label(answer: Answer, labels: Option<&Verbalizer>) -> Result<(String, Option<String>), String> {
    match (answer, labels) {
        (Answer::Output(output), None) => Ok((output, None)),
        (Answer::Output(text) | Answer::Label(text), Some(labels)) => {
            let known = labels.label_of(&text).and_then(|l| Some((labels.word_for(l)?.to_owned(), Some(l.to_owned()))));
            known.ok_or_else(|| {
                let names: Vec<&str> = labels.labels().take(10).collect();
                format!("{} is not a label; the labels are {}", quote(&text), names.join(", "))
            })
        }
        (Answer::Label(label), None) => Ok((label, None)),
    }
}

/// An example as the model sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizedExample {
    /// The input's tokens, special tokens included, with virtual tokens where they have their places.
    pub input: Vec<InputToken>,
    /// The answer with EOS; never empty.
    pub answer: Vec<u32>,
}

impl TokenizedExample {
    /// An input of these ids, special tokens included, after the learned prompt.
    pub fn of_ids(ids: &[u32], answer: Vec<u32>) -> Self {
        Self { input: PromptShape::None.followed_by(ids), answer }
    }

    /// The ids of the input's text.
    pub fn text_ids(&self) -> Vec<u32> {
        text_ids(&self.input)
    }
}

/// Renders and tokenizes examples. Where the task names a field to shorten, it is shortened so that the longest answer still
/// has room. An example that is longer than `budget` is a fault.
pub fn tokenize(
    path: &Path,
    examples: &[Example],
    encoder: &InputEncoder<'_>,
    eos: u32,
    budget: TokenBudget,
) -> Result<Vec<TokenizedExample>, DataError> {
    let answer = |example: &Example| -> Result<Vec<u32>, String> {
        let mut answer = encoder.tokenizer.tokenize_continuation(&example.output).map_err(|e| e.to_string())?;
        if answer.is_empty() {
            return Err(format!("the answer {} has no tokens", quote(&example.output)));
        }
        answer.push(eos);
        Ok(answer)
    };
    let answers: Vec<_> = examples.iter().map(answer).collect();
    let longest = answers.iter().flatten().map(Vec::len).max().unwrap_or(1);
    let limit = if budget.shared { budget.output.saturating_sub(longest) } else { budget.input };
    let one = |example: &Example, answer: Result<Vec<u32>, String>| -> Result<TokenizedExample, String> {
        let answer = answer?;
        let input = encoder.encode(&example.input, limit).map_err(|e| e.to_string())?;
        let fits = budget.check(text_len(&input), answer.len());
        fits.map_err(|fault| format!("{fault}; shorten it, or take fewer virtual tokens"))?;
        Ok(TokenizedExample { input, answer })
    };
    let mut faults = Vec::new();
    let mut tokenized = Vec::with_capacity(examples.len());
    for (example, answer) in examples.iter().zip(answers) {
        match one(example, answer) {
            Ok(e) => tokenized.push(e),
            Err(fault) => faults.push((example.line, fault)),
        }
    }
    match faults.is_empty() {
        true => Ok(tokenized),
        false => Err(DataError::Faults(Faults { path: path.to_owned(), faults })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Dataset, DataError> {
        Dataset::parse(Path::new("d.jsonl"), text.as_bytes(), None)
    }

    #[test]
    fn every_bad_line_is_listed_with_its_number_and_fault() {
        let text = "{\"input\": \"a\", \"output\": \"b\"}\n\n{\"input\": 3, \"output\": \"b\"}\nnot json\n[1]\n\
                    {\"text\": \"a\", \"output\": \"b\"}\n{\"input\": \"a\"}\n{\"input\": \"a\", \"output\": \"\"}\n\
                    {\"input\": {\"q\": 1}, \"output\": \"b\"}\n{\"input\": \"a\", \"output\": \"b\", \"weight\": 2}";
        let Err(DataError::Faults(faults)) = parse(text) else { panic!("faults were expected") };
        let lines: Vec<usize> = faults.faults.iter().map(|f| f.0).collect();
        assert_eq!(lines, [3, 4, 5, 6, 7, 8, 9, 10]);
        let message = faults.to_string();
        for part in [
            "line 3: \"input\" is a number",
            "\"input\" is missing; found \"text\", \"output\"",
            "column",
            "unknown key",
            "the field \"q\"",
        ] {
            assert!(message.contains(part), "{part} in {message}");
        }
    }

    #[test]
    fn records_of_other_programs_are_the_same_examples() {
        let wanted = |text: &str, output: &str, label: Option<&str>| {
            let found = parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            let example = found.examples.last().expect("an example").clone();
            assert_eq!((example.output.as_str(), example.label.as_deref()), (output, label), "{text}");
            example.input
        };
        let text = |text: &str| Input::Text(text.to_owned());
        assert_eq!(wanted(r#"{"prompt": "cat", "completion": " chat"}"#, " chat", None), text("cat"));
        assert_eq!(wanted(r#"{"input": "a", "label": 1}"#, "1", Some("1")), text("a"));
        assert_eq!(wanted(r#"{"input": "a", "label": " fine "}"#, "fine", Some("fine")), text("a"));
        let turn = r#"{"messages": [{"role": "system", "content": "Translate."},
            {"role": "user", "content": [{"type": "text", "text": "cat"}]}, {"role": "assistant", "content": "chat"}]}"#;
        assert_eq!(wanted(&turn.replace('\n', " "), "chat", None), text("Translate.\ncat"));
        let lists =
            r#"{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}"#;
        assert_eq!(wanted(lists, "b", None), text("a"));
        for (bad, words) in [
            (r#"{"messages": [{"role": "user", "content": "a"}]}"#, "the last message is the user's"),
            (
                r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "n": 1}"#,
                "\"n\"",
            ),
            (
                r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}"#,
                "user, assistant, user",
            ),
            (r#"{"messages": [{"role": "assistant", "content": "b", "tool_calls": [1]}]}"#, "tool_calls"),
            (r#"{"input": "a", "label": 1.5}"#, "expected a text or a whole number"),
            (r#"{"input": "a", "prompt": "b", "output": "c"}"#, "unknown key; found \"prompt\""),
        ] {
            let error = parse(&bad.replace('\n', " ")).expect_err(bad).to_string();
            assert!(error.contains(words), "{error}");
        }
        assert!(
            parse("{\"input\": \"a\", \"label\": \"x\"}\n{\"input\": \"b\", \"label\": \" x\"}")
                .expect("valid")
                .has_one_label()
        );
        assert!(!parse("{\"input\": \"a\", \"output\": \"x\"}").expect("valid").has_one_label());
        let pointer = parse("version https://git-lfs.github.com/spec/v1\noid sha256:00\n").expect_err("no data");
        assert!(pointer.to_string().contains("git lfs pull"), "{pointer}");
    }

    #[test]
    fn a_message_lists_twenty_faults_and_counts_the_rest() {
        let Err(DataError::Faults(faults)) = parse(&"x\n".repeat(25)) else { panic!("faults were expected") };
        let message = faults.to_string();
        assert!(message.contains("25 lines") && message.contains("… and 5 more"), "{message}");
        assert_eq!(message.lines().count(), 22);
    }

    #[test]
    fn labels_come_from_the_data_unless_they_are_given() {
        let text = "{\"input\": \"a\", \"label\": \"pos\"}\n{\"input\": \"b\", \"label\": \"neg\"}\n";
        let found = parse(text).expect("valid");
        assert_eq!(found.labels.expect("labels").labels().collect::<Vec<_>>(), ["neg", "pos"]);
        let given = [("pos".to_owned(), vec!["great".to_owned()]), ("neg".to_owned(), vec!["bad".to_owned()])];
        let given = Verbalizer::new(&given.into()).expect("valid");
        let data = Dataset::parse(Path::new("d"), text.as_bytes(), Some(&given)).expect("valid");
        assert_eq!(data.examples[0].output, "great");
        assert_eq!(data.examples[0].label.as_deref(), Some("pos"));
        let other = "{\"input\": \"a\", \"label\": \"mixed\"}";
        let refused = Dataset::parse(Path::new("d"), other.as_bytes(), Some(&given));
        assert!(
            refused.expect_err("a fault").to_string().contains("\"mixed\" is not a label; the labels are neg, pos")
        );
    }
}
