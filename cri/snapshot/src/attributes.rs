//! Overlay's marks and extended attributes, as the diff and the unpacker both see them.
//!
//! Refuses to know trees: one descriptor or one name at a time.

use rustix::fs::{AtFlags, FileType, Stat, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

/// Extended attributes by name.
pub(crate) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// On a directory, "y": what lies below is hidden.
pub(crate) const OPAQUE: &str = "trusted.overlay.opaque";
/// In a layer's tar: the file of this name is deleted.
pub(crate) const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// In a layer's tar: everything below this directory is hidden.
pub(crate) const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";

/// The kind of what a stat describes.
pub(crate) fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Overlay's form of a deleted entry: a character device 0:0.
pub(crate) fn is_whiteout(stat: &Stat) -> bool {
    kind(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Attributes that belong to the place and not to the file: overlay's own (also in its escaped and unprivileged
/// forms), and labels of this host.
pub(crate) fn stays_here(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.")
        || name.starts_with(b"user.overlay.")
        || matches!(name, b"security.selinux" | b"security.ima" | b"security.evm")
}

/// Whether a directory hides what lies below it.
pub(crate) fn is_opaque(dir: BorrowedFd<'_>) -> io::Result<bool> {
    let mut value = [0u8; 8];
    match rustix::fs::fgetxattr(dir, OPAQUE, &mut value[..]) {
        Ok(n) => Ok(&value[..n] == b"y"),
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Makes a directory hide what lies below it.
pub(crate) fn set_opaque(dir: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::fs::fsetxattr(dir, OPAQUE, b"y", XattrFlags::empty())?)
}

/// The attributes of an open file that belong to it, by name.
pub(crate) fn xattrs_of(file: BorrowedFd<'_>) -> io::Result<Xattrs> {
    gather(
        |buffer| rustix::fs::flistxattr(file, buffer),
        |name, buffer| rustix::fs::fgetxattr(file, name, buffer),
    )
}

/// The attributes of something that is not opened: a link, a device.
pub(crate) fn xattrs_at(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<Xattrs> {
    let path = proc_path(dir, name)?;
    let path = path.as_c_str();
    gather(
        |buffer| rustix::fs::llistxattr(path, buffer),
        |name, buffer| rustix::fs::lgetxattr(path, name, buffer),
    )
}

fn gather(
    list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
    get: impl Fn(&OsStr, &mut [u8]) -> rustix::io::Result<usize>,
) -> io::Result<Xattrs> {
    let mut few = [0u8; 512];
    let mut many;
    let names = match list(&mut few) {
        Ok(n) => &few[..n],
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(Errno::RANGE) => {
            many = vec![0u8; 64 << 10];
            let n = list(&mut many)?;
            &many[..n]
        }
        Err(e) => return Err(e.into()),
    };
    let mut xattrs = Xattrs::new();
    for name in names
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty() && !stays_here(name))
    {
        let mut value = vec![0u8; 256];
        let length = match get(OsStr::from_bytes(name), &mut value) {
            Err(Errno::RANGE) => {
                value.resize(64 << 10, 0);
                get(OsStr::from_bytes(name), &mut value)?
            }
            Err(Errno::NODATA) => continue,
            other => other?,
        };
        value.truncate(length);
        xattrs.push((name.to_vec(), value));
    }
    xattrs.sort();
    Ok(xattrs)
}

/// Sets attributes of an open file.
pub(crate) fn set_xattrs(file: BorrowedFd<'_>, xattrs: &[(Vec<u8>, Vec<u8>)]) -> io::Result<()> {
    for (name, value) in xattrs.iter().filter(|(name, _)| !stays_here(name)) {
        let set = rustix::fs::fsetxattr(file, OsStr::from_bytes(name), value, XattrFlags::empty());
        if !dispensable(name, set) {
            set?;
        }
    }
    Ok(())
}

/// A filesystem without the kind of attribute loses it, as with every other unpacker; a program that needs its
/// capabilities is better not unpacked than without them.
fn dispensable(name: &[u8], set: rustix::io::Result<()>) -> bool {
    set == Err(Errno::OPNOTSUPP) && name != b"security.capability"
}

/// Sets attributes of something that is not opened; a link is not followed.
pub(crate) fn set_xattrs_at(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    xattrs: &[(Vec<u8>, Vec<u8>)],
) -> io::Result<()> {
    if xattrs.iter().all(|(name, _)| stays_here(name)) {
        return Ok(());
    }
    let path = proc_path(dir, name)?;
    for (name, value) in xattrs.iter().filter(|(name, _)| !stays_here(name)) {
        let (path, flags) = (path.as_c_str(), XattrFlags::empty());
        let set = rustix::fs::lsetxattr(path, OsStr::from_bytes(name), value, flags);
        if !dispensable(name, set) {
            set?;
        }
    }
    Ok(())
}

/// A path that leads to a name in an open directory; the last component is not followed by the l-calls.
fn proc_path(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<CString> {
    let path = [
        format!("/proc/self/fd/{}/", dir.as_raw_fd()).as_bytes(),
        name.as_bytes(),
    ]
    .concat();
    CString::new(path).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Times for utimensat and futimens: access and modification alike, so that nothing depends on when it was read.
pub(crate) fn times(seconds: i64, nanos: u32) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanos.into(),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

/// The modification time of what a stat describes.
pub(crate) fn mtime(stat: &Stat) -> (i64, u32) {
    // The kernel gives 0 to 999,999,999.
    (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or(0))
}

/// A stat by name that does not follow links; `None` when there is nothing.
pub(crate) fn stat_at(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<Option<Stat>> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::fd::AsFd;

    #[test]
    fn root_what_a_filesystem_has_no_place_for_is_lost_but_no_programs_capabilities() {
        if !rustix::process::geteuid().is_root() {
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED what_a_filesystem_has_no_place_for: it needs root"
            );
            return;
        }
        // It has no attributes at all.
        let dir = tempfile::tempdir().unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("ramfs", dir.path(), "ramfs", flags, None).unwrap();
        let file = std::fs::File::create(dir.path().join("f")).unwrap();
        let open = std::fs::File::open(dir.path()).unwrap();
        let set = |name: &str| {
            let xattrs = [(name.as_bytes().to_vec(), b"x".to_vec())];
            let by_name = set_xattrs_at(open.as_fd(), OsStr::new("f"), &xattrs);
            [set_xattrs(file.as_fd(), &xattrs), by_name].map(|set| set.map_err(|e| e.raw_os_error()))
        };
        let (trusted, capability) = (set("trusted.x"), set("security.capability"));
        drop((file, open));
        rustix::mount::unmount(dir.path(), rustix::mount::UnmountFlags::empty()).unwrap();
        assert_eq!(trusted, [Ok(()), Ok(())]);
        assert!(capability.iter().all(Result::is_err), "{capability:?}");
    }
}
