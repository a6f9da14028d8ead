//! What an answer must obey: a JSON schema, a regular expression, a choice of texts or a Lark grammar.

use std::sync::OnceLock;

use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{ApproximateTokEnv, InferenceCapabilities},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

/// The longest grammar as JSON, in bytes.
pub const MAX_GRAMMAR_BYTES: usize = 64 * 1024;

/// The whitespace that JSON of a schema may have between its parts, where the schema's `x-guidance` does not say: one or two
/// spaces, or a new line with its indentation. Without a bound a weak model may write nothing else.
const JSON_WHITESPACE: &str = r" {1,2}|\n {0,24}";

/// What the whole answer must obey: one of these.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Grammar {
    /// JSON that is valid by this JSON schema. A keyword that cannot be obeyed is refused; `$ref` must begin with `#/`.
    JsonSchema(Value),
    /// A regular expression, in Rust's syntax, that the whole answer matches.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in Lark's syntax, with the rule `start`.
    Lark(String),
}

/// Why a grammar cannot be obeyed, in a sentence's second half.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(pub String);

impl Grammar {
    /// Any JSON object.
    pub fn json_object() -> Self {
        Self::JsonSchema(json!({"type": "object"}))
    }

    /// What llguidance compiles.
    ///
    /// # Errors
    /// It is too long, or empty.
    pub fn to_llguidance(&self) -> Result<TopLevelGrammar, GrammarError> {
        let bytes = serde_json::to_string(self).map_or(0, |json| json.len());
        if bytes > MAX_GRAMMAR_BYTES {
            return Err(GrammarError(format!("it has {bytes} bytes as JSON; the maximum is {MAX_GRAMMAR_BYTES}")));
        }
        Ok(match self {
            Self::JsonSchema(Value::Object(schema)) => {
                let mut schema = schema.clone();
                schema.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": JSON_WHITESPACE}));
                TopLevelGrammar::from_json_schema(schema.into())
            }
            Self::JsonSchema(schema @ Value::Bool(true)) => TopLevelGrammar::from_json_schema(schema.clone()),
            Self::JsonSchema(_) => return Err(GrammarError("json_schema: expected an object".to_owned())),
            Self::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Self::Choice(texts) => {
                if texts.is_empty() || texts.iter().any(String::is_empty) {
                    return Err(GrammarError("choice: expected at least one text, none of them empty".to_owned()));
                }
                // A Lark text is written as a JSON text is.
                let texts: Vec<String> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
                TopLevelGrammar::from_lark(format!("start: {}", texts.join(" | ")))
            }
            Self::Lark(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
        })
    }

    /// Whether it compiles, for whatever tokenizer.
    ///
    /// # Errors
    /// It does not; the reason says where.
    pub fn check(&self) -> Result<(), GrammarError> {
        static BYTES: OnceLock<Result<ParserFactory, String>> = OnceLock::new();
        let factory = BYTES.get_or_init(|| {
            let bytes = ApproximateTokEnv::single_byte_env();
            let factory = ParserFactory::new(&bytes, InferenceCapabilities::default(), &[]);
            factory.map(quiet).map_err(|error| error.to_string())
        });
        let factory = factory.as_ref().map_err(|error| GrammarError(error.clone()))?;
        self.compile(factory).map(drop)
    }

    /// Compiled for the tokenizer of a factory, at its beginning.
    ///
    /// # Errors
    /// It does not compile; the reason says where.
    pub fn compile(&self, factory: &ParserFactory) -> Result<Matcher, GrammarError> {
        let matcher = Matcher::new(factory.create_parser(self.to_llguidance()?));
        match matcher.get_error() {
            Some(error) => Err(GrammarError(error)),
            None => Ok(matcher),
        }
    }
}

/// A factory that writes nothing to the terminal, and whose grammars have bounds that a server can bear.
pub fn quiet(mut factory: ParserFactory) -> ParserFactory {
    factory.quiet();
    let limits = factory.limits_mut();
    // A state takes one or two kilobytes.
    limits.max_lexer_states = 50_000;
    limits.verbose_errors = false;
    factory
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grammar(value: Value) -> Grammar {
        serde_json::from_value(value).expect("a grammar")
    }

    #[test]
    fn grammars_compile_or_say_what_is_wrong() {
        for good in [
            json!({"json_schema": {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"enum": [1, "x"]}}}}),
            json!({"json_schema": {}}),
            json!({"json_schema": true}),
            json!({"regex": "[0-9]{3}/[a-z]+"}),
            json!({"choice": ["yes", "no", "it \"may\" be\n", "é|ü", "\\d/"]}),
            json!({"lark": "start: a+\na: \"x\" | /[0-9]/"}),
        ] {
            assert_eq!(grammar(good.clone()).check(), Ok(()), "{good}");
        }
        for (bad, says) in [
            (json!({"json_schema": 3}), "object"),
            (json!({"json_schema": {"type": "number", "multipleof": "x", "type": "numbr"}}), "numbr"),
            (json!({"json_schema": {"not": {"type": "string"}}}), "not"),
            (json!({"json_schema": {"$ref": "https://example.com/a"}}), "ref"),
            (json!({"regex": "("}), "unclosed"),
            (json!({"choice": []}), "at least one"),
            (json!({"choice": [""]}), "empty"),
            (json!({"lark": "start: b"}), "b"),
            (json!({"regex": "a".repeat(MAX_GRAMMAR_BYTES)}), "maximum"),
        ] {
            let error = grammar(bad.clone()).check().expect_err("a bad grammar").to_string();
            assert!(error.contains(says), "{bad}: {error}");
        }
        let unknown = serde_json::from_value::<Grammar>(json!({"xml": 1})).expect_err("unknown").to_string();
        assert!(unknown.contains("json_schema"), "{unknown}");
    }
}
