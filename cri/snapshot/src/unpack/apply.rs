//! Entry by entry: what each kind becomes in the tree.

use super::books::NameBudget;
use super::tree::{Missing, Place, Tree, clean, join, split};
use super::{Options, UnpackError, Unpacked, at, shown};
use crate::attributes::{
    OPAQUE_MARKER, WHITEOUT_PREFIX, is_whiteout, kind, set_xattrs, set_xattrs_at, stat_at, times,
};
use crate::snapshotter::Usage;
use crate::tar::{Header, Kind, Reader};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::Ordering;

/// Read and written at a time.
const BUFFER: usize = 256 << 10;
/// Marks of aufs beside the opaque one: of no meaning to anybody else.
const AUFS_PREFIX: &[u8] = b".wh..wh.";

type Result<T> = std::result::Result<T, UnpackError>;

struct Unpacker<'a> {
    tree: Tree<'a>,
    options: &'a Options<'a>,
    prefix: Vec<u8>,
    byte_limit: u64,
    bytes: u64,
    entries: u64,
    usage: Usage,
    buffer: Vec<u8>,
}

pub(super) fn unpack(dir: &Path, archive: &mut dyn Read, options: &Options<'_>) -> Result<Unpacked> {
    let mut reader = Reader::new(BufReader::with_capacity(BUFFER, archive));
    let byte_limit = match options.limits.bytes {
        Some(limit) => limit,
        None => {
            slipway_sys::fs::statfs(dir)
                .map_err(at("ask the filesystem of", b"/"))?
                .available_bytes
        }
    };
    let prefix = match options.prefix.trim_matches('/') {
        "" => Vec::new(),
        prefix => clean(prefix.as_bytes(), true)?,
    };
    let own = NameBudget::new(options.limits.names);
    let mut unpacker = Unpacker {
        tree: Tree::open(dir, options.names.unwrap_or(&own))?,
        options,
        prefix,
        byte_limit,
        bytes: 0,
        entries: 0,
        usage: Usage {
            bytes: 4096,
            inodes: 1,
        },
        buffer: vec![0; BUFFER],
    };
    while let Some(mut header) = reader.next_entry()? {
        unpacker.admit(&header)?;
        if let Some((uid, gid)) = options.owner {
            (header.uid, header.gid) = (uid, gid);
        }
        unpacker.entry(&header, &mut reader)?;
    }
    reader.finish()?;
    let implied = unpacker.tree.implied_made;
    let usage = unpacker.usage
        + Usage {
            bytes: implied * 4096,
            inodes: implied,
        };
    Ok(Unpacked {
        usage,
        entries: unpacker.entries,
        fix_ups: unpacker.tree.finish()?,
    })
}

impl Unpacker<'_> {
    /// Counts an entry before anything is made of it.
    fn admit(&mut self, header: &Header) -> Result<()> {
        if self.cancelled() {
            return Err(UnpackError::Cancelled);
        }
        let too_large = |what, limit| UnpackError::TooLarge {
            entry: shown(&header.path),
            what,
            limit,
        };
        self.entries += 1;
        if self.entries + self.tree.implied_made > self.options.limits.entries {
            return Err(too_large("entries", self.options.limits.entries));
        }
        self.bytes = self.bytes.saturating_add(header.size);
        if self.bytes > self.byte_limit {
            if self.options.limits.bytes.is_none() {
                // Known without writing all that fits first.
                return Err(UnpackError::DiskFull {
                    entry: shown(&header.path),
                });
            }
            return Err(too_large("bytes", self.byte_limit));
        }
        Ok(())
    }

    fn cancelled(&self) -> bool {
        self.options
            .cancelled
            .is_some_and(|flag| flag.load(Ordering::Relaxed))
    }

    fn entry<R: Read>(&mut self, header: &Header, reader: &mut Reader<R>) -> Result<()> {
        let cleaned = clean(&header.path, self.options.absolute_names)?;
        if cleaned.is_empty() {
            return self.root(header);
        }
        let name = join(&self.prefix, &cleaned);
        let (dir, base) = split(&name);
        if !self.options.plain {
            if dir
                .split(|b| *b == b'/')
                .any(|part| part.starts_with(AUFS_PREFIX))
            {
                return Ok(());
            }
            if let Some(hidden) = base.strip_prefix(WHITEOUT_PREFIX) {
                return self.whiteout(dir, base, hidden, &name);
            }
        }
        let parent = self.parent(dir)?;
        match header.kind {
            Kind::Directory => self.directory(&parent, base, header),
            Kind::File => self.file(&parent, base, header, reader),
            Kind::HardLink => self.hard_link(&parent, base, header),
            Kind::Symlink => self.symlink(&parent, base, header),
            Kind::Char | Kind::Block | Kind::Fifo => self.node(&parent, base, header),
        }
    }

    fn parent(&mut self, dir: &[u8]) -> Result<Rc<Place>> {
        match self.tree.directory(dir, Missing::Make)? {
            Some(place) => Ok(place),
            None => Err(UnpackError::NotADirectory {
                entry: shown(dir),
                parent: shown(dir),
            }),
        }
    }

    fn root(&mut self, header: &Header) -> Result<()> {
        if self.options.plain {
            return Ok(());
        }
        if header.kind != Kind::Directory {
            return Err(UnpackError::Name {
                entry: shown(&header.path),
                why: "it names the root, but is no directory",
            });
        }
        let root = self.tree.root();
        set_attributes(root.fd(), header).map_err(at("set the attributes of", b"/"))?;
        self.tree.books.forget(b"");
        self.tree.books.set_time_last(b"", header.mtime)
    }

    fn directory(&mut self, parent: &Rc<Place>, base: &[u8], header: &Header) -> Result<()> {
        let place = self.tree.make(parent, base)?;
        set_attributes(place.fd(), header).map_err(at("set the attributes of", &place.real))?;
        self.tree.books.set_time_last(&place.real, header.mtime)?;
        self.count(4096);
        Ok(())
    }

    fn file<R: Read>(
        &mut self,
        parent: &Rc<Place>,
        base: &[u8],
        header: &Header,
        reader: &mut Reader<R>,
    ) -> Result<()> {
        let path = parent.path(base);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd: OwnedFd = self.create(parent, base, "create", |dir, name| {
            rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o600))
        })?;
        let mut file = File::from(fd);
        loop {
            let n = reader.read_body(&mut self.buffer)?;
            if n == 0 {
                break;
            }
            file.write_all(&self.buffer[..n]).map_err(at("write", &path))?;
            if let Some(progress) = self.options.progress {
                progress(n as u64);
            }
            if self.cancelled() {
                return Err(UnpackError::Cancelled);
            }
        }
        set_attributes(file.as_fd(), header)
            .and_then(|()| {
                Ok(rustix::fs::futimens(
                    &file,
                    &times(header.mtime.seconds, header.mtime.nanos),
                )?)
            })
            .map_err(at("set the attributes of", &path))?;
        self.count(header.size.next_multiple_of(4096));
        Ok(())
    }

    fn symlink(&mut self, parent: &Rc<Place>, base: &[u8], header: &Header) -> Result<()> {
        if header.link.is_empty() || header.link.len() > 4095 || header.link.contains(&0) {
            return Err(UnpackError::Name {
                entry: shown(&header.path),
                why: "its link leads to no usable name",
            });
        }
        let target = OsStr::from_bytes(&header.link);
        self.create(parent, base, "make the link", |dir, name| {
            rustix::fs::symlinkat(target, dir, name)
        })?;
        self.by_name(parent, base, header)?;
        self.count(0);
        Ok(())
    }

    /// Devices and pipes.
    fn node(&mut self, parent: &Rc<Place>, base: &[u8], header: &Header) -> Result<()> {
        let device = rustix::fs::makedev(header.device.0, header.device.1);
        if header.kind == Kind::Char && device == 0 && !self.options.plain {
            // Some layers were packed from overlay's own form.
            let path = parent.path(base);
            return self.hide(parent, base, &path);
        }
        let (kind, device) = match header.kind {
            Kind::Char => (FileType::CharacterDevice, device),
            Kind::Block => (FileType::BlockDevice, device),
            _ => (FileType::Fifo, 0),
        };
        let mode = Mode::from_raw_mode(header.mode & 0o7777);
        self.create(parent, base, "make the device", |dir, name| {
            rustix::fs::mknodat(dir, name, kind, mode, device)
        })?;
        self.by_name(parent, base, header)?;
        self.count(0);
        Ok(())
    }

    /// Owner, mode, attributes and time of what is not opened. Only we write here, so the name still means what was
    /// just made.
    fn by_name(&self, parent: &Place, base: &[u8], header: &Header) -> Result<()> {
        let path = parent.path(base);
        let name = OsStr::from_bytes(base);
        let dir = parent.fd();
        let act = "set the attributes of";
        rustix::fs::chownat(
            dir,
            name,
            Some(uid(header)),
            Some(gid(header)),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(|e| at(act, &path)(e.into()))?;
        if header.kind != Kind::Symlink {
            // Links have no mode, and changing "theirs" would change their target's.
            rustix::fs::chmodat(
                dir,
                name,
                Mode::from_raw_mode(header.mode & 0o7777),
                AtFlags::empty(),
            )
            .map_err(|e| at(act, &path)(e.into()))?;
        }
        set_xattrs_at(dir, name, &header.xattrs).map_err(at(act, &path))?;
        let times = times(header.mtime.seconds, header.mtime.nanos);
        rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| at(act, &path)(e.into()))
    }

    fn hard_link(&mut self, parent: &Rc<Place>, base: &[u8], header: &Header) -> Result<()> {
        let path = parent.path(base);
        let target = clean(&header.link, self.options.absolute_names)?;
        let cannot = |why| UnpackError::Link {
            entry: shown(&header.path),
            target: shown(&header.link),
            why,
        };
        if target.is_empty() {
            return Err(cannot("it links to the root"));
        }
        let target = join(&self.prefix, &target);
        let (target_dir, target_base) = split(&target);
        let place = self.tree.directory(target_dir, Missing::Stop)?;
        let found = match &place {
            Some(place) => self
                .tree
                .stat(place, target_base)?
                .filter(|stat| !is_whiteout(stat)),
            None => None,
        };
        let (Some(place), Some(stat)) = (place, found) else {
            if self.options.plain {
                return Err(cannot("there is no such file"));
            }
            // It is a file of a layer below, or nothing: that shows when the layers are put in order.
            self.tree.remove(parent, base)?;
            return self.tree.books.wait_for(path, target);
        };
        if kind(&stat) == FileType::Directory {
            return Err(cannot("it is a directory"));
        }
        if place.path(target_base) == path {
            return Ok(());
        }
        let target_name = OsStr::from_bytes(target_base);
        self.create(parent, base, "make the hard link", |dir, name| {
            rustix::fs::linkat(place.fd(), target_name, dir, name, AtFlags::empty())
        })
    }

    fn whiteout(&mut self, dir: &[u8], base: &[u8], hidden: &[u8], name: &[u8]) -> Result<()> {
        if base == OPAQUE_MARKER {
            let place = self.parent(dir)?;
            return self.tree.hide_below(&place);
        }
        if base.starts_with(AUFS_PREFIX) {
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            let why = "it deletes something that is not a name";
            return Err(UnpackError::Escape {
                entry: shown(name),
                why,
            });
        }
        let parent = self.parent(dir)?;
        self.hide(&parent, hidden, name)
    }

    /// Hides what lies below a name; what this layer holds there stays.
    fn hide(&mut self, parent: &Rc<Place>, base: &[u8], entry: &[u8]) -> Result<()> {
        let path = parent.path(base);
        match self.tree.stat(parent, base)? {
            None if self.tree.books.has_link(&path) => Ok(()),
            None => {
                let mode = Mode::empty();
                let name = OsStr::from_bytes(base);
                rustix::fs::mknodat(parent.fd(), name, FileType::CharacterDevice, mode, 0)
                    .map_err(|e| at("mark as deleted", entry)(e.into()))?;
                self.usage.inodes += 1;
                self.tree.books.delete(path)
            }
            Some(stat) if kind(&stat) == FileType::Directory => {
                if let Some(place) = self.tree.directory(&path, Missing::Stop)? {
                    self.tree.hide_below(&place)?;
                }
                self.tree.books.cut_off(&path);
                Ok(())
            }
            Some(_) => Ok(()),
        }
    }

    /// Makes something new under a name; what was there gives way.
    fn create<T>(
        &mut self,
        parent: &Rc<Place>,
        base: &[u8],
        act: &'static str,
        make: impl Fn(BorrowedFd<'_>, &OsStr) -> rustix::io::Result<T>,
    ) -> Result<T> {
        let name = OsStr::from_bytes(base);
        let made = match make(parent.fd(), name) {
            Err(Errno::EXIST) => {
                self.tree.remove(parent, base)?;
                make(parent.fd(), name)
            }
            other => other,
        };
        let made = made.map_err(|e| at(act, &parent.path(base))(e.into()))?;
        if self.tree.books.has_links() {
            self.tree.books.forget(&parent.path(base));
        }
        Ok(made)
    }

    fn count(&mut self, bytes: u64) {
        self.usage = self.usage + Usage { bytes, inodes: 1 };
    }
}

/// Owner before mode (changing the owner clears set-id bits) and before attributes (it clears capabilities).
fn set_attributes(file: BorrowedFd<'_>, header: &Header) -> std::io::Result<()> {
    rustix::fs::fchown(file, Some(uid(header)), Some(gid(header)))?;
    rustix::fs::fchmod(file, Mode::from_raw_mode(header.mode & 0o7777))?;
    set_xattrs(file, &header.xattrs)
}

fn uid(header: &Header) -> Uid {
    Uid::from_raw(header.uid)
}

fn gid(header: &Header) -> Gid {
    Gid::from_raw(header.gid)
}

/// Whether an entry exists in a directory: for the fix-ups.
pub(super) fn exists(dir: BorrowedFd<'_>, name: &[u8]) -> std::io::Result<bool> {
    Ok(stat_at(dir, OsStr::from_bytes(name))?.is_some())
}
