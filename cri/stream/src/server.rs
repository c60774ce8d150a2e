//! The listener: accepts connections, and gives each a task of its own. How many there may be is [`crate::room`]'s.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::http::{self, Upgraded};
use crate::room::{Room, Stranger};
use crate::runtime::Runtime;
use crate::session::{self, Session};
use crate::token::Tokens;
use crate::transport::{self, Transport};
use crate::urls::Urls;

/// How long a client may take to agree on TLS.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long sessions may take to say goodbye when the server stops.
const STOP: Duration = Duration::from_secs(5);

/// Why the server could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Whoever can connect and has a URL has a shell.
    #[error("refusing to stream on {address}: it is not a loopback address")]
    NotLoopback {
        /// The address asked for.
        address: SocketAddr,
    },
    /// The kernel says no.
    #[error("cannot listen on {address} for streams")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// Its answer.
        source: io::Error,
    },
}

/// How many connections there are.
#[derive(Debug, Default)]
pub(crate) struct Gauge(AtomicUsize);

/// A connection that is counted as long as this lives.
struct Counted<'a>(&'a Gauge);

impl Gauge {
    fn count(&self) -> Counted<'_> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Counted(self)
    }

    pub fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves the URLs that [`Urls`] gives out.
#[derive(Debug)]
pub struct Server<R> {
    listener: TcpListener,
    config: Config,
    runtime: R,
    urls: Urls,
}

/// What every connection needs.
struct Shared<R> {
    runtime: R,
    config: Config,
    tokens: Arc<Tokens>,
    gauge: Arc<Gauge>,
    room: Room,
    tls: Option<TlsAcceptor>,
    stop: CancellationToken,
}

impl<R: Runtime> Server<R> {
    /// Listens, but serves nothing before [`run`](Self::run).
    ///
    /// # Errors
    /// [`BindError`].
    pub async fn bind(config: Config, runtime: R) -> Result<Server<R>, BindError> {
        let address = config.listen;
        if !address.ip().is_loopback() {
            return Err(BindError::NotLoopback { address });
        }
        let failed = |source| BindError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let scheme = if config.tls.is_some() { "https" } else { "http" };
        let base = format!("{scheme}://{}", listener.local_addr().map_err(failed)?);
        let urls = Urls {
            base: base.into(),
            tokens: Arc::new(Tokens::new(config.token_lifetime)),
            gauge: Arc::default(),
        };
        Ok(Server {
            listener,
            config,
            runtime,
            urls,
        })
    }

    /// Where URLs are to be had.
    #[must_use]
    pub fn urls(&self) -> Urls {
        self.urls.clone()
    }

    /// Serves until `stop`; sessions that are going on then are told so and have a few seconds to end.
    pub async fn run(self, stop: impl Future<Output = ()> + Send) {
        let shared = Arc::new(Shared {
            room: Room::new(self.config.max_connections),
            runtime: self.runtime,
            tls: self.config.tls.clone().map(TlsAcceptor::from),
            config: self.config,
            tokens: self.urls.tokens,
            gauge: self.urls.gauge,
            stop: CancellationToken::new(),
        });
        let mut tasks = JoinSet::new();
        tokio::pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => break,
                Some(_) = tasks.join_next() => {}
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        let shared = shared.clone();
                        tasks.spawn(async move {
                            let _counted = shared.gauge.count();
                            connection(stream, &shared).await;
                        });
                    }
                    Err(error) => {
                        // Out of descriptors, most likely: it passes, or it does not, but not faster by asking again.
                        tracing::warn!(%error, "cannot accept a streaming connection");
                        sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
        shared.stop.cancel();
        let all = async { while tasks.join_next().await.is_some() {} };
        if timeout(STOP, all).await.is_err() {
            tracing::warn!("streaming sessions did not end in time and were cut off");
        }
    }
}

async fn connection<R: Runtime>(stream: TcpStream, shared: &Shared<R>) {
    if let Err(error) = transport::prepare(&stream) {
        tracing::debug!(%error, "a streaming connection was gone at once");
        return;
    }
    let stranger = shared.room.enter();
    let Some(acceptor) = &shared.tls else {
        return serve(stream, stranger, shared).await;
    };
    let agreed = tokio::select! {
        agreed = timeout(HANDSHAKE, acceptor.accept(stream)) => agreed,
        () = stranger.must_go() => return,
    };
    match agreed {
        Ok(Ok(stream)) => serve(stream, stranger, shared).await,
        Ok(Err(error)) => tracing::debug!(%error, "a streaming client did not agree on TLS"),
        Err(_) => tracing::debug!("a streaming client took too long over TLS"),
    }
}

async fn serve<T: Transport, R: Runtime>(io: T, stranger: Stranger<'_>, shared: &Shared<R>) {
    let upgraded = tokio::select! {
        upgraded = http::upgrade(
            io,
            &stranger,
            &shared.room,
            &shared.tokens,
            shared.config.request_timeout,
        ) => upgraded,
        () = stranger.must_go() => None,
        () = shared.stop.cancelled() => None,
    };
    let Some(Upgraded {
        room: _room,
        io,
        read_ahead,
        plan,
    }) = upgraded
    else {
        return;
    };
    let session = Session {
        runtime: &shared.runtime,
        config: &shared.config,
        stop: &shared.stop,
    };
    session::run(io, &read_ahead, plan, &session).await;
}
