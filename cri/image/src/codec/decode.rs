//! Reading: the format is told by the first bytes, not by what anybody says it is.

use flate2::bufread::MultiGzDecoder;
use std::io::{self, BufReader, Chain, Cursor, Read};

/// Read at a time: large enough for hashing underneath to be cheap.
const BUFFER: usize = 256 << 10;
/// The largest window of a zstd frame, as a power of two: 128 MiB, zstd's own limit for untrusted input.
const ZSTD_WINDOW: u32 = 27;

/// How a stream is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Gzip,
    Zstd,
    Plain,
}

/// Reads a compressed stream; several gzip members or zstd frames read as one.
pub(crate) fn decoder<'a>(mut source: Box<dyn Read + 'a>) -> io::Result<(Format, Box<dyn Read + 'a>)> {
    let mut first = Vec::with_capacity(4);
    source.by_ref().take(4).read_to_end(&mut first)?;
    let format = match first.as_slice() {
        [0x1f, 0x8b, ..] => Format::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd] => Format::Zstd,
        // A skippable frame may come first: lazily pulled formats put an index there.
        [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Format::Zstd,
        _ => Format::Plain,
    };
    let source: Chain<Cursor<Vec<u8>>, Box<dyn Read + 'a>> = Cursor::new(first).chain(source);
    let reader: Box<dyn Read + 'a> = match format {
        Format::Plain => Box::new(source),
        Format::Gzip => Box::new(MultiGzDecoder::new(BufReader::with_capacity(BUFFER, source))),
        Format::Zstd => {
            let mut decoder =
                zstd::stream::read::Decoder::with_buffer(BufReader::with_capacity(BUFFER, source))?;
            decoder.window_log_max(ZSTD_WINDOW)?;
            Box::new(decoder)
        }
    };
    Ok((format, reader))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn decode(bytes: Vec<u8>) -> io::Result<(Format, Vec<u8>)> {
        let (format, mut reader) = decoder(Box::new(Cursor::new(bytes)))?;
        let mut decoded = Vec::new();
        reader.read_to_end(&mut decoded)?;
        Ok((format, decoded))
    }

    #[test]
    fn every_format_is_told_by_its_first_bytes() {
        let members = [gzip(b"one "), gzip(b""), gzip(b"two")].concat();
        assert_eq!(decode(members).unwrap(), (Format::Gzip, b"one two".to_vec()));
        let frame = |bytes: &[u8]| zstd::bulk::compress(bytes, 1).unwrap();
        let skippable = b"\x5a\x2a\x4d\x18\x03\0\0\0abc".to_vec();
        let frames = [skippable, frame(b"one "), frame(b"two")].concat();
        assert_eq!(decode(frames).unwrap(), (Format::Zstd, b"one two".to_vec()));
        for plain in [&b""[..], b"x", b"plain tar"] {
            assert_eq!(decode(plain.to_vec()).unwrap(), (Format::Plain, plain.to_vec()));
        }
    }

    #[test]
    fn a_cut_or_changed_stream_is_an_error() {
        let whole = gzip(&[7; 100_000]);
        assert!(decode(whole[..whole.len() - 4].to_vec()).is_err());
        let mut changed = whole;
        let at = changed.len() - 6;
        changed[at] ^= 1;
        assert!(decode(changed).is_err());
        let frame = zstd::bulk::compress(&[7; 100_000], 1).unwrap();
        assert!(decode(frame[..frame.len() - 3].to_vec()).is_err());
    }
}
