//! systemd, where it has started us: telling it (Type=notify) that we serve and that we end, and having it keep the CRI socket
//! while we are gone, so that who connects meanwhile waits for the next of us instead of being turned away. Without systemd
//! nothing happens.

use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};

/// The socket's name in systemd's store (`FileDescriptorStoreMax=` of the unit).
const CRI: &str = "cri";
/// What systemd gives us begins with this descriptor (sd_listen_fds(3)).
const FIRST: i32 = 3;

/// Sends one state, as sd_notify(3) does. Nobody depends on its arrival.
pub fn notify(state: &str) {
    let sent = to_systemd(|socket| socket.send(state.as_bytes()).map(drop));
    if let Some(Err(error)) = sent {
        tracing::warn!(%error, "systemd could not be told");
    }
}

/// The CRI socket that systemd has kept since the last slipwayd. To be asked once.
pub fn kept() -> Option<UnixListener> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    let names = std::env::var("LISTEN_FDNAMES").ok()?;
    let ours = number("LISTEN_PID") == Some(std::process::id()) && number("LISTEN_FDS") == Some(1);
    if !ours || names != CRI {
        return None;
    }
    match slipway_sys::fd::inherited(FIRST) {
        Ok(fd) => Some(UnixListener::from(fd)),
        Err(error) => {
            tracing::warn!(%error, "the socket that systemd has kept is of no use");
            None
        }
    }
}

/// Has systemd keep the socket; false where it does not (before systemd 254 nothing says so).
pub fn keep(socket: &UnixListener) -> bool {
    let stores = std::env::var("FDSTORE").is_ok_and(|most| most.parse().is_ok_and(|most: u32| most > 0));
    if !stores {
        return false;
    }
    let state = format!("FDSTORE=1\nFDNAME={CRI}");
    let sent = to_systemd(|to: &UnixDatagram| {
        slipway_sys::fd::send_fds(to.as_fd(), state.as_bytes(), &[socket.as_fd()]).map(drop)
    });
    if let Some(Err(error)) = &sent {
        tracing::warn!(%error, "systemd could not be given the socket to keep");
    }
    matches!(sent, Some(Ok(())))
}

/// Whether it is the socket that clients of `path` come to.
pub fn is_of(listener: &UnixListener, path: &std::path::Path) -> bool {
    let bound = listener.local_addr();
    let bound = bound.as_ref().ok().and_then(|address| address.as_pathname());
    bound == Some(path) && answers(path).is_ok()
}

/// Whether somebody listens at the path, without waiting where many do so that it is full.
fn answers(path: &std::path::Path) -> rustix::io::Result<()> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Err(rustix::io::Errno::AGAIN) => Ok(()),
        other => other,
    }
}

/// `None`: no systemd has started us.
fn to_systemd(send: impl FnOnce(&UnixDatagram) -> std::io::Result<()>) -> Option<std::io::Result<()>> {
    let name = std::env::var_os("NOTIFY_SOCKET")?;
    let name = name.to_string_lossy();
    let address = match name.strip_prefix('@') {
        Some(hidden) => SocketAddr::from_abstract_name(hidden),
        None => SocketAddr::from_pathname(&*name),
    };
    let connected = address.and_then(|address| {
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        Ok(socket)
    });
    Some(connected.and_then(|socket| send(&socket)))
}
