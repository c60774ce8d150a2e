//! The framings for a fuzzer that is led by what it reaches (fuzz/): whatever bytes a client sends, every bound holds. What the
//! bytes mean is asserted by the tests; here nothing may panic, grow or go round for ever.

use bytes::BytesMut;

use crate::mux::{Framing, OUT_BUFFER, Received, Refusal, TOTAL_BUFFER, Table, Window};
use crate::noise::Noise;
use crate::spdy::Spdy;
use crate::websocket::{Channel, Channels, Tunnel};

/// More of a frame than this is never waited for: SPDY's longest control frame.
const WAITED_FOR: usize = 17 << 10;
/// The last bytes of an input say how the rest is cut and who reads and writes meanwhile.
const STEERING: usize = 8;

/// SPDY/3.1 on a connection.
pub fn spdy(input: &[u8]) {
    exercise(Spdy::new(), Table::default(), input);
}

/// Exec's and attach's channels over WebSocket; the first byte says which version of them.
pub fn channels(input: &[u8]) {
    let Some((version, input)) = input.split_first() else {
        return;
    };
    let mut table = Table::default();
    for channel in [0, 1, 3, 4] {
        table.insert(channel, Window::default());
    }
    exercise(Channels::new(version & 1 == 1, Channel::Stdout), table, input);
}

/// SPDY/3.1 in WebSocket's messages.
pub fn tunnel(input: &[u8]) {
    exercise(Tunnel::new(), Table::default(), input);
}

fn exercise(mut framing: impl Framing, mut table: Table, input: &[u8]) {
    let Some((bytes, steering)) = input.split_last_chunk::<STEERING>() else {
        return;
    };
    let mut noise = Noise(u64::from_le_bytes(*steering));
    let (mut rest, mut unread, mut writing) = (bytes, BytesMut::new(), BytesMut::new());
    framing.greet(&mut table);
    loop {
        let (piece, later) = rest.split_at(rest.len().min(1 + noise.below(9000)));
        rest = later;
        unread.extend_from_slice(piece);
        let result = framing.receive(&mut unread, &mut table);
        assert!(table.buffered() <= TOTAL_BUFFER);
        assert!(table.out.len() <= 2 * OUT_BUFFER + 16 * bytes.len());
        framing.collect(&mut table, &mut writing);
        writing.clear();
        if result != Ok(Received::Taken) {
            framing.goodbye(&mut table);
            return;
        }
        let held_up = table.is_blocked();
        assert!(held_up || unread.len() < WAITED_FOR);
        while let Some(stream) = table.next_opened() {
            match noise.below(8) {
                0 => framing.reset(stream, Refusal::Refused, &mut table),
                _ => framing.accept(stream, &mut table),
            }
        }
        for stream in table.ids() {
            let most = if rest.is_empty() {
                usize::MAX
            } else {
                noise.below(100_000)
            };
            let count = table.take(stream, most, |_| ());
            framing.consumed(stream, count, &mut table);
            match noise.below(16) {
                0 => framing.finish(stream, &mut table),
                1..8 => drop(framing.send(stream, &[0; 1000], &mut table)),
                _ => {}
            }
        }
        assert!(
            !rest.is_empty() || !table.is_blocked(),
            "it is held up by streams that are all read"
        );
        if rest.is_empty() && !held_up {
            framing.goodbye(&mut table);
            return;
        }
    }
}
