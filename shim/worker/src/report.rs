//! The line of JSON on the report socket. Knows its shape, not what led to it.

use crate::create::{CreateError, Created};
use serde::Serialize;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// More than this of an error's text helps nobody, and a shim bounds what it hears.
const MAX_TEXT: usize = 16 * 1024;

/// Our end of the socket.
#[derive(Debug)]
pub struct Report {
    socket: OwnedFd,
}

#[derive(Serialize)]
struct Success<'a> {
    pid: u32,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    warnings: &'a [String],
}

#[derive(Serialize)]
struct Failure {
    error: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<u32>,
}

impl Report {
    /// Takes over the inherited socket; close-on-exec from now on.
    pub fn take(number: i32) -> io::Result<Report> {
        Ok(Report {
            socket: slipway_sys::fd::inherited(number)?,
        })
    }

    /// A second handle on the socket, for the container's init.
    pub fn share(&self) -> io::Result<Report> {
        Ok(Report {
            socket: self.socket.try_clone()?,
        })
    }

    /// The container exists and waits to be started.
    pub fn created(&self, created: &Created) -> io::Result<()> {
        let line = Success {
            pid: created.pid,
            warnings: &created.warnings,
        };
        let master = created.terminal.as_ref().map(|fd| fd.as_fd());
        self.send(&line, master.as_slice())
    }

    /// It could not be created.
    pub fn failed(&self, e: &CreateError) -> io::Result<()> {
        self.say(chain(e), e.exit_code())
    }

    /// In the container's init: its program could not be executed.
    pub fn not_executed(&self, e: &slipway_sys::exec::ExecError) -> io::Result<()> {
        self.say(chain(e), e.exit_code())
    }

    fn say(&self, mut error: String, exit_code: Option<u32>) -> io::Result<()> {
        if error.len() > MAX_TEXT {
            let end = (0..=MAX_TEXT)
                .rev()
                .find(|n| error.is_char_boundary(*n))
                .unwrap_or(0);
            error.truncate(end);
            error.push('…');
        }
        self.send(&Failure { error, exit_code }, &[])
    }

    fn send(&self, line: &impl Serialize, fds: &[std::os::fd::BorrowedFd<'_>]) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(line)?;
        bytes.push(b'\n');
        let mut sent = slipway_sys::fd::send_fds(&self.socket, &bytes, fds)?;
        while sent < bytes.len() {
            sent += slipway_sys::fd::send_fds(&self.socket, &bytes[sent..], &[])?;
        }
        Ok(())
    }
}

/// An error with all its causes; one that only repeats what was said is left out.
pub fn chain(e: &(dyn std::error::Error + 'static)) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}
