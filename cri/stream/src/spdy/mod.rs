//! SPDY/3.1 as the server of a connection speaks it, without I/O.
//!
//! **Windows.** The draft has flow control for each stream and for the connection; the one client library that Kubernetes
//! uses has none: it never sends WINDOW_UPDATE, and sends whatever it likes. So what we send is held to the windows until
//! the first of them is used up. If the client has shown by then that it keeps windows (a WINDOW_UPDATE, or SETTINGS), it
//! is held to them on; else it is asked with a PING. A client that answers that without having opened a window does not
//! keep any, nor does one that sends more than ours allow; then TCP alone holds us back. What a client sends beyond a window is an error only if it is known to keep
//! them; else the reading of the connection stops.
//!
//! What streams are for is the session's business.

mod dictionary;
mod frame;
mod headers;

use bytes::{Buf, BytesMut};

use self::frame::{HEAD, Head, Reset};
use self::headers::{Deflater, Inflater};
use crate::mux::{Framing, MAX_STREAMS, Received, Refusal, STREAM_BUFFER, StreamId, Table, Window};
use crate::violation::Violation;

/// A control frame that is longer ends the connection.
const MAX_CONTROL: usize = 16 << 10;
/// The longest data frame we send.
const MAX_DATA: usize = 64 << 10;
/// What the draft gives every window at first.
const INITIAL_WINDOW: i64 = 64 << 10;
/// What a client may send on a connection before its streams are read.
const SESSION_WINDOW: i64 = 1 << 20;
const STREAM_WINDOW: i64 = STREAM_BUFFER as i64;
const MAX_WINDOW: i64 = 0x7fff_ffff;
/// The one PING we send; the server's are even.
const PROBE: u32 = 2;

/// What is known of the client's flow control.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PeerWindows {
    Unknown,
    /// Asked with a PING.
    Probing,
    Kept,
    Ignored,
}

/// Where in the bytes from the client we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    Head,
    Data {
        stream: StreamId,
        left: usize,
        fin: bool,
    },
    /// A control frame of a type we do not know, which is to be ignored.
    Skip {
        left: usize,
    },
}

/// The state of one connection.
pub(crate) struct Spdy {
    reading: Reading,
    inflater: Inflater,
    deflater: Deflater,
    last_stream: StreamId,
    peer_windows: PeerWindows,
    /// The client opens no more streams.
    going_away: bool,
    /// What a new stream may send us nothing of, and we it this much.
    initial_send: i64,
    session: Window,
}

impl Spdy {
    pub fn new() -> Spdy {
        Spdy {
            reading: Reading::Head,
            inflater: Inflater::new(),
            deflater: Deflater::new(),
            last_stream: 0,
            peer_windows: PeerWindows::Unknown,
            going_away: false,
            initial_send: INITIAL_WINDOW,
            session: Window {
                send: INITIAL_WINDOW,
                receive: SESSION_WINDOW,
                owed: 0,
            },
        }
    }

    fn frames(&mut self, input: &mut BytesMut, table: &mut Table) -> Result<(), Violation> {
        loop {
            match self.reading {
                Reading::Head => {
                    if !self.head(input, table)? {
                        return Ok(());
                    }
                }
                Reading::Data { stream, left, fin } => {
                    let room = table.room(stream);
                    if room == 0 && left > 0 {
                        self.overran(table);
                        table.block();
                        return Ok(());
                    }
                    let count = left.min(input.len()).min(room);
                    self.data(stream, &input[..count], table)?;
                    input.advance(count);
                    let left = left - count;
                    if left > 0 {
                        self.reading = Reading::Data { stream, left, fin };
                        if input.is_empty() {
                            return Ok(());
                        }
                    } else {
                        self.reading = Reading::Head;
                        if fin {
                            table.finish_receiving(stream);
                        }
                    }
                }
                Reading::Skip { left } => {
                    let count = left.min(input.len());
                    input.advance(count);
                    if left > count {
                        self.reading = Reading::Skip { left: left - count };
                        return Ok(());
                    }
                    self.reading = Reading::Head;
                }
            }
        }
    }

    /// A client has sent more than its windows were opened for, which is how it shows that it keeps none. Its answer to
    /// the PING may be behind data that is not read before what reads it has written something itself.
    fn overran(&mut self, table: &mut Table) {
        if self.peer_windows != PeerWindows::Kept {
            self.peer_windows = PeerWindows::Ignored;
            table.wake_writers();
        }
    }

    /// Takes the head of a frame, and all of it if it is a control frame; false when there is not enough yet.
    fn head(&mut self, input: &mut BytesMut, table: &mut Table) -> Result<bool, Violation> {
        let Some(head) = input.first_chunk::<HEAD>() else {
            return Ok(false);
        };
        match Head::parse(*head) {
            Head::Data {
                stream,
                flags,
                length,
            } => {
                input.advance(HEAD);
                self.data_head(stream, table)?;
                self.reading = Reading::Data {
                    stream,
                    left: length,
                    fin: flags & frame::FLAG_FIN != 0,
                };
            }
            Head::Control {
                version,
                kind,
                flags,
                length,
            } => {
                if version != frame::VERSION {
                    return Err(Violation::SpdyVersion(version));
                }
                if !known(kind) {
                    input.advance(HEAD);
                    self.reading = Reading::Skip { left: length };
                    return Ok(true);
                }
                if length > MAX_CONTROL {
                    return Err(Violation::SpdyFrameSize { kind, length });
                }
                if input.len() < HEAD + length {
                    return Ok(false);
                }
                let payload = input.split_to(HEAD + length).freeze();
                self.control(kind, flags, &payload[HEAD..], table)?;
            }
        }
        Ok(true)
    }

    fn control(&mut self, kind: u16, flags: u8, payload: &[u8], table: &mut Table) -> Result<(), Violation> {
        let size = Violation::SpdyFrameSize {
            kind,
            length: payload.len(),
        };
        let fin = flags & frame::FLAG_FIN != 0;
        match kind {
            frame::SYN_STREAM => {
                let (fixed, block) = payload.split_first_chunk::<10>().ok_or(size)?;
                let unidirectional = flags & frame::FLAG_UNIDIRECTIONAL != 0;
                self.syn_stream(number(fixed), fin, unidirectional, block, table)
            }
            frame::HEADERS | frame::SYN_REPLY => {
                let (stream, block) = payload.split_first_chunk::<4>().ok_or(size)?;
                let stream = number(stream);
                self.inflater.inflate(block)?;
                if kind == frame::SYN_REPLY || self.never_opened(stream) {
                    frame::put_reset(&mut table.out, stream, Reset::InvalidStream);
                } else if fin {
                    table.finish_receiving(stream);
                }
                Ok(())
            }
            frame::RST_STREAM => {
                let (stream, _status) = pair(payload).ok_or(size)?;
                table.reset(stream);
                Ok(())
            }
            frame::SETTINGS => self.settings(payload, table).ok_or(size)?,
            frame::PING => {
                let id: &[u8; 4] = payload.try_into().map_err(|_| size)?;
                self.ping(number(id), table);
                Ok(())
            }
            frame::GOAWAY => {
                pair(payload).ok_or(size)?;
                self.going_away = true;
                Ok(())
            }
            _ => {
                let (stream, delta) = pair(payload).ok_or(size)?;
                self.window_update(stream, i64::from(delta & 0x7fff_ffff), table)
            }
        }
    }

    fn syn_stream(
        &mut self,
        stream: StreamId,
        fin: bool,
        unidirectional: bool,
        block: &[u8],
        table: &mut Table,
    ) -> Result<(), Violation> {
        let plain = self.inflater.inflate(block)?;
        if stream.is_multiple_of(2) || stream < self.last_stream {
            return Err(Violation::SpdyStreamOrder(stream));
        }
        if stream == self.last_stream {
            self.reset_stream(stream, Reset::ProtocolError, table);
            return Ok(());
        }
        self.last_stream = stream;
        let Some(headers) = headers::parse(&plain) else {
            frame::put_reset(&mut table.out, stream, Reset::ProtocolError);
            return Ok(());
        };
        let window = Window {
            send: self.initial_send,
            receive: STREAM_WINDOW,
            owed: 0,
        };
        if self.going_away || !table.open(stream, headers, window) {
            frame::put_reset(&mut table.out, stream, Reset::RefusedStream);
            return Ok(());
        }
        if unidirectional {
            table.finish_sending(stream);
        }
        if fin {
            table.finish_receiving(stream);
        }
        Ok(())
    }

    /// Whether data may come for this stream; it is discarded if not.
    fn data_head(&mut self, stream: StreamId, table: &mut Table) -> Result<(), Violation> {
        match table.is_receiving(stream) {
            Some(true) => {}
            Some(false) if table.is_reset(stream) => {}
            Some(false) => self.reset_stream(stream, Reset::StreamAlreadyClosed, table),
            None if stream == 0 => return Err(Violation::SpdyStreamOrder(0)),
            None if self.never_opened(stream) => {
                frame::put_reset(&mut table.out, stream, Reset::InvalidStream);
            }
            // It has been over for less than a round trip.
            None => {}
        }
        Ok(())
    }

    fn data(&mut self, stream: StreamId, data: &[u8], table: &mut Table) -> Result<(), Violation> {
        if data.is_empty() {
            return Ok(());
        }
        let count = data.len() as i64;
        self.session.receive -= count;
        if self.peer_windows == PeerWindows::Kept && self.session.receive < 0 {
            return Err(Violation::SpdySessionWindow);
        }
        let overrun = table.window(stream).is_some_and(|window| {
            window.receive -= count;
            window.receive < 0
        });
        if overrun && self.peer_windows == PeerWindows::Kept {
            self.reset_stream(stream, Reset::FlowControlError, table);
        }
        if !table.deliver(stream, data) {
            self.consumed(stream, data.len(), table);
        }
        Ok(())
    }

    /// `None` when the frame is not as long as it says.
    fn settings(&mut self, payload: &[u8], table: &mut Table) -> Option<Result<(), Violation>> {
        let (count, entries) = payload.split_first_chunk::<4>()?;
        let (entries, rest) = entries.as_chunks::<8>();
        if entries.len() != usize::try_from(number(count)).ok()? || !rest.is_empty() {
            return None;
        }
        for entry in entries {
            let (id, value) = pair(entry)?;
            if id & 0x00ff_ffff != frame::SETTING_INITIAL_WINDOW_SIZE {
                continue;
            }
            let value = i64::from(value);
            if value > MAX_WINDOW {
                return Some(Err(Violation::SpdyWindowOverflow));
            }
            let change = value - self.initial_send;
            self.initial_send = value;
            for window in table.windows() {
                window.send += change;
                if window.send > MAX_WINDOW {
                    return Some(Err(Violation::SpdyWindowOverflow));
                }
            }
            self.peer_windows = PeerWindows::Kept;
            table.wake_writers();
        }
        Some(Ok(()))
    }

    fn ping(&mut self, id: u32, table: &mut Table) {
        if id % 2 == 1 {
            frame::put_ping(&mut table.out, id);
        } else if id == PROBE && self.peer_windows == PeerWindows::Probing {
            self.peer_windows = PeerWindows::Ignored;
            table.wake_writers();
        }
    }

    fn window_update(&mut self, stream: StreamId, delta: i64, table: &mut Table) -> Result<(), Violation> {
        self.peer_windows = PeerWindows::Kept;
        if stream == 0 {
            self.session.send += delta;
            if self.session.send > MAX_WINDOW || delta == 0 {
                return Err(Violation::SpdyWindowOverflow);
            }
        } else if let Some(window) = table.window(stream) {
            window.send += delta;
            if delta == 0 {
                self.reset_stream(stream, Reset::ProtocolError, table);
            } else if window.send > MAX_WINDOW {
                self.reset_stream(stream, Reset::FlowControlError, table);
            }
        }
        table.wake_writers();
        Ok(())
    }

    fn reset_stream(&mut self, stream: StreamId, why: Reset, table: &mut Table) {
        frame::put_reset(&mut table.out, stream, why);
        table.reset(stream);
    }

    /// Only the client opens streams, with odd numbers that rise.
    fn never_opened(&self, stream: StreamId) -> bool {
        stream.is_multiple_of(2) || stream > self.last_stream
    }

    /// How much may be sent on this stream now.
    fn sendable(&mut self, stream: StreamId, table: &mut Table) -> usize {
        if self.peer_windows == PeerWindows::Ignored {
            return usize::MAX;
        }
        let window = table
            .window(stream)
            .map_or(0, |window| window.send)
            .min(self.session.send);
        if window <= 0 && self.peer_windows == PeerWindows::Unknown {
            self.peer_windows = PeerWindows::Probing;
            frame::put_ping(&mut table.out, PROBE);
        }
        usize::try_from(window).unwrap_or(0)
    }
}

impl Framing for Spdy {
    fn greet(&mut self, table: &mut Table) {
        let settings = [
            (frame::SETTING_MAX_CONCURRENT_STREAMS, MAX_STREAMS as u32),
            (frame::SETTING_INITIAL_WINDOW_SIZE, STREAM_BUFFER as u32),
        ];
        frame::put_settings(&mut table.out, &settings);
        frame::put_window_update(&mut table.out, 0, (SESSION_WINDOW - INITIAL_WINDOW) as u32);
    }

    fn receive(&mut self, input: &mut BytesMut, table: &mut Table) -> Result<Received, Violation> {
        self.frames(input, table).inspect_err(|_| {
            frame::put_goaway(&mut table.out, self.last_stream, frame::GOAWAY_PROTOCOL_ERROR);
        })?;
        Ok(Received::Taken)
    }

    fn accept(&mut self, id: StreamId, table: &mut Table) {
        frame::put_syn_reply(&mut table.out, id, &self.deflater.empty_block());
    }

    fn send(&mut self, id: StreamId, data: &[u8], table: &mut Table) -> usize {
        let count = data.len().min(MAX_DATA).min(self.sendable(id, table));
        if count > 0 {
            self.session.send -= count as i64;
            if let Some(window) = table.window(id) {
                window.send -= count as i64;
            }
            frame::put_data(&mut table.out, id, 0, &data[..count]);
        }
        count
    }

    fn finish(&mut self, id: StreamId, table: &mut Table) {
        frame::put_data(&mut table.out, id, frame::FLAG_FIN, &[]);
    }

    fn reset(&mut self, id: StreamId, why: Refusal, table: &mut Table) {
        let why = match why {
            Refusal::Invalid => Reset::ProtocolError,
            Refusal::Refused => Reset::RefusedStream,
            Refusal::Cancelled => Reset::Cancel,
        };
        frame::put_reset(&mut table.out, id, why);
    }

    fn consumed(&mut self, id: StreamId, bytes: usize, table: &mut Table) {
        self.session.owed += bytes as i64;
        if self.session.owed >= SESSION_WINDOW / 2 {
            frame::put_window_update(&mut table.out, 0, self.session.owed as u32);
            self.session.receive += std::mem::take(&mut self.session.owed);
        }
        if table.is_receiving(id) != Some(true) {
            return;
        }
        let Some(window) = table.window(id) else {
            return;
        };
        window.owed += bytes as i64;
        if window.owed >= STREAM_WINDOW / 2 {
            let owed = std::mem::take(&mut window.owed);
            window.receive += owed;
            frame::put_window_update(&mut table.out, id, owed as u32);
        }
    }

    fn goodbye(&mut self, table: &mut Table) {
        frame::put_goaway(&mut table.out, self.last_stream, frame::GOAWAY_OK);
    }
}

fn known(kind: u16) -> bool {
    matches!(
        kind,
        frame::SYN_STREAM
            | frame::SYN_REPLY
            | frame::RST_STREAM
            | frame::SETTINGS
            | frame::PING
            | frame::GOAWAY
            | frame::HEADERS
            | frame::WINDOW_UPDATE
    )
}

/// The first four of some bytes as a number. A stream's number has 31 bits.
fn number<const N: usize>(bytes: &[u8; N]) -> u32 {
    const { assert!(N >= 4) };
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn pair(payload: &[u8]) -> Option<(u32, u32)> {
    let bytes: &[u8; 8] = payload.try_into().ok()?;
    Some((
        number(bytes),
        u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
    ))
}

#[cfg(test)]
pub(crate) mod tests;
