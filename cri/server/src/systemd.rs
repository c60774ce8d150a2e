//! systemd, where it has started us: telling it (Type=notify) that we serve and that we end, and having it keep the CRI socket
//! while we are gone, so that who connects meanwhile waits for the next of us instead of being turned away. Without systemd
//! nothing happens.

use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::path::Path;
use std::time::Duration;

/// The socket's name in systemd's store (`FileDescriptorStoreMax=` of the unit).
const CRI: &str = "cri";
/// What systemd gives us begins with this descriptor (sd_listen_fds(3)).
const FIRST: i32 = 3;
/// For systemd to have emptied its store: it may be reading every unit anew.
const PATIENCE: Duration = Duration::from_secs(10);

/// Sends one state, as sd_notify(3) does. Nobody depends on its arrival.
pub fn notify(state: &str) {
    let sent = to_systemd(|socket| socket.send(state.as_bytes()).map(drop));
    if let Some(Err(error)) = sent {
        tracing::warn!(%error, "systemd could not be told");
    }
}

/// The CRI socket that systemd has kept since the last slipwayd, where it is the one that clients of `path` come to. Another one
/// is taken out of its store again: systemd would listen on it for ever, and has no room for ours. To be asked once.
pub fn kept(path: &Path) -> Option<UnixListener> {
    if std::env::var("LISTEN_PID").ok()?.parse() != Ok(std::process::id()) {
        return None;
    }
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let count = std::env::var("LISTEN_FDS").ok()?.parse().ok()?;
    match take(count, &names)?.map(UnixListener::from) {
        Ok(socket) if is_of(&socket, path) => return Some(socket),
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "the socket that systemd has kept is of no use"),
    }
    match to_systemd(forget) {
        Some(Err(error)) => {
            tracing::warn!(%error, "systemd could not be told to keep another socket no longer")
        }
        told => tracing::debug!(told = told.is_some(), "systemd had kept another socket"),
    }
    None
}

/// What is named as ours of so many descriptors. None of the others, whosever they are, gets into a shim: one that held on to a
/// listening socket would keep it for as long as its pod lives.
fn take(count: u8, names: &str) -> Option<std::io::Result<OwnedFd>> {
    let mut names = names.split(':');
    let mut ours = None;
    for number in (FIRST..).take(count.into()) {
        let taken = slipway_sys::fd::inherited(number);
        match (names.next(), taken) {
            (Some(CRI), taken) if ours.is_none() => ours = Some(taken),
            // It stays open, and to itself: nobody here knows what it is for.
            (_, Ok(other)) => drop(other.into_raw_fd()),
            (name, Err(error)) => {
                tracing::warn!(%error, ?name, "a descriptor that systemd has given is none")
            }
        }
    }
    ours
}

/// Returns when the socket is out of the store, so that nobody listens on it any more.
fn forget(to: &UnixDatagram) -> std::io::Result<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    to.send(format!("FDSTOREREMOVE=1\nFDNAME={CRI}").as_bytes())?;
    // sd_notify_barrier(3): systemd closes what comes with this when it has done all that came before.
    let (ours, theirs) = std::io::pipe()?;
    slipway_sys::fd::send_fds(to.as_fd(), b"BARRIER=1", &[theirs.as_fd()])?;
    drop(theirs);
    let deadline = Timespec::try_from(PATIENCE).map_err(std::io::Error::other)?;
    let mut closed = [PollFd::new(&ours, PollFlags::empty())];
    match rustix::io::retry_on_intr(|| poll(&mut closed, Some(&deadline)))? {
        0 => Err(std::io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

/// Has systemd keep the socket; false where it does not (before systemd 254 nothing says so). Its store has room for one: it is
/// not to be given one that it has kept.
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

/// Whether it is the socket that clients of `path` come to, however that is spelled.
fn is_of(listener: &UnixListener, path: &Path) -> bool {
    let file = |path: &Path| std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let bound = listener.local_addr();
    let bound = bound.as_ref().ok().and_then(|address| address.as_pathname());
    bound.is_some_and(|bound| file(bound).is_some() && file(bound) == file(path)) && answers(path).is_ok()
}

/// Whether somebody listens at the path, without waiting where many do so that it is full.
fn answers(path: &Path) -> rustix::io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_that_of_every_path_to_its_file_while_somebody_can_come_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("s"), dir.path().join("other"));
        let socket = UnixListener::bind(&path).unwrap();
        std::os::unix::fs::symlink(dir.path(), dir.path().join("link")).unwrap();
        assert!(is_of(&socket, &path));
        assert!(is_of(&socket, &dir.path().join("link/s")));
        assert!(!is_of(&socket, &other));
        let another = UnixListener::bind(&other).unwrap();
        assert!(!is_of(&socket, &other));
        drop(another);
        // Nobody can come to it any more.
        std::fs::remove_file(&path).unwrap();
        assert!(!is_of(&socket, &path));
    }
}
