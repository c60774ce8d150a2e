//! What a layer needs from the layers below it, done when those are in place.
//!
//! Works on a layer whose archive has been read to its end, before it is committed. The parents are only read.

use super::apply::exists;
use super::descent::Descent;
use super::tree::{join, split};
use super::{FixUps, UnpackError, at, shown};
use crate::attributes::{
    is_opaque, is_whiteout, kind, mtime, set_opaque, set_xattrs, set_xattrs_at, stat_at, times, xattrs_at,
    xattrs_of,
};
use crate::lower::{Found, View};
use crate::snapshotter::Usage;
use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// As the kernel: so many links in one name.
const MAX_LINKS: usize = 40;
/// So many components in one name, those of links included.
const MAX_PARTS: usize = 3000;

type Result<T> = std::result::Result<T, UnpackError>;

struct Fixer<'a> {
    below: &'a View,
    own: &'a View,
    fix_ups: &'a FixUps,
    /// Files copied up so far: where they are below → where they are now.
    copied: HashMap<Vec<u8>, Vec<u8>>,
    added: Usage,
}

/// A file of a lower layer.
struct Source {
    path: Vec<u8>,
    layer: usize,
    stat: Stat,
}

/// Does what depends on the parents (nearest first); returns what it added. To be called once, in the order of the
/// layers, before the layer is committed.
///
/// # Errors
/// [`UnpackError::Link`] when a hard link's target is in no layer; what the system calls say.
pub fn fix_up(dir: &Path, parents: &[PathBuf], fix_ups: &FixUps) -> Result<Usage> {
    if fix_ups.is_empty() {
        return Ok(Usage::default());
    }
    let open = |layers: &[PathBuf]| View::of_layers(layers).map_err(at("open", b"/"));
    let (below, own) = (open(parents)?, open(&[dir.to_path_buf()])?);
    let mut fixer = Fixer {
        below: &below,
        own: &own,
        fix_ups,
        copied: HashMap::new(),
        added: Usage::default(),
    };
    if fix_ups.opaque_root {
        fixer.hide_everything_below()?;
    }
    for (link, target) in &fix_ups.links {
        fixer.link(link, target)?;
    }
    let mut way = Descent::new(&own, &below);
    for path in &fix_ups.whiteouts {
        fixer.check_whiteout(path, &mut way)?;
    }
    for (path, inherits) in &fix_ups.implied {
        fixer.implied(path, *inherits, &mut way)?;
    }
    Ok(fixer.added)
}

impl Fixer<'_> {
    /// Gives a directory without an entry the attributes of the one below, or the epoch where there is none.
    fn implied(&self, path: &[u8], inherits: bool, way: &mut Descent<'_>) -> Result<()> {
        let Some(dir) = self.own_directory(path)? else {
            return Ok(());
        };
        let found = if inherits {
            way.find(path).map_err(at("look below", path))?
        } else {
            Found::Nothing
        };
        match found {
            Found::Directory { dir: below, stat } => {
                let layer = below.nearest().unwrap_or(0);
                let source = self
                    .below
                    .open_at(layer, as_path(path), OFlags::RDONLY | OFlags::DIRECTORY);
                let source = source.map_err(at("open below", path))?;
                let source = source.ok_or_else(|| at("open below", path)(io::ErrorKind::NotFound.into()))?;
                copy_attributes(source.as_fd(), &stat, dir.as_fd()).map_err(at("set the attributes of", path))
            }
            _ => rustix::fs::futimens(&dir, &times(0, 0)).map_err(|e| at("set the time of", path)(e.into())),
        }
    }

    /// Removes a whiteout that hides nothing: in a directory that only this layer has, overlayfs would list its name
    /// (and then not find it).
    fn check_whiteout(&self, path: &[u8], way: &mut Descent<'_>) -> Result<()> {
        let found = way.find(path).map_err(at("look below", path))?;
        if !matches!(found, Found::Nothing) {
            return Ok(());
        }
        let (dir, name) = split(path);
        let Some(parent) = self.own_directory(dir)? else {
            return Ok(());
        };
        let name = OsStr::from_bytes(name);
        // A later entry may have taken its place.
        if stat_at(parent.as_fd(), name)
            .map_err(at("look at", path))?
            .is_some_and(|stat| is_whiteout(&stat))
        {
            let keep = Times::of(parent.as_fd()).map_err(at("look at", dir))?;
            rustix::fs::unlinkat(&parent, name, AtFlags::empty())
                .map_err(|e| at("remove", path)(e.into()))?;
            keep.restore(parent.as_fd()).map_err(at("set the time of", dir))?;
        }
        Ok(())
    }

    /// Makes a hard link to a file of a lower layer: copies the file up, as overlayfs does, and links to the copy.
    fn link(&mut self, link: &[u8], target: &[u8]) -> Result<()> {
        let cannot = |why| UnpackError::Link {
            entry: shown(link),
            target: shown(target),
            why,
        };
        let source = self.source(target)?.ok_or_else(|| cannot("it is in no layer"))?;
        if kind(&source.stat) == FileType::Directory {
            return Err(cannot("it is a directory"));
        }
        let first = match self.copied.get(&source.path) {
            Some(first) => first.clone(),
            None => {
                // A file that this layer deletes or replaces is linked, but not brought back under its own name.
                let at_home = self.is_seen(&source.path)?;
                let first = if at_home {
                    source.path.clone()
                } else {
                    link.to_vec()
                };
                if at_home {
                    self.make_parents(&source.path)?;
                }
                self.copy_up(&source, &first)?;
                self.copied.insert(source.path.clone(), first.clone());
                first
            }
        };
        if first == link {
            Ok(())
        } else {
            self.hard_link(&first, link)
        }
    }

    /// Finds a link's target below, following links among its directories.
    fn source(&self, target: &[u8]) -> Result<Option<Source>> {
        let mut path: Vec<u8> = Vec::new();
        // The directories on the path: the last is where the next name is looked up.
        let mut dirs = vec![self.below.root()];
        let mut rest: Vec<Vec<u8>> = parts(target).into_iter().rev().collect();
        let (mut links, mut seen) = (0, rest.len());
        while let Some(part) = rest.pop() {
            if part == b".." {
                path = split(&path).0.to_vec();
                dirs.truncate(dirs.len().saturating_sub(1).max(1));
                continue;
            }
            let here = join(&path, &part);
            let Some(dir) = dirs.last() else { return Ok(None) };
            let found = self.below.lookup(dir, as_path(&here));
            match found.map_err(at("look below", &here))? {
                Found::Nothing => return Ok(None),
                Found::Directory { dir, .. } if !rest.is_empty() => {
                    path = here;
                    dirs.push(dir);
                }
                Found::Directory { stat, .. } => {
                    return Ok(Some(Source {
                        path: here,
                        layer: 0,
                        stat,
                    }));
                }
                Found::Entry { layer, stat } if rest.is_empty() => {
                    return Ok(Some(Source {
                        path: here,
                        layer,
                        stat,
                    }));
                }
                Found::Entry { layer, stat } if kind(&stat) == FileType::Symlink && links < MAX_LINKS => {
                    links += 1;
                    let to = self.read_link(layer, &here)?;
                    if to.starts_with(b"/") {
                        path.clear();
                        dirs.truncate(1);
                    }
                    let to = parts(&to);
                    seen += to.len();
                    if seen > MAX_PARTS {
                        return Ok(None);
                    }
                    rest.extend(to.into_iter().rev());
                }
                Found::Entry { .. } => return Ok(None),
            }
        }
        Ok(None)
    }

    fn read_link(&self, layer: usize, path: &[u8]) -> Result<Vec<u8>> {
        let (dir, name) = split(path);
        let dir = self
            .below
            .open_at(layer, as_path(dir), OFlags::RDONLY | OFlags::DIRECTORY);
        let dir = dir
            .map_err(at("open below", path))?
            .ok_or_else(|| at("open below", path)(gone()))?;
        let target = rustix::fs::readlinkat(&dir, OsStr::from_bytes(name), Vec::new());
        Ok(target
            .map_err(|e| at("read the link", path)(e.into()))?
            .into_bytes())
    }

    /// Whether a path of the layers below is still seen with this layer on top, and this layer has nothing there.
    fn is_seen(&self, path: &[u8]) -> Result<bool> {
        let mut end = 0;
        loop {
            end = path[end..]
                .iter()
                .position(|b| *b == b'/')
                .map_or(path.len(), |at| end + at);
            let prefix = &path[..end];
            let entry = self
                .own
                .open_at(0, as_path(prefix), OFlags::PATH | OFlags::NOFOLLOW);
            let Some(entry) = entry.map_err(at("look at", prefix))? else {
                return Ok(true);
            };
            let stat = rustix::fs::fstat(&entry).map_err(|e| at("look at", prefix)(e.into()))?;
            if end == path.len() || kind(&stat) != FileType::Directory {
                return Ok(false);
            }
            if let Some(dir) = self.own_directory(prefix)?
                && is_opaque(dir.as_fd()).map_err(at("look at", prefix))?
            {
                return Ok(false);
            }
            end += 1;
        }
    }

    /// Copies up the directories that lead to a path.
    fn make_parents(&mut self, path: &[u8]) -> Result<()> {
        for (end, _) in path.iter().enumerate().filter(|(_, b)| **b == b'/') {
            let prefix = &path[..end];
            if self.own_directory(prefix)?.is_some() {
                continue;
            }
            let (dir, name) = split(prefix);
            let parent = self.own_directory(dir)?.ok_or_else(|| at("open", dir)(gone()))?;
            let keep = Times::of(parent.as_fd()).map_err(at("look at", dir))?;
            rustix::fs::mkdirat(&parent, OsStr::from_bytes(name), Mode::from_raw_mode(0o755))
                .map_err(|e| at("make directory", prefix)(e.into()))?;
            keep.restore(parent.as_fd()).map_err(at("set the time of", dir))?;
            self.added = self.added
                + Usage {
                    bytes: 4096,
                    inodes: 1,
                };
            self.implied(prefix, true, &mut Descent::new(self.own, self.below))?;
        }
        Ok(())
    }

    fn copy_up(&mut self, source: &Source, to: &[u8]) -> Result<()> {
        let (from_dir, from_name) = split(&source.path);
        let from = self.below.open_at(
            source.layer,
            as_path(from_dir),
            OFlags::RDONLY | OFlags::DIRECTORY,
        );
        let from = from.map_err(at("open below", &source.path))?;
        let from = from.ok_or_else(|| at("open below", &source.path)(gone()))?;
        self.put(to, |dir, name| {
            copy_entry(
                from.as_fd(),
                OsStr::from_bytes(from_name),
                &source.stat,
                dir,
                name,
            )
        })?;
        let bytes = u64::try_from(source.stat.st_size)
            .unwrap_or(0)
            .next_multiple_of(4096);
        self.added = self.added + Usage { bytes, inodes: 1 };
        Ok(())
    }

    fn hard_link(&self, first: &[u8], link: &[u8]) -> Result<()> {
        let (dir, name) = split(first);
        let from = self.own_directory(dir)?.ok_or_else(|| at("open", dir)(gone()))?;
        self.put(link, |to, to_name| {
            Ok(rustix::fs::linkat(
                &from,
                OsStr::from_bytes(name),
                to,
                to_name,
                AtFlags::empty(),
            )?)
        })
    }

    /// Puts something into a directory of the layer without changing the directory's time. Only a whiteout may be
    /// in its place.
    fn put(&self, path: &[u8], make: impl FnOnce(BorrowedFd<'_>, &OsStr) -> io::Result<()>) -> Result<()> {
        let (dir, name) = split(path);
        let name = OsStr::from_bytes(name);
        let parent = self.own_directory(dir)?.ok_or_else(|| at("open", dir)(gone()))?;
        let keep = Times::of(parent.as_fd()).map_err(at("look at", dir))?;
        if stat_at(parent.as_fd(), name)
            .map_err(at("look at", path))?
            .is_some_and(|stat| is_whiteout(&stat))
        {
            rustix::fs::unlinkat(&parent, name, AtFlags::empty())
                .map_err(|e| at("replace", path)(e.into()))?;
        }
        make(parent.as_fd(), name).map_err(at("make", path))?;
        keep.restore(parent.as_fd()).map_err(at("set the time of", dir))
    }

    /// The root is opaque: every name below that this layer does not have gets a whiteout, every directory it
    /// shares becomes opaque.
    fn hide_everything_below(&mut self) -> Result<()> {
        let failed = |e: io::Error| at("hide what lies below", b"/")(e);
        let own = self.own_directory(b"")?.ok_or_else(|| failed(gone()))?;
        let keep = Times::of(own.as_fd()).map_err(failed)?;
        for layer in 0..self.below.layers() {
            let list = self
                .below
                .open_at(layer, Path::new(""), OFlags::RDONLY | OFlags::DIRECTORY)
                .map_err(failed)?;
            let list = list.ok_or_else(|| failed(gone()))?;
            // One name at a time: there may be more of them than memory.
            for entry in Dir::read_from(&list).map_err(|e| failed(e.into()))? {
                let entry = entry.map_err(|e| failed(e.into()))?;
                let name = entry.file_name().to_bytes();
                if !matches!(name, b"." | b"..") {
                    self.hide_below_root(own.as_fd(), name).map_err(failed)?;
                }
            }
        }
        keep.restore(own.as_fd()).map_err(failed)
    }

    fn hide_below_root(&mut self, own: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
        let found = self.below.lookup(&self.below.root(), as_path(name))?;
        if matches!(found, Found::Nothing) {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        if let Some(dir) = self.own.open_at(0, as_path(name), flags)? {
            set_opaque(dir.as_fd())?;
        } else if !exists(own, name)? && !self.fix_ups.links.contains_key(name) {
            let name = OsStr::from_bytes(name);
            rustix::fs::mknodat(own, name, FileType::CharacterDevice, Mode::empty(), 0)?;
            self.added.inodes += 1;
        }
        Ok(())
    }

    fn own_directory(&self, path: &[u8]) -> Result<Option<OwnedFd>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        self.own
            .open_at(0, as_path(path), flags)
            .map_err(at("open", path))
    }
}

/// A directory's times, kept over a change in it.
struct Times(Stat);

impl Times {
    fn of(dir: BorrowedFd<'_>) -> io::Result<Times> {
        Ok(Times(rustix::fs::fstat(dir)?))
    }

    fn restore(self, dir: BorrowedFd<'_>) -> io::Result<()> {
        let (seconds, nanos) = mtime(&self.0);
        Ok(rustix::fs::futimens(dir, &times(seconds, nanos))?)
    }
}

/// Gives an open directory or file what another one has: owner, mode, attributes, times.
fn copy_attributes(from: BorrowedFd<'_>, stat: &Stat, to: BorrowedFd<'_>) -> io::Result<()> {
    rustix::fs::fchown(
        to,
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    )?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    set_xattrs(to, &xattrs_of(from)?)?;
    let (seconds, nanos) = mtime(stat);
    Ok(rustix::fs::futimens(to, &times(seconds, nanos))?)
}

/// Copies anything but a directory.
fn copy_entry(
    from: BorrowedFd<'_>,
    from_name: &OsStr,
    stat: &Stat,
    to: BorrowedFd<'_>,
    to_name: &OsStr,
) -> io::Result<()> {
    if kind(stat) == FileType::RegularFile {
        let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let write = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut source = File::from(rustix::fs::openat(from, from_name, read, Mode::empty())?);
        let mut copy = File::from(rustix::fs::openat(
            to,
            to_name,
            write,
            Mode::from_raw_mode(0o600),
        )?);
        if !slipway_sys::fs::reflink(&source, &copy)? {
            io::copy(&mut source, &mut copy)?;
        }
        return copy_attributes(source.as_fd(), stat, copy.as_fd());
    }
    if kind(stat) == FileType::Symlink {
        let target = rustix::fs::readlinkat(from, from_name, Vec::new())?;
        rustix::fs::symlinkat(target, to, to_name)?;
    } else {
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        rustix::fs::mknodat(to, to_name, kind(stat), mode, stat.st_rdev)?;
        rustix::fs::chmodat(to, to_name, mode, AtFlags::empty())?;
    }
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(to, to_name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    set_xattrs_at(to, to_name, &xattrs_at(from, from_name)?)?;
    let (seconds, nanos) = mtime(stat);
    Ok(rustix::fs::utimensat(
        to,
        to_name,
        &times(seconds, nanos),
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// Gives the (empty) root of a new writable tree the owner, mode and attributes of the nearest parent's root:
/// overlayfs shows the topmost root's.
///
/// # Errors
/// What the system calls say, with the directory.
pub fn inherit_root(dir: &Path, nearest: &Path) -> crate::Result<()> {
    let copy = || -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |path| rustix::fs::openat(rustix::fs::CWD, path, flags, Mode::empty());
        let (from, to) = (open(nearest)?, open(dir)?);
        copy_attributes(from.as_fd(), &rustix::fs::fstat(&from)?, to.as_fd())
    };
    copy().map_err(crate::error::at("inherit the root's attributes for", dir))
}

fn parts(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|b| *b == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(<[u8]>::to_vec)
        .collect()
}

fn as_path(path: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(path))
}

fn gone() -> io::Error {
    Errno::NOENT.into()
}
