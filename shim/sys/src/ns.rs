//! Namespaces: made, pinned as bind mounts on files, entered.
//!
//! A pinned namespace lives as long as its mount, whatever becomes of the processes in it:
//! ```text
//! <dir>/user  <dir>/net  <dir>/ipc  <dir>/uts      bind mounts of /proc/<child>/ns/*
//! ```
//! With a user namespace, the others are made inside it and so belong to it. Refuses to know pods and CNI.

use crate::error::{failed, invalid};
use crate::fork::{self, Report, Stage, Sys, cvt};
use crate::process;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A kind of namespace, named as in `/proc/<pid>/ns`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Users and groups.
    User,
    /// Network.
    Net,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host name.
    Uts,
    /// Process ids.
    Pid,
    /// Mounts.
    Mnt,
    /// The cgroup root seen.
    Cgroup,
    /// Clock offsets.
    Time,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 8] = [
        Kind::User,
        Kind::Net,
        Kind::Ipc,
        Kind::Uts,
        Kind::Pid,
        Kind::Mnt,
        Kind::Cgroup,
        Kind::Time,
    ];

    /// The file's name in `/proc/<pid>/ns` and in the directory of pins.
    pub fn name(self) -> &'static str {
        match self {
            Kind::User => "user",
            Kind::Net => "net",
            Kind::Ipc => "ipc",
            Kind::Uts => "uts",
            Kind::Pid => "pid",
            Kind::Mnt => "mnt",
            Kind::Cgroup => "cgroup",
            Kind::Time => "time",
        }
    }

    pub(crate) fn flag(self) -> i32 {
        match self {
            Kind::User => libc::CLONE_NEWUSER,
            Kind::Net => libc::CLONE_NEWNET,
            Kind::Ipc => libc::CLONE_NEWIPC,
            Kind::Uts => libc::CLONE_NEWUTS,
            Kind::Pid => libc::CLONE_NEWPID,
            Kind::Mnt => libc::CLONE_NEWNS,
            Kind::Cgroup => libc::CLONE_NEWCGROUP,
            Kind::Time => 0x80, // CLONE_NEWTIME
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// One range of ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdMap {
    /// First id inside.
    pub container_id: u32,
    /// First id outside.
    pub host_id: u32,
    /// How many.
    pub length: u32,
}

/// The maps of a user namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IdMaps {
    /// Users.
    pub uids: Vec<IdMap>,
    /// Groups.
    pub gids: Vec<IdMap>,
}

/// Which namespaces to make.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NewNamespaces {
    /// A user namespace that owns the others.
    pub user: Option<IdMaps>,
    /// A network namespace, its loopback device up.
    pub net: bool,
    /// An IPC namespace.
    pub ipc: bool,
    /// A UTS namespace with this host name.
    pub uts: Option<String>,
}

impl NewNamespaces {
    fn kinds(&self) -> Vec<Kind> {
        let asked = [
            (Kind::User, self.user.is_some()),
            (Kind::Net, self.net),
            (Kind::Ipc, self.ipc),
            (Kind::Uts, self.uts.is_some()),
        ];
        asked
            .into_iter()
            .filter(|(_, on)| *on)
            .map(|(kind, _)| kind)
            .collect()
    }
}

/// Why namespaces could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NsError {
    /// A sysctl is refused before anything is made.
    #[error("sysctl {name} cannot be set: {reason}")]
    Sysctl {
        /// As it was asked for.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The kernel did not take a sysctl's value.
    #[error("set sysctl {name}")]
    SetSysctl {
        /// As it was asked for.
        name: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A step failed.
    #[error("{act}")]
    Io {
        /// What was attempted.
        act: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// How long the helper may take for each step.
const PATIENCE: Duration = Duration::from_secs(10);

/// Makes namespaces and pins each on `dir/<kind>` (files made here; `dir` exists). Safe in a process with threads: the
/// work is done in a forked child that is gone, and reaped, when this returns.
///
/// `sysctls` are names with dots and values, set inside the new namespaces; those of a namespace that is not new are
/// refused, since they would hit the host.
///
/// # Errors
/// [`NsError`]; nothing stays pinned.
pub fn pin(
    new: &NewNamespaces,
    dir: &Path,
    sysctls: &[(String, String)],
) -> Result<Vec<(Kind, PathBuf)>, NsError> {
    let kinds = new.kinds();
    let writes = sysctls
        .iter()
        .map(|(name, value)| Sysctl::new(new, name, value))
        .collect::<Result<Vec<_>, _>>()?;
    let helper = Helper::start(new, &kinds, &writes).map_err(|e| match e {
        Started::Sysctl(nth, source) => NsError::SetSysctl {
            name: sysctls.get(nth).map(|s| s.0.clone()).unwrap_or_default(),
            source,
        },
        Started::Io(source) => NsError::Io {
            act: "make namespaces".into(),
            source,
        },
    })?;
    let mut pinned: Vec<(Kind, PathBuf)> = Vec::with_capacity(kinds.len());
    for kind in kinds {
        let path = dir.join(kind.name());
        if let Err(source) = pin_of(helper.pid(), kind, &path) {
            for (_, path) in &pinned {
                let _ = unpin(path);
            }
            return Err(NsError::Io {
                act: format!("pin the {kind} namespace"),
                source,
            });
        }
        pinned.push((kind, path));
    }
    Ok(pinned)
}

/// Pins a process's namespace on the file `path`, which is made when missing and removed again on failure.
///
/// # Errors
/// What the calls say, naming `path`.
pub fn pin_of(pid: u32, kind: Kind, path: &Path) -> io::Result<()> {
    pin_from(&format!("/proc/{pid}/ns/{kind}"), path)
}

fn pin_from(source: &str, path: &Path) -> io::Result<()> {
    let act = || format!("pin {source} on {}", path.display());
    let flags = OFlags::CREATE | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    drop(rustix::fs::openat(CWD, path, flags, Mode::from_raw_mode(0o600)).map_err(failed(act))?);
    rustix::mount::mount_bind(source, path).map_err(|e| {
        let _ = std::fs::remove_file(path);
        failed(act)(e)
    })
}

/// Takes a pin off and removes its file; not there is fine. The namespace goes when nothing else uses it.
///
/// # Errors
/// What the calls say, naming `path`.
pub fn unpin(path: &Path) -> io::Result<()> {
    let act = || format!("unpin the namespace on {}", path.display());
    loop {
        match rustix::mount::unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => break,
            Err(e) => return Err(failed(act)(e)),
        }
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(act)(e)),
        _ => Ok(()),
    }
}

/// Makes a network namespace, its loopback device up, and pins it on the file `path`. Uses a thread of its own.
///
/// # Errors
/// What the calls say, naming `path`; nothing stays pinned.
pub fn pin_new_net(path: &Path) -> io::Result<()> {
    let act = || format!("make a network namespace on {}", path.display());
    on_thread(|| {
        // SAFETY: changes this fresh thread's namespace only.
        cvt(unsafe { libc::unshare(libc::CLONE_NEWNET) }.into())?;
        loopback_up()?;
        let tid = rustix::thread::gettid().as_raw_nonzero();
        pin_from(&format!("/proc/self/task/{tid}/ns/net"), path)
    })
    .map_err(failed(act))
}

/// Runs `f` on a fresh thread that has entered the network namespace pinned on `path`. Sockets opened there stay there.
///
/// # Errors
/// When the namespace cannot be entered, naming `path`; what `f` returns is inside the `Ok`.
///
/// # Panics
/// When `f` does.
pub fn in_netns<T: Send>(path: &Path, f: impl FnOnce() -> T + Send) -> io::Result<T> {
    let act = || format!("enter the network namespace {}", path.display());
    let fd = open(path)?;
    on_thread(|| {
        setns(fd.as_fd(), libc::CLONE_NEWNET)?;
        Ok(f())
    })
    .map_err(failed(act))
}

/// Opens a pinned namespace.
///
/// # Errors
/// What `open(2)` says, naming `path`.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    rustix::fs::openat(
        CWD,
        path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )
    .map_err(failed(|| format!("open the namespace {}", path.display())))
}

/// What a user id inside the user namespace of process `pid` is on the host; `None` when it is not mapped, or the
/// process is gone.
pub fn host_uid(pid: u32, uid: u32) -> Option<u32> {
    translate(
        &std::fs::read_to_string(format!("/proc/{pid}/uid_map")).ok()?,
        uid,
    )
}

/// Lines of "inside outside count".
fn translate(map: &str, id: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line
            .split_ascii_whitespace()
            .filter_map(|n| n.parse::<u32>().ok());
        let (inside, outside, count) = (numbers.next()?, numbers.next()?, numbers.next()?);
        let offset = id.checked_sub(inside).filter(|o| *o < count)?;
        outside.checked_add(offset)
    })
}

/// What makes a namespace itself: device and inode of its file.
///
/// # Errors
/// What `stat(2)` says, naming `path`.
pub fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let s = rustix::fs::stat(path).map_err(failed(|| format!("stat the namespace {}", path.display())))?;
    Ok((s.st_dev, s.st_ino))
}

/// Whether `path` is a pinned namespace now (an empty file that nothing is mounted on is none).
pub fn is_pinned(path: &Path) -> bool {
    const NSFS_MAGIC: u64 = 0x6e73_6673;
    #[allow(clippy::unnecessary_cast, clippy::cast_sign_loss)] // the type differs between libcs
    rustix::fs::statfs(path).is_ok_and(|s| s.f_type as u64 == NSFS_MAGIC)
}

/// A user namespace with these maps, held only by the descriptor: for [`crate::mount::idmapped_clone`].
///
/// # Errors
/// What the calls say.
pub fn user_namespace(maps: &IdMaps) -> io::Result<OwnedFd> {
    let new = NewNamespaces {
        user: Some(maps.clone()),
        ..NewNamespaces::default()
    };
    let helper = Helper::start(&new, &[Kind::User], &[]).map_err(|e| match e {
        Started::Io(e) | Started::Sysctl(_, e) => failed(|| "make a user namespace".to_string())(e),
    })?;
    open(Path::new(&format!("/proc/{}/ns/user", helper.pid())))
}

fn on_thread<T: Send>(f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let handle = std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, f)?;
        match handle.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

pub(crate) fn setns(fd: BorrowedFd<'_>, flags: i32) -> Sys<()> {
    // SAFETY: touches no memory.
    cvt(unsafe { libc::setns(fd.as_raw_fd(), flags) }.into()).map(drop)
}

/// Async-signal-safe: two ioctls on a socket of its own.
fn loopback_up() -> Sys<()> {
    // SAFETY: the zeroed ifreq is valid, named "lo", and outlives the ioctls that read and write it; the socket is
    // closed once.
    unsafe {
        let raw = cvt(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0).into())?;
        let socket = OwnedFd::from_raw_fd(raw as i32);
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        cvt(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request).into())?;
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        cvt(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &mut request).into())?;
    }
    Ok(())
}

/// A sysctl of a new namespace, ready to be written by the helper.
struct Sysctl {
    path: CString,
    value: Vec<u8>,
}

impl Sysctl {
    fn new(new: &NewNamespaces, name: &str, value: &str) -> Result<Sysctl, NsError> {
        let refuse = |reason| NsError::Sysctl {
            name: name.to_string(),
            reason,
        };
        let clean = |s: &str| s.chars().all(|c| !c.is_control() && c != '+' && c != '\0');
        if !clean(name) || !value.chars().all(|c| c == '\t' || (!c.is_control() && c != '+')) {
            return Err(refuse("it contains a plus or a control character"));
        }
        let path = sysctl_path(name);
        if path
            .split('/')
            .any(|part| part.is_empty() || part == "." || part == "..")
        {
            return Err(refuse("it is no name of a sysctl"));
        }
        let ipc = matches!(
            path.as_str(),
            "kernel/shmall"
                | "kernel/shmmax"
                | "kernel/shmmni"
                | "kernel/shm_rmid_forced"
                | "kernel/msgmax"
                | "kernel/msgmnb"
                | "kernel/msgmni"
                | "kernel/sem"
                | "kernel/shm_next_id"
                | "kernel/msg_next_id"
                | "kernel/sem_next_id"
        ) || path.starts_with("fs/mqueue/");
        let allowed = match () {
            () if path.starts_with("net/") => new.net,
            () if ipc => new.ipc,
            () if path == "kernel/domainname" => new.uts.is_some(),
            () => return Err(refuse("it is not namespaced")),
        };
        if !allowed {
            return Err(refuse("its namespace is the host's"));
        }
        let path = CString::new(format!("/proc/sys/{path}")).map_err(|_| refuse("it has a zero byte"))?;
        Ok(Sysctl {
            path,
            value: value.as_bytes().to_vec(),
        })
    }

    fn write(&self) -> Sys<()> {
        let fd = rustix::fs::openat(
            CWD,
            self.path.as_c_str(),
            OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        fork::write_all(fd.as_raw_fd(), &self.value)
    }
}

/// sysctl(8)'s convention: where the first separator is a dot, dots and slashes swap.
fn sysctl_path(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(n) if name.as_bytes()[n] == b'.' => name
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                c => c,
            })
            .collect(),
        _ => name.to_string(),
    }
}

enum Started {
    Io(io::Error),
    Sysctl(usize, io::Error),
}

impl From<io::Error> for Started {
    fn from(e: io::Error) -> Started {
        Started::Io(e)
    }
}

/// A child that sits in the new namespaces until dropped.
struct Helper {
    child: process::Child,
    /// The child ends when this is closed.
    socket: OwnedFd,
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = process::send_signal(self.child.pidfd.as_fd(), libc::SIGKILL);
        let _ = process::wait(self.child.pid);
    }
}

impl Helper {
    fn pid(&self) -> u32 {
        self.child.pid
    }

    fn start(new: &NewNamespaces, kinds: &[Kind], sysctls: &[Sysctl]) -> Result<Helper, Started> {
        let hostname = match &new.uts {
            Some(name) if name.len() > 64 => {
                return Err(Started::Io(invalid("a host name of more than 64 bytes")));
            }
            name => name.clone().unwrap_or_default().into_bytes(),
        };
        let flags = kinds
            .iter()
            .filter(|k| **k != Kind::User)
            .fold(0, |f, k| f | k.flag());
        // Both ways over one socket: we say "maps are written", the child says "done" by a report of errno 0.
        let (ours, theirs) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .map_err(io::Error::from)?;
        let (user, net, uts) = (new.user.is_some(), new.net, new.uts.is_some());
        // SAFETY: the closure makes system calls on values prepared above only.
        let child = unsafe {
            fork::fork(|| {
                let report = Report::of(theirs.as_raw_fd());
                report.check(Stage::Descriptors, fork::keep_only(theirs.as_raw_fd()));
                let report = Report::of(0);
                if user {
                    report.check(Stage::Namespaces, fork::unshare(libc::CLONE_NEWUSER));
                    report.tell(Stage::NeedsMaps);
                    report.await_word();
                    // Without a mapping for 0 these fail; the capabilities are ours all the same.
                    let _ = fork::set_gid(0);
                    let _ = fork::set_uid(0);
                }
                if flags != 0 {
                    report.check(Stage::Namespaces, fork::unshare(flags));
                }
                if uts {
                    report.check(Stage::Hostname, fork::set_hostname(&hostname));
                }
                if net {
                    report.check(Stage::Loopback, loopback_up());
                }
                for (nth, sysctl) in sysctls.iter().enumerate() {
                    report.check_nth(
                        Stage::Sysctl,
                        u8::try_from(nth).unwrap_or(u8::MAX),
                        sysctl.write(),
                    );
                }
                report.tell(Stage::Ready);
                report.await_word();
                fork::exit(0)
            })
        }?;
        drop(theirs);
        let helper = Helper { child, socket: ours };
        if let Some(maps) = &new.user {
            helper.expect(Stage::NeedsMaps)?;
            write_maps(helper.pid(), maps)?;
            rustix::io::write(&helper.socket, b"m").map_err(io::Error::from)?;
        }
        helper.expect(Stage::Ready)?;
        Ok(helper)
    }

    fn expect(&self, stage: Stage) -> Result<(), Started> {
        match fork::read_report(self.socket.as_fd(), Some(PATIENCE))? {
            Some(word) if word.stage == stage => Ok(()),
            Some(f) if f.stage == Stage::Sysctl => Err(Started::Sysctl(f.nth.into(), f.errno.into())),
            Some(failure) => Err(Started::Io(failure.into())),
            None => Err(Started::Io(
                failed(|| "hear from the helper process".to_string())(Errno::PIPE),
            )),
        }
    }
}

fn write_maps(pid: u32, maps: &IdMaps) -> io::Result<()> {
    for (file, ranges) in [("uid_map", &maps.uids), ("gid_map", &maps.gids)] {
        let path = format!("/proc/{pid}/{file}");
        let lines: String = ranges
            .iter()
            .map(|m| format!("{} {} {}\n", m.container_id, m.host_id, m.length))
            .collect();
        std::fs::write(&path, lines).map_err(failed(|| format!("write {path}")))?;
    }
    Ok(())
}
