//! The tokenizer of a model's files, in memory once: its vocabulary is shared by all that is made of it, and is built
//! without a tree of `tokenizer.json`, which would be several times its size.

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, SeqAccess, Visitor},
};
use serde_json::value::RawValue;
use tokenizers::{
    AddedToken, DecoderWrapper, Model, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    Result as TokenizersResult, Token, TokenizerImpl,
    models::{
        TrainerWrapper,
        bpe::{BPE, Merges, Vocab},
        unigram::Unigram,
        wordlevel::WordLevel,
        wordpiece::WordPiece,
    },
};

/// A tokenizer whose copies share the vocabulary.
pub type SharedTokenizer =
    TokenizerImpl<SharedVocabulary, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// The vocabulary of a tokenizer and how it makes tokens of a word (BPE, Unigram or another model). Cheap to clone.
#[derive(Debug, Clone)]
pub struct SharedVocabulary(Arc<ModelWrapper>);

/// What `tokenizer.json` has beside the vocabulary and the merges, each part as there.
#[derive(Debug, Deserialize)]
pub struct TokenizerParts {
    #[serde(default)]
    pub added_tokens: Vec<AddedToken>,
    pub normalizer: Option<NormalizerWrapper>,
    pub pre_tokenizer: Option<PreTokenizerWrapper>,
    pub post_processor: Option<PostProcessorWrapper>,
    pub decoder: Option<DecoderWrapper>,
}

impl TokenizerParts {
    /// The tokenizer of these parts and a vocabulary.
    ///
    /// # Errors
    /// The normalizer fails on an added token.
    pub fn with_vocabulary(self, vocabulary: impl Into<ModelWrapper>) -> TokenizersResult<SharedTokenizer> {
        let mut tokenizer = SharedTokenizer::new(vocabulary.into().into());
        tokenizer.with_normalizer(self.normalizer)?;
        tokenizer.with_pre_tokenizer(self.pre_tokenizer);
        tokenizer.with_post_processor(self.post_processor);
        tokenizer.with_decoder(self.decoder);
        tokenizer.add_tokens(self.added_tokens)?;
        Ok(tokenizer)
    }
}

/// Reads a `tokenizer.json`.
///
/// # Errors
/// It is not one.
pub fn read(json: &[u8]) -> TokenizersResult<SharedTokenizer> {
    SharedTokenizer::from_bytes(json)
}

impl From<ModelWrapper> for SharedVocabulary {
    fn from(model: ModelWrapper) -> Self {
        Self(Arc::new(model))
    }
}

impl<'de> Deserialize<'de> for SharedVocabulary {
    /// The library's own way makes a tree of all that is there before it knows which type of model it is.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Typed<'a> {
            #[serde(rename = "type", borrow)]
            kind: Option<Cow<'a, str>>,
        }
        let text = <&RawValue>::deserialize(deserializer)?.get();
        let typed: Typed = serde_json::from_str(text).map_err(D::Error::custom)?;
        let model = match typed.kind.as_deref() {
            Some("BPE") => serde_json::from_str::<BpeFile>(text).map_err(D::Error::custom)?.build()?,
            Some("Unigram") => serde_json::from_str::<Unigram>(text).map_err(D::Error::custom)?.into(),
            Some("WordPiece") => serde_json::from_str::<WordPiece>(text).map_err(D::Error::custom)?.into(),
            Some("WordLevel") => serde_json::from_str::<WordLevel>(text).map_err(D::Error::custom)?.into(),
            _ => serde_json::from_str::<ModelWrapper>(text).map_err(D::Error::custom)?,
        };
        Ok(model.into())
    }
}

impl Model for SharedVocabulary {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, sequence: &str) -> TokenizersResult<Vec<Token>> {
        self.0.tokenize(sequence)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.id_to_token(id)
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.0.get_vocab()
    }

    fn get_vocab_size(&self) -> usize {
        self.0.get_vocab_size()
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> TokenizersResult<Vec<PathBuf>> {
        self.0.save(folder, prefix)
    }

    fn get_trainer(&self) -> TrainerWrapper {
        self.0.get_trainer()
    }
}

/// A model of the type BPE in `tokenizer.json`.
#[derive(Deserialize)]
struct BpeFile {
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
    vocab: Vocab,
    merges: MergesFile,
}

impl BpeFile {
    fn build<E: serde::de::Error>(self) -> Result<ModelWrapper, E> {
        let mut builder = BPE::builder()
            .vocab_and_merges(self.vocab, self.merges.0)
            .fuse_unk(self.fuse_unk.unwrap_or_default())
            .byte_fallback(self.byte_fallback.unwrap_or_default())
            .ignore_merges(self.ignore_merges.unwrap_or_default());
        if let Some(dropout) = self.dropout {
            builder = builder.dropout(dropout);
        }
        if let Some(token) = self.unk_token {
            builder = builder.unk_token(token);
        }
        if let Some(prefix) = self.continuing_subword_prefix {
            builder = builder.continuing_subword_prefix(prefix);
        }
        if let Some(suffix) = self.end_of_word_suffix {
            builder = builder.end_of_word_suffix(suffix);
        }
        builder.build().map(ModelWrapper::from).map_err(E::custom)
    }
}

/// The merges: pairs, or lines of two tokens with a space between, of which those that begin with `#version` are none.
struct MergesFile(Merges);

/// One of them; `None` of a line that is none.
struct Merge(Option<(String, String)>);

impl<'de> Deserialize<'de> for MergesFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Each;
        impl<'de> Visitor<'de> for Each {
            type Value = MergesFile;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of merges")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<MergesFile, A::Error> {
                let mut merges = Merges::new();
                while let Some(Merge(merge)) = list.next_element()? {
                    merges.extend(merge);
                }
                Ok(MergesFile(merges))
            }
        }
        deserializer.deserialize_seq(Each)
    }
}

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct One;
        impl<'de> Visitor<'de> for One {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a merge of two tokens")
            }

            fn visit_str<E: serde::de::Error>(self, line: &str) -> Result<Merge, E> {
                if line.starts_with("#version") {
                    return Ok(Merge(None));
                }
                match line.split_once(' ').filter(|(_, right)| !right.contains(' ')) {
                    Some((left, right)) => Ok(Merge(Some((left.to_owned(), right.to_owned())))),
                    None => Err(E::custom(format!("the merge {line:?} is not two tokens with a space between"))),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut pair: A) -> Result<Merge, A::Error> {
                let mut token = |i| -> Result<String, A::Error> {
                    pair.next_element()?.ok_or_else(|| A::Error::invalid_length(i, &"two tokens"))
                };
                Ok(Merge(Some((token(0)?, token(1)?))))
            }
        }
        deserializer.deserialize_any(One)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The library's own reading, and ours.
    fn both(model: &str) -> (TokenizersResult<tokenizers::Tokenizer>, TokenizersResult<SharedTokenizer>) {
        let json = format!(
            r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{{"id":3,"content":"<s>","single_word":false,
            "lstrip":false,"rstrip":false,"normalized":false,"special":true}}],"normalizer":{{"type":"Lowercase"}},
            "pre_tokenizer":{{"type":"Whitespace"}},"post_processor":null,"decoder":null,"model":{model}}}"#
        );
        (tokenizers::Tokenizer::from_bytes(&json), read(json.as_bytes()))
    }

    #[test]
    fn every_type_of_model_is_read_as_the_library_reads_it() {
        let bpe = |more: &str| {
            format!(
                r###"{{{more}"vocab":{{"a":0,"b":1,"ab":2,"<s>":3,"<0x63>":4,"##b":5,"abb":6,"u":7}},"unk_token":"u","###
            )
        };
        for model in [
            bpe(r#""type":"BPE","#) + r#""merges":[["a","b"],["ab","b"]]}"#,
            bpe(r#""type":"BPE","dropout":null,"byte_fallback":true,"#) + r##""merges":["#version: 0.2","a b"]}"##,
            bpe(r#""type":"BPE","ignore_merges":true,"fuse_unk":true,"#) + r#""merges":[]}"#,
            bpe(r###""continuing_subword_prefix":"##","###) + r###""merges":[["a","##b"]],"type":"BPE"}"###,
            bpe("") + r#""merges":["a b"]}"#,
            r#"{"type":"Unigram","unk_id":0,"vocab":[["u",0.0],["a",-1.0],["ab",-1.5],["<s>",0.0],["b",-2.0]]}"#.to_owned(),
            r###"{"type":"WordPiece","unk_token":"u","continuing_subword_prefix":"##","max_input_chars_per_word":9,"vocab":
               {"u":0,"a":1,"##b":2,"<s>":3}}"###
                .to_owned(),
            r#"{"type":"WordLevel","unk_token":"u","vocab":{"u":0,"ab":1,"a":2,"<s>":3}}"#.to_owned(),
        ] {
            let (theirs, ours) = both(&model);
            let (theirs, ours) = (theirs.expect(&model), ours.expect(&model));
            assert_eq!(*ours.get_model().0, *theirs.get_model(), "{model}");
            for text in ["ab abb <s>A b", "c cc abc", ""] {
                let ids = ours.encode(text, true).unwrap();
                assert_eq!(ids, theirs.encode(text, true).unwrap(), "{model} {text:?}");
                assert_eq!(ours.decode(ids.get_ids(), false).unwrap(), theirs.decode(ids.get_ids(), false).unwrap());
            }
        }
    }

    #[test]
    fn what_the_library_refuses_is_refused() {
        for model in [
            r#"{"type":"BPE","vocab":{"a":0},"merges":["a  a"]}"#,
            r#"{"type":"BPE","vocab":{"a":0},"merges":["a"]}"#,
            r#"{"type":"BPE","vocab":{"a":0},"merges":[["a"]]}"#,
            r#"{"type":"BPE","vocab":{"a":0},"merges":[["a","a","a"]]}"#,
            r#"{"type":"BPE","vocab":{"a":0},"merges":[["a","b"]]}"#,
            r#"{"type":"BPE","vocab":{"a":0}}"#,
            r#"{"type":"BPE","dropout":2.0,"vocab":{"a":0},"merges":[]}"#,
            r#"{"type":"Other","vocab":{"a":0},"merges":[]}"#,
            r#"["BPE"]"#,
        ] {
            let (theirs, ours) = both(model);
            assert!(theirs.is_err() && ours.is_err(), "{model}");
        }
    }

    #[test]
    fn copies_share_the_vocabulary() {
        let (_, tokenizer) = both(r#"{"type":"WordLevel","unk_token":"u","vocab":{"u":0,"ab":1,"<s>":3}}"#);
        let tokenizer = tokenizer.unwrap();
        assert!(Arc::ptr_eq(&tokenizer.get_model().0, &tokenizer.clone().get_model().0));
    }
}
