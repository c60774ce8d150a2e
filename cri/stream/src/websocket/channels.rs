//! `v4.channel.k8s.io` and `v5.channel.k8s.io`: the streams of exec and attach as binary messages, whose first byte says
//! which stream. Version 5 adds a message by which the client ends one of its streams: 255 and the stream's number.

use bytes::{BufMut as _, BytesMut};

use super::frame::{self, CloseCode, Decoder, Event};
use crate::mux::{Framing, Received, StreamId, Table};
use crate::violation::Violation;

const CLOSE_SIGNAL: u8 = 255;
/// The most that goes into one message.
const MAX_DATA: usize = 32 << 10;

/// The streams by their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Channel {
    Stdin = 0,
    Stdout = 1,
    Stderr = 2,
    Error = 3,
    Resize = 4,
}

/// Where in a message we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// Before its first byte.
    Channel,
    Data(StreamId),
    /// The data is for nobody.
    Nothing,
    /// In a close signal.
    Signal(Option<u8>),
}

/// The state of one connection.
pub(crate) struct Channels {
    decoder: Decoder,
    reading: Reading,
    /// Version 5.
    close_signal: bool,
    /// Where the client learns that the session has begun: the first channel that it reads.
    first_output: Channel,
    said_goodbye: bool,
}

impl Channels {
    pub fn new(close_signal: bool, first_output: Channel) -> Channels {
        Channels {
            decoder: Decoder::default(),
            reading: Reading::Channel,
            close_signal,
            first_output,
            said_goodbye: false,
        }
    }

    fn messages(&mut self, input: &mut BytesMut, table: &mut Table) -> Result<Received, Violation> {
        loop {
            let limit = match self.reading {
                Reading::Channel | Reading::Signal(_) => 1,
                Reading::Data(channel) => table.room(channel),
                Reading::Nothing => usize::MAX,
            };
            match self.decoder.next(input, limit)? {
                Some(Event::Data { data, last }) => self.data(&data, last, table)?,
                Some(Event::Ping(_)) if self.said_goodbye => {}
                Some(Event::Ping(payload)) => frame::put_pong(&mut table.out, &payload),
                Some(Event::Close) => {
                    self.goodbye(table);
                    return Ok(Received::Goodbye);
                }
                None => {
                    if limit == 0 && self.decoder.is_within_frame() {
                        table.block();
                    }
                    return Ok(Received::Taken);
                }
            }
        }
    }

    /// Takes a piece of a message, of one byte at most where that byte has a meaning.
    fn data(&mut self, data: &[u8], last: bool, table: &mut Table) -> Result<(), Violation> {
        match (self.reading, data) {
            (Reading::Data(channel), _) => {
                table.deliver(channel, data);
            }
            (Reading::Channel, &[channel]) => self.reading = self.channel(channel)?,
            (Reading::Signal(None), &[channel]) => self.reading = Reading::Signal(Some(channel)),
            (Reading::Signal(Some(_)), &[_]) => return Err(Violation::ChannelClose),
            _ => {}
        }
        if last {
            match std::mem::replace(&mut self.reading, Reading::Channel) {
                Reading::Signal(None) => return Err(Violation::ChannelClose),
                Reading::Signal(Some(channel)) => table.finish_receiving(StreamId::from(channel)),
                Reading::Channel | Reading::Data(_) | Reading::Nothing => {}
            }
        }
        Ok(())
    }

    fn channel(&self, channel: u8) -> Result<Reading, Violation> {
        match channel {
            0 | 4 => Ok(Reading::Data(StreamId::from(channel))),
            1..=3 => Ok(Reading::Nothing),
            CLOSE_SIGNAL if self.close_signal => Ok(Reading::Signal(None)),
            _ => Err(Violation::Channel(channel)),
        }
    }

    fn close(&mut self, code: CloseCode, table: &mut Table) {
        if !std::mem::replace(&mut self.said_goodbye, true) {
            frame::put_close(&mut table.out, code);
        }
    }
}

impl Framing for Channels {
    fn greet(&mut self, table: &mut Table) {
        frame::put_head(&mut table.out, frame::BINARY, 1);
        table.out.put_u8(self.first_output as u8);
    }

    fn receive(&mut self, input: &mut BytesMut, table: &mut Table) -> Result<Received, Violation> {
        self.messages(input, table)
            .inspect_err(|violation| self.close(CloseCode::from(*violation), table))
    }

    fn send(&mut self, id: StreamId, data: &[u8], table: &mut Table) -> usize {
        let data = &data[..data.len().min(MAX_DATA)];
        frame::put_head(&mut table.out, frame::BINARY, 1 + data.len());
        table.out.put_u8(id as u8);
        table.out.put_slice(data);
        data.len()
    }

    fn goodbye(&mut self, table: &mut Table) {
        self.close(CloseCode::Normal, table);
    }

    fn expel(&mut self, table: &mut Table) {
        self.close(CloseCode::PolicyViolation, table);
    }
}

#[cfg(test)]
mod tests;
