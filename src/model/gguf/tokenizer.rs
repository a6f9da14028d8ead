//! From the vocabulary in a GGUF file to the tokenizer that the model has with Hugging Face: byte-level BPE (`gpt2`), or
//! SentencePiece's BPE with scores in place of merges (`llama`).

use serde_json::{Value, json};
use tokenizers::{
    AddedToken,
    models::bpe::{BPE, BpeBuilder, Merges, Vocab},
};

use super::{
    super::tokenizer::{SharedTokenizer, TokenizerParts},
    metadata::Metadata,
    pretokenizer::PreTokenizer,
};

/// SentencePiece writes a space so.
const SPACE: &str = "▁";
/// Characters of a piece; real ones have at most 32 or so, and how it can be merged from two parts is
/// looked up at every one of them.
const MAX_PIECE: usize = 512;

/// Tokens, and ways to merge two; real vocabularies have at most a quarter of a million tokens and three
/// merges for each.
const MAX_TOKENS: usize = 1 << 21;
const MAX_MERGES: usize = 1 << 22;

/// `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// A way to make a piece of two others.
struct Merge {
    /// Of the whole.
    score: f64,
    /// Characters of each part.
    lengths: [u16; 2],
    left: u32,
    right: u32,
}

/// The tokens of a file, by id.
struct Vocabulary<'a> {
    metadata: &'a Metadata,
    tokens: Vec<&'a str>,
    kinds: Vec<Kind>,
}

/// The tokenizer. Nothing is built that is as large as the vocabulary but what the tokenizer consists of: neither a tree nor
/// a text of its `tokenizer.json`.
pub fn tokenizer(metadata: Metadata) -> Result<SharedTokenizer, String> {
    let (model, parts) = match metadata.text("tokenizer.ggml.model")? {
        Some("gpt2") => Vocabulary::read(&metadata)?.byte_level()?,
        Some("llama") => Vocabulary::read(&metadata)?.sentence_pieces()?,
        Some(other) => {
            return Err(format!("tokenizer.ggml.model {other:?} is not supported; supported are gpt2, llama"));
        }
        None => return Err("tokenizer.ggml.model is missing: the file has no tokenizer".to_owned()),
    };
    drop(metadata);
    let model = model.build().map_err(|e| e.to_string())?;
    parts.with_vocabulary(model).map_err(|e| e.to_string())
}

/// The `tokenizer_config.json`: which tokens begin and end, and the chat template if there is one.
pub fn tokenizer_config_json(metadata: &Metadata) -> Result<Value, String> {
    let mut config = json!({"tokenizer_class": "PreTrainedTokenizerFast"});
    if let Some(array) = metadata.array("tokenizer.ggml.tokens")? {
        for key in ["bos", "eos"] {
            let id = special_id(metadata, key)?;
            let token = id.and_then(|id| array.texts()?.nth(id)).map(String::from_utf8_lossy);
            config[format!("{key}_token")] = json!(token);
        }
    }
    if let Some(template) = metadata.text("tokenizer.chat_template")? {
        config["chat_template"] = json!(template);
    }
    Ok(config)
}

/// The id of a special token (`bos`, `eos`, `eot`, `padding`, `unknown`): what the file says, or what
/// SentencePiece's models have.
pub fn special_id(metadata: &Metadata, name: &str) -> Result<Option<usize>, String> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    let pieces = metadata.text("tokenizer.ggml.model")? == Some("llama");
    let default = match name {
        "unknown" if pieces => Some(0),
        "bos" if pieces => Some(1),
        "eos" if pieces => Some(2),
        _ => None,
    };
    Ok(metadata.unsigned(&key)?.map(|id| id as usize).or(default))
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a Metadata) -> Result<Self, String> {
        let array = metadata.array("tokenizer.ggml.tokens")?.ok_or("tokenizer.ggml.tokens is missing")?;
        if array.len() > MAX_TOKENS {
            return Err(format!("it has {} tokens, expected at most {MAX_TOKENS}", array.len()));
        }
        let texts = array.texts().ok_or("tokenizer.ggml.tokens is not an array of texts")?;
        let tokens: Vec<&str> = texts
            .enumerate()
            .map(|(id, text)| std::str::from_utf8(text).map_err(|_| format!("the token {id} is not UTF-8")))
            .collect::<Result<_, _>>()?;
        let kinds = match metadata.array("tokenizer.ggml.token_type")? {
            None => vec![Kind::Normal; tokens.len()],
            Some(types) if types.len() == tokens.len() => types
                .numbers()
                .ok_or("tokenizer.ggml.token_type is not an array of numbers")?
                .map(|kind| match kind.as_float() {
                    Some(2.0) => Kind::Unknown,
                    Some(3.0) => Kind::Control,
                    Some(4.0) => Kind::UserDefined,
                    Some(5.0) => Kind::Unused,
                    Some(6.0) => Kind::Byte,
                    _ => Kind::Normal,
                })
                .collect(),
            Some(types) => {
                return Err(format!(
                    "tokenizer.ggml.token_type has {} values for {} tokens",
                    types.len(),
                    tokens.len()
                ));
            }
        };
        let mut vocabulary = Self { metadata, tokens, kinds };
        for name in ["bos", "eos", "eot", "padding"] {
            // Not all writers mark them.
            if let Some(id) = vocabulary.special(name)? {
                vocabulary.kinds[id] = Kind::Control;
            }
        }
        Ok(vocabulary)
    }

    /// The id of a special token that the vocabulary has.
    fn special(&self, name: &str) -> Result<Option<usize>, String> {
        let given = self.metadata.get(&format!("tokenizer.ggml.{name}_token_id")).is_some();
        match special_id(self.metadata, name)? {
            Some(id) if id >= self.tokens.len() && given => {
                Err(format!("tokenizer.ggml.{name}_token_id is {id}, but there are {} tokens", self.tokens.len()))
            }
            id => Ok(id.filter(|id| *id < self.tokens.len())),
        }
    }

    /// Byte-level BPE with its merges.
    fn byte_level(&self) -> Result<(BpeBuilder, TokenizerParts), String> {
        let pre = PreTokenizer::of(self.metadata.text("tokenizer.ggml.pre")?.unwrap_or("default"))?;
        let array = self.metadata.array("tokenizer.ggml.merges")?.ok_or("tokenizer.ggml.merges is missing")?;
        if array.len() > MAX_MERGES {
            return Err(format!("it has {} merges, expected at most {MAX_MERGES}", array.len()));
        }
        let vocabulary = self.unique();
        let mut whole = String::new();
        let merges: Merges = array
            .texts()
            .ok_or("tokenizer.ggml.merges is not an array of texts")?
            .enumerate()
            .map(|(i, merge)| {
                let wrong = || format!("the merge {i} is not two tokens with a space between");
                let merge = std::str::from_utf8(merge).map_err(|_| wrong())?;
                let first = merge.chars().next().map_or(0, char::len_utf8);
                let at = merge[first..].find(' ').ok_or_else(wrong)? + first;
                let (left, right) = (&merge[..at], &merge[at + 1..]);
                whole.clear();
                whole.extend([left, right]);
                match [left, right, &whole].into_iter().find(|part| !vocabulary.contains_key(*part)) {
                    None => Ok((left.to_owned(), right.to_owned())),
                    Some(other) => Err(format!("{left:?} and {right:?} are merged, but {other:?} is not a token")),
                }
            })
            .collect::<Result<_, String>>()?;
        let parts = self.parts(
            pre.normalizer.map_or(Value::Null, |kind| json!({"type": kind})),
            pre.json(),
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
            self.post_processor(pre.begins)?,
        )?;
        Ok((BPE::builder().vocab_and_merges(vocabulary, merges).ignore_merges(pre.whole_words), parts))
    }

    /// SentencePiece's BPE: what has the higher score is merged first.
    fn sentence_pieces(&self) -> Result<(BpeBuilder, TokenizerParts), String> {
        let scores = self.metadata.array("tokenizer.ggml.scores")?.ok_or("tokenizer.ggml.scores is missing")?;
        let scores: Vec<f64> = scores.floats().ok_or("tokenizer.ggml.scores is not an array of numbers")?.collect();
        if scores.len() != self.tokens.len() {
            return Err(format!("tokenizer.ggml.scores has {} values for {} tokens", scores.len(), self.tokens.len()));
        }
        let vocabulary = self.unique();
        let merges = self.merges(&vocabulary, &scores)?;
        let unknown = self.special("unknown")?.map(|id| self.tokens[id]);
        let prefix = self.metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let mut normalizers = vec![replace(" ", SPACE)];
        let mut decoders = vec![replace(SPACE, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
        if prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let parts = self.parts(
            json!({"type": "Sequence", "normalizers": normalizers}),
            Value::Null,
            json!({"type": "Sequence", "decoders": decoders}),
            self.post_processor(true)?,
        )?;
        let mut model = BPE::builder().vocab_and_merges(vocabulary, merges).fuse_unk(true).byte_fallback(true);
        if let Some(unknown) = unknown {
            model = model.unk_token(unknown.to_owned());
        }
        Ok((model, parts))
    }

    /// Every way to make a piece of two others, the best first: in the order of transformers'
    /// `generate_merges`.
    fn merges(&self, vocabulary: &Vocab, scores: &[f64]) -> Result<Merges, String> {
        let is_piece = |id: u32| matches!(self.kinds[id as usize], Kind::Normal | Kind::UserDefined);
        let piece = |text: &str| vocabulary.get(text).copied().filter(|id| is_piece(*id));
        let mut merges = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            // Of equal tokens the first.
            if piece(token).is_none_or(|first| first as usize != id) {
                continue;
            }
            let length = token.chars().count();
            if length > MAX_PIECE {
                return Err(format!("the token {id} has {length} characters, expected at most {MAX_PIECE}"));
            }
            let first = merges.len();
            for (i, (at, _)) in token.char_indices().enumerate().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(left), Some(right)) = (piece(left), piece(right)) {
                    let lengths = [i as u16, (length - i) as u16];
                    merges.push(Merge { score: scores[id], lengths, left, right });
                }
            }
            if merges.len() > MAX_MERGES {
                return Err(format!("its tokens can be merged in more than {MAX_MERGES} ways"));
            }
            merges[first..].sort_by_key(|merge| (merge.left, merge.right));
        }
        merges.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.lengths.cmp(&a.lengths)));
        let text = |id: u32| self.tokens[id as usize].to_owned();
        Ok(merges.into_iter().map(|merge| (text(merge.left), text(merge.right))).collect())
    }

    /// Tokens to ids; of equal tokens the first.
    fn unique(&self) -> Vocab {
        let mut vocabulary = Vocab::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            vocabulary.entry((*token).to_owned()).or_insert(id as u32);
        }
        vocabulary
    }

    /// Tokens that are found in a text before anything else is done with it, the longest first: runs of spaces among them.
    fn added(&self) -> Vec<AddedToken> {
        let added = |id: &usize| {
            matches!(self.kinds[*id], Kind::Control | Kind::Unknown | Kind::UserDefined) && !self.tokens[*id].is_empty()
        };
        let token = |id| AddedToken::from(self.tokens[id], self.kinds[id] != Kind::UserDefined).normalized(false);
        (0..self.tokens.len()).filter(added).map(token).collect()
    }

    /// What puts BOS before a text and EOS after it.
    fn post_processor(&self, begins: bool) -> Result<Value, String> {
        let add_bos = self.metadata.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(begins);
        let add_eos = self.metadata.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
        let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
        let mut pair = vec![single[0].clone(), json!({"Sequence": {"id": "B", "type_id": 1}})];
        let mut special = serde_json::Map::new();
        for (wanted, name, at_start) in [(add_bos, "bos", true), (add_eos, "eos", false)] {
            if !wanted {
                continue;
            }
            // Without such a token llama.cpp adds none either.
            let Some(id) = self.special(name)? else { continue };
            let token = self.tokens[id];
            special.insert(token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}));
            for parts in [&mut single, &mut pair] {
                let at = if at_start { 0 } else { parts.len() };
                parts.insert(at, json!({"SpecialToken": {"id": token, "type_id": 0}}));
            }
        }
        Ok(match special.is_empty() {
            true => Value::Null,
            false => {
                json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special})
            }
        })
    }

    fn parts(&self, normalizer: Value, pre: Value, decoder: Value, post: Value) -> Result<TokenizerParts, String> {
        let parts = json!({"normalizer": normalizer, "pre_tokenizer": pre, "post_processor": post, "decoder": decoder});
        let parts: TokenizerParts = serde_json::from_value(parts).map_err(|e| e.to_string())?;
        Ok(TokenizerParts { added_tokens: self.added(), ..parts })
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{header::Header, metadata::Metadata},
        *,
    };

    /// The bytes of a text, and of an array of numbers of four bytes.
    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    fn array(kind: u32, values: &[[u8; 4]]) -> Vec<u8> {
        [&9u32.to_le_bytes()[..], &kind.to_le_bytes(), &(values.len() as u64).to_le_bytes(), &values.concat()].concat()
    }

    /// SentencePiece's tokens with their kinds and scores, as a file has them.
    fn metadata(tokens: &[(&str, i32, f32)]) -> Metadata {
        let texts: Vec<u8> = tokens.iter().flat_map(|(token, ..)| text(token)).collect();
        let texts =
            [&9u32.to_le_bytes()[..], &8u32.to_le_bytes(), &(tokens.len() as u64).to_le_bytes(), &texts].concat();
        let kinds: Vec<[u8; 4]> = tokens.iter().map(|token| token.1.to_le_bytes()).collect();
        let scores: Vec<[u8; 4]> = tokens.iter().map(|token| token.2.to_le_bytes()).collect();
        let entries = [
            ("tokenizer.ggml.model", [&8u32.to_le_bytes()[..], &text("llama")].concat()),
            ("tokenizer.ggml.tokens", texts),
            ("tokenizer.ggml.token_type", array(5, &kinds)),
            ("tokenizer.ggml.scores", array(6, &scores)),
            ("tokenizer.ggml.add_space_prefix", [&7u32.to_le_bytes()[..], &[0]].concat()),
        ];
        let mut bytes =
            [&b"GGUF"[..], &3u32.to_le_bytes(), &0u64.to_le_bytes(), &(entries.len() as u64).to_le_bytes()].concat();
        entries.iter().for_each(|(key, value)| bytes.extend([text(key), value.clone()].concat()));
        Header::read(&bytes[..], bytes.len() as u64).expect("a header").metadata
    }

    #[test]
    fn making_a_tokenizer_takes_little_more_than_it_keeps() {
        // Numbers in two digits, of which most can be made of two others in several ways.
        let word = |i: u32| format!("{i:b}").replace('0', "a").replace('1', "b");
        let words: Vec<String> = (0..14_000).map(word).collect();
        let special = [("<unk>", 2, 0.0), ("<s>", 3, 0.0), ("</s>", 3, 0.0)];
        let words = words.iter().zip(0..).map(|(word, i)| (word.as_str(), 1, -(i as f32)));
        let tokens: Vec<_> = special.into_iter().chain(words).collect();
        let mut kept = None;
        let info = allocation_counter::measure(|| kept = Some(tokenizer(metadata(&tokens)).expect("a tokenizer")));
        assert!(info.bytes_max < 4 * info.bytes_current.unsigned_abs(), "{info:?}");
    }

    #[test]
    fn runs_of_spaces_that_a_user_defined_are_found_before_words_the_longest_first() {
        let (normal, user) = (1, 4);
        let tokens = [
            ("<unk>", 2, 0.0),
            ("<s>", 3, 0.0),
            ("</s>", 3, 0.0),
            ("▁", normal, -3.0),
            ("a", normal, -4.0),
            ("b", normal, -5.0),
            ("▁b", normal, -1.0),
            ("  ", user, -1000.0),
            ("   ", user, -1000.0),
        ];
        let tokenizer = tokenizer(metadata(&tokens)).expect("a tokenizer");
        for (text, ids) in [
            ("a b", vec![4, 6]),
            ("a  b", vec![4, 7, 5]),
            ("a   b", vec![4, 8, 5]),
            ("a    b", vec![4, 8, 6]),
            ("  b  ", vec![7, 5, 7]),
        ] {
            let found = tokenizer.encode(text, false).expect("encodes");
            assert_eq!(found.get_ids(), ids, "{text:?}");
            assert_eq!(tokenizer.decode(&ids, true).expect("decodes"), text);
        }
    }
}
