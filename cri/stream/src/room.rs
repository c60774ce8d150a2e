//! Who may be here at once: connections whose request has not been granted yet, and sessions. They have room apart from each
//! other, so that whoever only connects (any process of the node can) keeps no session out.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Connections that have not shown a token: kubelet's show theirs within a moment.
const STRANGERS: usize = 256;
/// How long a session waits for another to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// The room there is.
#[derive(Debug)]
pub(crate) struct Room {
    /// The oldest first.
    strangers: Mutex<VecDeque<(u64, CancellationToken)>>,
    next: std::sync::atomic::AtomicU64,
    sessions: Semaphore,
    patience: Duration,
}

/// A connection that has not shown a token yet, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Stranger<'a> {
    room: &'a Room,
    number: u64,
    out: CancellationToken,
}

impl Room {
    pub fn new(sessions: usize) -> Room {
        Room {
            strangers: Mutex::default(),
            next: std::sync::atomic::AtomicU64::new(0),
            sessions: Semaphore::new(sessions.max(1)),
            patience: PATIENCE,
        }
    }

    /// Lets a connection in. Where there is no room, the one that has been here longest without a word goes.
    pub fn enter(&self) -> Stranger<'_> {
        let number = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let out = CancellationToken::new();
        let mut strangers = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        if strangers.len() >= STRANGERS
            && let Some((_, oldest)) = strangers.pop_front()
        {
            tracing::debug!("dropped the oldest of {STRANGERS} connections that asked for no stream");
            oldest.cancel();
        }
        strangers.push_back((number, out.clone()));
        Stranger {
            room: self,
            number,
            out,
        }
    }

    /// Room for a session, waited for a little; `None`: there is none.
    pub async fn session(&self) -> Option<SemaphorePermit<'_>> {
        timeout(self.patience, self.sessions.acquire()).await.ok()?.ok()
    }
}

impl Stranger<'_> {
    /// Resolves when its place is needed.
    pub async fn must_go(&self) {
        self.out.cancelled().await;
    }

    /// It has shown a token, and keeps its place no longer, nor loses it.
    pub fn is_known(&self) {
        let mut strangers = self.room.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        strangers.retain(|(number, _)| *number != self.number);
    }
}

impl Drop for Stranger<'_> {
    fn drop(&mut self) {
        self.is_known();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_stranger_goes_and_whoever_is_known_stays() {
        let room = Room::new(1);
        let known = room.enter();
        let mut strangers: VecDeque<_> = (1..STRANGERS).map(|_| room.enter()).collect();
        known.is_known();
        strangers.push_back(room.enter());
        assert!(
            strangers.iter().all(|s| !s.out.is_cancelled()),
            "there is room for all"
        );
        strangers.push_back(room.enter());
        assert!(!known.out.is_cancelled());
        strangers.pop_front().unwrap().must_go().await;
        assert!(
            strangers.iter().all(|s| !s.out.is_cancelled()),
            "only one has to go"
        );
        strangers.pop_front();
        strangers.push_back(room.enter());
        assert!(
            strangers.iter().all(|s| !s.out.is_cancelled()),
            "who left has left room"
        );
        drop(strangers);
        assert!(room.strangers.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_session_waits_a_little_for_another_to_end() {
        let mut room = Room::new(1);
        room.patience = Duration::from_millis(50);
        let first = room.session().await.unwrap();
        assert!(room.session().await.is_none());
        drop(first);
        room.patience = Duration::from_secs(60);
        let first = room.session().await.unwrap();
        let (second, ()) = tokio::join!(room.session(), async { drop(first) });
        assert!(second.is_some());
    }
}
