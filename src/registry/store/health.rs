//! Whether a store answers, and since when it does not.

use std::{
    io,
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

/// A store that does not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Away {
    pub since: SystemTime,
    /// The last error.
    pub reason: String,
}

/// What the last calls of a store came to.
#[derive(Debug, Default)]
pub struct Health(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    away: Option<Away>,
    failures: u64,
}

impl Health {
    /// Since when the store has not answered; `None` if it does.
    pub fn away(&self) -> Option<Away> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).away.clone()
    }

    /// Calls that failed because the store did not answer.
    pub fn failures(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).failures
    }

    /// Notes what a call came to. Logs when the store goes away and when it is back.
    pub fn note<T>(&self, store: &dyn std::fmt::Display, outcome: io::Result<T>) -> io::Result<T> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &outcome {
            Err(error) => {
                state.failures += 1;
                let reason = error.to_string();
                match &mut state.away {
                    Some(away) => away.reason = reason,
                    None => {
                        tracing::warn!(%store, %error, "the prompt store does not answer; what is in memory is served on");
                        state.away = Some(Away { since: SystemTime::now(), reason });
                    }
                }
            }
            Ok(_) => {
                if let Some(away) = state.away.take() {
                    let seconds = away.since.elapsed().map_or(0, |time| time.as_secs());
                    tracing::info!(%store, away_seconds = seconds, "the prompt store answers again");
                }
            }
        }
        drop(state);
        outcome
    }
}
