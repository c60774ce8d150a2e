//! What happens between fork and exec: raw system calls on things prepared beforehand, and a pipe on which the child
//! says what failed. Everything the child calls is async-signal-safe: no allocation, no locks, no panics.

use crate::error::invalid;
use crate::process::Child;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// The result of a call in the child.
pub(crate) type Sys<T> = Result<T, Errno>;

/// Turns the `-1` of a libc call into errno. Reads a thread-local only.
pub(crate) fn cvt(rc: libc::c_long) -> Sys<libc::c_long> {
    if rc >= 0 {
        return Ok(rc);
    }
    // SAFETY: the location of errno is always valid for the calling thread.
    Err(Errno::from_raw_os_error(unsafe { *libc::__errno_location() }))
}

/// Where in the child something failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stage {
    Signals = 1,
    Session,
    ParentDeath,
    Descriptors,
    Cgroup,
    Namespaces,
    Mounts,
    Rlimits,
    Groups,
    Gid,
    Uid,
    Capabilities,
    NoNewPrivileges,
    Label,
    Seccomp,
    Cwd,
    CwdOutside,
    Terminal,
    Fork,
    Exec,
    Keyring,
    Hostname,
    Loopback,
    Sysctl,
    OomScore,
    NeedsMaps,
    Ready,
    Protocol,
}

impl Stage {
    const ALL: [Stage; 28] = [
        Stage::Signals,
        Stage::Session,
        Stage::ParentDeath,
        Stage::Descriptors,
        Stage::Cgroup,
        Stage::Namespaces,
        Stage::Mounts,
        Stage::Rlimits,
        Stage::Groups,
        Stage::Gid,
        Stage::Uid,
        Stage::Capabilities,
        Stage::NoNewPrivileges,
        Stage::Label,
        Stage::Seccomp,
        Stage::Cwd,
        Stage::CwdOutside,
        Stage::Terminal,
        Stage::Fork,
        Stage::Exec,
        Stage::Keyring,
        Stage::Hostname,
        Stage::Loopback,
        Stage::Sysctl,
        Stage::OomScore,
        Stage::NeedsMaps,
        Stage::Ready,
        Stage::Protocol,
    ];

    fn from_byte(byte: u8) -> Stage {
        Stage::ALL
            .into_iter()
            .find(|s| *s as u8 == byte)
            .unwrap_or(Stage::Protocol)
    }
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Stage::Signals => "reset signals",
            Stage::Session => "start a session",
            Stage::ParentDeath => "tie to the parent's life",
            Stage::Descriptors => "arrange descriptors",
            Stage::Cgroup => "join the cgroup",
            Stage::Namespaces => "enter namespaces",
            Stage::Mounts => "prepare mounts",
            Stage::Rlimits => "set resource limits",
            Stage::Groups => "set supplementary groups",
            Stage::Gid => "set the group",
            Stage::Uid => "set the user",
            Stage::Capabilities => "set capabilities",
            Stage::NoNewPrivileges => "set no_new_privs",
            Stage::Label => "set the security label",
            Stage::Seccomp => "load the seccomp filter",
            Stage::Cwd => "enter the working directory",
            Stage::CwdOutside => "check that the working directory is inside the container",
            Stage::Terminal => "open a terminal",
            Stage::Fork => "fork",
            Stage::Exec => "execute the program",
            Stage::Keyring => "make a session keyring",
            Stage::Hostname => "set the host name",
            Stage::Loopback => "bring up the loopback device",
            Stage::Sysctl => "set a sysctl",
            Stage::OomScore => "set oom_score_adj",
            Stage::NeedsMaps => "wait for id maps",
            Stage::Ready => "get ready",
            Stage::Protocol => "report to the parent",
        })
    }
}

/// The child's end of the report pipe.
#[derive(Clone, Copy)]
pub(crate) struct Report {
    fd: RawFd,
}

impl Report {
    pub(crate) fn of(fd: RawFd) -> Report {
        Report { fd }
    }

    /// The value, or the end of this process with a report.
    pub(crate) fn check<T>(self, stage: Stage, result: Sys<T>) -> T {
        match result {
            Ok(value) => value,
            Err(errno) => self.fail(stage, errno),
        }
    }

    /// As [`Report::check`], saying also which of several things it was.
    pub(crate) fn check_nth<T>(self, stage: Stage, nth: u8, result: Sys<T>) -> T {
        match result {
            Ok(value) => value,
            Err(errno) => self.fail_nth(stage, nth, errno),
        }
    }

    /// A word on the way that is no failure.
    pub(crate) fn tell(self, stage: Stage) {
        let _ = write_all(self.fd, &[stage as u8, 0, 1, 0, 0, 0]);
    }

    /// The second child's pid.
    pub(crate) fn started(self, pid: i32) {
        let p = pid.to_ne_bytes();
        let _ = write_all(self.fd, &[Stage::Ready as u8, 0, p[0], p[1], p[2], p[3]]);
    }

    /// Sends a descriptor over the report socket.
    pub(crate) fn send_fd(self, fd: RawFd) -> Sys<()> {
        const SPACE: usize = 64;
        /// Aligned as control messages must be.
        #[repr(C, align(16))]
        struct Control([u8; SPACE]);
        let mut word = [Stage::Terminal as u8, 0, 0, 0, 0, 0];
        let mut control = Control([0; SPACE]);
        let length = size_of::<RawFd>() as u32;
        // SAFETY: all-zero is a valid msghdr; the buffers outlive the call, and CMSG_SPACE of one descriptor fits.
        unsafe {
            let mut io = libc::iovec {
                iov_base: word.as_mut_ptr().cast(),
                iov_len: word.len(),
            };
            let mut message: libc::msghdr = std::mem::zeroed();
            message.msg_iov = &mut io;
            message.msg_iovlen = 1;
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(length) as _;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(length) as _;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(fd);
            cvt(libc::sendmsg(self.fd, &message, libc::MSG_NOSIGNAL) as libc::c_long).map(drop)
        }
    }

    /// Waits for one message of the parent; its end ends this process.
    pub(crate) fn await_word(self) {
        let mut word = [0u8; 1];
        // SAFETY: reads into a live array.
        if cvt(unsafe { libc::read(self.fd, word.as_mut_ptr().cast(), 1) } as libc::c_long) != Ok(1) {
            exit(127);
        }
    }

    /// Reports and ends this process.
    pub(crate) fn fail(self, stage: Stage, errno: Errno) -> ! {
        self.fail_nth(stage, 0, errno)
    }

    fn fail_nth(self, stage: Stage, nth: u8, errno: Errno) -> ! {
        let e = errno.raw_os_error().to_ne_bytes();
        let message = [stage as u8, nth, e[0], e[1], e[2], e[3]];
        // SAFETY: writes from a live array; _exit runs no handlers.
        unsafe {
            libc::write(self.fd, message.as_ptr().cast(), message.len());
            libc::_exit(127)
        }
    }
}

/// A pipe that ends without a word when the child's exec succeeds.
pub(crate) fn report_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
}

/// What a child reported: where, the which-th of several, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) stage: Stage,
    pub(crate) nth: u8,
    pub(crate) errno: Errno,
}

impl From<Failure> for io::Error {
    fn from(f: Failure) -> io::Error {
        crate::error::failed(|| f.stage.to_string())(f.errno)
    }
}

/// Reads the report: `None` when the child got through.
pub(crate) fn read_report(fd: BorrowedFd<'_>, at_most: Option<Duration>) -> io::Result<Option<Failure>> {
    if !crate::process::poll_readable(fd, at_most)? {
        return Err(Errno::TIMEDOUT.into());
    }
    let mut m = [0u8; 6];
    loop {
        return match rustix::io::read(fd, &mut m) {
            Ok(0) => Ok(None),
            Ok(6) => {
                let raw = i32::from_ne_bytes([m[2], m[3], m[4], m[5]]);
                let errno = if (1..4096).contains(&raw) {
                    Errno::from_raw_os_error(raw)
                } else {
                    Errno::PROTO
                };
                Ok(Some(Failure {
                    stage: Stage::from_byte(m[0]),
                    nth: m[1],
                    errno,
                }))
            }
            Ok(_) => Ok(Some(Failure {
                stage: Stage::Protocol,
                nth: 0,
                errno: Errno::PROTO,
            })),
            Err(Errno::INTR) => continue,
            Err(e) => Err(e.into()),
        };
    }
}

/// As [`report_pipe`], for children that also send descriptors; keeps messages apart.
pub(crate) fn report_socket() -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// One message on a report socket.
#[derive(Debug)]
pub(crate) enum Word {
    Started(u32),
    Descriptor,
    Failed(Failure),
}

/// Reads one message; `None` at the end.
pub(crate) fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<(Word, Option<OwnedFd>)>> {
    let mut m = [0u8; 6];
    let mut fds = Vec::new();
    match crate::fd::recv_fds(socket, &mut m, &mut fds)? {
        0 => return Ok(None),
        6 => {}
        _ => return Ok(Some((Word::Failed(PROTOCOL), None))),
    }
    let number = i32::from_ne_bytes([m[2], m[3], m[4], m[5]]);
    let word = match (Stage::from_byte(m[0]), fds.pop()) {
        (Stage::Ready, None) => Word::Started(u32::try_from(number).unwrap_or(0)),
        (Stage::Terminal, Some(fd)) => return Ok(Some((Word::Descriptor, Some(fd)))),
        (stage, _) => Word::Failed(Failure {
            stage,
            nth: m[1],
            errno: errno_of(number),
        }),
    };
    Ok(Some((word, None)))
}

/// What came over a report socket until its end.
#[derive(Default)]
pub(crate) struct Heard {
    pid: Option<u32>,
    failure: Option<Failure>,
    descriptor: Option<OwnedFd>,
    timed_out: bool,
}

/// Hears two children out, the second a clone of the first, and reaps the first.
pub(crate) fn listen(report: BorrowedFd<'_>, first: &Child, patience: Duration) -> Heard {
    let until = std::time::Instant::now() + patience;
    let mut heard = Heard::default();
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now());
        if !crate::process::poll_readable(report, Some(left)).unwrap_or(false) {
            heard.timed_out = true;
            let _ = crate::process::send_signal(first.pidfd.as_fd(), libc::SIGKILL);
            return heard;
        }
        match receive(report) {
            Ok(None) | Err(_) => break,
            Ok(Some((Word::Started(pid), _))) if pid != first.pid => heard.pid = heard.pid.or(Some(pid)),
            Ok(Some((Word::Started(_), _))) => {}
            Ok(Some((Word::Failed(failure), _))) => heard.failure = heard.failure.or(Some(failure)),
            Ok(Some((Word::Descriptor, fd))) => heard.descriptor = heard.descriptor.or(fd),
        }
    }
    let _ = crate::process::wait(first.pid);
    heard
}

impl Heard {
    /// The second child, and the descriptor that was sent; `None` when it was killed before it could say anything. An
    /// error is the failure it reported, or nothing when it took too long; then it is killed and, except after
    /// too long, reaped.
    pub(crate) fn into_child(self) -> Result<Option<(Child, Option<OwnedFd>)>, Option<Failure>> {
        // Only a child of ours can be opened as the process we started; nobody else reaps it in between.
        let open = |pid| {
            crate::process::pidfd_open(pid)
                .ok()
                .map(|pidfd| Child { pid, pidfd })
        };
        let child = self.pid.and_then(open);
        if !self.timed_out && self.failure.is_none() {
            return Ok(child.map(|child| (child, self.descriptor)));
        }
        if let Some(child) = child {
            let _ = crate::process::send_signal(child.pidfd.as_fd(), libc::SIGKILL);
            if !self.timed_out {
                let _ = crate::process::wait(child.pid);
            }
        }
        Err(self.failure)
    }
}

const PROTOCOL: Failure = Failure {
    stage: Stage::Protocol,
    nth: 0,
    errno: Errno::PROTO,
};

/// The number comes from a child that may be a container's by then.
fn errno_of(number: i32) -> Errno {
    if (1..4096).contains(&number) {
        Errno::from_raw_os_error(number)
    } else {
        Errno::PROTO
    }
}

/// Forks (clone3 with a pidfd). The child runs `child` and never returns.
///
/// # Safety
/// `child` may only make async-signal-safe calls and must not touch locks or allocate.
pub(crate) unsafe fn fork<F: FnOnce() -> std::convert::Infallible>(child: F) -> io::Result<Child> {
    // SAFETY: passed on.
    let made = unsafe { clone(None, child) };
    made.map_err(io::Error::from)
}

/// As [`fork`], in a cgroup: the child has joined it when it runs `child`, or has reported that it cannot on `report`.
/// `EBUSY` is told here, before there is a child.
///
/// # Safety
/// As [`fork`].
pub(crate) unsafe fn fork_in<F: FnOnce() -> std::convert::Infallible>(
    join: Option<&crate::cgroup::Join>,
    report: RawFd,
    child: F,
) -> io::Result<Child> {
    let enter = |born: bool| {
        if let Some(join) = join {
            Report::of(report).check(Stage::Cgroup, join.enter(born));
        }
    };
    if let Some(dir) = join.and_then(crate::cgroup::Join::birthplace) {
        let child = std::cell::Cell::new(Some(child));
        // SAFETY: passed on. The cell is taken from in the child only, so here it is still full on an error.
        let made = unsafe {
            clone(Some(dir), || {
                enter(true);
                match child.take() {
                    Some(child) => child(),
                    None => exit(127),
                }
            })
        };
        match (made, child.take()) {
            (Ok(made), _) => return Ok(made),
            // It hands controllers down, so that no process may be in it: the caller knows where else to go.
            (Err(Errno::BUSY), _) => return Err(Errno::BUSY.into()),
            // Not by this kernel, or not into this cgroup in this way: then by moving.
            (Err(_), Some(child)) => {
                // SAFETY: passed on.
                return unsafe {
                    fork(move || {
                        enter(false);
                        child()
                    })
                };
            }
            (Err(e), None) => return Err(e.into()),
        }
    }
    // SAFETY: passed on.
    unsafe {
        fork(move || {
            enter(false);
            child()
        })
    }
}

/// clone3 with a pidfd and SIGCHLD, into a v2 cgroup if one is given; memory is copied. The child runs `child`.
///
/// # Safety
/// As [`fork`].
unsafe fn clone<F: FnOnce() -> std::convert::Infallible>(
    cgroup: Option<BorrowedFd<'_>>,
    child: F,
) -> Sys<Child> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: libc::c_int = -1;
    // SAFETY: all-zero is a valid clone_args.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = libc::CLONE_PIDFD as u64;
    if let Some(dir) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = dir.as_raw_fd() as u64;
    }
    args.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: without CLONE_VM the child has its own copy of everything, stack included; args lives across the call.
    let pid = cvt(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            std::ptr::from_mut(&mut args),
            size_of::<libc::clone_args>(),
        )
    })?;
    if pid == 0 {
        child();
    }
    // SAFETY: the kernel just opened it for us.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Child {
        pid: u32::try_from(pid).unwrap_or(0),
        pidfd,
    })
}

/// clone(2), not clone3: filters can look at its flags, and commonly refuse clone3. Zero in the child.
pub(crate) fn clone_as_sibling() -> Sys<i32> {
    let flags = libc::CLONE_PARENT | libc::SIGCHLD;
    // SAFETY: without CLONE_VM the child has its own copy of memory; a zero stack means the same address there.
    let pid = cvt(unsafe {
        libc::syscall(
            libc::SYS_clone,
            flags as libc::c_ulong,
            0usize,
            0usize,
            0usize,
            0usize,
        )
    })?;
    Ok(pid as i32)
}

pub(crate) fn no_new_privs() -> Sys<()> {
    // SAFETY: prctl with numbers touches no memory.
    cvt(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into()).map(drop)
}

pub(crate) fn set_undumpable() -> Sys<()> {
    // SAFETY: prctl with numbers touches no memory.
    cvt(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }.into()).map(drop)
}

/// A session keyring of one's own, without a name and empty: the one that is inherited is everybody's, with the keys of
/// whoever started us. A kernel without keyrings has nothing to share.
pub(crate) fn own_keyring() -> Sys<()> {
    const JOIN_SESSION_KEYRING: libc::c_ulong = 1;
    // SAFETY: a null name touches no memory.
    match cvt(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, 0usize) }) {
        Ok(_) | Err(Errno::NOSYS) => Ok(()),
        Err(errno) => Err(errno),
    }
}

pub(crate) fn write_file(path: &CStr, bytes: &[u8]) -> Sys<()> {
    let file = rustix::fs::openat(CWD, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    write_all(file.as_raw_fd(), bytes)
}

/// setns(2) by number, in a forked child.
pub(crate) fn setns(fd: RawFd, flags: i32) -> Sys<()> {
    // SAFETY: touches no memory.
    cvt(unsafe { libc::setns(fd, flags) }.into()).map(drop)
}

/// Closes a descriptor that no value of this forked child owns.
pub(crate) fn close(fd: RawFd) -> Sys<()> {
    // SAFETY: the parent's owner of the number does not run here.
    cvt(unsafe { libc::close(fd) }.into()).map(drop)
}

/// Marks a descriptor close-on-exec.
pub(crate) fn cloexec(fd: RawFd) -> Sys<()> {
    // SAFETY: sets a flag; touches no memory.
    cvt(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }.into()).map(drop)
}

/// Default dispositions for every signal and an empty mask: an ignored SIGPIPE or SIGCHLD would be inherited.
pub(crate) fn reset_signals() -> Sys<()> {
    // SAFETY: SIG_DFL runs no code of ours; the zeroed set is valid storage, filled by sigemptyset.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = libc::SIG_DFL;
        for signal in 1..=64 {
            // EINVAL for SIGKILL, SIGSTOP and those libc keeps for itself: they are the default anyway.
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        cvt(libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut()).into())?;
    }
    Ok(())
}

pub(crate) fn chdir(path: &CStr) -> Sys<()> {
    // SAFETY: the path is NUL-terminated and live.
    cvt(unsafe { libc::chdir(path.as_ptr()) }.into()).map(drop)
}

pub(crate) fn umask(mask: u32) {
    rustix::process::umask(Mode::from_raw_mode(mask));
}

/// Ends this process without running anything more.
pub(crate) fn exit(code: i32) -> ! {
    // SAFETY: runs no handlers and never returns.
    unsafe { libc::_exit(code) }
}

pub(crate) fn unshare(flags: i32) -> Sys<()> {
    // SAFETY: touches no memory; what it changes is the calling thread's.
    cvt(unsafe { libc::unshare(flags) }.into()).map(drop)
}

pub(crate) fn set_hostname(name: &[u8]) -> Sys<()> {
    // SAFETY: the slice is live.
    cvt(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) }.into()).map(drop)
}

/// Real, effective and saved user. The bare call: libc's wrapper signals all threads it believes there are.
pub(crate) fn set_uid(uid: u32) -> Sys<()> {
    // SAFETY: touches no memory.
    cvt(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) }).map(drop)
}

/// Real, effective and saved group.
pub(crate) fn set_gid(gid: u32) -> Sys<()> {
    // SAFETY: touches no memory.
    cvt(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) }).map(drop)
}

pub(crate) fn set_groups(groups: &[u32]) -> Sys<()> {
    // SAFETY: the slice is live.
    cvt(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) }).map(drop)
}

/// Moves `fd` to 0 and closes all others.
pub(crate) fn keep_only(fd: RawFd) -> Sys<()> {
    if fd != 0 {
        dup_to(fd, 0, libc::O_CLOEXEC)?;
    }
    close_from(1)
}

pub(crate) fn setsid() -> Sys<()> {
    rustix::process::setsid().map(drop)
}

/// SIGKILL when the parent thread ends; ESRCH when it already has.
pub(crate) fn die_with(parent: rustix::process::Pid) -> Sys<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    if rustix::process::getppid() != Some(parent) {
        return Err(Errno::SRCH);
    }
    Ok(())
}

/// Returns only on failure.
pub(crate) fn execve(path: &CStr, args: &CArray, env: &CArray) -> Errno {
    // SAFETY: all three are NUL-terminated and live; the arrays end with a null pointer.
    let rc = unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    cvt(rc.into()).err().unwrap_or(Errno::NOEXEC)
}

/// Executes what a descriptor holds. Returns only on failure: `ENOENT` also when it is a script and the descriptor is
/// close-on-exec.
pub(crate) fn execve_file(fd: RawFd, args: &CArray, env: &CArray) -> Errno {
    // SAFETY: the path is an empty string and the arrays end with a null pointer; all are live.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_execveat,
            fd,
            c"".as_ptr(),
            args.as_ptr(),
            env.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    cvt(rc).err().unwrap_or(Errno::NOEXEC)
}

/// Executes the first of the candidates that is there. Returns only on failure: `ENOENT` when none is.
pub(crate) fn execve_first(candidates: &[CString], args: &CArray, env: &CArray) -> Errno {
    let mut last = Errno::NOENT;
    for candidate in candidates {
        match execve(candidate, args, env) {
            Errno::NOENT | Errno::NOTDIR => {}
            // As execvp(3): go on, and remember.
            Errno::ACCESS => last = Errno::ACCESS,
            other => return other,
        }
    }
    last
}

/// Closes every descriptor from `first` on. The caller is a forked child that owns none of them as a value.
pub(crate) fn close_from(first: RawFd) -> Sys<()> {
    // SAFETY: only called in a forked child, whose parent's owners of these numbers do not run here.
    cvt(unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) }).map(drop)
}

/// NULL-terminated C strings, as execve takes them.
pub(crate) struct CArray {
    /// What the pointers point to.
    _strings: Vec<CString>,
    pointers: Vec<*const libc::c_char>,
}

impl CArray {
    pub(crate) fn new<'a>(items: impl Iterator<Item = &'a OsStr>) -> io::Result<CArray> {
        let strings = items
            .map(crate::process::c_string)
            .collect::<io::Result<Vec<_>>>()?;
        let pointers = strings
            .iter()
            .map(|s| s.as_ptr())
            .chain([std::ptr::null()])
            .collect();
        Ok(CArray {
            _strings: strings,
            pointers,
        })
    }

    pub(crate) fn as_ptr(&self) -> *const *const libc::c_char {
        self.pointers.as_ptr()
    }
}

pub(crate) fn dev_null() -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(
        CWD,
        "/dev/null",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Which descriptor gets which number in the child, worked out before the fork.
pub(crate) struct FdPlan {
    /// (ours, wanted), every wanted number below `first_free`.
    moves: Vec<(RawFd, RawFd)>,
    report: RawFd,
    first_free: RawFd,
    scratch: std::cell::UnsafeCell<Vec<RawFd>>,
}

impl FdPlan {
    /// 0 to 2 get `null` unless named; gaps below the highest wanted number are closed.
    pub(crate) fn new(
        wanted: &[(BorrowedFd<'_>, RawFd)],
        null: BorrowedFd<'_>,
        report: BorrowedFd<'_>,
    ) -> io::Result<FdPlan> {
        let mut moves: Vec<(RawFd, RawFd)> = wanted.iter().map(|(fd, n)| (fd.as_raw_fd(), *n)).collect();
        for n in 0..3 {
            if !moves.iter().any(|(_, wanted)| *wanted == n) {
                moves.push((null.as_raw_fd(), n));
            }
        }
        let top = moves.iter().map(|(_, n)| *n).max().unwrap_or(2);
        let mut seen = vec![false; usize::try_from(top).unwrap_or(0) + 1];
        for (_, n) in &moves {
            let slot = usize::try_from(*n).ok().and_then(|n| seen.get_mut(n));
            match slot {
                Some(taken) if !*taken && *n < 256 => *taken = true,
                _ => {
                    return Err(invalid(format!(
                        "descriptor number {n} is named twice or too high"
                    )));
                }
            }
        }
        if seen.iter().any(|s| !s) {
            return Err(invalid("the descriptor numbers have a gap"));
        }
        let scratch = std::cell::UnsafeCell::new(vec![-1; moves.len()]);
        Ok(FdPlan {
            moves,
            report: report.as_raw_fd(),
            first_free: top + 1,
            scratch,
        })
    }

    /// In the child: first everything out of the way, then everything into place, then the rest closed. Returns the
    /// report pipe's new number, the one right above the wanted ones (close-on-exec).
    pub(crate) fn apply(&self) -> Sys<RawFd> {
        let above = self.first_free + 1;
        // SAFETY: runs in the forked child only, which has one thread and its own copy of the vector.
        let scratch = unsafe { &mut *self.scratch.get() };
        for (slot, (from, _)) in scratch.iter_mut().zip(&self.moves) {
            *slot = dup_above(*from, above)?;
        }
        let report = dup_above(self.report, above)?;
        for (from, (_, to)) in scratch.iter().zip(&self.moves) {
            dup_to(*from, *to, 0)?;
        }
        dup_to(report, self.first_free, libc::O_CLOEXEC)?;
        close_from(above)?;
        Ok(self.first_free)
    }
}

/// A copy of a descriptor with a number of at least `least`, close-on-exec.
pub(crate) fn dup_above(fd: RawFd, least: RawFd) -> Sys<RawFd> {
    // SAFETY: makes a new descriptor; touches no memory.
    let n = cvt(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, least) }.into())?;
    Ok(RawFd::try_from(n).unwrap_or(-1))
}

/// dup3; never used on equal numbers.
pub(crate) fn dup_to(from: RawFd, to: RawFd, flags: i32) -> Sys<()> {
    // SAFETY: only called in a forked child, whose parent's owner of `to` does not run here.
    cvt(unsafe { libc::dup3(from, to, flags) }.into()).map(drop)
}

/// Writes all of a short message.
pub(crate) fn write_all(fd: RawFd, bytes: &[u8]) -> Sys<()> {
    // SAFETY: the slice is live.
    let n = cvt(unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) } as libc::c_long)?;
    if usize::try_from(n) == Ok(bytes.len()) {
        Ok(())
    } else {
        Err(Errno::IO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_survives_the_pipe() {
        for (n, stage) in Stage::ALL.into_iter().enumerate() {
            assert_eq!(stage as u8 as usize, n + 1);
            assert_eq!(Stage::from_byte(stage as u8), stage);
        }
        let null = dev_null().unwrap();
        assert!(FdPlan::new(&[(null.as_fd(), 4)], null.as_fd(), null.as_fd()).is_err());
    }
}
