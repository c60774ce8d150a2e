//! Processes: who they are for sure (pidfd, start time), how they end, starting a program with exactly the descriptors
//! named. Knows nothing of containers.

use crate::error::{failed, invalid};
use crate::fork::{self, Report};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};
use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It called `exit` with this code.
    Code(u8),
    /// A signal ended it.
    Signal(i32),
}

impl Status {
    /// The code as containers report it: 128 + signal when killed by one.
    pub fn exit_code(self) -> u32 {
        match self {
            Status::Code(code) => u32::from(code),
            Status::Signal(signal) => 128 + u32::try_from(signal).unwrap_or(0),
        }
    }

    fn from_raw(status: i32) -> Status {
        if libc::WIFSIGNALED(status) {
            Status::Signal(libc::WTERMSIG(status))
        } else {
            Status::Code(u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(u8::MAX))
        }
    }
}

/// A child that was reaped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exited {
    /// Its pid, free again.
    pub pid: u32,
    /// How it ended.
    pub status: Status,
}

/// A started process: its pid and a descriptor that cannot mean another one.
#[derive(Debug)]
pub struct Child {
    /// The pid in our PID namespace.
    pub pid: u32,
    /// Readable (epoll) once the process has ended.
    pub pidfd: OwnedFd,
}

/// When a process started, in clock ticks since boot; with the pid it names a process for good within one boot.
///
/// # Errors
/// `NotFound` when there is no such process.
pub fn start_time(pid: u32) -> io::Result<u64> {
    let act = || format!("read the start time of process {pid}");
    let stat = std::fs::read(format!("/proc/{pid}/stat")).map_err(failed(act))?;
    parse_start_time(&stat).ok_or_else(|| failed(act)(invalid("/proc/<pid>/stat has another shape")))
}

/// Field 22; the second field is the command in parentheses, which may itself hold anything.
fn parse_start_time(stat: &[u8]) -> Option<u64> {
    let end = stat.iter().rposition(|b| *b == b')')?;
    let rest = std::str::from_utf8(&stat[end + 1..]).ok()?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The id of this boot of the machine.
///
/// # Errors
/// When `/proc` is not there.
pub fn boot_id() -> io::Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let id = std::fs::read_to_string(path).map_err(failed(|| format!("read {path}")))?;
    Ok(id.trim_end().to_string())
}

fn to_pid(pid: u32) -> io::Result<Pid> {
    i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| invalid(format!("{pid} is no pid")))
}

/// A descriptor of a process (close-on-exec).
///
/// # Errors
/// `ESRCH` when there is no such process.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    rustix::process::pidfd_open(to_pid(pid)?, PidfdFlags::empty())
        .map_err(failed(|| format!("open process {pid}")))
}

/// Signals a process by descriptor; false when it has already ended. `signal` 0 only asks.
///
/// # Errors
/// What `pidfd_send_signal(2)` says (`EINVAL`: no such signal).
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<bool> {
    // SAFETY: a null siginfo is allowed; no memory is touched.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if rc == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        e => Err(failed(|| format!("send signal {signal}"))(e)),
    }
}

/// Whether the process a descriptor names has ended (also when it is still a zombie).
///
/// # Errors
/// What `poll(2)` says.
pub fn has_ended(pidfd: BorrowedFd<'_>) -> io::Result<bool> {
    poll_readable(pidfd, Some(Duration::ZERO))
}

/// Waits until the process has ended, without reaping it; false when the time passed first.
///
/// # Errors
/// What `poll(2)` says.
pub fn wait_ended(pidfd: BorrowedFd<'_>, at_most: Duration) -> io::Result<bool> {
    poll_readable(pidfd, Some(at_most))
}

/// Polls one descriptor for reading (or hang-up) until the time has passed; `None` waits forever.
pub(crate) fn poll_readable(fd: BorrowedFd<'_>, at_most: Option<Duration>) -> io::Result<bool> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let until = at_most.map(|d| Instant::now() + d);
    loop {
        let left = until.map(|u| u.saturating_duration_since(Instant::now()));
        let spec = left.map(|d| Timespec {
            tv_sec: d.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: d.subsec_nanos().into(),
        });
        match poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], spec.as_ref()) {
            Ok(n) => return Ok(n > 0),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Reaps one ended child of any kind, without waiting; `None` when none has ended (or there are no children).
///
/// # Errors
/// What `wait4(2)` says.
pub fn reap_any() -> io::Result<Option<Exited>> {
    reap(-1, libc::WNOHANG)
}

/// Reaps this child if it has ended, without waiting.
///
/// # Errors
/// What `wait4(2)` says (`ECHILD`: not ours).
pub fn try_reap(pid: u32) -> io::Result<Option<Exited>> {
    reap(i32::try_from(pid).map_err(|_| invalid("no pid"))?, libc::WNOHANG)
}

/// Whether this is a child of ours that was not reaped yet, ended or not.
pub fn is_child(pid: u32) -> bool {
    // SAFETY: all-zero is a valid siginfo_t, and it outlives the call.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
        libc::waitid(libc::P_PID, pid, &mut info, flags) == 0
    }
}

/// Waits for this child, however long it takes, and reaps it.
///
/// # Errors
/// What `wait4(2)` says (`ECHILD`: not ours).
pub fn wait(pid: u32) -> io::Result<Exited> {
    reap(i32::try_from(pid).map_err(|_| invalid("no pid"))?, 0)?
        .ok_or_else(|| failed(|| format!("wait for process {pid}"))(Errno::CHILD))
}

fn reap(pid: i32, flags: i32) -> io::Result<Option<Exited>> {
    let mut status = 0;
    loop {
        // __WALL: children whose exit signal is not SIGCHLD count as well.
        // SAFETY: status outlives the call; a null rusage is allowed.
        let rc = unsafe { libc::wait4(pid, &mut status, flags | libc::__WALL, std::ptr::null_mut()) };
        if rc > 0 {
            let pid = u32::try_from(rc).unwrap_or(0);
            return Ok(Some(Exited {
                pid,
                status: Status::from_raw(status),
            }));
        }
        if rc == 0 {
            return Ok(None);
        }
        match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::EINTR) => {}
            e if e.raw_os_error() == Some(libc::ECHILD) && pid == -1 => return Ok(None),
            e => return Err(failed(|| format!("reap process {pid}"))(e)),
        }
    }
}

/// Makes orphans below us our children instead of init's.
///
/// # Errors
/// What `prctl(2)` says.
pub fn become_subreaper() -> io::Result<()> {
    // rustix takes a pid, of which the kernel sees only whether it is non-zero.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(failed(|| "become a subreaper".to_string()))
}

/// Sets our own `oom_score_adj`, or as near to it as we may go; returns what holds now.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn set_oom_score_adj(value: i32) -> io::Result<i32> {
    let path = "/proc/self/oom_score_adj";
    match std::fs::write(path, value.to_string()) {
        Err(e) if e.kind() != io::ErrorKind::PermissionDenied => {
            return Err(failed(|| format!("write {path}"))(e));
        }
        Ok(()) | Err(_) => {} // lowering needs CAP_SYS_RESOURCE: then what we have stays
    }
    oom_score_adj(None)
}

/// A process's `oom_score_adj`; `None`: our own.
///
/// # Errors
/// `NotFound` when there is no such process.
pub fn oom_score_adj(pid: Option<u32>) -> io::Result<i32> {
    let path = pid.map_or("/proc/self/oom_score_adj".to_string(), |p| {
        format!("/proc/{p}/oom_score_adj")
    });
    let text = std::fs::read_to_string(&path).map_err(failed(|| format!("read {path}")))?;
    text.trim()
        .parse()
        .map_err(|_| failed(|| format!("read {path}"))(invalid("no number")))
}

/// Gives up all supplementary groups.
///
/// # Errors
/// What `setgroups(2)` says.
pub fn clear_groups() -> io::Result<()> {
    fork::set_groups(&[]).map_err(failed(|| "give up supplementary groups".to_string()))
}

/// Signals as data: blocked for this process, read from a descriptor.
#[derive(Debug)]
pub struct SignalFd {
    fd: OwnedFd,
}

impl SignalFd {
    /// Blocks these signals and opens a non-blocking, close-on-exec descriptor that yields them.
    ///
    /// # Errors
    /// What `sigprocmask(2)` and `signalfd(2)` say.
    pub fn new(signals: &[i32]) -> io::Result<SignalFd> {
        // SAFETY: an all-zero sigset_t is valid storage for sigemptyset; the set outlives the calls.
        let fd = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            for signal in signals {
                libc::sigaddset(&mut set, *signal);
            }
            if libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
                return Err(failed(|| "block signals".to_string())(io::Error::last_os_error()));
            }
            libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(failed(|| "open a signal descriptor".to_string())(
                io::Error::last_os_error(),
            ));
        }
        // SAFETY: just opened, owned by nobody else.
        Ok(SignalFd {
            fd: unsafe { OwnedFd::from_raw_fd(fd) },
        })
    }

    /// The next pending signal's number; `None` when there is none.
    ///
    /// # Errors
    /// What `read(2)` says.
    pub fn next(&self) -> io::Result<Option<i32>> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&self.fd, &mut info) {
            Ok(n) if n == info.len() => {
                let signo = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
                Ok(i32::try_from(signo).ok())
            }
            Ok(_) => Ok(None),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(e) => Err(failed(|| "read signals".to_string())(e)),
        }
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Ignores a signal for this process (SIGPIPE, SIGHUP, SIGINT). Started programs get the default again.
///
/// # Errors
/// What `sigaction(2)` says.
pub fn ignore_signal(signal: i32) -> io::Result<()> {
    // SAFETY: SIG_IGN runs no code of ours.
    if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
        return Err(failed(|| format!("ignore signal {signal}"))(
            io::Error::last_os_error(),
        ));
    }
    Ok(())
}

/// A program to start with exactly what is named here.
#[derive(Debug)]
pub struct Program<'a> {
    /// The executable; no PATH is searched.
    pub path: &'a Path,
    /// The executable once more, opened ([`crate::mount::program`]): then this is what is executed, and the process's
    /// `/proc/<pid>/exe`. Only a script, whose interpreter has to find it by a path, is still executed by its path.
    pub file: Option<BorrowedFd<'a>>,
    /// The arguments, the program's own name first.
    pub args: &'a [&'a OsStr],
    /// The whole environment, "NAME=value".
    pub env: &'a [&'a OsStr],
    /// Descriptors of ours and the numbers they shall have; 0, 1 and 2 are `/dev/null` unless named. No other
    /// descriptor is inherited.
    pub fds: &'a [(BorrowedFd<'a>, RawFd)],
    /// Becomes the leader of a session of its own.
    pub new_session: bool,
    /// Dies (SIGKILL) when the thread that started it does.
    pub die_with_parent: bool,
    /// Joins these cgroups before it runs.
    pub cgroup: Option<&'a crate::cgroup::Join>,
}

/// Starts a program by fork and exec, and answers when the exec has happened. Signal mask and dispositions are the
/// defaults, the umask 022. Only for callers without other threads that hold locks: between fork and exec nothing but
/// async-signal-safe calls are made, so threads do no harm, but descriptors opened by them without close-on-exec are
/// closed in the child, not in ours.
///
/// # Errors
/// What the calls say, naming the program and the stage that failed. The failed child is reaped.
pub fn spawn(program: &Program<'_>) -> io::Result<Child> {
    let (child, launch) = launch(program)?;
    match launch.failure(None) {
        None => Ok(child),
        Some(failure) => {
            let _ = wait(child.pid);
            Err(failure)
        }
    }
}

/// A program that was started, and may not have been executed yet.
#[derive(Debug)]
pub struct Launch {
    report: OwnedFd,
    path: PathBuf,
}

impl Launch {
    /// Why it was not executed; nothing when it was, or nobody knows within that time (`None`: however long it takes).
    pub fn failure(&self, at_most: Option<Duration>) -> Option<io::Error> {
        let told = match fork::read_report(self.report.as_fd(), at_most) {
            Ok(failure) => failure.map(Into::into),
            Err(e) if e.kind() == io::ErrorKind::TimedOut => None,
            Err(e) => Some(e),
        };
        told.map(failed(|| format!("start {}", self.path.display())))
    }
}

/// As [`spawn`], but answers at once: the exec may wait for the memory or the time that the program's cgroup has not.
///
/// # Errors
/// What the calls say, naming the program; there is no child then.
pub fn launch(program: &Program<'_>) -> io::Result<(Child, Launch)> {
    let act = || format!("start {}", program.path.display());
    let path = c_string(program.path.as_os_str()).map_err(failed(act))?;
    let args = fork::CArray::new(program.args.iter().copied()).map_err(failed(act))?;
    let env = fork::CArray::new(program.env.iter().copied()).map_err(failed(act))?;
    let null = fork::dev_null().map_err(failed(act))?;
    let (report, theirs) = fork::report_pipe().map_err(failed(act))?;
    let mut fds = program.fds.to_vec();
    let number = fds.iter().map(|(_, n)| n + 1).fold(3, RawFd::max);
    fds.extend(program.file.map(|file| (file, number)));
    let plan = fork::FdPlan::new(&fds, null.as_fd(), theirs.as_fd()).map_err(failed(act))?;
    let parent = rustix::process::getpid();
    // SAFETY: the child's closure makes async-signal-safe calls only: it works on what was prepared above.
    let child = unsafe {
        fork::fork_in(program.cgroup, theirs.as_raw_fd(), || {
            let report = Report::of(theirs.as_raw_fd());
            report.check(fork::Stage::Signals, fork::reset_signals());
            if program.new_session {
                report.check(fork::Stage::Session, fork::setsid());
            }
            if program.die_with_parent {
                report.check(fork::Stage::ParentDeath, fork::die_with(parent));
            }
            let report = Report::of(report.check(fork::Stage::Descriptors, plan.apply()));
            report.check(fork::Stage::Rlimits, crate::exec::usual_descriptors());
            fork::umask(0o022);
            if program.file.is_some() {
                report.check(fork::Stage::Descriptors, fork::cloexec(number));
                match fork::execve_file(number, &args, &env) {
                    rustix::io::Errno::NOENT => {}
                    errno => report.fail(fork::Stage::Exec, errno),
                }
            }
            report.fail(fork::Stage::Exec, fork::execve(&path, &args, &env))
        })
    }
    .map_err(failed(act))?;
    drop(theirs);
    let path = program.path.to_owned();
    Ok((child, Launch { report, path }))
}

pub(crate) fn c_string(s: &OsStr) -> io::Result<CString> {
    CString::new(s.as_bytes()).map_err(|_| invalid(format!("{} has a zero byte", s.display())))
}

/// Gives this process a session keyring of its own, which what it executes inherits.
///
/// # Errors
/// What `keyctl(2)` says: `EDQUOT` when this user has too many.
pub fn own_session_keyring() -> io::Result<()> {
    fork::own_keyring().map_err(failed(|| "make a session keyring".to_string()))
}

/// The name `ps` shows for this process (15 bytes).
///
/// # Errors
/// What `prctl(2)` says.
pub fn set_name(name: &CStr) -> io::Result<()> {
    rustix::thread::set_name(name).map_err(failed(|| "name the process".to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_is_found_behind_a_command_with_parentheses_and_spaces() {
        let stat = b"42 (a) b (c) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 777 9 9\n";
        assert_eq!(parse_start_time(stat), Some(777));
        assert!(start_time(std::process::id()).unwrap() > 0);
    }
}
