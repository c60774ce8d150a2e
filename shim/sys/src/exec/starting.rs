//! A process on its way to its program: begun, then heard whenever it has something to say. Nothing in here waits.

use super::child;
use super::plan::{ExecError, ExecPlan};
use super::prepared::{self, Prepared};
use crate::cgroup::{Cgroup, Join};
use crate::fork::{self, Failure, FdPlan, Stage, Word};
use crate::process::Child;
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// A process that was begun ([`begin`]) and has not said yet whether it runs its program.
///
/// It is two children of the caller's for a moment: one that goes ahead and ends, and the process itself. Whoever reaps
/// children finds both.
#[derive(Debug)]
pub struct Starting {
    report: OwnedFd,
    ahead: Child,
    pid: Option<u32>,
    terminal: Option<OwnedFd>,
    failure: Option<Failure>,
    asked: Asked,
}

/// What an error has to name.
#[derive(Debug)]
struct Asked {
    program: String,
    cwd: String,
    limits: Vec<String>,
}

/// A process that runs its program.
#[derive(Debug)]
pub struct Begun {
    /// In our PID namespace; our child. It may have ended by now, and may even be reaped.
    pub pid: u32,
    /// The terminal's other side, with `process.terminal`.
    pub pty_master: Option<OwnedFd>,
}

/// Begins to run a process in the container of `plan.init_pid`, and returns at once: in all its namespaces and its cgroup, with
/// the ids, groups, capabilities, limits, no_new_privs, security label and seccomp filter of the plan, and no descriptor but its
/// stdio. It is our child (never init's), so that init leaves no zombie behind, and the caller reaps it. Pipes among the stdio
/// are given to the process's user, so that it can open them again as `/dev/stdout`. For single-threaded callers.
///
/// # Errors
/// [`ExecError`]; nothing of the process is left then.
pub fn begin(plan: &ExecPlan<'_>) -> Result<Starting, ExecError> {
    let io = |act: &'static str| {
        move |e: io::Error| ExecError::Io {
            act: act.to_string(),
            source: e,
        }
    };
    let prepared = Prepared::new(plan)?;
    super::give_pipes_away(plan, prepared.uid);
    let null = crate::mount::null().map_err(io("open /dev/null"))?;
    let (report, theirs) = fork::report_socket().map_err(io("make a socket"))?;
    crate::fd::set_nonblocking(&report, true).map_err(io("make a socket"))?;
    let fds = fd_plan(plan, null, theirs.as_fd()).map_err(io("arrange descriptors"))?;
    let fork = |join: Option<&Join>| {
        // SAFETY: the child's code makes async-signal-safe calls only, on what is prepared.
        unsafe {
            fork::fork_in(join, theirs.as_raw_fd(), || {
                child::first(&prepared, &fds, theirs.as_raw_fd())
            })
        }
    };
    let ahead = match fork(cgroup(plan, Cgroup::join)?.as_ref()) {
        // The container has made cgroups of its own in v2 and moved itself into one: that is where its processes may be.
        Err(e) if e.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
            fork(cgroup(plan, |own| own.join_where(plan.init_pid))?.as_ref())
        }
        other => other,
    };
    Ok(Starting {
        report,
        ahead: ahead.map_err(io("fork into the container's cgroup"))?,
        pid: None,
        terminal: None,
        failure: None,
        asked: Asked {
            program: prepared::program_of(plan),
            cwd: plan.process.cwd.clone(),
            limits: plan.process.rlimits.iter().map(|l| l.kind.clone()).collect(),
        },
    })
}

fn cgroup(
    plan: &ExecPlan<'_>,
    join: impl FnOnce(&Cgroup) -> crate::cgroup::Result<Join>,
) -> Result<Option<Join>, ExecError> {
    plan.cgroup.map(join).transpose().map_err(|e| ExecError::Io {
        act: "open the container's cgroup".into(),
        source: io::Error::other(e),
    })
}

fn fd_plan(plan: &ExecPlan<'_>, null: BorrowedFd<'_>, report: BorrowedFd<'_>) -> io::Result<FdPlan> {
    let mut wanted = vec![(plan.pidfd, child::PIDFD)];
    for (n, fd) in (0..).zip(plan.stdio) {
        wanted.push((fd.unwrap_or(null), n));
    }
    FdPlan::new(&wanted, null, report)
}

impl Starting {
    /// To be watched for reading: then [`Starting::hear`] has something to hear.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.report.as_fd()
    }

    /// The child that goes ahead; who reaps it may forget it.
    pub fn ahead(&self) -> &Child {
        &self.ahead
    }

    /// The process itself, as soon as it is known.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// The program, for messages.
    pub fn program(&self) -> &str {
        &self.asked.program
    }

    /// Hears what was said since; `None` while there is no end of it.
    ///
    /// # Errors
    /// [`ExecError`]: the process has ended, or ends by itself, without having run its program.
    pub fn hear(&mut self) -> Option<Result<Begun, ExecError>> {
        loop {
            match fork::receive(self.report.as_fd()) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return None,
                Ok(None) | Err(_) => return Some(self.end()),
                Ok(Some((Word::Started(pid), _))) if pid != self.ahead.pid => {
                    self.pid = self.pid.or(Some(pid));
                }
                Ok(Some((Word::Started(_), _))) => {}
                Ok(Some((Word::Failed(failure), _))) => self.failure = self.failure.or(Some(failure)),
                Ok(Some((Word::Descriptor, fd))) => self.terminal = self.terminal.take().or(fd),
            }
        }
    }

    fn end(&mut self) -> Result<Begun, ExecError> {
        match (self.failure, self.pid) {
            (Some(failure), _) => Err(self.explain(failure)),
            (None, Some(pid)) => Ok(Begun {
                pid,
                pty_master: self.terminal.take(),
            }),
            // Killed on the way, by the container's end or by its cgroup's.
            (None, None) => Err(ExecError::Gone),
        }
    }

    /// That it took longer than it may.
    pub fn timeout(&self) -> ExecError {
        ExecError::Timeout {
            program: self.asked.program.clone(),
        }
    }

    fn explain(&self, failure: Failure) -> ExecError {
        let source = io::Error::from(failure.errno);
        match (failure.stage, failure.errno) {
            (Stage::Exec, errno) => super::execution_error(self.asked.program.clone(), errno),
            (Stage::CwdOutside, _) => ExecError::CwdOutside {
                cwd: self.asked.cwd.clone(),
            },
            (Stage::Namespaces, Errno::SRCH) | (Stage::Fork, Errno::NOMEM) => ExecError::Gone,
            (Stage::Cwd, _) => ExecError::Io {
                act: format!("enter the working directory {}", self.asked.cwd),
                source,
            },
            (Stage::Rlimits, _) => {
                let kind = self.asked.limits.get(usize::from(failure.nth));
                ExecError::Io {
                    act: format!(
                        "set the resource limit {}",
                        kind.map(String::as_str).unwrap_or_default()
                    ),
                    source,
                }
            }
            (stage, _) => ExecError::Io {
                act: stage.to_string(),
                source,
            },
        }
    }
}
