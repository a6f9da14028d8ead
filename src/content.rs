//! What the first bytes of a file say that it is, where it is not what was asked for: a stand-in for the real file (a Git
//! LFS pointer, a web page, an error message), or a compression that is not read.

use serde::de::IgnoredAny;

/// Bytes that are looked at.
const LOOK: usize = 1024;

/// The longest file that is shown whole because it is a message, such as "Entry not found".
const MESSAGE: usize = 200;

/// Compressions that are not read, by how they begin.
const COMPRESSIONS: [(&[u8], &str); 6] = [
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip"),
    (b"Rar!\x1a\x07", "RAR"),
];

/// Says what a file is that cannot be what was asked for, and what to do; `None` if its beginning does not tell. A short text
/// is taken for a message in place of the file, so what may be text is asked with [`marked_stand_in`].
pub fn stand_in(bytes: &[u8]) -> Option<String> {
    marked_stand_in(bytes).or_else(|| message(bytes))
}

/// As [`stand_in`], of what begins with a mark of its own alone: a pointer, a page, a compression.
pub fn marked_stand_in(bytes: &[u8]) -> Option<String> {
    let start = &bytes[..bytes.len().min(LOOK)];
    if let Some((_, name)) = COMPRESSIONS.iter().find(|(magic, _)| start.starts_with(magic)) {
        return Some(format!("it is compressed with {name}, which is not read: unpack it first"));
    }
    let text = without_byte_order_mark(start).trim_ascii_start();
    let begins = |with: &str| text.get(..with.len()).is_some_and(|head| head.eq_ignore_ascii_case(with.as_bytes()));
    if begins("version https://git-lfs.github.com/spec/") || begins("version https://hawser.github.com/spec/") {
        return Some(
            "it is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository, or download the file \
             itself"
                .to_owned(),
        );
    }
    if begins("<!doctype html") || begins("<html") {
        return Some(
            "it is a web page (HTML), not the file itself: download it again by a link to the file, and log in first if \
             the site asks for that"
                .to_owned(),
        );
    }
    if begins("<?xml") || begins("<error>") {
        return Some(
            "it is XML, such as a storage service's error message, not the file itself: download it again".to_owned(),
        );
    }
    None
}

/// A text in place of the file.
fn message(bytes: &[u8]) -> Option<String> {
    let text = without_byte_order_mark(bytes).trim_ascii_start();
    let is_message = (1..=MESSAGE).contains(&bytes.len()) && text.len() > 1;
    let printable = |byte: &u8| byte.is_ascii_graphic() || byte.is_ascii_whitespace();
    // What is JSON may be what was asked for, and damaged.
    let is_json =
        || matches!(text.first(), Some(b'{' | b'[' | b'"')) || serde_json::from_slice::<IgnoredAny>(text).is_ok();
    if is_message && bytes.iter().all(printable) && !is_json() {
        let message = String::from_utf8_lossy(text.trim_ascii_end());
        return Some(format!("it is the text {message:?}, not the file itself: download it again"));
    }
    None
}

/// The byte order mark that some editors put before a text in UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// A text without the byte order mark.
pub fn without_byte_order_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes)
}

/// Why a document is not JSON: what the parser's message does not tell, or else the message.
pub fn json_fault(bytes: &[u8], error: &serde_json::Error) -> String {
    if bytes.starts_with(BYTE_ORDER_MARK) {
        return "it begins with a byte order mark, which JSON does not have: save it as UTF-8 without one".to_owned();
    }
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return "it is in UTF-16, and JSON is in UTF-8: save it as UTF-8".to_owned();
    }
    match lone_surrogate(bytes) {
        Some(escape) if !error.is_data() => format!(
            "a text has the lone surrogate {escape}, which is half of a character such as an emoji: send whole characters"
        ),
        _ => error.to_string(),
    }
}

/// The first `\uXXXX` escape of a JSON text that is one half of a surrogate pair without the other.
fn lone_surrogate(bytes: &[u8]) -> Option<String> {
    let escape = |at: usize| {
        let digits = bytes.get(at..at + 6)?.strip_prefix(b"\\u")?;
        u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    let mut at = 0;
    while let Some(next) = bytes.get(at..)?.iter().position(|byte| *byte == b'\\') {
        at += next;
        match (escape(at), escape(at + 6)) {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => at += 12,
            (Some(half @ 0xd800..=0xdfff), _) => return Some(format!("\\u{half:04x}")),
            (Some(_), _) => at += 6,
            (None, _) => at += 2,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stand_ins_are_told_by_how_they_begin() {
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
        for (bytes, words) in [
            (pointer.as_bytes(), "git lfs pull"),
            (b"\xef\xbb\xbf\n <!DOCTYPE HTML>\n<html>", "web page"),
            (b"<html lang=\"en\">", "web page"),
            (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>", "XML"),
            (b"Entry not found", "\"Entry not found\""),
            (b"Invalid username or password.\n", "\"Invalid username or password.\""),
            (b"BZh91AY&SY", "bzip2"),
            (b"\xfd7zXZ\x00\x00", "xz"),
            (b"\x28\xb5\x2f\xfd\x00", "zstd"),
        ] {
            let found = stand_in(bytes).unwrap_or_default();
            assert!(found.contains(words), "{words}: {found}");
        }
    }

    #[test]
    fn what_a_json_parser_does_not_tell_is_said() {
        let fault = |bytes: &[u8]| json_fault(bytes, &serde_json::from_slice::<serde_json::Value>(bytes).unwrap_err());
        assert!(fault(b"\xef\xbb\xbf{}").contains("byte order mark"));
        assert!(fault(b"\xff\xfe{\x00}\x00").contains("UTF-16"));
        assert!(fault(br#"{"a": "cut \ud83d"}"#).contains("lone surrogate \\ud83d"));
        assert!(fault(br#"{"a": "\ude00"}"#).contains("\\ude00"));
        assert!(fault(br#"["\ud83d\u0041"]"#).contains("\\ud83d"));
        for other in [&br#"{"a": "\ud83d\ude00" oops}"#[..], br#"{"a": "\\ud83d" oops}"#, b"{", br#"["\u12"]"#] {
            assert!(!fault(other).contains("surrogate"), "{}", fault(other));
        }
    }

    #[test]
    fn files_that_may_be_what_they_should_be_are_left_alone() {
        for bytes in [
            &b""[..],
            b"{\"peft_type\": \"PROMPT_TUNING\"}",
            b"\x93NUMPY\x01\x00",
            b"PK\x03\x04",
            b"GGUF\x03\x00\x00\x00",
            b"null",
            b" 12 ",
            b"\x10\x00\x00\x00\x00\x00\x00\x00{}",
            &[b'a'; 500],
        ] {
            assert_eq!(stand_in(bytes), None, "{bytes:?}");
        }
    }
}
