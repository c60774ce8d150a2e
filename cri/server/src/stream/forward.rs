//! PortForward: one connection to a port on a pod's loopback address.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream as StdStream};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType};
use slipway_stream::{Forward, Input, Output};
use tokio::net::{TcpSocket, TcpStream};

use super::SessionError;
use super::copy::{self, End};
use crate::daemon::Daemon;
use crate::error::Error;
use crate::model::Scope;
use crate::pod::network;

const VERB: &str = "forward a connection to it";
/// How long a connection on a loopback address may take: its listener's backlog may be full.
const CONNECT: Duration = Duration::from_secs(10);

/// Forwards a connection until both directions have ended.
pub async fn forward(daemon: &Arc<Daemon>, forward: Forward) -> Result<(), SessionError> {
    let Forward {
        pod,
        port,
        input,
        output,
        hangup,
    } = forward;
    let connection = tokio::select! {
        connection = connect(daemon, &pod, port) => connection?,
        () = hangup.wait() => return Err(SessionError::Hangup),
    };
    connection.set_nodelay(true).ok();
    tokio::select! {
        () = carry(&connection, input, output) => Ok(()),
        () = hangup.wait() => Err(SessionError::Hangup),
    }
}

/// Carries bytes both ways. A direction that ends is ended on the other side; one that breaks ends both.
async fn carry(connection: &TcpStream, mut input: Input, output: Output) {
    let mut output = Some(output);
    let inward = async {
        match copy::from_client(&mut input, connection).await {
            End::Source => rustix::net::shutdown(connection, Shutdown::Write).map_err(|_| ()),
            End::Sink | End::Broken => Err(()),
        }
    };
    let outward = async {
        match copy::to_client(connection, &mut output).await {
            End::Source => {
                output = None;
                Ok(())
            }
            End::Sink | End::Broken => Err(()),
        }
    };
    // Which of them broke, and how, the client sees by its streams.
    let _ = tokio::try_join!(inward, outward);
}

/// Connects to a port on the pod's own loopback address: IPv4, then IPv6.
async fn connect(daemon: &Arc<Daemon>, pod: &str, port: u16) -> Result<TcpStream, SessionError> {
    let [v4, v6] = sockets(daemon, pod).await?;
    let first = match v4 {
        Ok(socket) => dial(socket, SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await,
        Err(error) => Err(error),
    };
    let source = match first {
        Ok(connection) => return Ok(connection),
        Err(error) => error,
    };
    if let Ok(socket) = v6
        && let Ok(connection) = dial(socket, SocketAddr::from((Ipv6Addr::LOCALHOST, port))).await
    {
        return Ok(connection);
    }
    // A pod need not have IPv6: what IPv4 said is what there is to know.
    Err(SessionError::NotListening { source })
}

type Sockets = [io::Result<OwnedFd>; 2];

/// Sockets that belong to the pod's network. A pod is not taken down while one is entered.
async fn sockets(daemon: &Arc<Daemon>, id: &str) -> Result<Sockets, SessionError> {
    let pod = daemon.visible_pod(id)?;
    let (_inside, _) = pod.enter(VERB).await?;
    if pod.record().config.namespaces.network == Scope::Node {
        return Ok(open());
    }
    let netns: PathBuf = network::netns(&pod);
    let id = pod.id().to_string();
    let opened = crate::blocking::run(move || {
        slipway_network::netns::in_netns(&netns, open)
            .map_err(Error::io("enter the network namespace", format!("of pod {id}")))
    });
    Ok(opened.await?)
}

fn open() -> Sockets {
    [AddressFamily::INET, AddressFamily::INET6].map(|family| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?)
    })
}

async fn dial(socket: OwnedFd, address: SocketAddr) -> io::Result<TcpStream> {
    let connecting = TcpSocket::from_std_stream(StdStream::from(socket)).connect(address);
    tokio::time::timeout(CONNECT, connecting)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
