//! The keys of a `config.json`, read one by one: a value of the wrong kind is an error that names its key.

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};

/// Sizes past this are a damaged file, not a model.
const MAX_SIZE: usize = 1 << 24;

/// A JSON object and what it goes by in errors.
#[derive(Debug, Clone, Copy)]
pub struct Keys<'a> {
    map: &'a Map<String, Value>,
    name: &'static str,
}

impl<'a> Keys<'a> {
    /// `name` comes before every key in an error: empty, or a word and a space.
    pub fn new(map: &'a Map<String, Value>, name: &'static str) -> Self {
        Self { map, name }
    }

    /// Whether the key is there, even if it is null.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The key's value; none if it is missing or null.
    pub fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, String> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => T::deserialize(value)
                .map(Some)
                .map_err(|e| format!("{}{key} is {value}, which is not understood: {e}", self.name)),
        }
    }

    /// A flag; `default` if the key is missing or null.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool, String> {
        Ok(self.get(key)?.unwrap_or(default))
    }

    /// The first of `keys` that has a value, from 1 to a bound that no model reaches.
    pub fn size(&self, keys: &[&str]) -> Result<Option<usize>, String> {
        for key in keys {
            match self.get::<usize>(key)? {
                Some(n) if (1..=MAX_SIZE).contains(&n) => return Ok(Some(n)),
                Some(n) => return Err(format!("{}{key} is {n}, expected 1 to {MAX_SIZE}", self.name)),
                None => {}
            }
        }
        Ok(None)
    }

    /// A positive number.
    pub fn positive(&self, key: &str) -> Result<Option<f64>, String> {
        match self.get::<f64>(key)? {
            Some(x) if !(x.is_finite() && x > 0.0) => Err(format!("{}{key} {x} is not a positive number", self.name)),
            x => Ok(x),
        }
    }

    /// An object below a key.
    pub fn object(&self, key: &str, name: &'static str) -> Result<Option<Keys<'a>>, String> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Keys::new(map, name))),
            Some(value) => Err(format!("{}{key} is {value}, expected an object", self.name)),
        }
    }

    /// The error of a key that is needed and has no value.
    pub fn missing(&self, key: &str) -> String {
        format!("{}{key} is missing", self.name)
    }
}

/// A token id, a list of them, or nothing.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    #[default]
    None,
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    /// All the ids.
    pub fn into_vec(self) -> Vec<u32> {
        match self {
            Self::None => Vec::new(),
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}
