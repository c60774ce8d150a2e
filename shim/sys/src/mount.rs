//! Mounting and unmounting. Knows paths and options, not what they are for.

use crate::error::{errno, failed, invalid};
use crate::root::Root;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};
use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// How mount events travel between a mount and its copies: `mount_namespaces(7)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// No events either way.
    Private,
    /// Events both ways.
    Shared,
    /// Events from the master only.
    Slave,
    /// As private, and cannot be bind-mounted.
    Unbindable,
}

/// fsconfig(2) takes strings below this length.
const FSCONFIG_STRING: usize = 255;
/// mount(2) takes one page of options.
const MOUNT_OPTIONS: usize = 4095;
/// What makes an upperdir self-contained, so that it is a layer by itself.
const OVERLAY_OFF: [&str; 3] = ["redirect_dir", "metacopy", "index"];

/// Mounts an overlay of `lower` (nearest first) on `target`.
///
/// With `upper_work` = (upperdir, workdir) it is writable, else read-only; one single lower directory without an upper
/// becomes a read-only bind mount, since overlayfs wants two. `options` are added as given (`"volatile"`, `"userxattr"`,
/// `"xino=off"`). `redirect_dir`, `metacopy` and `index` are always off where the kernel knows them, so that the
/// upperdir alone is the layer's difference. Uses `fsopen` with one `lowerdir+` a layer (kernel 6.5), so that the number of layers
/// is not bounded by a page of options; falls back to `mount(2)`.
///
/// # Errors
/// What the calls say, with the kernel's own explanation where it gave one, naming `target`.
pub fn mount_overlay(
    lower: &[PathBuf],
    upper_work: Option<(&Path, &Path)>,
    target: &Path,
    options: &[&str],
) -> io::Result<()> {
    let act = || format!("mount overlay of {} layers on {}", lower.len(), target.display());
    if lower.is_empty() {
        return Err(failed(act)(invalid("no lower directory")));
    }
    if upper_work.is_none() && lower.len() == 1 {
        return bind(&lower[0], target, false, true);
    }
    let paths = OverlayPaths::new(lower, upper_work).map_err(failed(act))?;
    match overlay_by_fsopen(&paths, target, options) {
        Err(e) if e.is_too_old() => overlay_by_mount(&paths, target, options).map_err(failed(act)),
        Err(OverlayError::Io(e)) => Err(failed(act)(e)),
        Err(OverlayError::TooOld) => unreachable!("taken by the guard above"),
        Ok(()) => Ok(()),
    }
}

/// The layers' paths as overlayfs can take them: those too long, or with characters its parser treats specially, go
/// through a descriptor.
struct OverlayPaths {
    lower: Vec<OsString>,
    upper_work: Option<(OsString, OsString)>,
    _held: Vec<OwnedFd>,
}

impl OverlayPaths {
    fn new(lower: &[PathBuf], upper_work: Option<(&Path, &Path)>) -> io::Result<OverlayPaths> {
        let mut held = Vec::new();
        let mut plain = |path: &Path| -> io::Result<OsString> {
            let bytes = path.as_os_str().as_bytes();
            let special = bytes.iter().any(|b| matches!(b, b':' | b',' | b'\\' | b'"'));
            if !special && bytes.len() <= FSCONFIG_STRING {
                return Ok(path.as_os_str().to_os_string());
            }
            let fd = rustix::fs::openat(
                CWD,
                path,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .map_err(failed(|| format!("open layer {}", path.display())))?;
            let name = OsString::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
            held.push(fd);
            Ok(name)
        };
        let lower = lower.iter().map(|p| plain(p)).collect::<io::Result<_>>()?;
        let upper_work = match upper_work {
            Some((upper, work)) => Some((plain(upper)?, plain(work)?)),
            None => None,
        };
        Ok(OverlayPaths {
            lower,
            upper_work,
            _held: held,
        })
    }
}

enum OverlayError {
    /// This kernel's overlayfs has no `lowerdir+`.
    TooOld,
    Io(io::Error),
}

impl OverlayError {
    fn is_too_old(&self) -> bool {
        matches!(self, OverlayError::TooOld)
    }
}

fn overlay_by_fsopen(paths: &OverlayPaths, target: &Path, options: &[&str]) -> Result<(), OverlayError> {
    let fs = match rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC) {
        Err(Errno::NOSYS) => return Err(OverlayError::TooOld),
        other => other.map_err(|e| OverlayError::Io(failed(|| "open overlayfs".to_string())(e)))?,
    };
    let explained = |e: Errno, what: &str| OverlayError::Io(explain(fs.as_fd(), e, what));
    for (n, lower) in paths.lower.iter().enumerate() {
        match rustix::mount::fsconfig_set_string(&fs, "lowerdir+", lower.as_os_str()) {
            Err(Errno::INVAL) if n == 0 => return Err(OverlayError::TooOld),
            other => other.map_err(|e| explained(e, &format!("add lower directory {}", lower.display())))?,
        }
    }
    if let Some((upper, work)) = &paths.upper_work {
        for (key, value) in [("upperdir", upper), ("workdir", work)] {
            rustix::mount::fsconfig_set_string(&fs, key, value.as_os_str())
                .map_err(|e| explained(e, &format!("set {key} {}", value.display())))?;
        }
    }
    for key in OVERLAY_OFF {
        match rustix::mount::fsconfig_set_string(&fs, key, "off") {
            Err(Errno::INVAL) => {} // this kernel does not know it, so it is off
            other => other.map_err(|e| explained(e, &format!("set {key}=off")))?,
        }
    }
    for option in options {
        match option.split_once('=') {
            Some((key, value)) => rustix::mount::fsconfig_set_string(&fs, key, value),
            None => rustix::mount::fsconfig_set_flag(&fs, *option),
        }
        .map_err(|e| explained(e, &format!("set option {option}")))?;
    }
    rustix::mount::fsconfig_create(&fs).map_err(|e| explained(e, "create the overlay"))?;
    let attrs = if paths.upper_work.is_none() {
        MountAttrFlags::MOUNT_ATTR_RDONLY
    } else {
        MountAttrFlags::empty()
    };
    let mount = rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attrs)
        .map_err(|e| explained(e, "make the mount"))?;
    attach(mount.as_fd(), target).map_err(OverlayError::Io)
}

/// The kernel writes its reasons into the fs context.
fn explain(fs: BorrowedFd<'_>, e: Errno, what: &str) -> io::Error {
    let mut said = String::new();
    let mut line = [0u8; 1024];
    while let Ok(n) = rustix::io::read(fs, &mut line) {
        if n == 0 || said.len() > 4096 {
            break;
        }
        said.push_str("; the kernel: ");
        said.push_str(String::from_utf8_lossy(&line[..n]).trim_end());
    }
    failed(|| format!("{what}{said}"))(e)
}

fn overlay_by_mount(paths: &OverlayPaths, target: &Path, options: &[&str]) -> io::Result<()> {
    let mut data = OsString::from("lowerdir=");
    data.push(paths.lower.join(OsStr::new(":")));
    if let Some((upper, work)) = &paths.upper_work {
        data.push(",upperdir=");
        data.push(upper);
        data.push(",workdir=");
        data.push(work);
    }
    for key in OVERLAY_OFF {
        if Path::new("/sys/module/overlay/parameters").join(key).exists() {
            data.push(format!(",{key}=off"));
        }
    }
    for option in options {
        data.push(format!(",{option}"));
    }
    if data.len() > MOUNT_OPTIONS {
        return Err(invalid(
            "this kernel (before 6.5) takes one page of overlay options: too many layers",
        ));
    }
    let data = CString::new(data.into_vec()).map_err(|_| invalid("an option with a zero byte"))?;
    let flags = if paths.upper_work.is_none() {
        MountFlags::RDONLY
    } else {
        MountFlags::empty()
    };
    Ok(rustix::mount::mount(
        "overlay",
        target,
        "overlay",
        flags,
        data.as_c_str(),
    )?)
}

/// Puts a detached mount (from `fsmount`, `open_tree`, [`idmapped_clone`]) on `target`; a link there is followed.
///
/// # Errors
/// What `move_mount(2)` says, naming `target`.
pub fn attach(mount: BorrowedFd<'_>, target: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    rustix::mount::move_mount(mount, "", CWD, target, flags)
        .map_err(failed(|| format!("attach a mount to {}", target.display())))
}

/// Bind-mounts `source` on `target` (both follow links; both files or both directories).
///
/// `read_only` holds for the whole tree when `recursive` (kernel 5.12).
///
/// # Errors
/// What the calls say, naming both paths.
pub fn bind(source: &Path, target: &Path, recursive: bool, read_only: bool) -> io::Result<()> {
    let act = || format!("bind {} to {}", source.display(), target.display());
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    let tree = rustix::mount::open_tree(CWD, source, flags).map_err(failed(act))?;
    if read_only {
        set_attributes(tree.as_fd(), recursive, MountAttrFlags::MOUNT_ATTR_RDONLY, None)
            .map_err(failed(act))?;
    }
    attach(tree.as_fd(), target).map_err(failed(act))
}

/// As [`attach`], onto what a descriptor holds.
///
/// # Errors
/// What `move_mount(2)` says.
pub fn attach_fd(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, "", target, "", flags)
        .map_err(failed(|| "attach a mount to a descriptor".to_string()))
}

/// A detached copy of the tree at `source` whose file owners are seen through `userns`'s id maps; [`attach`] puts it
/// somewhere. Every file system in the tree must support it.
///
/// # Errors
/// What `open_tree(2)` and `mount_setattr(2)` say, naming `source` (`EINVAL`: the file system cannot).
pub fn idmapped_clone(source: &Path, userns: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let act = || format!("make an id-mapped copy of {}", source.display());
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    let tree = rustix::mount::open_tree(CWD, source, flags).map_err(failed(act))?;
    set_attributes(
        tree.as_fd(),
        recursive,
        MountAttrFlags::MOUNT_ATTR_IDMAP,
        Some(userns),
    )
    .map_err(failed(act))?;
    Ok(tree)
}

/// A detached copy of the mount at `source` (and of those below): [`attach`] puts it somewhere.
///
/// # Errors
/// What `open_tree(2)` says, naming `source`.
pub fn clone_tree(source: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    rustix::mount::open_tree(CWD, source, flags)
        .map_err(failed(|| format!("copy the mount {}", source.display())))
}

/// A read-only copy of the mount of one file, a program, to execute it from. It is in no mount table and goes with its last
/// user. Who gets hold of such a process's `/proc/<pid>/exe` holds the copy, and cannot write to the file through it
/// (CVE-2019-5736), nor take the read-only off without CAP_SYS_ADMIN in the namespace that made it.
///
/// # Errors
/// What `open_tree(2)` and `mount_setattr(2)` say, naming `path`.
pub fn program(path: &Path) -> io::Result<OwnedFd> {
    let tree = clone_tree(path, false)?;
    let set = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
    set_attributes(tree.as_fd(), false, set, None)
        .map_err(failed(|| format!("make a read-only copy of {}", path.display())))?;
    Ok(tree)
}

/// The host's `/dev/null`, opened through a read-only copy of its mount: it is read and written as ever, but whoever is given
/// it cannot change the node's mode, owner or times through it, which are the host's. Opened once a process: the copy costs
/// more to make and to take apart than it does to keep.
///
/// # Errors
/// What `open_tree(2)`, `mount_setattr(2)` and `open(2)` say.
pub(crate) fn null() -> io::Result<BorrowedFd<'static>> {
    static NULL: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(null) = NULL.get() {
        return Ok(null.as_fd());
    }
    let path = Path::new("/dev/null");
    let tree = clone_tree(path, false)?;
    set_attributes(tree.as_fd(), false, MountAttrFlags::MOUNT_ATTR_RDONLY, None)
        .map_err(failed(|| format!("make a read-only copy of {}", path.display())))?;
    let through = format!("/proc/self/fd/{}", tree.as_raw_fd());
    let opened = rustix::fs::openat(CWD, through, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(
        failed(|| format!("open the read-only copy of {}", path.display())),
    )?;
    Ok(NULL.get_or_init(|| opened).as_fd())
}

/// Makes a detached mount nosuid, nodev and noexec, and read-only if asked.
///
/// # Errors
/// What `mount_setattr(2)` says.
pub fn restrict(tree: BorrowedFd<'_>, recursive: bool, read_only: bool) -> io::Result<()> {
    let mut set = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    set.set(MountAttrFlags::MOUNT_ATTR_RDONLY, read_only);
    set_attributes(tree, recursive, set, None)
}

/// Gives the calling thread a mount namespace of its own: a copy, whose shared mounts still hear of each other.
///
/// # Errors
/// What `unshare(2)` says.
pub fn unshare() -> io::Result<()> {
    crate::fork::unshare(libc::CLONE_NEWNS).map_err(failed(|| "get a mount namespace".to_string()))
}

/// `mount_setattr(2)` on what the descriptor holds, adding `set`.
fn set_attributes(
    mount: BorrowedFd<'_>,
    recursive: bool,
    set: MountAttrFlags,
    userns: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        userns_fd: u64,
    }
    let attr = MountAttr {
        set: u64::from(set.bits()),
        clear: 0,
        propagation: 0,
        userns_fd: userns.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated constant, attr is a live struct of the size passed (MOUNT_ATTR_SIZE_VER0).
    let rc = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(&attr),
            size_of::<MountAttr>(),
        )
    };
    if rc == 0 {
        Ok(())
    } else {
        Err(failed(|| "set mount attributes".to_string())(
            io::Error::last_os_error(),
        ))
    }
}

/// Mounts a tmpfs of at most `size` bytes whose root has `mode`; nosuid, nodev.
///
/// # Errors
/// What `mount(2)` says, naming `target`.
pub fn tmpfs(target: &Path, size: u64, mode: u32) -> io::Result<()> {
    tmpfs_with(target, size, mode, MountFlags::NOSUID | MountFlags::NODEV)
}

/// A small tmpfs on which device nodes can be opened: nodes of a container that may not make its own.
///
/// # Errors
/// What `mount(2)` says, naming `target`.
pub fn tmpfs_of_devices(target: &Path) -> io::Result<()> {
    tmpfs_with(target, 1 << 20, 0o755, MountFlags::NOSUID | MountFlags::NOEXEC)
}

/// As [`tmpfs`], and noexec: `/dev/shm` of a pod.
///
/// # Errors
/// What `mount(2)` says, naming `target`.
pub fn shm(target: &Path, size: u64, mode: u32) -> io::Result<()> {
    tmpfs_with(
        target,
        size,
        mode,
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
    )
}

fn tmpfs_with(target: &Path, size: u64, mode: u32, flags: MountFlags) -> io::Result<()> {
    let act = || format!("mount a tmpfs on {}", target.display());
    let data =
        CString::new(format!("mode={mode:o},size={size}")).map_err(|e| failed(act)(io::Error::from(e)))?;
    rustix::mount::mount("tmpfs", target, "tmpfs", flags, data.as_c_str()).map_err(failed(act))
}

/// Takes the topmost mount off `target` (a link there is not followed). Not mounted, or not there: fine.
///
/// With `detach` it vanishes from the tree at once and ends when its last user is gone.
///
/// # Errors
/// What `umount2(2)` says (`EBUSY` without `detach`), naming `target`.
pub fn unmount(target: &Path, detach: bool) -> io::Result<()> {
    let flags = UnmountFlags::NOFOLLOW
        | if detach {
            UnmountFlags::DETACH
        } else {
            UnmountFlags::empty()
        };
    match rustix::mount::unmount(target, flags) {
        Ok(()) | Err(Errno::NOENT | Errno::INVAL) => Ok(()),
        Err(e) => Err(failed(|| format!("unmount {}", target.display()))(e)),
    }
}

/// Sets how mount events of `target` travel.
///
/// # Errors
/// What `mount(2)` says, naming `target`.
pub fn set_propagation(target: &Path, propagation: Propagation, recursive: bool) -> io::Result<()> {
    let mut flags = match propagation {
        Propagation::Private => MountPropagationFlags::PRIVATE,
        Propagation::Shared => MountPropagationFlags::SHARED,
        Propagation::Slave => MountPropagationFlags::DOWNSTREAM,
        Propagation::Unbindable => MountPropagationFlags::UNBINDABLE,
    };
    flags.set(MountPropagationFlags::REC, recursive);
    rustix::mount::mount_change(target, flags)
        .map_err(failed(|| format!("set the propagation of {}", target.display())))
}

/// The mount points at and below `dir` in this mount namespace, in the order in which to unmount them (latest and
/// deepest first; a path mounted on twice is there twice).
///
/// # Errors
/// When `/proc/self/mountinfo` cannot be read.
pub fn mounts_under(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let table =
        std::fs::read("/proc/self/mountinfo").map_err(failed(|| "read /proc/self/mountinfo".to_string()))?;
    Ok(parse_mounts_under(&table, dir))
}

/// Takes everything off at and below `dir`, latest first, lazily: what still uses it keeps it. What happens here stays
/// here, also where a mount is shared with another namespace.
///
/// # Errors
/// What `umount2(2)` says of the first that does not go.
pub fn unmount_all(dir: &Path) -> io::Result<()> {
    for target in mounts_under(dir)? {
        let _ = rustix::mount::mount_change(&target, MountPropagationFlags::PRIVATE);
        unmount(&target, true)?;
    }
    Ok(())
}

/// Removes a directory of ours with everything below, and never anything behind a mount in there, which may be
/// somebody's data: mounts are taken off first. Nothing there is fine.
///
/// # Errors
/// What does not go, naming it.
pub fn remove_tree(dir: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return Err(invalid(format!("{} is no directory of ours", dir.display())));
    };
    let root = match Root::open(parent) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    // Most have no mounts: the machine's whole table is only read for those that do.
    match root.remove_all(Path::new(name)) {
        Err(e) if matches!(errno(&e), Some(libc::EXDEV | libc::EBUSY)) => {}
        other => return other,
    }
    // The table has real paths.
    let real = parent
        .canonicalize()
        .map_err(failed(|| format!("resolve {}", parent.display())))?;
    unmount_all(&real.join(name))?;
    root.remove_all(Path::new(name))
}

fn parse_mounts_under(table: &[u8], dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = table
        .split(|b| *b == b'\n')
        .filter_map(|line| line.split(|b| *b == b' ').nth(4))
        .map(|field| PathBuf::from(OsString::from_vec(unescape(field))))
        .filter(|path| path.starts_with(dir))
        .collect();
    found.reverse();
    found.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    found
}

/// mountinfo writes space, tab, newline and backslash as `\ooo`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&b, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|d| b == b'\\' && d.iter().all(|c| matches!(c, b'0'..=b'7')));
        if let Some(digits) = octal {
            out.push(
                digits
                    .iter()
                    .fold(0u8, |n, c| n.wrapping_mul(8).wrapping_add(c - b'0')),
            );
            rest = &after[3..];
        } else {
            out.push(b);
            rest = after;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_listed_deepest_first_and_unescaped() {
        let table = b"1 0 8:1 / / rw - ext4 x rw\n2 1 0:2 / /a rw - tmpfs x rw\n3 2 0:3 / /a/b\\040c rw - tmpfs x rw\n\
                      4 1 0:4 / /ab rw - tmpfs x rw\n5 2 0:5 / /a rw - tmpfs x rw\n";
        let found = parse_mounts_under(table, Path::new("/a"));
        assert_eq!(found, ["/a/b c", "/a", "/a"].map(PathBuf::from));
        let odd = PathBuf::from(OsString::from_vec(b"/a/\xff".to_vec()));
        let table = b"1 0 8:1 / / rw - ext4 x rw\n2 1 0:2 / /a/\xff rw - tmpfs x rw\n";
        assert_eq!(
            parse_mounts_under(table, Path::new("/a")),
            [odd],
            "whatever its bytes"
        );
    }
}
