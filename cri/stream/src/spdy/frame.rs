//! SPDY/3.1 frames as bytes (draft 3.1, sections 2.2 and 2.6). All numbers are big-endian.
//!
//! ```text
//! data     │0│ stream 31 │ flags 8 │ length 24 │ data
//! control  │1│ version 15 │ type 16 │ flags 8 │ length 24 │ payload
//! ```

use bytes::{BufMut, BytesMut};

pub(super) const HEAD: usize = 8;
pub(super) const VERSION: u16 = 3;

pub(super) const SYN_STREAM: u16 = 1;
pub(super) const SYN_REPLY: u16 = 2;
pub(super) const RST_STREAM: u16 = 3;
pub(super) const SETTINGS: u16 = 4;
pub(super) const PING: u16 = 6;
pub(super) const GOAWAY: u16 = 7;
pub(super) const HEADERS: u16 = 8;
pub(super) const WINDOW_UPDATE: u16 = 9;

pub(super) const FLAG_FIN: u8 = 1;
pub(super) const FLAG_UNIDIRECTIONAL: u8 = 2;

pub(super) const SETTING_MAX_CONCURRENT_STREAMS: u32 = 4;
pub(super) const SETTING_INITIAL_WINDOW_SIZE: u32 = 7;

pub(super) const GOAWAY_OK: u32 = 0;
pub(super) const GOAWAY_PROTOCOL_ERROR: u32 = 1;

/// Why a stream is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Reset {
    ProtocolError = 1,
    InvalidStream = 2,
    RefusedStream = 3,
    Cancel = 5,
    FlowControlError = 7,
    StreamAlreadyClosed = 9,
}

/// The first eight bytes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Head {
    Data {
        stream: u32,
        flags: u8,
        length: usize,
    },
    Control {
        version: u16,
        kind: u16,
        flags: u8,
        length: usize,
    },
}

impl Head {
    pub fn parse(bytes: [u8; HEAD]) -> Head {
        let first = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let flags = bytes[4];
        let length = u32::from_be_bytes([0, bytes[5], bytes[6], bytes[7]]) as usize;
        if first >> 31 == 0 {
            return Head::Data {
                stream: first,
                flags,
                length,
            };
        }
        let [kind_high, kind_low] = [bytes[2], bytes[3]];
        Head::Control {
            version: u16::from_be_bytes([bytes[0], bytes[1]]) & 0x7fff,
            kind: u16::from_be_bytes([kind_high, kind_low]),
            flags,
            length,
        }
    }
}

fn control(out: &mut BytesMut, kind: u16, flags: u8, length: usize) {
    out.put_u16(0x8000 | VERSION);
    out.put_u16(kind);
    out.put_u8(flags);
    out.put_uint(length as u64, 3);
}

pub(super) fn put_data(out: &mut BytesMut, stream: u32, flags: u8, data: &[u8]) {
    out.put_u32(stream);
    out.put_u8(flags);
    out.put_uint(data.len() as u64, 3);
    out.put_slice(data);
}

pub(super) fn put_syn_reply(out: &mut BytesMut, stream: u32, block: &[u8]) {
    control(out, SYN_REPLY, 0, 4 + block.len());
    out.put_u32(stream);
    out.put_slice(block);
}

pub(super) fn put_reset(out: &mut BytesMut, stream: u32, why: Reset) {
    control(out, RST_STREAM, 0, 8);
    out.put_u32(stream);
    out.put_u32(why as u32);
}

pub(super) fn put_settings(out: &mut BytesMut, settings: &[(u32, u32)]) {
    control(out, SETTINGS, 0, 4 + 8 * settings.len());
    out.put_u32(u32::try_from(settings.len()).expect("a handful of settings"));
    for (id, value) in settings {
        out.put_u32(*id);
        out.put_u32(*value);
    }
}

pub(super) fn put_ping(out: &mut BytesMut, id: u32) {
    control(out, PING, 0, 4);
    out.put_u32(id);
}

pub(super) fn put_goaway(out: &mut BytesMut, last_stream: u32, status: u32) {
    control(out, GOAWAY, 0, 8);
    out.put_u32(last_stream);
    out.put_u32(status);
}

pub(super) fn put_window_update(out: &mut BytesMut, stream: u32, delta: u32) {
    control(out, WINDOW_UPDATE, 0, 8);
    out.put_u32(stream);
    out.put_u32(delta);
}
