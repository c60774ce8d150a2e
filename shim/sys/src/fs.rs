//! File system calls that std lacks: syncfs, extended attributes, mknod, statfs, flock, fallocate, reflinks.
//! Knows single files, not trees (see [`crate::root`]).

use crate::error::{failed, invalid};
use rustix::fs::{AtFlags, CWD, FallocateFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

/// Use and capacity of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FsUsage {
    /// Bytes in all.
    pub capacity_bytes: u64,
    /// Bytes used.
    pub used_bytes: u64,
    /// Bytes an ordinary process may still take.
    pub available_bytes: u64,
    /// Inodes in all (0: the file system does not count them).
    pub capacity_inodes: u64,
    /// Inodes used.
    pub used_inodes: u64,
    /// The `statfs(2)` magic number (ext4 0xEF53, overlay 0x794C7630, …).
    pub magic: i64,
}

/// Writes everything of the file system that `path` lies on to disk, and waits: one call makes a whole tree durable.
///
/// # Errors
/// What `open(2)` and `syncfs(2)` say (also a write error since the last call), naming `path`.
pub fn syncfs(path: &Path) -> io::Result<()> {
    let act = || format!("sync the file system of {}", path.display());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(failed(act))?;
    rustix::fs::syncfs(&fd).map_err(failed(act))
}

/// Makes a directory's entries durable.
///
/// # Errors
/// What `open(2)` and `fsync(2)` say, naming `path`.
pub fn fsync_dir(path: &Path) -> io::Result<()> {
    let act = || format!("sync directory {}", path.display());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(failed(act))?;
    rustix::fs::fsync(&fd).map_err(failed(act))
}

/// The file system `path` lies on.
///
/// # Errors
/// What `statfs(2)` says, naming `path`.
pub fn statfs(path: &Path) -> io::Result<FsUsage> {
    let s = rustix::fs::statfs(path).map_err(failed(|| format!("statfs {}", path.display())))?;
    let block = u64::try_from(if s.f_frsize > 0 { s.f_frsize } else { s.f_bsize }).unwrap_or(4096);
    Ok(FsUsage {
        capacity_bytes: s.f_blocks * block,
        used_bytes: s.f_blocks.saturating_sub(s.f_bfree) * block,
        available_bytes: s.f_bavail * block,
        capacity_inodes: s.f_files,
        used_inodes: s.f_files.saturating_sub(s.f_ffree),
        #[allow(clippy::unnecessary_cast, clippy::cast_possible_wrap)] // the width differs between libcs
        magic: s.f_type as i64,
    })
}

/// Tries to take the exclusive lock of an open file: false when somebody else holds it. It goes when the last
/// descriptor of this open is closed.
///
/// # Errors
/// What `flock(2)` says.
pub fn try_lock_exclusive(file: impl AsFd) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(failed(|| "lock a file".to_string())(e)),
    }
}

/// Reserves blocks for the first `len` bytes of a file, whose size grows to that.
///
/// # Errors
/// What `fallocate(2)` says (`ENOSPC`; `EOPNOTSUPP`: the file system cannot).
pub fn fallocate(file: impl AsFd, len: u64) -> io::Result<()> {
    rustix::fs::fallocate(file, FallocateFlags::empty(), 0, len)
        .map_err(failed(|| format!("reserve {len} bytes of a file")))
}

/// Makes `to` share `from`'s blocks (`FICLONE`): false where the file system cannot.
///
/// # Errors
/// What `ioctl(2)` says otherwise.
pub fn reflink(from: impl AsFd, to: impl AsFd) -> io::Result<bool> {
    match rustix::fs::ioctl_ficlone(to, from) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => Ok(false),
        Err(e) => Err(failed(|| "share blocks between files".to_string())(e)),
    }
}

/// Copies `len` bytes inside the kernel from one file's position to the other's, as far as it goes; the caller copies
/// the rest by hand when fewer come back (another file system, end of file).
///
/// # Errors
/// What `copy_file_range(2)` says, except that it cannot: that is 0 bytes copied.
pub fn copy_file_range(from: impl AsFd, to: impl AsFd, len: u64) -> io::Result<u64> {
    let mut copied = 0u64;
    while copied < len {
        let part = usize::try_from(len - copied).unwrap_or(1 << 30).min(1 << 30);
        match rustix::fs::copy_file_range(from.as_fd(), None, to.as_fd(), None, part) {
            Ok(0) => break,
            Ok(n) => copied += n as u64,
            Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) if copied == 0 => break,
            Err(e) => return Err(failed(|| "copy inside the kernel".to_string())(e)),
        }
    }
    Ok(copied)
}

/// Makes a device, FIFO, socket or empty file `name` in `dir`. `mode` is type and permissions as in `st_mode`.
///
/// # Errors
/// What `mknodat(2)` says, naming `name`.
pub fn mknodat(dir: BorrowedFd<'_>, name: &OsStr, mode: u32, major: u32, minor: u32) -> io::Result<()> {
    let kind = rustix::fs::FileType::from_raw_mode(mode);
    rustix::fs::mknodat(
        dir,
        name,
        kind,
        Mode::from_raw_mode(mode),
        rustix::fs::makedev(major, minor),
    )
    .map_err(failed(|| format!("make the {kind:?} {}", name.display())))
}

/// The extended attributes of what a descriptor holds; also of an `O_PATH` one, and of a link itself.
///
/// # Errors
/// What `listxattr(2)` and `getxattr(2)` say; a file system without them has none.
pub fn xattrs(fd: BorrowedFd<'_>) -> io::Result<Vec<(OsString, Vec<u8>)>> {
    let path = proc_path(fd);
    let mut found = Vec::new();
    for name in list_names(&path)? {
        if let Some(value) = get_at(&path, &name)? {
            found.push((name, value));
        }
    }
    Ok(found)
}

/// One extended attribute; `None` when it is not there.
///
/// # Errors
/// What `getxattr(2)` says, naming the attribute.
pub fn xattr(fd: BorrowedFd<'_>, name: &OsStr) -> io::Result<Option<Vec<u8>>> {
    get_at(&proc_path(fd), name)
}

/// fgetxattr refuses `O_PATH` descriptors, and links have no other; through /proc both work.
fn proc_path(fd: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).expect("a number has no zero byte")
}

fn list_names(path: &CString) -> io::Result<Vec<OsString>> {
    let act = || "list extended attributes".to_string();
    let mut size = 256;
    loop {
        let mut names = vec![0u8; size];
        match rustix::fs::listxattr(path.as_c_str(), &mut names[..]) {
            Ok(n) => {
                names.truncate(n);
                let parts = names.split(|b| *b == 0).filter(|n| !n.is_empty());
                return Ok(parts.map(|n| OsString::from_vec(n.to_vec())).collect());
            }
            Err(Errno::RANGE) if size < 1 << 16 => size *= 4,
            Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Err(e) => return Err(failed(act)(e)),
        }
    }
}

fn get_at(path: &CString, name: &OsStr) -> io::Result<Option<Vec<u8>>> {
    let act = || format!("read the extended attribute {}", name.display());
    if name.as_bytes().is_empty() {
        return Err(failed(act)(invalid("an empty name")));
    }
    let mut size = 256;
    loop {
        let mut value = vec![0u8; size];
        match rustix::fs::getxattr(path.as_c_str(), name, &mut value[..]) {
            Ok(n) => {
                value.truncate(n);
                return Ok(Some(value));
            }
            Err(Errno::RANGE) if size < 1 << 16 => size *= 4,
            Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
            Err(e) => return Err(failed(act)(e)),
        }
    }
}

/// Sets times (seconds, nanoseconds since the epoch) of an entry; a link is not followed.
///
/// # Errors
/// What `utimensat(2)` says, naming the entry.
pub fn set_times(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    accessed: (i64, u32),
    modified: (i64, u32),
) -> io::Result<()> {
    let spec = |(sec, nsec): (i64, u32)| rustix::fs::Timespec {
        tv_sec: sec,
        tv_nsec: nsec.into(),
    };
    let times = rustix::fs::Timestamps {
        last_access: spec(accessed),
        last_modification: spec(modified),
    };
    rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(failed(|| format!("set the times of {}", name.display())))
}
