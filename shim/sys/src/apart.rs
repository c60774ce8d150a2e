//! Work that may take the kernel long, done by a copy of this process. Knows nothing of what the work is.

use crate::error::{failed, invalid};
use crate::fork;
use crate::process::Child;
use rustix::io::Errno;
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Work that was begun.
#[derive(Debug)]
pub struct Apart {
    /// Who does it: our child, which dies when we do.
    pub child: Child,
    /// Readable with what it answers, until its end; never waits. Nothing at all: it was killed, or failed beyond words.
    pub answer: OwnedFd,
}

/// Has a forked copy of this process do the work. What it changes in memory is its own; what it does to the machine stays. It
/// has stdin, stdout and stderr and no other descriptor of ours: what we close meanwhile is closed.
///
/// # Errors
/// What the calls say; `InvalidInput` in a process of several threads, whose copy would have only one of them, and whatever
/// locks the others hold.
pub fn apart(work: impl FnOnce() -> Vec<u8>) -> io::Result<Apart> {
    let act = || "do it in a process of its own".to_owned();
    if std::fs::read_dir("/proc/self/task").map_err(failed(act))?.count() != 1 {
        return Err(failed(act)(invalid("this one has several threads")));
    }
    let (answer, theirs) = fork::report_pipe().map_err(failed(act))?;
    crate::fd::set_nonblocking(&answer, true).map_err(failed(act))?;
    let parent = rustix::process::getpid();
    // SAFETY: there is no other thread that could hold a lock, the allocator's included, so that the copy may do whatever
    // this process may; nothing unwinds out of it.
    let child = unsafe { fork::fork(|| copy(parent, theirs.as_raw_fd(), work)) };
    Ok(Apart {
        child: child.map_err(failed(act))?,
        answer,
    })
}

/// The number of the copy's end of the pipe.
const ANSWER: RawFd = 3;

fn copy(parent: rustix::process::Pid, answer: RawFd, work: impl FnOnce() -> Vec<u8>) -> Infallible {
    if fork::die_with(parent).is_ok() && keep(answer).is_ok() {
        let said = catch_unwind(AssertUnwindSafe(work)).unwrap_or_default();
        let mut rest = said.as_slice();
        // SAFETY: `keep` has put it there, and nobody closes it.
        let answer = unsafe { BorrowedFd::borrow_raw(ANSWER) };
        while !rest.is_empty() {
            match rustix::io::write(answer, rest) {
                Ok(n) => rest = &rest[n..],
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
    }
    fork::exit(0)
}

/// Leaves the copy the standard descriptors and its end of the pipe.
fn keep(answer: RawFd) -> fork::Sys<()> {
    if answer != ANSWER {
        fork::dup_to(answer, ANSWER, libc::O_CLOEXEC)?;
    }
    fork::close_from(ANSWER + 1)
}
