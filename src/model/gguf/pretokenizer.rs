//! How a text is cut into words before BPE, by the names that llama.cpp gives to it
//! (`tokenizer.ggml.pre`). The patterns are those of the models' own `tokenizer.json`.

use serde_json::{Value, json};

/// One way to cut.
#[derive(Debug, Clone, Copy)]
pub struct PreTokenizer {
    names: &'static [&'static str],
    cuts: &'static [Cut],
    /// Unicode normalization before it.
    pub normalizer: Option<&'static str>,
    /// A word that is a token is not merged from its parts.
    pub whole_words: bool,
    /// BOS is added where the file does not say.
    pub begins: bool,
}

#[derive(Debug, Clone, Copy)]
enum Cut {
    /// What the pattern finds, and what is between.
    Pattern(&'static str),
    /// Each digit alone.
    Digits,
    /// GPT-2's pattern, which tokenizers has built in.
    Gpt2,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const BLOOM: &str = r" ?[^(\s|[.,!?…。，、।۔،])]+";

/// Letters of the scripts that have letter case, with a space before them.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[",
    r"A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\u{1c4}-\u{293}\u{295}-\u{2af}",
    r"\u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-\u{3a1}",
    r"\u{3a3}-\u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-\u{13f5}",
    r"\u{13f8}-\u{13fd}\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}",
    r"\u{1d79}-\u{1d9a}\u{1e00}-\u{1f15}\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}",
    r"\u{1f50}-\u{1f57}\u{1f59}\u{1f5b}\u{1f5d}\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}",
    r"\u{1fc2}-\u{1fc4}\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}",
    r"\u{1ff2}-\u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}\u{2124}",
    r"\u{2126}\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\u{213c}-\u{213f}\u{2145}-\u{2149}\u{214e}",
    r"\u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\u{2ceb}-\u{2cee}\u{2cf2}\u{2cf3}\u{a640}-\u{a66d}",
    r"\u{a680}-\u{a69b}\u{a722}-\u{a76f}\u{a771}-\u{a787}\u{a78b}-\u{a78e}\u{ab70}-\u{abbf}",
    r"\u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}\u{10400}-\u{1044f}",
    r"\u{104b0}-\u{104d3}\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\u{118a0}-\u{118df}",
    r"\u{1e900}-\u{1e943}",
    r"]+"
);
const DEEPSEEK_PUNCTUATION: &str = r"\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+";
/// Chinese, Japanese, Korean and what lies between in Unicode.
const DEEPSEEK_CJK: &str = r"[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";

const PLAIN: PreTokenizer =
    PreTokenizer { names: &[], cuts: &[Cut::Gpt2], normalizer: None, whole_words: false, begins: false };

const ALL: [PreTokenizer; 13] = [
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        cuts: &[Cut::Pattern(LLAMA3)],
        whole_words: true,
        begins: true,
        ..PLAIN
    },
    // OLMo 2 goes by the first.
    PreTokenizer { names: &["dbrx", "smaug-bpe"], cuts: &[Cut::Pattern(LLAMA3)], ..PLAIN },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen"],
        cuts: &[Cut::Pattern(QWEN2)],
        normalizer: Some("NFC"),
        ..PLAIN
    },
    PreTokenizer { names: &["stablelm2"], cuts: &[Cut::Pattern(QWEN2)], ..PLAIN },
    PreTokenizer { names: &["gpt-2", "phi-2"], ..PLAIN },
    // GPT-NeoX's and OLMo's.
    PreTokenizer { names: &["olmo", "mpt"], normalizer: Some("NFC"), ..PLAIN },
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"],
        cuts: &[Cut::Digits, Cut::Gpt2],
        ..PLAIN
    },
    PreTokenizer { names: &["bloom"], cuts: &[Cut::Pattern(BLOOM)], ..PLAIN },
    PreTokenizer { names: &["tekken"], cuts: &[Cut::Pattern(TEKKEN)], whole_words: true, begins: true, ..PLAIN },
    PreTokenizer { names: &["gpt-4o", "llama4"], cuts: &[Cut::Pattern(GPT4O)], ..PLAIN },
    PreTokenizer {
        names: &["deepseek-llm"],
        cuts: &[
            Cut::Pattern(r"[\r\n]"),
            Cut::Pattern(DEEPSEEK_LETTERS),
            Cut::Pattern(DEEPSEEK_PUNCTUATION),
            Cut::Pattern(r"\s+$"),
            Cut::Pattern(DEEPSEEK_CJK),
            Cut::Pattern(r"\p{N}+"),
        ],
        ..PLAIN
    },
    PreTokenizer {
        names: &["deepseek-coder"],
        cuts: &[
            Cut::Pattern(r"[\r\n]"),
            Cut::Pattern(r"\s?\p{L}+"),
            Cut::Pattern(r"\s?\p{P}+"),
            Cut::Pattern(DEEPSEEK_CJK),
            Cut::Digits,
        ],
        ..PLAIN
    },
    PreTokenizer {
        names: &["falcon"],
        cuts: &[Cut::Pattern(r"[\p{P}\$\+<=>\^~\|`]+"), Cut::Gpt2, Cut::Pattern("[0-9][0-9][0-9]")],
        ..PLAIN
    },
];

/// What llama.cpp does for files that do not name one.
const DEFAULT: PreTokenizer = PreTokenizer {
    names: &["default"],
    cuts: &[
        Cut::Pattern(r"[\p{P}\$\+<=>\^~\|]+"),
        Cut::Pattern(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
        Cut::Pattern(r"\p{N}+"),
        Cut::Pattern("[0-9][0-9][0-9]"),
    ],
    ..PLAIN
};

impl PreTokenizer {
    /// The one of a name. An unknown name is an error: another way to cut gives other tokens.
    pub fn of(name: &str) -> Result<&'static Self, String> {
        let all = || ALL.iter().chain([&DEFAULT]);
        all().find(|pre| pre.names.contains(&name)).ok_or_else(|| {
            let known: Vec<_> = all().flat_map(|pre| pre.names).copied().collect();
            format!("tokenizer.ggml.pre {name:?} is not supported; supported are {}", known.join(", "))
        })
    }

    /// As `tokenizer.json` has it, the change to visible bytes included.
    pub fn json(&self) -> Value {
        let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
        let cut = |cut: &Cut| match cut {
            Cut::Pattern(pattern) => {
                json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
            }
            Cut::Digits => json!({"type": "Digits", "individual_digits": true}),
            Cut::Gpt2 => bytes(true),
        };
        let mut steps: Vec<Value> = self.cuts.iter().map(cut).collect();
        if !self.cuts.iter().any(|cut| matches!(cut, Cut::Gpt2)) {
            steps.push(bytes(false));
        }
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _, pre_tokenizers::PreTokenizerWrapper,
    };

    use super::*;

    /// The words of a text.
    fn words<'a>(name: &str, text: &'a str) -> Vec<&'a str> {
        let json = PreTokenizer::of(name).expect("a known name").json();
        let pre: PreTokenizerWrapper = serde_json::from_value(json).expect("a pre-tokenizer");
        let mut cut = PreTokenizedString::from(text);
        pre.pre_tokenize(&mut cut).expect("it can be cut");
        cut.get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(_, (start, end), _)| &text[start..end])
            .collect()
    }

    #[test]
    fn texts_are_cut_as_the_models_own_tokenizers_do() {
        let text = "It's 1234 (ok)\nif x1 == 22: été 你好";
        for (name, expected) in [
            (
                "deepseek-coder",
                &[
                    "It", "'", "s", " ", "1", "2", "3", "4", " (", "ok", ")", "\n", "if", " x", "1", " == ", "2", "2",
                    ":", " été", " ", "你好",
                ][..],
            ),
            // Each pattern also cuts what the ones before it found: `:-~` has the letters of ASCII in it.
            (
                "deepseek-llm",
                &[
                    "It", "'", "s", " ", "1234", " (", "ok", ")", "\n", "if", " x", "1", " ==", " ", "22", ":", " é",
                    "t", "é", " ", "你好",
                ],
            ),
            (
                "falcon",
                &[
                    "It", "'", "s", " ", "123", "4", " ", "(", "ok", ")", "\n", "if", " x", "1", " ", "==", " 22", ":",
                    " été", " 你好",
                ],
            ),
        ] {
            assert_eq!(words(name, text), expected, "{name}");
        }
        assert_eq!(words("deepseek-r1-qwen", text), words("qwen2", text));
    }
}
