//! Exec: a command in a running container, its streams a client's.
//!
//! The process gets pipes, or a terminal whose master the shim hands out; nothing but this copies between them and the
//! client. It has ended when it exits, whatever background child still holds its output.

use std::convert::Infallible;
use std::future::pending;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::termios::{Winsize, tcsetwinsize};
use slipway_shim_client::{Error as ShimError, Shim, pod as wire};
use slipway_stream::{Exec, Input, Output, Resizes, Stdio};
use tokio_util::sync::CancellationToken;

use super::SessionError;
use super::copy::{self, Fd};
use crate::container::command::{self, Killer, Owner};
use crate::daemon::Daemon;

const VERB: &str = "run a command in it";
/// What a terminal is taken for, as other runtimes have it.
const TERM: &str = "TERM=xterm";
/// How long a client with a terminal may take to tell its size before the command begins without.
const SIZE: Duration = Duration::from_millis(100);
/// How long what runs on a terminal may take to end once that is gone.
const AFTER_HANGUP: Duration = Duration::from_secs(1);
/// How long until it is killed again.
const AGAIN: Duration = Duration::from_millis(100);
/// How long a killed command may take to be gone.
const DEATH: Duration = Duration::from_secs(5);

/// Runs a command; its exit code, 128 + signal when it was killed by one.
pub async fn exec(daemon: &Arc<Daemon>, exec: Exec) -> Result<u8, SessionError> {
    let (container, shim, owner) = command::running(daemon, &exec.container, VERB)?;
    let exec_id = command::next_id("exec");
    let request = wire::ExecRequest {
        container_id: container.id().to_string(),
        exec_id: exec_id.clone(),
        args: exec.command,
        ..Default::default()
    };
    let killer = Killer::new(&shim, &container, &exec_id);
    let ended = if exec.tty {
        on_terminal(&shim, request, exec.stdio, killer).await?
    } else {
        on_pipes(&shim, request, exec.stdio, owner, killer).await?
    };
    Ok(u8::try_from(ended?.exit_code).unwrap_or(u8::MAX))
}

type Ended = Result<wire::ExecResponse, ShimError>;

async fn on_pipes(
    shim: &Shim,
    mut request: wire::ExecRequest,
    stdio: Stdio,
    owner: Owner,
    killer: Killer,
) -> Result<Ended, SessionError> {
    let mut theirs = Vec::new();
    let mut feed = None;
    if let Some(input) = stdio.stdin {
        let (reader, writer) = owner.pipe()?;
        theirs.push(reader);
        feed = Some((input, channel(writer)?));
        request.stdin = true;
    }
    let mut outputs = [None, None];
    for (output, (slot, asked)) in [stdio.stdout, stdio.stderr]
        .into_iter()
        .zip(outputs.iter_mut().zip([&mut request.stdout, &mut request.stderr]))
    {
        if let Some(output) = output {
            let (reader, writer) = owner.pipe()?;
            theirs.push(writer);
            *slot = Some((output, channel(reader)?));
            *asked = true;
        }
    }
    let [stdout, stderr] = outputs;
    let exited = CancellationToken::new();
    let ended = async { shim.exec(request, theirs).await.map(|(answer, _)| answer) };
    let stdin = async {
        if let Some((mut input, pipe)) = feed {
            copy::from_client(&mut input, &pipe).await;
            // Here the pipe is closed, and what else the client sends is discarded.
        }
        pending().await
    };
    let streams = Streams {
        outputs: async {
            tokio::join!(from_pipe(stdout, &exited), from_pipe(stderr, &exited));
        },
        aside: stdin,
        exited: &exited,
    };
    let hangup = stdio.hangup.wait();
    session(ended, streams, hangup, killer, Duration::ZERO).await
}

async fn from_pipe(stream: Option<(Output, Fd)>, exited: &CancellationToken) {
    if let Some((output, pipe)) = stream {
        copy::output(&pipe, Some(output), exited, false).await;
    }
}

async fn on_terminal(
    shim: &Shim,
    mut request: wire::ExecRequest,
    mut stdio: Stdio,
    mut killer: Killer,
) -> Result<Ended, SessionError> {
    request.env.push(TERM.to_owned());
    // Clients tell their size at once; a program that asks for it as its first act is to hear it.
    if let Ok(Some(size)) = tokio::time::timeout(SIZE, stdio.resizes.next()).await {
        request.columns = size.width.into();
        request.rows = size.height.into();
    }
    let started = tokio::select! {
        started = shim.exec_terminal(request) => started,
        () = stdio.hangup.wait() => return Err(SessionError::Hangup),
    };
    let (master, ended) = match started {
        Ok(started) => started,
        Err(error) => {
            killer.disarm();
            return Ok(Err(error));
        }
    };
    let terminal = channel(master)?;
    let exited = CancellationToken::new();
    let streams = Streams {
        outputs: copy::output(&terminal, stdio.stdout, &exited, true),
        aside: async {
            tokio::join!(typed(stdio.stdin, &terminal), resized(stdio.resizes, &terminal));
            pending().await
        },
        exited: &exited,
    };
    session(ended, streams, stdio.hangup.wait(), killer, AFTER_HANGUP).await
}

/// What is typed goes to the terminal; when no more is, the terminal stays.
async fn typed(input: Option<Input>, terminal: &Fd) {
    if let Some(mut input) = input {
        copy::from_client(&mut input, terminal).await;
    }
}

async fn resized(mut sizes: Resizes, terminal: &Fd) {
    while let Some(size) = sizes.next().await {
        let size = Winsize {
            ws_row: size.height,
            ws_col: size.width,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        if let Err(error) = tcsetwinsize(terminal, size) {
            tracing::debug!(%error, "cannot set the size of a terminal");
        }
    }
}

/// The copying of a session: what comes out of the process, what goes on beside it and never ends, and how the former
/// learns that no more comes.
struct Streams<'a, O, A> {
    outputs: O,
    aside: A,
    exited: &'a CancellationToken,
}

/// Sees a command through to its end and that of its output, or ends it when the client goes away.
async fn session<O, A>(
    ended: impl Future<Output = Ended>,
    streams: Streams<'_, O, A>,
    hangup: impl Future<Output = ()>,
    mut killer: Killer,
    patience: Duration,
) -> Result<Ended, SessionError>
where
    O: Future<Output = ()>,
    A: Future<Output = Infallible>,
{
    let Streams {
        outputs,
        aside,
        exited,
    } = streams;
    let mut ended = std::pin::pin!(ended);
    {
        let ran = async {
            let answer = ended.as_mut().await;
            exited.cancel();
            answer
        };
        let all = async { tokio::join!(ran, outputs).0 };
        tokio::select! {
            // In this order: a command that is to be killed has been asked for.
            biased;
            answer = all => {
                killer.disarm();
                return Ok(answer);
            }
            () = hangup => {}
            never = aside => match never {},
        }
        // Here the pipes are closed, and the terminal hangs up.
    }
    if exited.is_cancelled() {
        killer.disarm();
        return Err(SessionError::Hangup);
    }
    let ended = async {
        if patience.is_zero() || tokio::time::timeout(patience, ended.as_mut()).await.is_err() {
            tokio::select! {
                _ = ended => {}
                never = kill(&mut killer) => match never {},
            }
        }
    };
    // Whether it dies in time or not, nobody is there to be told.
    let _ = tokio::time::timeout(DEATH, ended).await;
    killer.disarm();
    Err(SessionError::Hangup)
}

/// Kills a command until it is dead: its request may still be on its way to the shim, and nothing there to be killed.
async fn kill(killer: &mut Killer) -> Infallible {
    loop {
        killer.kill().await;
        tokio::time::sleep(AGAIN).await;
    }
}

fn channel(fd: OwnedFd) -> Result<Fd, SessionError> {
    Fd::new(fd).map_err(SessionError::io("wait for a command's streams"))
}
