//! The streams of one connection: their buffers, which halves are open, and who waits for what.

use std::collections::{HashMap, VecDeque};
use std::task::Waker;

use bytes::{Buf, BytesMut};

use super::{Headers, MAX_STREAMS, STREAM_BUFFER, TOTAL_BUFFER};

/// A stream's number in its framing.
pub(crate) type StreamId = u32;

/// One direction of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Half {
    Open,
    Finished,
    Reset,
}

/// Flow control's account of a stream, for framings that have it: what may still be sent each way, and what the peer is
/// owed for data that was read.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Window {
    pub send: i64,
    pub receive: i64,
    pub owed: i64,
}

#[derive(Debug)]
pub(super) struct Stream {
    pub inbound: BytesMut,
    pub receiving: Half,
    pub sending: Half,
    pub reader: Option<Waker>,
    pub writer: Option<Waker>,
    /// In `Table::queue`.
    pub queued: bool,
    pub input_dropped: bool,
    pub output_dropped: bool,
    pub window: Window,
}

/// All streams of one connection.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(super) streams: HashMap<StreamId, Stream>,
    /// Framed bytes that wait to be written.
    pub out: BytesMut,
    /// Streams the peer opened that nobody has accepted yet.
    pub(super) opened: VecDeque<(StreamId, Headers)>,
    /// The writers that wait for room in `out`, in order.
    pub(super) queue: VecDeque<StreamId>,
    /// What all `inbound` buffers hold.
    buffered: usize,
    /// Reading has stopped until some stream is read.
    pub(super) blocked: bool,
    /// The connection is over: nothing more arrives, nothing more goes out.
    pub(super) ended: bool,
    /// The session is done: say goodbye once everything is written.
    pub(super) closing: bool,
    pub(super) driver: Option<Waker>,
    pub(super) acceptor: Option<Waker>,
}

impl Table {
    /// Adds a stream the peer has opened and lets the session see it; false when there are too many.
    pub fn open(&mut self, id: StreamId, headers: Headers, window: Window) -> bool {
        if self.opened.len() >= MAX_STREAMS || !self.insert(id, window) {
            return false;
        }
        self.opened.push_back((id, headers));
        wake(&mut self.acceptor);
        true
    }

    /// Adds a stream; false when there are too many.
    pub fn insert(&mut self, id: StreamId, window: Window) -> bool {
        if self.streams.len() >= MAX_STREAMS {
            return false;
        }
        let stream = Stream {
            inbound: BytesMut::new(),
            receiving: Half::Open,
            sending: Half::Open,
            reader: None,
            writer: None,
            queued: false,
            input_dropped: false,
            output_dropped: false,
            window,
        };
        self.streams.insert(id, stream);
        true
    }

    /// Whether the peer may still send on this stream; `None` when there is no such stream.
    pub fn is_receiving(&self, id: StreamId) -> Option<bool> {
        self.streams.get(&id).map(|stream| stream.receiving == Half::Open)
    }

    /// Whether this stream has been reset by either side.
    pub fn is_reset(&self, id: StreamId) -> bool {
        self.streams
            .get(&id)
            .is_some_and(|stream| stream.sending == Half::Reset)
    }

    /// The streams that are not over both ways.
    pub fn live(&self) -> Vec<StreamId> {
        let open = |stream: &Stream| stream.receiving == Half::Open || stream.sending == Half::Open;
        let live = self.streams.iter().filter(|(_, stream)| open(stream));
        live.map(|(id, _)| *id).collect()
    }

    /// Whether there is something for the peer that waits for room or for its window.
    pub(super) fn owes(&self) -> bool {
        let waits = |stream: &Stream| stream.writer.is_some() && stream.sending == Half::Open;
        self.streams.values().any(waits)
    }

    pub fn window(&mut self, id: StreamId) -> Option<&mut Window> {
        self.streams.get_mut(&id).map(|stream| &mut stream.window)
    }

    pub fn windows(&mut self) -> impl Iterator<Item = &mut Window> {
        self.streams.values_mut().map(|stream| &mut stream.window)
    }

    /// How much of what arrives for this stream can be taken now. What nobody will read is taken without end.
    pub fn room(&self, id: StreamId) -> usize {
        match self.streams.get(&id) {
            Some(stream) if !stream.input_dropped && stream.receiving == Half::Open => STREAM_BUFFER
                .saturating_sub(stream.inbound.len())
                .min(TOTAL_BUFFER.saturating_sub(self.buffered)),
            _ => usize::MAX,
        }
    }

    /// Stops the reading of the connection until a stream has been read from.
    pub fn block(&mut self) {
        self.blocked = true;
    }

    /// Gives data to a stream, at most as much as it has [`room`](Self::room) for; false when nobody will read it.
    pub fn deliver(&mut self, id: StreamId, data: &[u8]) -> bool {
        let Some(stream) = self.streams.get_mut(&id) else {
            return false;
        };
        if stream.input_dropped || stream.receiving != Half::Open {
            return false;
        }
        stream.inbound.extend_from_slice(data);
        self.buffered += data.len();
        wake(&mut stream.reader);
        true
    }

    /// Nothing more arrives on this stream.
    pub fn finish_receiving(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id) {
            if stream.receiving == Half::Open {
                stream.receiving = Half::Finished;
            }
            wake(&mut stream.reader);
            self.remove_if_done(id);
        }
    }

    /// Nothing more may be sent on this stream.
    pub fn finish_sending(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id) {
            if stream.sending == Half::Open {
                stream.sending = Half::Finished;
            }
            wake(&mut stream.writer);
            self.remove_if_done(id);
        }
    }

    /// The stream is over both ways; what had arrived can still be read.
    pub fn reset(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id) {
            if stream.receiving == Half::Open {
                stream.receiving = Half::Reset;
            }
            stream.sending = Half::Reset;
            wake(&mut stream.reader);
            wake(&mut stream.writer);
            self.remove_if_done(id);
        }
    }

    /// Lets everyone who waits for a window look again.
    pub fn wake_writers(&mut self) {
        for stream in self.streams.values_mut() {
            wake(&mut stream.writer);
        }
    }

    /// Hands over up to `limit` bytes that arrived on this stream, and says how many.
    pub fn take(&mut self, id: StreamId, limit: usize, mut into: impl FnMut(&[u8])) -> usize {
        let Some(stream) = self.streams.get_mut(&id) else {
            return 0;
        };
        let count = stream.inbound.len().min(limit);
        if count > 0 {
            into(&stream.inbound[..count]);
            stream.inbound.advance(count);
            self.buffered -= count;
            self.unblock();
        }
        count
    }

    /// Forgets what arrived on this stream and nobody will read; says how much that was.
    pub(super) fn discard(&mut self, id: StreamId) -> usize {
        let Some(stream) = self.streams.get_mut(&id) else {
            return 0;
        };
        let count = stream.inbound.len();
        stream.inbound = BytesMut::new();
        self.buffered -= count;
        self.unblock();
        count
    }

    /// Reading may go on.
    fn unblock(&mut self) {
        if std::mem::take(&mut self.blocked) {
            wake(&mut self.driver);
        }
    }

    pub(super) fn remove_if_done(&mut self, id: StreamId) {
        let done = self.streams.get(&id).is_some_and(|stream| {
            let closed = stream.receiving != Half::Open && stream.sending != Half::Open;
            stream.input_dropped && stream.output_dropped && (closed || self.ended)
        });
        if done {
            self.discard(id);
            self.streams.remove(&id);
        }
    }

    pub(super) fn wake_driver(&mut self) {
        wake(&mut self.driver);
    }

    /// There is room in `out` again.
    pub(super) fn wake_queue(&mut self) {
        while let Some(id) = self.queue.pop_front() {
            if let Some(stream) = self.streams.get_mut(&id) {
                stream.queued = false;
                wake(&mut stream.writer);
            }
        }
    }

    /// The connection is over: everyone who waits for it learns so.
    pub(super) fn end(&mut self) {
        self.ended = true;
        for stream in self.streams.values_mut() {
            wake(&mut stream.reader);
            wake(&mut stream.writer);
        }
        wake(&mut self.acceptor);
    }

    /// Gives back the memory of buffers that are empty.
    pub(super) fn shrink(&mut self) {
        if self.out.is_empty() {
            self.out = BytesMut::new();
        }
        for stream in self
            .streams
            .values_mut()
            .filter(|stream| stream.inbound.is_empty())
        {
            stream.inbound = BytesMut::new();
        }
    }

    /// What the streams hold, for tests of the bounds.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn buffered(&self) -> usize {
        assert_eq!(
            self.buffered,
            self.streams
                .values()
                .map(|stream| stream.inbound.len())
                .sum::<usize>()
        );
        self.buffered
    }

    /// The streams that were opened and not accepted.
    #[cfg(test)]
    pub fn opened(&self) -> impl Iterator<Item = (StreamId, &Headers)> {
        self.opened.iter().map(|(id, headers)| (*id, headers))
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// The next stream that was opened, which is accepted or not by whoever asks.
    #[cfg(feature = "fuzzing")]
    pub fn next_opened(&mut self) -> Option<StreamId> {
        self.opened.pop_front().map(|(id, _)| id)
    }

    /// Every stream, in order.
    #[cfg(feature = "fuzzing")]
    pub fn ids(&self) -> Vec<StreamId> {
        let mut ids: Vec<_> = self.streams.keys().copied().collect();
        ids.sort_unstable();
        ids
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}
