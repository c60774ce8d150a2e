//! What the server asks of a runtime: the only thing it knows of containers and pods.

use std::future::Future;

use crate::mux::{Hangup, Input, Output};
use crate::resize::Resizes;

/// Runs what clients ask for, on byte streams the server has set up.
///
/// Each call is one session, polled in the task of the session's connection: a call must not block its thread.
///
/// **When the client goes away**, [`Input`]s fail (after what had arrived before), [`Output`]s fail, and [`Hangup`]
/// fires. The call should then undo what the client alone wanted (end an exec'd process) and leave alone what it did not
/// own (an attached container), and return; it is dropped `Config::abandon_after` later.
///
/// **An `Ok(0)` from an [`Input`]** is different: the client has ended that stream, and only that stream.
pub trait Runtime: Send + Sync + 'static {
    /// Why something could not be done. It and its sources are what the user reads.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Runs a command in a container and returns its exit code once its output is written.
    ///
    /// # Errors
    /// When it could not be run at all.
    fn exec(&self, exec: Exec) -> impl Future<Output = Result<u8, Self::Error>> + Send;

    /// Connects a client with a container's main process, until either is done with the other.
    ///
    /// # Errors
    /// When there is nothing to attach to.
    fn attach(&self, attach: Attach) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Connects one forwarded connection with a port of a pod, until both directions have ended.
    ///
    /// # Errors
    /// When nothing listens there.
    fn port_forward(&self, forward: Forward) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

/// One exec session.
#[derive(Debug)]
pub struct Exec {
    /// The container, as in the CRI request.
    pub container: String,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Whether the command gets a terminal.
    pub tty: bool,
    /// The client's end.
    pub stdio: Stdio,
}

/// One attach session.
#[derive(Debug)]
pub struct Attach {
    /// The container, as in the CRI request.
    pub container: String,
    /// Whether the container has a terminal.
    pub tty: bool,
    /// The client's end.
    pub stdio: Stdio,
}

/// One forwarded connection; a client's session has any number of them at once.
#[derive(Debug)]
pub struct Forward {
    /// The pod, as in the CRI request.
    pub pod: String,
    /// The TCP port, not 0.
    pub port: u16,
    /// What the client sends.
    pub input: Input,
    /// What the client gets.
    pub output: Output,
    /// The end of the client's session.
    pub hangup: Hangup,
}

/// The streams a client asked for. Dropping an [`Input`] discards what else arrives on it; dropping an [`Output`] ends it.
#[derive(Debug)]
pub struct Stdio {
    /// What the client types.
    pub stdin: Option<Input>,
    /// Output, the terminal's where there is one.
    pub stdout: Option<Output>,
    /// Error output; never with a terminal.
    pub stderr: Option<Output>,
    /// The sizes of the client's terminal.
    pub resizes: Resizes,
    /// The end of the client's session.
    pub hangup: Hangup,
}
