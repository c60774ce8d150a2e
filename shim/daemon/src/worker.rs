//! One run of `slipway-runc`: started, heard out, never waited for. Knows its protocol, not what is done with the result.
//!
//! The worker sits in the container's cgroup from its first instruction, has the container's streams as its own, a
//! PID namespace to join as descriptor 4 where there is one, and a socket as descriptor 3. There it says one line of JSON: `{"pid":4711}` (a terminal's master travels along), or
//! `{"error":"…"}`. The container's init keeps the socket, close-on-exec, until it runs its program: so the end of the
//! stream after the start means that it does, and another `{"error":"…"}` that it cannot.

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::Deserialize;
use slipway_sys::cgroup::Cgroup;
use slipway_sys::process::{Child, Launch, Program, Status};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long creating a container may take.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// A worker that says more than this says nonsense.
const MAX_REPORT: usize = 64 * 1024;

/// A worker that did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// It could not be started.
    #[error("start the worker {}", path.display())]
    Start {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It ended without a word.
    #[error("the worker ended without a result ({how})")]
    Died {
        /// Its exit code or signal.
        how: String,
    },
    /// It took too long.
    #[error("the worker did not finish within {after:?} and was killed")]
    Deadline {
        /// Its time.
        after: Duration,
    },
    /// It reported a failure.
    #[error("{error}")]
    Reported {
        /// In its words.
        error: String,
        /// The container's program does not exist.
        not_found: bool,
    },
    /// What it said is no report.
    #[error("the worker's report is nonsense")]
    Nonsense,
    /// It named a process that is not in the container's cgroup.
    #[error(
        "the worker says that process {pid} is the container's init, and it is not in the container's cgroup"
    )]
    Stranger {
        /// As named.
        pid: u32,
    },
    /// The terminal that was asked for did not come.
    #[error("the worker sent no terminal")]
    NoTerminal,
    /// Its socket failed.
    #[error("hear the worker")]
    Io(#[source] io::Error),
}

#[derive(Deserialize)]
struct Line {
    pid: Option<u32>,
    error: Option<String>,
    exit_code: Option<u32>,
    #[serde(default)]
    warnings: Vec<String>,
}

/// What a worker (or, after the start, the container's init) has said.
#[derive(Debug)]
pub enum Said {
    /// Nothing whole yet.
    Nothing,
    /// The container's init exists.
    Created {
        /// On the host.
        pid: u32,
        /// The terminal's master.
        terminal: Option<OwnedFd>,
    },
    /// The socket has ended.
    End,
}

/// Our end of the report socket.
#[derive(Debug)]
pub struct Report {
    launch: Option<Launch>,
    socket: OwnedFd,
    input: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Report {
    /// To be watched for reading.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Why the worker, which has ended, was not executed; nothing when it was.
    pub fn not_launched(&self) -> Option<io::Error> {
        self.launch.as_ref()?.failure(Some(Duration::ZERO))
    }

    /// Reads what is there.
    ///
    /// # Errors
    /// The failure it reports, or that it cannot be understood.
    pub fn read(&mut self) -> Result<Said, WorkerError> {
        let mut some = [0u8; 1024];
        loop {
            if let Some(end) = self.input.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                return self.understand(&line);
            }
            match slipway_sys::fd::recv_fds(&self.socket, &mut some, &mut self.fds) {
                Ok(0) => return Ok(Said::End),
                Ok(n) => {
                    self.input.extend_from_slice(&some[..n]);
                    // One terminal at most; the others, which came unasked, are closed.
                    self.fds.truncate(1);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Said::Nothing),
                // The init, or the worker, was killed with something unread: an end like any other.
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(Said::End),
                Err(e) => return Err(WorkerError::Io(e)),
            }
            if self.input.len() > MAX_REPORT {
                return Err(WorkerError::Nonsense);
            }
        }
    }

    fn understand(&mut self, line: &[u8]) -> Result<Said, WorkerError> {
        let line: Line = serde_json::from_slice(line).map_err(|_| WorkerError::Nonsense)?;
        for warning in &line.warnings {
            crate::diag::warning!("the worker: {warning}");
        }
        match (line.pid, line.error) {
            (_, Some(error)) => Err(WorkerError::Reported {
                error,
                not_found: line.exit_code == Some(127),
            }),
            (Some(pid), None) => Ok(Said::Created {
                pid,
                terminal: self.fds.pop(),
            }),
            (None, None) => Err(WorkerError::Nonsense),
        }
    }
}

/// What to create.
pub struct Job<'a> {
    /// The worker's program.
    pub program: &'a Path,
    /// The same, opened to be executed.
    pub file: Option<BorrowedFd<'a>>,
    /// The container's id.
    pub id: &'a str,
    /// Its bundle.
    pub bundle: &'a Path,
    /// A PID namespace it joins.
    pub pid_namespace: Option<BorrowedFd<'a>>,
    /// Its streams; `None` is /dev/null.
    pub stdio: [Option<BorrowedFd<'a>>; 3],
    /// Its cgroup, ready.
    pub cgroup: &'a Cgroup,
}

/// Where the worker keeps its own record of a container.
pub fn state_dir(bundle: &Path) -> PathBuf {
    bundle.join("state")
}

/// Starts a worker.
///
/// # Errors
/// When it cannot be started.
pub fn start(job: &Job<'_>) -> Result<(Child, Report), WorkerError> {
    let failed = |source| WorkerError::Start {
        path: job.program.to_owned(),
        source,
    };
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(|e| failed(e.into()))?;
    slipway_sys::fd::set_nonblocking(&ours, true).map_err(failed)?;
    let state = state_dir(job.bundle);
    match std::fs::create_dir(&state) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed(e)),
        _ => {}
    }
    let join = job.cgroup.join().map_err(|e| failed(io::Error::other(e)))?;
    let mut fds = vec![(theirs.as_fd(), 3)];
    fds.extend(job.pid_namespace.map(|fd| (fd, 4)));
    fds.extend(
        job.stdio
            .iter()
            .zip(0..)
            .filter_map(|(fd, number)| Some(((*fd)?, number))),
    );
    let mut args: Vec<&OsStr> = vec![
        job.program.as_os_str(),
        "create".as_ref(),
        "--id".as_ref(),
        job.id.as_ref(),
        "--bundle".as_ref(),
        job.bundle.as_ref(),
        "--state".as_ref(),
        state.as_ref(),
    ];
    if job.pid_namespace.is_some() {
        args.extend(["--pid-namespace-fd", "4"].map(OsStr::new));
    }
    let program = Program {
        path: job.program,
        file: job.file,
        args: &args,
        env: &[],
        fds: &fds,
        new_session: true,
        die_with_parent: true,
        cgroup: Some(&join),
    };
    // Not waited for: it is in the container's cgroup already, which may be out of time, or frozen.
    let (child, launch) = slipway_sys::process::launch(&program).map_err(failed)?;
    Ok((
        child,
        Report {
            launch: Some(launch),
            socket: ours,
            input: Vec::new(),
            fds: Vec::new(),
        },
    ))
}

/// Tells a created container's init to run its program.
///
/// # Errors
/// When it does not listen: it is dead, or was started before.
pub fn release(bundle: &Path, id: &str) -> io::Result<()> {
    use rustix::fs::{CWD, Mode, OFlags};
    use std::os::fd::AsRawFd;
    let state = state_dir(bundle);
    let own = state.join(id);
    let dir = if own.join("notify.sock").exists() {
        own
    } else {
        state
    };
    // Through a descriptor: the path may be longer than a socket's address can be.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(CWD, &dir, flags, Mode::empty())?;
    let address = format!("/proc/self/fd/{}/notify.sock", dir.as_raw_fd());
    let mut stream = std::os::unix::net::UnixStream::connect(address)?;
    io::Write::write_all(&mut stream, b"start container")
}

/// Removes the worker's record of a container. A worker that was killed may have left mounts of a container's sources in
/// there: they are taken off first, and nothing behind a mount is ever removed.
///
/// # Errors
/// What does not go, naming it.
pub fn forget(bundle: &Path) -> io::Result<()> {
    slipway_sys::mount::remove_tree(&state_dir(bundle))
}

/// How a process ended, in words.
pub fn in_words(status: Status) -> String {
    match status {
        Status::Code(code) => format!("exit code {code}"),
        Status::Signal(signal) => format!("killed by signal {signal}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> (Report, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("sockets");
        (
            Report {
                launch: None,
                socket: ours,
                input: Vec::new(),
                fds: Vec::new(),
            },
            theirs,
        )
    }

    #[test]
    fn a_report_is_heard_in_pieces_and_brings_its_terminal() {
        let (mut report, worker) = report();
        rustix::io::write(&worker, b"{\"pid\":4").expect("sent");
        assert!(matches!(report.read(), Ok(Said::Nothing)));
        let terminal = tempfile::tempfile().expect("a file");
        slipway_sys::fd::send_fds(&worker, b"2}\n", &[terminal.as_fd()]).expect("sent");
        assert!(matches!(
            report.read(),
            Ok(Said::Created {
                pid: 42,
                terminal: Some(_)
            })
        ));
        assert!(matches!(report.read(), Ok(Said::Nothing)));
        drop(worker);
        assert!(matches!(report.read(), Ok(Said::End)));
    }

    #[test]
    fn of_the_descriptors_that_come_one_is_kept() {
        let (mut report, worker) = report();
        let file = tempfile::tempfile().expect("a file");
        let (mine, theirs) = std::io::pipe().expect("a pipe");
        slipway_sys::fd::send_fds(&worker, b"{", &[file.as_fd(), theirs.as_fd()]).expect("sent");
        for _ in 0..100 {
            slipway_sys::fd::send_fds(&worker, b" ", &[theirs.as_fd()]).expect("sent");
            assert!(matches!(report.read(), Ok(Said::Nothing)));
            assert_eq!(report.fds.len(), 1);
        }
        drop(theirs);
        assert_eq!(
            std::io::read_to_string(mine).expect("read"),
            "",
            "all others are closed"
        );
    }

    #[test]
    fn a_failure_is_told_in_the_workers_words() {
        let (mut report, worker) = report();
        rustix::io::write(&worker, b"{\"error\":\"no such program: x\",\"exit_code\":127}\n").expect("sent");
        let error = report.read().expect_err("a failure");
        assert!(matches!(&error, WorkerError::Reported { not_found: true, .. }));
        assert_eq!(error.to_string(), "no such program: x");
    }

    #[test]
    fn nonsense_and_endless_talk_are_errors() {
        let (mut told, worker) = report();
        rustix::io::write(&worker, b"hello\n").expect("sent");
        assert!(matches!(told.read(), Err(WorkerError::Nonsense)));
        let (mut told, worker) = report();
        let error = loop {
            let _ = rustix::io::write(&worker, &[b'x'; 4096]);
            match told.read() {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(matches!(error, WorkerError::Nonsense));
    }
}
