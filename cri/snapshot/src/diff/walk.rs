//! The walk over an upper directory, relative to directory descriptors, that writes the tar.

use super::compare::{same_directory, same_entry, same_owner_and_mode};
use super::{DiffError, DiffOptions, DiffStats, Lower};
use crate::attributes::{
    OPAQUE_MARKER, WHITEOUT_PREFIX, Xattrs, is_opaque, is_whiteout, kind, mtime, stat_at, xattrs_at,
    xattrs_of,
};
use crate::lower::{Found, MergedDir, View};
use crate::tar::{Header, Kind, Time, Writer};
use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, Stat};
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Each level holds a descriptor; no real tree comes near it.
const MAX_DEPTH: usize = 400;
/// The longest path that the kernel resolves, and so the longest a layer can use.
const MAX_PATH: usize = 4095;

type Result<T> = std::result::Result<T, DiffError>;

/// What lies below a directory.
enum Below {
    /// Not known.
    Unknown,
    /// This, perhaps nothing.
    Known(MergedDir),
}

/// A directory whose header is written once something in it is.
struct Pending {
    header: Header,
    opaque_marker: bool,
}

struct Walk<W: Write> {
    out: Writer<W>,
    view: View,
    clamp: Option<i64>,
    skip: HashSet<Vec<u8>>,
    /// The first name of each inode that has several.
    links: HashMap<(u64, u64), Vec<u8>>,
    /// The directories from the top to here; the first `announced` have been written.
    pending: Vec<Pending>,
    announced: usize,
    stats: DiffStats,
}

pub(super) fn write(upper: &Path, options: &DiffOptions<'_>, out: &mut dyn Write) -> Result<DiffStats> {
    let below = |e| entry_error("open what lies below", b".")(e);
    let (view, known) = match options.lower {
        Lower::None => (View::of_layers::<&Path>(&[]).map_err(below)?, false),
        Lower::Mounted(tree) => (View::of_mounted(tree).map_err(below)?, true),
        Lower::Layers(layers) => (View::of_layers(layers).map_err(below)?, true),
    };
    let skip = options.skip.iter().map(|path| relative(path)).collect();
    let mut walk = Walk {
        out: Writer::new(out),
        view,
        clamp: options.clamp_mtime,
        skip,
        links: HashMap::new(),
        pending: Vec::new(),
        announced: 0,
        stats: DiffStats::default(),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, upper, flags, Mode::empty())
        .map_err(|e| entry_error("open", b".")(e.into()))?;
    let below = if known {
        Below::Known(walk.view.root())
    } else {
        Below::Unknown
    };
    walk.root(root.as_fd(), &below)?;
    walk.directory(&root, b"", &below, 0)?;
    let mut stats = walk.stats;
    (_, stats.tar_bytes) = walk.out.finish().map_err(DiffError::Write)?;
    Ok(stats)
}

impl<W: Write> Walk<W> {
    /// The root has an entry only where its owner, mode or attributes changed: every layer touches its time.
    fn root(&mut self, root: BorrowedFd<'_>, below: &Below) -> Result<()> {
        let failed = || entry_error("look at", b".");
        let stat = rustix::fs::fstat(root).map_err(|e| failed()(e.into()))?;
        let xattrs = xattrs_of(root).map_err(failed())?;
        let usual = match below {
            Below::Known(dir) if dir.nearest().is_some() => {
                let below = self.view.root_of(dir.nearest().unwrap_or(0));
                let theirs = rustix::fs::fstat(below).map_err(|e| failed()(e.into()))?;
                same_owner_and_mode(&stat, &theirs) && xattrs_of(below).map_err(failed())? == xattrs
            }
            _ => stat.st_mode & 0o7777 == 0o755 && (stat.st_uid, stat.st_gid) == (0, 0) && xattrs.is_empty(),
        };
        if usual {
            return Ok(());
        }
        let header = self.header(b"./", Kind::Directory, &stat, xattrs);
        self.put(&header)
    }

    fn directory(&mut self, dir: &OwnedFd, path: &[u8], below: &Below, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(DiffError::TooDeep {
                path: String::from_utf8_lossy(&path[..200.min(path.len())]).into(),
            });
        }
        let (whiteouts, entries) = list(dir, path)?;
        for name in &whiteouts {
            self.whiteout(&join(path, name), name, below)?;
        }
        for (name, stat) in &entries {
            let child = join(path, name);
            if child.len() > MAX_PATH {
                return Err(DiffError::TooDeep {
                    path: String::from_utf8_lossy(&child[..200]).into(),
                });
            }
            if name.starts_with(WHITEOUT_PREFIX) {
                return Err(DiffError::Reserved {
                    path: String::from_utf8_lossy(&child).into(),
                });
            }
            let found = self.look_below(below, &child)?;
            match kind(stat) {
                FileType::Directory => self.subdirectory(dir.as_fd(), name, &child, found, depth)?,
                FileType::Socket => self.stats.sockets += 1,
                _ => self.leaf(dir.as_fd(), name, &child, stat, found)?,
            }
        }
        Ok(())
    }

    fn subdirectory(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        found: Option<Found>,
        depth: usize,
    ) -> Result<()> {
        let look = || entry_error("look at", path);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(parent, OsStr::from_bytes(name), flags, Mode::empty())
            .map_err(|e| entry_error("open", path)(e.into()))?;
        let stat = rustix::fs::fstat(&dir).map_err(|e| look()(e.into()))?;
        let xattrs = xattrs_of(dir.as_fd()).map_err(look())?;
        let opaque = is_opaque(dir.as_fd()).map_err(look())?;
        let (below, opaque_marker, quiet) = match found {
            None => (Below::Unknown, opaque, self.skip.contains(path)),
            Some(Found::Directory { .. }) if opaque => (Below::Known(MergedDir::default()), true, false),
            Some(Found::Directory {
                dir: below,
                stat: theirs,
            }) => {
                let layer = below.nearest().unwrap_or(0);
                let same = same_directory(&stat, &xattrs, &theirs, &self.view, layer, as_path(path));
                let same = same.map_err(entry_error("compare", path))?;
                (Below::Known(below), false, same)
            }
            Some(_) => (
                Below::Known(MergedDir::default()),
                false,
                self.skip.contains(path),
            ),
        };
        let header = self.header(path, Kind::Directory, &stat, xattrs);
        self.pending.push(Pending {
            header,
            opaque_marker,
        });
        if !quiet {
            self.announce()?;
        }
        self.directory(&dir, path, &below, depth + 1)?;
        self.pending.pop();
        if self.announced > self.pending.len() {
            self.announced = self.pending.len();
        } else {
            self.stats.unchanged += 1;
        }
        Ok(())
    }

    fn leaf(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        stat: &Stat,
        found: Option<Found>,
    ) -> Result<()> {
        let is_file = kind(stat) == FileType::RegularFile;
        let new = matches!(found, None | Some(Found::Nothing));
        if is_file && new && stat.st_size == 0 && self.skip.contains(path) {
            return Ok(());
        }
        if stat.st_nlink > 1 {
            let first = self
                .links
                .entry((stat.st_dev, stat.st_ino))
                .or_insert_with(|| path.to_vec());
            if first != path {
                let mut header = Header {
                    link: first.clone(),
                    ..Header::new(path, Kind::HardLink)
                };
                header.mode = stat.st_mode & 0o7777;
                (header.uid, header.gid, header.mtime) = (stat.st_uid, stat.st_gid, self.time(stat));
                return self.put(&header);
            }
        } else if let Some(Found::Entry { layer, stat: below }) = found {
            // One of several names is never left out: the others link to it.
            let same = same_entry(
                (dir, OsStr::from_bytes(name), stat),
                &below,
                &self.view,
                layer,
                as_path(path),
            );
            if same.map_err(entry_error("compare", path))? {
                self.stats.unchanged += 1;
                return Ok(());
            }
        }
        if is_file {
            self.file(dir, name, path)
        } else {
            self.special(dir, name, path, stat)
        }
    }

    fn file(&mut self, dir: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir, OsStr::from_bytes(name), flags, Mode::empty())
            .map_err(|e| entry_error("open", path)(e.into()))?;
        let stat = rustix::fs::fstat(&file).map_err(|e| entry_error("look at", path)(e.into()))?;
        if kind(&stat) != FileType::RegularFile {
            let changed = io::Error::other("it became something else while the layer was read");
            return Err(entry_error("read", path)(changed));
        }
        let xattrs = xattrs_of(file.as_fd()).map_err(entry_error("look at", path))?;
        let mut header = self.header(path, Kind::File, &stat, xattrs);
        header.size = u64::try_from(stat.st_size).unwrap_or(0);
        self.announce()?;
        self.stats.entries += 1;
        let mut contents = Contents {
            file: File::from(file),
            failed: false,
        };
        let written = self.out.file(&header, &mut contents);
        written.map_err(
            |e| match contents.failed || e.kind() == io::ErrorKind::UnexpectedEof {
                true => entry_error("read", path)(e),
                false => DiffError::Write(e),
            },
        )
    }

    fn special(&mut self, dir: BorrowedFd<'_>, name: &[u8], path: &[u8], stat: &Stat) -> Result<()> {
        let name = OsStr::from_bytes(name);
        let kind = match kind(stat) {
            FileType::Symlink => Kind::Symlink,
            FileType::CharacterDevice => Kind::Char,
            FileType::BlockDevice => Kind::Block,
            _ => Kind::Fifo,
        };
        let xattrs = xattrs_at(dir, name).map_err(entry_error("look at", path))?;
        let mut header = self.header(path, kind, stat, xattrs);
        if kind == Kind::Symlink {
            let target = rustix::fs::readlinkat(dir, name, Vec::new());
            header.link = target
                .map_err(|e| entry_error("read the link", path)(e.into()))?
                .into_bytes();
            header.mode = 0o777;
        }
        header.device = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        self.put(&header)
    }

    /// A whiteout is needed where it hides something.
    fn whiteout(&mut self, path: &[u8], name: &[u8], below: &Below) -> Result<()> {
        if let Some(Found::Nothing) = self.look_below(below, path)? {
            return Ok(());
        }
        let parent = &path[..path.len() - name.len()];
        self.put(&Header::new([parent, WHITEOUT_PREFIX, name].concat(), Kind::File))
    }

    fn look_below(&self, below: &Below, path: &[u8]) -> Result<Option<Found>> {
        match below {
            Below::Unknown => Ok(None),
            Below::Known(dir) => self
                .view
                .lookup(dir, as_path(path))
                .map(Some)
                .map_err(entry_error("look below", path)),
        }
    }

    /// Writes the headers of the directories that lead here, those not written yet.
    fn announce(&mut self) -> Result<()> {
        while let Some(pending) = self.pending.get(self.announced) {
            self.out.entry(&pending.header).map_err(DiffError::Write)?;
            self.stats.entries += 1;
            if pending.opaque_marker {
                let marker = [pending.header.path.as_slice(), b"/", OPAQUE_MARKER].concat();
                self.out
                    .entry(&Header::new(marker, Kind::File))
                    .map_err(DiffError::Write)?;
                self.stats.entries += 1;
            }
            self.announced += 1;
        }
        Ok(())
    }

    fn put(&mut self, header: &Header) -> Result<()> {
        self.announce()?;
        self.stats.entries += 1;
        self.out.entry(header).map_err(DiffError::Write)
    }

    fn header(&self, path: &[u8], kind: Kind, stat: &Stat, xattrs: Xattrs) -> Header {
        Header {
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: self.time(stat),
            xattrs,
            ..Header::new(path, kind)
        }
    }

    fn time(&self, stat: &Stat) -> Time {
        let (seconds, _) = mtime(stat);
        Time {
            seconds: self.clamp.map_or(seconds, |latest| seconds.min(latest)),
            nanos: 0,
        }
    }
}

/// A file's contents, remembering whose fault an error was.
struct Contents {
    file: File,
    failed: bool,
}

impl io::Read for Contents {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer);
        self.failed = matches!(&read, Err(e) if e.kind() != io::ErrorKind::Interrupted);
        read
    }
}

type Listed = (Vec<Vec<u8>>, Vec<(Vec<u8>, Stat)>);

/// The names in a directory, sorted: what is deleted, and what is there.
fn list(dir: &OwnedFd, path: &[u8]) -> Result<Listed> {
    let failed = || entry_error("list", path);
    let (mut whiteouts, mut entries) = (Vec::new(), Vec::new());
    for entry in Dir::read_from(dir).map_err(|e| failed()(e.into()))? {
        let entry = entry.map_err(|e| failed()(e.into()))?;
        let name = entry.file_name().to_bytes();
        if matches!(name, b"." | b"..") {
            continue;
        }
        let stat = stat_at(dir.as_fd(), OsStr::from_bytes(name))
            .map_err(entry_error("look at", &join(path, name)))?;
        match stat {
            None => {}
            Some(stat) if is_whiteout(&stat) => whiteouts.push(name.to_vec()),
            Some(stat) => entries.push((name.to_vec(), stat)),
        }
    }
    whiteouts.sort_unstable();
    entries.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    Ok((whiteouts, entries))
}

fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    if path.is_empty() {
        name.to_vec()
    } else {
        [path, b"/", name].concat()
    }
}

fn as_path(path: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(path))
}

/// A stub's path as the walk spells it.
fn relative(path: &Path) -> Vec<u8> {
    let bytes = path.as_os_str().as_bytes();
    let parts: Vec<&[u8]> = bytes
        .split(|b| *b == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .collect();
    parts.join(&b'/')
}

fn entry_error(act: &'static str, path: &[u8]) -> impl FnOnce(io::Error) -> DiffError + use<> {
    let path = String::from_utf8_lossy(path).into_owned();
    move |source| DiffError::Entry { act, path, source }
}
