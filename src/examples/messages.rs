//! Conversations as training data: lists of messages with a role and a content, as chat models are fine-tuned with.

use serde_json::Value;

use super::json::kind;

/// A message.
struct Message {
    role: String,
    text: String,
}

/// The input and the answer of a conversation of one turn: a user's message, with a system's before it or without, and
/// the assistant's answer.
pub fn one_turn(conversation: Value) -> Result<(String, String), String> {
    let mut messages = read(conversation)?;
    match messages.pop() {
        Some(Message { role, text }) if role == "assistant" => Ok((user_text(messages)?, text)),
        Some(Message { role, .. }) => Err(format!("the last message is the {role}'s, expected the assistant's")),
        None => Err("\"messages\" is empty".to_owned()),
    }
}

/// The text of a `prompt` that is a list of messages.
pub fn input(prompt: Value) -> Result<String, String> {
    user_text(read(prompt)?)
}

/// The text of a `completion` that is a list of one message.
pub fn answer(completion: Value) -> Result<String, String> {
    let mut messages = read(completion)?;
    match (messages.pop(), messages.len()) {
        (Some(Message { role, text }), 0) if role == "assistant" => Ok(text),
        _ => Err("\"completion\" is a list, expected one message, the assistant's".to_owned()),
    }
}

/// What the system and the user say, each on lines of its own.
fn user_text(messages: Vec<Message>) -> Result<String, String> {
    let roles: Vec<&str> = messages.iter().map(|message| message.role.as_str()).collect();
    match roles[..] {
        ["user"] | ["system" | "developer", "user"] => {
            Ok(messages.into_iter().map(|message| message.text).collect::<Vec<_>>().join("\n"))
        }
        _ => Err(format!(
            "the messages before the answer are by {}; expected one by the user, with one by the system before it or \
             without: split a conversation of several turns, or write it as \"input\" and \"output\"",
            if roles.is_empty() { "nobody".to_owned() } else { roles.join(", ") }
        )),
    }
}

fn read(list: Value) -> Result<Vec<Message>, String> {
    let Value::Array(items) = list else {
        return Err(format!("\"messages\" is {}, expected a list", kind(&list)));
    };
    items
        .into_iter()
        .map(|item| {
            let Value::Object(mut message) = item else {
                return Err(format!("a message is {}, expected an object with role and content", kind(&item)));
            };
            let Some(Value::String(role)) = message.remove("role") else {
                return Err("a message has no text \"role\"".to_owned());
            };
            let text = content(message.remove("content").unwrap_or_default())?;
            // What else a message may have changes what was said: tool calls, images, names.
            if let Some((key, _)) = message.iter().find(|(_, value)| !value.is_null()) {
                return Err(format!("a message has {key:?}, which is not understood; expected role and content"));
            }
            if text.trim().is_empty() {
                return Err(format!("the {role}'s message is empty"));
            }
            Ok(Message { role, text })
        })
        .collect()
}

/// A text, or a list of parts that are texts.
fn content(content: Value) -> Result<String, String> {
    match content {
        Value::String(text) => Ok(text),
        Value::Array(parts) => parts
            .into_iter()
            .map(|part| match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
                (Some("text"), Some(text)) => Ok(text.to_owned()),
                (found, _) => Err(format!("a part of a message is of type {found:?}, expected \"text\"")),
            })
            .collect(),
        other => Err(format!("a message's content is {}, expected a text", kind(&other))),
    }
}
