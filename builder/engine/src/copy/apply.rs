//! How selected files land in a root file system. BuildKit's rules, which people's Dockerfiles rely on:
//!
//! * a directory's contents are merged into the destination; an existing top directory keeps its mode and
//!   owner, existing ones below take the source's; new parents are 0755 and belong to --chown or root;
//! * a file replaces a file or link, never a directory; into an existing directory it goes by its own name;
//! * a destination that is a symlink is followed, inside the root; links met below the top are not;
//! * hard links within one source stay hard links; modification times are the source's.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;
use slipway_dockerfile::chmod::Chmod;
use slipway_snapshot::Root;

use super::CopyError;
use super::digest::{Selection, open_entry, real_path, same, xattrs};
use super::owner::Ids;
use super::tree::{Entry, Tree};
use crate::cancel::Cancel;

const CHUNK: usize = 256 * 1024;
const NEW_DIR: u32 = 0o755;
const PLACE: &str = "the image";

/// Where selections go and what they become there.
pub struct Destination<'a> {
    /// The root file system, mounted.
    pub root: &'a Root,
    /// Absolute.
    pub path: &'a str,
    /// It was written as a directory.
    pub is_directory: bool,
    /// `--chown`.
    pub owner: Option<Ids>,
    /// `--chmod`.
    pub chmod: Option<&'a Chmod>,
}

impl Destination<'_> {
    /// Copies one selection.
    ///
    /// # Errors
    /// When a directory would have to replace a file or the other way round, the source changed since it was
    /// listed, or the operating system says no.
    pub fn copy(&self, tree: &Tree, selection: &Selection, cancel: &Cancel) -> Result<(), CopyError> {
        let fail = |act: &'static str, path: &Path, e: std::io::Error| CopyError::at(act, PLACE, path, e);
        let asked = Path::new(self.path);
        let ensure = if self.is_directory {
            Some(asked)
        } else {
            asked.parent()
        };
        if let Some(dir) = ensure {
            self.make_dirs(dir)?;
        }
        let mut target = final_target(self.root, asked)?;
        let there = self
            .root
            .metadata(&target)
            .map_err(|e| fail("look up", &target, e))?;
        let there_dir = there.is_some_and(|s| kind(&s) == FileType::Directory);
        let source_dir = selection.found.is_dir();
        if there_dir && !source_dir {
            target.push(&selection.found.name);
        }
        let mut writer = Writer {
            to: self,
            tree,
            selection,
            cancel,
            levels: Vec::new(),
            links: HashMap::new(),
        };
        if source_dir {
            if there.is_some() && !there_dir {
                return Err(CopyError::NotADirectory {
                    path: relative(&target),
                });
            }
            self.make_dirs(&target)?;
            writer.enter_top(&target)?;
            writer.entries(&selection.entries[1..])?;
        } else {
            self.make_dirs(target.parent().unwrap_or(Path::new("/")))?;
            let (dir, name) = self
                .root
                .parent(&target)
                .map_err(|e| fail("open the parent of", &target, e))?;
            writer.node(&dir, &name, &selection.entries[0], &target)?;
        }
        writer.leave_to(0)
    }

    /// Makes a directory and its parents as COPY makes them.
    fn make_dirs(&self, dir: &Path) -> Result<(), CopyError> {
        let mode = match self.chmod {
            Some(Chmod::Octal(mode)) => *mode,
            _ => NEW_DIR,
        };
        match self.root.mkdir_all(dir, mode, self.owner) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => {
                Err(CopyError::NotADirectory { path: relative(dir) })
            }
            Err(e) => Err(CopyError::at("make directory", PLACE, dir, e)),
        }
    }
}

/// Follows the links at the end of a path, also into what is not there yet.
///
/// # Errors
/// When they go round in circles.
pub fn final_target(root: &Root, path: &Path) -> Result<PathBuf, CopyError> {
    let fail = |e: std::io::Error| CopyError::at("look up", PLACE, path, e);
    let mut at = clean(path);
    for _ in 0..40 {
        let Some(stat) = root.symlink_metadata(&at).map_err(fail)? else {
            // The end is not there; what leads to it may go over links.
            let parent = at.parent().unwrap_or(Path::new("/"));
            return Ok(match (root.resolve(parent), at.file_name()) {
                (Ok(parent), Some(name)) => parent.join(name),
                _ => at,
            });
        };
        if kind(&stat) != FileType::Symlink {
            return root.resolve(&at).map_err(fail);
        }
        let (dir, name) = root.parent(&at).map_err(fail)?;
        let link = rustix::fs::readlinkat(&dir, &name, Vec::new()).map_err(|e| fail(e.into()))?;
        let parent = root
            .resolve(at.parent().unwrap_or(Path::new("/")))
            .map_err(fail)?;
        at = clean(&parent.join(OsStr::from_bytes(link.as_bytes())));
    }
    Err(CopyError::LinkLoop { path: relative(path) })
}

/// Without `.` and `..`, absolute.
fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => {
                out.pop();
            }
            _ => {}
        }
    }
    out
}

fn relative(path: &Path) -> PathBuf {
    path.strip_prefix("/").unwrap_or(path).to_path_buf()
}

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// A destination directory that is open, and what it becomes when all is in it.
struct Level<'a> {
    /// Below the selection's top.
    below: PathBuf,
    path: PathBuf,
    fd: OwnedFd,
    entry: &'a Entry,
    /// Mode, owner and attributes too, not only the time.
    all: bool,
}

struct Writer<'a> {
    to: &'a Destination<'a>,
    tree: &'a Tree,
    selection: &'a Selection,
    cancel: &'a Cancel,
    levels: Vec<Level<'a>>,
    /// Files with more than one name: where the first went.
    links: HashMap<(u64, u64), PathBuf>,
}

impl<'a> Writer<'a> {
    fn enter_top(&mut self, target: &Path) -> Result<(), CopyError> {
        let fail = |e| CopyError::at("open", PLACE, target, e);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = self.to.root.open_file(target, flags).map_err(fail)?.into();
        let entry = &self.selection.entries[0];
        self.levels.push(Level {
            below: PathBuf::new(),
            path: target.to_path_buf(),
            fd,
            entry,
            all: false,
        });
        Ok(())
    }

    fn entries(&mut self, entries: &'a [Entry]) -> Result<(), CopyError> {
        for entry in entries {
            if self.cancel.is_set() {
                return Err(CopyError::Cancelled);
            }
            let parent = entry.path.parent().unwrap_or(Path::new(""));
            let depth = self
                .levels
                .iter()
                .rposition(|l| l.below == parent)
                .map_or(1, |n| n + 1);
            self.leave_to(depth)?;
            let Some(level) = self.levels.last() else { continue };
            let Some(name) = entry.path.file_name().map(OsStr::to_owned) else {
                continue;
            };
            let path = level.path.join(&name);
            let dir = level
                .fd
                .try_clone()
                .map_err(|e| CopyError::at("open", PLACE, &path, e))?;
            if entry.kind() == FileType::Directory {
                self.enter(&dir, &name, entry, path)?;
            } else {
                self.node(&dir, &name, entry, &path)?;
            }
        }
        Ok(())
    }

    fn enter(
        &mut self,
        dir: &OwnedFd,
        name: &OsStr,
        entry: &'a Entry,
        path: PathBuf,
    ) -> Result<(), CopyError> {
        let fail = |act: &'static str, e: Errno| CopyError::at(act, PLACE, &path, e.into());
        match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if kind(&stat) == FileType::Directory => {}
            Ok(_) => {
                return Err(CopyError::NotADirectory {
                    path: relative(&path),
                });
            }
            Err(Errno::NOENT) => {
                rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(0o700))
                    .map_err(|e| fail("make directory", e))?;
            }
            Err(e) => return Err(fail("look up", e)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(dir, name, flags, Mode::empty()).map_err(|e| fail("open", e))?;
        self.levels.push(Level {
            below: entry.path.clone(),
            path,
            fd,
            entry,
            all: true,
        });
        Ok(())
    }

    /// Closes directories until `depth` are open, giving each its times (and the rest) last.
    fn leave_to(&mut self, depth: usize) -> Result<(), CopyError> {
        while self.levels.len() > depth {
            let Some(level) = self.levels.pop() else { break };
            let fail = |e: Errno| CopyError::at("set attributes of", PLACE, &level.path, e.into());
            if level.all {
                let (uid, gid) = self.owner(level.entry);
                rustix::fs::fchown(&level.fd, uid, gid).map_err(fail)?;
                rustix::fs::fchmod(&level.fd, Mode::from_raw_mode(self.mode(level.entry))).map_err(fail)?;
                let source = open_entry(self.tree, self.selection, level.entry)?;
                set_xattrs(&level.fd, &source);
            }
            rustix::fs::futimens(&level.fd, &times(&level.entry.stat)).map_err(fail)?;
        }
        Ok(())
    }

    /// Makes anything but a directory.
    fn node(&mut self, dir: &OwnedFd, name: &OsStr, entry: &Entry, path: &Path) -> Result<(), CopyError> {
        let fail = |act: &'static str, e: Errno| CopyError::at(act, PLACE, path, e.into());
        clear_the_way(dir, name, path)?;
        let linked = entry.kind() == FileType::RegularFile && entry.stat.st_nlink > 1;
        let inode = (entry.stat.st_dev, entry.stat.st_ino);
        if linked && let Some(first) = self.links.get(&inode) {
            return self.link(first, dir, name, path);
        }
        match entry.kind() {
            FileType::RegularFile => {
                self.file(dir, name, entry, path)?;
                if linked {
                    self.links.insert(inode, path.to_path_buf());
                }
                return Ok(());
            }
            FileType::Symlink => {
                let target = entry.target.clone().unwrap_or_default();
                rustix::fs::symlinkat(&target, dir, name).map_err(|e| fail("make the link", e))?;
            }
            other => {
                super::refuse_whiteout(other, entry.stat.st_rdev)
                    .map_err(|e| CopyError::at("make the device or pipe", PLACE, path, e))?;
                let mode = Mode::from_raw_mode(0o600);
                rustix::fs::mknodat(dir, name, other, mode, entry.stat.st_rdev)
                    .map_err(|e| fail("make the device or pipe", e))?;
            }
        }
        let (uid, gid) = self.owner(entry);
        rustix::fs::chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| fail("set the owner of", e))?;
        if entry.kind() != FileType::Symlink {
            rustix::fs::chmodat(dir, name, Mode::from_raw_mode(self.mode(entry)), AtFlags::empty())
                .map_err(|e| fail("set the mode of", e))?;
        }
        rustix::fs::utimensat(dir, name, &times(&entry.stat), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| fail("set the time of", e))
    }

    fn link(&self, first: &Path, dir: &OwnedFd, name: &OsStr, path: &Path) -> Result<(), CopyError> {
        let (from, from_name) = self
            .to
            .root
            .parent(first)
            .map_err(|e| CopyError::at("open the parent of", PLACE, first, e))?;
        rustix::fs::linkat(&from, &from_name, dir, name, AtFlags::empty())
            .map_err(|e| CopyError::at("link", PLACE, path, e.into()))
    }

    fn file(&self, dir: &OwnedFd, name: &OsStr, entry: &Entry, path: &Path) -> Result<(), CopyError> {
        let fail = |act: &'static str, e: Errno| CopyError::at(act, PLACE, path, e.into());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let out: File = rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o600))
            .map_err(|e| fail("create", e))?
            .into();
        let source = if entry.socket {
            None
        } else {
            Some(open_entry(self.tree, self.selection, entry)?)
        };
        if let Some(source) = &source {
            self.contents(source, &out, entry, path)?;
        }
        let (uid, gid) = self.owner(entry);
        rustix::fs::fchown(&out, uid, gid).map_err(|e| fail("set the owner of", e))?;
        rustix::fs::fchmod(&out, Mode::from_raw_mode(self.mode(entry)))
            .map_err(|e| fail("set the mode of", e))?;
        if let Some(source) = &source {
            set_xattrs(&out, source);
        }
        rustix::fs::futimens(&out, &times(&entry.stat)).map_err(|e| fail("set the time of", e))
    }

    /// Shares the blocks where the file system can, else lets the kernel copy, else copies.
    fn contents(&self, mut from: &File, mut to: &File, entry: &Entry, path: &Path) -> Result<(), CopyError> {
        let changed = || CopyError::Changed {
            path: real_path(self.selection, entry),
            place: self.tree.name.clone(),
        };
        if entry.stat.st_size > 0 && rustix::fs::ioctl_ficlone(to, from).is_err() {
            let mut copied: u64 = 0;
            loop {
                if self.cancel.is_set() {
                    return Err(CopyError::Cancelled);
                }
                match rustix::fs::copy_file_range(from, None, to, None, 8 << 20) {
                    Ok(0) => break,
                    Ok(n) => copied += n as u64,
                    Err(Errno::INTR) => {}
                    Err(_) if copied == 0 => break,
                    Err(e) => return Err(CopyError::at("write", PLACE, path, e.into())),
                }
            }
            // Also where the kernel said 0 at once: some file systems do for files they make up.
            let mut buffer = vec![0; CHUNK.min(usize::try_from(entry.stat.st_size).unwrap_or(CHUNK).max(1))];
            loop {
                if self.cancel.is_set() {
                    return Err(CopyError::Cancelled);
                }
                let n = from.read(&mut buffer).map_err(|e| {
                    CopyError::at("read", &self.tree.name, &real_path(self.selection, entry), e)
                })?;
                if n == 0 {
                    break;
                }
                to.write_all(&buffer[..n])
                    .map_err(|e| CopyError::at("write", PLACE, path, e))?;
            }
        }
        let now =
            rustix::fs::fstat(from).map_err(|e| CopyError::at("read", &self.tree.name, path, e.into()))?;
        if same(&now, &entry.stat) {
            Ok(())
        } else {
            Err(changed())
        }
    }

    fn owner(&self, entry: &Entry) -> (Option<rustix::fs::Uid>, Option<rustix::fs::Gid>) {
        let (uid, gid) = self.to.owner.unwrap_or((entry.stat.st_uid, entry.stat.st_gid));
        (
            Some(rustix::fs::Uid::from_raw(uid)),
            Some(rustix::fs::Gid::from_raw(gid)),
        )
    }

    fn mode(&self, entry: &Entry) -> u32 {
        let mode = entry.stat.st_mode & 0o7777;
        match self.to.chmod {
            Some(chmod) => chmod.apply(mode, entry.kind() == FileType::Directory),
            None => mode,
        }
    }
}

/// Removes a file or link that is in the way of a new one.
fn clear_the_way(dir: &OwnedFd, name: &OsStr, path: &Path) -> Result<(), CopyError> {
    let fail = |act: &'static str, e: Errno| CopyError::at(act, PLACE, path, e.into());
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if kind(&stat) == FileType::Directory => {
            Err(CopyError::IsADirectory { path: relative(path) })
        }
        Ok(_) => rustix::fs::unlinkat(dir, name, AtFlags::empty()).map_err(|e| fail("replace", e)),
        Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(fail("look up", e)),
    }
}

/// Attributes are copied as far as the file system takes them, as `cp -a` does for others than root.
fn set_xattrs(to: impl AsFd, from: &File) {
    for (name, value) in xattrs(from) {
        if let Err(e) = rustix::fs::fsetxattr(&to, &name[..], &value, XattrFlags::empty()) {
            tracing::debug!(
                fd = to.as_fd().as_raw_fd(),
                name = %String::from_utf8_lossy(&name),
                error = %e,
                "an extended attribute is not copied"
            );
        }
    }
}

fn times(stat: &Stat) -> Timestamps {
    let at = |sec: i64, nsec: u64| Timespec {
        tv_sec: sec,
        tv_nsec: i64::try_from(nsec).unwrap_or(0),
    };
    Timestamps {
        last_access: at(stat.st_atime, stat.st_atime_nsec),
        last_modification: at(stat.st_mtime, stat.st_mtime_nsec),
    }
}
