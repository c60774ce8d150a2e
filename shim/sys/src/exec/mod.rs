//! Running a process in a container, confined exactly as the container's init is.
//!
//! ```text
//!   caller ──fork──▶ first child ──clone(CLONE_PARENT)──▶ second child ──execve──▶ the program, child of the caller
//!                    cgroup, namespaces, ids, caps;        session, terminal, filter
//!                    never visible to the container
//! ```
//! Refuses to know how the container was made: what to confine by comes with the plan.

mod caps;
mod child;
mod confine;
mod plan;
mod prepared;

pub(crate) use caps::CapSets;
pub use confine::{Confinement, own_capabilities};
pub use plan::{Capabilities, ConsoleSize, ExecError, ExecPlan, Process, Rlimit, Spawned, User};
pub use prepared::{apparmor_enabled, selinux_enabled};

use crate::fork::{self, Failure, FdPlan, Stage};
use prepared::Prepared;
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

/// How long a process may take to get as far as its exec.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Runs a process in the container of `plan.init_pid`: in all its namespaces and its cgroup, with the ids, groups,
/// capabilities, limits, no_new_privs, security label and seccomp filter of the plan, and no descriptor but its stdio.
///
/// Returns when its exec has happened. It is our child (never init's), so that init leaves no zombie behind, and the
/// caller reaps it. For single-threaded callers. Pipes among the stdio are given to the process's user, so that it can
/// open them again as `/dev/stdout`.
///
/// # Errors
/// [`ExecError`]; nothing of the process is left then, nor a zombie, except after [`ExecError::Timeout`]: then it has
/// been sent SIGKILL and the caller's reaping of any child finds it once the kernel lets go of it.
pub fn spawn(plan: &ExecPlan<'_>) -> Result<Spawned, ExecError> {
    let io = |act: &str| {
        let act = act.to_string();
        move |e: io::Error| ExecError::Io { act, source: e }
    };
    let prepared = Prepared::new(plan)?;
    let join = match plan.cgroup.map(crate::cgroup::Cgroup::join).transpose() {
        Ok(join) => join,
        Err(e) => {
            return Err(ExecError::Io {
                act: "open the container's cgroup".into(),
                source: io::Error::other(e),
            });
        }
    };
    give_pipes_away(plan, prepared.uid);
    let null = fork::dev_null().map_err(io("open /dev/null"))?;
    let (report, theirs) = fork::report_socket().map_err(io("make a socket"))?;
    let fds = fd_plan(plan, null.as_fd(), theirs.as_fd()).map_err(io("arrange descriptors"))?;
    // SAFETY: the child's code makes async-signal-safe calls only, on what is prepared.
    let first = unsafe {
        fork::fork_in(join.as_ref(), theirs.as_raw_fd(), || {
            child::first(&prepared, &fds, theirs.as_raw_fd())
        })
    };
    let first = first.map_err(io("fork"))?;
    drop(theirs);
    match fork::listen(report.as_fd(), &first, PATIENCE).into_child() {
        Ok(Some((child, pty_master))) => Ok(Spawned {
            pid: child.pid,
            pidfd: child.pidfd,
            pty_master,
        }),
        // Killed on the way, by the container's end or by its cgroup's.
        Ok(None) => Err(ExecError::Gone),
        Err(Some(failure)) => Err(explain(plan, failure)),
        Err(None) => Err(ExecError::Timeout {
            program: prepared::program_of(plan),
        }),
    }
}

fn explain(plan: &ExecPlan<'_>, failure: Failure) -> ExecError {
    let program = prepared::program_of(plan);
    let source = io::Error::from(failure.errno);
    match (failure.stage, failure.errno) {
        (Stage::Exec, errno) => execution_error(program, errno),
        (Stage::CwdOutside, _) => ExecError::CwdOutside {
            cwd: plan.process.cwd.clone(),
        },
        (Stage::Namespaces, Errno::SRCH) | (Stage::Fork, Errno::NOMEM) => ExecError::Gone,
        (Stage::Cwd, _) => ExecError::Io {
            act: format!("enter the working directory {}", plan.process.cwd),
            source,
        },
        (Stage::Rlimits, _) => {
            let kind = plan
                .process
                .rlimits
                .get(usize::from(failure.nth))
                .map(|l| l.kind.as_str());
            ExecError::Io {
                act: format!("set the resource limit {}", kind.unwrap_or_default()),
                source,
            }
        }
        (stage, _) => ExecError::Io {
            act: stage.to_string(),
            source,
        },
    }
}

/// What a failed execve(2) means to who asked for it.
fn execution_error(program: String, errno: Errno) -> ExecError {
    let source = io::Error::from(errno);
    match errno {
        Errno::NOENT | Errno::NOTDIR => ExecError::NotFound { program },
        Errno::ACCESS | Errno::NOEXEC | Errno::ISDIR | Errno::LOOP | Errno::TXTBSY => {
            ExecError::NotExecutable { program, source }
        }
        _ => ExecError::Io {
            act: format!("execute {program}"),
            source,
        },
    }
}

fn fd_plan(plan: &ExecPlan<'_>, null: BorrowedFd<'_>, report: BorrowedFd<'_>) -> io::Result<FdPlan> {
    let mut wanted = vec![(plan.pidfd, child::PIDFD)];
    for (n, fd) in (0..).zip(plan.stdio) {
        wanted.push((fd.unwrap_or(null), n));
    }
    FdPlan::new(&wanted, null, report)
}

/// A pipe belongs to whoever made it, and opening `/dev/stdout` again needs the right to.
fn give_pipes_away(plan: &ExecPlan<'_>, uid: u32) {
    if plan.process.terminal || plan.stdio.iter().all(Option::is_none) {
        return;
    }
    if let Some(owner) = crate::ns::host_uid(plan.init_pid, uid) {
        plan.stdio.iter().flatten().for_each(|fd| give_pipe(*fd, owner));
    }
}

/// Makes the user (as the host counts) the owner of a pipe; anything else is left alone. For a container's stdio too.
pub fn give_pipe(fd: BorrowedFd<'_>, host_uid: u32) {
    let is_pipe =
        |s: &rustix::fs::Stat| rustix::fs::FileType::from_raw_mode(s.st_mode) == rustix::fs::FileType::Fifo;
    if rustix::fs::fstat(fd).is_ok_and(|s| is_pipe(&s) && s.st_uid != host_uid) {
        let _ = rustix::fs::fchown(fd, Some(rustix::fs::Uid::from_raw(host_uid)), None);
    }
}
