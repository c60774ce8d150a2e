//! The tunnel without a connection: a client's messages in, the server's messages out.

use super::super::frame::tests::client;
use super::*;
use crate::noise::Noise;

/// Gives the tunnel some bytes and takes what it writes.
fn give(tunnel: &mut Tunnel, bytes: &[u8]) -> (Result<Received, Violation>, Vec<u8>) {
    let (mut table, mut writing) = (Table::default(), BytesMut::new());
    let result = tunnel.receive(&mut BytesMut::from(bytes), &mut table);
    tunnel.collect(&mut table, &mut writing);
    (result, writing.to_vec())
}

/// SPDY's PING 1.
const PING: [u8; 12] = [0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1];
/// SPDY's GOAWAY, but for the last byte of its status.
const GOAWAY: [u8; 15] = [0x80, 3, 0, 7, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn spdy_comes_through_however_it_is_cut_into_messages() {
    let mut tunnel = Tunnel::new();
    let bytes: Vec<u8> = PING.iter().flat_map(|byte| client(0x82, &[*byte])).collect();
    let (result, out) = give(&mut tunnel, &bytes);
    assert_eq!(result, Ok(Received::Taken));
    assert_eq!(out, [&[0x82, 12][..], &PING].concat());
    let bytes = [
        client(0x02, &PING),
        client(0x89, b"1"),
        client(0x80, &PING),
        client(0x89, b"2"),
    ]
    .concat();
    let (_, out) = give(&mut tunnel, &bytes);
    assert_eq!(out, [&b"\x8a\x012\x82\x18"[..], &PING, &PING].concat());
}

#[test]
fn the_end_is_said_in_both_protocols() {
    let (result, out) = give(&mut Tunnel::new(), &client(0x82, &[0x80, 2, 0, 1, 0, 0, 0, 0]));
    assert_eq!(result, Err(Violation::SpdyVersion(2)));
    assert_eq!(
        out,
        [&[0x82, 16][..], &GOAWAY, &[1], b"\x88\x02\x03\xea"].concat()
    );
    let (mut tunnel, mut table) = (Tunnel::new(), Table::default());
    tunnel.goodbye(&mut table);
    let mut writing = BytesMut::new();
    tunnel.collect(&mut table, &mut writing);
    assert_eq!(
        writing[..],
        [&[0x82, 16][..], &GOAWAY, &[0], b"\x88\x02\x03\xe8"].concat()
    );
    assert_eq!(give(&mut tunnel, &client(0x89, b"x")).1, b"");
    let (result, out) = give(&mut Tunnel::new(), &client(0x88, b""));
    assert_eq!(
        (result, out),
        (Ok(Received::Goodbye), b"\x88\x02\x03\xe8".to_vec())
    );
}

#[test]
fn no_bytes_whatever_break_the_server() {
    let mut noise = Noise::of(5);
    for _ in 0..Noise::rounds(2000) {
        let mut bytes = Vec::new();
        for _ in 0..noise.below(20) {
            let count = noise.below(40);
            let payload = if noise.below(2) == 0 {
                PING.to_vec()
            } else {
                noise.bytes(count)
            };
            bytes.extend(client([0x82, 0x89, 0x02, 0x80][noise.below(4)], &payload));
        }
        if !bytes.is_empty() {
            bytes = noise.damage(&bytes);
        }
        let (_, out) = give(&mut Tunnel::new(), &bytes);
        assert!(out.len() < 64 + 2 * bytes.len());
    }
}

#[test]
#[ignore = "make fuzz: it writes files"]
fn a_corpus_of_tunnels_is_written() {
    crate::noise::corpus("tunnel", |noise| {
        let spdy = crate::spdy::tests::conversation_of(noise, 40);
        let parts = spdy.chunks(1 + noise.below(60));
        parts.flat_map(|part| client(0x82, part)).collect()
    });
}
