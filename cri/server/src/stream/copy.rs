//! Bytes between a client's streams and descriptors: neither side is read faster than the other takes, and what is idle
//! holds no buffer. It knows no container.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use slipway_stream::{Input, Output};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

/// What is read at once where there is much to read: a pipe's usual capacity.
const LARGE: usize = 64 << 10;
/// What a pipe holds once more goes through it than it held: each side then waits for the other a quarter as often, which
/// on a busy node is what much output takes its time for.
const WIDE: usize = 256 << 10;
/// What waits for a client that sends little.
const SMALL: usize = 4 << 10;
/// What is read of a process's output after its end: a pipe holds no more, and whoever goes on writing is not waited for.
const LAST: usize = 1 << 20;

/// A pipe's end or a terminal.
#[derive(Debug)]
pub struct Fd(AsyncFd<OwnedFd>);

impl Fd {
    /// Makes it non-blocking, and waits on it through the runtime.
    #[expect(
        deprecated,
        reason = "its successor is unsafe for types whose descriptor may change under it; an OwnedFd's does not"
    )]
    pub fn new(fd: OwnedFd) -> io::Result<Fd> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        AsyncFd::new(fd).map(Fd)
    }
}

impl AsFd for Fd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// Something bytes come from and go to without waiting in between.
pub trait Channel: AsFd + Sync {
    /// Waits until it may be read.
    fn readable(&self) -> impl Future<Output = io::Result<()>> + Send;
    /// Waits until it may be written.
    fn writable(&self) -> impl Future<Output = io::Result<()>> + Send;
    /// Reads; `WouldBlock` when there is nothing.
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Writes; `WouldBlock` when there is no room.
    fn try_write(&self, data: &[u8]) -> io::Result<usize>;
    /// Much goes through: has it hold more, where that can be had; whether it does now.
    fn widen(&self) -> bool {
        false
    }
}

impl Channel for Fd {
    async fn readable(&self) -> io::Result<()> {
        self.0.readable().await.map(|mut ready| ready.retain_ready())
    }

    async fn writable(&self) -> io::Result<()> {
        self.0.writable().await.map(|mut ready| ready.retain_ready())
    }

    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0
            .try_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, buffer)?))
    }

    fn try_write(&self, data: &[u8]) -> io::Result<usize> {
        self.0
            .try_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, data)?))
    }

    fn widen(&self) -> bool {
        // A terminal has no such thing, and the kernel need not grant it.
        rustix::pipe::fcntl_getpipe_size(self).is_ok_and(|size| size < WIDE)
            && rustix::pipe::fcntl_setpipe_size(self, WIDE).is_ok()
    }
}

impl Channel for TcpStream {
    async fn readable(&self) -> io::Result<()> {
        TcpStream::readable(self).await
    }

    async fn writable(&self) -> io::Result<()> {
        TcpStream::writable(self).await
    }

    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        TcpStream::try_read(self, buffer)
    }

    fn try_write(&self, data: &[u8]) -> io::Result<usize> {
        TcpStream::try_write(self, data)
    }
}

/// Who stopped first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The side that was read has nothing more to say.
    Source,
    /// The side that was written takes no more.
    Sink,
    /// The side that was read broke off.
    Broken,
}

/// From a channel to the client, until either ends. Without a client's stream, what comes is thrown away.
pub async fn to_client(from: &impl Channel, to: &mut Option<Output>) -> End {
    loop {
        if from.readable().await.is_err() {
            return End::Broken;
        }
        if let Some(end) = what_is_there(from, to, || false).await {
            return end;
        }
    }
}

/// Copies until there is nothing more to read for now, or `stop` says so.
async fn what_is_there(
    from: &impl Channel,
    to: &mut Option<Output>,
    stop: impl Fn() -> bool + Send,
) -> Option<End> {
    // Only for as long as there is something to read.
    let mut buffer = vec![0; LARGE];
    let mut narrow = true;
    while !stop() {
        match from.try_read(&mut buffer) {
            Ok(0) => return Some(End::Source),
            Ok(count) => {
                if count == LARGE && std::mem::take(&mut narrow) {
                    from.widen();
                }
                if let Some(client) = to
                    && client.write_all(&buffer[..count]).await.is_err()
                {
                    return Some(End::Sink);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A terminal that nobody has open any more says so by EIO.
            Err(_) => return Some(End::Broken),
        }
    }
    None
}

/// A process's output to the client: until it ends, or until the process has exited and what it had written is through.
/// A background child that still holds the other side is not waited for.
///
/// A client that wants no more of a pipe closes it, and the process learns of it by SIGPIPE. A terminal is read on
/// (`terminal`): it has one reader for everything.
pub async fn output(from: &Fd, mut to: Option<Output>, exited: &CancellationToken, terminal: bool) {
    loop {
        tokio::select! {
            ready = from.readable() => if ready.is_err() { return },
            () = exited.cancelled() => break,
        }
        match what_is_there(from, &mut to, || exited.is_cancelled()).await {
            None => {}
            Some(End::Sink) if terminal => to = None,
            Some(_) => return,
        }
    }
    let Some(mut to) = to else { return };
    let mut buffer = vec![0; LARGE];
    let mut left = LAST;
    while left > 0 {
        // Not by the runtime's idea of readiness, which may lag behind the kernel's.
        match rustix::io::read(from, &mut buffer[..LARGE.min(left)]) {
            Ok(0) => return,
            Ok(count) => {
                left -= count;
                if to.write_all(&buffer[..count]).await.is_err() {
                    return;
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// From the client to a channel, until either ends.
pub async fn from_client(from: &mut Input, to: &impl Channel) -> End {
    let mut buffer = vec![0; SMALL];
    loop {
        let count = match from.read(&mut buffer).await {
            Ok(0) => return End::Source,
            Ok(count) => count,
            Err(_) => return End::Broken,
        };
        if write_all(to, &buffer[..count]).await.is_err() {
            return End::Sink;
        }
        if count == buffer.len() && count < LARGE {
            buffer.resize(LARGE, 0);
        }
    }
}

async fn write_all(to: &impl Channel, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        match to.try_write(data) {
            Ok(count) => data = &data[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if !to.widen() {
                    to.writable().await?;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
