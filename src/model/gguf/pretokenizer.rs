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

const PLAIN: PreTokenizer =
    PreTokenizer { names: &[], cuts: &[Cut::Gpt2], normalizer: None, whole_words: false, begins: false };

const ALL: [PreTokenizer; 10] = [
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        cuts: &[Cut::Pattern(LLAMA3)],
        whole_words: true,
        begins: true,
        ..PLAIN
    },
    // OLMo 2 goes by the first.
    PreTokenizer { names: &["dbrx", "smaug-bpe"], cuts: &[Cut::Pattern(LLAMA3)], ..PLAIN },
    PreTokenizer { names: &["qwen2"], cuts: &[Cut::Pattern(QWEN2)], normalizer: Some("NFC"), ..PLAIN },
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
        if !matches!(self.cuts.last(), Some(Cut::Gpt2)) {
            steps.push(bytes(false));
        }
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}
