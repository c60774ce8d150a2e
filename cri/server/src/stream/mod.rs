//! Exec, Attach and PortForward: what the streaming server's clients get of containers and pods.
//!
//! ```text
//! client ⇄ slipway_stream ⇄ Sessions ⇄ pipes, a terminal's master ⇄ a process in the container   exec
//!                                    ⇄ pipes ⇄ the shim, which also writes the log              attach
//!                                    ⇄ a socket opened in the pod's network namespace           port-forward
//! ```
//! What a client runs ends with the client: a command whose session breaks off is killed with what it started, by us, and
//! by the shim when it is slipwayd that goes away. What a client only looks at (an attached container, a forwarded port)
//! goes on.

mod attach;
mod copy;
mod exec;
mod forward;
mod tls;

use std::io;
use std::sync::Arc;

use anyhow::Context as _;
use slipway_shim_client::Error as ShimError;
use slipway_stream::{Attach, Exec, Forward, Runtime};

use crate::daemon::Daemon;
use crate::error::Error;
use crate::memory;

/// The streaming server with our containers behind it.
pub type Server = slipway_stream::Server<Sessions>;

/// Serves sessions of containers and pods.
pub struct Sessions {
    daemon: Arc<Daemon>,
}

/// Why a session came to nothing. The client reads it, with its causes.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Verb(#[from] Error),
    /// The shim says what it attempted on which container.
    #[error(transparent)]
    Shim(#[from] ShimError),
    #[error("the client has gone")]
    Hangup,
    #[error("nothing accepts a connection to it")]
    NotListening { source: io::Error },
    #[error("cannot {act}")]
    Io { act: &'static str, source: io::Error },
}

impl SessionError {
    fn io(act: &'static str) -> impl FnOnce(io::Error) -> SessionError {
        move |source| SessionError::Io { act, source }
    }
}

/// Listens for clients' streams; nothing is served before [`Server::run`].
///
/// # Errors
/// The address is taken, or no certificate can be read.
pub async fn bind(daemon: &Arc<Daemon>) -> anyhow::Result<Server> {
    let wanted = &daemon.config.streaming;
    let tls = match &wanted.tls {
        Some(files) => Some(tls::load(files).context("cannot serve streams over TLS")?),
        None => None,
    };
    let config = slipway_stream::Config {
        listen: wanted.address,
        tls,
        idle_timeout: wanted.idle_timeout,
        stalled_timeout: wanted.stalled_timeout,
        ..slipway_stream::Config::default()
    };
    let sessions = Sessions {
        daemon: daemon.clone(),
    };
    Ok(Server::bind(config, sessions).await?)
}

impl Runtime for Sessions {
    type Error = SessionError;

    async fn exec(&self, exec: Exec) -> Result<u8, SessionError> {
        let _work = memory::Work;
        exec::exec(&self.daemon, exec).await
    }

    async fn attach(&self, attach: Attach) -> Result<(), SessionError> {
        let _work = memory::Work;
        attach::attach(&self.daemon, attach).await
    }

    async fn port_forward(&self, forward: Forward) -> Result<(), SessionError> {
        let _work = memory::Work;
        forward::forward(&self.daemon, forward).await
    }
}
