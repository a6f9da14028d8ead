//! The metadata of a GGUF file: typed values by key. A value of another type than is asked for is an
//! error that names it.

use std::collections::BTreeMap;

/// Values by key.
#[derive(Debug, Default)]
pub struct Metadata(BTreeMap<String, Value>);

/// One value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Array),
}

/// An array as it lies in the file, checked to be whole.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    kind: Kind,
    len: usize,
    bytes: Vec<u8>,
}

/// The type of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    /// The type of this number in a file.
    pub fn new(id: u32) -> Result<Self, String> {
        use Kind::*;
        const KINDS: [Kind; 13] = [U8, I8, U16, I16, U32, I32, F32, Bool, Text, Array, U64, I64, F64];
        KINDS.get(id as usize).copied().ok_or_else(|| format!("the type {id}, which GGUF does not have"))
    }

    /// Bytes of a value; `None` if they differ.
    pub fn size(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::Text | Self::Array => None,
        }
    }

    /// The value in `bytes` of the kind's size.
    pub fn number(self, bytes: &[u8]) -> Value {
        let mut wide = [0u8; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let unsigned = u64::from_le_bytes(wide);
        let unused = 64 - 8 * bytes.len();
        match self {
            Self::I8 | Self::I16 | Self::I32 | Self::I64 => Value::Signed(unsigned.cast_signed() << unused >> unused),
            Self::F32 => Value::Float(widened(f32::from_bits(unsigned as u32))),
            Self::F64 => Value::Float(f64::from_bits(unsigned)),
            Self::Bool => Value::Bool(unsigned != 0),
            _ => Value::Unsigned(unsigned),
        }
    }
}

/// The shortest decimal number that becomes `x`: 1e-5 and not 9.99999974e-6, as config.json has it.
fn widened(x: f32) -> f64 {
    x.to_string().parse().unwrap_or_else(|_| f64::from(x))
}

impl Array {
    /// `bytes` are `len` values of `kind` as a file has them.
    pub fn new(kind: Kind, len: usize, bytes: Vec<u8>) -> Self {
        Self { kind, len, bytes }
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Its numbers or truth values; `None` if it holds texts.
    pub fn numbers(&self) -> Option<impl Iterator<Item = Value>> {
        let (kind, size) = (self.kind, self.kind.size()?);
        Some(self.bytes.chunks_exact(size).map(move |b| kind.number(b)))
    }

    /// Its numbers; `None` if it holds texts. Those of 32 bits are as they are, not the shortest decimal ones.
    pub fn floats(&self) -> Option<impl Iterator<Item = f64>> {
        let (kind, size) = (self.kind, self.kind.size()?);
        Some(self.bytes.chunks_exact(size).map(move |b| match (kind, <[u8; 4]>::try_from(b)) {
            (Kind::F32, Ok(b)) => f64::from(f32::from_le_bytes(b)),
            _ => kind.number(b).as_float().unwrap_or_default(),
        }))
    }

    /// Its texts; `None` if it holds something else.
    pub fn texts(&self) -> Option<impl Iterator<Item = &[u8]>> {
        let mut rest = self.bytes.as_slice();
        (self.kind == Kind::Text).then_some(std::iter::from_fn(move || {
            let (len, after) = rest.split_first_chunk::<8>()?;
            let (text, after) = after.split_at_checked(u64::from_le_bytes(*len) as usize)?;
            rest = after;
            Some(text)
        }))
    }
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::Unsigned(_) | Self::Signed(_) => "an integer",
            Self::Float(_) => "a number",
            Self::Bool(_) => "a truth value",
            Self::Text(_) => "a text",
            Self::Array(_) => "an array",
        }
    }

    fn as_unsigned(&self) -> Option<u64> {
        match self {
            Self::Unsigned(n) => Some(*n),
            Self::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// A number of any type.
    pub fn as_float(&self) -> Option<f64> {
        match self {
            Self::Unsigned(n) => Some(*n as f64),
            Self::Signed(n) => Some(*n as f64),
            Self::Float(x) => Some(*x),
            _ => None,
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(b) => Some(*b),
            _ => None,
        }
    }

    fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    fn as_array(&self) -> Option<&Array> {
        match self {
            Self::Array(array) => Some(array),
            _ => None,
        }
    }
}

impl Metadata {
    /// Adds a key that is not there yet.
    pub fn insert(&mut self, key: String, value: Value) -> Result<(), String> {
        if self.0.contains_key(&key) {
            return Err(format!("the key {key} appears twice"));
        }
        self.0.insert(key, value);
        Ok(())
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        typed: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || format!("{key} is {}, expected {expected}", value.kind());
        typed(value).map(Some).ok_or_else(wrong)
    }

    /// A number that is not negative. Of an array with one for each layer, the one that all have.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, String> {
        let Some(Value::Array(array)) = self.get(key) else {
            return self.typed(key, "an integer from 0", Value::as_unsigned);
        };
        let mut each = array.numbers().into_iter().flatten().map(|n| n.as_unsigned());
        match each.next() {
            Some(Some(first)) if each.all(|n| n == Some(first)) => Ok(Some(first)),
            _ => Err(format!("{key} differs from layer to layer, which is not supported")),
        }
    }

    /// A finite number.
    pub fn float(&self, key: &str) -> Result<Option<f64>, String> {
        self.typed(key, "a finite number", |value| value.as_float().filter(|x| x.is_finite()))
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, String> {
        self.typed(key, "a truth value", Value::as_bool)
    }

    /// A text.
    pub fn text(&self, key: &str) -> Result<Option<&str>, String> {
        self.typed(key, "a text", Value::as_text)
    }

    /// An array.
    pub fn array(&self, key: &str) -> Result<Option<&Array>, String> {
        self.typed(key, "an array", Value::as_array)
    }
}
