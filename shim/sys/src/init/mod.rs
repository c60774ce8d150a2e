//! The built-in pid 1 of a shared PID namespace: nothing in it is worth looking at for who can look at it.
//!
//! Containers that share the namespace can, as root with CAP_SYS_PTRACE, look at `/proc/1/{root,exe,fd,environ}` and even
//! write its memory. So it has an empty, read-only root in a mount namespace of its own, no descriptors, no environment,
//! no capabilities, a user that is not root, no_new_privs, a filter of six system calls, a cgroup of its own; it is in the
//! pod's other namespaces; and it is executed from a sealed, unreadable file in memory. All of that holds before it
//! becomes visible: as in [`crate::exec`] it is the clone of a process that stays outside.
//!
//! The program is 330 bytes of hand-written code (`program`): 8 KiB a pod, where a copy of the shim would be 35.

mod program;

use crate::cgroup::Cgroup;
use crate::exec::{CapSets, usual_descriptors};
use crate::fork::{self, FdPlan, Report, Stage, Sys};
use crate::ns::{self, Kind};
use crate::process::Child;
use crate::seccomp::Filter;
use rustix::fs::{MemfdFlags, Mode, SealFlags};
use rustix::io::Errno;
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

/// How the built-in init is to be started.
#[derive(Debug)]
pub struct InitPlan<'a> {
    /// The pod's pinned namespaces, which it enters: user, net, ipc, uts (those there are).
    pub join: &'a [(Kind, &'a Path)],
    /// A leaf cgroup of its own; `None`: stay in the caller's (only for tests).
    pub cgroup: Option<&'a Cgroup>,
    /// Its `oom_score_adj`, or as near to it as may be.
    pub oom_score_adj: i32,
}

/// Why it could not be started. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
#[error("start the built-in init: {act}")]
pub struct InitError {
    /// What was attempted.
    pub act: String,
    /// Why not.
    #[source]
    pub source: io::Error,
}

fn step<E: Into<io::Error>>(act: &str) -> impl FnOnce(E) -> InitError {
    move |e| InitError {
        act: act.to_string(),
        source: e.into(),
    }
}

/// Starts it as pid 1 of a new PID namespace and as our child. It reaps what is orphaned in the namespace and ends on
/// SIGTERM from outside, or SIGKILL. Pin the namespace with `ns::pin_of(child.pid, Kind::Pid, path)`.
///
/// # Errors
/// [`InitError`]; nothing is left of it then.
pub fn spawn(plan: &InitPlan<'_>) -> Result<Child, InitError> {
    let program = sealed_program().map_err(step("make its program"))?;
    let mut join: Vec<(Kind, OwnedFd)> = Vec::new();
    for (kind, path) in plan.join {
        join.push((*kind, ns::open(path).map_err(step("open the pod's namespaces"))?));
    }
    // The user namespace comes first: only its root may enter the others, which it owns.
    join.sort_by_key(|(kind, _)| *kind != Kind::User);
    let cgroup = plan.cgroup.map(Cgroup::join).transpose();
    let cgroup = cgroup.map_err(|e| step("open its cgroup")(io::Error::other(e)))?;
    let prepared = Prepared {
        kinds: join.iter().map(|(kind, _)| *kind).collect(),
        oom_score_adj: plan.oom_score_adj.to_string().into_bytes(),
        filter: filter(),
        args: fork::CArray::new(["slipway-init".as_ref()].into_iter()).map_err(step("name it"))?,
        env: fork::CArray::new(std::iter::empty()).map_err(step("name it"))?,
    };
    let (report, theirs) = fork::report_socket().map_err(step("make a socket"))?;
    let fds = fd_plan(program.as_fd(), &join, theirs.as_fd()).map_err(step("arrange descriptors"))?;
    // SAFETY: the child's code makes async-signal-safe calls only, on what is prepared.
    let first = unsafe {
        fork::fork_in(cgroup.as_ref(), theirs.as_raw_fd(), || {
            first_child(&prepared, &fds, theirs.as_raw_fd())
        })
    };
    let first = first.map_err(step("fork"))?;
    drop(theirs);
    let heard = fork::listen(report.as_fd(), &first, crate::exec::PATIENCE);
    match heard.into_child() {
        Ok(Some((child, _))) => Ok(child),
        Ok(None) => Err(step("hear from it")(Errno::PIPE)),
        Err(Some(failure)) => Err(InitError {
            act: failure.stage.to_string(),
            source: failure.errno.into(),
        }),
        Err(None) => Err(step("hear from it")(Errno::TIMEDOUT)),
    }
}

/// Readable by nobody, so that a process that may not trace it cannot have a copy either.
fn sealed_program() -> io::Result<OwnedFd> {
    const MFD_EXEC: MemfdFlags = MemfdFlags::from_bits_retain(0x10);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 do not know the flag; later ones may want it said.
    let fd = match rustix::fs::memfd_create(c"slipway-init", flags | MFD_EXEC) {
        Err(Errno::INVAL) => rustix::fs::memfd_create(c"slipway-init", flags)?,
        other => other?,
    };
    let elf = program::elf();
    let mut rest = elf.as_slice();
    while !rest.is_empty() {
        let n = rustix::io::write(&fd, rest)?;
        rest = &rest[n..];
    }
    rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o111))?;
    rustix::fs::fcntl_add_seals(
        &fd,
        SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL,
    )?;
    Ok(fd)
}

/// In the child: 0 is the program, then the namespaces, then the report.
fn fd_plan(program: BorrowedFd<'_>, join: &[(Kind, OwnedFd)], report: BorrowedFd<'_>) -> io::Result<FdPlan> {
    let mut wanted = vec![(program, 0)];
    wanted.extend((1..).zip(join).map(|(n, (_, fd))| (fd.as_fd(), n)));
    // What is not named among the first three is a second copy of the program: close-on-exec like the first.
    FdPlan::new(&wanted, program, report)
}

struct Prepared {
    kinds: Vec<Kind>,
    oom_score_adj: Vec<u8>,
    filter: Filter,
    args: fork::CArray,
    env: fork::CArray,
}

fn first_child(p: &Prepared, fds: &FdPlan, report: RawFd) -> Infallible {
    let report = Report::of(report);
    report.check(Stage::Signals, fork::reset_signals());
    report.check(Stage::Signals, fork::set_undumpable());
    // Lowering it may be forbidden; then what we have stays.
    let _ = fork::write_file(c"/proc/self/oom_score_adj", &p.oom_score_adj);
    let report = Report::of(report.check(Stage::Descriptors, fds.apply()));
    report.check(Stage::Rlimits, usual_descriptors());
    for (n, kind) in (1..).zip(&p.kinds) {
        report.check(Stage::Namespaces, fork::setns(n, kind.flag()));
    }
    if p.kinds.contains(&Kind::User) {
        // Its root owns what is made now; where 0 is not mapped, having all capabilities must do.
        let _ = fork::set_gid(0);
        let _ = fork::set_uid(0);
    }
    let new = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWCGROUP;
    report.check(Stage::Namespaces, fork::unshare(new));
    report.check(Stage::Mounts, empty_root());
    report.check(Stage::Groups, fork::set_groups(&[]));
    let nothing = CapSets::default();
    report.check(Stage::Capabilities, nothing.drop_bounding());
    report.check(Stage::Uid, become_nobody());
    report.check(Stage::Capabilities, nothing.set());
    report.check(Stage::NoNewPrivileges, fork::no_new_privs());
    match report.check(Stage::Fork, fork::clone_as_sibling()) {
        0 => {
            report.check(Stage::Session, fork::setsid());
            for n in 0..3 {
                report.check(Stage::Descriptors, fork::cloexec(n));
            }
            report.check(Stage::Descriptors, close_namespaces(p.kinds.len()));
            report.check(Stage::Seccomp, p.filter.install());
            report.fail(Stage::Exec, fork::execve_file(0, &p.args, &p.env))
        }
        pid => {
            report.started(pid);
            fork::exit(0)
        }
    }
}

/// An empty, read-only file system becomes the root, and everything else leaves this mount namespace.
fn empty_root() -> Sys<()> {
    use rustix::mount::{
        MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_move, unmount,
    };
    mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // A directory that is always there; what is mounted on it is of no more use to us.
    mount(
        c"none",
        c"/proc",
        c"tmpfs",
        flags,
        c"size=4k,nr_inodes=2,mode=555",
    )?;
    fork::chdir(c"/proc")?;
    match rustix::process::pivot_root(c".", c".") {
        Ok(()) => unmount(c".", UnmountFlags::DETACH)?,
        // Our root is an initramfs, which cannot be exchanged, only covered.
        Err(Errno::INVAL) => {
            mount_move(c".", c"/")?;
            rustix::process::chroot(c".")?;
        }
        Err(e) => return Err(e),
    }
    fork::chdir(c"/")
}

/// Whoever a user namespace maps that is not root.
fn become_nobody() -> Sys<()> {
    for id in [65534, 1000, 1] {
        if fork::set_gid(id).is_ok() && fork::set_uid(id).is_ok() {
            return Ok(());
        }
    }
    Err(Errno::INVAL)
}

/// The namespaces' descriptors, as far as they are not the first three, which are closed at exec.
fn close_namespaces(count: usize) -> Sys<()> {
    (3..=count as RawFd).try_for_each(fork::close)
}

/// What the program calls, and what brings it there (`execveat`, and `write` and `exit_group` to say why not).
fn filter() -> Filter {
    #[cfg(target_arch = "x86_64")]
    const ARCH: u32 = 0xc000_003e;
    #[cfg(target_arch = "aarch64")]
    const ARCH: u32 = 0xc000_00b7;
    const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06;
    const ALLOW: u32 = 0x7fff_0000;
    const KILL_PROCESS: u32 = 0x8000_0000;
    let calls = [
        libc::SYS_rt_sigtimedwait,
        libc::SYS_wait4,
        libc::SYS_rt_sigprocmask,
        libc::SYS_exit_group,
        libc::SYS_execveat,
        libc::SYS_write,
    ];
    let mut program = vec![
        (LOAD, 0, 0, 4),
        (JUMP_EQUAL, 1, 0, ARCH),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, 0),
    ];
    for call in calls {
        program.push((JUMP_EQUAL, 0, 1, call as u32));
        program.push((RETURN, 0, 0, ALLOW));
    }
    program.push((RETURN, 0, 0, KILL_PROCESS));
    Filter::of(&program)
}
