//! Pulls of the same thing at the same time are one.
//!
//! A flight is a task of its own; those who wait for it hold it. It is cancelled when the last of them lets go, and
//! never by one of several. Refuses to know what a pull does.

use super::board::Board;
use super::error::PullError;
use crate::image::Image;
use crate::platform::Platform;
use crate::progress::Progress;
use crate::reference::Reference;
use crate::registry::{Credentials, LocalBuilds};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

/// What makes two pulls the same: somebody with other credentials may get another answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub reference: Reference,
    pub platform: Platform,
    pub credentials: Option<Credentials>,
    pub local_builds: LocalBuilds,
}

type Outcome = Option<Result<Image, PullError>>;

/// The flights that are in the air.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    current: Mutex<HashMap<Key, Weak<Flight>>>,
}

/// One pull, held by those who wait for it.
#[derive(Debug)]
pub(crate) struct Flight {
    board: Arc<Board>,
    outcome: watch::Receiver<Outcome>,
    _stop: DropGuard,
}

impl Flights {
    /// The flight for a key, started with `start` when there is none.
    pub fn join<F>(
        self: &Arc<Flights>,
        key: &Key,
        start: impl FnOnce(Arc<Board>, CancellationToken) -> F,
    ) -> Arc<Flight>
    where
        F: Future<Output = Result<Image, PullError>> + Send + 'static,
    {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = current.get(key).and_then(Weak::upgrade)
            && !flight.is_over()
        {
            return flight;
        }
        current.retain(|_, flight| flight.strong_count() > 0);
        let board = Arc::new(Board::new());
        let stop = CancellationToken::new();
        let (told, outcome) = watch::channel(None);
        let flight = Arc::new(Flight {
            board: Arc::clone(&board),
            outcome,
            _stop: stop.clone().drop_guard(),
        });
        current.insert(key.clone(), Arc::downgrade(&flight));
        let work = start(board, stop);
        tokio::spawn(async move {
            let result = work.await;
            told.send_replace(Some(result));
        });
        flight
    }
}

impl Flight {
    fn is_over(&self) -> bool {
        self.outcome.borrow().is_some() || self.outcome.has_changed().is_err()
    }

    /// Waits for the end, passing on what is told.
    pub async fn land(&self, reference: &Reference, progress: &dyn Progress) -> Result<Image, PullError> {
        let cancelled = || {
            Err(PullError::Cancelled {
                reference: reference.to_string(),
            })
        };
        let (told, mut news) = self.board.listen();
        told.into_iter().for_each(|event| progress.event(event));
        let mut outcome = self.outcome.clone();
        let result = loop {
            tokio::select! {
                biased;
                event = news.recv() => match event {
                    Ok(event) => progress.event(event),
                    Err(RecvError::Lagged(_)) => {}
                    // The board is ours: it outlives this call.
                    Err(RecvError::Closed) => return cancelled(),
                },
                over = outcome.wait_for(Option::is_some) => {
                    break match over {
                        Ok(result) => result.clone().unwrap_or_else(cancelled),
                        Err(_) => cancelled(),
                    };
                }
            }
        };
        loop {
            match news.try_recv() {
                Ok(event) => progress.event(event),
                Err(TryRecvError::Lagged(_)) => {}
                Err(_) => return result,
            }
        }
    }
}
