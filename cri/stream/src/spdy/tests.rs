//! SPDY without a connection: a client's bytes in, the table and the server's bytes out.

use flate2::{Compress, Compression, FlushCompress};

use super::dictionary::DICTIONARY;
use super::*;
use crate::mux::{OUT_BUFFER, TOTAL_BUFFER};
use crate::noise::Noise;

/// Builds what a client sends.
struct Client {
    deflate: Compress,
    bytes: BytesMut,
}

impl Client {
    fn new() -> Client {
        let mut deflate = Compress::new(Compression::best(), true);
        deflate.set_dictionary(DICTIONARY).unwrap();
        Client {
            deflate,
            bytes: BytesMut::new(),
        }
    }

    fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(&[0x80, 3]);
        self.bytes.extend_from_slice(&kind.to_be_bytes());
        let size = (u32::from(flags) << 24) | payload.len() as u32;
        self.bytes.extend_from_slice(&size.to_be_bytes());
        self.bytes.extend_from_slice(payload);
        self
    }

    fn numbers(&mut self, kind: u16, numbers: &[u32]) -> &mut Self {
        let payload: Vec<u8> = numbers.iter().flat_map(|number| number.to_be_bytes()).collect();
        self.control(kind, 0, &payload)
    }

    fn block(&mut self, headers: &[(&str, &str)]) -> Vec<u8> {
        let mut plain = (headers.len() as u32).to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend((text.len() as u32).to_be_bytes());
            plain.extend(text.as_bytes());
        }
        let mut block = Vec::with_capacity(plain.len() + 128);
        self.deflate
            .compress_vec(&plain, &mut block, FlushCompress::Sync)
            .unwrap();
        block
    }

    fn syn(&mut self, stream: u32, flags: u8, headers: &[(&str, &str)]) -> &mut Self {
        let payload = [&stream.to_be_bytes()[..], &[0; 6], &self.block(headers)].concat();
        self.control(frame::SYN_STREAM, flags, &payload)
    }

    fn data(&mut self, stream: u32, flags: u8, data: &[u8]) -> &mut Self {
        frame::put_data(&mut self.bytes, stream, flags, data);
        self
    }

    fn take(&mut self) -> BytesMut {
        self.bytes.split()
    }
}

/// A server and a client that has greeted it.
struct Pair {
    spdy: Spdy,
    table: Table,
    client: Client,
    input: BytesMut,
}

impl Pair {
    fn new() -> Pair {
        let (mut spdy, mut table) = (Spdy::new(), Table::default());
        spdy.greet(&mut table);
        table.out.clear();
        Pair {
            spdy,
            table,
            client: Client::new(),
            input: BytesMut::new(),
        }
    }

    /// With stream 1 opened.
    fn opened() -> Pair {
        let mut pair = Pair::new();
        pair.client.syn(1, 0, &[("streamtype", "stdin")]);
        pair.exchange().unwrap();
        pair
    }

    /// Gives the server what the client built; returns what it answers.
    fn exchange(&mut self) -> Result<Vec<Answer>, Violation> {
        self.input.unsplit(self.client.take());
        let result = self.spdy.receive(&mut self.input, &mut self.table);
        let answers = answers(&self.table.out);
        self.table.out.clear();
        result.map(|_| answers).inspect_err(|_| ())
    }

    fn read(&mut self, stream: u32, limit: usize) -> Vec<u8> {
        let mut data = Vec::new();
        let count = self
            .table
            .take(stream, limit, |bytes| data.extend_from_slice(bytes));
        self.spdy.consumed(stream, count, &mut self.table);
        data
    }
}

/// A frame of the server's: its type, or `None` for data, and its payload.
#[derive(Debug, PartialEq, Eq, Clone)]
struct Answer {
    kind: Option<u16>,
    flags: u8,
    numbers: Vec<u32>,
}

fn answers(mut out: &[u8]) -> Vec<Answer> {
    let mut answers = Vec::new();
    while let Some((head, rest)) = out.split_first_chunk::<HEAD>() {
        let (kind, flags, length, first) = match Head::parse(*head) {
            Head::Data {
                stream,
                flags,
                length,
            } => (None, flags, length, vec![stream, length as u32]),
            Head::Control {
                kind,
                flags,
                length,
                version,
            } => {
                assert_eq!(version, 3);
                let words = rest[..length].as_chunks::<4>().0;
                (Some(kind), flags, length, words.iter().map(number).collect())
            }
        };
        answers.push(Answer {
            kind,
            flags,
            numbers: first,
        });
        out = &rest[length..];
    }
    assert!(out.is_empty());
    answers
}

fn control(kind: u16, numbers: &[u32]) -> Answer {
    Answer {
        kind: Some(kind),
        flags: 0,
        numbers: numbers.to_vec(),
    }
}

fn data(stream: u32, flags: u8, length: usize) -> Answer {
    Answer {
        kind: None,
        flags,
        numbers: vec![stream, length as u32],
    }
}

#[test]
fn the_server_says_how_much_it_takes_before_anything_else() {
    let (mut spdy, mut table) = (Spdy::new(), Table::default());
    spdy.greet(&mut table);
    let greeting = answers(&table.out);
    assert_eq!(greeting[0].kind, Some(frame::SETTINGS));
    assert_eq!(
        greeting[0].numbers,
        [2, 4, MAX_STREAMS as u32, 7, STREAM_BUFFER as u32]
    );
    assert_eq!(
        greeting[1],
        control(frame::WINDOW_UPDATE, &[0, (1 << 20) - (64 << 10)])
    );
}

#[test]
fn a_stream_is_opened_read_and_half_closed() {
    let mut pair = Pair::new();
    pair.client
        .syn(1, 0, &[("streamtype", "stdin"), ("x", "y")])
        .data(1, 0, b"hello ")
        .data(1, 1, b"world");
    assert_eq!(pair.exchange().unwrap(), []);
    let (id, headers) = pair.table.opened().next().unwrap();
    assert_eq!(
        (id, headers.get("streamtype"), headers.get("x")),
        (1, "stdin", "y")
    );
    assert_eq!(pair.read(1, 100), b"hello world");
    assert_eq!(pair.table.is_receiving(1), Some(false));
    pair.spdy.accept(1, &mut pair.table);
    assert_eq!(pair.spdy.send(1, b"answer", &mut pair.table), 6);
    pair.spdy.finish(1, &mut pair.table);
    let out = pair.exchange().unwrap();
    assert_eq!((out[0].kind, out[0].numbers[0]), (Some(frame::SYN_REPLY), 1));
    assert_eq!(out[1..], [data(1, 0, 6), data(1, frame::FLAG_FIN, 0)]);
}

#[test]
fn a_client_that_answers_a_ping_but_opens_no_window_keeps_none() {
    let mut pair = Pair::opened();
    let block = vec![0; 40 << 10];
    assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 40 << 10);
    assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 24 << 10);
    assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 0);
    assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 0);
    let out = pair.exchange().unwrap();
    assert_eq!(
        out,
        [
            data(1, 0, 40 << 10),
            data(1, 0, 24 << 10),
            control(frame::PING, &[2])
        ]
    );
    pair.client.numbers(frame::PING, &[2]);
    pair.exchange().unwrap();
    for _ in 0..100 {
        assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 40 << 10);
        pair.table.out.clear();
    }
}

#[test]
fn a_client_that_overruns_our_windows_keeps_none_although_its_answer_is_stuck_behind_its_data() {
    let mut pair = Pair::opened();
    let block = vec![0; 64 << 10];
    assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 64 << 10);
    assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 0);
    pair.client
        .data(1, 0, &vec![7; STREAM_BUFFER])
        .data(1, 0, &[7; 1000])
        .numbers(frame::PING, &[2]);
    pair.exchange().unwrap();
    assert!(pair.table.is_blocked());
    assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 64 << 10);
}

#[test]
fn a_client_that_opens_windows_is_held_to_them() {
    let mut pair = Pair::opened();
    let block = vec![0; 256 << 10];
    assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 64 << 10);
    assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 0);
    // The stream's window alone is not enough, nor is the connection's.
    pair.client.numbers(frame::WINDOW_UPDATE, &[1, 1000]);
    pair.exchange().unwrap();
    assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 0);
    pair.client.numbers(frame::WINDOW_UPDATE, &[0, 600]);
    pair.exchange().unwrap();
    assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 600);
    assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 0);
    // The answer to the question is no longer of interest.
    pair.client.numbers(frame::PING, &[2]);
    pair.exchange().unwrap();
    assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 0);
}

#[test]
fn settings_change_the_windows_of_streams_that_are_open() {
    let mut pair = Pair::opened();
    let block = vec![0; 256 << 10];
    pair.client
        .numbers(frame::SETTINGS, &[2, 4, 100, 0x0100_0007, 1000]);
    pair.exchange().unwrap();
    assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 1000);
    assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 0);
    pair.client.numbers(frame::SETTINGS, &[1, 7, 1500]).syn(3, 0, &[]);
    pair.exchange().unwrap();
    assert_eq!(pair.spdy.send(1, &block, &mut pair.table), 500);
    assert_eq!(pair.spdy.send(3, &block, &mut pair.table), 1500);
}

#[test]
fn what_was_read_is_given_back_to_the_windows() {
    let mut pair = Pair::opened();
    pair.client.data(1, 0, &[7; 200 << 10]);
    assert_eq!(pair.exchange().unwrap(), []);
    assert_eq!(pair.read(1, 100 << 10).len(), 100 << 10);
    assert_eq!(pair.exchange().unwrap(), []);
    assert_eq!(pair.read(1, 100 << 10).len(), 100 << 10);
    assert_eq!(
        pair.exchange().unwrap(),
        [control(frame::WINDOW_UPDATE, &[1, 200 << 10])]
    );
    // What nobody reads is given back at once, and the connection's share always.
    pair.client
        .numbers(frame::RST_STREAM, &[1, 5])
        .data(1, 0, &[7; 400 << 10]);
    assert_eq!(
        pair.exchange().unwrap(),
        [control(frame::WINDOW_UPDATE, &[0, 600 << 10])]
    );
}

#[test]
fn a_stream_that_is_not_read_holds_up_the_connection_at_its_bound() {
    let mut pair = Pair::opened();
    pair.client
        .data(1, 1, &vec![7; 1 << 20])
        .numbers(frame::PING, &[1]);
    assert_eq!(pair.exchange().unwrap(), []);
    assert!(pair.table.is_blocked());
    assert_eq!(pair.table.buffered(), STREAM_BUFFER);
    let mut read = 0;
    while read < 1 << 20 {
        read += pair.read(1, 100_000).len();
        assert!(!pair.table.is_blocked());
        pair.exchange().unwrap();
        assert!(pair.table.buffered() <= STREAM_BUFFER);
    }
    assert_eq!(
        (read, pair.table.is_receiving(1), pair.input.len()),
        (1 << 20, Some(false), 0)
    );
}

#[test]
fn all_streams_together_have_a_bound_too() {
    let mut pair = Pair::new();
    for stream in (1..101).step_by(2) {
        pair.client
            .syn(stream, 0, &[])
            .data(stream, 0, &vec![7; STREAM_BUFFER]);
    }
    pair.exchange().unwrap();
    assert!(pair.table.is_blocked());
    assert_eq!(pair.table.buffered(), TOTAL_BUFFER);
}

#[test]
fn a_client_known_to_keep_windows_may_not_overrun_them() {
    let mut pair = Pair::opened();
    pair.client
        .numbers(frame::WINDOW_UPDATE, &[0, 1])
        .data(1, 0, &vec![7; STREAM_BUFFER]);
    assert_eq!(pair.exchange().unwrap(), []);
    pair.client.data(1, 0, b"x").numbers(frame::PING, &[1]);
    // Its buffer is full as well: the error comes to light when there is room.
    pair.exchange().unwrap();
    assert_eq!(pair.table.take(1, 10, |_| ()), 10);
    let reset = control(frame::RST_STREAM, &[1, 7]);
    assert_eq!(pair.exchange().unwrap(), [reset, control(frame::PING, &[1])]);
    let mut pair = Pair::opened();
    pair.client.numbers(frame::WINDOW_UPDATE, &[0, 1]);
    for stream in (3..21).step_by(2) {
        pair.client
            .syn(stream, 0, &[])
            .data(stream, 0, &vec![7; 200 << 10]);
    }
    assert_eq!(pair.exchange().unwrap_err(), Violation::SpdySessionWindow);
}

#[test]
fn pings_are_answered_and_what_is_unknown_is_passed_over() {
    let mut pair = Pair::opened();
    pair.client
        .numbers(frame::PING, &[1])
        .numbers(10, &[1, 2, 3])
        .control(77, 0xff, &vec![1; 100_000])
        .numbers(frame::PING, &[4])
        .numbers(frame::PING, &[7]);
    assert_eq!(
        pair.exchange().unwrap(),
        [control(frame::PING, &[1]), control(frame::PING, &[7])]
    );
}

#[test]
fn streams_in_a_wrong_state_are_reset_alone() {
    let mut pair = Pair::opened();
    let reset = |stream, why: Reset| vec![control(frame::RST_STREAM, &[stream, why as u32])];
    let name = pair.client.block(&[("streamtype", "stdin")]);
    let reply = [&1u32.to_be_bytes()[..], &name].concat();
    pair.client.control(frame::SYN_REPLY, 0, &reply);
    assert_eq!(pair.exchange().unwrap(), reset(1, Reset::InvalidStream));
    pair.client.data(9, 0, b"x");
    assert_eq!(pair.exchange().unwrap(), reset(9, Reset::InvalidStream));
    pair.client.data(2, 0, b"x");
    assert_eq!(pair.exchange().unwrap(), reset(2, Reset::InvalidStream));
    pair.client.data(1, 1, b"x").data(1, 0, b"y");
    assert_eq!(pair.exchange().unwrap(), reset(1, Reset::StreamAlreadyClosed));
    pair.client.data(1, 0, b"z");
    assert_eq!(pair.exchange().unwrap(), []);
    pair.client.syn(3, 0, &[("UPPER", "case")]);
    assert_eq!(pair.exchange().unwrap(), reset(3, Reset::ProtocolError));
    pair.client.syn(5, 0, &[]).numbers(frame::WINDOW_UPDATE, &[5, 0]);
    assert_eq!(pair.exchange().unwrap(), reset(5, Reset::ProtocolError));
    pair.client
        .syn(7, 0, &[])
        .numbers(frame::WINDOW_UPDATE, &[7, 0x7fff_ffff]);
    assert_eq!(pair.exchange().unwrap(), reset(7, Reset::FlowControlError));
    pair.client.numbers(frame::GOAWAY, &[0, 0]).syn(9, 0, &[]);
    assert_eq!(pair.exchange().unwrap(), reset(9, Reset::RefusedStream));
}

#[test]
fn no_more_streams_than_agreed_are_open_at_once() {
    let mut pair = Pair::new();
    for stream in 0..=MAX_STREAMS as u32 {
        pair.client
            .syn(2 * stream + 1, 0, &[("streamtype", "data"), ("port", "80")]);
    }
    let last = 2 * MAX_STREAMS as u32 + 1;
    assert_eq!(pair.exchange().unwrap(), [control(frame::RST_STREAM, &[last, 3])]);
}

#[test]
fn breaking_the_protocol_is_answered_with_goaway() {
    let oversized = |kind, length| Violation::SpdyFrameSize { kind, length };
    let cases: Vec<(Vec<u8>, Violation)> = vec![
        (vec![0x80, 2, 0, 1, 0, 0, 0, 0], Violation::SpdyVersion(2)),
        (vec![0, 0, 0, 0, 0, 0, 0, 1, 9], Violation::SpdyStreamOrder(0)),
        (
            Client::new().syn(2, 0, &[]).take().to_vec(),
            Violation::SpdyStreamOrder(2),
        ),
        (
            Client::new().syn(5, 0, &[]).syn(3, 0, &[]).take().to_vec(),
            Violation::SpdyStreamOrder(3),
        ),
        (
            Client::new().control(1, 0, &[0; 9]).take().to_vec(),
            oversized(1, 9),
        ),
        (
            Client::new().control(1, 0, &[1; 40]).take().to_vec(),
            Violation::SpdyCompression,
        ),
        (vec![0x80, 3, 0, 8, 0, 0, 0x40, 1], oversized(8, 0x4001)),
        (Client::new().numbers(3, &[1]).take().to_vec(), oversized(3, 4)),
        (
            Client::new().numbers(4, &[2, 7, 1]).take().to_vec(),
            oversized(4, 12),
        ),
        (
            Client::new().numbers(4, &[1, 7, 0x8000_0000]).take().to_vec(),
            Violation::SpdyWindowOverflow,
        ),
        (Client::new().numbers(6, &[1, 2]).take().to_vec(), oversized(6, 8)),
        (Client::new().numbers(7, &[1]).take().to_vec(), oversized(7, 4)),
        (
            Client::new().numbers(9, &[0, 0x7fff_ffff]).take().to_vec(),
            Violation::SpdyWindowOverflow,
        ),
    ];
    for (bytes, violation) in cases {
        let (mut spdy, mut table) = (Spdy::new(), Table::default());
        let result = spdy.receive(&mut BytesMut::from(&bytes[..]), &mut table);
        assert_eq!(result, Err(violation), "{bytes:x?}");
        let out = answers(&table.out);
        assert_eq!(
            (out[0].kind, out[0].numbers[1]),
            (Some(frame::GOAWAY), 1),
            "{violation}"
        );
    }
}

#[test]
fn a_header_bomb_ends_the_connection_with_memory_bounded() {
    let mut client = Client::new();
    let bomb = client.block(&[("a", &"b".repeat(1 << 20))]);
    assert!(bomb.len() < MAX_CONTROL);
    let payload = [&1u32.to_be_bytes()[..], &[0; 6], &bomb].concat();
    let mut pair = Pair::new();
    pair.client.control(frame::SYN_STREAM, 0, &payload);
    assert_eq!(
        pair.exchange().unwrap_err(),
        Violation::SpdyHeaderBomb(headers::MAX_BLOCK)
    );
    assert_eq!(pair.table.opened().count(), 0);
}

/// A session with something of everything.
fn conversation(noise: &mut Noise) -> Vec<u8> {
    conversation_of(noise, 5000)
}

/// With so many bytes in a frame at most.
pub(crate) fn conversation_of(noise: &mut Noise, most: usize) -> Vec<u8> {
    let mut client = Client::new();
    let mut next = 1;
    for _ in 0..30 {
        let stream = 1 + 2 * noise.below(10) as u32;
        let size = noise.below(most);
        match noise.below(8) {
            0 | 1 => {
                client.syn(
                    next,
                    noise.below(3) as u8,
                    &[("streamtype", "data"), ("requestid", "0")],
                );
                next += 2;
            }
            2 | 3 => drop(client.data(stream, noise.below(2) as u8, &noise.bytes(size))),
            4 => drop(client.numbers(frame::RST_STREAM, &[stream, 5])),
            5 => drop(client.numbers(frame::PING, &[stream])),
            6 => drop(client.numbers(frame::WINDOW_UPDATE, &[stream, size as u32 + 1])),
            _ => drop(client.numbers(frame::SETTINGS, &[1, 7, size as u32])),
        }
    }
    client.take().to_vec()
}

/// Feeds bytes in random pieces, with a reader and a writer at random; all bounds hold all the time.
fn exercise(bytes: &[u8], noise: &mut Noise) -> (Result<(), Violation>, Vec<u8>) {
    let (mut spdy, mut table, mut input) = (Spdy::new(), Table::default(), BytesMut::new());
    let (mut written, mut rest) = (Vec::new(), bytes);
    loop {
        let (piece, later) = rest.split_at(rest.len().min(1 + noise.below(9000)));
        rest = later;
        input.extend_from_slice(piece);
        let result = spdy.receive(&mut input, &mut table);
        assert!(table.buffered() <= TOTAL_BUFFER);
        assert!(table.out.len() <= 2 * OUT_BUFFER + 16 * bytes.len());
        written.extend_from_slice(&table.out.split());
        if let Err(violation) = result {
            return (Err(violation), written);
        }
        assert!(table.is_blocked() || input.len() < HEAD + MAX_CONTROL);
        for stream in (1..21).step_by(2) {
            let count = table.take(stream, noise.below(100_000), |_| ());
            spdy.consumed(stream, count, &mut table);
            if table.is_receiving(stream) == Some(true) {
                spdy.send(stream, &[0; 1000], &mut table);
            }
        }
        if rest.is_empty() && !table.is_blocked() {
            return (Ok(()), written);
        }
    }
}

#[test]
fn no_bytes_whatever_break_the_server_or_its_bounds() {
    let mut noise = Noise::of(1);
    for round in 0..Noise::rounds(3000) {
        let bytes = match round % 3 {
            0 => {
                let count = noise.below(300);
                noise.bytes(count)
            }
            _ => {
                let whole = conversation(&mut noise);
                noise.damage(&whole)
            }
        };
        let (_, written) = exercise(&bytes, &mut noise);
        // What the server says is well-formed, whatever it was told.
        answers(&written);
    }
}

#[test]
fn how_the_bytes_are_cut_changes_nothing() {
    let mut noise = Noise(2);
    for _ in 0..200 {
        let bytes = conversation(&mut noise);
        let whole = |pieces: usize| {
            let (mut spdy, mut table, mut input) = (Spdy::new(), Table::default(), BytesMut::new());
            for piece in bytes.chunks(pieces) {
                input.extend_from_slice(piece);
                spdy.receive(&mut input, &mut table).unwrap();
            }
            (table.buffered(), table.out.to_vec(), table.opened().count())
        };
        assert_eq!(whole(usize::MAX), whole(1));
    }
}

#[test]
#[ignore = "make fuzz: it writes files"]
fn a_corpus_of_conversations_is_written() {
    crate::noise::corpus("spdy", |noise| conversation_of(noise, 60));
}
