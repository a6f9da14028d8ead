//! Text to token ids and back, with the model's own tokenizer.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use serde_json::{Value, json};
use tokenizers::{AddedToken, Encoding, Model as _, step_decode_stream};

use crate::model::{ModelError, ModelFiles, tokenizer::SharedTokenizer};

/// The model's tokenizer. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<SharedTokenizer>,
    literal: Arc<OnceLock<Literal>>,
    placing: Arc<OnceLock<PlacingTokenizer>>,
}

/// The same tokenizer, which knows one special token more: [`PLACE`], for something that is no text. What stands before and
/// after it is tokenized as around any special token.
#[derive(Debug, Clone)]
pub struct PlacingTokenizer {
    pub tokenizer: Tokenizer,
    /// The id of [`PLACE`], which the model does not have.
    pub place: u32,
}

/// The same tokenizer, which takes special tokens in a text as the characters they are written with.
struct Literal {
    tokenizer: SharedTokenizer,
    /// Every special token as it is written, the longest first.
    special_tokens: Vec<String>,
}

/// Stands before and after the number of a special token in an escaped text. It is no character, so no text has it.
const ESCAPE: char = '\u{10fffe}';

/// Stands in a text for something that is no text. It is no character, so no text has it.
pub const PLACE: char = '\u{10ffff}';

/// Why a tokenizer cannot be read or a text cannot be tokenized.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error(transparent)]
    File(#[from] ModelError),
    #[error("cannot tokenize the text: {0}")]
    Tokenize(#[source] tokenizers::Error),
    #[error("cannot decode the tokens: {0}")]
    Decode(#[source] tokenizers::Error),
}

impl Tokenizer {
    /// Reads the tokenizer of a model's files. Truncation and padding that it may ask for are switched off: a
    /// text is tokenized whole and alone.
    pub fn load(files: &ModelFiles) -> Result<Self, TokenizerError> {
        let mut tokenizer = files.tokenizer()?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(TokenizerError::Tokenize)?;
        Ok(Self::from(tokenizer))
    }

    /// Ids with the special tokens that the tokenizer's own post-processor adds (BOS).
    pub fn tokenize(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.tokenize_as(text, true)
    }

    /// Ids of a text that continues another: no special tokens.
    pub fn tokenize_continuation(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.tokenize_as(text, false)
    }

    fn tokenize_as(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, special).map_err(TokenizerError::Tokenize)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text with its special tokens replaced, so that [`tokenize_escaped`](Self::tokenize_escaped) takes them as text.
    pub fn escape(&self, text: &str) -> String {
        let mut escaped = text.replace(ESCAPE, "\u{fffd}");
        for (i, token) in self.literal().special_tokens.iter().enumerate() {
            if escaped.contains(token) {
                escaped = escaped.replace(token, &format!("{ESCAPE}{i}{ESCAPE}"));
            }
        }
        escaped
    }

    /// Ids of a text of which some parts are [escaped](Self::escape): special tokens in those are text, all others are
    /// special. Otherwise as [`tokenize`](Self::tokenize).
    pub fn tokenize_escaped(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.tokenize_escaped_as(text, true)
    }

    /// As [`tokenize_escaped`](Self::tokenize_escaped), without special tokens added: those of a conversation are in its
    /// template.
    pub fn tokenize_conversation(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.tokenize_escaped_as(text, false)
    }

    fn tokenize_escaped_as(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        if !text.contains(ESCAPE) {
            return self.tokenize_as(text, special);
        }
        let literal = self.literal();
        let mut pieces = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            // Up to the next special token that is not escaped, and that token.
            let next = literal.special_tokens.iter().filter_map(|token| Some((rest.find(token.as_str())?, token)));
            let (end, token) =
                next.min_by_key(|(at, _)| *at).map_or((rest.len(), ""), |(at, token)| (at, token.as_str()));
            if end > 0 {
                let piece = literal.unescape(&rest[..end]);
                pieces.push(literal.tokenizer.encode(piece, false).map_err(TokenizerError::Tokenize)?);
            }
            if !token.is_empty() {
                pieces.push(self.inner.encode(token, false).map_err(TokenizerError::Tokenize)?);
            }
            rest = &rest[end + token.len()..];
        }
        let whole = self.inner.post_process(Encoding::merge(pieces, false), None, special);
        Ok(whole.map_err(TokenizerError::Tokenize)?.get_ids().to_vec())
    }

    fn literal(&self) -> &Literal {
        self.literal.get_or_init(|| {
            let mut tokenizer = SharedTokenizer::clone(&self.inner);
            tokenizer.set_encode_special_tokens(true);
            let special = self
                .inner
                .get_added_vocabulary()
                .get_added_tokens_decoder()
                .values()
                .filter(|token| token.special && !token.content.is_empty());
            let mut special_tokens: Vec<String> = special.map(|token| token.content.clone()).collect();
            special_tokens.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
            Literal { tokenizer, special_tokens }
        })
    }

    /// This tokenizer with a special token for [places](PLACE).
    pub fn placing(&self) -> &PlacingTokenizer {
        self.placing.get_or_init(|| {
            let mut tokenizer = SharedTokenizer::clone(&self.inner);
            let added = tokenizer.add_special_tokens([AddedToken::from(PLACE, true).normalized(false)]);
            // An id that no token has, if it could not be added: then there is no place in any text.
            let place = added.ok().and_then(|_| tokenizer.token_to_id(&PLACE.to_string())).unwrap_or(u32::MAX);
            PlacingTokenizer { tokenizer: Self::from(tokenizer), place }
        })
    }

    /// The bytes of a text by itself that each of its tokens stands for.
    pub fn offsets(&self, text: &str) -> Result<Vec<(usize, usize)>, TokenizerError> {
        let encoding = self.literal().tokenizer.encode(text, false).map_err(TokenizerError::Tokenize)?;
        Ok(encoding.get_offsets().to_vec())
    }

    /// Ids of a text by itself: no special tokens are added, and those in the text are text.
    pub fn tokenize_plain(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.literal().tokenizer.encode_fast(text, false).map_err(TokenizerError::Tokenize)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids, special tokens included.
    pub fn decode_all(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.inner.decode(ids, false).map_err(TokenizerError::Decode)
    }

    /// The text of ids, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.inner.decode(ids, true).map_err(TokenizerError::Decode)
    }

    /// One token as it would be shown alone, special tokens by name. A token that is part of a
    /// character only shows U+FFFD.
    pub fn token_text(&self, id: u32) -> String {
        self.inner.decode(&[id], false).unwrap_or_default()
    }

    /// Whether an id is a special token, such as BOS or padding.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id).is_some_and(|t| t.special)
    }

    /// Ids in the tokenizer, added tokens included. The model's table may be larger.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// What its `tokenizer.json` says of the text of each token: the vocabulary as an object, the added tokens and the decoder.
    pub fn vocabulary_json(&self) -> Result<serde_json::Value, serde_json::Error> {
        let vocabulary = self.inner.get_model().get_vocab();
        let vocabulary = vocabulary.into_iter().map(|(token, id)| (token, id.into())).collect();
        Ok(json!({
            "added_tokens": serde_json::to_value(self.inner.get_added_vocabulary())?,
            "decoder": serde_json::to_value(self.inner.get_decoder())?,
            "model": {"vocab": Value::Object(vocabulary)},
        }))
    }

    /// Starts a streamed answer that ends before the first of the stop strings; empty ones are
    /// ignored.
    pub fn detokenizer(&self, mut stop: Vec<String>) -> Detokenizer {
        stop.retain(|s| !s.is_empty());
        Detokenizer {
            tokenizer: self.clone(),
            ids: Vec::new(),
            prefix: String::new(),
            prefix_index: 0,
            stop: StopStrings::new(stop),
        }
    }
}

impl From<SharedTokenizer> for Tokenizer {
    fn from(tokenizer: SharedTokenizer) -> Self {
        Self { inner: Arc::new(tokenizer), literal: Arc::default(), placing: Arc::default() }
    }
}

impl Literal {
    /// The text before it was escaped.
    fn unescape(&self, text: &str) -> String {
        let mut parts = text.split(ESCAPE);
        let mut whole = parts.next().unwrap_or_default().to_owned();
        // Numbers and what follows each of them take turns.
        while let Some(number) = parts.next() {
            let token = number.parse::<usize>().ok().and_then(|i| self.special_tokens.get(i));
            whole.push_str(token.map_or(number, String::as_str));
            whole.push_str(parts.next().unwrap_or_default());
        }
        whole
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish()
    }
}

/// Turns tokens into text as they come. Text is held back while it is cut in mid-character or may
/// be the beginning of a stop string.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    // The state of tokenizers' DecodeStream, which borrows its tokenizer and so cannot be kept.
    ids: Vec<u32>,
    prefix: String,
    prefix_index: usize,
    stop: StopStrings,
}

/// What one token added.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delta {
    /// Text that is now final.
    pub text: String,
    /// A stop string was reached; nothing follows.
    pub stopped: bool,
}

impl Detokenizer {
    /// Adds one token.
    pub fn push(&mut self, id: u32) -> Result<Delta, TokenizerError> {
        let Self { tokenizer, ids, prefix, prefix_index, stop } = self;
        let new = step_decode_stream(&tokenizer.inner, vec![id], true, ids, prefix, prefix_index);
        Ok(stop.push(&new.map_err(TokenizerError::Decode)?.unwrap_or_default()))
    }

    /// The text still held back, once no token follows. A character that was never completed
    /// becomes U+FFFD.
    pub fn finish(&mut self) -> Result<Delta, TokenizerError> {
        let whole = self.tokenizer.decode(&self.ids)?;
        let rest = whole.strip_prefix(self.prefix.as_str()).unwrap_or_default().to_owned();
        self.prefix = whole;
        let mut delta = self.stop.push(&rest);
        if !delta.stopped {
            delta.text.push_str(&self.stop.take_held());
        }
        Ok(delta)
    }
}

/// Finds the first stop string in text that comes in pieces.
#[derive(Debug)]
struct StopStrings {
    stop: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopStrings {
    fn new(stop: Vec<String>) -> Self {
        Self { stop, held: String::new(), stopped: false }
    }

    fn push(&mut self, new: &str) -> Delta {
        if self.stopped {
            return Delta { text: String::new(), stopped: true };
        }
        self.held.push_str(new);
        if let Some(at) = first_stop(&self.held, &self.stop) {
            self.held.truncate(at);
            self.stopped = true;
            return Delta { text: self.take_held(), stopped: true };
        }
        // Keep the longest tail that some stop string begins with.
        let keep = self
            .held
            .char_indices()
            .map(|(i, _)| i)
            .find(|&i| self.stop.iter().any(|s| s.starts_with(&self.held[i..])))
            .unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        Delta { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    fn take_held(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Where the stop string begins that is complete first, so that it does not matter in which pieces
/// the text came.
fn first_stop(text: &str, stop: &[String]) -> Option<usize> {
    let found = stop.iter().filter_map(|s| text.find(s.as_str()).map(|at| (at + s.len(), at)));
    found.min().map(|(_, at)| at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_stop_string_is_found_across_pieces_and_is_not_shown() {
        let mut stop = StopStrings::new(vec!["\n\n".into(), "END".into()]);
        assert_eq!(stop.push("one\n"), Delta { text: "one".into(), stopped: false });
        assert_eq!(stop.push("two E"), Delta { text: "\ntwo ".into(), stopped: false });
        assert_eq!(stop.push("NDless"), Delta { text: String::new(), stopped: true });
        assert_eq!(stop.push("more"), Delta { text: String::new(), stopped: true });
    }

    #[test]
    fn the_stop_string_that_is_complete_first_counts() {
        let stop = ["abc".to_owned(), "b".to_owned(), "ab".to_owned()];
        assert_eq!(first_stop("xabc", &stop), Some(1));
        assert_eq!(first_stop("abc", &stop[..2]), Some(1));
        assert_eq!(first_stop("xyz", &stop), None);
    }

    proptest! {
        #[test]
        fn pieces_give_what_the_whole_text_gives(
            pieces in prop::collection::vec("[abé]{0,3}", 0..12),
            stop in prop::collection::vec("[abé]{1,3}", 0..3),
        ) {
            let whole = pieces.concat();
            let end = first_stop(&whole, &stop);
            let mut finder = StopStrings::new(stop);
            let mut got = String::new();
            for piece in &pieces {
                got.push_str(&finder.push(piece).text);
            }
            got.push_str(&finder.take_held());
            prop_assert_eq!(finder.stopped, end.is_some());
            prop_assert_eq!(got.as_str(), &whole[..end.unwrap_or(whole.len())]);
        }
    }
}
