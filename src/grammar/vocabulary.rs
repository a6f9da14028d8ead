//! The bytes of each token of a vocabulary, of which grammars are told.

use std::sync::Arc;

use llguidance::{
    token_bytes_from_tokenizer_json,
    toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie},
};
use serde_json::{Value, json};

use crate::{prompt::grammar::GrammarError, tokenizer::Tokenizer};

/// The vocabulary of a tokenizer, with as many tokens as the logits are wide. Special tokens have no bytes that a grammar
/// matches.
///
/// # Errors
/// The tokenizer's decoder does not say what bytes a token has.
pub(super) fn token_bytes(tokenizer: &Tokenizer, vocab_size: usize, end: &[u32]) -> Result<TokEnv, GrammarError> {
    let unknown = |reason: String| {
        GrammarError(format!(
            "the model's tokenizer does not tell the bytes of its tokens, which a grammar needs: {reason}"
        ))
    };
    let mut json = tokenizer.vocabulary_json().map_err(|error| unknown(error.to_string()))?;
    as_byte_fallback(&mut json);
    let mut tokens = token_bytes_from_tokenizer_json(&json).map_err(|error| unknown(error.to_string()))?;
    tokens.resize(vocab_size, Vec::new());
    let mut end: Vec<u32> = end.iter().copied().filter(|&id| (id as usize) < vocab_size).collect();
    for &id in &end {
        // Whatever it is written as, it ends the answer.
        let bytes = &mut tokens[id as usize];
        if bytes.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER) {
            bytes.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
        }
    }
    if end.is_empty() {
        // A model that knows no end ends where the grammar does; this token is beyond the logits.
        tokens.push(b"\xff<|end|>".to_vec());
        end.push(vocab_size as u32);
    }
    let info = TokRxInfo::new(tokens.len() as u32, end[0]);
    let trie = TokTrie::from(&info, &tokens).with_eos_tokens(&end);
    Ok(Arc::new(ApproximateTokEnv::new(trie)))
}

/// Rewrites what llguidance does not read as what it does: a `Metaspace` decoder as its replacement of the space.
fn as_byte_fallback(json: &mut Value) {
    let decoder = &json["decoder"];
    let metaspace = [decoder].into_iter().chain(decoder["decoders"].as_array().into_iter().flatten());
    let metaspace = metaspace.filter(|d| d["type"] == "Metaspace").find_map(|d| d["replacement"].as_str());
    if let Some(space) = metaspace {
        json["decoder"] = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": space}, "content": " "}, {"type": "ByteFallback"}]});
    }
}
