//! One client's session: its streams and the runtime's work on them, from the upgrade to the last word.

mod command;
mod forward;

use std::time::Duration;

use bytes::Bytes;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use self::command::Streams;
use crate::config::Config;
use crate::http::Plan;
use crate::mux::{Driver, Ended, Framing, Limits, Mux};
use crate::negotiate::Wire;
use crate::runtime::Runtime;
use crate::spdy::Spdy;
use crate::token::Request;
use crate::transport::Transport;
use crate::websocket::{Channel, Channels, Tunnel};

/// How long a connection stays open for its last words, and the client's answer to them.
const FAREWELL: Duration = Duration::from_secs(5);

/// What sessions have around them.
pub(crate) struct Session<'a, R> {
    pub runtime: &'a R,
    pub config: &'a Config,
    /// The server stops.
    pub stop: &'a CancellationToken,
}

/// Serves a session until its connection is closed and the runtime has returned, or was given up.
pub(crate) async fn run<T: Transport, R: Runtime>(
    io: T,
    read_ahead: &Bytes,
    plan: Plan,
    session: &Session<'_, R>,
) {
    let Plan { request, agreed } = plan;
    let framing: Box<dyn Framing> = match agreed.wire {
        Wire::Spdy => Box::new(Spdy::new()),
        Wire::Channels { close_signal } => Box::new(Channels::new(close_signal, first_output(&request))),
        Wire::Tunnel => Box::new(Tunnel::new()),
    };
    let mux = Mux::new(framing);
    let streams = match &request {
        Request::Command(command) => Streams::at_first(&mux, command, agreed),
        Request::PortForward(_) => Streams::default(),
    };
    let limits = Limits {
        idle: session.config.idle_timeout,
        stalled: session.config.stalled_timeout,
        farewell: FAREWELL,
    };
    let driver = Driver::new(io, &mux, read_ahead, limits);
    let work = async {
        let abandoned = async {
            mux.hangup().wait().await;
            sleep(session.config.abandon_after).await;
        };
        let served = async {
            match request {
                Request::PortForward(request) => forward::serve(session, &mux, &request.pod).await,
                Request::Command(command) => command::serve(session, &mux, command, agreed, streams).await,
            }
        };
        tokio::select! {
            () = served => {}
            () = abandoned => tracing::warn!("a streaming session was given up: its client has gone, and its work does not end"),
        }
        mux.close();
    };
    let (ended, ()) = tokio::join!(driver.run(), work);
    match ended {
        Ended::Violated(violation) => tracing::info!(%violation, "a streaming client broke the protocol"),
        Ended::Stalled => tracing::info!(
            after = ?session.config.stalled_timeout,
            "a streaming client was sent away: it took nothing of what it was sent"
        ),
        Ended::Broken(error) => tracing::debug!(%error, "a streaming connection broke"),
        Ended::Finished | Ended::Goodbye | Ended::Gone | Ended::Idle => {
            tracing::debug!(?ended, "a streaming session ended");
        }
    }
}

/// The lowest channel on which a client gets something.
fn first_output(request: &Request) -> Channel {
    match request {
        Request::Command(command) => command::first_output(command),
        Request::PortForward(_) => Channel::Error,
    }
}
