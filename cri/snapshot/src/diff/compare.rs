//! Whether an entry is what it was below: overlayfs copies up whatever is opened for writing, changed or not.
//!
//! Times are compared as a layer's tar holds them, in whole seconds. The layer below may have been built here, with
//! the kernel's nanoseconds, and come back from a registry without them: the answer has to be the same.

use crate::attributes::{Xattrs, kind, xattrs_at, xattrs_of};
use crate::lower::View;
use rustix::fs::{FileType, OFlags, Stat};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Owner, permissions and type are equal.
pub(super) fn same_owner_and_mode(a: &Stat, b: &Stat) -> bool {
    (a.st_mode, a.st_uid, a.st_gid) == (b.st_mode, b.st_uid, b.st_gid)
}

/// A directory's own attributes are equal to those of the one below.
pub(super) fn same_directory(
    stat: &Stat,
    xattrs: &Xattrs,
    below: &Stat,
    view: &View,
    layer: usize,
    path: &Path,
) -> io::Result<bool> {
    if !same_owner_and_mode(stat, below) || stat.st_mtime != below.st_mtime {
        return Ok(false);
    }
    match view.open_at(layer, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW)? {
        Some(dir) => Ok(xattrs_of(dir.as_fd())? == *xattrs),
        None => Ok(false),
    }
}

/// Anything else is equal to what lies below, contents included. `name` in `dir` is what `stat` describes.
pub(super) fn same_entry(
    (dir, name, stat): (BorrowedFd<'_>, &OsStr, &Stat),
    below: &Stat,
    view: &View,
    layer: usize,
    path: &Path,
) -> io::Result<bool> {
    let same = same_owner_and_mode(stat, below)
        && stat.st_mtime == below.st_mtime
        && stat.st_size == below.st_size
        && stat.st_rdev == below.st_rdev;
    if !same {
        return Ok(false);
    }
    match kind(stat) {
        FileType::RegularFile => {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
            let Some(theirs) = view.open_at(layer, path, flags)? else {
                return Ok(false);
            };
            let ours = rustix::fs::openat(dir, name, flags | OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
            if xattrs_of(ours.as_fd())? != xattrs_of(theirs.as_fd())? {
                return Ok(false);
            }
            same_contents(ours, theirs)
        }
        FileType::Symlink => {
            let Some(parent) = parent_below(view, layer, path)? else {
                return Ok(false);
            };
            let ours = rustix::fs::readlinkat(dir, name, Vec::new())?;
            let theirs = rustix::fs::readlinkat(&parent, name, Vec::new())?;
            Ok(ours.as_bytes() == theirs.as_bytes()
                && xattrs_at(dir, name)? == xattrs_at(parent.as_fd(), name)?)
        }
        _ => {
            let Some(parent) = parent_below(view, layer, path)? else {
                return Ok(false);
            };
            Ok(xattrs_at(dir, name)? == xattrs_at(parent.as_fd(), name)?)
        }
    }
}

fn parent_below(view: &View, layer: usize, path: &Path) -> io::Result<Option<OwnedFd>> {
    let parent = path.parent().unwrap_or(Path::new(""));
    view.open_at(layer, parent, OFlags::RDONLY | OFlags::DIRECTORY)
}

fn same_contents(ours: OwnedFd, theirs: OwnedFd) -> io::Result<bool> {
    let (mut ours, mut theirs) = (File::from(ours), File::from(theirs));
    let (mut a, mut b) = (vec![0u8; 128 << 10], vec![0u8; 128 << 10]);
    loop {
        let n = fill(&mut ours, &mut a)?;
        let m = fill(&mut theirs, &mut b)?;
        if a[..n] != b[..m] {
            return Ok(false);
        }
        if n == 0 {
            return Ok(true);
        }
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}
