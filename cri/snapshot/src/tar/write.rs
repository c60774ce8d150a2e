//! Writing an archive: the same entries give the same bytes, on any machine.
//!
//! A value that fits ustar is written as ustar; any other goes into one pax header in front of the entry. There
//! are no user and group names and no padding beyond the two blocks of the end mark.

use super::block::{self, Raw};
use super::pax::Records;
use super::{BLOCK, Header, Kind, Time};
use std::io::{self, Read, Write};

/// Bytes gathered before they are written out: large enough for hashing and system calls to be cheap.
const BUFFER: usize = 256 << 10;

/// Writes a tar stream.
pub struct Writer<W: Write> {
    out: W,
    buffer: Vec<u8>,
    flushed: u64,
}

impl<W: Write> Writer<W> {
    /// Writes to `out` in pieces of up to 256 KiB.
    pub fn new(out: W) -> Writer<W> {
        Writer {
            out,
            buffer: Vec::with_capacity(BUFFER),
            flushed: 0,
        }
    }

    /// Writes an entry without contents.
    ///
    /// # Errors
    /// What `out` says.
    pub fn entry(&mut self, header: &Header) -> io::Result<()> {
        self.head(&Header {
            size: 0,
            ..header.clone()
        })
    }

    /// Writes a file with exactly `header.size` bytes from `contents`.
    ///
    /// # Errors
    /// `UnexpectedEof` when `contents` ends early; what `out` and `contents` say.
    pub fn file(&mut self, header: &Header, contents: &mut dyn Read) -> io::Result<()> {
        self.head(header)?;
        let mut left = header.size;
        while left > 0 {
            if self.buffer.len() == BUFFER {
                self.flush_buffer()?;
            }
            let start = self.buffer.len();
            let room = (BUFFER - start).min(usize::try_from(left).unwrap_or(BUFFER));
            self.buffer.resize(start + room, 0);
            let read = contents.read(&mut self.buffer[start..]);
            let n = match read {
                Ok(n) => n,
                Err(e) => {
                    self.buffer.truncate(start);
                    if e.kind() == io::ErrorKind::Interrupted {
                        continue;
                    }
                    return Err(e);
                }
            };
            self.buffer.truncate(start + n);
            if n == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the file became shorter while it was read",
                ));
            }
            left -= n as u64;
        }
        self.pad(header.size)
    }

    /// Begins a file whose `header.size` bytes are written into what comes back.
    ///
    /// # Errors
    /// What `out` says.
    pub fn begin(&mut self, header: &Header) -> io::Result<Contents<'_, W>> {
        self.head(header)?;
        Ok(Contents {
            size: header.size,
            left: header.size,
            writer: self,
        })
    }

    /// Writes the end mark and hands the stream back.
    ///
    /// # Errors
    /// What `out` says.
    pub fn finish(mut self) -> io::Result<(W, u64)> {
        self.put(&[0u8; 2 * BLOCK])?;
        self.flush_buffer()?;
        self.out.flush()?;
        Ok((self.out, self.flushed))
    }

    fn head(&mut self, header: &Header) -> io::Result<()> {
        let mut records = Records::default();
        let raw = encode(header, &mut records);
        if !records.is_empty() {
            let body = records.encode();
            self.put(&extended(&header.path, body.len() as u64))?;
            self.put(&body)?;
            self.pad(body.len() as u64)?;
        }
        self.put(&raw)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.buffer.len() + bytes.len() > BUFFER {
            self.flush_buffer()?;
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    fn pad(&mut self, size: u64) -> io::Result<()> {
        let over = usize::try_from(size % BLOCK as u64).unwrap_or(0);
        if over == 0 {
            Ok(())
        } else {
            self.put(&[0u8; BLOCK][over..])
        }
    }

    fn flush_buffer(&mut self) -> io::Result<()> {
        self.out.write_all(&self.buffer)?;
        self.flushed += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

/// The contents of a file being written. To be ended with [`Contents::end`]: the archive is worthless otherwise.
pub struct Contents<'a, W: Write> {
    writer: &'a mut Writer<W>,
    size: u64,
    left: u64,
}

impl<W: Write> Contents<'_, W> {
    /// Ends the file.
    ///
    /// # Errors
    /// `UnexpectedEof` when bytes are missing; what the stream says.
    pub fn end(self) -> io::Result<()> {
        match self.left {
            0 => self.writer.pad(self.size),
            _ => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the file is shorter than it was said to be",
            )),
        }
    }
}

impl<W: Write> Write for Contents<'_, W> {
    /// # Errors
    /// `InvalidInput` when there are more bytes than the header says; what the stream says.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(BUFFER);
        self.left = self.left.checked_sub(length as u64).ok_or_else(|| {
            let why = "the file is longer than it was said to be";
            io::Error::new(io::ErrorKind::InvalidInput, why)
        })?;
        self.writer.put(&bytes[..length])?;
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn encode(header: &Header, records: &mut Records) -> Raw {
    let mut raw: Raw = [0; BLOCK];
    let mut path = header.path.clone();
    if header.kind == Kind::Directory && !path.ends_with(b"/") {
        path.push(b'/');
    }
    put_path(&mut raw, &path, records);
    if header.link.len() <= block::LINK.len() {
        raw[block::LINK][..header.link.len()].copy_from_slice(&header.link);
    } else {
        records.put(b"linkpath", header.link.clone());
    }
    block::put_octal(&mut raw[block::MODE], u64::from(header.mode & 0o7777));
    put_number(&mut raw, block::UID, u64::from(header.uid), b"uid", records);
    put_number(&mut raw, block::GID, u64::from(header.gid), b"gid", records);
    put_number(&mut raw, block::SIZE, header.size, b"size", records);
    let whole = u64::try_from(header.mtime.seconds);
    let fits = block::put_octal(&mut raw[block::MTIME], whole.unwrap_or(0));
    if !fits || whole.is_err() || header.mtime.nanos != 0 {
        records.put(b"mtime", decimal(header.mtime).into_bytes());
    }
    raw[block::TYPE] = match header.kind {
        Kind::File => b'0',
        Kind::HardLink => b'1',
        Kind::Symlink => b'2',
        Kind::Char => b'3',
        Kind::Block => b'4',
        Kind::Directory => b'5',
        Kind::Fifo => b'6',
    };
    raw[block::MAGIC].copy_from_slice(block::USTAR);
    let device = match header.kind {
        Kind::Char | Kind::Block => header.device,
        _ => (0, 0),
    };
    // The kernel's numbers have 12 and 20 bits: both fit 21.
    block::put_octal(&mut raw[block::DEV_MAJOR], u64::from(device.0));
    block::put_octal(&mut raw[block::DEV_MINOR], u64::from(device.1));
    for (name, value) in &header.xattrs {
        records.put_xattr(name, value);
    }
    block::seal(&mut raw);
    raw
}

fn put_path(raw: &mut Raw, path: &[u8], records: &mut Records) {
    let name = block::NAME.len();
    if path.len() <= name {
        raw[block::NAME][..path.len()].copy_from_slice(path);
        return;
    }
    // ustar splits at a slash: up to 155 bytes before it, 1 to 100 after it.
    let last = path.len() - 1;
    let split = (1..last.min(block::PREFIX.len() + 1))
        .rev()
        .find(|at| path[*at] == b'/' && path.len() - at - 1 <= name);
    match split {
        Some(at) => {
            raw[block::PREFIX][..at].copy_from_slice(&path[..at]);
            let rest = &path[at + 1..];
            raw[block::NAME][..rest.len()].copy_from_slice(rest);
        }
        None => {
            records.put(b"path", path.to_vec());
            raw[block::NAME].copy_from_slice(&path[..name]);
        }
    }
}

fn put_number(raw: &mut Raw, field: std::ops::Range<usize>, value: u64, key: &[u8], records: &mut Records) {
    if !block::put_octal(&mut raw[field], value) {
        records.put(key, value.to_string().into_bytes());
    }
}

/// A time as pax writes it; the fraction counts away from zero.
fn decimal(time: Time) -> String {
    match (time.seconds, time.nanos) {
        (seconds, 0) => seconds.to_string(),
        (seconds, nanos) if seconds < 0 => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanos),
        (seconds, nanos) => format!("{seconds}.{nanos:09}"),
    }
}

/// The header of an extended header. Its name is for readers that know no pax.
fn extended(path: &[u8], size: u64) -> Raw {
    let base = path
        .strip_suffix(b"/")
        .unwrap_or(path)
        .rsplit(|b| *b == b'/')
        .next()
        .unwrap_or(b"");
    let name = [b"PaxHeaders/", &base[..base.len().min(80)]].concat();
    let mut raw: Raw = [0; BLOCK];
    raw[block::NAME][..name.len()].copy_from_slice(&name);
    block::put_octal(&mut raw[block::MODE], 0o644);
    block::put_octal(&mut raw[block::UID], 0);
    block::put_octal(&mut raw[block::GID], 0);
    block::put_octal(&mut raw[block::SIZE], size);
    block::put_octal(&mut raw[block::MTIME], 0);
    raw[block::TYPE] = b'x';
    raw[block::MAGIC].copy_from_slice(block::USTAR);
    block::put_octal(&mut raw[block::DEV_MAJOR], 0);
    block::put_octal(&mut raw[block::DEV_MINOR], 0);
    block::seal(&mut raw);
    raw
}
