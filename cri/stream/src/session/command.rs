//! Exec and attach: gathers the streams the request asked for, has the runtime use them, and tells the client how it ended.

use std::convert::Infallible;
use std::future::{Future, pending};

use tokio::io::AsyncWriteExt as _;
use tokio::time::timeout;

use super::Session;
use crate::mux::{Input, Mux, Output, Refusal, StreamId};
use crate::negotiate::{Agreed, Wire};
use crate::resize;
use crate::runtime::{Attach, Exec, Runtime, Stdio};
use crate::status::{Outcome, chain};
use crate::token::Command;
use crate::websocket::Channel;

const STOPPING: &str = "the container runtime is stopping";

/// The streams a request asks for; the error stream is always there.
#[derive(Debug, Clone, Copy, Default)]
struct Wanted {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    resize: bool,
}

impl Wanted {
    fn of(command: &Command, resizes: bool) -> Wanted {
        let (stdin, stdout, stderr, tty) = match command {
            Command::Exec(request) => (request.stdin, request.stdout, request.stderr, request.tty),
            Command::Attach(request) => (request.stdin, request.stdout, request.stderr, request.tty),
        };
        Wanted {
            stdin,
            stdout,
            stderr,
            resize: tty && resizes,
        }
    }
}

/// The lowest channel on which the client gets something.
pub(super) fn first_output(command: &Command) -> Channel {
    let wanted = Wanted::of(command, true);
    match (wanted.stdout, wanted.stderr) {
        (true, _) => Channel::Stdout,
        (false, true) => Channel::Stderr,
        (false, false) => Channel::Error,
    }
}

/// The streams there are so far.
#[derive(Default)]
pub(super) struct Streams {
    error: Option<Output>,
    stdin: Option<Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    resize: Option<Input>,
    /// Our halves of the streams that only the client uses: a client takes their end for the end of its input.
    held: Vec<Output>,
}

impl Streams {
    fn complete(&self, wanted: Wanted) -> bool {
        self.error.is_some()
            && self.stdin.is_some() >= wanted.stdin
            && self.stdout.is_some() >= wanted.stdout
            && self.stderr.is_some() >= wanted.stderr
            && self.resize.is_some() >= wanted.resize
    }

    /// Gathers the streams as the client opens them, until those that were asked for are there; false if the client
    /// leaves before.
    async fn gather(&mut self, mux: &Mux, wanted: Wanted) -> bool {
        while !self.complete(wanted) {
            let Some(opened) = mux.next().await else {
                return false;
            };
            self.add(mux, opened.id, opened.headers.get("streamtype"), wanted);
        }
        true
    }

    /// Adds one stream. One that was not asked for is accepted, since clients open a stderr beside a terminal, and ended.
    fn add(&mut self, mux: &Mux, id: StreamId, kind: &str, wanted: Wanted) {
        let input = |slot: &mut Option<Input>, held: &mut Vec<Output>, wanted: bool| {
            let (input, output) = mux.accept(id);
            if wanted {
                *slot = Some(input);
                held.push(output);
            }
        };
        let output = |slot: &mut Option<Output>, wanted: bool| {
            let (_, output) = mux.accept(id);
            if wanted {
                *slot = Some(output);
            }
        };
        match kind {
            "error" if self.error.is_none() => output(&mut self.error, true),
            "stdin" if self.stdin.is_none() => input(&mut self.stdin, &mut self.held, wanted.stdin),
            "stdout" if self.stdout.is_none() => output(&mut self.stdout, wanted.stdout),
            "stderr" if self.stderr.is_none() => output(&mut self.stderr, wanted.stderr),
            "resize" if self.resize.is_none() => input(&mut self.resize, &mut self.held, wanted.resize),
            _ => mux.refuse(id, Refusal::Invalid),
        }
    }

    /// The streams that exist before the client says anything: what it sends on them may come with its request.
    pub fn at_first(mux: &Mux, command: &Command, agreed: Agreed) -> Streams {
        let Wire::Channels { .. } = agreed.wire else {
            return Streams::default();
        };
        let wanted = Wanted::of(command, agreed.resizes);
        let stream = |channel: Channel| mux.agreed(StreamId::from(channel as u8));
        Streams {
            error: Some(stream(Channel::Error).1),
            stdin: wanted.stdin.then(|| stream(Channel::Stdin).0),
            stdout: wanted.stdout.then(|| stream(Channel::Stdout).1),
            stderr: wanted.stderr.then(|| stream(Channel::Stderr).1),
            resize: wanted.resize.then(|| stream(Channel::Resize).0),
            held: Vec::new(),
        }
    }
}

/// Serves one exec or attach session.
pub(super) async fn serve<R: Runtime>(
    session: &Session<'_, R>,
    mux: &Mux,
    command: Command,
    agreed: Agreed,
    mut streams: Streams,
) {
    let wanted = Wanted::of(&command, agreed.resizes);
    let waiting = timeout(session.config.creation_timeout, streams.gather(mux, wanted));
    let refusal = tokio::select! {
        gathered = waiting => match gathered {
            Ok(true) => None,
            Ok(false) => return,
            Err(_) => Some("the client did not open the streams it asked for in time"),
        },
        () = session.stop.cancelled() => Some(STOPPING),
    };
    let Some(mut error) = streams.error.take() else {
        // There is nothing to say it on.
        return;
    };
    let outcome = match refusal {
        Some(reason) => Outcome::Failure(reason.to_owned()),
        None => work(session, mux, command, &mut streams).await,
    };
    // A client that is not there to be told needs not be told.
    let _ = error.write_all(&outcome.encode(agreed.status)).await;
}

/// Has the runtime do what was asked for.
async fn work<R: Runtime>(
    session: &Session<'_, R>,
    mux: &Mux,
    command: Command,
    streams: &mut Streams,
) -> Outcome {
    let (sizes, resizes) = resize::channel();
    let stdio = Stdio {
        stdin: streams.stdin.take(),
        stdout: streams.stdout.take(),
        stderr: streams.stderr.take(),
        resizes,
        hangup: mux.hangup(),
    };
    let resize = streams.resize.take();
    let pump = forever(async {
        if let Some(input) = resize {
            resize::pump(input, sizes).await;
        }
    });
    let late = forever(async {
        while let Some(opened) = mux.next().await {
            match opened.headers.get("streamtype") {
                kind @ ("stdin" | "stdout" | "stderr" | "resize") => {
                    Streams::default().add(mux, opened.id, kind, Wanted::default());
                }
                _ => mux.refuse(opened.id, Refusal::Invalid),
            }
        }
    });
    tokio::select! {
        outcome = run(session.runtime, command, stdio) => outcome,
        () = session.stop.cancelled() => Outcome::Failure(STOPPING.to_owned()),
        never = pump => match never {},
        never = late => match never {},
    }
}

async fn run<R: Runtime>(runtime: &R, command: Command, stdio: Stdio) -> Outcome {
    match command {
        Command::Exec(request) => {
            let container = request.container.clone();
            let exec = Exec {
                container: request.container,
                command: request.command,
                tty: request.tty,
                stdio,
            };
            match runtime.exec(exec).await {
                Ok(0) => Outcome::Success,
                Ok(code) => Outcome::ExitCode(code),
                Err(error) => failure("exec in", &container, &error),
            }
        }
        Command::Attach(request) => {
            let container = request.container.clone();
            let attach = Attach {
                container: request.container,
                tty: request.tty,
                stdio,
            };
            match runtime.attach(attach).await {
                Ok(()) => Outcome::Success,
                Err(error) => failure("attach to", &container, &error),
            }
        }
    }
}

fn failure(act: &str, container: &str, error: &dyn std::error::Error) -> Outcome {
    let message = format!("cannot {act} container {container}: {}", chain(error));
    tracing::debug!(message, "a streaming session failed");
    Outcome::Failure(message)
}

/// Does something on the side that ends nothing when it ends.
async fn forever(side: impl Future<Output = ()>) -> Infallible {
    side.await;
    pending().await
}
