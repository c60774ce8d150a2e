//! The two children of exec.
//!
//! The first stays in our PID namespace, where the container cannot see it, and does all that needs privileges: cgroup,
//! namespaces, ids, capabilities. The second is its clone inside the container's PID namespace, born as our child
//! (CLONE_PARENT) and with nothing left to lose: whoever traces it gains only what the container has anyway. It starts a
//! session, loads the filter and becomes the program.
//!
//! A filter without no_new_privs needs CAP_SYS_ADMIN to be loaded, so then the first child loads it, as its last act
//! before it gives up its capabilities; the filter then has to allow clone(2), as it had to for init.
//! The second goes on only when the first has said who it is: one whose first was killed before that is nobody's, and
//! ends.
//! Only async-signal-safe calls in here.

use super::caps;
use super::prepared::Prepared;
use crate::fork::{self, FdPlan, Report, Stage, Sys, cvt};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use std::convert::Infallible;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// The pidfd's number in the child; the report socket is the one above.
pub(super) const PIDFD: RawFd = 3;

/// The first child.
pub(super) fn first(p: &Prepared, fds: &FdPlan, report: RawFd) -> Infallible {
    let report = Report::of(report);
    report.check(Stage::Signals, fork::reset_signals());
    report.check(Stage::Signals, fork::set_undumpable());
    // Lowering it may be forbidden; then what we have stays.
    let _ = fork::write_file(c"/proc/self/oom_score_adj", &p.oom_score_adj);
    if let Some((file, label)) = &p.label {
        report.check(Stage::Label, fork::write_file(file, label));
    }
    let report = Report::of(report.check(Stage::Descriptors, fds.apply()));
    // Behind the descriptors, which are many and have high numbers until here: a lower limit would be in their way.
    report.check(Stage::Rlimits, caps::usual_descriptors());
    for (nth, limit) in p.limits.iter().enumerate() {
        report.check_nth(Stage::Rlimits, u8::try_from(nth).unwrap_or(u8::MAX), limit.set());
    }
    report.check(Stage::Keyring, fork::own_keyring());
    let (go, told) = report.check(Stage::Fork, rustix::pipe::pipe_with(PipeFlags::CLOEXEC));
    report.check(Stage::Namespaces, enter_namespaces(p.namespaces));
    if let Some(size) = &p.terminal {
        report.check(Stage::Terminal, terminal(report, size, p.uid));
    }
    report.check(Stage::Descriptors, own_null(p.nulls));
    become_user(p, report);
    match report.check(Stage::Fork, fork::clone_as_sibling()) {
        0 => {
            drop(told);
            second(p, report, go)
        }
        pid => {
            report.started(pid);
            let _ = rustix::io::write(&told, &[1]);
            fork::exit(0)
        }
    }
}

/// The second child: inside the container.
fn second(p: &Prepared, report: Report, go: OwnedFd) -> ! {
    if !matches!(
        rustix::io::retry_on_intr(|| rustix::io::read(&go, &mut [0u8])),
        Ok(1)
    ) {
        // Said, or it would pass for a command that ran.
        report.fail(Stage::Namespaces, Errno::SRCH)
    }
    report.check(Stage::Session, fork::setsid());
    if p.terminal.is_some() {
        report.check(Stage::Terminal, control_terminal());
    }
    if p.no_new_privs
        && let Some(filter) = &p.seccomp
    {
        report.check(Stage::Seccomp, filter.install());
    }
    report.fail(Stage::Exec, fork::execve_first(&p.candidates, &p.args, &p.env))
}

/// Ids, groups, capabilities, working directory, no_new_privs: what init got, in an order in which each step may still
/// be done.
fn become_user(p: &Prepared, report: Report) {
    fork::umask(p.umask);
    report.check(Stage::Groups, fork::set_groups(&p.groups));
    report.check(Stage::Gid, fork::set_gid(p.gid));
    report.check(Stage::Capabilities, p.caps.drop_bounding());
    // As root first: a directory only root may enter is allowed as working directory. Where root may not (NFS), the
    // user may.
    let early = fork::chdir(&p.cwd);
    let all = report.check(Stage::Capabilities, caps::permitted());
    report.check(Stage::Uid, keep_capabilities());
    report.check(Stage::Uid, fork::set_uid(p.uid));
    if early.is_err() {
        report.check(Stage::Cwd, fork::chdir(&p.cwd));
    }
    report.check(Stage::CwdOutside, cwd_is_inside());
    if p.no_new_privs {
        report.check(Stage::NoNewPrivileges, fork::no_new_privs());
    } else if let Some(filter) = &p.seccomp {
        // The change of user switched them off; they are still permitted.
        report.check(Stage::Capabilities, caps::capset(all, all, 0));
        report.check(Stage::Seccomp, filter.install());
    }
    report.check(Stage::Capabilities, p.caps.set());
}

fn enter_namespaces(flags: i32) -> Sys<()> {
    fork::setns(PIDFD, flags)?;
    fork::close(PIDFD)
}

/// CVE-2024-21626: a working directory that a leaked descriptor leads to is outside of our root, which the kernel says
/// by "(unreachable)" in front of the path.
pub(super) fn cwd_is_inside() -> Sys<()> {
    let mut path = [0u8; 4097];
    // SAFETY: writes into a live array of the length given.
    cvt(unsafe { libc::syscall(libc::SYS_getcwd, path.as_mut_ptr(), path.len()) })?;
    if path[0] == b'/' { Ok(()) } else { Err(Errno::XDEV) }
}

fn keep_capabilities() -> Sys<()> {
    // SAFETY: prctl with numbers touches no memory.
    cvt(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) }.into()).map(drop)
}

/// A new terminal of the container's own devpts; its other side goes to our parent. The path may be anything a hostile
/// container put there, so what was opened is asked what it is, and the terminal is taken from it without a path.
fn terminal(report: Report, size: &libc::winsize, uid: u32) -> Sys<()> {
    const DEVPTS: u64 = 0x1cd1;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let master = rustix::fs::openat(CWD, c"/dev/pts/ptmx", flags, Mode::empty())?;
    #[allow(clippy::unnecessary_cast, clippy::cast_sign_loss)] // the type differs between libcs
    if rustix::fs::fstatfs(&master)?.f_type as u64 != DEVPTS {
        return Err(Errno::NOTTY);
    }
    let unlocked: libc::c_int = 0;
    // SAFETY: the ioctls read live values and return a new descriptor, which nobody else owns.
    let slave = unsafe {
        cvt(libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK as _, &unlocked).into())?;
        let fd = cvt(libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCGPTPEER as _,
            libc::O_RDWR | libc::O_NOCTTY,
        )
        .into())?;
        if size.ws_row != 0 || size.ws_col != 0 {
            cvt(libc::ioctl(
                master.as_raw_fd(),
                libc::TIOCSWINSZ as _,
                std::ptr::from_ref(size),
            )
            .into())?;
        }
        OwnedFd::from_raw_fd(fd as i32)
    };
    // The group is what devpts was mounted with.
    // SAFETY: touches no memory.
    cvt(unsafe { libc::fchown(slave.as_raw_fd(), uid, u32::MAX) }.into())?;
    for n in 0..3 {
        fork::dup_to(slave.as_raw_fd(), n, 0)?;
    }
    report.send_fd(master.as_raw_fd())
}

/// The container's own `/dev/null` in the place of the one we brought, which is the host's; that one stays, read-only, where
/// the container has none, or something else under that name.
fn own_null(nulls: [bool; 3]) -> Sys<()> {
    if nulls == [false; 3] {
        return Ok(());
    }
    let Some(own) = open_null() else { return Ok(()) };
    for (n, _) in (0..).zip(nulls).filter(|(_, null)| *null) {
        fork::dup_to(own.as_raw_fd(), n, 0)?;
    }
    Ok(())
}

/// The path may be anything a hostile container put there: it is opened without waiting, and asked what it is.
fn open_null() -> Option<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let own = rustix::fs::openat(CWD, c"/dev/null", flags, Mode::empty()).ok()?;
    let stat = rustix::fs::fstat(&own).ok()?;
    let is_null = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && stat.st_rdev == rustix::fs::makedev(1, 3);
    rustix::fs::fcntl_setfl(&own, OFlags::RDWR).ok()?;
    is_null.then_some(own)
}

fn control_terminal() -> Sys<()> {
    // SAFETY: an ioctl with a number.
    cvt(unsafe { libc::ioctl(0, libc::TIOCSCTTY as _, 0) }.into()).map(drop)
}
