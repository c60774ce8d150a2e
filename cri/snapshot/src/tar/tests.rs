//! What is written reads back; what others write is understood; what lies is refused.

use super::block::{self, Raw};
use super::*;
use std::io::Read;

fn round_trip(header: &Header, contents: &[u8]) -> (Header, Vec<u8>) {
    let mut writer = Writer::new(Vec::new());
    let header = Header {
        size: contents.len() as u64,
        ..header.clone()
    };
    writer.file(&header, &mut &contents[..]).unwrap();
    let (bytes, written) = writer.finish().unwrap();
    assert_eq!(bytes.len() as u64, written);
    assert_eq!(bytes.len() % BLOCK, 0);
    let mut reader = Reader::new(&bytes[..]);
    let read = reader.next_entry().unwrap().unwrap();
    let mut body = Vec::new();
    reader.read_to_end(&mut body).unwrap();
    assert!(reader.next_entry().unwrap().is_none());
    reader.finish().unwrap();
    (read, body)
}

/// A header block with a right checksum, made by hand.
fn raw(name: &[u8], kind: u8, size: u64) -> Raw {
    let mut raw: Raw = [0; BLOCK];
    raw[..name.len()].copy_from_slice(name);
    block::put_octal(&mut raw[block::MODE], 0o644);
    block::put_octal(&mut raw[block::UID], 0);
    block::put_octal(&mut raw[block::GID], 0);
    block::put_octal(&mut raw[block::SIZE], size);
    block::put_octal(&mut raw[block::MTIME], 0);
    raw[block::TYPE] = kind;
    raw[block::MAGIC].copy_from_slice(b"ustar  \0");
    block::seal(&mut raw);
    raw
}

#[test]
fn every_length_of_name_reads_back() {
    for length in [1, 99, 100, 101, 155, 156, 200, 255, 256, 257, 300, 4000] {
        for slash_every in [7usize, 90, 10_000] {
            let path: Vec<u8> = (0..length)
                .map(|i| {
                    if i % slash_every == slash_every - 1 {
                        b'/'
                    } else {
                        b'a'
                    }
                })
                .collect();
            if path.ends_with(b"/") {
                continue;
            }
            let (read, body) = round_trip(&Header::new(path.clone(), Kind::File), b"hello");
            assert_eq!(read.path, path, "length {length}, a slash every {slash_every}");
            assert_eq!(body, b"hello");
        }
    }
}

#[test]
fn what_ustar_cannot_hold_goes_through_pax() {
    let mut header = Header::new("x", Kind::File);
    header.uid = 3_000_000;
    header.gid = 4_294_967_294;
    header.mtime = Time {
        seconds: -5,
        nanos: 250_000_000,
    };
    header.mode = 0o4755;
    header.xattrs = vec![(b"security.capability".to_vec(), vec![1, 0, 0, 2, b'\n', b'='])];
    let (read, _) = round_trip(&header, b"");
    assert_eq!(read, header);
    let mut link = Header::new("l", Kind::Symlink);
    link.link = vec![b'z'; 300];
    let mut writer = Writer::new(Vec::new());
    writer.entry(&link).unwrap();
    let (bytes, _) = writer.finish().unwrap();
    assert_eq!(Reader::new(&bytes[..]).next_entry().unwrap().unwrap(), link);
}

#[test]
fn names_that_are_not_text_survive() {
    let path = b"\xff\xfe name \xc3\x28".to_vec();
    assert_eq!(
        round_trip(&Header::new(path.clone(), Kind::File), b"").0.path,
        path
    );
}

#[test]
fn the_long_names_of_gnu_tar_are_read() {
    let name = vec![b'n'; 150];
    let target = vec![b't'; 120];
    let mut bytes = Vec::new();
    for (kind, text) in [(b'L', &name), (b'K', &target)] {
        bytes.extend_from_slice(&raw(b"././@LongLink", kind, text.len() as u64 + 1));
        bytes.extend_from_slice(text);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    }
    bytes.extend_from_slice(&raw(b"short", b'2', 0));
    let header = Reader::new(&bytes[..]).next_entry().unwrap().unwrap();
    assert_eq!(
        (header.path, header.link, header.kind),
        (name, target, Kind::Symlink)
    );
}

#[test]
fn a_size_that_lies_is_an_error_not_a_hang() {
    let mut bytes = raw(b"big", b'0', 7 << 30).to_vec();
    bytes.extend_from_slice(&[7; 1000]);
    let mut reader = Reader::new(&bytes[..]);
    assert_eq!(reader.next_entry().unwrap().unwrap().size, 7 << 30);
    assert!(matches!(reader.next_entry(), Err(TarError::Truncated { .. })));
}

#[test]
fn an_extended_header_of_gigabytes_is_refused_before_it_is_read() {
    for kind in [b'x', b'g', b'L', b'K'] {
        let bytes = raw(b"x", kind, 7 << 30);
        let error = Reader::new(&bytes[..]).next_entry().unwrap_err();
        assert!(matches!(error, TarError::ExtendedTooLarge { .. }), "{error}");
    }
}

#[test]
fn damage_and_what_is_not_supported_is_named() {
    let mut bytes = raw(b"x", b'0', 0);
    bytes[0] = b'y';
    assert!(matches!(
        Reader::new(&bytes[..]).next_entry(),
        Err(TarError::Damaged { .. })
    ));
    for kind in [b'S', b'M', b'V', b'D', b'?'] {
        let bytes = raw(b"odd", kind, 0);
        let error = Reader::new(&bytes[..]).next_entry().unwrap_err();
        assert!(
            matches!(&error, TarError::Unsupported { name, .. } if name == "odd"),
            "{error}"
        );
    }
    let half = &raw(b"x", b'0', 0)[..100];
    assert!(matches!(
        Reader::new(half).next_entry(),
        Err(TarError::Truncated { .. })
    ));
}

#[test]
fn a_sparse_file_of_pax_is_refused_instead_of_read_wrong() {
    let body = b"22 GNU.sparse.major=1\n";
    let mut bytes = raw(b"pax", b'x', body.len() as u64).to_vec();
    bytes.extend_from_slice(body);
    bytes.resize(2 * BLOCK, 0);
    bytes.extend_from_slice(&raw(b"sparse", b'0', 0));
    assert!(matches!(
        Reader::new(&bytes[..]).next_entry(),
        Err(TarError::Pax { .. })
    ));
}

#[test]
fn an_archive_may_end_without_its_mark_and_a_huge_tail_is_refused() {
    let bytes = raw(b"only", b'0', 0);
    let mut reader = Reader::new(&bytes[..]);
    assert!(reader.next_entry().unwrap().is_some());
    assert!(reader.next_entry().unwrap().is_none());
    let mut endless = Reader::new(std::io::repeat(0));
    assert!(endless.next_entry().unwrap().is_none());
    assert!(matches!(endless.finish(), Err(TarError::Trailing)));
}

#[test]
fn a_directory_of_v7_and_a_hard_link_with_a_size_are_understood() {
    let mut old = raw(b"dir/", 0, 0);
    old[block::MAGIC].fill(0);
    block::seal(&mut old);
    let mut bytes = old.to_vec();
    let mut link = raw(b"link", b'1', 700);
    link[block::LINK][..4].copy_from_slice(b"dir/");
    block::seal(&mut link);
    bytes.extend_from_slice(&link);
    bytes.extend_from_slice(&raw(b"after", b'0', 0));
    let mut reader = Reader::new(&bytes[..]);
    let kinds: Vec<Kind> = std::iter::from_fn(|| reader.next_entry().unwrap())
        .map(|h| h.kind)
        .collect();
    assert_eq!(kinds, [Kind::Directory, Kind::HardLink, Kind::File]);
}

#[test]
fn extended_headers_that_never_come_to_an_entry_are_refused() {
    for kind in [b'x', b'g', b'L', b'K'] {
        let body: &[u8] = match kind {
            b'x' | b'g' => b"12 path=abc\n",
            _ => b"abc\0",
        };
        let stream = |headers: usize| {
            let mut bytes = Vec::new();
            for _ in 0..headers {
                bytes.extend(raw(b"e", kind, body.len() as u64));
                bytes.extend(body);
                bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
            }
            bytes.extend(raw(b"f", b'0', 0));
            bytes.extend([0; 2 * BLOCK]);
            bytes
        };
        assert!(Reader::new(&stream(8)[..]).next_entry().unwrap().is_some());
        let error = Reader::new(&stream(9)[..]).next_entry().unwrap_err();
        assert!(matches!(error, TarError::TooManyExtended { .. }), "{error}");
        // Also those that never end.
        let mut one = stream(1);
        one.truncate(2 * BLOCK);
        let endless = std::iter::repeat_with(|| one.clone()).take(1 << 20);
        let mut read = 0;
        let counted = endless.flatten().inspect(|_| read += 1);
        let error = Reader::new(Bytes(counted)).next_entry().unwrap_err();
        assert!(matches!(error, TarError::TooManyExtended { .. }), "{error}");
        assert!(read < 20 * BLOCK, "{read}");
    }
}

struct Bytes<I>(I);

impl<I: Iterator<Item = u8>> Read for Bytes<I> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut n = 0;
        for (to, from) in buffer.iter_mut().zip(&mut self.0) {
            *to = from;
            n += 1;
        }
        Ok(n)
    }
}
