//! OpenAI's typed decisions as they are sent and answered.

use std::{collections::HashSet, fmt, hash::Hash};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    super::chat::plain_role,
    ask::{Choice, Question},
};
use crate::{
    http::{problem::Problem, types},
    prompt::chat::Message,
};

/// Questions about one input.
#[expect(dead_code, reason = "some fields are read and not used")]
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"model": "sentiment", "input": "The food was cold and the waiter rude.", "questions": [
    {"type": "choice", "name": "mood", "choices": [{"value": "positive"}, {"value": "negative"}]},
    {"type": "choice", "name": "about", "task": "topic", "choices": [{"value": "food"}, {"value": "sport"}]}]}))]
pub struct DecisionRequest {
    /// A task, `task@version`, or the base model's name.
    #[schema(example = "sentiment")]
    pub model: String,
    pub input: DecisionInput,
    #[schema(min_items = 1, max_items = 400)]
    pub questions: Vec<DecisionQuestion>,
    /// Give up after this time. Not in OpenAI's API.
    #[schema(minimum = 1)]
    pub timeout_ms: Option<u64>,
    /// Lower is sooner. Not in OpenAI's API.
    #[schema(minimum = -1000, maximum = 1000)]
    pub priority: Option<i32>,
    /// Read and not used: a prompt's beginning is cached by itself.
    pub prompt_cache_key: Option<Value>,
    /// Read and not used.
    pub prompt_cache_options: Option<Value>,
    /// Read and not used.
    pub safety_identifier: Option<Value>,
}

/// A text, or the messages of a conversation.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text, or a list of messages")]
pub enum DecisionInput {
    Text(String),
    Items(Vec<InputItem>),
}

/// A message.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = DecisionInputItem)]
pub struct InputItem {
    /// `message`: calls of tools are not read.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// `user`, `developer`, `system` or `assistant`.
    pub role: Option<String>,
    pub content: Option<Text>,
}

/// A text, or parts of one.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text, or a list of parts with a text")]
#[schema(as = DecisionText)]
pub enum Text {
    Whole(String),
    Parts(Vec<TextPart>),
}

/// A part of a text.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[schema(as = DecisionTextPart)]
pub struct TextPart {
    /// `input_text`, `output_text` or `text`: images and JSON are not read.
    #[serde(rename = "type")]
    pub kind: String,
    pub text: Option<String>,
}

/// One question about the input.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum DecisionQuestion {
    /// How likely it is that something is true of the input. A task needs two labels, of which `true_label` in its
    /// task.json, or the names true and false or yes and no, say which means true.
    Predicate {
        name: Option<String>,
        /// The task that is asked, if not `model`. Not in OpenAI's API.
        task: Option<String>,
        /// What is asked. A task's learned prompt is its instruction: they reach it only where its template has a field
        /// `instructions`.
        instructions: Option<Text>,
    },
    /// Which of some values it is: labels of the task.
    Choice {
        name: Option<String>,
        /// The task that is asked, if not `model`. Not in OpenAI's API.
        task: Option<String>,
        /// See the type `predicate`.
        instructions: Option<Text>,
        #[schema(min_items = 2, max_items = 255)]
        choices: Vec<ChoiceParam>,
    },
    /// How far it is on a scale of ordered levels: labels of the task.
    Score {
        name: Option<String>,
        /// The task that is asked, if not `model`. Not in OpenAI's API.
        task: Option<String>,
        /// See the type `predicate`.
        instructions: Option<Text>,
        #[schema(min_items = 2, max_items = 255)]
        levels: Vec<LevelParam>,
    },
}

/// One value of a choice.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = DecisionChoice)]
pub struct ChoiceParam {
    pub value: ChoiceValue,
    /// For the base model.
    pub description: Option<String>,
}

/// A text or a truth value.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text, true or false")]
#[schema(as = DecisionChoiceValue)]
pub enum ChoiceValue {
    Bool(bool),
    Text(String),
}

impl fmt::Debug for ChoiceValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(f),
            Self::Text(text) => fmt::Debug::fmt(text, f),
        }
    }
}

/// One level of a score.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = DecisionLevel)]
pub struct LevelParam {
    pub label: String,
    /// For the base model.
    pub description: Option<String>,
}

/// The answers to all questions.
#[derive(Debug, Serialize, ToSchema)]
pub struct Decision {
    pub object: &'static str,
    pub model: String,
    /// In the order of the questions.
    pub answers: Vec<Answer>,
    pub usage: Usage,
}

/// The answer to one question.
#[derive(Debug, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
#[schema(as = DecisionAnswer)]
pub enum Answer {
    Predicate {
        name: Option<String>,
        probability: f64,
    },
    Choice {
        name: Option<String>,
        /// The likeliest value.
        choice: ChoiceValue,
        /// Its probability.
        confidence: f64,
        /// Of each value, in the question's order.
        probabilities: Vec<ChoiceProbability>,
    },
    Score {
        name: Option<String>,
        /// The mean of the levels' numbers, which count from 0, by their probabilities.
        score: f64,
        /// The probability of the likeliest level.
        confidence: f64,
        /// Of each level, in order.
        probabilities: Vec<LevelProbability>,
    },
}

/// How likely a value is.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DecisionChoiceProbability)]
pub struct ChoiceProbability {
    pub value: ChoiceValue,
    pub probability: f64,
}

/// How likely a level is.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DecisionLevelProbability)]
pub struct LevelProbability {
    pub label: String,
    pub value: usize,
    pub probability: f64,
}

/// Tokens counted.
#[derive(Debug, Default, Serialize, ToSchema)]
#[schema(as = DecisionUsage)]
pub struct Usage {
    /// Tokens of all questions' inputs; virtual tokens are not among them.
    pub input_tokens: usize,
    pub input_tokens_details: InputTokensDetails,
    /// Always 0: nothing is generated.
    pub output_tokens: usize,
    pub output_tokens_details: OutputTokensDetails,
    pub total_tokens: usize,
}

/// What of the input had been computed before.
#[derive(Debug, Default, Serialize, ToSchema)]
#[schema(as = DecisionInputTokensDetails)]
pub struct InputTokensDetails {
    pub cached_tokens: usize,
    /// Always 0.
    pub cache_write_tokens: usize,
}

/// What of the output was not shown.
#[derive(Debug, Default, Serialize, ToSchema)]
#[schema(as = DecisionOutputTokensDetails)]
pub struct OutputTokensDetails {
    /// Always 0.
    pub reasoning_tokens: usize,
}

impl Usage {
    /// Adds what one question took.
    pub fn add(&mut self, of: &types::Usage) {
        self.input_tokens += of.prompt_tokens;
        self.total_tokens += of.prompt_tokens;
        self.input_tokens_details.cached_tokens += of.cached_tokens.saturating_sub(of.virtual_tokens);
    }
}

impl Text {
    /// The whole of it.
    ///
    /// # Errors
    /// A part is no text.
    pub fn read(&self, at: &str) -> Result<String, Problem> {
        let part = |(i, part): (usize, &TextPart)| match (&*part.kind, &part.text) {
            ("input_text" | "output_text" | "text", Some(text)) => Ok(text.clone()),
            (kind, _) => {
                let kind: String = kind.chars().take(40).collect();
                let detail = format!(
                    "found a part of the type {kind:?}, expected \"input_text\" with a text: the model reads nothing else"
                );
                Err(Problem::field(&format!("{at}[{i}]"), detail))
            }
        };
        match self {
            Self::Whole(text) => Ok(text.clone()),
            Self::Parts(parts) => parts.iter().enumerate().map(part).collect(),
        }
    }
}

impl DecisionInput {
    /// The messages; a text is one of the user.
    ///
    /// # Errors
    /// An item is no message, or its content no text.
    pub fn messages(&self) -> Result<Vec<Message>, Problem> {
        let message = |(i, item): (usize, &InputItem)| {
            let at = format!("input[{i}]");
            if let Some(kind) = item.kind.as_deref().filter(|kind| *kind != "message") {
                let kind: String = kind.chars().take(40).collect();
                return Err(Problem::field(&format!("{at}.type"), format!("found {kind:?}, expected \"message\"")));
            }
            let (Some(role), Some(content)) = (&item.role, &item.content) else {
                return Err(Problem::field(&at, "expected a message with \"role\" and \"content\""));
            };
            let role = plain_role(role, &at)?.to_owned();
            Ok(Message { role, content: content.read(&format!("{at}.content"))?, name: None })
        };
        match self {
            Self::Text(text) => Ok(vec![Message { role: "user".to_owned(), content: text.clone(), name: None }]),
            Self::Items(items) => items.iter().enumerate().map(message).collect(),
        }
    }
}

impl ChoiceValue {
    fn name(&self) -> String {
        match self {
            Self::Bool(value) => value.to_string(),
            Self::Text(text) => text.clone(),
        }
    }
}

impl DecisionQuestion {
    /// The question, checked.
    ///
    /// # Errors
    /// It has too few or too many options, or one twice.
    pub fn read(&self, at: &str) -> Result<Question, Problem> {
        let (task, instructions, options) = match self {
            Self::Predicate { task, instructions, .. } => (task, instructions, None),
            Self::Choice { task, instructions, choices, .. } => {
                let one = |c: &ChoiceParam| Choice { name: c.value.name(), description: c.description.clone() };
                check_options(choices.iter().map(|c| &c.value), &format!("{at}.choices"))?;
                (task, instructions, Some(choices.iter().map(one).collect::<Vec<_>>()))
            }
            Self::Score { task, instructions, levels, .. } => {
                let one = |l: &LevelParam| Choice { name: l.label.clone(), description: l.description.clone() };
                check_options(levels.iter().map(|l| &l.label), &format!("{at}.levels"))?;
                (task, instructions, Some(levels.iter().map(one).collect()))
            }
        };
        let instructions = instructions.as_ref().map(|text| text.read(&format!("{at}.instructions"))).transpose()?;
        Ok(Question { at: at.to_owned(), task: task.clone(), instructions, options, meanings: [None, None] })
    }
}

/// Whether there are enough options, and none twice.
///
/// # Errors
/// There are not.
pub fn check_options<T: Hash + Eq + fmt::Debug>(
    options: impl ExactSizeIterator<Item = T>,
    at: &str,
) -> Result<(), Problem> {
    if !(2..=255).contains(&options.len()) {
        return Err(Problem::field(at, format!("found {}, expected 2 to 255", options.len())));
    }
    let mut seen = HashSet::new();
    for option in options {
        let shown: String = format!("{option:?}").chars().take(80).collect();
        if !seen.insert(option) {
            return Err(Problem::field(at, format!("found {shown} twice, expected each once")));
        }
    }
    Ok(())
}

/// The index of the likeliest, the first of equals, and its probability.
pub fn likeliest(probabilities: &[f64]) -> (usize, f64) {
    let mut best = (0, f64::NEG_INFINITY);
    for (i, &p) in probabilities.iter().enumerate() {
        if p > best.1 {
            best = (i, p);
        }
    }
    best
}

/// The mean of the levels' numbers by their probabilities.
pub fn mean_level(probabilities: &[f64]) -> f64 {
    probabilities.iter().enumerate().map(|(level, p)| level as f64 * p).sum()
}

impl Answer {
    /// The answer to a question whose options have these probabilities.
    pub fn new(question: &DecisionQuestion, probabilities: &[f64]) -> Self {
        let (best, confidence) = likeliest(probabilities);
        match question {
            DecisionQuestion::Predicate { name, .. } => {
                Self::Predicate { name: name.clone(), probability: probabilities.first().copied().unwrap_or_default() }
            }
            DecisionQuestion::Choice { name, choices, .. } => Self::Choice {
                name: name.clone(),
                choice: choices.get(best).map_or(ChoiceValue::Bool(false), |choice| choice.value.clone()),
                confidence,
                probabilities: choices
                    .iter()
                    .zip(probabilities)
                    .map(|(choice, &probability)| ChoiceProbability { value: choice.value.clone(), probability })
                    .collect(),
            },
            DecisionQuestion::Score { name, levels, .. } => Self::Score {
                name: name.clone(),
                score: mean_level(probabilities),
                confidence,
                probabilities: levels
                    .iter()
                    .enumerate()
                    .zip(probabilities)
                    .map(|((value, level), &probability)| LevelProbability {
                        label: level.label.clone(),
                        value,
                        probability,
                    })
                    .collect(),
            },
        }
    }
}
