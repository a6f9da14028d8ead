//! Several prompts of keys and values in one request: `manual+pricing@3f9a0c`, with positions as if they were one.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::Tensor;
use sha2::{Digest as _, Sha256};

use crate::prompt::{
    Digest, LearnedPrompt, Version,
    learned::{KeyValues, LayerKeyValues},
};

/// The most prompts of one request.
const MAX_PARTS: usize = 8;
/// Compositions that are kept ready.
const KEPT: usize = 32;

/// Compositions of late, the last used at the end.
#[derive(Debug, Default)]
pub(super) struct Compositions(Mutex<Vec<Arc<Version>>>);

impl Compositions {
    /// Several versions as one. The first says template, labels and defaults.
    ///
    /// # Errors
    /// There are too many, or one is no prompt of keys and values.
    pub(super) fn compose(&self, parts: &[Arc<Version>]) -> Result<Arc<Version>, String> {
        if parts.len() > MAX_PARTS {
            return Err(format!("it has {} prompts, at most {MAX_PARTS} can be combined", parts.len()));
        }
        let mut hash = Sha256::new();
        let mut layers: Vec<Vec<&LayerKeyValues>> = Vec::new();
        for part in parts {
            hash.update(part.digest.0);
            let LearnedPrompt::KeyValues(KeyValues { layers: own }) = &*part.prompt else {
                return Err(format!(
                    "the prompt of {} consists of embeddings; only prompts of keys and values (prefix tuning, cartridges) can be combined",
                    part.task
                ));
            };
            layers.resize(own.len(), Vec::new());
            layers.iter_mut().zip(own).for_each(|(all, layer)| all.push(layer));
        }
        let digest = Digest(hash.finalize().into());
        if let Some(found) = self.find(digest) {
            return Ok(found);
        }
        let cat = |all: &Vec<&LayerKeyValues>| -> candle_core::Result<LayerKeyValues> {
            let joined = |of: fn(&LayerKeyValues) -> &Tensor| {
                Tensor::cat(&all.iter().map(|layer| of(layer)).collect::<Vec<_>>(), 1)
            };
            Ok(LayerKeyValues { keys: joined(|layer| &layer.keys)?, values: joined(|layer| &layer.values)? })
        };
        let layers = layers.iter().map(cat).collect::<candle_core::Result<Vec<_>>>();
        let layers = layers.map_err(|error| format!("the prompts do not fit each other: {error}"))?;
        let first = &parts[0];
        let version = Arc::new(Version {
            task: first.task.clone(),
            digest,
            peft_type: first.peft_type,
            prompt: Arc::new(LearnedPrompt::KeyValues(KeyValues { layers })),
            template: first.template.clone(),
            chat: first.chat.clone(),
            labels: first.labels.clone(),
            spec: first.spec.clone(),
            warnings: Vec::new(),
            fixed_beginning: OnceLock::new(),
            label_tokens: OnceLock::new(),
        });
        self.keep(Arc::clone(&version));
        Ok(version)
    }

    fn find(&self, digest: Digest) -> Option<Arc<Version>> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|version| version.digest == digest)?;
        let found = kept.remove(at);
        kept.push(Arc::clone(&found));
        Some(found)
    }

    fn keep(&self, version: Arc<Version>) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push(version);
        if kept.len() > KEPT {
            kept.remove(0);
        }
    }
}
