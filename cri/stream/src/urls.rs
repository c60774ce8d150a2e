//! Handing out URLs: validates what is asked for, remembers it under a token, and says where to go.

use std::sync::Arc;

use crate::server::Gauge;
use crate::token::{Command, Request, Tokens};

/// A command in a container.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExecRequest {
    /// The container.
    pub container: String,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Give the command a terminal; not together with `stderr`.
    pub tty: bool,
    /// The client will send input.
    pub stdin: bool,
    /// The client wants output.
    pub stdout: bool,
    /// The client wants error output.
    pub stderr: bool,
}

/// A container's main process.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AttachRequest {
    /// The container.
    pub container: String,
    /// The container has a terminal; not together with `stderr`.
    pub tty: bool,
    /// The client will send input.
    pub stdin: bool,
    /// The client wants output.
    pub stdout: bool,
    /// The client wants error output.
    pub stderr: bool,
}

/// Connections into a pod, to ports that the client names later.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PortForwardRequest {
    /// The pod.
    pub pod: String,
}

/// Why no URL was given out.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// No container.
    #[error("container_id is empty")]
    NoContainer,
    /// No pod.
    #[error("pod_sandbox_id is empty")]
    NoPod,
    /// No command.
    #[error("cmd is empty")]
    NoCommand,
    /// A terminal has one output only.
    #[error("tty and stderr exclude each other: a terminal has one output")]
    TtyWithStderr,
    /// Nothing to stream.
    #[error("none of stdin, stdout and stderr is set")]
    NoStream,
    /// The request is too big to be kept.
    #[error("cmd has {bytes} bytes, more than the {limit} that are kept for a streaming request")]
    TooLarge {
        /// What it has.
        bytes: usize,
        /// What it may have.
        limit: usize,
    },
    /// Too many URLs are unused; they expire within a minute.
    #[error("too many streaming requests wait for their clients")]
    TooManyInFlight,
    /// The kernel gave no random numbers.
    #[error("cannot make a token for a streaming URL")]
    Random {
        /// The kernel's answer.
        source: getrandom::Error,
    },
}

/// Gives out the URLs that a [`Server`](crate::Server) serves. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Urls {
    pub(crate) base: Arc<str>,
    pub(crate) tokens: Arc<Tokens>,
    pub(crate) gauge: Arc<Gauge>,
}

impl Urls {
    /// A URL to run a command, good for one use.
    ///
    /// # Errors
    /// What is wrong with the request; [`RequestError::TooManyInFlight`] when too many URLs are unused.
    pub fn exec(&self, request: ExecRequest) -> Result<String, RequestError> {
        check_container(
            &request.container,
            request.tty,
            request.stdin,
            request.stdout,
            request.stderr,
        )?;
        if request.command.is_empty() {
            return Err(RequestError::NoCommand);
        }
        self.issue("exec", Request::Command(Command::Exec(request)))
    }

    /// A URL to attach to a container, good for one use.
    ///
    /// # Errors
    /// As [`exec`](Self::exec).
    pub fn attach(&self, request: AttachRequest) -> Result<String, RequestError> {
        check_container(
            &request.container,
            request.tty,
            request.stdin,
            request.stdout,
            request.stderr,
        )?;
        self.issue("attach", Request::Command(Command::Attach(request)))
    }

    /// A URL to forward ports of a pod, good for one use (which is one client's session, of many connections).
    ///
    /// # Errors
    /// As [`exec`](Self::exec).
    pub fn port_forward(&self, request: PortForwardRequest) -> Result<String, RequestError> {
        if request.pod.is_empty() {
            return Err(RequestError::NoPod);
        }
        self.issue("portforward", Request::PortForward(request))
    }

    /// How many connections are being served.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.gauge.get()
    }

    fn issue(&self, verb: &str, request: Request) -> Result<String, RequestError> {
        let token = self.tokens.issue(request)?;
        Ok(format!("{}/{verb}/{token}", self.base))
    }
}

fn check_container(
    container: &str,
    tty: bool,
    stdin: bool,
    stdout: bool,
    stderr: bool,
) -> Result<(), RequestError> {
    if container.is_empty() {
        return Err(RequestError::NoContainer);
    }
    if tty && stderr {
        return Err(RequestError::TtyWithStderr);
    }
    if !(stdin || stdout || stderr) {
        return Err(RequestError::NoStream);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn urls() -> Urls {
        Urls {
            base: "http://127.0.0.1:1".into(),
            tokens: Arc::new(Tokens::new(Duration::from_secs(60))),
            gauge: Arc::default(),
        }
    }

    fn exec() -> ExecRequest {
        ExecRequest {
            container: "c".to_owned(),
            command: vec!["true".to_owned()],
            stdout: true,
            ..ExecRequest::default()
        }
    }

    #[test]
    fn a_url_names_the_verb_and_a_token() {
        let url = urls().exec(exec()).unwrap();
        let token = url.strip_prefix("http://127.0.0.1:1/exec/").unwrap();
        assert_eq!(token.len(), 22);
        let url = urls()
            .port_forward(PortForwardRequest { pod: "p".to_owned() })
            .unwrap();
        assert!(url.starts_with("http://127.0.0.1:1/portforward/"));
    }

    #[test]
    fn what_cannot_be_streamed_gets_no_url() {
        use RequestError as E;
        let urls = urls();
        let of = |request| urls.exec(request).unwrap_err();
        assert!(matches!(
            of(ExecRequest {
                container: String::new(),
                ..exec()
            }),
            E::NoContainer
        ));
        assert!(matches!(
            of(ExecRequest {
                command: vec![],
                ..exec()
            }),
            E::NoCommand
        ));
        assert!(matches!(
            of(ExecRequest {
                tty: true,
                stderr: true,
                ..exec()
            }),
            E::TtyWithStderr
        ));
        assert!(matches!(
            of(ExecRequest {
                stdout: false,
                ..exec()
            }),
            E::NoStream
        ));
        assert!(matches!(
            of(ExecRequest {
                command: vec!["x".repeat(3 << 20)],
                ..exec()
            }),
            E::TooLarge { .. }
        ));
        assert!(matches!(
            urls.port_forward(PortForwardRequest::default()),
            Err(E::NoPod)
        ));
        assert!(matches!(
            urls.attach(AttachRequest::default()),
            Err(E::NoContainer)
        ));
    }
}
