//! `SPDY/3.1+portforward.k8s.io`: the bytes of a SPDY connection as binary messages, cut anywhere.

use bytes::{BufMut as _, BytesMut};

use super::frame::{self, CloseCode, Decoder, Event};
use crate::mux::{Framing, Received, Refusal, StreamId, Table};
use crate::spdy::Spdy;
use crate::violation::Violation;

/// What is unpacked ahead of SPDY, which takes all but a part of a control frame.
const UNPACKED: usize = 64 << 10;

/// The state of one connection.
pub(crate) struct Tunnel {
    spdy: Spdy,
    decoder: Decoder,
    unpacked: BytesMut,
    /// The last ping, if it was not answered; earlier ones need no answer (RFC 6455, 5.5.3).
    ping: Option<BytesMut>,
    closing: Option<CloseCode>,
    closed: bool,
}

impl Tunnel {
    pub fn new() -> Tunnel {
        Tunnel {
            spdy: Spdy::new(),
            decoder: Decoder::default(),
            unpacked: BytesMut::new(),
            ping: None,
            closing: None,
            closed: false,
        }
    }

    fn messages(&mut self, input: &mut BytesMut, table: &mut Table) -> Result<Received, Violation> {
        loop {
            self.spdy.receive(&mut self.unpacked, table)?;
            let limit = UNPACKED.saturating_sub(self.unpacked.len());
            match self.decoder.next(input, limit)? {
                Some(Event::Data { data, .. }) => self.unpacked.put_slice(&data),
                Some(Event::Ping(payload)) => self.ping = Some(payload),
                Some(Event::Close) => {
                    self.closing = Some(CloseCode::Normal);
                    return Ok(Received::Goodbye);
                }
                None => return Ok(Received::Taken),
            }
        }
    }
}

impl Framing for Tunnel {
    fn greet(&mut self, table: &mut Table) {
        self.spdy.greet(table);
    }

    fn receive(&mut self, input: &mut BytesMut, table: &mut Table) -> Result<Received, Violation> {
        self.messages(input, table)
            .inspect_err(|violation| self.closing = Some(CloseCode::from(*violation)))
    }

    fn accept(&mut self, id: StreamId, table: &mut Table) {
        self.spdy.accept(id, table);
    }

    fn send(&mut self, id: StreamId, data: &[u8], table: &mut Table) -> usize {
        self.spdy.send(id, data, table)
    }

    fn finish(&mut self, id: StreamId, table: &mut Table) {
        self.spdy.finish(id, table);
    }

    fn reset(&mut self, id: StreamId, why: Refusal, table: &mut Table) {
        self.spdy.reset(id, why, table);
    }

    fn consumed(&mut self, id: StreamId, bytes: usize, table: &mut Table) {
        self.spdy.consumed(id, bytes, table);
    }

    fn goodbye(&mut self, table: &mut Table) {
        self.spdy.goodbye(table);
        self.closing = Some(CloseCode::Normal);
    }

    fn expel(&mut self, table: &mut Table) {
        self.spdy.goodbye(table);
        self.closing = Some(CloseCode::PolicyViolation);
    }

    fn collect(&mut self, table: &mut Table, writing: &mut BytesMut) {
        if self.closed {
            table.out.clear();
            return;
        }
        if let Some(payload) = self.ping.take() {
            frame::put_pong(writing, &payload);
        }
        if !table.out.is_empty() {
            frame::put_head(writing, frame::BINARY, table.out.len());
            writing.put_slice(&table.out);
            table.out.clear();
        }
        if let Some(code) = self.closing {
            self.closed = true;
            frame::put_close(writing, code);
        }
    }
}

#[cfg(test)]
mod tests;
