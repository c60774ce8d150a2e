//! A process's stdin, stdout and stderr: what a request's strings mean, and the descriptors made for them. Knows neither
//! tasks nor who copies.
//!
//! | string | the process gets | the shim keeps |
//! |---|---|---|
//! | `""` | /dev/null | nothing |
//! | a fifo's path, `fifo://` | stdout, stderr: the fifo itself | the fifo, open both ways: its client may come and go |
//! | the same for stdin | a pipe | its other end and the fifo: stdin ends when the client that came has gone |
//! | `file://` | the file, appending | nothing |
//! | `cri-log://` | pipes | their other ends, and the log |
//! | `discard:` | pipes | their other ends, for Attach |
//! | `pipe:` | the descriptors sent along | nothing |
//! | `keep:`, `keep-once:` (stdin) | a pipe | its other end, for Attach |
//!
//! With a terminal the process gets that, and the shim copies between its master and the fifos, or into the log.

use crate::log::LogFile;
use rustix::fs::{CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::pipe::{PipeFlags, pipe_with};
use slipway_shim_api::names;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Streams that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The string means nothing here.
    #[error(
        "{stream} cannot be {value:?}: slipway knows fifos, cri-log://, file://, discard:, pipe: and keep:"
    )]
    Unknown {
        /// stdin, stdout or stderr.
        stream: &'static str,
        /// As given.
        value: String,
    },
    /// The request should have carried descriptors.
    #[error("the request carries {got} descriptors, and its streams need {need}")]
    Descriptors {
        /// As many came.
        got: usize,
        /// As many as the streams are.
        need: usize,
    },
    /// A path cannot be opened.
    #[error("open {} for {stream}", path.display())]
    Open {
        /// stdin, stdout or stderr.
        stream: &'static str,
        /// Of the fifo or file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel gives no pipe.
    #[error("make a pipe for {stream}")]
    Pipe {
        /// stdin, stdout or stderr.
        stream: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What stdin is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stdin {
    /// /dev/null
    Null,
    /// A fifo.
    Fifo(PathBuf),
    /// A pipe for Attach; `once`: until the first attached stdin has ended.
    Keep {
        /// See above.
        once: bool,
    },
}

/// What stdout or stderr is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// /dev/null
    Null,
    /// A fifo.
    Fifo(PathBuf),
    /// A file.
    File(PathBuf),
    /// A CRI log, of both streams.
    CriLog(PathBuf),
    /// Read and dropped, both streams.
    Discard,
    /// Two descriptors sent along, for both streams.
    Sent,
}

impl Stdin {
    /// # Errors
    /// [`StdioError::Unknown`]
    pub fn parse(value: &str) -> Result<Stdin, StdioError> {
        match value {
            "" => Ok(Stdin::Null),
            names::KEEP => Ok(Stdin::Keep { once: false }),
            names::KEEP_ONCE => Ok(Stdin::Keep { once: true }),
            _ => match absolute(value.strip_prefix(names::FIFO).unwrap_or(value)) {
                Some(path) => Ok(Stdin::Fifo(path)),
                None => Err(StdioError::Unknown {
                    stream: "stdin",
                    value: value.to_owned(),
                }),
            },
        }
    }
}

impl Output {
    /// # Errors
    /// [`StdioError::Unknown`]
    pub fn parse(value: &str, stream: &'static str) -> Result<Output, StdioError> {
        let strip = |prefix| value.strip_prefix(prefix).and_then(absolute);
        if value.is_empty() {
            return Ok(Output::Null);
        }
        match value {
            names::PIPE => return Ok(Output::Sent),
            names::DISCARD => return Ok(Output::Discard),
            _ => {}
        }
        strip(names::CRI_LOG)
            .map(Output::CriLog)
            .or_else(|| strip(names::FILE).map(Output::File))
            .or_else(|| strip(names::FIFO).map(Output::Fifo))
            .or_else(|| absolute(value).map(Output::Fifo))
            .ok_or_else(|| StdioError::Unknown {
                stream,
                value: value.to_owned(),
            })
    }
}

fn absolute(path: &str) -> Option<PathBuf> {
    path.starts_with('/').then(|| PathBuf::from(path))
}

/// The process's own descriptors; `None` is /dev/null.
#[derive(Debug, Default)]
pub struct Theirs {
    /// stdin, stdout, stderr.
    pub fds: [Option<OwnedFd>; 3],
}

/// What the shim keeps.
#[derive(Debug, Default)]
pub struct Ours {
    /// The other end of stdin's pipe.
    pub stdin: Option<OwnedFd>,
    /// The fifo that stdin comes from.
    pub stdin_fifo: Option<OwnedFd>,
    /// The other end of stdout's pipe.
    pub stdout: Option<OwnedFd>,
    /// The other end of stderr's pipe.
    pub stderr: Option<OwnedFd>,
    /// The log both are written to.
    pub log: Option<LogFile>,
    /// Fifos that output goes to: held open so that a client may come and go.
    pub fifos: Vec<OwnedFd>,
}

/// Makes the streams of a process without a terminal, whose pipes belong to `owner` (so that a program that is not root can
/// open /dev/stdout).
///
/// # Errors
/// [`StdioError`]; nothing stays open.
pub fn open(
    stdin: &Stdin,
    outputs: [&Output; 2],
    sent: Vec<OwnedFd>,
    owner: (u32, u32),
) -> Result<(Theirs, Ours), StdioError> {
    let mut theirs = Theirs::default();
    let mut ours = Ours::default();
    let got = sent.len();
    let mut sent = sent.into_iter();
    match stdin {
        Stdin::Null => {}
        Stdin::Fifo(path) => {
            ours.stdin_fifo = Some(open_fifo(path, OFlags::RDONLY | OFlags::NONBLOCK, "stdin")?);
            let (read, write) = pipe("stdin")?;
            ours.stdin = Some(nonblocking(write, "stdin")?);
            theirs.fds[0] = Some(read);
        }
        Stdin::Keep { .. } => {
            let (read, write) = pipe("stdin")?;
            ours.stdin = Some(nonblocking(write, "stdin")?);
            theirs.fds[0] = Some(read);
        }
    }
    for (place, (output, stream)) in outputs.into_iter().zip(["stdout", "stderr"]).enumerate() {
        let fd = &mut theirs.fds[place + 1];
        match output {
            Output::Null => {}
            Output::Fifo(path) => {
                ours.fifos
                    .push(open_fifo(path, OFlags::RDWR | OFlags::NONBLOCK, stream)?);
                *fd = Some(open_fifo(path, OFlags::WRONLY, stream)?);
            }
            Output::File(path) => *fd = Some(open_file(path, stream)?),
            Output::Sent => {
                let need = outputs.iter().filter(|o| ***o == Output::Sent).count();
                *fd = Some(sent.next().ok_or(StdioError::Descriptors { got, need })?);
            }
            Output::CriLog(_) | Output::Discard => {
                if let Output::CriLog(path) = output
                    && ours.log.is_none()
                {
                    ours.log = Some(open_log(path, stream)?);
                }
                let (read, write) = pipe(stream)?;
                let keep = if place == 0 {
                    &mut ours.stdout
                } else {
                    &mut ours.stderr
                };
                *keep = Some(nonblocking(read, stream)?);
                *fd = Some(write);
            }
        }
    }
    for fd in theirs.fds.iter().flatten() {
        give_to(fd, owner);
    }
    Ok((theirs, ours))
}

/// Opens what a terminal is copied to and from: the log, or fifos (stdin's, then stdout's).
///
/// # Errors
/// [`StdioError`]
pub fn open_for_terminal(stdin: &Stdin, stdout: &Output) -> Result<Ours, StdioError> {
    let mut ours = Ours::default();
    if let Stdin::Fifo(path) = stdin {
        ours.stdin_fifo = Some(open_fifo(path, OFlags::RDONLY | OFlags::NONBLOCK, "stdin")?);
    }
    match stdout {
        Output::Null => {}
        Output::Fifo(path) => ours
            .fifos
            .push(open_fifo(path, OFlags::RDWR | OFlags::NONBLOCK, "stdout")?),
        Output::File(path) => ours.fifos.push(open_file(path, "stdout")?),
        Output::CriLog(path) => ours.log = Some(open_log(path, "stdout")?),
        Output::Discard => {}
        Output::Sent => {
            return Err(StdioError::Unknown {
                stream: "stdout",
                value: names::PIPE.to_owned(),
            });
        }
    }
    Ok(ours)
}

/// Makes a descriptor non-blocking.
///
/// # Errors
/// What the call says, as a failed pipe.
pub fn nonblocking(fd: OwnedFd, stream: &'static str) -> Result<OwnedFd, StdioError> {
    match slipway_sys::fd::set_nonblocking(&fd, true) {
        Ok(()) => Ok(fd),
        Err(source) => Err(StdioError::Pipe { stream, source }),
    }
}

fn pipe(stream: &'static str) -> Result<(OwnedFd, OwnedFd), StdioError> {
    pipe_with(PipeFlags::CLOEXEC).map_err(|e| StdioError::Pipe {
        stream,
        source: e.into(),
    })
}

fn open_fifo(path: &Path, flags: OFlags, stream: &'static str) -> Result<OwnedFd, StdioError> {
    let open = || {
        let fd = rustix::fs::openat(CWD, path, flags | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())?;
        if FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) != FileType::Fifo {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a fifo"));
        }
        Ok(fd)
    };
    open().map_err(|source| StdioError::Open {
        stream,
        path: path.to_owned(),
        source,
    })
}

fn open_log(path: &Path, stream: &'static str) -> Result<LogFile, StdioError> {
    LogFile::open(path).map_err(|source| StdioError::Open {
        stream,
        path: path.to_owned(),
        source,
    })
}

fn open_file(path: &Path, stream: &'static str) -> Result<OwnedFd, StdioError> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::fs::openat(CWD, path, flags, Mode::from_raw_mode(0o600)).map_err(|e| StdioError::Open {
        stream,
        path: path.to_owned(),
        source: e.into(),
    })
}

/// Gives a pipe or fifo to the user a process runs as. Not a pipe, or not ours to give: then it stays as it is.
fn give_to(fd: &OwnedFd, (uid, gid): (u32, u32)) {
    let is_fifo = rustix::fs::fstat(fd.as_fd())
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Fifo);
    if is_fifo && uid != 0 {
        let _ = rustix::fs::fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn the_strings_of_a_request_mean_what_the_table_says() {
        assert_eq!(Stdin::parse("").expect("null"), Stdin::Null);
        assert_eq!(
            Stdin::parse("keep-once:").expect("kept"),
            Stdin::Keep { once: true }
        );
        assert_eq!(Stdin::parse("/f/in").expect("fifo"), Stdin::Fifo("/f/in".into()));
        let output = |s| Output::parse(s, "stdout");
        assert_eq!(
            output("cri-log:///var/log/0.log").expect("log"),
            Output::CriLog("/var/log/0.log".into())
        );
        assert_eq!(
            output("fifo:///f/out").expect("fifo"),
            Output::Fifo("/f/out".into())
        );
        assert_eq!(output("/f/out").expect("fifo"), Output::Fifo("/f/out".into()));
        assert_eq!(output("file:///f").expect("file"), Output::File("/f".into()));
        assert_eq!(output("pipe:").expect("sent"), Output::Sent);
        for bad in ["binary:///x", "relative", "cri-log://relative"] {
            assert!(output(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_fifo_is_opened_without_waiting_for_its_client() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| {
            let path = dir.path().join(name);
            rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).expect("a fifo");
            path
        };
        let (stdin, stdout) = (Stdin::Fifo(path("in")), Output::Fifo(path("out")));
        let (theirs, ours) = open(&stdin, [&stdout, &Output::Null], Vec::new(), (0, 0)).expect("opened");
        let [Some(_), Some(out), None] = theirs.fds else {
            panic!("stdin and stdout, no stderr")
        };
        let flags = rustix::fs::fcntl_getfl(&out).expect("flags");
        assert!(
            !flags.contains(OFlags::NONBLOCK),
            "the process does not see a non-blocking stdout"
        );
        rustix::io::write(&out, b"x").expect("written with no reader but the shim's hold");
        assert_eq!((ours.fifos.len(), ours.stdin_fifo.is_some()), (1, true));
    }

    #[test]
    fn a_request_without_its_descriptors_is_refused() {
        let sent = Output::Sent;
        let error = open(&Stdin::Null, [&sent, &sent], Vec::new(), (0, 0)).expect_err("none were sent");
        assert!(
            matches!(error, StdioError::Descriptors { need: 2, .. }),
            "{error}"
        );
    }

    #[test]
    fn root_pipes_belong_to_the_user_that_writes_them() {
        if !rustix::process::geteuid().is_root() {
            let _ = writeln!(std::io::stderr(), "SKIPPED: this test needs root");
            return;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let log = Output::CriLog(dir.path().join("0.log"));
        let (theirs, _ours) = open(&Stdin::Null, [&log, &log], Vec::new(), (1000, 1000)).expect("opened");
        let stat = rustix::fs::fstat(theirs.fds[1].as_ref().expect("stdout")).expect("stat");
        assert_eq!((stat.st_uid, stat.st_gid), (1000, 1000));
    }
}
