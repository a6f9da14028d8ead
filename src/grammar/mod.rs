//! Structured output: grammars compiled for the model's tokenizer, as constraints that the engine's sampler obeys.

mod mask;
mod vocabulary;

use std::{
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use llguidance::ParserFactory;

use crate::{
    engine::sampling::mask::TokenConstraint,
    prompt::grammar::{Grammar, GrammarError, quiet},
    tokenizer::Tokenizer,
};
use mask::Compiled;

/// Compiled grammars that are kept.
const KEPT: usize = 64;

/// Compiles grammars for one model, and keeps those of late.
pub struct Grammars {
    tokenizer: Tokenizer,
    /// The width of the logits.
    vocab_size: usize,
    /// Tokens that end an answer.
    end_tokens: Vec<u32>,
    /// Made when a grammar is first compiled: it takes a while for a large vocabulary.
    factory: OnceLock<Result<ParserFactory, GrammarError>>,
    /// With the grammar as JSON; the last used at the end.
    kept: Mutex<Vec<(String, Arc<Compiled>)>>,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").field("vocab_size", &self.vocab_size).finish_non_exhaustive()
    }
}

impl Grammars {
    /// For a model of this tokenizer, this width of logits and these tokens that end an answer.
    pub fn new(tokenizer: Tokenizer, vocab_size: usize, end_tokens: Vec<u32>) -> Self {
        Self { tokenizer, vocab_size, end_tokens, factory: OnceLock::new(), kept: Mutex::default() }
    }

    /// The grammar, if it was compiled of late.
    pub fn compiled(&self, grammar: &Grammar) -> Option<Arc<dyn TokenConstraint>> {
        self.find(&serde_json::to_string(grammar).ok()?)
    }

    /// Compiles a grammar; the first one, and large ones, take some time.
    ///
    /// # Errors
    /// It does not compile, or the tokens' bytes cannot be known.
    pub fn compile(&self, grammar: &Grammar) -> Result<Arc<dyn TokenConstraint>, GrammarError> {
        let key = serde_json::to_string(grammar).map_err(|error| GrammarError(error.to_string()))?;
        if let Some(found) = self.find(&key) {
            return Ok(found);
        }
        let factory = self.factory.get_or_init(|| {
            let vocabulary = vocabulary::token_bytes(&self.tokenizer, self.vocab_size, &self.end_tokens)?;
            let factory = ParserFactory::new_simple(&vocabulary);
            factory.map(quiet).map_err(|error| GrammarError(error.to_string()))
        });
        let compiled = Arc::new(Compiled::new(grammar.compile(factory.as_ref().map_err(Clone::clone)?)?)?);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push((key, Arc::clone(&compiled)));
        if kept.len() > KEPT {
            kept.remove(0);
        }
        Ok(compiled)
    }

    fn find(&self, key: &str) -> Option<Arc<dyn TokenConstraint>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(known, _)| known == key)?;
        let found = kept.remove(at);
        let compiled = Arc::clone(&found.1);
        kept.push(found);
        Some(compiled)
    }
}

#[cfg(test)]
mod tests;
