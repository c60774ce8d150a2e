//! Reading an archive entry by entry. Bounded memory whatever the archive says about itself.

use super::block::{self, Raw};
use super::pax::{PaxError, Records};
use super::{BLOCK, Header, Kind, Time};
use std::io::{self, Read};

/// Extended headers and long names larger than this are refused.
const MAX_EXTENDED: u64 = 1 << 20;
/// So many stand before one entry at most; writers need four.
const MOST_EXTENDED: usize = 8;
/// Bytes of all extended headers together: 200 for each of the entries that a layer may have.
const MAX_EXTENDED_TOGETHER: u64 = 4 << 30;
/// What may follow the end mark: writers pad to their record size.
const MAX_TRAILING: u64 = 16 << 20;

/// The archive is damaged, uses something we do not support, or could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TarError {
    /// The stream failed.
    #[error("read the archive")]
    Read(#[source] io::Error),
    /// The stream ended inside an entry.
    #[error("the archive ends in the middle of {what}")]
    Truncated {
        /// Of what.
        what: String,
    },
    /// A header is not a tar header.
    #[error("the header at byte {at} of the archive is damaged: {why}")]
    Damaged {
        /// Where.
        at: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// An extended header is malformed.
    #[error("the extended header at byte {at} of the archive is not usable")]
    Pax {
        /// Where.
        at: u64,
        /// What is wrong.
        #[source]
        source: PaxError,
    },
    /// An extended header or long name is too large to be honest, or all of them together are.
    #[error("the extended headers up to byte {at} of the archive have {size} bytes")]
    ExtendedTooLarge {
        /// Where.
        at: u64,
        /// Their size.
        size: u64,
    },
    /// Extended headers follow each other without an entry.
    #[error("more than {MOST_EXTENDED} extended headers follow each other at byte {at} of the archive")]
    TooManyExtended {
        /// Where.
        at: u64,
    },
    /// A kind of entry that an image layer cannot hold.
    #[error("{name:?} is of a kind that is not supported: {kind}")]
    Unsupported {
        /// The entry.
        name: String,
        /// The kind, in words.
        kind: String,
    },
    /// Too much data after the end of the archive.
    #[error("the archive goes on for more than {MAX_TRAILING} bytes after its end")]
    Trailing,
}

/// Reads the entries of a tar stream. Bodies not read are skipped.
pub struct Reader<R> {
    inner: R,
    position: u64,
    body: u64,
    padding: u64,
    current: Vec<u8>,
    global: Records,
    extended: u64,
    ended: bool,
}

/// What extended headers in front of an entry said.
#[derive(Default)]
struct Pending {
    records: Option<Records>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<R: Read> Reader<R> {
    /// Reads from a stream; headers are read in single blocks, so give it a buffered one.
    pub fn new(inner: R) -> Reader<R> {
        Reader {
            inner,
            position: 0,
            body: 0,
            padding: 0,
            current: Vec::new(),
            global: Records::default(),
            extended: 0,
            ended: false,
        }
    }

    /// The stream underneath.
    pub fn into_inner(self) -> R {
        self.inner
    }

    /// The next entry; `None` at the end of the archive.
    ///
    /// # Errors
    /// See [`TarError`]; after one the reader is of no further use.
    pub fn next_entry(&mut self) -> Result<Option<Header>, TarError> {
        if self.ended {
            return Ok(None);
        }
        self.skip_body()?;
        let mut pending = Pending::default();
        for _ in 0..=MOST_EXTENDED {
            let at = self.position;
            let Some(raw) = self.header_block()? else {
                self.ended = true;
                return Ok(None);
            };
            let size = size_of(&raw, at)?;
            match raw[block::TYPE] {
                b'x' => pending.records = Some(self.records(at, size)?),
                b'g' => {
                    let records = self.records(at, size)?;
                    self.global.merge_global(records);
                }
                b'L' => pending.long_name = Some(self.long_text(at, size)?),
                b'K' => pending.long_link = Some(self.long_text(at, size)?),
                _ => return self.entry(&raw, at, size, pending).map(Some),
            }
        }
        Err(TarError::TooManyExtended { at: self.position })
    }

    /// Reads some of the current entry's contents; 0 at their end.
    ///
    /// # Errors
    /// [`TarError::Truncated`] when the archive ends first; what the stream says.
    pub fn read_body(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        let want = usize::try_from(self.body).unwrap_or(usize::MAX).min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        loop {
            match self.inner.read(&mut buffer[..want]) {
                Ok(0) => return Err(self.truncated()),
                Ok(n) => {
                    self.body -= n as u64;
                    self.position += n as u64;
                    return Ok(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(TarError::Read(e)),
            }
        }
    }

    /// After the last entry: reads what follows the end mark to the end of the stream, so that whatever checks the
    /// stream has seen all of it.
    ///
    /// # Errors
    /// [`TarError::Trailing`]; what the stream says.
    pub fn finish(&mut self) -> Result<(), TarError> {
        let mut buffer = [0u8; 8192];
        let mut trailing = 0u64;
        loop {
            match self.inner.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => {
                    trailing += n as u64;
                    self.position += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(TarError::Read(e)),
            }
            if trailing > MAX_TRAILING {
                return Err(TarError::Trailing);
            }
        }
    }

    fn entry(&mut self, raw: &Raw, at: u64, size: u64, pending: Pending) -> Result<Header, TarError> {
        let mut header = self.plain_header(raw, at)?;
        let mut size = size;
        let pax = |source| TarError::Pax { at, source };
        self.global.apply(&mut header).map_err(pax)?;
        if let Some(records) = &pending.records {
            records.apply(&mut header).map_err(pax)?;
            size = records.size().map_err(pax)?.unwrap_or(size);
        }
        if let Some(name) = pending.long_name {
            header.path = name;
        }
        if let Some(link) = pending.long_link {
            header.link = link;
        }
        // Other kinds have no contents, whatever the field says (some writers put a hard link's size there).
        header.size = if header.kind == Kind::File { size } else { 0 };
        self.body = header.size;
        self.padding = padding_of(header.size);
        self.current.clone_from(&header.path);
        Ok(header)
    }

    fn plain_header(&self, raw: &Raw, at: u64) -> Result<Header, TarError> {
        let damaged = |why| TarError::Damaged { at, why };
        let mut path = block::text(&raw[block::NAME]).to_vec();
        let posix = raw[block::MAGIC].starts_with(b"ustar\0");
        if posix {
            let prefix = block::text(&raw[block::PREFIX]);
            if !prefix.is_empty() {
                path = [prefix, b"/", path.as_slice()].concat();
            }
        }
        let kind = match raw[block::TYPE] {
            // Before ustar a directory was a file whose name ends in a slash.
            0 if path.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Char,
            b'4' => Kind::Block,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => return Err(unsupported(&path, other)),
        };
        let number = |range: std::ops::Range<usize>, why| block::number(&raw[range]).ok_or(damaged(why));
        let id = |range, why| {
            number(range, why).and_then(|n| {
                u32::try_from(n)
                    .ok()
                    .filter(|n| *n != u32::MAX)
                    .ok_or(damaged("an owner is out of range"))
            })
        };
        let mut header = Header::new(path, kind);
        header.link = block::text(&raw[block::LINK]).to_vec();
        header.mode = (number(block::MODE, "the mode is not a number")? & 0o7777) as u32;
        header.uid = id(block::UID, "the user id is not a number")?;
        header.gid = id(block::GID, "the group id is not a number")?;
        header.mtime = Time {
            seconds: number(block::MTIME, "the time is not a number")?,
            nanos: 0,
        };
        if matches!(kind, Kind::Char | Kind::Block) {
            let part = |range| {
                number(range, "a device number is not a number")
                    .and_then(|n| u32::try_from(n).map_err(|_| damaged("a device number is out of range")))
            };
            header.device = (part(block::DEV_MAJOR)?, part(block::DEV_MINOR)?);
        }
        Ok(header)
    }

    /// The next header block; `None` at the end mark or at the end of the stream between entries.
    fn header_block(&mut self) -> Result<Option<Raw>, TarError> {
        let mut raw: Raw = [0; BLOCK];
        let at = self.position;
        match self.fill(&mut raw)? {
            0 => return Ok(None),
            BLOCK => {}
            _ => {
                return Err(TarError::Truncated {
                    what: "a header".to_owned(),
                });
            }
        }
        if raw.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let stored = block::number(&raw[block::CHECKSUM]);
        let (unsigned, signed) = block::sums(&raw);
        if stored != Some(unsigned) && stored != Some(signed) {
            return Err(TarError::Damaged {
                at,
                why: "its checksum is wrong",
            });
        }
        Ok(Some(raw))
    }

    fn records(&mut self, at: u64, size: u64) -> Result<Records, TarError> {
        let body = self.extended_body(at, size)?;
        Records::parse(&body).map_err(|source| TarError::Pax { at, source })
    }

    fn long_text(&mut self, at: u64, size: u64) -> Result<Vec<u8>, TarError> {
        let body = self.extended_body(at, size)?;
        Ok(block::text(&body).to_vec())
    }

    fn extended_body(&mut self, at: u64, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_EXTENDED {
            return Err(TarError::ExtendedTooLarge { at, size });
        }
        self.extended += size;
        if self.extended > MAX_EXTENDED_TOGETHER {
            let size = self.extended;
            return Err(TarError::ExtendedTooLarge { at, size });
        }
        let padded = size + padding_of(size);
        let mut body = vec![0u8; usize::try_from(padded).unwrap_or(0)];
        if self.fill(&mut body)? != body.len() {
            return Err(TarError::Truncated {
                what: "an extended header".to_owned(),
            });
        }
        body.truncate(usize::try_from(size).unwrap_or(0));
        Ok(body)
    }

    /// Reads until the buffer is full or the stream ends.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.inner.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(TarError::Read(e)),
            }
        }
        self.position += filled as u64;
        Ok(filled)
    }

    fn skip_body(&mut self) -> Result<(), TarError> {
        let mut buffer = [0u8; 8192];
        while self.read_body(&mut buffer)? > 0 {}
        let padding = usize::try_from(self.padding).unwrap_or(0);
        if self.fill(&mut buffer[..padding])? != padding {
            return Err(self.truncated());
        }
        self.padding = 0;
        Ok(())
    }

    fn truncated(&self) -> TarError {
        TarError::Truncated {
            what: format!("{:?}", String::from_utf8_lossy(&self.current)),
        }
    }
}

impl<R: Read> Read for Reader<R> {
    /// The current entry's contents.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read_body(buffer).map_err(|e| match e {
            TarError::Read(e) => e,
            other => io::Error::new(io::ErrorKind::UnexpectedEof, other),
        })
    }
}

fn size_of(raw: &Raw, at: u64) -> Result<u64, TarError> {
    block::number(&raw[block::SIZE])
        .and_then(|n| u64::try_from(n).ok())
        .ok_or(TarError::Damaged {
            at,
            why: "the size is not a number, or negative",
        })
}

fn padding_of(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
}

fn unsupported(path: &[u8], kind: u8) -> TarError {
    let kind = match kind {
        b'S' => "a sparse file of GNU tar".to_owned(),
        b'M' => "a file continued from another volume".to_owned(),
        b'V' => "a volume label".to_owned(),
        b'D' => "an incremental dump".to_owned(),
        other => format!("type {:?}", char::from(other)),
    };
    TarError::Unsupported {
        name: String::from_utf8_lossy(path).into_owned(),
        kind,
    }
}
