//! What a client of OpenAI's API sends, and what of it is refused by name.

use std::collections::BTreeMap;

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::{
    http::{App, extract::from_value, prepare::Parameters, problem::Problem, types::stop_texts},
    prompt::grammar::Grammar,
    sampling::SamplingOptions,
};

/// A request's struct: its own fields and those that completions and chat completions have in common.
macro_rules! request {
    ($(#[$attribute:meta])* $name:ident { $($(#[$field_attribute:meta])* $field:ident: $type:ty,)* }) => {
        #[expect(dead_code, reason = "some fields are read and not used")]
        #[derive(Debug, Clone, Deserialize, ToSchema)]
        $(#[$attribute])*
        // The sampling parameters are described, in the specification too, by the table of `crate::sampling`.
        #[serde(deny_unknown_fields)]
        pub struct $name {
            /// A task, `task@version`, or the base model's name.
            #[schema(example = "sentiment")]
            pub model: String,
            $($(#[$field_attribute])* pub $field: $type,)*
            #[schema(example = 8)]
            pub max_tokens: Option<usize>,
            pub min_tokens: Option<usize>,
            pub temperature: Option<f32>,
            pub top_p: Option<f32>,
            pub top_k: Option<usize>,
            pub min_p: Option<f32>,
            /// The same seed and request give the same answer. Left out: a random one.
            pub seed: Option<i64>,
            /// How many answers.
            #[schema(minimum = 1, maximum = 16)]
            pub n: Option<usize>,
            /// A text, or up to 16 of them, before the first of which the answer ends.
            #[serde(default, deserialize_with = "stop_texts")]
            #[schema(value_type = Option<Vec<String>>, max_items = 16)]
            pub stop: Option<Vec<String>>,
            pub frequency_penalty: Option<f32>,
            pub presence_penalty: Option<f32>,
            pub repetition_penalty: Option<f32>,
            /// What is added to the logits of tokens, by their ids: -100 to 100.
            pub logit_bias: Option<BTreeMap<String, f32>>,
            /// Report the log-probabilities of these token ids too, where log-probabilities are reported: up to 128.
            #[schema(max_items = 128)]
            pub logprob_token_ids: Option<Vec<u32>>,
            /// Texts that the answer does not have, as the tokens they are written with: up to 128, of 1 to 256 bytes
            /// each. Not in OpenAI's API.
            #[schema(max_items = 128)]
            pub bad_words: Option<Vec<String>>,
            /// What the answer is: any text, a JSON object, or JSON of a schema.
            pub response_format: Option<ResponseFormat>,
            /// What the whole answer must obey, in place of the task's. Not in OpenAI's API.
            pub grammar: Option<Grammar>,
            /// Send the answer as server-sent events while it is made.
            pub stream: Option<bool>,
            pub stream_options: Option<StreamOptions>,
            /// Go on after the model's end-of-text token. Not in OpenAI's API.
            pub ignore_eos: Option<bool>,
            /// Give up after this time. Not in OpenAI's API.
            #[schema(minimum = 1)]
            pub timeout_ms: Option<u64>,
            /// Lower is sooner. Not in OpenAI's API.
            #[schema(minimum = -1000, maximum = 1000)]
            pub priority: Option<i32>,
            /// Read and not used.
            pub user: Option<Value>,
            /// Read and not used.
            pub metadata: Option<Value>,
            /// Read and not used: nothing is stored.
            pub store: Option<bool>,
            /// Read and not used.
            pub service_tier: Option<Value>,
            /// Read and not used.
            pub safety_identifier: Option<Value>,
            /// Read and not used: a prompt's beginning is cached by itself.
            pub prompt_cache_key: Option<Value>,
            /// Read and not used.
            pub prompt_cache_retention: Option<Value>,
        }

        impl $name {
            /// What it says beside its input. `logprobs` and the most new tokens have other names in each API.
            pub fn parameters(
                &self,
                app: &App,
                logprobs: Option<usize>,
                max_tokens: Option<usize>,
            ) -> Result<Parameters, Problem> {
                Ok(Parameters {
                    sampling: SamplingOptions {
                        max_tokens,
                        min_tokens: self.min_tokens,
                        temperature: self.temperature,
                        top_p: self.top_p,
                        top_k: self.top_k,
                        min_p: self.min_p,
                        repetition_penalty: self.repetition_penalty,
                        frequency_penalty: self.frequency_penalty,
                        presence_penalty: self.presence_penalty,
                        stop: self.stop.clone(),
                    },
                    // All 64 bits count.
                    seed: self.seed.map(i64::cast_unsigned),
                    logit_bias: logit_bias(app, self.logit_bias.as_ref())?,
                    logprobs,
                    logprob_token_ids: self.logprob_token_ids.clone().unwrap_or_default(),
                    bad_words: self.bad_words.clone().unwrap_or_default(),
                    grammar: grammar(self.response_format.as_ref(), self.grammar.as_ref())?,
                    n: self.n,
                    ignore_eos: self.ignore_eos,
                    timeout_ms: self.timeout_ms,
                    priority: self.priority,
                })
            }

            /// Whether a stream ends with an event that has the usage.
            pub fn wants_usage(&self) -> bool {
                self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
            }
        }
    };
}

/// How a stream looks.
#[expect(dead_code, reason = "some fields are read and not used")]
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// End with an event that has `usage` and no choices.
    pub include_usage: Option<bool>,
    /// Read and not used.
    pub include_obfuscation: Option<bool>,
}

/// What an answer is.
#[derive(Debug, Clone, PartialEq, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[schema(as = OpenAiResponseFormat)]
pub enum ResponseFormat {
    /// What the task's own grammar says, if it has one; else any text.
    Text {},
    /// A JSON object.
    JsonObject {},
    /// JSON that is valid by a schema.
    JsonSchema { json_schema: NamedSchema },
}

/// A JSON schema with its name.
#[derive(Debug, Clone, PartialEq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = OpenAiNamedSchema)]
pub struct NamedSchema {
    /// Read and not used.
    pub name: Option<String>,
    /// Read and not used: the model is not shown it.
    pub description: Option<String>,
    /// What the answer is valid by; left out, any JSON object.
    pub schema: Option<Value>,
    /// An answer is always valid; true also closes the schema's objects that do not say whether they may have other properties than
    /// they name.
    pub strict: Option<bool>,
}

/// One text or several, each as a text or as token ids. A task's template renders a text; ids are taken as they are.
#[derive(Debug, Clone, PartialEq, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text, a list of texts, a list of token ids, or a list of those")]
#[schema(as = OpenAiPrompt, title = "Prompt")]
pub enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    ListsOfIds(Vec<Vec<u32>>),
}

request! {
    /// A request of `POST /v1/completions`.
    #[schema(example = json!({"model": "sentiment", "prompt": "The food was cold and the waiter rude.", "max_tokens": 8}))]
    CompletionRequest {
        prompt: Prompt,
        /// Begin the answer with the prompt; with `logprobs`, tell of its tokens too, which are those of the template's text.
        echo: Option<bool>,
        /// Report the log-probability of each token, and of this many likeliest ones.
        #[schema(minimum = 0, maximum = 20)]
        logprobs: Option<usize>,
    }
}

/// A part of a message.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = OpenAiContentPart)]
pub struct ContentPart {
    /// `text`: there are no others.
    #[serde(rename = "type")]
    pub kind: String,
    pub text: Option<String>,
}

/// What a message says.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text, or a list of parts of the type \"text\"")]
#[schema(as = OpenAiContent)]
pub enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

/// One message of a conversation.
#[expect(dead_code, reason = "some fields are read and not used")]
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = OpenAiMessage)]
pub struct ChatMessage {
    /// `system`, `developer`, `user` or `assistant`.
    pub role: String,
    pub content: Content,
    pub name: Option<String>,
    /// Read and not used; it may be null.
    pub refusal: Option<Value>,
}

request! {
    /// A request of `POST /v1/chat/completions`.
    #[schema(example = json!({"model": "sentiment", "messages": [{"role": "user", "content": "A fine evening."}]}))]
    ChatRequest {
        #[schema(min_items = 1)]
        messages: Vec<ChatMessage>,
        /// The most new tokens; `max_tokens` is its older name.
        #[schema(minimum = 1)]
        max_completion_tokens: Option<usize>,
        /// Report the log-probability of each token.
        logprobs: Option<bool>,
        /// Report this many likeliest tokens at each position; needs `logprobs`.
        #[schema(minimum = 0, maximum = 20)]
        top_logprobs: Option<usize>,
    }
}

/// A field's value that asks for nothing.
type Nothing = fn() -> Value;

/// Fields of OpenAI's API that this server does not have, with the value that asks for nothing.
const REFUSED: [(&str, Nothing); 15] = [
    ("best_of", || json!(1)),
    ("suffix", || json!("")),
    ("tools", || json!([])),
    ("tool_choice", || json!("none")),
    ("parallel_tool_calls", || json!(true)),
    ("functions", || json!([])),
    ("function_call", || json!("none")),
    ("audio", || Value::Null),
    ("modalities", || json!(["text"])),
    ("moderation", || Value::Null),
    ("prediction", || Value::Null),
    ("reasoning_effort", || json!("none")),
    ("verbosity", || json!("medium")),
    ("web_search_options", || Value::Null),
    ("prompt_cache_options", || Value::Null),
];

/// A request without what it must not have.
///
/// # Errors
/// It has a field that this server does not support, an unknown one, or one of a wrong type.
pub fn read<T: DeserializeOwned>(mut body: Map<String, Value>) -> Result<T, Problem> {
    for (field, nothing) in REFUSED {
        match body.remove(field) {
            None | Some(Value::Null) => {}
            Some(value) if value == nothing() => {}
            Some(_) => return Err(Problem::field(field, "this server does not support it: leave it out")),
        }
    }
    from_value(body.into())
}

/// What the answer must obey, if anything.
///
/// # Errors
/// It is said twice.
fn grammar(format: Option<&ResponseFormat>, grammar: Option<&Grammar>) -> Result<Option<Grammar>, Problem> {
    let format = match format {
        None | Some(ResponseFormat::Text {}) => None,
        Some(ResponseFormat::JsonObject {}) => Some(Grammar::json_object()),
        Some(ResponseFormat::JsonSchema { json_schema }) => {
            let mut schema = json_schema.schema.clone();
            if let Some(schema) = schema.as_mut().filter(|_| json_schema.strict == Some(true)) {
                close(schema);
            }
            Some(schema.map_or_else(Grammar::json_object, Grammar::JsonSchema))
        }
    };
    match (format, grammar) {
        (Some(_), Some(_)) => Err(Problem::field("grammar", "found beside response_format, expected one of them")),
        (format, grammar) => Ok(format.or_else(|| grammar.cloned())),
    }
}

/// Closes the objects of a schema that name properties and do not say whether there may be others. Those of an `allOf` stay
/// open: each part of it has properties that the others do not name.
fn close(schema: &mut Value) {
    match schema {
        Value::Array(schemas) => schemas.iter_mut().for_each(close),
        Value::Object(fields) => {
            let says = ["additionalProperties", "patternProperties", "unevaluatedProperties", "allOf"];
            let is_open =
                fields.get("properties").is_some_and(Value::is_object) && !says.iter().any(|s| fields.contains_key(*s));
            if is_open {
                fields.insert("additionalProperties".to_owned(), Value::Bool(false));
            }
            let literal = ["allOf", "const", "enum", "default", "examples"];
            for (name, value) in fields.iter_mut().filter(|(name, _)| !literal.contains(&name.as_str())) {
                match (name.as_str(), value) {
                    // Their keys are names, not keywords.
                    ("properties" | "$defs" | "definitions", Value::Object(named)) => {
                        named.values_mut().for_each(close)
                    }
                    (_, value) => close(value),
                }
            }
        }
        _ => {}
    }
}

/// The biases by token.
fn logit_bias(app: &App, given: Option<&BTreeMap<String, f32>>) -> Result<Vec<(u32, f32)>, Problem> {
    const MOST: usize = 1024;
    let given: Vec<_> = given.into_iter().flatten().collect();
    if given.len() > MOST {
        return Err(Problem::field("logit_bias", format!("found {} tokens, expected at most {MOST}", given.len())));
    }
    let one = |(id, &bias): (&String, &f32)| {
        let field = format!("logit_bias.{}", id.chars().take(20).collect::<String>());
        let vocab = app.model.vocab_size;
        let id = id.parse::<u32>().ok().filter(|&id| (id as usize) < vocab);
        let id = id.ok_or_else(|| Problem::field(&field, format!("expected the id of a token, 0 to {}", vocab - 1)))?;
        match (-100.0..=100.0).contains(&bias) {
            true => Ok((id, bias)),
            false => Err(Problem::field(&field, format!("found {bias}, expected -100 to 100"))),
        }
    };
    given.into_iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_chat(body: &Value) -> Result<ChatRequest, Problem> {
        let Value::Object(mut map) = body.clone() else { unreachable!() };
        map.insert("model".to_owned(), json!("m"));
        map.insert("messages".to_owned(), json!([{"role": "user", "content": "a"}]));
        read(map)
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name_unless_it_asks_for_nothing() {
        for (field, value) in [
            ("tools", json!([{"type": "function"}])),
            ("audio", json!({"voice": "a"})),
            ("modalities", json!(["text", "audio"])),
            ("best_of", json!(3)),
        ] {
            let problem = read_chat(&json!({field: value})).expect_err(field);
            assert!(problem.detail.starts_with(&format!("{field}: ")), "{}", problem.detail);
            assert!(read_chat(&json!({field: null})).is_ok(), "{field}");
        }
        let nothing = json!({"tools": [], "modalities": ["text"], "best_of": 1, "response_format": {"type": "text"},
            "user": "me", "store": false, "metadata": {"a": "b"}});
        assert!(read_chat(&nothing).is_ok());
        let unknown = read_chat(&json!({"temprature": 1})).expect_err("unknown");
        assert!(unknown.detail.contains("temprature") && unknown.detail.contains("temperature"), "{}", unknown.detail);
    }

    #[test]
    fn a_strict_schema_closes_the_objects_that_do_not_say() {
        let mut schema = json!({"type": "object", "properties": {"a": {"properties": {"b": {}}}, "c": {"const": {"properties": {}}}},
            "$defs": {"d": {"properties": {}, "additionalProperties": true}}, "allOf": [{"properties": {}}]});
        close(&mut schema);
        let expected = json!({"type": "object", "properties": {"a": {"properties": {"b": {}}, "additionalProperties": false},
            "c": {"const": {"properties": {}}}}, "$defs": {"d": {"properties": {}, "additionalProperties": true}},
            "allOf": [{"properties": {}}]});
        assert_eq!(schema, expected);
    }

    #[test]
    fn a_prompt_is_a_text_ids_or_a_list_of_either() {
        let read = |value: Value| serde_json::from_value::<Prompt>(value);
        assert_eq!(read(json!("a")).ok(), Some(Prompt::Text("a".to_owned())));
        assert_eq!(read(json!(["a", "b"])).ok(), Some(Prompt::Texts(vec!["a".to_owned(), "b".to_owned()])));
        assert_eq!(read(json!([1, 2])).ok(), Some(Prompt::Ids(vec![1, 2])));
        assert_eq!(read(json!([[1], [2, 3]])).ok(), Some(Prompt::ListsOfIds(vec![vec![1], vec![2, 3]])));
        assert!(read(json!([1, "a"])).is_err() && read(json!(1)).is_err() && read(json!([-1])).is_err());
    }
}
