//! A container's CRI log: its lines, its file. Knows neither pipes nor containers.
//!
//! ```text
//! 2026-01-01T00:00:00.000000000Z stdout F a whole line
//! 2026-01-01T00:00:00.000000000Z stderr P the first 16384 bytes of a longer one (or its end, when the stream ends there)
//! ```
//! Lines are as containerd writes them (kubelet joins `P` with what follows; a carriage return before the line feed goes).
//! The file never holds up the container: what cannot be written is dropped, counted, and told — in the log itself as soon
//! as there is space again, and as an event.

use crate::clock;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Longer lines are written in parts of this many bytes.
pub const MAX_LINE: usize = 16 * 1024;

/// One of a container's two output streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Also everything a terminal shows.
    Stdout,
    /// The other.
    Stderr,
}

impl Source {
    fn name(self) -> &'static [u8] {
        match self {
            Source::Stdout => b"stdout",
            Source::Stderr => b"stderr",
        }
    }
}

/// Cuts a stream's bytes into lines. Holds the beginning of a line until its end has come.
#[derive(Debug)]
pub struct Splitter {
    source: Source,
    held: Vec<u8>,
}

impl Splitter {
    /// At the beginning of a line.
    pub fn new(source: Source) -> Splitter {
        Splitter {
            source,
            held: Vec::new(),
        }
    }

    /// Appends to `out` the lines that `bytes` complete, stamped with `at`.
    pub fn feed(&mut self, mut bytes: &[u8], at: i64, out: &mut Vec<u8>) {
        let head = Head::new(self.source, at);
        while let Some(end) = line_feed(bytes) {
            let rest = self.long_line(&bytes[..end], &head, out);
            let (mut held, mut line) = (self.held.as_slice(), rest);
            match line.split_last() {
                Some((b'\r', before)) => line = before,
                None => held = held.strip_suffix(b"\r").unwrap_or(held),
                _ => {}
            }
            head.write_line(b'F', [held, line], out);
            self.held.clear();
            bytes = &bytes[end + 1..];
        }
        let rest = self.long_line(bytes, &head, out);
        self.held.extend_from_slice(rest);
        if self.held.is_empty() {
            // An idle stream keeps no memory.
            self.held = Vec::new();
        }
    }

    /// Writes the parts of a line that is too long; what is left of `bytes` fits.
    fn long_line<'a>(&mut self, mut bytes: &'a [u8], head: &Head, out: &mut Vec<u8>) -> &'a [u8] {
        while self.held.len() + bytes.len() > MAX_LINE {
            let (part, rest) = bytes.split_at(MAX_LINE - self.held.len());
            head.write_line(b'P', [&self.held, part], out);
            self.held.clear();
            bytes = rest;
        }
        bytes
    }

    /// The stream has ended: a line without an end is a partial one.
    pub fn finish(&mut self, at: i64, out: &mut Vec<u8>) {
        if !self.held.is_empty() {
            Head::new(self.source, at).write_line(b'P', [&self.held, &[]], out);
            self.held = Vec::new();
        }
    }
}

/// What the lines of one batch begin with: writing the time down costs more than a short line.
struct Head {
    text: Vec<u8>,
}

impl Head {
    fn new(source: Source, at: i64) -> Head {
        let mut text = Vec::with_capacity(40);
        clock::stamp(at, &mut text);
        text.push(b' ');
        text.extend_from_slice(source.name());
        text.push(b' ');
        Head { text }
    }

    fn write_line(&self, tag: u8, parts: [&[u8]; 2], out: &mut Vec<u8>) {
        out.reserve(self.text.len() + parts[0].len() + parts[1].len() + 3);
        out.extend_from_slice(&self.text);
        out.extend_from_slice(&[tag, b' ']);
        out.extend_from_slice(parts[0]);
        out.extend_from_slice(parts[1]);
        out.push(b'\n');
    }
}

/// Where the first line feed is. Eight bytes at a time: one with no zero byte after the exclusive or has no line feed.
fn line_feed(bytes: &[u8]) -> Option<usize> {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGHS: u64 = 0x8080_8080_8080_8080;
    let (words, rest) = bytes.as_chunks::<8>();
    for (n, word) in words.iter().enumerate() {
        let zeroed = u64::from_le_bytes(*word) ^ (ONES * u64::from(b'\n'));
        // The lowest bit set marks the first zero byte; higher ones may be wrong, and are not looked at.
        let found = zeroed.wrapping_sub(ONES) & !zeroed & HIGHS;
        if found != 0 {
            return Some(n * 8 + found.trailing_zeros() as usize / 8);
        }
    }
    let at = rest.iter().position(|b| *b == b'\n')?;
    Some(words.len() * 8 + at)
}

/// Output that was lost and has not been told yet.
#[derive(Debug, PartialEq, Eq)]
pub struct Loss {
    /// Bytes of the log.
    pub bytes: u64,
    /// Why.
    pub reason: String,
}

/// What stays of something that does not fit.
#[derive(Clone, Copy)]
enum Part {
    WholeLines,
    Nothing,
}

/// A log file, open for appending.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: OwnedFd,
    /// The file ends in the middle of a line.
    torn: bool,
    /// Bytes lost that the log does not tell of yet.
    unlogged: u64,
    /// Bytes lost that no event tells of yet.
    untold: u64,
    lost: u64,
    reason: Option<Errno>,
}

impl LogFile {
    /// Opens or makes the log at an absolute path whose directory exists.
    ///
    /// # Errors
    /// When it cannot be opened, or is something else than a file.
    pub fn open(path: &Path) -> io::Result<LogFile> {
        let file = open(path)?;
        Ok(LogFile {
            path: path.to_owned(),
            file,
            torn: false,
            unlogged: 0,
            untold: 0,
            lost: 0,
            reason: None,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether what is lost last is not told by the log yet.
    pub fn is_losing(&self) -> bool {
        self.unlogged > 0
    }

    /// Bytes lost since the container began.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Goes on in a new file at the same path (or the same file when it is still there).
    ///
    /// # Errors
    /// When it cannot be opened; nothing was made, and the old file is written on.
    pub fn reopen(&mut self) -> io::Result<()> {
        self.file = open(&self.path)?;
        self.torn = false;
        Ok(())
    }

    /// Writes whole lines; what cannot be written is lost. True when this began a loss, which should be told soon.
    pub fn write(&mut self, lines: &[u8]) -> bool {
        if lines.is_empty() {
            return false;
        }
        if self.unlogged == 0 && !self.torn {
            return match self.append(lines, Part::WholeLines) {
                Ok(()) => false,
                Err((written, errno)) => {
                    self.lose(lines.len() - written, Some(errno));
                    true
                }
            };
        }
        // What was lost is told together with the first lines that fit: a gap is one gap.
        let mut told = self.preface();
        told.extend_from_slice(lines);
        match self.append(&told, Part::Nothing) {
            Ok(()) => (self.unlogged, self.torn) = (0, false),
            Err((_, errno)) => self.lose(lines.len(), Some(errno)),
        }
        false
    }

    /// What is lost and not told yet, told now.
    pub fn take_loss(&mut self) -> Option<Loss> {
        let bytes = std::mem::take(&mut self.untold);
        (bytes > 0).then(|| Loss {
            bytes,
            reason: self.reason(),
        })
    }

    /// The last word: tries to write down a loss that the log does not tell of yet.
    pub fn finish(&mut self) {
        if self.unlogged > 0 {
            let preface = self.preface();
            if self.append(&preface, Part::Nothing).is_ok() {
                self.unlogged = 0;
            }
        }
    }

    fn reason(&self) -> String {
        self.reason.map_or_else(String::new, |errno| errno.to_string())
    }

    fn preface(&self) -> Vec<u8> {
        let mut out = Vec::new();
        if self.torn {
            out.push(b'\n');
        }
        if self.unlogged > 0 {
            let told = format!(
                "[slipway: {} bytes of log were lost here: {}]",
                self.unlogged,
                self.reason()
            );
            let head = Head::new(Source::Stderr, clock::now());
            head.write_line(b'F', [told.as_bytes(), &[]], &mut out);
        }
        out
    }

    fn lose(&mut self, bytes: usize, errno: Option<Errno>) {
        let bytes = bytes as u64;
        self.lost += bytes;
        self.unlogged += bytes;
        self.untold += bytes;
        self.reason = errno.or(self.reason);
    }

    /// Appends all, or that part of it for which there is space, and says how many bytes that is.
    fn append(&mut self, lines: &[u8], part: Part) -> Result<(), (usize, Errno)> {
        let mut written = 0;
        let errno = loop {
            match rustix::io::write(&self.file, &lines[written..]) {
                Ok(0) => break Errno::IO,
                Ok(n) => written += n,
                Err(Errno::INTR) => {}
                Err(errno) => break errno,
            }
            if written == lines.len() {
                return Ok(());
            }
        };
        let whole_lines = || {
            lines[..written]
                .iter()
                .rposition(|b| *b == b'\n')
                .map_or(0, |at| at + 1)
        };
        let kept = match part {
            Part::Nothing => 0,
            Part::WholeLines => whole_lines(),
        };
        if kept < written && self.cut((written - kept) as u64).is_err() {
            self.torn = true;
        }
        Err((kept, errno))
    }

    /// Takes the last bytes off the file: half a line would be nonsense to kubelet's parser.
    fn cut(&self, bytes: u64) -> Result<(), Errno> {
        let size = u64::try_from(rustix::fs::fstat(&self.file)?.st_size).map_err(|_| Errno::OVERFLOW)?;
        rustix::fs::ftruncate(&self.file, size.checked_sub(bytes).ok_or(Errno::INVAL)?)
    }
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    // Not through a link, and never waiting: a container's owner may have put a fifo there.
    let flags = OFlags::WRONLY
        | OFlags::CREATE
        | OFlags::APPEND
        | OFlags::CLOEXEC
        | OFlags::NOFOLLOW
        | OFlags::NONBLOCK
        | OFlags::NOCTTY;
    let file = rustix::fs::openat(CWD, path, flags, Mode::from_raw_mode(0o640))?;
    let mode = rustix::fs::fstat(&file)?.st_mode;
    if FileType::from_raw_mode(mode) != FileType::RegularFile {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file",
        ));
    }
    Ok(file)
}

#[cfg(test)]
mod tests;
