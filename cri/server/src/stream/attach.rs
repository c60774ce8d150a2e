//! Attach: a client beside the log of a container's main process, and at its stdin.
//!
//! The shim copies what the process writes into our pipes as well as into the log; a client that does not keep up misses
//! some of it and is told so, and the container is never held up.
//!
//! A client whose input ends has detached, as its escape keys have it say, and its session ends; not so where that closes
//! the container's stdin (open once, no terminal): then what the container answers is still to come.

use std::future::pending;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use slipway_shim_client::{Shim, pod as wire};
use slipway_stream::{Attach, Input, Output, Resizes};
use tokio_util::sync::CancellationToken;

use super::SessionError;
use super::copy::{self, Fd};
use crate::container::command::{self, Owner};
use crate::daemon::Daemon;

const VERB: &str = "attach to it";
/// What the container may be ahead of a client: the largest pipe there is without a privilege.
const AHEAD: usize = 1 << 20;

/// Attaches a client until the container's output ends, or the client leaves.
pub async fn attach(daemon: &Arc<Daemon>, attach: Attach) -> Result<(), SessionError> {
    let (container, shim, owner) = command::running(daemon, &attach.container, VERB)?;
    let config = &container.record().config;
    let mut request = wire::AttachRequest {
        container_id: container.id().to_string(),
        ..Default::default()
    };
    let once = config.stdin_once && !config.tty;
    let mut theirs = Vec::new();
    let mut feed = None;
    // A container without stdin is attached to all the same: clients ask for everything, and show what there is.
    if let Some(input) = attach.stdio.stdin.filter(|_| config.stdin) {
        let (reader, writer) = owner.pipe()?;
        theirs.push(reader);
        feed = Some((input, channel(writer)?));
        request.stdin = true;
    }
    let mut stdout = None;
    if let Some(output) = attach.stdio.stdout {
        stdout = Some((output, outgoing(owner, &mut theirs)?));
        request.stdout = true;
    }
    let mut stderr = None;
    if let Some(output) = attach.stdio.stderr {
        stderr = Some((output, outgoing(owner, &mut theirs)?));
        request.stderr = true;
    }
    let silent = !request.stdout && !request.stderr;
    shim.attach(request, theirs).await?;

    let detached = CancellationToken::new();
    let outputs = async {
        if silent {
            tokio::select! {
                () = container.ended() => {}
                () = detached.cancelled() => {}
            }
        }
        tokio::join!(shown(stdout, &detached), shown(stderr, &detached));
    };
    let typing = async {
        if feed.is_some() {
            typed(feed).await;
            if !once {
                detached.cancel();
            }
        }
        pending().await
    };
    let resizing = async {
        resized(attach.stdio.resizes, &shim, container.id().as_str()).await;
        pending().await
    };
    tokio::select! {
        () = outputs => Ok(()),
        () = typing => Ok(()),
        () = resizing => Ok(()),
        () = attach.stdio.hangup.wait() => Err(SessionError::Hangup),
    }
}

/// The shim closes the pipe when the container's stream ends.
async fn shown(stream: Option<(Output, Fd)>, detached: &CancellationToken) {
    if let Some((output, pipe)) = stream {
        copy::output(&pipe, Some(output), detached, false).await;
    }
}

/// Where the client's input ends, so does our pipe; the shim then closes the container's stdin if that is open once.
async fn typed(feed: Option<(Input, Fd)>) {
    if let Some((mut input, pipe)) = feed {
        copy::from_client(&mut input, &pipe).await;
    }
}

async fn resized(mut sizes: Resizes, shim: &Shim, container: &str) {
    while let Some(size) = sizes.next().await {
        if let Err(error) = shim
            .resize(container, size.width.into(), size.height.into())
            .await
        {
            tracing::debug!(container, %error, "cannot set the size of a terminal");
        }
    }
}

/// A pipe that the shim writes: its other end is ours.
fn outgoing(owner: Owner, theirs: &mut Vec<OwnedFd>) -> Result<Fd, SessionError> {
    let (reader, writer) = owner.pipe()?;
    // As much as the kernel grants; less only means that a slow client misses more.
    let _ = rustix::pipe::fcntl_setpipe_size(&writer, AHEAD);
    theirs.push(writer);
    channel(reader)
}

fn channel(fd: OwnedFd) -> Result<Fd, SessionError> {
    Fd::new(fd).map_err(SessionError::io("wait for a container's streams"))
}
