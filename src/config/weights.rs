//! How much service each task gets beside the others: `NAME=W`.

use std::{collections::HashMap, fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// One task's weight as typed.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskWeight {
    pub task: String,
    pub weight: f64,
}

/// The weights of the tasks that have one; all others have 1.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TaskWeights(HashMap<String, f64>);

const LEAST: f64 = 0.001;
const MOST: f64 = 1000.0;

impl TaskWeight {
    fn new(task: &str, weight: f64) -> Result<Self, String> {
        if !(LEAST..=MOST).contains(&weight) {
            return Err(format!("found the weight {weight} for {task:?}, expected {LEAST} to {MOST}"));
        }
        Ok(Self { task: task.to_owned(), weight })
    }
}

impl TaskWeights {
    /// The typed weights; of two for one task the later.
    pub fn new(typed: Vec<TaskWeight>) -> Self {
        Self(typed.into_iter().map(|w| (w.task, w.weight)).collect())
    }

    /// A task's weight.
    pub fn of(&self, task: &str) -> f64 {
        self.0.get(task).copied().unwrap_or(1.0)
    }
}

impl FromStr for TaskWeight {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('=').and_then(|(task, weight)| {
            let (task, weight) = (task.trim(), weight.trim().parse::<f64>().ok()?);
            (!task.is_empty()).then_some((task, weight))
        });
        let (task, weight) =
            parsed.ok_or_else(|| format!("found {text:?}, expected a task and its weight such as sentiment=2"))?;
        Self::new(task, weight)
    }
}

impl fmt::Display for TaskWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.task, self.weight)
    }
}

impl Serialize for TaskWeight {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TaskWeight {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A list of `"NAME=W"`, or a table of names and weights.
pub(super) fn list_or_table<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<TaskWeight>>, D::Error> {
    struct Visitor;

    impl<'de> de::Visitor<'de> for Visitor {
        type Value = Option<Vec<TaskWeight>>;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("a list such as [\"sentiment=2\"] or a table such as { sentiment = 2 }")
        }

        fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_none<E: de::Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
            deserializer.deserialize_any(self)
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut weights = Vec::new();
            while let Some(weight) = list.next_element()? {
                weights.push(weight);
            }
            Ok(Some(weights))
        }

        fn visit_map<A: de::MapAccess<'de>>(self, mut table: A) -> Result<Self::Value, A::Error> {
            let mut weights = Vec::new();
            while let Some((task, weight)) = table.next_entry::<String, f64>()? {
                weights.push(TaskWeight::new(&task, weight).map_err(de::Error::custom)?);
            }
            Ok(Some(weights))
        }
    }

    deserializer.deserialize_option(Visitor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_is_a_task_and_a_number_within_reason() {
        let typed = ["a=2", " b = 0.5 ", "a=3"].map(|text| text.parse().expect(text));
        let weights = TaskWeights::new(typed.to_vec());
        assert_eq!((weights.of("a"), weights.of("b"), weights.of("c")), (3.0, 0.5, 1.0));
        for bad in ["", "a", "=2", "a=", "a=x", "a=0", "a=-1", "a=NaN", "a=inf", "a=1e9"] {
            assert!(bad.parse::<TaskWeight>().is_err(), "{bad}");
        }
    }
}
