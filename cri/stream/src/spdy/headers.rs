//! Header blocks: names and values, deflated with one context for each direction of a connection (draft 3.1, 2.6.10).
//!
//! What comes in is bounded before and after decompression: a block that would unfold to more than [`MAX_BLOCK`] ends the
//! connection, since the context cannot go on without having been through all of it.

use std::collections::HashSet;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::dictionary::DICTIONARY;
use crate::mux::Headers;
use crate::violation::Violation;

/// What a header block may unfold to; a client's has about a hundred bytes.
pub(super) const MAX_BLOCK: usize = 16 << 10;
/// How many headers a block may have.
const MAX_HEADERS: usize = 64;

/// Unfolds the header blocks of one direction.
pub(super) struct Inflater(Decompress);

impl Inflater {
    pub fn new() -> Inflater {
        Inflater(Decompress::new(true))
    }

    /// Decompresses one block. It must be given all of them, in order.
    pub fn inflate(&mut self, mut block: &[u8]) -> Result<Vec<u8>, Violation> {
        let mut plain = Vec::with_capacity(MAX_BLOCK + 1);
        loop {
            let before = (self.0.total_in(), plain.len());
            let status = self.0.decompress_vec(block, &mut plain, FlushDecompress::Sync);
            let taken = usize::try_from(self.0.total_in() - before.0).unwrap_or(block.len());
            block = &block[taken.min(block.len())..];
            match status {
                Ok(Status::Ok | Status::BufError) => {}
                Ok(Status::StreamEnd) => return Err(Violation::SpdyCompression),
                Err(error) => {
                    error.needs_dictionary().ok_or(Violation::SpdyCompression)?;
                    self.0
                        .set_dictionary(DICTIONARY)
                        .map_err(|_| Violation::SpdyCompression)?;
                    continue;
                }
            }
            if plain.len() > MAX_BLOCK {
                return Err(Violation::SpdyHeaderBomb(MAX_BLOCK));
            }
            if block.is_empty() {
                return Ok(plain);
            }
            if (self.0.total_in(), plain.len()) == before {
                return Err(Violation::SpdyCompression);
            }
        }
    }
}

/// Folds the header blocks of one direction.
pub(super) struct Deflater(Compress);

impl Deflater {
    pub fn new() -> Deflater {
        // A window of 2 KiB holds the dictionary; what we send is nearly nothing, and each connection keeps one.
        let mut deflate = Compress::new_with_window_bits(Compression::fast(), true, 11);
        deflate
            .set_dictionary(DICTIONARY)
            .expect("a new context takes a dictionary");
        Deflater(deflate)
    }

    /// A block without headers, which is all the server sends.
    pub fn empty_block(&mut self) -> Vec<u8> {
        let mut block = Vec::with_capacity(64);
        self.0
            .compress_vec(&0u32.to_be_bytes(), &mut block, FlushCompress::Sync)
            .expect("four bytes can be compressed into sixty-four");
        block
    }
}

/// Reads the names and values of an unfolded block; `None` when it is not one.
pub(super) fn parse(mut block: &[u8]) -> Option<Headers> {
    let count = take_u32(&mut block)?;
    if count > MAX_HEADERS {
        return None;
    }
    let mut names = HashSet::new();
    let mut headers = Vec::with_capacity(count);
    for _ in 0..count {
        let name = take_text(&mut block)?;
        let value = take_text(&mut block)?;
        let lower = !name.bytes().any(|byte| byte.is_ascii_uppercase());
        if name.is_empty() || !lower || !names.insert(name.clone()) {
            return None;
        }
        headers.push((name, value));
    }
    block.is_empty().then_some(Headers(headers))
}

fn take_u32(block: &mut &[u8]) -> Option<usize> {
    let (number, rest) = block.split_first_chunk::<4>()?;
    *block = rest;
    usize::try_from(u32::from_be_bytes(*number)).ok()
}

fn take_text(block: &mut &[u8]) -> Option<String> {
    let length = take_u32(block)?;
    let (text, rest) = block.split_at_checked(length)?;
    *block = rest;
    String::from_utf8(text.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::Noise;

    fn deflate(context: &mut Compress, plain: &[u8]) -> Vec<u8> {
        let mut block = Vec::with_capacity(plain.len() + 128);
        context
            .compress_vec(plain, &mut block, FlushCompress::Sync)
            .unwrap();
        block
    }

    fn client() -> Compress {
        let mut context = Compress::new(Compression::best(), true);
        context.set_dictionary(DICTIONARY).unwrap();
        context
    }

    fn block(headers: &[(&str, &str)]) -> Vec<u8> {
        let mut plain = u32::try_from(headers.len()).unwrap().to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
            plain.extend(text.as_bytes());
        }
        plain
    }

    #[test]
    fn blocks_share_one_context() {
        let (mut context, mut inflater) = (client(), Inflater::new());
        for (name, value) in [("streamtype", "error"), ("streamtype", "stdin"), ("accept", "*")] {
            let plain = block(&[(name, value)]);
            let unfolded = inflater.inflate(&deflate(&mut context, &plain)).unwrap();
            assert_eq!(unfolded, plain);
            assert_eq!(parse(&unfolded).unwrap().get(name), value);
        }
    }

    #[test]
    fn our_blocks_can_be_read_with_the_dictionary() {
        let (mut deflater, mut inflater) = (Deflater::new(), Inflater::new());
        for _ in 0..3 {
            let folded = deflater.empty_block();
            assert_eq!(
                parse(&inflater.inflate(&folded).unwrap()),
                Some(Headers::default())
            );
        }
    }

    #[test]
    fn a_bomb_is_refused_before_it_unfolds() {
        let mut context = client();
        let bomb = deflate(&mut context, &vec![b'a'; 10 << 20]);
        assert!(bomb.len() < 64 << 10);
        assert_eq!(
            Inflater::new().inflate(&bomb),
            Err(Violation::SpdyHeaderBomb(MAX_BLOCK))
        );
        let mut inflater = Inflater::new();
        let fits = deflate(&mut client(), &vec![b'a'; MAX_BLOCK]);
        assert_eq!(inflater.inflate(&fits).unwrap().len(), MAX_BLOCK);
    }

    #[test]
    fn what_is_not_compressed_or_with_another_dictionary_is_refused() {
        assert_eq!(
            Inflater::new().inflate(b"plain text"),
            Err(Violation::SpdyCompression)
        );
        let mut other = Compress::new(Compression::fast(), true);
        other.set_dictionary(b"another dictionary").unwrap();
        let folded = deflate(&mut other, b"x");
        assert_eq!(Inflater::new().inflate(&folded), Err(Violation::SpdyCompression));
        let mut ended = Vec::with_capacity(64);
        client()
            .compress_vec(b"last", &mut ended, FlushCompress::Finish)
            .unwrap();
        assert_eq!(Inflater::new().inflate(&ended), Err(Violation::SpdyCompression));
    }

    #[test]
    fn malformed_blocks_are_no_headers() {
        assert_eq!(parse(&block(&[])), Some(Headers::default()));
        let good = block(&[("port", "80"), ("requestid", "0")]);
        assert!(parse(&good).is_some());
        for length in 0..good.len() {
            assert_eq!(parse(&good[..length]), None, "{length}");
        }
        let trailing = [good.as_slice(), b"x"].concat();
        let many: Vec<String> = (0..=MAX_HEADERS).map(|n| n.to_string()).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|name| (name.as_str(), "")).collect();
        for bad in [
            trailing,
            block(&[("Port", "80")]),
            block(&[("", "80")]),
            block(&[("port", "80"), ("port", "81")]),
            block(&many),
            vec![0xff; 64],
        ] {
            assert_eq!(parse(&bad), None);
        }
    }

    #[test]
    fn no_bytes_whatever_break_the_parser_or_its_bounds() {
        let mut noise = Noise::of(5);
        let headers = [
            ("streamtype", "data"),
            ("port", "80"),
            ("requestid", "0"),
            ("x", ""),
        ];
        for _ in 0..Noise::rounds(3000) {
            let good = block(&headers[..noise.below(headers.len() + 1)]);
            let plain = noise.damage(&good);
            if let Some(Headers(read)) = parse(&plain) {
                let size: usize = read.iter().map(|(name, value)| name.len() + value.len()).sum();
                assert!(read.len() <= MAX_HEADERS && size < plain.len());
            }
            // The same through the decompressor, which goes on after a block that is no headers.
            let (mut context, mut inflater) = (client(), Inflater::new());
            assert_eq!(inflater.inflate(&deflate(&mut context, &plain)).unwrap(), plain);
            let folded = noise.damage(&deflate(&mut context, &good));
            if let Ok(unfolded) = inflater.inflate(&folded) {
                assert!(unfolded.len() <= MAX_BLOCK);
                parse(&unfolded);
            }
        }
    }
}
