//! ttrpc's frames: a ten-byte header, then at most 4 MiB of data.
//!
//! ```text
//!  0        4        8   9   10
//!  | length | stream |typ|flg| data …      (big-endian; a client's streams are odd)
//! ```
//! A request without flags is unary and is answered by one response on the same stream; the shim knows no other kind.

/// Bytes of a frame's header.
pub const HEADER: usize = 10;
/// The longest data of a frame.
pub const MAX_DATA: usize = 4 << 20;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Begins a stream with a `ttrpc.Request`.
    Request,
    /// Ends a stream with a `ttrpc.Response`.
    Response,
    /// Stream data.
    Data,
    /// Something of a later protocol; to be skipped.
    Other(u8),
}

impl Kind {
    fn from_byte(byte: u8) -> Kind {
        match byte {
            1 => Kind::Request,
            2 => Kind::Response,
            3 => Kind::Data,
            other => Kind::Other(other),
        }
    }

    fn byte(self) -> u8 {
        match self {
            Kind::Request => 1,
            Kind::Response => 2,
            Kind::Data => 3,
            Kind::Other(byte) => byte,
        }
    }
}

/// The ten bytes before a frame's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Length of the data in bytes.
    pub length: u32,
    /// Which call the frame belongs to.
    pub stream: u32,
    /// What the data is.
    pub kind: Kind,
    /// Meaning depends on the kind.
    pub flags: u8,
}

/// A header that cannot be one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a frame on stream {stream} announces {length} bytes, more than the {MAX_DATA} a frame may hold")]
pub struct TooLong {
    /// The stream it names.
    pub stream: u32,
    /// The length it names.
    pub length: u32,
}

impl Header {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&self.length.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.stream.to_be_bytes());
        bytes[8] = self.kind.byte();
        bytes[9] = self.flags;
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// When it announces more data than a frame may hold: what follows cannot be told apart any more.
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Header, TooLong> {
        let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let header = Header {
            length: word(0),
            stream: word(4),
            kind: Kind::from_byte(bytes[8]),
            flags: bytes[9],
        };
        if header.length as usize > MAX_DATA {
            return Err(TooLong {
                stream: header.stream,
                length: header.length,
            });
        }
        Ok(header)
    }
}

/// A whole frame around a message.
///
/// # Errors
/// When the message is longer than a frame may hold.
pub fn encode(stream: u32, kind: Kind, message: &impl prost::Message) -> Result<Vec<u8>, TooLong> {
    let length = message.encoded_len();
    let too_long = TooLong {
        stream,
        length: u32::try_from(length).unwrap_or(u32::MAX),
    };
    if length > MAX_DATA {
        return Err(too_long);
    }
    let mut frame = Vec::with_capacity(HEADER + length);
    frame.extend_from_slice(
        &Header {
            length: too_long.length,
            stream,
            kind,
            flags: 0,
        }
        .encode(),
    );
    message.encode(&mut frame).map_err(|_| too_long)?;
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_ten_big_endian_bytes() {
        let header = Header {
            length: 0x0001_0203,
            stream: 5,
            kind: Kind::Request,
            flags: 1,
        };
        assert_eq!(header.encode(), [0, 1, 2, 3, 0, 0, 0, 5, 1, 1]);
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn a_header_announcing_more_than_four_mebibytes_is_refused() {
        let bytes = Header {
            length: (MAX_DATA + 1) as u32,
            stream: 7,
            kind: Kind::Request,
            flags: 0,
        }
        .encode();
        assert_eq!(
            Header::decode(&bytes),
            Err(TooLong {
                stream: 7,
                length: (MAX_DATA + 1) as u32
            })
        );
    }

    #[test]
    fn an_unknown_kind_is_kept_for_skipping() {
        let bytes = [0, 0, 0, 1, 0, 0, 0, 1, 9, 0];
        assert_eq!(Header::decode(&bytes).map(|h| h.kind), Ok(Kind::Other(9)));
    }

    #[test]
    fn a_frame_holds_its_message() {
        let request = crate::ttrpc::Request {
            service: "s".into(),
            method: "m".into(),
            ..Default::default()
        };
        let frame = encode(3, Kind::Request, &request).expect("short");
        let header = Header::decode(frame[..HEADER].try_into().expect("ten bytes")).expect("a header");
        assert_eq!(
            (header.length as usize, header.stream, header.kind),
            (frame.len() - HEADER, 3, Kind::Request)
        );
        let back: crate::ttrpc::Request = prost::Message::decode(&frame[HEADER..]).expect("a request");
        assert_eq!(back, request);
    }
}
