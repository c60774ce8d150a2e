//! Encoders for layers made here: the same tar gives the same bytes, whatever the machine and its processors.
//!
//! gzip is cut into members of 1 MiB, zstd into frames of 4 MiB: both standards say that a reader takes them for one
//! stream, and every registry client does. Encoder, version and level are part of a variant's name, so that a newer
//! encoder makes another variant and never another version of an old one. The tests hold the bytes still.

use super::blocks::Blocks;
use crate::store::Compression;
use std::io::{self, Write};
use std::sync::Arc;

const GZIP_BLOCK: usize = 1 << 20;
const ZSTD_BLOCK: usize = 4 << 20;
/// Raised when the bytes change: with another block size, or a library that compresses differently.
const GZIP_VERSION: &str = "gzip-1m-zlib-rs-1";
const ZSTD_VERSION: &str = "zstd-4m-1.5.7-1";

/// The name under which a variant is recorded: encoder, version, level.
pub(crate) fn encoder_name(compression: Compression) -> String {
    match compression {
        Compression::Gzip(level) => format!("{GZIP_VERSION}/{}", gzip_level(level)),
        Compression::Zstd(level) => format!("{ZSTD_VERSION}/{}", zstd_level(level)),
        Compression::None => "tar".to_owned(),
    }
}

/// What [`encoder_name`] was given; `None` for the name of another version of ours.
pub(crate) fn encoder_named(name: &str) -> Option<Compression> {
    encoders().find(|compression| encoder_name(*compression) == name)
}

/// The names of all encoders that this version has.
pub(crate) fn encoder_names() -> Vec<String> {
    encoders().map(encoder_name).collect()
}

fn encoders() -> impl Iterator<Item = Compression> {
    let gzip = (1..=9).map(Compression::Gzip);
    let zstd = (1..=19).map(Compression::Zstd);
    gzip.chain(zstd).chain([Compression::None])
}

fn gzip_level(level: u32) -> u32 {
    level.clamp(1, 9)
}

fn zstd_level(level: i32) -> i32 {
    level.clamp(1, 19)
}

/// Compresses what is written to it.
pub(crate) enum Encoder<W: Write> {
    Blocks(Box<dyn FinishBlocks<W>>),
    Plain(W),
}

/// [`Blocks`], whatever its encoder.
pub(crate) trait FinishBlocks<W>: Write {
    fn finish_blocks(self: Box<Self>) -> io::Result<W>;
}

impl<W: Write> FinishBlocks<W> for Blocks<W> {
    fn finish_blocks(self: Box<Self>) -> io::Result<W> {
        self.finish()
    }
}

impl<W: Write + 'static> Encoder<W> {
    pub(crate) fn new(compression: Compression, out: W, threads: usize) -> Encoder<W> {
        match compression {
            Compression::Gzip(level) => {
                let level = gzip_level(level);
                let encode = Arc::new(move |block: &[u8]| gzip_member(block, level));
                Encoder::Blocks(Box::new(Blocks::new(out, GZIP_BLOCK, threads, encode)))
            }
            Compression::Zstd(level) => {
                let level = zstd_level(level);
                let encode = Arc::new(move |block: &[u8]| zstd::bulk::compress(block, level));
                Encoder::Blocks(Box::new(Blocks::new(out, ZSTD_BLOCK, threads, encode)))
            }
            Compression::None => Encoder::Plain(out),
        }
    }

    /// Writes everything, and hands the stream back.
    pub(crate) fn finish(self) -> io::Result<W> {
        match self {
            Encoder::Blocks(blocks) => blocks.finish_blocks(),
            Encoder::Plain(out) => Ok(out),
        }
    }
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Encoder::Blocks(blocks) => blocks.write(bytes),
            Encoder::Plain(out) => out.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One member: no name, no time, operating system "unknown".
fn gzip_member(block: &[u8], level: u32) -> io::Result<Vec<u8>> {
    let out = Vec::with_capacity(block.len() / 2 + 64);
    let mut encoder = flate2::GzBuilder::new()
        .mtime(0)
        .operating_system(255)
        .write(out, flate2::Compression::new(level));
    encoder.write_all(block)?;
    encoder.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Window, decoder};
    use crate::digest::Digest;
    use std::io::{Cursor, Read};

    /// Neither random nor uniform, 3.5 MiB.
    fn sample() -> Vec<u8> {
        let mut state = 1u64;
        let mut out = Vec::new();
        while out.len() < (7 << 19) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let word = format!("word{} ", state % 5000);
            out.extend_from_slice(word.as_bytes());
            if state.is_multiple_of(64) {
                out.extend_from_slice(&state.to_le_bytes());
            }
        }
        out
    }

    fn encode(compression: Compression, threads: usize, input: &[u8]) -> Vec<u8> {
        let mut encoder = Encoder::new(compression, Vec::new(), threads);
        for part in input.chunks(77_777) {
            encoder.write_all(part).unwrap();
        }
        encoder.finish().unwrap()
    }

    const ALL: [Compression; 4] = [
        Compression::Gzip(1),
        Compression::Gzip(6),
        Compression::Zstd(1),
        Compression::Zstd(3),
    ];

    #[test]
    fn the_bytes_do_not_depend_on_the_number_of_threads_and_read_back() {
        let input = sample();
        for compression in ALL {
            let one = encode(compression, 1, &input);
            assert_eq!(one, encode(compression, 3, &input), "{compression:?}");
            let (_, mut reader) = decoder(Box::new(Cursor::new(one)), Window::Usual).unwrap();
            let mut back = Vec::new();
            reader.read_to_end(&mut back).unwrap();
            assert!(back == input, "{compression:?}");
        }
        assert_eq!(encode(Compression::None, 2, b"as it is"), b"as it is");
    }

    #[test]
    fn an_empty_stream_is_one_empty_member_or_frame() {
        for compression in ALL {
            let empty = encode(compression, 2, b"");
            assert!(!empty.is_empty());
            let (_, mut reader) = decoder(Box::new(Cursor::new(empty)), Window::Usual).unwrap();
            assert_eq!(reader.read(&mut [0; 8]).unwrap(), 0);
        }
    }

    /// When this fails a library has changed what it writes: raise the version in the encoder's name.
    #[test]
    fn the_bytes_are_those_recorded_for_this_version() {
        let input = sample();
        let digests: Vec<String> = ALL
            .iter()
            .map(|c| format!("{} {}", encoder_name(*c), Digest::of(&encode(*c, 2, &input))))
            .collect();
        let golden = include_str!("golden.txt");
        assert_eq!(digests.join("\n"), golden.trim());
    }

    #[test]
    fn a_sink_that_fails_fails_the_encoder_and_leaves_no_thread_waiting() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut encoder = Encoder::new(Compression::Gzip(1), Full, 2);
        let written = encoder
            .write_all(&vec![0; 20 << 20])
            .and_then(|()| encoder.finish().map(|_| ()));
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
