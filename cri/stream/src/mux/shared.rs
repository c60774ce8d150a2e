//! What the driver, the session and the streams' ends share, and the session's view of it.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio_util::sync::CancellationToken;

use super::table::Half;
use super::{Framing, Hangup, Headers, Input, Output, Refusal, StreamId, Table, Window};

pub(super) struct State {
    pub framing: Box<dyn Framing>,
    pub table: Table,
}

pub(super) struct Shared {
    state: Mutex<State>,
    pub hangup: CancellationToken,
}

impl Shared {
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream the peer has opened.
#[derive(Debug)]
pub(crate) struct Opened {
    pub id: StreamId,
    pub headers: Headers,
}

/// The session's handle on its connection.
#[derive(Clone)]
pub(crate) struct Mux {
    pub(super) shared: Arc<Shared>,
}

impl Mux {
    pub fn new(mut framing: Box<dyn Framing>) -> Mux {
        let mut table = Table::default();
        framing.greet(&mut table);
        let state = Mutex::new(State { framing, table });
        Mux {
            shared: Arc::new(Shared {
                state,
                hangup: CancellationToken::new(),
            }),
        }
    }

    /// The next stream the peer opens; `None` once the connection is over.
    pub async fn next(&self) -> Option<Opened> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&self, cx: &mut Context<'_>) -> Poll<Option<Opened>> {
        let table = &mut self.shared.lock().table;
        if let Some((id, headers)) = table.opened.pop_front() {
            return Poll::Ready(Some(Opened { id, headers }));
        }
        if table.ended {
            return Poll::Ready(None);
        }
        register(&mut table.acceptor, cx);
        Poll::Pending
    }

    /// The ends of a stream that [`next`](Self::next) gave, once.
    pub fn accept(&self, id: StreamId) -> (Input, Output) {
        let state = &mut *self.shared.lock();
        if state
            .table
            .streams
            .get(&id)
            .is_some_and(|stream| stream.sending == Half::Open)
        {
            state.framing.accept(id, &mut state.table);
            state.table.wake_driver();
        }
        self.ends(id)
    }

    /// The ends of a stream that exists by agreement, without being opened.
    pub fn agreed(&self, id: StreamId) -> (Input, Output) {
        self.shared.lock().table.insert(id, Window::default());
        self.ends(id)
    }

    fn ends(&self, id: StreamId) -> (Input, Output) {
        (
            Input::new(self.shared.clone(), id),
            Output::new(self.shared.clone(), id),
        )
    }

    /// Turns away a stream that [`next`](Self::next) gave.
    pub fn refuse(&self, id: StreamId, why: Refusal) {
        let (_input, _output) = self.ends(id);
        self.reset(id, why);
    }

    /// Ends a stream both ways, unless both have ended.
    pub fn reset(&self, id: StreamId, why: Refusal) {
        let state = &mut *self.shared.lock();
        let open = state
            .table
            .streams
            .get(&id)
            .is_some_and(|stream| stream.receiving == Half::Open || stream.sending == Half::Open);
        if open && !state.table.ended {
            state.framing.reset(id, why, &mut state.table);
            state.table.wake_driver();
        }
        state.table.reset(id);
    }

    /// Says goodbye once everything is written; the driver then ends.
    pub fn close(&self) {
        let table = &mut self.shared.lock().table;
        table.closing = true;
        table.wake_driver();
    }

    pub fn hangup(&self) -> Hangup {
        Hangup(self.shared.hangup.clone())
    }
}

/// Keeps the task's waker in `slot`.
pub(super) fn register(slot: &mut Option<Waker>, cx: &Context<'_>) {
    match slot {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *slot = Some(cx.waker().clone()),
    }
}
