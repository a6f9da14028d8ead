//! Names and versions: a task's name moves from version to version, a version never changes.

use std::{
    borrow::Borrow,
    fmt,
    str::FromStr,
    sync::{Arc, OnceLock},
};

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{
    chat::ChatTemplate,
    label_scores::LabelTokens,
    labels::Verbalizer,
    learned::{Embeddings, InputToken, LearnedPrompt},
    peft_type::PeftType,
    spec::TaskSpec,
    template::{DEFAULT_TEMPLATE, PromptTemplate},
};

/// The longest task name, in bytes.
pub const MAX_TASK_NAME: usize = 63;

/// A task's name: `[a-z0-9][a-z0-9_-]{0,62}`, safe in a URL and as a folder's name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TaskName(Arc<str>);

/// A text that is not a task name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{found:?} is not a task name: expected 1 to 63 characters, lower-case letters, digits, '-' or \
     '_', the first a letter or digit"
)]
pub struct InvalidTaskName {
    /// The text, cut to its first 80 characters.
    pub found: String,
}

/// Names that some file systems keep for devices; a folder of that name cannot be made there.
const RESERVED: [&str; 4] = ["con", "prn", "aux", "nul"];

impl TaskName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TaskName {
    type Err = InvalidTaskName;

    fn from_str(text: &str) -> Result<Self, InvalidTaskName> {
        let mut bytes = text.bytes();
        let first = bytes.next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let rest = bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_');
        if first && rest && text.len() <= MAX_TASK_NAME && !RESERVED.contains(&text) {
            Ok(Self(text.into()))
        } else {
            Err(InvalidTaskName { found: text.chars().take(80).collect() })
        }
    }
}

impl TryFrom<String> for TaskName {
    type Error = InvalidTaskName;

    fn try_from(text: String) -> Result<Self, InvalidTaskName> {
        text.parse()
    }
}

impl From<TaskName> for String {
    fn from(name: TaskName) -> Self {
        name.0.as_ref().to_owned()
    }
}

impl Borrow<str> for TaskName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TaskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TaskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TaskName({})", self.0)
    }
}

/// The SHA-256 of a version's content. Shown as its first 12 hex digits, the version's id.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The version's id: the first 12 hex digits.
    pub fn id(&self) -> String {
        hex::encode(&self.0[..6])
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({})", self.id())
    }
}

/// What a task's name resolves to at one moment. Immutable: a change is a new `Version`, and a
/// request keeps the one it began with.
#[derive(Debug)]
pub struct Version {
    /// The task it was published under.
    pub task: TaskName,
    /// The digest of its files' content.
    pub digest: Digest,
    /// The type that its configuration names; prompt tuning where it has none.
    pub peft_type: PeftType,
    /// The tensors that a tuner wrote, ready for the model.
    pub prompt: Arc<LearnedPrompt>,
    /// How an input becomes text.
    pub template: PromptTemplate,
    /// How a conversation becomes text, where that is said.
    pub chat: Option<ChatTemplate>,
    /// Its labels, where it has any.
    pub labels: Option<Verbalizer>,
    /// Its `task.json`, or the defaults where there is none.
    pub spec: TaskSpec,
    /// What was odd about its files but not wrong, for a log and the admin API.
    pub warnings: Vec<String>,
    /// The positions that every input begins with, once the first request has tokenized them.
    pub fixed_beginning: OnceLock<Vec<InputToken>>,
    /// The token ids of its labels, once the first request has tokenized them.
    pub label_tokens: OnceLock<LabelTokens>,
}

impl Version {
    /// The frozen model without a learned prompt, under its own name. `chat` is the model's chat template.
    ///
    /// # Errors
    /// There is no memory.
    pub fn without_prompt(
        fingerprint: &str,
        hidden_size: usize,
        chat: Option<ChatTemplate>,
    ) -> Result<Self, candle_core::Error> {
        let rows = Tensor::zeros((0, hidden_size), DType::F32, &Device::Cpu)?;
        let template = PromptTemplate::parse(DEFAULT_TEMPLATE).map_err(candle_core::Error::wrap)?;
        Ok(Self {
            task: TaskName("base-model".into()),
            digest: Digest(Sha256::digest(fingerprint).into()),
            peft_type: PeftType::PromptTuning,
            prompt: Arc::new(LearnedPrompt::Embeddings(Embeddings { rows })),
            template,
            chat,
            labels: None,
            spec: TaskSpec::default(),
            warnings: Vec::new(),
            fixed_beginning: OnceLock::new(),
            label_tokens: OnceLock::new(),
        })
    }

    /// The learned prompt, if it has any virtual token.
    pub fn learned_prompt(&self) -> Option<&Arc<LearnedPrompt>> {
        Some(&self.prompt).filter(|prompt| prompt.num_virtual_tokens() > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_name_is_lower_case_and_safe_in_a_path() {
        for good in ["sentiment", "a", "0", "my-task_2", &"x".repeat(63)] {
            assert!(good.parse::<TaskName>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "../x", "a/b", "a\\b", "A", "-a", "_a", "a\0b", "é", "con", &"x".repeat(64)] {
            assert!(bad.parse::<TaskName>().is_err(), "{bad}");
        }
    }
}
