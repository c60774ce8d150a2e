//! Scaffolding: what is put into an upper directory so that a command can run there, and is no part of what the command
//! makes.
//!
//! ```text
//! Survey::of(upper) ─ mount points, links, caches are made ─▶ Survey::scaffold ─ the command runs ─▶ unmount ─▶ Scaffold::strike
//! ```
//! What was put there and still has the same contents goes again, whoever owns it by now, so that what lies below shows as
//! it was. What the command changed of it, or put into its directories, stays; so does a file or link that it put in the
//! place of one, be they alike, and an empty directory to which it gave another owner or mode. Of a file that it only
//! appended to, what it appended stays. What it took elsewhere is its own. Refuses to know what made the scaffolding, and why.

use crate::attributes::{kind, mtime, stat_at, times, xattrs_of};
use crate::error::{Result, at};
use crate::lower::{Found, View};
use crate::rootfs::RootfsMount;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Scaffolding of more entries than this is none.
const MOST: usize = 100_000;
/// More bytes than this are not moved within a file.
const MOST_MOVED: i64 = 1 << 20;

/// What is in an upper directory at a moment, by relative path; the directory itself is the empty one.
#[derive(Debug)]
pub struct Survey {
    entries: BTreeMap<PathBuf, Mark>,
}

/// What tells one state of an entry from another.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mark {
    kind: FileType,
    inode: u64,
    /// When a file came to be, where that is known: inodes are used again.
    born: Option<(i64, u32)>,
    size: i64,
    owner: (u32, u32),
    mode: u32,
    changed: (i64, u64),
    modified: (i64, u32),
    content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    /// A directory's is its entries.
    Directory,
    /// A file with nothing in it.
    Empty,
    File([u8; 32]),
    Link(Vec<u8>),
    /// A device, a whiteout, a socket: its number.
    Other(u64),
}

/// What came between two surveys.
#[derive(Debug)]
pub struct Scaffold {
    upper: PathBuf,
    /// Parents before what is in them.
    put: BTreeMap<PathBuf, Put>,
}

#[derive(Debug)]
struct Put {
    mark: Mark,
    /// When it was modified last before, where it was there.
    before: Option<(i64, u32)>,
}

impl Mark {
    /// Whether `now` is what this was, but for its owner, mode and times.
    fn is_still(&self, now: &Mark) -> bool {
        (self.inode, self.born, &self.content) == (now.inode, now.born, &now.content)
    }
}

impl Survey {
    /// Looks at all of `upper`, which may be mounted.
    ///
    /// # Errors
    /// What cannot be read.
    pub fn of(upper: &Path) -> Result<Survey> {
        let read = || {
            let root = open_root(upper)?;
            let mut entries = BTreeMap::from([(PathBuf::new(), mark(&rustix::fs::fstat(&root)?, None)?)]);
            let mut pending = vec![PathBuf::new()];
            while let Some(path) = pending.pop() {
                let Some(dir) = open_dir(root.as_fd(), &path)? else {
                    continue;
                };
                for name in names(&dir)? {
                    let Some(stat) = stat_at(dir.as_fd(), &name)? else {
                        continue;
                    };
                    let inside = path.join(&name);
                    if kind(&stat) == FileType::Directory {
                        pending.push(inside.clone());
                    }
                    entries.insert(inside, mark(&stat, Some((dir.as_fd(), name.as_os_str())))?);
                    if entries.len() > MOST {
                        return Err(io::Error::other(format!("more than {MOST} files")));
                    }
                }
            }
            Ok(Survey { entries })
        };
        read().map_err(at("survey", upper))
    }

    /// What has come into `upper` since this survey, or was changed there.
    ///
    /// # Errors
    /// What cannot be read.
    pub fn scaffold(&self, upper: &Path) -> Result<Scaffold> {
        let now = Survey::of(upper)?;
        let put = now.entries.into_iter().filter_map(|(path, mark)| {
            let before = self.entries.get(&path);
            let same = before.is_some_and(|b| (b.inode, b.changed) == (mark.inode, mark.changed));
            let before = before.map(|b| b.modified);
            (!same).then_some((path, Put { mark, before }))
        });
        Ok(Scaffold {
            upper: upper.to_path_buf(),
            put: put.collect(),
        })
    }
}

impl Scaffold {
    /// Takes it away from the upper directory of `mount`, which must not be mounted. A link among `named` (relative paths)
    /// that leads to a file beside it which stays, stays too: the command has found it there and counts on it.
    ///
    /// # Errors
    /// What cannot be removed or put back.
    pub fn strike(&self, mount: &RootfsMount, named: &BTreeSet<PathBuf>) -> Result<()> {
        self.strike_in(mount, named)
            .map_err(at("take the scaffolding out of", &self.upper))
    }

    /// Whether there is a file at `path` that is not, or not any more, the scaffolding's or of the layers below.
    ///
    /// # Errors
    /// What cannot be read.
    pub fn is_remade(&self, mount: &RootfsMount, path: &Path) -> Result<bool> {
        let look = || {
            let root = open_root(&self.upper)?;
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                return Ok(false);
            };
            let Some(dir) = open_dir(root.as_fd(), parent)? else {
                return Ok(false);
            };
            let Some(stat) = stat_at(dir.as_fd(), name)? else {
                return Ok(false);
            };
            if kind(&stat) != FileType::RegularFile {
                return Ok(false);
            }
            let now = || mark(&stat, Some((dir.as_fd(), name)));
            if let Some(put) = self.put.get(path) {
                return Ok(put.mark.size != stat.st_size || !put.mark.is_still(&now()?));
            }
            let below = View::of_layers(mount.lower())?;
            let Found::Entry { layer, stat: theirs } = below.find(path)? else {
                return Ok(true);
            };
            let parent = below.open_at(layer, parent, OFlags::RDONLY | OFlags::DIRECTORY)?;
            let Some(parent) = parent.filter(|_| theirs.st_size == stat.st_size) else {
                return Ok(true);
            };
            // Copied up, and not written to.
            let theirs = mark(&theirs, Some((parent.as_fd(), name)))?;
            Ok(theirs.content != now()?.content)
        };
        look().map_err(at("look at a file of", &self.upper))
    }

    fn strike_in(&self, mount: &RootfsMount, named: &BTreeSet<PathBuf>) -> io::Result<()> {
        let root = open_root(&self.upper)?;
        let below = View::of_layers(mount.lower())?;
        // Before anything goes, since that changes them.
        let times = self.times_of_directories(root.as_fd())?;
        let is_named = |path: &Path, put: &Put| put.mark.kind == FileType::Symlink && named.contains(path);
        for (path, put) in self.put.iter().rev() {
            if !path.as_os_str().is_empty() && !is_named(path, put) {
                remove(root.as_fd(), path, put, &below)?;
            }
        }
        // Then it is known what they lead to; and what has only them in it.
        for (path, put) in self.put.iter().filter(|(path, put)| is_named(path, put)) {
            if leads_beside(root.as_fd(), path, put, &below)? {
                continue;
            }
            remove(root.as_fd(), path, put, &below)?;
            let folders = path.ancestors().skip(1);
            for (folder, put) in folders.filter_map(|f| Some((f, self.put.get(f)?))) {
                if !folder.as_os_str().is_empty() {
                    remove(root.as_fd(), folder, put, &below)?;
                }
            }
        }
        for (path, now) in times {
            self.restore_time(root.as_fd(), path, now, &below)?;
        }
        Ok(())
    }

    fn times_of_directories(&self, root: BorrowedFd<'_>) -> io::Result<Vec<(&Path, (i64, u32))>> {
        let mut paths: BTreeSet<&Path> = BTreeSet::new();
        for (path, put) in &self.put {
            paths.extend(path.parent());
            if put.mark.kind == FileType::Directory {
                paths.insert(path);
            }
        }
        let mut times = Vec::new();
        for path in paths {
            if let Some(dir) = open_dir(root, path)? {
                times.push((path, mtime(&rustix::fs::fstat(&dir)?)));
            }
        }
        Ok(times)
    }

    /// A directory that only the scaffolding has changed gets the time it had.
    fn restore_time(
        &self,
        root: BorrowedFd<'_>,
        path: &Path,
        now: (i64, u32),
        below: &View,
    ) -> io::Result<()> {
        let Some(dir) = open_dir(root, path)? else {
            return Ok(());
        };
        let put = self.put.get(path).filter(|put| put.mark.modified == now);
        let earlier = match put {
            None => None,
            Some(put) if put.before.is_some() => put.before,
            Some(_) => match below.find(path)? {
                Found::Directory { stat, .. } => Some(mtime(&stat)),
                Found::Nothing | Found::Entry { .. } => None,
            },
        };
        let (seconds, nanos) = earlier.unwrap_or(now);
        Ok(rustix::fs::futimens(&dir, &times(seconds, nanos))?)
    }
}

/// Whether a link leads to a file in its own directory.
fn leads_beside(root: BorrowedFd<'_>, path: &Path, put: &Put, below: &View) -> io::Result<bool> {
    let (Content::Link(target), Some(parent)) = (&put.mark.content, path.parent()) else {
        return Ok(false);
    };
    let target = OsStr::from_bytes(target);
    if Path::new(target).file_name() != Some(target) {
        return Ok(false);
    }
    let above = match open_dir(root, parent)? {
        Some(dir) => stat_at(dir.as_fd(), target)?,
        None => return Ok(false),
    };
    let stat = match (above, below.find(&parent.join(target))?) {
        (Some(stat), _) | (None, Found::Entry { stat, .. }) => stat,
        _ => return Ok(false),
    };
    Ok(kind(&stat) == FileType::RegularFile)
}

/// Removes an entry that is as it was put there.
fn remove(root: BorrowedFd<'_>, path: &Path, put: &Put, below: &View) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(());
    };
    let Some(dir) = open_dir(root, parent)? else {
        return Ok(());
    };
    let Some(stat) = stat_at(dir.as_fd(), name)? else {
        return Ok(());
    };
    if kind(&stat) != put.mark.kind {
        return Ok(());
    }
    // What the command has made larger is not read whole: it may be of any size.
    if kind(&stat) == FileType::RegularFile && stat.st_size != put.mark.size {
        return cut(&dir, name, &stat, path, put, below);
    }
    let owned_anew =
        (stat.st_uid, stat.st_gid, stat.st_mode) != (put.mark.owner.0, put.mark.owner.1, put.mark.mode);
    if kind(&stat) == FileType::Directory {
        let own = put.before.is_none() && !matches!(below.find(path)?, Found::Directory { .. });
        // Who owns a directory anew wants it.
        if !own || owned_anew {
            return Ok(());
        }
        return match rustix::fs::unlinkat(&dir, name, AtFlags::REMOVEDIR) {
            // The command has put something there.
            Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
            other => Ok(other?),
        };
    }
    let now = mark(&stat, Some((dir.as_fd(), name)))?;
    if !put.mark.is_still(&now) {
        return Ok(());
    }
    if owned_anew
        && now.kind == FileType::RegularFile
        && let Found::Entry { layer, stat: theirs } = below.find(path)?
        && kind(&theirs) == FileType::RegularFile
    {
        return put_back(&dir, name, below, layer, path, &theirs);
    }
    Ok(rustix::fs::unlinkat(&dir, name, AtFlags::empty())?)
}

/// Of a file that the command has only appended to, puts what was there before the scaffolding in that one's place.
fn cut(dir: &OwnedFd, name: &OsStr, stat: &Stat, path: &Path, put: &Put, below: &View) -> io::Result<()> {
    let size = put.mark.size;
    let same = (stat.st_ino, birth(dir.as_fd(), name)?) == (put.mark.inode, put.mark.born);
    let appended = stat.st_size - size;
    if !same || !(1..=MOST_MOVED).contains(&appended) {
        return Ok(());
    }
    if put.mark.content != Content::File(digest(dir.as_fd(), name, size.unsigned_abs())?) {
        return Ok(());
    }
    let mut content = Vec::new();
    if let Found::Entry { layer, stat } = below.find(path)?
        && kind(&stat) == FileType::RegularFile
        && let Some(source) = below.open_at(layer, path, OFlags::RDONLY | OFlags::NOFOLLOW)?
    {
        if stat.st_size > MOST_MOVED {
            return Ok(());
        }
        io::Read::read_to_end(&mut File::from(source), &mut content)?;
    }
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(dir, name, flags, Mode::empty())?);
    io::Seek::seek(&mut file, io::SeekFrom::Start(size.unsigned_abs()))?;
    io::Read::read_to_end(&mut file, &mut content)?;
    file.set_len(0)?;
    io::Seek::rewind(&mut file)?;
    io::Write::write_all(&mut file, &content)?;
    let (seconds, nanos) = mtime(stat);
    Ok(rustix::fs::futimens(&file, &times(seconds, nanos))?)
}

/// Gives a file that the command has taken over, or made another's to use, the contents that it had before.
fn put_back(
    dir: &OwnedFd,
    name: &OsStr,
    below: &View,
    layer: usize,
    path: &Path,
    theirs: &Stat,
) -> io::Result<()> {
    let Some(source) = below.open_at(layer, path, OFlags::RDONLY | OFlags::NOFOLLOW)? else {
        return Ok(());
    };
    let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let target = rustix::fs::openat(dir, name, flags, Mode::empty())?;
    let mut target = File::from(target);
    io::copy(&mut File::from(source), &mut target)?;
    let (seconds, nanos) = mtime(theirs);
    Ok(rustix::fs::futimens(&target, &times(seconds, nanos))?)
}

fn mark(stat: &Stat, entry: Option<(BorrowedFd<'_>, &OsStr)>) -> io::Result<Mark> {
    let born = match entry {
        Some((dir, name)) if kind(stat) != FileType::Directory => birth(dir, name)?,
        _ => None,
    };
    let content = match (kind(stat), entry) {
        (FileType::RegularFile, _) if stat.st_size == 0 => Content::Empty,
        (FileType::RegularFile, Some((dir, name))) => Content::File(digest(dir, name, u64::MAX)?),
        (FileType::Symlink, Some((dir, name))) => {
            Content::Link(rustix::fs::readlinkat(dir, name, Vec::new())?.into_bytes())
        }
        (FileType::Directory, _) => Content::Directory,
        _ => Content::Other(stat.st_rdev),
    };
    Ok(Mark {
        kind: kind(stat),
        inode: stat.st_ino,
        size: stat.st_size,
        born,
        owner: (stat.st_uid, stat.st_gid),
        mode: stat.st_mode,
        changed: (stat.st_ctime, stat.st_ctime_nsec),
        modified: mtime(stat),
        content,
    })
}

fn birth(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<Option<(i64, u32)>> {
    let wanted = rustix::fs::StatxFlags::BTIME;
    let known = rustix::fs::statx(dir, name, AtFlags::SYMLINK_NOFOLLOW, wanted)?;
    let has = known.stx_mask & wanted.bits() != 0;
    Ok(has.then_some((known.stx_btime.tv_sec, known.stx_btime.tv_nsec)))
}

/// Of a file's contents, at most so many bytes of them, and of its own attributes.
fn digest(dir: BorrowedFd<'_>, name: &OsStr, at_most: u64) -> io::Result<[u8; 32]> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(dir, name, flags, Mode::empty())?);
    let mut hash = Sha256::new();
    for (name, value) in xattrs_of(file.as_fd())? {
        for part in [name, value] {
            hash.update(part.len().to_le_bytes());
            hash.update(part);
        }
    }
    let mut file = io::Read::take(file, at_most);
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        match io::Read::read(&mut file, &mut buffer) {
            Ok(0) => return Ok(hash.finalize().into()),
            Ok(n) => hash.update(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

fn open_root(upper: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, upper, flags, Mode::empty())?)
}

/// A directory of the tree, without following a link on the way; `None` when there is none of that name.
fn open_dir(root: BorrowedFd<'_>, path: &Path) -> io::Result<Option<OwnedFd>> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    match rustix::fs::openat2(root, path, flags, Mode::empty(), resolve) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn names(dir: &OwnedFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
        if names.len() > MOST {
            return Err(io::Error::other(format!("more than {MOST} files")));
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests;
