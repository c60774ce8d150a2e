//! The connection below everything: TCP, or TLS over it.

use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

/// A connection that can be asked whether its other end is still there.
pub(crate) trait Transport: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Whether the peer has hung up, although what it had sent before may not have been read yet.
    ///
    /// A session whose reader is held up by a full stream cannot see the end of the connection by reading.
    fn hung_up(&self) -> bool;
}

impl Transport for TcpStream {
    fn hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self, PollFlags::RDHUP)];
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        poll(
            &mut fds,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
        )
        .is_ok_and(|ready| ready > 0)
            && fds[0].revents().intersects(gone)
    }
}

impl Transport for TlsStream<TcpStream> {
    fn hung_up(&self) -> bool {
        self.get_ref().0.hung_up()
    }
}

/// Keystrokes go out at once; a peer that vanished while its window was shut is found out by probes.
///
/// # Errors
/// What the kernel says; a connection that cannot have these is not worth having.
pub(crate) fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(30))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(10))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    Ok(())
}
