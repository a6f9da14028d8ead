//! Server-sent events out of bytes that come in pieces.

/// Reads a stream of events; see [`push`](Self::push).
#[derive(Debug, Default)]
pub struct Events {
    /// The line that is not whole yet.
    line: Vec<u8>,
    name: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
}

impl Events {
    /// Takes the next bytes and hands over each event that is whole now: its name, empty if it has
    /// none, and its data.
    pub fn push(&mut self, mut bytes: &[u8], mut event: impl FnMut(&[u8], &[u8])) {
        while let Some(end) = bytes.iter().position(|b| *b == b'\n') {
            self.line.extend_from_slice(&bytes[..end]);
            bytes = &bytes[end + 1..];
            let mut line = std::mem::take(&mut self.line);
            self.end_of_line(line.strip_suffix(b"\r").unwrap_or(&line), &mut event);
            // Its room is used again.
            line.clear();
            self.line = line;
        }
        self.line.extend_from_slice(bytes);
    }

    fn end_of_line(&mut self, line: &[u8], event: &mut impl FnMut(&[u8], &[u8])) {
        if line.is_empty() {
            if self.has_data {
                event(&self.name, &self.data);
            }
            self.name.clear();
            self.data.clear();
            self.has_data = false;
        } else if let Some(value) = field(line, b"data:") {
            if self.has_data {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(value);
            self.has_data = true;
        } else if let Some(value) = field(line, b"event:") {
            self.name.clear();
            self.name.extend_from_slice(value);
        }
    }
}

fn field<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let value = line.strip_prefix(name)?;
    Some(value.strip_prefix(b" ").unwrap_or(value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STREAM: &str = ": a comment\n\ndata: {\"output\": \"é\"}\n\nevent: error\r\ndata: one\r\ndata:two\r\n\r\nid: 7\n\
                          data: [DONE]\n\ndata: cut o";

    fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<(String, String)> {
        let mut events = Events::default();
        let mut out = Vec::new();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        for piece in pieces {
            events.push(piece, |name, data| out.push((text(name), text(data))));
        }
        out
    }

    #[test]
    fn events_have_a_name_and_all_their_lines_of_data() {
        let found = read([STREAM.as_bytes()]);
        let expected = [("", "{\"output\": \"é\"}"), ("error", "one\ntwo"), ("", "[DONE]")];
        assert_eq!(found, expected.map(|(name, data)| (name.to_owned(), data.to_owned())));
    }

    proptest! {
        #[test]
        fn it_does_not_matter_in_which_pieces_the_bytes_come(cuts in prop::collection::vec(0..STREAM.len(), 0..20)) {
            let mut cuts = cuts;
            cuts.extend([0, STREAM.len()]);
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|w| &STREAM.as_bytes()[w[0]..w[1]]);
            prop_assert_eq!(read(pieces), read([STREAM.as_bytes()]));
        }
    }
}
