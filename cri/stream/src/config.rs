//! What the streaming server can be told: where it listens, and how long it waits for whom.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// The settings of a [`Server`](crate::Server).
#[derive(Debug, Clone)]
pub struct Config {
    /// The address to listen on; it must be a loopback address, since kubelet is on the same node and whoever has a URL
    /// has a shell. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Serve HTTPS with these certificates.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// How long a client may take for the head of its request; what it dribbles in does not lengthen it.
    pub request_timeout: Duration,
    /// A session ends when nothing at all came or went for this long.
    pub idle_timeout: Duration,
    /// A session ends when the client let what it was sent lie for this long: what waits for it is memory, which a session in
    /// which nobody says anything does not hold. A terminal that somebody has paused looks the same.
    pub stalled_timeout: Duration,
    /// How long a client may take to open the streams its request asked for.
    pub creation_timeout: Duration,
    /// How long the runtime may take to return once the client has gone; then its future is dropped.
    pub abandon_after: Duration,
    /// How long a URL is good for.
    pub token_lifetime: Duration,
    /// How many sessions there are at once; more wait a moment for one to end and are refused then. Connections that have not
    /// asked for one with a good URL have room of their own.
    pub max_connections: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0),
            tls: None,
            request_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(4 * 60 * 60),
            stalled_timeout: Duration::from_secs(30 * 60),
            creation_timeout: Duration::from_secs(30),
            abandon_after: Duration::from_secs(10),
            token_lifetime: Duration::from_secs(60),
            max_connections: 1024,
        }
    }
}
