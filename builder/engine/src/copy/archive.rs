//! ADD's unpacking of local archives: found by content, unpacked below the destination. Everything the archive names
//! stays below it, symlinks included. Whiteouts mean nothing here: it is no layer.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use slipway_snapshot::Root;
use slipway_snapshot::tar::{Header, Kind, Reader, TarError};

use super::CopyError;
use super::apply::{Destination, final_target};
use super::digest::{Selection, open_entry};
use super::tree::Tree;
use crate::cancel::Cancel;

const BUFFER: usize = 256 * 1024;
/// Bytes of names of directories whose times come last.
const MOST_REMEMBERED: usize = 128 << 20;

/// How an archive is packed, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Not at all.
    Plain,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
    /// bzip2, by the program of that name.
    Bzip2,
    /// xz, by the program of that name.
    Xz,
}

impl Packing {
    /// What the first bytes say.
    #[must_use]
    pub fn of(start: &[u8]) -> Packing {
        match start {
            [0x1f, 0x8b, 0x08, ..] => Packing::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Packing::Zstd,
            [b'B', b'Z', b'h', ..] => Packing::Bzip2,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Packing::Xz,
            _ => Packing::Plain,
        }
    }
}

/// A stream of unpacked bytes. It is whole only when [`Unpacked::finish`] has said so: the sums that tell a damaged
/// archive come last, behind the end of the tar.
pub struct Unpacked {
    source: Source,
}

enum Source {
    Stream(Box<dyn Read + Send>),
    Program(Program),
}

/// An unpacking program, fed by a thread.
struct Program {
    name: &'static str,
    child: Child,
    feeding: Option<std::thread::JoinHandle<io::Result<()>>>,
}

impl Read for Unpacked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.source {
            Source::Stream(stream) => stream.read(buffer),
            Source::Program(program) => match &mut program.child.stdout {
                Some(out) => out.read(buffer),
                None => Ok(0),
            },
        }
    }
}

impl Unpacked {
    /// Reads what follows the archive, to the end of the stream.
    ///
    /// # Errors
    /// When the stream is damaged or cut, which its sums, or the program behind it, may say only here.
    pub fn finish(mut self, cancel: &Cancel) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            if cancel.is_set() {
                return Err(io::Error::other("cancelled"));
            }
            match self.read(&mut buffer) {
                Ok(0) => break,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        match &mut self.source {
            Source::Stream(_) => Ok(()),
            Source::Program(program) => program.finish(),
        }
    }
}

impl Program {
    fn finish(&mut self) -> io::Result<()> {
        let status = self.child.wait()?;
        // The program has ended: so has whoever feeds it, or does as soon as it has more.
        let fed = self
            .feeding
            .take()
            .filter(|_| status.success())
            .map(|feeding| feeding.join());
        if !status.success() {
            let why = format!("it is damaged: {} does not take all of it ({status})", self.name);
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        match fed {
            Some(Ok(Err(e))) if e.kind() != io::ErrorKind::BrokenPipe => Err(e),
            _ => Ok(()),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Opens a possibly packed stream.
///
/// # Errors
/// When the unpacking program is not there.
pub fn unpacked(mut stream: impl Read + Send + 'static) -> io::Result<Unpacked> {
    let mut start = vec![0u8; 6];
    let mut filled = 0;
    while filled < start.len() {
        match stream.read(&mut start[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    start.truncate(filled);
    let packing = Packing::of(&start);
    let stream = BufReader::with_capacity(BUFFER, io::Cursor::new(start).chain(stream));
    let source = match packing {
        Packing::Plain => Source::Stream(Box::new(stream)),
        Packing::Gzip => Source::Stream(Box::new(BufReader::with_capacity(
            BUFFER,
            flate2::bufread::MultiGzDecoder::new(stream),
        ))),
        Packing::Zstd => Source::Stream(Box::new(BufReader::with_capacity(
            BUFFER,
            zstd::Decoder::with_buffer(stream)?,
        ))),
        Packing::Bzip2 => Source::Program(program("bzip2", stream)?),
        Packing::Xz => Source::Program(program("xz", stream)?),
    };
    Ok(Unpacked { source })
}

fn program(name: &'static str, mut stream: impl Read + Send + 'static) -> io::Result<Program> {
    let mut child = Command::new(name)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| {
            let why =
                format!("it is packed with {name}, and the program {name} cannot be run ({e}): install it");
            io::Error::new(e.kind(), why)
        })?;
    // Ends with the program: a broken pipe is how it says that it has had enough.
    let feeding = child.stdin.take().map(|mut input| {
        std::thread::spawn(move || {
            io::copy(&mut stream, &mut input)?;
            input.flush()
        })
    });
    Ok(Program { name, child, feeding })
}

/// Unpacks a selection if it is one archive; `false`: it is none, and is to be copied.
///
/// # Errors
/// When it is one and cannot be unpacked.
pub fn unpack(
    to: &Destination<'_>,
    tree: &Tree,
    selection: &Selection,
    cancel: &Cancel,
) -> Result<bool, CopyError> {
    let Some(entry) = selection.entries.first() else {
        return Ok(false);
    };
    if entry.kind() != FileType::RegularFile || entry.socket || entry.stat.st_size == 0 {
        return Ok(false);
    }
    let archive = selection.found.real.to_string_lossy().into_owned();
    let failed = |source: io::Error| CopyError::Archive {
        archive: archive.clone(),
        source,
    };
    let stream = match unpacked(open_entry(tree, selection, entry)?) {
        Ok(stream) => stream,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(failed(e)),
        Err(_) => return Ok(false),
    };
    let mut reader = Reader::new(stream);
    let Ok(Some(first)) = reader.next_entry() else {
        return Ok(false);
    };
    let dir = final_target(to.root, Path::new(to.path))?;
    to.root
        .mkdir_all(&dir, 0o755, to.owner)
        .map_err(|e| CopyError::at("make directory", "the image", &dir, e))?;
    let fd = to
        .root
        .open_file(&dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC)
        .map_err(|e| CopyError::at("open", "the image", &dir, e))?;
    let mut extract = Extract {
        root: Root::from_fd(fd.into(), &dir),
        owner: to.owner,
        directories: BTreeMap::new(),
        remembered: 0,
        last: None,
        cancel,
    };
    extract.all(&mut reader, first).map_err(|e| e.of(&failed))?;
    whole(reader, cancel, &failed)?;
    Ok(true)
}

/// The archive has ended; so must the stream it came in, well.
fn whole(
    reader: Reader<Unpacked>,
    cancel: &Cancel,
    failed: &impl Fn(io::Error) -> CopyError,
) -> Result<(), CopyError> {
    reader
        .into_inner()
        .finish(cancel)
        .map_err(|e| match cancel.is_set() {
            true => CopyError::Cancelled,
            false => failed(e),
        })
}

/// Unpacks a whole archive into a directory, owners kept: a build context from a stream.
///
/// # Errors
/// When it is no archive or cannot be unpacked.
pub fn unpack_into(dir: &Path, stream: Unpacked, cancel: &Cancel) -> Result<(), CopyError> {
    let failed = |source: io::Error| CopyError::Archive {
        archive: "the build context".to_owned(),
        source,
    };
    let mut reader = Reader::new(stream);
    let convert = |e: ExtractError| e.of(&failed);
    let Some(first) = reader.next_entry().map_err(|e| convert(e.into()))? else {
        return whole(reader, cancel, &failed);
    };
    let root = Root::open(dir).map_err(failed)?;
    let mut extract = Extract {
        root,
        owner: None,
        directories: BTreeMap::new(),
        remembered: 0,
        last: None,
        cancel,
    };
    extract.all(&mut reader, first).map_err(convert)?;
    whole(reader, cancel, &failed)
}

fn flat(error: &TarError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

#[derive(Debug)]
enum ExtractError {
    Io(io::Error),
    Tar(TarError),
    Cancelled,
}

impl ExtractError {
    fn of(self, failed: &impl Fn(io::Error) -> CopyError) -> CopyError {
        match self {
            ExtractError::Cancelled => CopyError::Cancelled,
            ExtractError::Io(e) => failed(e),
            ExtractError::Tar(e) => failed(io::Error::new(io::ErrorKind::InvalidData, flat(&e))),
        }
    }
}

impl From<io::Error> for ExtractError {
    fn from(e: io::Error) -> Self {
        ExtractError::Io(e)
    }
}

impl From<rustix::io::Errno> for ExtractError {
    fn from(e: rustix::io::Errno) -> Self {
        ExtractError::Io(e.into())
    }
}

impl From<TarError> for ExtractError {
    fn from(e: TarError) -> Self {
        ExtractError::Tar(e)
    }
}

struct Extract<'a> {
    root: Root,
    owner: Option<(u32, u32)>,
    /// Their times come last. What an entry takes the place of is no longer among them.
    directories: BTreeMap<PathBuf, Timestamps>,
    /// Bytes of their names.
    remembered: usize,
    /// The directory of the last entry: the next one is nearly always in it as well.
    last: Option<(PathBuf, OwnedFd)>,
    cancel: &'a Cancel,
}

impl Extract<'_> {
    fn all(&mut self, reader: &mut Reader<impl Read>, first: Header) -> Result<(), ExtractError> {
        let mut next = Some(first);
        while let Some(header) = next {
            if self.cancel.is_set() {
                return Err(ExtractError::Cancelled);
            }
            self.one(&header, reader)?;
            next = reader.next_entry()?;
        }
        for (path, times) in self.directories.iter().rev() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match self.root.open_file(path, flags) {
                Ok(dir) => rustix::fs::futimens(&dir, times)?,
                // It was reached through a link, and an entry has taken its place under its other name.
                Err(e) if is_no_directory(&e) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// An entry takes the place of what is there.
    fn forget(&mut self, path: &Path) {
        let below: Vec<PathBuf> = self
            .directories
            .range(path.to_path_buf()..)
            .map(|(known, _)| known)
            .take_while(|known| known.starts_with(path))
            .cloned()
            .collect();
        for known in below {
            self.remembered -= known.as_os_str().len();
            self.directories.remove(&known);
        }
    }

    fn remember(&mut self, path: PathBuf, times: Timestamps) -> Result<(), ExtractError> {
        let length = path.as_os_str().len();
        if self.directories.insert(path, times).is_none() {
            self.remembered += length;
        }
        match self.remembered <= MOST_REMEMBERED {
            true => Ok(()),
            false => {
                let why = "the names of its directories take more than 128 MiB";
                Err(io::Error::new(io::ErrorKind::InvalidData, why).into())
            }
        }
    }

    fn one(&mut self, header: &Header, reader: &mut Reader<impl Read>) -> Result<(), ExtractError> {
        let path = inside(&header.path)?;
        let Some(name) = path.file_name().map(OsStr::to_owned) else {
            // The archive's own top: the destination keeps what it has.
            return Ok(());
        };
        let dir = self.directory(path.parent().unwrap_or(Path::new("/")))?;
        if let Ok(stat) = rustix::fs::statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
            let there = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if !(there && header.kind == Kind::Directory) {
                self.root.remove_all(&path)?;
                self.forget(&path);
                // It may have been on the way to the directory that is kept open.
                self.last = None;
            }
        }
        let new = Mode::from_raw_mode(0o600);
        match header.kind {
            Kind::Directory => match rustix::fs::mkdirat(&dir, &name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(e) => return Err(e.into()),
            },
            Kind::File => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut file: std::fs::File = rustix::fs::openat(&dir, &name, flags, new)?.into();
                let mut buffer = vec![0; BUFFER];
                loop {
                    if self.cancel.is_set() {
                        return Err(ExtractError::Cancelled);
                    }
                    match reader.read_body(&mut buffer)? {
                        0 => break,
                        n => file.write_all(&buffer[..n])?,
                    }
                }
            }
            Kind::HardLink => {
                let target = inside(&header.link)?;
                let (from, from_name) = self.root.parent(&target)?;
                rustix::fs::linkat(&from, &from_name, &dir, &name, AtFlags::empty())?;
                return Ok(());
            }
            Kind::Symlink => rustix::fs::symlinkat(OsStr::from_bytes(&header.link), &dir, &name)?,
            Kind::Char | Kind::Block | Kind::Fifo => {
                let kind = match header.kind {
                    Kind::Char => FileType::CharacterDevice,
                    Kind::Block => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                let device = rustix::fs::makedev(header.device.0, header.device.1);
                super::refuse_whiteout(kind, device)?;
                rustix::fs::mknodat(&dir, &name, kind, new, device)?;
            }
        }
        self.attributes(header, &dir, &name, path)
    }

    /// Opens the directory an entry goes into, making it if the archive did not.
    fn directory(&mut self, path: &Path) -> Result<OwnedFd, ExtractError> {
        if let Some((last, fd)) = &self.last
            && last == path
        {
            return Ok(fd.try_clone()?);
        }
        self.root.mkdir_all(path, 0o755, None)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = OwnedFd::from(self.root.open_file(path, flags)?);
        self.last = Some((path.to_path_buf(), fd.try_clone()?));
        Ok(fd)
    }

    fn attributes(
        &mut self,
        header: &Header,
        dir: &OwnedFd,
        name: &OsStr,
        path: PathBuf,
    ) -> Result<(), ExtractError> {
        let (uid, gid) = self.owner.unwrap_or((header.uid, header.gid));
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        rustix::fs::chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        let time = Timespec {
            tv_sec: header.mtime.seconds,
            tv_nsec: header.mtime.nanos.into(),
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        if header.kind == Kind::Symlink {
            return Ok(rustix::fs::utimensat(
                dir,
                name,
                &times,
                AtFlags::SYMLINK_NOFOLLOW,
            )?);
        }
        rustix::fs::chmodat(
            dir,
            name,
            Mode::from_raw_mode(header.mode & 0o7777),
            AtFlags::empty(),
        )?;
        if matches!(header.kind, Kind::File | Kind::Directory) && !header.xattrs.is_empty() {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(dir, name, flags, Mode::empty())?;
            for (key, value) in header.xattrs.iter().filter(|(key, _)| !super::is_overlays(key)) {
                if let Err(error) = rustix::fs::fsetxattr(&fd, &key[..], value, XattrFlags::empty()) {
                    tracing::debug!(%error, "an extended attribute of an archive is not kept");
                }
            }
        }
        if header.kind == Kind::Directory {
            return self.remember(path, times);
        }
        Ok(rustix::fs::utimensat(
            dir,
            name,
            &times,
            AtFlags::SYMLINK_NOFOLLOW,
        )?)
    }
}

fn is_no_directory(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let expected = [Errno::NOENT, Errno::NOTDIR, Errno::LOOP].map(Errno::raw_os_error);
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let code = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::raw_os_error);
        if code.is_some_and(|code| expected.contains(&code)) {
            return true;
        }
        // An error inside another is not its source, but what its source would be.
        cause = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    false
}

/// A name of the archive as an absolute path below the destination.
fn inside(name: &[u8]) -> Result<PathBuf, ExtractError> {
    let mut path = PathBuf::from("/");
    for part in Path::new(OsStr::from_bytes(name)).components() {
        match part {
            Component::Normal(part) => path.push(part),
            Component::ParentDir if path.pop() => {}
            Component::ParentDir => {
                let why = format!("{:?} leads out of the archive", String::from_utf8_lossy(name));
                return Err(io::Error::new(io::ErrorKind::InvalidData, why).into());
            }
            _ => {}
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_is_told_by_content() {
        assert_eq!(Packing::of(&[0x1f, 0x8b, 8, 0]), Packing::Gzip);
        assert_eq!(Packing::of(b"BZh91AY"), Packing::Bzip2);
        assert_eq!(Packing::of(b"\xfd7zXZ\0"), Packing::Xz);
        assert_eq!(Packing::of(&[0x28, 0xb5, 0x2f, 0xfd]), Packing::Zstd);
        assert_eq!(Packing::of(b"text"), Packing::Plain);
        assert_eq!(Packing::of(b""), Packing::Plain);
    }

    #[test]
    fn names_that_climb_out_are_refused() {
        assert_eq!(inside(b"./a/../b").unwrap(), Path::new("/b"));
        assert_eq!(inside(b"/etc/passwd").unwrap(), Path::new("/etc/passwd"));
        assert!(inside(b"../x").is_err());
        assert!(inside(b"a/../../x").is_err());
    }
}
