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
mod starting;

pub(crate) use caps::{CapSets, usual_descriptors};
pub use caps::{give_usual_descriptors, raise_descriptors};
pub use confine::Confinement;
pub use plan::{Capabilities, ConsoleSize, ExecError, ExecPlan, Process, Rlimit, User};
pub use prepared::{apparmor_enabled, selinux_enabled};
pub use starting::{Begun, Starting, begin};

use rustix::io::Errno;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// How long a process may take to get as far as its exec.
pub const PATIENCE: Duration = Duration::from_secs(10);

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
