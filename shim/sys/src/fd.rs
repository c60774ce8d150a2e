//! Descriptors: closing what must not be inherited, passing them over unix sockets.

use crate::error::failed;
use rustix::io::{Errno, FdFlags};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

/// At most so many descriptors travel in one message.
pub const MAX_FDS: usize = 16;

/// Marks every descriptor from `first` on close-on-exec.
///
/// # Errors
/// What `close_range(2)` says (kernel 5.11).
pub fn cloexec_from(first: RawFd) -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    // SAFETY: the call sets a flag of descriptors and touches no memory.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            CLOSE_RANGE_CLOEXEC,
        )
    };
    if rc == 0 {
        Ok(())
    } else {
        Err(failed(|| "mark descriptors close-on-exec".to_string())(
            io::Error::last_os_error(),
        ))
    }
}

/// Sets or clears close-on-exec of one descriptor.
///
/// # Errors
/// What `fcntl(2)` says.
pub fn set_cloexec(fd: impl AsFd, on: bool) -> io::Result<()> {
    let flags = if on { FdFlags::CLOEXEC } else { FdFlags::empty() };
    rustix::io::fcntl_setfd(fd, flags).map_err(failed(|| "set a descriptor's close-on-exec flag".to_string()))
}

/// Sets or clears `O_NONBLOCK` of the open file.
///
/// # Errors
/// What `fcntl(2)` says.
pub fn set_nonblocking(fd: impl AsFd, on: bool) -> io::Result<()> {
    rustix::io::ioctl_fionbio(fd, on).map_err(failed(|| "set a descriptor's non-blocking flag".to_string()))
}

/// Takes over a descriptor that was inherited under a known number (fd 3 of a started program), close-on-exec from now.
/// Each number can be taken once; call it first thing in `main`, before anything else is opened.
///
/// # Errors
/// `EBADF` when there is none; `InvalidInput` for 0 to 2, numbers above 63, and the second time.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    static TAKEN: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let act = || format!("take over inherited descriptor {number}");
    if !(3..64).contains(&number) {
        return Err(failed(act)(crate::error::invalid("only 3 to 63 can be")));
    }
    // SAFETY: only probes the number.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(failed(act)(io::Error::last_os_error()));
    }
    if TAKEN.fetch_or(1 << number, std::sync::atomic::Ordering::SeqCst) & (1 << number) != 0 {
        return Err(failed(act)(crate::error::invalid("it was taken before")));
    }
    // SAFETY: it is open, and was not taken before; that nothing else opened it is the documented order of calls.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    set_cloexec(&fd, true)?;
    Ok(fd)
}

/// Sends bytes with descriptors attached to the first of them; returns how many bytes went.
///
/// # Errors
/// What `sendmsg(2)` says; `InvalidInput` for more than [`MAX_FDS`] descriptors. Never raises SIGPIPE.
pub fn send_fds(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if fds.len() > MAX_FDS || (!fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds))) {
        return Err(crate::error::invalid(format!(
            "{} descriptors do not fit in one message",
            fds.len()
        )));
    }
    loop {
        match rustix::net::sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Receives bytes and whatever descriptors came with them (close-on-exec); 0 bytes is the end of the stream.
///
/// # Errors
/// What `recvmsg(2)` says (`WouldBlock` on a non-blocking socket without data).
pub fn recv_fds(socket: impl AsFd, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    loop {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        match rustix::net::recvmsg(
            &socket,
            &mut [IoSliceMut::new(bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
            Ok(got) => {
                for message in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(more) = message {
                        fds.extend(more);
                    }
                }
                return Ok(got.bytes);
            }
        }
    }
}
