//! Many byte streams over one connection, whatever the framing.
//!
//! ```text
//!   Input ◀─ inbound (256 KiB a stream) ◀─┐                 ┌─ receive ◀─ input ◀── socket
//!                                         ├─ Table ⇄ Framing │
//!   Output ─▶ out (256 KiB) ──────────────┘                 └─ collect ─▶ writing ─▶ socket
//! ```
//!
//! A [`Framing`] turns bytes into calls on the [`Table`] and calls into bytes; it does no I/O, so that it can be tested
//! with bytes alone. The [`Driver`] does the I/O. [`Input`] and [`Output`] are the ends of the streams. All three meet
//! under one lock, held for a copy at most.
//!
//! Bounds: a stream whose buffer is full stops the reading of the connection (a peer that keeps windows never gets there);
//! output waits when `out` is full; answers to control frames go past that limit, but when they have doubled it, nothing
//! more is read.

mod driver;
mod handle;
mod headers;
mod shared;
mod table;

use bytes::BytesMut;

pub(crate) use driver::{Driver, Ended, Limits};
pub use handle::{Hangup, Input, Output};
pub(crate) use headers::Headers;
pub(crate) use shared::{Mux, Opened};
pub(crate) use table::{StreamId, Table, Window};

use crate::violation::Violation;

/// What one stream holds of what arrived and was not read yet.
pub(crate) const STREAM_BUFFER: usize = 256 << 10;
/// What all streams of a connection hold together.
pub(crate) const TOTAL_BUFFER: usize = 4 << 20;
/// What waits to be written to the connection.
pub(crate) const OUT_BUFFER: usize = 256 << 10;
/// How many streams a connection has at once.
pub(crate) const MAX_STREAMS: usize = 512;

/// What became of the bytes given to [`Framing::receive`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// All that could be taken was taken.
    Taken,
    /// The peer has said goodbye: nothing follows.
    Goodbye,
}

/// Why the server turns a stream away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The stream's headers make no sense here.
    Invalid,
    /// There are too many already.
    Refused,
    /// What it was opened for is over.
    Cancelled,
}

/// The protocol spoken on a connection, as a state machine without I/O.
pub(crate) trait Framing: Send {
    /// Called once, before anything else.
    fn greet(&mut self, _table: &mut Table) {}

    /// Takes what it can from the front of `input`; what it leaves is the beginning of something, or for a stream that is
    /// full ([`Table::block`]).
    ///
    /// # Errors
    /// The peer broke the protocol. The answer the protocol has for this is in `table.out` already.
    fn receive(&mut self, input: &mut BytesMut, table: &mut Table) -> Result<Received, Violation>;

    /// Tells the peer that the stream it opened is accepted.
    fn accept(&mut self, _id: StreamId, _table: &mut Table) {}

    /// Puts data of a stream into `table.out` and says how much; 0 when the peer's window is shut.
    fn send(&mut self, id: StreamId, data: &[u8], table: &mut Table) -> usize;

    /// Tells the peer that nothing more follows on a stream.
    fn finish(&mut self, _id: StreamId, _table: &mut Table) {}

    /// Tells the peer that a stream is over both ways.
    fn reset(&mut self, _id: StreamId, _why: Refusal, _table: &mut Table) {}

    /// Data of a stream has left its buffer: the peer may send that much more.
    fn consumed(&mut self, _id: StreamId, _bytes: usize, _table: &mut Table) {}

    /// Tells the peer that the connection ends here.
    fn goodbye(&mut self, table: &mut Table);

    /// The same, for what the peer does: it takes nothing of what it is sent.
    fn expel(&mut self, table: &mut Table) {
        self.goodbye(table);
    }

    /// Moves what is to be written into `writing`, which is empty.
    fn collect(&mut self, table: &mut Table, writing: &mut BytesMut) {
        std::mem::swap(&mut table.out, writing);
    }
}

#[cfg(test)]
mod tests;
