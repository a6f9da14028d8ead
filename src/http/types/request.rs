//! What a client sends to have something generated.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Deserializer, de};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, Schema},
};

use crate::{
    prompt::{grammar::Grammar, template::Input},
    sampling::SamplingOptions,
};

/// A request to generate. Everything but `input` is optional: what is left out comes from the
/// task's defaults, then from the server's.
// The sampling parameters are described, in the specification too, by the table of `crate::sampling`.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"input": "The food was cold and the waiter rude.", "max_tokens": 8}))]
pub struct GenerateRequest {
    /// A text for the task's one field, or an object with a text for each of its fields.
    #[serde(deserialize_with = "input")]
    #[schema(value_type = InputSchema)]
    pub input: Input,
    #[schema(example = 8)]
    pub max_tokens: Option<usize>,
    pub min_tokens: Option<usize>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<usize>,
    pub min_p: Option<f32>,
    /// The same seed and request give the same answer. Left out: a random one.
    pub seed: Option<u64>,
    /// The answer ends before the first of these texts: up to 16, of 1 to 256 bytes each.
    #[serde(default, deserialize_with = "stop_texts")]
    #[schema(value_type = Option<Vec<String>>, max_items = 16)]
    pub stop: Option<Vec<String>>,
    pub repetition_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    /// Report the log-probability of each chosen token, and of this many likeliest ones.
    #[schema(minimum = 0, maximum = 20)]
    pub logprobs: Option<usize>,
    /// Report the log-probabilities of these token ids too, at each token: up to 128.
    #[schema(max_items = 128)]
    pub logprob_token_ids: Option<Vec<u32>>,
    /// Texts that the answer does not have, as the tokens they are written with: up to 128, of 1 to 256 bytes each.
    #[schema(max_items = 128)]
    pub bad_words: Option<Vec<String>>,
    /// What the whole answer must obey, in place of the task's.
    pub grammar: Option<Grammar>,
    /// How many answers; answer i is drawn with seed + i.
    #[schema(minimum = 1, maximum = 16)]
    pub n: Option<usize>,
    /// Send the answer as server-sent events while it is made.
    pub stream: Option<bool>,
    /// Go on after the model's end-of-text token.
    pub ignore_eos: Option<bool>,
    /// A version of the task other than the active one.
    pub version: Option<String>,
    /// Lower is sooner: requests of a lower number go before all others, whatever their task has had
    /// already. Server default: 0.
    #[schema(minimum = -1000, maximum = 1000)]
    pub priority: Option<i32>,
    /// Give up after this time, with what there is by then and the finish reason `timeout`.
    #[schema(minimum = 1)]
    pub timeout_ms: Option<u64>,
}

impl GenerateRequest {
    /// The sampling parameters that it gives.
    pub fn sampling(&self) -> SamplingOptions {
        // Written out, so that a parameter that joins the table cannot be forgotten here.
        SamplingOptions {
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            stop: self.stop.clone(),
        }
    }
}

/// A text, or a text for each field of the task's template.
#[derive(Debug, ToSchema)]
#[schema(as = Input, title = "Input")]
#[serde(untagged)]
pub enum InputSchema {
    /// The text of the task's one field.
    Text(String),
    /// A text for each field.
    Fields(BTreeMap<String, String>),
}

/// One request of a batch, for the specification: a generate request with its task. It is read in
/// two steps, so that one that is wrong does not keep the others from their answers.
#[derive(Debug)]
pub struct BatchItem;

impl PartialSchema for BatchItem {
    fn schema() -> RefOr<Schema> {
        let mut schema = GenerateRequest::schema();
        // Not `allOf`: a generate request alone has no further fields.
        if let RefOr::T(Schema::Object(object)) = &mut schema {
            object.description = Some("A generate request with its task; `stream` is not possible here.".to_owned());
            object.properties.insert("task".to_owned(), String::schema());
            object.required.push("task".to_owned());
            object.example = Some(serde_json::json!({"task": "sentiment", "input": "A fine evening."}));
        }
        schema
    }
}

impl ToSchema for BatchItem {}

/// Several requests of any tasks, computed together.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"requests": [
    {"task": "sentiment", "input": "A fine evening.", "max_tokens": 4},
    {"task": "topic", "input": "The match was lost in the last minute.", "max_tokens": 4}
]}))]
pub struct BatchRequest {
    /// Up to 256.
    #[schema(value_type = Vec<BatchItem>, min_items = 1, max_items = 256)]
    pub requests: Vec<serde_json::Map<String, serde_json::Value>>,
}

fn input<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Input, D::Error> {
    deserializer.deserialize_any(InputVisitor)
}

/// As `input`, or null.
pub(super) fn optional_input<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Input>, D::Error> {
    Ok(Option::<Item>::deserialize(deserializer)?.map(|item| item.0))
}

/// A list of inputs, or null.
pub(super) fn inputs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<Input>>, D::Error> {
    let items = Option::<Vec<Item>>::deserialize(deserializer)?;
    Ok(items.map(|items| items.into_iter().map(|item| item.0).collect()))
}

struct Item(Input);

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        input(deserializer).map(Self)
    }
}

struct InputVisitor;

impl<'de> de::Visitor<'de> for InputVisitor {
    type Value = Input;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a text, or an object with a text for each field")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Input, E> {
        Ok(Input::Text(text.to_owned()))
    }

    fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Input, A::Error> {
        let mut fields = BTreeMap::new();
        while let Some((name, text)) = map.next_entry::<String, String>()? {
            if let Some(_twice) = fields.insert(name.clone(), text) {
                return Err(de::Error::custom(format!("the field {name:?} appears twice")));
            }
        }
        Ok(Input::Fields(fields))
    }
}

/// A text, a list of texts, or null.
pub fn stop_texts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<String>>, D::Error> {
    struct StopVisitor;

    impl<'de> de::Visitor<'de> for StopVisitor {
        type Value = Option<Vec<String>>;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("a list of texts")
        }

        fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            Ok(Some(vec![text.to_owned()]))
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut texts = Vec::new();
            while let Some(text) = list.next_element()? {
                texts.push(text);
            }
            Ok(Some(texts))
        }
    }

    deserializer.deserialize_any(StopVisitor)
}
