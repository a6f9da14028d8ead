//! One answer's place in its grammar. The mask for the next token is computed beside the forward pass that leads to it.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, sync_channel},
    },
};

use llguidance::{Matcher, toktrie::SimpleVob};

use crate::{
    engine::sampling::mask::{MaskError, TokenConstraint, TokenMask},
    prompt::grammar::GrammarError,
};

/// A grammar at its beginning.
pub(super) struct Compiled {
    /// Clones share what they have learned about the grammar's words.
    matcher: Mutex<Matcher>,
    first: Arc<SimpleVob>,
}

impl Compiled {
    /// # Errors
    /// No token can begin an answer.
    pub(super) fn new(mut matcher: Matcher) -> Result<Self, GrammarError> {
        let first = matcher.compute_mask_or_eos().map_err(|error| GrammarError(error.to_string()))?;
        if first.is_zero() {
            return Err(GrammarError("no token of the model's vocabulary can begin an answer".to_owned()));
        }
        Ok(Self { matcher: Mutex::new(matcher), first: Arc::new(first) })
    }
}

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiled").finish_non_exhaustive()
    }
}

impl TokenConstraint for Compiled {
    fn start(&self) -> Box<dyn TokenMask> {
        let matcher = Box::new(self.matcher.lock().unwrap_or_else(PoisonError::into_inner).clone());
        Box::new(Mask { state: State::Known(matcher, Ok(Arc::clone(&self.first))), is_complete: false })
    }
}

type Allowed = Result<Arc<SimpleVob>, MaskError>;

enum State {
    Known(Box<Matcher>, Allowed),
    /// Another thread computes it.
    Coming(Receiver<(Box<Matcher>, Allowed)>),
    Failed(MaskError),
}

struct Mask {
    state: State,
    is_complete: bool,
}

impl Mask {
    /// Waits for the mask if it is still being computed.
    fn arrive(&mut self) {
        if let State::Coming(coming) = &self.state {
            self.state = match coming.recv() {
                Ok((matcher, allowed)) => State::Known(matcher, allowed),
                Err(_) => State::Failed(MaskError("the grammar's mask could not be computed".to_owned())),
            };
        }
    }
}

impl TokenMask for Mask {
    fn apply(&mut self, logits: &mut [f32]) -> Result<(), MaskError> {
        self.arrive();
        match &self.state {
            State::Known(_, Ok(allowed)) => forbid(logits, allowed.as_slice()),
            State::Known(_, Err(error)) | State::Failed(error) => return Err(error.clone()),
            State::Coming(_) => {}
        }
        Ok(())
    }

    fn accept(&mut self, id: u32) {
        self.arrive();
        let failed = State::Failed(MaskError("the grammar has no next token".to_owned()));
        let State::Known(mut matcher, _) = std::mem::replace(&mut self.state, failed) else { return };
        if let Err(error) = matcher.consume_token(id) {
            self.state = State::Failed(MaskError(error.to_string()));
            return;
        }
        self.is_complete = matcher.is_stopped();
        if self.is_complete {
            return;
        }
        let (send, coming) = sync_channel(1);
        rayon::spawn(move || {
            let allowed = matcher.compute_mask_or_eos().map(Arc::new).map_err(|error| MaskError(error.to_string()));
            // Nobody waits for the mask of an answer that has ended.
            let _ = send.send((matcher, allowed));
        });
        self.state = State::Coming(coming);
    }

    fn is_complete(&self) -> bool {
        self.is_complete
    }
}

/// Sets the logits to negative infinity whose bit is not set: bit i % 32 of word i / 32.
fn forbid(logits: &mut [f32], allowed: &[u32]) {
    for (i, logits) in logits.chunks_mut(32).enumerate() {
        let bits = allowed.get(i).copied().unwrap_or(0);
        if bits == 0 {
            logits.fill(f32::NEG_INFINITY);
        } else if bits != u32::MAX {
            for (bit, logit) in logits.iter_mut().enumerate() {
                if bits >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}
