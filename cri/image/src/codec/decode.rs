//! Reading: the format is told by the first bytes, not by what anybody says it is.
//!
//! A frame of zstd says how much of what it decoded before it refers to, and so how much memory it takes to read it.
//! What is usual can be read by everybody at once; a reader of more than that has to be asked for, and whoever asks
//! bounds how many there are at a time.

use flate2::bufread::MultiGzDecoder;
use oci_spec::image::MediaType;
use std::io::{self, BufReader, Chain, Cursor, Read};
use zstd::stream::raw::{DParameter, InBuffer, Operation, OutBuffer, WriteBuf};
use zstd::zstd_safe::{self, DCtx, ResetDirective};

/// Read at a time: large enough for hashing underneath to be cheap.
const BUFFER: usize = 256 << 10;
/// How much memory a zstd frame may take to be read, as a power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Window {
    /// 8 MiB: what RFC 8878 (3.1.1.1.2) wants every reader to support, and what zstd makes up to level 19.
    Usual,
    /// 128 MiB, zstd's own limit for untrusted input: levels 20 to 22, `--long`, other encoders' best.
    Large,
}

impl Window {
    fn log(self) -> u32 {
        match self {
            Window::Usual => 23,
            Window::Large => 27,
        }
    }
}

/// A frame takes more memory than the reader has. Inside an [`io::Error`].
#[derive(Debug, thiserror::Error)]
#[error("a zstd frame has a window of more than {} MiB", (1u64 << log) >> 20)]
pub(crate) struct WindowTooLarge {
    log: u32,
}

impl WindowTooLarge {
    /// Whether this is why a stream could not be read, and a larger window would do.
    pub(crate) fn is_cause(error: &io::Error) -> bool {
        let inner = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<WindowTooLarge>());
        inner.is_some_and(|inner| inner.log < Window::Large.log())
    }
}

/// How a stream is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Gzip,
    Zstd,
    Plain,
}

impl Format {
    /// What a layer of this format is called in a manifest.
    pub(crate) fn media_type(self) -> MediaType {
        match self {
            Format::Gzip => MediaType::ImageLayerGzip,
            Format::Zstd => MediaType::ImageLayerZstd,
            Format::Plain => MediaType::ImageLayer,
        }
    }
}

/// Reads a compressed stream; several gzip members or zstd frames read as one.
pub(crate) fn decoder<'a>(
    mut source: Box<dyn Read + 'a>,
    window: Window,
) -> io::Result<(Format, Box<dyn Read + 'a>)> {
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
            let source = BufReader::with_capacity(BUFFER, source);
            Box::new(zstd::stream::zio::Reader::new(source, Zstd::new(window)?))
        }
    };
    Ok((format, reader))
}

/// As zstd's own, and tells apart the one error that has a remedy.
struct Zstd {
    context: DCtx<'static>,
    log: u32,
}

impl Zstd {
    fn new(window: Window) -> io::Result<Zstd> {
        let log = window.log();
        let mut zstd = Zstd {
            context: DCtx::create(),
            log,
        };
        let set = zstd.context.set_parameter(DParameter::WindowLogMax(log));
        set.map_err(|code| zstd.error(code))?;
        Ok(zstd)
    }

    fn error(&self, code: usize) -> io::Error {
        /// `ZSTD_error_frameParameter_windowTooLarge`; results are negated numbers (zstd_errors.h).
        const TOO_LARGE: usize = 0usize.wrapping_sub(16);
        match code {
            TOO_LARGE => io::Error::other(WindowTooLarge { log: self.log }),
            code => io::Error::other(zstd_safe::get_error_name(code)),
        }
    }
}

impl Operation for Zstd {
    fn run<C: WriteBuf + ?Sized>(
        &mut self,
        input: &mut InBuffer<'_>,
        output: &mut OutBuffer<'_, C>,
    ) -> io::Result<usize> {
        let ran = self.context.decompress_stream(output, input);
        ran.map_err(|code| self.error(code))
    }

    fn reinit(&mut self) -> io::Result<()> {
        let reset = self.context.reset(ResetDirective::SessionOnly);
        reset.map(drop).map_err(|code| self.error(code))
    }

    fn finish<C: WriteBuf + ?Sized>(
        &mut self,
        _: &mut OutBuffer<'_, C>,
        finished_frame: bool,
    ) -> io::Result<usize> {
        match finished_frame {
            true => Ok(0),
            false => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "incomplete frame")),
        }
    }
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
        let (format, mut reader) = decoder(Box::new(Cursor::new(bytes)), Window::Usual)?;
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

    #[test]
    fn a_large_window_is_refused_by_name_until_it_is_asked_for() {
        let contents = vec![7; 20 << 20];
        for log in [23, 25, 27, 28] {
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
            encoder.long_distance_matching(true).unwrap();
            encoder.window_log(log).unwrap();
            encoder.write_all(&contents).unwrap();
            // The first frame is small: what a later one wants is seen when it comes.
            let frames = [zstd::bulk::compress(b"x", 1).unwrap(), encoder.finish().unwrap()].concat();
            let read = |window| {
                let (_, mut reader) = decoder(Box::new(Cursor::new(frames.clone())), window)?;
                io::copy(&mut reader, &mut io::sink())
            };
            match (log, read(Window::Usual)) {
                (23, usual) => assert_eq!(usual.unwrap(), 1 + (20 << 20)),
                (_, usual) => assert!(WindowTooLarge::is_cause(&usual.unwrap_err())),
            }
            match (log, read(Window::Large)) {
                (28, large) => {
                    let error = large.unwrap_err();
                    assert!(!WindowTooLarge::is_cause(&error), "nothing helps");
                    assert!(error.to_string().contains("128 MiB"), "{error}");
                }
                (_, large) => assert_eq!(large.unwrap(), 1 + (20 << 20)),
            }
        }
    }
}
