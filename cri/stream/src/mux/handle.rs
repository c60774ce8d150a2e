//! The ends of a stream, for whoever is on this side of the connection.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::CancellationToken;

use super::shared::{Shared, State, register};
use super::table::Half;
use super::{OUT_BUFFER, StreamId};

/// What a client sends on one stream.
///
/// Reading gives `Ok(0)` when the client has ended the stream, and an error (`ConnectionReset`, `ConnectionAborted`) when
/// the stream or the connection broke off; whatever had arrived before comes first. Dropping it discards what else
/// arrives.
pub struct Input {
    shared: Arc<Shared>,
    id: StreamId,
}

/// What a client gets on one stream.
///
/// Writing waits while the client does not keep up, and fails with `BrokenPipe` when the stream or the connection is over.
/// What was written is on its way: there is nothing to flush. Shutting it down or dropping it ends the stream for the
/// client.
pub struct Output {
    shared: Arc<Shared>,
    id: StreamId,
}

/// The end of a client's session, however it came about. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Hangup(pub(super) CancellationToken);

impl Hangup {
    /// Returns when the client has gone.
    pub async fn wait(&self) {
        self.0.cancelled().await;
    }

    /// Whether the client has gone.
    #[must_use]
    pub fn has_happened(&self) -> bool {
        self.0.is_cancelled()
    }
}

impl Input {
    pub(super) fn new(shared: Arc<Shared>, id: StreamId) -> Input {
        Input { shared, id }
    }
}

impl Output {
    pub(super) fn new(shared: Arc<Shared>, id: StreamId) -> Output {
        Output { shared, id }
    }
}

impl AsyncRead for Input {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let State { framing, table } = &mut *self.shared.lock();
        let taken = table.take(self.id, buf.remaining(), |data| buf.put_slice(data));
        if taken > 0 {
            framing.consumed(self.id, taken, table);
            if !table.out.is_empty() {
                table.wake_driver();
            }
            return Poll::Ready(Ok(()));
        }
        let ended = table.ended;
        let Some(stream) = table.streams.get_mut(&self.id) else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
        match stream.receiving {
            Half::Finished => Poll::Ready(Ok(())),
            Half::Reset => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            Half::Open if ended => Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into())),
            Half::Open => {
                register(&mut stream.reader, cx);
                Poll::Pending
            }
        }
    }
}

impl AsyncWrite for Output {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let State { framing, table } = &mut *self.shared.lock();
        let full = table.out.len() >= OUT_BUFFER;
        let ended = table.ended;
        let stream = match table.streams.get_mut(&self.id) {
            Some(stream) if stream.sending == Half::Open && !ended => stream,
            _ => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        };
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if full {
            register(&mut stream.writer, cx);
            if !std::mem::replace(&mut stream.queued, true) {
                table.queue.push_back(self.id);
            }
            return Poll::Pending;
        }
        let room = OUT_BUFFER - table.out.len();
        let sent = framing.send(self.id, &data[..data.len().min(room)], table);
        table.wake_driver();
        if sent > 0 {
            return Poll::Ready(Ok(sent));
        }
        if let Some(stream) = table.streams.get_mut(&self.id) {
            register(&mut stream.writer, cx);
        }
        Poll::Pending
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        finish(&mut self.shared.lock(), self.id);
        Poll::Ready(Ok(()))
    }
}

/// Ends the sending half of a stream, if it has not ended.
fn finish(State { framing, table }: &mut State, id: StreamId) {
    let open = table
        .streams
        .get(&id)
        .is_some_and(|stream| stream.sending == Half::Open);
    if open && !table.ended {
        framing.finish(id, table);
        table.wake_driver();
    }
    table.finish_sending(id);
}

impl Drop for Input {
    fn drop(&mut self) {
        let State { framing, table } = &mut *self.shared.lock();
        let unread = table.discard(self.id);
        if unread > 0 && !table.ended {
            framing.consumed(self.id, unread, table);
            table.wake_driver();
        }
        if let Some(stream) = table.streams.get_mut(&self.id) {
            stream.input_dropped = true;
            stream.reader = None;
        }
        table.remove_if_done(self.id);
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        finish(&mut state, self.id);
        if let Some(stream) = state.table.streams.get_mut(&self.id) {
            stream.output_dropped = true;
            stream.writer = None;
        }
        state.table.remove_if_done(self.id);
    }
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Input").field(&self.id).finish()
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Output").field(&self.id).finish()
    }
}
