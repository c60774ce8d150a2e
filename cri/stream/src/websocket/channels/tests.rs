//! Channels without a connection: a client's bytes in, the table and the server's bytes out.

use super::super::frame::tests::client;
use super::*;
use crate::mux::{STREAM_BUFFER, Window};
use crate::noise::Noise;

const BINARY: u8 = 0x82;

struct Pair {
    channels: Channels,
    table: Table,
    input: BytesMut,
}

impl Pair {
    fn new(close_signal: bool) -> Pair {
        let mut table = Table::default();
        for channel in [0, 1, 3, 4] {
            table.insert(channel, Window::default());
        }
        let channels = Channels::new(close_signal, Channel::Stdout);
        Pair {
            channels,
            table,
            input: BytesMut::new(),
        }
    }

    /// What the server answers.
    fn give(&mut self, bytes: &[u8]) -> (Result<Received, Violation>, Vec<u8>) {
        self.input.extend_from_slice(bytes);
        let result = self.channels.receive(&mut self.input, &mut self.table);
        (result, self.table.out.split().to_vec())
    }

    fn read(&mut self, channel: u32) -> Vec<u8> {
        let mut data = Vec::new();
        self.table
            .take(channel, usize::MAX, |bytes| data.extend_from_slice(bytes));
        data
    }
}

#[test]
fn messages_go_to_the_channel_of_their_first_byte() {
    let mut pair = Pair::new(true);
    let bytes = [
        client(BINARY, b"\0hello "),
        client(BINARY, b""),
        client(0x02, b""),
        client(0x00, b"\0"),
        client(0x80, b"world"),
        client(BINARY, b"\x04{}"),
        client(BINARY, b"\x01for nobody"),
        client(BINARY, b"\0"),
    ]
    .concat();
    for byte in bytes {
        assert_eq!(pair.give(&[byte]), (Ok(Received::Taken), vec![]));
    }
    assert_eq!(
        (pair.read(0), pair.read(4)),
        (b"hello world".to_vec(), b"{}".to_vec())
    );
    assert_eq!(pair.table.is_receiving(0), Some(true));
    assert_eq!(pair.channels.send(1, b"out", &mut pair.table), 3);
    assert_eq!(pair.give(&[]).1, b"\x82\x04\x01out");
}

#[test]
fn version_5_ends_a_stream_with_a_signal_and_version_4_has_none() {
    let mut pair = Pair::new(true);
    let signal = [client(0x02, b"\xff"), client(0x80, b"\0")].concat();
    assert_eq!(pair.give(&signal), (Ok(Received::Taken), vec![]));
    assert_eq!(pair.table.is_receiving(0), Some(false));
    for (close_signal, message, violation) in [
        (false, &b"\xff\0"[..], Violation::Channel(255)),
        (true, b"\xff", Violation::ChannelClose),
        (true, b"\xff\0\0", Violation::ChannelClose),
        (true, b"\x05x", Violation::Channel(5)),
    ] {
        let (result, out) = Pair::new(close_signal).give(&client(BINARY, message));
        assert_eq!(
            (result, &out[..]),
            (Err(violation), &b"\x88\x02\x03\xea"[..]),
            "{message:?}"
        );
    }
    let (result, out) = Pair::new(true).give(&client(0x81, b"text"));
    assert_eq!(
        (result, &out[..]),
        (Err(Violation::WebSocketText), &b"\x88\x02\x03\xeb"[..])
    );
}

#[test]
fn pings_and_goodbyes_are_answered_once() {
    let mut pair = Pair::new(true);
    assert_eq!(
        pair.give(&client(0x89, b"are you there")).1,
        b"\x8a\x0dare you there"
    );
    let bytes = [client(0x88, &1000u16.to_be_bytes()), client(0x89, b"x")].concat();
    assert_eq!(
        pair.give(&bytes),
        (Ok(Received::Goodbye), b"\x88\x02\x03\xe8".to_vec())
    );
    pair.channels.goodbye(&mut pair.table);
    assert!(pair.table.out.is_empty());
}

#[test]
fn a_channel_that_is_not_read_holds_up_the_connection_at_its_bound() {
    let mut pair = Pair::new(true);
    let message = [&[0][..], &vec![7; STREAM_BUFFER + 1000]].concat();
    pair.give(&client(BINARY, &message)).0.unwrap();
    assert!(pair.table.is_blocked());
    assert_eq!(pair.read(0).len(), STREAM_BUFFER);
    assert!(!pair.table.is_blocked());
    pair.give(&client(BINARY, b"\0!")).0.unwrap();
    assert_eq!(pair.read(0), [&vec![7; 1000][..], b"!"].concat());
}

/// Messages of every kind, with so many bytes at most.
fn messages(noise: &mut Noise, most: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..noise.below(12) {
        let first = [0x82, 0x02, 0x00, 0x80, 0x89, 0x8a, 0x88][noise.below(7)];
        let count = noise.below(most);
        let mut payload = noise.bytes(if first & 8 == 0 { count } else { count % 126 });
        if let Some(channel) = payload.first_mut() {
            *channel = [0, 1, 4, 255][noise.below(4)];
        }
        bytes.extend(client(first, &payload));
    }
    bytes
}

#[test]
#[ignore = "make fuzz: it writes files"]
fn a_corpus_of_messages_is_written() {
    crate::noise::corpus("channels", |noise| [vec![1], messages(noise, 60)].concat());
}

#[test]
fn no_bytes_whatever_break_the_server_or_its_bounds() {
    let mut noise = Noise::of(4);
    for round in 0..Noise::rounds(3000) {
        let mut bytes = messages(&mut noise, 3000);
        if round % 2 == 0 && !bytes.is_empty() {
            bytes = noise.damage(&bytes);
        }
        let mut pair = Pair::new(round % 4 < 2);
        for piece in bytes.chunks(1 + noise.below(5000)) {
            let (result, out) = pair.give(piece);
            assert!(out.len() <= 2 * bytes.len() + 4);
            if result != Ok(Received::Taken) {
                break;
            }
            assert!(pair.table.buffered() <= 2 * STREAM_BUFFER);
        }
    }
}
