//! The sampling parameters: one table of their names, ranges, defaults and documentation.
//!
//! The wire types, the defaults in `task.json`, the checks of both, the OpenAPI specification and the options of
//! `softserve bench` take theirs from here. Plain data: this module names no other.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The most stop strings.
pub const MAX_STOPS: usize = 16;
/// The longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 256;

/// One row of the table: a sampling parameter.
#[derive(Debug)]
pub struct Parameter {
    /// Its name in JSON, such as `top_p`.
    pub name: &'static str,
    /// Its name on a command line, such as `top-p`.
    pub option: &'static str,
    pub range: Range,
    /// What is used where neither a request nor its task says anything, as text.
    pub default: &'static str,
    /// What it does, in one sentence or two.
    pub doc: &'static str,
}

/// The values that a parameter may have. NaN and the infinities are in none of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    /// From the first to the second, both allowed.
    Closed(i16, i16),
    /// Greater than the first, and at most the second.
    Above(i16, i16),
    /// The least value; there is no greatest.
    From(i16),
}

impl Range {
    /// The lower bound, which [`Range::Above`] excludes, and the upper bound where there is one.
    pub fn bounds(self) -> (i16, Option<i16>) {
        match self {
            Self::Closed(least, most) | Self::Above(least, most) => (least, Some(most)),
            Self::From(least) => (least, None),
        }
    }

    fn contains(self, value: f64) -> bool {
        match self {
            Self::Closed(least, most) => (f64::from(least)..=f64::from(most)).contains(&value),
            Self::Above(above, most) => value > f64::from(above) && value <= f64::from(most),
            Self::From(least) => value >= f64::from(least) && value.is_finite(),
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed(least, most) => write!(f, "{least} to {most}"),
            Self::Above(above, most) => write!(f, "more than {above} and at most {most}"),
            Self::From(least) => write!(f, "{least} or more"),
        }
    }
}

/// A value that is not allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The JSON name, such as `top_p` or `stop[2]`.
    pub field: String,
    /// What was found and what is allowed.
    pub detail: String,
}

/// The type of a parameter's value.
trait Scalar: Copy + fmt::Display + FromStr {
    const KIND: &'static str;
    fn as_f64(self) -> f64;
}

impl Scalar for f32 {
    const KIND: &'static str = "a number";
    fn as_f64(self) -> f64 {
        self.into()
    }
}

impl Scalar for usize {
    const KIND: &'static str = "a whole number";
    fn as_f64(self) -> f64 {
        self as f64
    }
}

impl Parameter {
    fn fault<T: Scalar>(&self, value: T) -> Option<Fault> {
        let detail = || format!("found {value}, expected {}", self.range);
        (!self.range.contains(value.as_f64())).then(|| Fault { field: self.name.to_owned(), detail: detail() })
    }

    fn parse<T: Scalar>(&self, text: &str) -> Result<T, String> {
        let value = text.parse().map_err(|_| format!("found {text:?}, expected {}, {}", T::KIND, self.range))?;
        self.fault(value).map_or(Ok(value), |fault| Err(fault.detail))
    }
}

/// Makes of each row of the table a [`Parameter`], a field of [`SamplingOptions`] and one of [`SamplingValues`].
macro_rules! sampling_parameters {
    ($($name:ident $option:tt: $type:ty = $default:tt, $range:expr, $doc:tt;)+) => {
        /// The table, a row a parameter.
        pub const PARAMETERS: &[Parameter] = &[$(Parameter {
            name: stringify!($name),
            option: $option,
            range: $range,
            default: stringify!($default),
            doc: $doc,
        }),+];

        /// Sampling parameters as a request, a task or an option gives them. In `task.json` they are the task's
        /// defaults, named and meant as in a generate request.
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
        #[serde(deny_unknown_fields, default)]
        #[schema(as = Defaults)]
        pub struct SamplingOptions {
            $(
                #[doc = $doc]
                #[serde(skip_serializing_if = "Option::is_none")]
                pub $name: Option<$type>,
            )+
            /// The answer ends before the first of these texts: up to 16, of 1 to 256 bytes each.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub stop: Option<Vec<String>>,
        }

        /// Sampling parameters with every default filled in.
        #[derive(Debug, Clone, PartialEq)]
        pub struct SamplingValues {
            $(#[doc = $doc] pub $name: $type,)+
            /// The answer ends before the first of these texts.
            pub stop: Vec<String>,
        }

        impl SamplingOptions {
            /// These, and `others` for what these leave out.
            pub fn or(&self, others: &Self) -> Self {
                Self {
                    $($name: self.$name.or(others.$name),)+
                    stop: self.stop.as_ref().or(others.stop.as_ref()).cloned(),
                }
            }

            /// These, and the table's defaults for what these leave out.
            pub fn or_default(self) -> SamplingValues {
                SamplingValues {
                    $($name: self.$name.unwrap_or({
                        // It becomes a float or a count without loss.
                        const DEFAULT: u16 = $default;
                        DEFAULT.into()
                    }),)+
                    stop: self.stop.unwrap_or_default(),
                }
            }

            /// Every value that is not allowed.
            pub fn faults(&self) -> Vec<Fault> {
                let mut faults = Vec::new();
                let mut rows = PARAMETERS.iter();
                $(faults.extend(rows.next().zip(self.$name).and_then(|(row, value)| row.fault(value)));)+
                faults.extend(self.stop.as_deref().and_then(too_many_stops));
                faults.extend(self.stop.as_deref().and_then(wrong_stop));
                faults
            }

            /// Sets the parameter with this name on a command line. Fails, saying what was found and what is
            /// allowed, where the value is not allowed, and where no parameter has the name.
            pub fn set(&mut self, option: &str, value: &str) -> Result<(), String> {
                let row = PARAMETERS.iter().find(|row| row.option == option);
                let row = row.ok_or_else(|| format!("found {option:?}, expected a sampling parameter"))?;
                match row.name {
                    $(stringify!($name) => self.$name = Some(row.parse(value)?),)+
                    _ => {}
                }
                Ok(())
            }

            /// The parameters that are given, as rows of the table and values as text.
            pub fn given(&self) -> Vec<(&'static Parameter, String)> {
                let values = [$(self.$name.map(|value| value.to_string())),+];
                PARAMETERS.iter().zip(values).filter_map(|(row, value)| Some((row, value?))).collect()
            }
        }
    };
}

// Name, name on a command line, type, default, range, documentation.
sampling_parameters! {
    max_tokens "max-tokens": usize = 64, Range::From(1),
        "The most new tokens; cut to what the model's context leaves.";
    min_tokens "min-tokens": usize = 0, Range::From(0),
        "The model's end-of-text token does not end the answer before it has this many tokens.";
    temperature "temperature": f32 = 0, Range::Closed(0, 2),
        "0 takes the likeliest token each time; more is more varied.";
    top_p "top-p": f32 = 1, Range::Above(0, 1),
        "Keep the smallest set of tokens whose probability reaches this; more than 0.";
    top_k "top-k": usize = 0, Range::From(0),
        "Keep this many of the likeliest tokens; 0 keeps all.";
    min_p "min-p": f32 = 0, Range::Closed(0, 1),
        "Keep tokens at least this likely relative to the likeliest; 0 keeps all.";
    repetition_penalty "repetition-penalty": f32 = 1, Range::Above(0, 10),
        "Divides (logit > 0) or multiplies the logits of tokens in the text so far; 1 is none.";
    frequency_penalty "frequency-penalty": f32 = 0, Range::Closed(-2, 2),
        "Subtracted from a token's logit for each time it was generated.";
    presence_penalty "presence-penalty": f32 = 0, Range::Closed(-2, 2),
        "Subtracted from a token's logit if it was generated.";
}

impl SamplingOptions {
    /// Whether nothing is given.
    pub fn is_empty(&self) -> bool {
        self == &Self::default()
    }
}

/// As on a command line: `temperature=0.7,top-p=0.95`; without the stop strings.
impl fmt::Display for SamplingOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let given: Vec<_> = self.given().iter().map(|(row, value)| format!("{}={value}", row.option)).collect();
        f.write_str(&given.join(","))
    }
}

fn too_many_stops(stops: &[String]) -> Option<Fault> {
    let detail = || format!("found {} texts, expected at most {MAX_STOPS}", stops.len());
    (stops.len() > MAX_STOPS).then(|| Fault { field: "stop".to_owned(), detail: detail() })
}

fn wrong_stop(stops: &[String]) -> Option<Fault> {
    let (i, text) = stops.iter().enumerate().find(|(_, text)| text.is_empty() || text.len() > MAX_STOP_BYTES)?;
    let detail = format!("found a text of {} bytes, expected 1 to {MAX_STOP_BYTES}", text.len());
    Some(Fault { field: format!("stop[{i}]"), detail })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bound_of_the_table_is_allowed_unless_it_is_excluded_and_what_lies_beyond_is_not() {
        for row in PARAMETERS {
            let set = |value: String| SamplingOptions::default().set(row.option, &value);
            let (least, most) = row.range.bounds();
            assert_eq!(set(least.to_string()).is_ok(), !matches!(row.range, Range::Above(..)), "{row:?}");
            let below = set((least - 1).to_string()).unwrap_err();
            assert!(below.contains(&format!("expected {}", row.range)) || below.contains("a whole number"), "{below}");
            if let Some(most) = most {
                assert!(set(most.to_string()).is_ok(), "{row:?}");
                let beyond = set((most + 1).to_string()).unwrap_err();
                assert_eq!(beyond, format!("found {}, expected {}", most + 1, row.range));
            }
            for text in ["", "x", "nan", "inf", "1e39"] {
                assert!(set(text.to_owned()).is_err(), "{}={text}", row.option);
            }
        }
    }

    #[test]
    fn each_default_of_the_table_is_allowed_and_is_what_is_filled_in() {
        let mut defaults = SamplingOptions::default();
        for row in PARAMETERS {
            defaults.set(row.option, row.default).unwrap();
        }
        assert_eq!(defaults.faults(), []);
        assert_eq!(defaults.or_default(), SamplingOptions::default().or_default());
    }

    #[test]
    fn what_is_given_goes_before_other_options_and_is_shown_as_typed() {
        let mut options = SamplingOptions::default();
        for (option, value) in [("temperature", "0.7"), ("top-k", "40")] {
            options.set(option, value).unwrap();
        }
        let others = SamplingOptions { temperature: Some(0.1), min_p: Some(0.05), ..SamplingOptions::default() };
        assert_eq!(options.or(&others).to_string(), "temperature=0.7,top-k=40,min-p=0.05");
        assert!(options.set("heat", "1").unwrap_err().contains("\"heat\""));
    }

    #[test]
    fn stop_strings_are_counted_and_measured() {
        let faults = |stop: &[&str]| {
            let stop = Some(stop.iter().map(|text| (*text).to_owned()).collect());
            let faults = SamplingOptions { stop, ..SamplingOptions::default() }.faults();
            faults.into_iter().map(|fault| fault.field).collect::<Vec<_>>()
        };
        let long = "x".repeat(MAX_STOP_BYTES + 1);
        assert_eq!(faults(&[&long[1..]; MAX_STOPS]), [""; 0]);
        assert_eq!(faults(&["x"; MAX_STOPS + 1]), ["stop"]);
        assert_eq!(faults(&["x", ""]), ["stop[1]"]);
        assert_eq!(faults(&[&long]), ["stop[0]"]);
    }
}
