//! What is known of a pull so far, for those who listen from the start and those who join later.

use crate::digest::Digest;
use crate::progress::ProgressEvent;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use tokio::sync::broadcast;

/// Events that a listener may be behind. Who is further behind misses running totals, which the next ones repeat.
const BACKLOG: usize = 1024;
/// Events that are no running totals: a handful, except for retries.
const MOST_HISTORY: usize = 64;

#[derive(Debug)]
pub(crate) struct Board {
    state: Mutex<State>,
    news: broadcast::Sender<ProgressEvent>,
}

#[derive(Debug, Default)]
struct State {
    history: Vec<ProgressEvent>,
    totals: BTreeMap<(Digest, Kind), ProgressEvent>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Downloaded,
    Unpacked,
}

impl Board {
    pub fn new() -> Board {
        Board {
            state: Mutex::default(),
            news: broadcast::channel(BACKLOG).0,
        }
    }

    /// Tells everybody; a running total that did not change is no news.
    pub fn post(&self, event: ProgressEvent) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let total = match &event {
            ProgressEvent::Downloaded { layer, .. } => Some((*layer, Kind::Downloaded)),
            ProgressEvent::Unpacked { layer, .. } => Some((*layer, Kind::Unpacked)),
            _ => None,
        };
        match total {
            Some(key) => {
                if state.totals.get(&key) == Some(&event) {
                    return;
                }
                state.totals.insert(key, event.clone());
            }
            None if matches!(event, ProgressEvent::Retrying { .. }) => {}
            None if state.history.len() < MOST_HISTORY => state.history.push(event.clone()),
            None => {}
        }
        // Nobody listening is fine.
        let _ = self.news.send(event);
    }

    /// What was told so far, and what will be.
    pub fn listen(&self) -> (Vec<ProgressEvent>, broadcast::Receiver<ProgressEvent>) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let told = state
            .history
            .iter()
            .chain(state.totals.values())
            .cloned()
            .collect();
        (told, self.news.subscribe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_joins_later_hears_what_the_others_heard() {
        let board = Board::new();
        let layer = Digest::of(b"l");
        let downloaded = |done| ProgressEvent::Downloaded {
            layer,
            done,
            total: 9,
        };
        board.post(ProgressEvent::Resolved {
            digest: layer,
            host: "h".into(),
        });
        board.post(downloaded(1));
        board.post(downloaded(5));
        let (told, mut news) = board.listen();
        assert_eq!(
            told,
            [
                ProgressEvent::Resolved {
                    digest: layer,
                    host: "h".into()
                },
                downloaded(5)
            ]
        );
        board.post(downloaded(5));
        board.post(ProgressEvent::Committing);
        assert_eq!(
            news.try_recv().unwrap(),
            ProgressEvent::Committing,
            "what did not change is no news"
        );
    }
}
