//! WebSocket frames as bytes (RFC 6455, section 5). Payloads are handed on as they arrive: a message may be of any size and
//! in any number of fragments, and none is ever put together.

use bytes::{Buf, BufMut, BytesMut};

use crate::violation::Violation;

const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
pub(super) const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
pub(super) const PONG: u8 = 10;

const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;

/// Why a connection is closed (RFC 6455, 7.4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum CloseCode {
    Normal = 1000,
    ProtocolError = 1002,
    UnsupportedData = 1003,
    PolicyViolation = 1008,
}

impl From<Violation> for CloseCode {
    fn from(violation: Violation) -> Self {
        match violation {
            Violation::WebSocketText => CloseCode::UnsupportedData,
            _ => CloseCode::ProtocolError,
        }
    }
}

/// What a client has sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A piece of a binary message; `last` if the message ends with it.
    Data { data: BytesMut, last: bool },
    /// To be answered with the same payload.
    Ping(BytesMut),
    /// The client says goodbye.
    Close,
}

/// A data frame that has not arrived whole.
#[derive(Debug)]
struct Frame {
    left: u64,
    fin: bool,
    mask: [u8; 4],
}

/// The head of a frame.
struct Head {
    fin: bool,
    opcode: u8,
    length: u64,
    mask: [u8; 4],
    size: usize,
}

/// Takes frames apart.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    frame: Option<Frame>,
    in_message: bool,
}

impl Decoder {
    /// Takes the next thing from the front of `input`, at most `limit` bytes of it if it is data; `None` when more must
    /// arrive first, or more room must be made.
    pub fn next(&mut self, input: &mut BytesMut, limit: usize) -> Result<Option<Event>, Violation> {
        loop {
            if let Some(frame) = &mut self.frame {
                let count = input
                    .len()
                    .min(limit)
                    .min(usize::try_from(frame.left).unwrap_or(usize::MAX));
                if count == 0 && frame.left > 0 {
                    return Ok(None);
                }
                let mut data = input.split_to(count);
                unmask(&mut data, frame.mask);
                frame.mask.rotate_left(count % 4);
                frame.left -= count as u64;
                let last = frame.left == 0 && frame.fin;
                if frame.left == 0 {
                    self.frame = None;
                }
                self.in_message = !last;
                return Ok(Some(Event::Data { data, last }));
            }
            let Some(head) = parse_head(input)? else {
                return Ok(None);
            };
            if head.opcode < CLOSE {
                self.begin(&head)?;
                input.advance(head.size);
            } else {
                let length = usize::try_from(head.length).expect("control frames are short");
                if input.len() < head.size + length {
                    return Ok(None);
                }
                input.advance(head.size);
                let mut payload = input.split_to(length);
                unmask(&mut payload, head.mask);
                match head.opcode {
                    CLOSE if length == 1 => return Err(Violation::WebSocketControl),
                    CLOSE => return Ok(Some(Event::Close)),
                    PING => return Ok(Some(Event::Ping(payload))),
                    _ => {}
                }
            }
        }
    }

    /// Whether data is due that `next` gave no room for.
    pub fn is_within_frame(&self) -> bool {
        self.frame.is_some()
    }

    fn begin(&mut self, head: &Head) -> Result<(), Violation> {
        if (head.opcode == CONTINUATION) != self.in_message {
            return Err(Violation::WebSocketFragment);
        }
        if head.opcode == TEXT {
            return Err(Violation::WebSocketText);
        }
        self.frame = Some(Frame {
            left: head.length,
            fin: head.fin,
            mask: head.mask,
        });
        Ok(())
    }
}

fn parse_head(input: &BytesMut) -> Result<Option<Head>, Violation> {
    let Some((&[first, second], rest)) = input.split_first_chunk::<2>() else {
        return Ok(None);
    };
    let (fin, opcode) = (first & FIN != 0, first & 0x0f);
    if first & 0x70 != 0 {
        return Err(Violation::WebSocketReserved);
    }
    if !matches!(opcode, CONTINUATION | TEXT | BINARY | CLOSE | PING | PONG) {
        return Err(Violation::WebSocketOpcode(opcode));
    }
    if second & MASKED == 0 {
        return Err(Violation::WebSocketUnmasked);
    }
    let short = second & 0x7f;
    if opcode >= CLOSE && (!fin || short > 125) {
        return Err(Violation::WebSocketControl);
    }
    let (width, least) = match short {
        126 => (2, 126),
        127 => (8, 1 << 16),
        _ => (0, 0),
    };
    let Some((mut wide, rest)) = rest.split_at_checked(width) else {
        return Ok(None);
    };
    let length = if width == 0 {
        u64::from(short)
    } else {
        wide.get_uint(width)
    };
    if length < least || length >> 63 != 0 {
        return Err(Violation::WebSocketLength);
    }
    let size = 2 + width + 4;
    Ok(rest.first_chunk::<4>().map(|mask| Head {
        fin,
        opcode,
        length,
        mask: *mask,
        size,
    }))
}

fn unmask(data: &mut [u8], mask: [u8; 4]) {
    let (words, rest) = data.as_chunks_mut::<4>();
    for word in words {
        *word = (u32::from_ne_bytes(*word) ^ u32::from_ne_bytes(mask)).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask) {
        *byte ^= mask;
    }
}

/// The head of a whole message or control frame.
pub(super) fn put_head(out: &mut BytesMut, opcode: u8, length: usize) {
    out.put_u8(FIN | opcode);
    match length {
        0..126 => out.put_u8(length as u8),
        126..0x1_0000 => {
            out.put_u8(126);
            out.put_u16(length as u16);
        }
        _ => {
            out.put_u8(127);
            out.put_u64(length as u64);
        }
    }
}

pub(super) fn put_close(out: &mut BytesMut, code: CloseCode) {
    put_head(out, CLOSE, 2);
    out.put_u16(code as u16);
}

pub(super) fn put_pong(out: &mut BytesMut, payload: &[u8]) {
    put_head(out, PONG, payload.len());
    out.put_slice(payload);
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A frame as a client sends it.
    pub fn client(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = BytesMut::new();
        put_head(&mut out, 0, payload.len());
        out[0] = first;
        out[1] |= MASKED;
        let mask = [0x12, 0x34, 0x56, 0x78];
        out.put_slice(&mask);
        let at = out.len();
        out.put_slice(payload);
        unmask(&mut out[at..], mask);
        out.to_vec()
    }

    fn events(bytes: &[u8], at_once: usize, limit: usize) -> Result<Vec<Event>, Violation> {
        let (mut decoder, mut input, mut events) = (Decoder::default(), BytesMut::new(), Vec::new());
        for piece in bytes.chunks(at_once) {
            input.put_slice(piece);
            while let Some(event) = decoder.next(&mut input, limit)? {
                events.push(event);
            }
        }
        assert!(input.is_empty() && decoder.frame.is_none());
        Ok(events)
    }

    /// The messages in some events, put together.
    fn messages(events: &[Event]) -> Vec<Vec<u8>> {
        let mut messages = vec![Vec::new()];
        for event in events {
            if let Event::Data { data, last } = event {
                messages.last_mut().unwrap().extend_from_slice(data);
                if *last {
                    messages.push(Vec::new());
                }
            }
        }
        messages
    }

    #[test]
    fn messages_of_any_size_come_through_in_pieces_of_any_size() {
        for length in [0, 1, 125, 126, 127, 0xffff, 0x1_0000, 200_000] {
            let payload: Vec<u8> = (0..length).map(|n| n as u8).collect();
            let bytes = [client(FIN | BINARY, &payload), client(FIN | BINARY, b"next")].concat();
            for (at_once, limit) in [(usize::MAX, usize::MAX), (1021, 64), (3, 5)] {
                let messages = messages(&events(&bytes, at_once.min(bytes.len()), limit).unwrap());
                assert_eq!(messages, [payload.clone(), b"next".to_vec(), vec![]]);
            }
        }
    }

    #[test]
    fn control_frames_come_between_fragments() {
        let bytes = [
            client(BINARY, b"ab"),
            client(FIN | PING, b"?"),
            client(CONTINUATION, b""),
            client(FIN | PONG, b"!"),
            client(FIN | CONTINUATION, b"cd"),
            client(FIN | CLOSE, &1000u16.to_be_bytes()),
        ]
        .concat();
        let events = events(&bytes, 1, usize::MAX).unwrap();
        assert_eq!(messages(&events)[0], b"abcd");
        assert!(events.contains(&Event::Ping(BytesMut::from("?"))));
        assert_eq!(events.last(), Some(&Event::Close));
    }

    #[test]
    fn malformed_frames_are_told_apart() {
        use Violation as V;
        let cases: &[(&[u8], Violation)] = &[
            (&[0xc2, 0x80], V::WebSocketReserved),
            (&[0x83, 0x80], V::WebSocketOpcode(3)),
            (&[0x8b, 0x80], V::WebSocketOpcode(11)),
            (&[0x82, 0x01], V::WebSocketUnmasked),
            (&[0x09, 0x80], V::WebSocketControl),
            (&[0x89, 0xfe], V::WebSocketControl),
            (&[0x88, 0x81, 0, 0, 0, 0, 0], V::WebSocketControl),
            (&[0x82, 0xfe, 0, 125], V::WebSocketLength),
            (&[0x82, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff], V::WebSocketLength),
            (&[0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0], V::WebSocketLength),
            (&[0x80, 0x80, 0, 0, 0, 0], V::WebSocketFragment),
            (&[0x81, 0x80, 0, 0, 0, 0], V::WebSocketText),
        ];
        for (bytes, violation) in cases {
            let result = Decoder::default().next(&mut BytesMut::from(*bytes), usize::MAX);
            assert_eq!(result, Err(*violation), "{bytes:x?}");
        }
        let torn = [client(BINARY, b"a"), client(FIN | BINARY, b"b")].concat();
        assert_eq!(events(&torn, 100, 100), Err(V::WebSocketFragment));
    }
}
