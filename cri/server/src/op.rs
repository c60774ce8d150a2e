//! One mutating verb at a time on each pod and each container: who has the turn, since when, and what a second caller is
//! told. It knows no verb's meaning.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// How long an idempotent verb waits for its turn: the kubelet's own patience.
const PATIENCE: Duration = Duration::from_secs(120);

/// Somebody else has the turn.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{verb} of it is in progress since {:.1} s", since.as_secs_f32())]
pub struct Busy {
    pub verb: &'static str,
    pub since: Duration,
}

/// The turn on one object.
#[derive(Debug, Default)]
pub struct Turn {
    lock: Arc<AsyncMutex<()>>,
    holder: Arc<Mutex<Option<(&'static str, Instant)>>>,
}

/// Having the turn, until dropped.
#[derive(Debug)]
pub struct Held {
    holder: Arc<Mutex<Option<(&'static str, Instant)>>>,
    _guard: OwnedMutexGuard<()>,
}

impl Turn {
    /// For verbs that must not happen twice: refused at once while another is in progress.
    pub fn try_begin(&self, verb: &'static str) -> Result<Held, Busy> {
        match self.lock.clone().try_lock_owned() {
            Ok(guard) => Ok(self.hold(verb, guard)),
            Err(_) => Err(self.busy()),
        }
    }

    /// For idempotent verbs: waits for its turn; what the other one did is then found done.
    pub async fn begin(&self, verb: &'static str) -> Result<Held, Busy> {
        match tokio::time::timeout(PATIENCE, self.lock.clone().lock_owned()).await {
            Ok(guard) => Ok(self.hold(verb, guard)),
            Err(_) => Err(self.busy()),
        }
    }

    fn hold(&self, verb: &'static str, guard: OwnedMutexGuard<()>) -> Held {
        *self.holder.lock().unwrap_or_else(PoisonError::into_inner) = Some((verb, Instant::now()));
        Held {
            holder: self.holder.clone(),
            _guard: guard,
        }
    }

    fn busy(&self) -> Busy {
        match *self.holder.lock().unwrap_or_else(PoisonError::into_inner) {
            Some((verb, since)) => Busy {
                verb,
                since: since.elapsed(),
            },
            // Between the holder's note being wiped and its lock being let go.
            None => Busy {
                verb: "an operation",
                since: Duration::ZERO,
            },
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        *self.holder.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_second_verb_is_told_which_one_is_in_progress() {
        let turn = Turn::default();
        let held = turn.try_begin("StartContainer").unwrap();
        let busy = turn.try_begin("StartContainer").unwrap_err();
        assert!(
            busy.to_string()
                .starts_with("StartContainer of it is in progress"),
            "{busy}"
        );
        drop(held);
        turn.try_begin("RemoveContainer").unwrap();
    }

    #[tokio::test]
    async fn an_idempotent_verb_waits_for_its_turn() {
        let turn = Arc::new(Turn::default());
        let held = turn.try_begin("StartContainer").unwrap();
        let waiter = tokio::spawn({
            let turn = turn.clone();
            async move { turn.begin("RemoveContainer").await.is_ok() }
        });
        tokio::task::yield_now().await;
        drop(held);
        assert!(waiter.await.unwrap());
    }
}
