//! Sizes and times as people write them: `64MiB`, `30s`. Read by `bytesize` and `humantime`; written so that what is
//! read back is the same value.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A number of bytes: `4096`, `64MiB`, `1.5GiB`, `2GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A time: `250ms`, `30s`, `2m`, `1h 30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub Duration);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("found {text:?}, expected a number of bytes such as 4096, 64MiB or 2GB");
        let bytes = bytesize::ByteSize::from_str(text.trim()).map_err(|_| expected())?.as_u64();
        // What does not fit into 64 bits is read as the largest number that does.
        if bytes == u64::MAX { Err(expected()) } else { Ok(Self(bytes)) }
    }
}

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text)
            .map(Self)
            .map_err(|error| format!("found {text:?}, expected a time such as 250ms, 30s, 2m or 1h 30m: {error}"))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        bytesize::ByteSize(self.0).display().iec().fmt(f)
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0.to_string())
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer
            .deserialize_any(Scalar("a number of bytes such as 4096 or \"64MiB\""))?
            .parse()
            .map_err(de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Scalar("a time such as \"30s\""))?.parse().map_err(de::Error::custom)
    }
}

/// A TOML string or whole number, as text.
struct Scalar(&'static str);

impl de::Visitor<'_> for Scalar {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<String, E> {
        Ok(number.to_string())
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<String, E> {
        Ok(number.to_string())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_and_times_are_read_as_people_write_them() {
        for (text, bytes) in
            [("4096", 4096), ("64MiB", 64 << 20), ("1.5 GiB", 3 << 29), ("2gb", 2_000_000_000), (" 3K", 3000), ("0", 0)]
        {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for (text, ms) in [("250ms", 250), ("30s", 30_000), ("2m", 120_000), ("1.5h", 5_400_000), ("1h 30m", 5_400_000)]
        {
            assert_eq!(text.parse(), Ok(Time(Duration::from_millis(ms))), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_or_time_is_refused() {
        for text in ["", "MiB", "-1", "12 parsecs", "1e400", "NaN", "99999999999TiB"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        for text in ["", "30", "-1s", "5 parsecs", "inf", "99999999999999999y"] {
            let error = text.parse::<Time>().expect_err(text);
            assert!(error.contains("30s") && error.contains(text), "{error}");
        }
    }

    #[test]
    fn sizes_and_times_are_shown_in_their_units() {
        assert_eq!(ByteSize(1536).to_string(), "1.5 KiB");
        assert_eq!(Time(Duration::from_millis(90_500)).to_string(), "1m 30s 500ms");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_as_the_same_value(bytes in 0..u64::MAX, nanos in any::<u64>()) {
            let size = serde_json::to_string(&ByteSize(bytes)).unwrap();
            prop_assert_eq!(serde_json::from_str::<ByteSize>(&size).unwrap(), ByteSize(bytes));
            let time = Time(Duration::from_nanos(nanos));
            prop_assert_eq!(serde_json::from_str::<Time>(&serde_json::to_string(&time).unwrap()).unwrap(), time);
        }
    }
}
